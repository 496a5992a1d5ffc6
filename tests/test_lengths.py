"""No function is longer than a screen, and no file than a few."""

from __future__ import annotations

import ast
from pathlib import Path

import hvcompile

ROOT = Path(hvcompile.__file__).parent
FILES = [*ROOT.rglob("*.py"), *(ROOT / "passes").glob("*.py")]
MOST_LINES = 60
"""Of a function, its docstring among them."""
MOST_FILE_LINES = 420


def test_functions() -> None:
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= MOST_LINES
    ]
    assert long == []


def test_files() -> None:
    assert [file.name for file in FILES if len(file.read_text("utf-8").splitlines()) > MOST_FILE_LINES] == []
