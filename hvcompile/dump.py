"""Dumps: the graph after every pass as numbered, runnable Python, and the journal as JSON."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import fx

from hvcompile.errors import OptionError
from hvcompile.graph_source import GraphSource, fixed_values
from hvcompile.pipeline import JournalRow

_FILE = '''"""Graph {compile_id}, step {count}: {name}. Written by hvcompile on torch {version}; needs torch alone.

Run this file to compute it on random inputs of the recorded shapes, or import it:
``build()(*example_inputs())``. An input of the same name has the same values in every file of this folder.
"""

import zlib
from pathlib import Path

{imports}


{classes}


def build():
    """The module of the whole graph; a body that is called from several places is one instance."""
{build}


def draw(name, shape, dtype, device="cpu", scale=1.0, stride=None):
    """Normal numbers that depend on the name alone, or ones, which are legal as integers, indices and masks."""
    if stride is not None:
        length = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
        return draw(name, (length,), dtype, device, scale).as_strided(shape, stride)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.ones(shape, dtype=dtype, device=device)
    drawn = dtype if dtype.is_complex else torch.float32
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (scale * torch.randn(shape, dtype=drawn, generator=generator)).to(device, dtype)


def example_inputs():
    """New inputs, one a parameter of the root's ``forward``."""
    return (
{inputs}
    )


if __name__ == "__main__":
    with torch.no_grad():
        results = build()(*example_inputs())
    for place, result in enumerate(results if isinstance(results, (tuple, list)) else [results]):
        if isinstance(result, torch.Tensor):
            norm = (result.abs() if result.is_complex() else result).double().norm().item()
            print(f"{{place}}: {{tuple(result.shape)}} {{result.dtype}} norm {{norm:.6g}}")
        else:
            print(f"{{place}}: {{result}}")
'''


class Dump:
    """Writes what one compilation did into a directory of its own; does nothing where no directory is given.

    Args:
        directory: gains a folder for each compilation; made if missing.
        compile_id: Dynamo's frame and how often it was compiled before; both begin at 0 again in another process and
            after ``torch._dynamo.reset()``, so that a folder that exists is left alone and a new name is taken.

    Raises:
        OptionError: the directory can't be written.

    """

    def __init__(self, directory: Path | None, compile_id: tuple[int, int]) -> None:
        self._compile_id = "{}/{}".format(*compile_id)
        self._count = 0
        self._fixed: dict[str, float] = {}
        self._folder = _fresh_folder(directory, "graph_{}_{}".format(*compile_id)) if directory is not None else None

    def journal(self, rows: Sequence[JournalRow]) -> None:
        """Write the journal: what each pass matched, what it declined and why, and how the op counts changed."""
        if self._folder is None:
            return
        passes = [
            {
                "name": row.name,
                "matched": row.report.matched,
                "declined": [{"what": what, "why": why} for what, why in row.report.declined],
                "op_changes": row.op_changes,
            }
            for row in rows
        ]
        content = {"torch": torch.__version__, "compile_id": self._compile_id, "passes": passes}
        with _writing(self._folder):
            (self._folder / "journal.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    def graph(self, name: str, module: fx.GraphModule) -> None:
        """Write a graph as the next numbered file, named after the pass that made it; its constants beside it."""
        if self._folder is None:
            return
        stem = f"{self._count:02d}_{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()}"
        self._fixed = fixed_values(module) | self._fixed  # the captured graph names every input
        program = GraphSource(module, self._fixed)
        text = _FILE.format(
            compile_id=self._compile_id,
            count=self._count,
            name=name,
            version=torch.__version__,
            imports="\n".join(sorted(program.imports, key=lambda line: (" = " in line, line))),
            classes="\n\n\n".join(program.classes),
            build=textwrap.indent("\n".join(program.build), " " * 4),
            inputs=textwrap.indent("\n".join(program.inputs), " " * 8),
        )
        with _writing(self._folder):
            (self._folder / f"{stem}.py").write_text(text, "utf-8")
            if program.constants:
                torch.save(program.constants, self._folder / f"{stem}.pt")
        self._count += 1


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"can't write a dump into {str(directory)!r}: {error.strerror or error}. Give options['dump'] or the "
            "environment variable HVCOMPILE_DUMP a directory that this process may write to, or leave them out"
        ) from error


def _fresh_folder(directory: Path, name: str) -> Path:
    """Make a folder that no other compilation has; ``mkdir`` decides between processes and threads."""
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = directory / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
