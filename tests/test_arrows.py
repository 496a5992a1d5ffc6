"""The layout: every import runs down the floors, wherever it stands in a file, and no files import each other."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvcompile

ROOT = Path(hvcompile.__file__).parent
FLOORS = (
    ("__main__",),
    ("app",),
    ("__init__", "report"),
    ("lowered",),
    ("explanation", "artifacts"),
    ("backend",),
    ("sealing", "as_captured"),
    ("dump", "passes"),
    ("options",),
    ("rewriting",),
    ("runtime", "pipeline"),
    ("trunk",),
    ("graph",),
    ("ranks", "float8"),
    ("hollow",),
    ("torch_private", "inputs", "outputs"),
    ("journal", "errors", "version"),
)
"""From the top down. A room imports from the floors below it and from itself; rooms of one floor don't meet."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def files_of(root: Path) -> dict[str, Path]:
    """The modules below a package's folder by their dotted names, those behind the link ``passes`` too."""
    files = [*root.rglob("*.py"), *(root / "passes").glob("*.py")]
    found = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(["hvcompile", *(part for part in parts if part != "__init__")])] = file
    return found


def imports_of(module: str, file: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Every module of ours that a file imports, with the line: inside functions and under TYPE_CHECKING as well.

    An attribute of the package, and a name that is given to ``import_module`` or ``__import__``, count like an import.
    """
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [inner if (inner := f"{base}.{alias.name}") in modules else base for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [name for name in [ast.unparse(node)] if name in modules]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            names = [item.value for item in node.args if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        for name in names:
            if name.split(".")[0] in {"hvcompile", "passes"}:
                yield getattr(node, "lineno", 0), name if name.startswith("hvcompile") else f"hvcompile.{name}"


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def faults(root: Path) -> list[str]:
    """The imports of a package that do not run down, and its circles of files."""
    modules, found = files_of(root), []
    edges: dict[str, set[str]] = {}
    for module, file in modules.items():
        room = room_of(module)
        if room not in FLOOR_OF:
            found.append(f"{module} stands on no floor")
            continue
        for line, other in imports_of(module, file, modules):
            edges.setdefault(module, set()).add(other)
            target = room_of(other)
            if target != room and FLOOR_OF.get(target, -1) <= FLOOR_OF[room]:
                found.append(f"{module}:{line} imports {other}, which is not below it")
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def test_imports_run_down() -> None:
    assert len(files_of(ROOT)) > 60
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    "code",
    [
        "import hvcompile.backend",
        "def late():\n    from hvcompile import backend",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hvcompile.backend import hvfast",
        "from hvcompile import pipeline",  # up by one floor only
        "def late():\n    import hvcompile",
        "from ..backend import hvfast",
        "from .. import backend",
        "import importlib\nimportlib.import_module('hvcompile.backend')",
        "print(hvcompile.backend.hvfast)",
        "import passes",
    ],
)
def test_a_planted_arrow_up(tmp_path: Path, code: str) -> None:
    for room, text in {"backend": "", "pipeline": "", "trunk/trunk": code}.items():
        file = tmp_path / f"{room}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (fault,) = faults(tmp_path)
    assert fault.startswith("hvcompile.trunk.trunk:")
    assert "which is not below it" in fault


def test_planted_arrows_within_a_floor_and_a_room(tmp_path: Path) -> None:
    for room in ("ranks", "float8"):
        (tmp_path / room).mkdir()
    (tmp_path / "ranks" / "split.py").write_text("def late():\n    from hvcompile.ranks import store\n")
    (tmp_path / "ranks" / "store.py").write_text("import hvcompile.ranks.split\nfrom hvcompile.float8 import linear\n")
    (tmp_path / "float8" / "linear.py").write_text("")
    (tmp_path / "attic.py").write_text("")
    stray, sideways, circle = sorted(faults(tmp_path), key=lambda fault: ("circle" in fault, "ranks" in fault))
    assert stray == "hvcompile.attic stands on no floor"
    assert sideways == "hvcompile.ranks.store:2 imports hvcompile.float8.linear, which is not below it"
    assert circle.startswith("a circle: ")
