"""Imports run one way, and what only talks stays light: every import of every file is read, none is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from fixtures_cli import HEAVY

import teal_cli
import teal_kernels

# Top to bottom: a room may import the rooms below its own, and itself.
LAYERS = (
    {"__main__"},
    {"app"},
    {"commands"},
    {"api"},
    {"plots"},
    {"bench"},
    {"runs"},
    {"store", "decoding", "passes"},
    {"sparsity"},
    {"data", "model"},
    {"teal_kernels"},
    {"ui"},
    {"registry"},
    {"settings"},
    {"files", "checks"},
    {"errors", "version", "teal_cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

ALLOWED = {
    ("teal_cli", "store"),  # the library's face, on first use
    ("teal_cli", "api"),
    ("ui.completion", "runs"),  # the names of recipes
}

LIGHT = {"app", "__main__", "commands", "ui", "registry", "settings", "files", "checks", "errors", "teal_cli"}
"""Rooms that import nothing heavy, nor anything of ours that does, until a function is called."""

COMPUTES = "registry.convert"
"""GGUF to safetensors is arithmetic; the registry imports it when there is something to convert."""


def _modules() -> dict[str, Path]:
    """Full dotted name -> file, of every module of both packages."""
    found = {}
    for package in (teal_cli, teal_kernels):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            parts = [package.__name__, *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def room(module: str) -> str:
    """`teal_cli.store.writer` -> `store`, `teal_kernels.backends` -> `teal_kernels`."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "teal_cli" and rest else package


def within(module: str) -> str:
    """`teal_cli.store.writer` -> `store.writer`: how the tables above name a module."""
    return module.removeprefix("teal_cli.")


@cache
def imports(module: str, *, typing: bool = False) -> tuple[tuple[str, bool], ...]:
    """(name, whether importing the module imports it) of each import; those for type checking only if `typing`.

    `from a import b` counts as a.b where that is a module of ours, else as a.
    """

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield (whole if whole in MODULES else str(child.module)), at_import
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, at_import and not inside)

    return tuple(walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), True))


def is_leaf(module: str) -> bool:
    """Constants and plain dataclasses that import nothing but the standard library are open to every room."""
    return not any(name in MODULES or name.partition(".")[0] in HEAVY for name, _ in imports(module))


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    here = room(module)
    assert here in LEVEL, f"{module} is in no layer: give {here} a place in LAYERS"
    for name, _ in imports(module):
        if name not in MODULES or is_leaf(name):
            continue
        there = room(name)
        if there != here and (within(module), there) not in ALLOWED:
            assert LEVEL[there] > LEVEL[here], f"{module} imports {name}, but {there} is not below {here}"


def test_no_file_imports_itself_through_others() -> None:
    """Imports inside functions and those for type checking count."""
    graph = {module: {name for name, _ in imports(module, typing=True) if name in MODULES} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in LIGHT and not within(m).startswith(COMPUTES)])
def test_what_talks_imports_nothing_heavy(module: str) -> None:
    """Follows the imports at module level through our own modules."""
    seen: set[str] = set()
    paths = [(module,)]
    while paths:
        path = paths.pop()
        for name, at_import in imports(path[-1]):
            if at_import:
                assert name.partition(".")[0] not in HEAVY, " imports ".join((*path, name))
                if name in MODULES and name not in seen:
                    seen.add(name)
                    paths.append((*path, name))


def test_only_ui_and_commands_print() -> None:
    for module, path in MODULES.items():
        if room(module) not in {"ui", "commands"}:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id != "print", f"{path}:{node.lineno} prints"
