"""Plain English: docstrings of functions open with a verb, those of attributes do not, none with a question word."""

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
VERBS = {"Return", "Returns", "Yield", "Yields", "Check", "Checks", "Give", "Gives", "Get", "Gets"}
DOCSTRINGS_AT_LEAST = 1200


def docstrings(path: Path) -> Iterator[tuple[int, str, set[str]]]:
    """Yield (line, docstring, words that it must not open with), attributes' included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            forbidden = QUESTION_WORDS
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_"):
                is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
                forbidden = QUESTION_WORDS | (VERBS if is_property else NO_VERBS)
            yield getattr(node, "lineno", 1), text, forbidden
        body = getattr(node, "body", [])
        for above, below in pairwise(body) if isinstance(body, list) else ():
            match above, below:
                case ast.AnnAssign() | ast.Assign(), ast.Expr(value=ast.Constant(value=str(text))):
                    yield below.lineno, text, QUESTION_WORDS | VERBS


def test_docstrings_open_plainly() -> None:
    tests = Path(__file__).parent
    roots = (Path(raycontrolnet.__path__[0]), tests, tests.parent / "examples")
    seen, wrong = 0, []
    for path in [path for root in roots for path in sorted(root.rglob("*.py"))]:
        for line, text, forbidden in docstrings(path):
            seen += 1
            first = text.split()[0].rstrip(",.:;") if text.split() else ""
            if first in forbidden:
                wrong.append(f"{path.parent.name}/{path.name}:{line}: opens with {first!r}")
    assert wrong == []
    assert seen >= DOCSTRINGS_AT_LEAST
