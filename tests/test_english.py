"""Plain English: docstrings of functions open with a verb, none opens with a question word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import raycontrolnet

QUESTION_WORDS = {"What", "Whether", "How", "Of", "Those", "That", "Where", "When", "Which", "Who", "Why"}
NO_VERBS = {
    "A", "All", "An", "As", "Each", "Every", "If", "It", "Its", "No", "None", "Not", "One", "Seconds", "So", "Some",
    "The", "These", "This",
    "By", "For", "From", "In", "On", "With",
}  # fmt: skip
DOCSTRINGS_AT_LEAST = 1200


def docstrings(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, docstring, True if it is a function's and must open with a verb), attributes' included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            is_function = isinstance(node, ast.FunctionDef) and not node.name.startswith("test_")
            is_property = isinstance(node, ast.FunctionDef) and "property" in "".join(
                ast.unparse(decorator) for decorator in node.decorator_list
            )
            yield getattr(node, "lineno", 1), text, is_function and not is_property
        body = getattr(node, "body", [])
        for above, below in pairwise(body) if isinstance(body, list) else ():
            match above, below:
                case ast.AnnAssign() | ast.Assign(), ast.Expr(value=ast.Constant(value=str(text))):
                    yield below.lineno, text, False


def test_docstrings_open_plainly() -> None:
    tests = Path(__file__).parent
    roots = (Path(raycontrolnet.__path__[0]), tests, tests.parent / "examples")
    seen, wrong = 0, []
    for path in [path for root in roots for path in sorted(root.rglob("*.py"))]:
        for line, text, needs_verb in docstrings(path):
            seen += 1
            first = text.split()[0].rstrip(",.:;") if text.split() else ""
            if first in QUESTION_WORDS | (NO_VERBS if needs_verb else set()):
                wrong.append(f"{path.parent.name}/{path.name}:{line}: opens with {first!r}")
    assert wrong == []
    assert seen >= DOCSTRINGS_AT_LEAST
