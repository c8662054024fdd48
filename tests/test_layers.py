"""Imports go one way: read from the source with `ast`, so that imports inside functions count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest

LAYERS: tuple[tuple[str, ...], ...] = (
    ("version", "text", "signals"),
    ("errors", "quiet"),
    ("storage",),
    ("config",),
    ("cluster",),
    ("data",),
    ("conditions", "model"),
    ("latents", "sampling"),
    ("training",),
    ("predict", "report", "hub", "train_controlnet"),
    ("launch",),
    ("tune", "demo"),
    ("cli",),
    ("", "__main__", "train"),  # "" is raycontrolnet/__init__.py, the names for users of Python
)
"""From the bottom up. A module imports from lower layers, and from its own folder."""

LOOSE_FILES_AT_MOST = 10
"""Files at the package's top, beside the folders."""

RAY_DRIVERS = (
    "cluster.", "train_controlnet", "training.validat", "data.stream", "latents.encode", "conditions.make",
    "launch.workers", "launch.training_stream", "tune.",
)  # fmt: skip
"""Beginnings of the names of modules that may import ray."""

RAY_PRIVATE = re.compile(
    r"\bray\.(?:\w+\.)*(?:_\w+|v2\b)|_internal\b|_topology\b|_initialize_and_run_controller|_create_default_callbacks"
    r"|_register_sigint_handler|custom_execution_callback_classes|train\.collective|CheckpointUploadMode|pickled_error_file"
    r"|_stopped_trials|\bray\.nodes\b|__internal_head__|ray_bootstrap_config|internal_kv|validate_storage_marker"
    r"|checkpoint_manager_snapshot|\bRAY_(?!ADDRESS\b)[a-zA-Z_]+\b|\bTUNE_[A-Z]+_\w+"
)
"""Names of Ray that are private, alpha or undocumented, and environment variables other than RAY_ADDRESS."""

TORCH_FREE = ("", "__main__", "cli", "config", "data", "errors", "quiet", "signals", "storage", "text", "version")
"""Importing these must not wait for torch."""

LATE_IMPORT = re.compile(r'"([a-z_.]+):[a-z_]+"')

When = Literal["module", "function", "script", "types"]

HEAVY = {"accelerate", "cv2", "datasets", "diffusers", "ray", "torch", "transformers"}


@dataclass(frozen=True)
class Import:
    importer: str
    """Module name without the leading `raycontrolnet.`; empty for the package itself."""
    target: str
    """Imported module: as `importer` if `own`, else the name of another top-level package."""
    own: bool
    when: When
    """Run with the module, later in a function, by `python -m` of the module alone, or for the type checker alone."""

    def __str__(self) -> str:
        return f"{self.importer or '__init__'} imports {self.target or 'the package itself'} (in {self.when})"


@cache
def modules() -> dict[str, Path]:
    """Return module name without the leading `raycontrolnet.` -> its file; folders by their `__init__`."""
    spec = find_spec("raycontrolnet")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    files = {path: path.relative_to(root).with_suffix("") for path in sorted(root.rglob("*.py"))}
    return {".".join(name.parts).removesuffix("__init__").rstrip("."): path for path, name in files.items()}


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module, path in modules().items() for found in imports_of(module, path))


def imports_of(module: str, path: Path) -> Iterator[Import]:
    for node, when in import_statements(ast.parse(path.read_text(encoding="utf-8")), "module"):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            own = package == "raycontrolnet"
            if own and rest not in modules():  # a name in a module, not a module
                rest = rest.rpartition(".")[0]
            yield Import(module, rest if own else package, own, when)
    if module == "cli":  # which names what it imports late as `module:name`
        for name in LATE_IMPORT.findall(path.read_text(encoding="utf-8")):
            yield Import(module, name, True, "function")


def import_statements(node: ast.AST, when: When) -> Iterator[tuple[ast.Import | ast.ImportFrom, When]]:
    """Yield the imports below `node`, which itself runs at `when`."""
    match node:
        case ast.Import() | ast.ImportFrom():
            yield node, when
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            for statement in node.body:
                yield from import_statements(statement, "types")
            for statement in node.orelse:
                yield from import_statements(statement, when)
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            for statement in node.body:
                yield from import_statements(statement, "script")
        case _:
            in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and when == "module"
            for child in ast.iter_child_nodes(node):
                yield from import_statements(child, "function" if in_function else when)


def room(module: str) -> str:
    """Return the folder or the file at the top that a module belongs to."""
    return module.partition(".")[0]


def height(module: str) -> int:
    (found,) = (height for height, rooms in enumerate(LAYERS) if room(module) in rooms)
    return found


def test_the_package_was_read() -> None:
    assert len(modules()) >= MODULES_AT_LEAST
    own = [found for found in imports() if found.own]
    assert len(own) >= OWN_IMPORTS_AT_LEAST
    assert len(imports()) - len(own) >= OTHER_IMPORTS_AT_LEAST
    assert {found.when for found in imports()} >= {"module", "function", "types"}
    assert {found.importer for found in own} >= {"config.train_config", "data.stream", "model.step"}


def test_every_module_has_a_layer() -> None:
    rooms = {name for layer in LAYERS for name in layer}
    assert not {room(module) for module in modules()} - rooms, "put it into LAYERS, and into CONTRIBUTING.md"


def test_few_files_lie_loose_at_the_top() -> None:
    assert (
        5
        < sum("." not in module and path.name != "__init__.py" for module, path in modules().items()) + 1
        <= (LOOSE_FILES_AT_MOST)
    )


def test_imports_go_down() -> None:
    wrong = [
        str(found)
        for found in imports()
        if found.own
        and found.when != "script"  # `python -m raycontrolnet.train` is the command line
        and height(found.target) >= height(found.importer)
        and not (room(found.target) == room(found.importer) != "")
    ]
    assert wrong == []


def test_only_the_command_line_knows_the_demo() -> None:
    users = {found.importer for found in imports() if found.own and room(found.target) == "demo"}
    assert {user for user in users if room(user) != "demo"} == {"cli"}


def test_no_circles_in_what_is_imported_with_a_module() -> None:
    needs: dict[str, set[str]] = {module: set() for module in modules()}
    for found in imports():
        if found.own and found.when == "module" and found.target in needs and found.target != found.importer:
            needs[found.importer].add(found.target)
    while ready := {module for module, needed in needs.items() if not needed}:
        needs = {module: needed - ready for module, needed in needs.items() if module not in ready}
    assert needs == {}


def test_ray_is_imported_only_where_ray_is_driven() -> None:
    users = {found.importer for found in imports() if found.target == "ray" and not found.own}
    assert "data.stream" in users
    assert {user for user in users if not user.startswith(RAY_DRIVERS)} == set()


def test_rays_private_names_stay_in_cluster() -> None:
    """So that a new Ray can break one room alone; tests/test_ray_hooks.py looks at the room."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for module, path in modules().items():
        names = {f"{module}: {name}" for name in RAY_PRIVATE.findall(path.read_text(encoding="utf-8"))}
        found[room(module) == "cluster"] |= names
    assert found[False] == set()
    assert len(found[True]) >= RAY_PRIVATE_AT_LEAST


def test_the_mathematics_imports_torch_alone() -> None:
    found = [found for found in imports() if found.importer == "model.diffusion"]
    packages = {one.target for one in found if one.when != "types" and not one.own}
    assert packages - set(sys.stdlib_module_names) == {"torch"}
    assert not [str(one) for one in found if one.own]


def test_torch_is_not_imported_with_config_data_and_cli() -> None:
    wrong = [
        str(found)
        for found in imports()
        if room(found.importer) in TORCH_FREE and found.when == "module" and found.target == "torch"
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module", ["", "config.sweep_config", "config.train_config", "cli", "demo.demo", "launch.training_stream"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    """Nothing heavy is loaded through what a module imports: `--help` waits, for the last one a process of Ray's."""
    assert module in modules()
    name = f"raycontrolnet.{module}".rstrip(".")
    code = f"import sys, {name}; print(*sorted({HEAVY} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []


# So that these tests cannot pass on nothing; lower them only together with the package.
MODULES_AT_LEAST = 95
OWN_IMPORTS_AT_LEAST = 400
OTHER_IMPORTS_AT_LEAST = 500
RAY_PRIVATE_AT_LEAST = 20
