"""Dumps: the graph after every pass as numbered, runnable Python, what stands around it, and the journal as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from hvcompile.dump.first_call import FirstCall, can_save, compact, num_bytes, save
from hvcompile.dump.runs import writing
from hvcompile.dump.source import GraphSource, fixed_values
from hvcompile.float8 import format as float8_format
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.nodes import is_weight
from hvcompile.hollow.host import HostWeight, values_on_host
from hvcompile.journal import Declined, JournalRow
from hvcompile.options import DUMP_LIMIT_GIB
from hvcompile.ranks import launch
from hvcompile.torch_private import dynamo, lowering
from hvcompile.trunk.observer import SEALED, Observer
from hvcompile.trunk.trunk import Derived, StoredWeights, Trunk

log = logging.getLogger(__name__)

_FILE = '''"""Graph {compile_id}, step {count}: {name}. Written by hvcompile on torch {version}; needs torch alone, and
hvcompile where layers compute in float8 or ranks talk to each other (then: hvcompile bisect, under torchrun).

Run this file to compute it on the inputs of the first call, or import it: ``build()(*example_inputs())``. Inputs
that ``inputs.pt`` does not hold are drawn at random, in the recorded shapes. An input of the same name has the same
values in every file of this folder; state of the cache begins as zeros, so that the cached blocks are computed.
"""

import zlib
from pathlib import Path

{imports}


{classes}


def build():
    """The module of the whole graph; a body that is called from several places is one instance."""
{build}


KEPT = {{}}  # inputs of the first call, by name


def draw(name, shape, dtype, device="cpu", scale=1.0, stride=None):
    """An input that was kept; else normal numbers that depend on the name alone, or ones where those are not legal."""
    if name in KEPT:
        return KEPT[name]
    if stride is not None:
        length = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
        return draw(name, (length,), dtype, device, scale).as_strided(shape, stride)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.ones(shape, dtype=dtype, device=device)
    drawn = dtype if dtype.is_complex else torch.float32
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (scale * torch.randn(shape, dtype=drawn, generator=generator)).to(device, dtype)


def kept_keys(mask):
    """How many keys each sample of a mask keeps, at least 2."""
    keep = (mask == 0) != (mask.dtype == torch.bool)
    return keep.reshape((1,) * (4 - mask.ndim) + mask.shape)[:, 0, 0].sum(-1).clamp(min=2).tolist()


def example_inputs():
    """New inputs, one a parameter of the root's ``forward``."""
    file = Path(__file__).with_name("inputs.pt")
    KEPT.update(torch.load(file, mmap=True, weights_only=True) if file.exists() else {{}})
    inputs = [
{inputs}
    ]
{derived}    return tuple(inputs)


if __name__ == "__main__":
    with torch.no_grad():
        results = build()(*example_inputs())
    for place, result in enumerate(results if isinstance(results, (tuple, list)) else [results]):
        if isinstance(result, torch.Tensor):
            norm = (result.abs() if result.is_complex() else result).double().norm().item()
            print(f"{{place}}: {{tuple(result.shape)}} {{result.dtype}} norm {{norm:.6g}}")
        else:
            print(f"{{place}}: {{result}}")
    file = Path(__file__).with_name("outputs.pt")
    for place, expected in enumerate(torch.load(file, weights_only=True) if file.exists() else []):
        if isinstance(expected, torch.Tensor) and expected.numel():
            difference = (results[place].to(torch.complex128) - expected.to(torch.complex128)).abs().max().item()
            print(f"{{place}} differs from what the first call gave by {{difference:.3g}} at most")
'''


class Dump(Observer):
    """Writes what one compilation did into a directory of its own; does nothing where no directory is given.

    Where torch's structured trace is on (``TORCH_TRACE``), the graphs and the journal become artifacts of it as well.

    Args:
        directory: gains a folder for each compilation; made if missing.
        compile_id: Dynamo's frame and how often it was compiled before; both begin at 0 again in another process and
            after ``torch._dynamo.reset()``, so that a folder that exists is left alone and a new name is taken.
        lower: what the last graph is handed to; the journal says so.
        limit_gib: weights that take more GiB are not kept with the first call's inputs.

    Raises:
        OptionError: the directory can't be written.

    """

    def __init__(
        self,
        directory: Path | None,
        compile_id: tuple[int, int],
        *,
        lower: str = "inductor",
        limit_gib: float = DUMP_LIMIT_GIB,
    ) -> None:
        self._compile_id = "{}/{}".format(*compile_id)
        self._lower, self._limit_gib = lower, limit_gib
        self._count = 0
        self._fixed: dict[str, float] = {}
        self._derived: Callable[[Sequence[Any]], Mapping[str, Any] | Declined] = lambda _: {}
        self._inputs: list[tuple[str, bool]] = []  # of the captured graph: its name, and whether it is a weight
        self._passes: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._held: dict[int, torch.Tensor] = {}
        self._stored: dict[str, torch.Tensor] = {}
        self._hosted: dict[str, int] = {}
        self._folder = _fresh_folder(directory, "graph_{}_{}".format(*compile_id)) if directory is not None else None

    def on_stage(self, name: str, module: fx.GraphModule, trunk: Trunk | None) -> None:
        """Write the graph of a stage."""
        if trunk is not None and name != SEALED:  # whose inputs lack the weights
            place = {node: number for number, node in enumerate(trunk.inputs)}
            self._hosted = {host.name: place[node] for node, host in trunk.hosted.items() if node in place}
        self.graph(name, module, trunk.derived if trunk is not None else ())

    def on_fault(self, declined: Declined) -> None:
        """Write the traceback of what failed; the graphs since the captured one go, which are not those compiled."""
        if self._folder is None:
            return
        for file in self._folder.glob("[0-9]*_*.p[yt]"):
            if int(file.name.split("_")[0]) > 0:
                file.unlink()
        self._count = min(self._count, 1)
        with writing(self._folder):
            lines = traceback.format_exception(declined.cause)
            (self._folder / f"fault_{stem_of(declined.what).replace(' ', '_')}.txt").write_text("".join(lines), "utf-8")

    def on_rewritten(self, trunk: Trunk | None, journal: Sequence[JournalRow], error: BaseException | None) -> None:
        """Write the journal, also of passes that ended in an error."""
        del trunk, error
        self.journal(journal)

    def journal(self, rows: Sequence[JournalRow]) -> None:
        """Write the journal: what each pass matched, what it declined and why, and how the op counts changed."""
        if self._folder is None and not dynamo.is_tracing():
            return
        self._passes = [
            {
                "name": row.name,
                "section": row.section,
                "is_exact": row.is_exact,
                "tolerance": row.tolerance,
                "matched": row.report.matched,
                "declined": [{"what": what, "why": why} for what, why in row.report.declined],
                "unmet": [{"what": what, "why": why} for what, why in row.report.unmet],
                "noted": row.report.noted,
                "op_changes": row.op_changes,
                "table": row.report.table,
            }
            for row in rows
        ]
        self._write_journal()
        dynamo.trace_artifact("hvcompile_journal", "json", self._journal_text)

    def graph(self, name: str, module: fx.GraphModule, derived: Sequence[Derived] = ()) -> None:
        """Write a graph as the next numbered file, named after the pass that made it; its constants beside it.

        ``derived`` are inputs that the file computes from the others.
        """
        if self._folder is None and not dynamo.is_tracing():
            return
        stem = f"{self._count:02d}_{stem_of(name)}"
        self._fixed = fixed_values(module) | self._fixed  # the captured graph names every input
        program = GraphSource(module, self._fixed, derived)
        if not self._count:
            weights = [is_weight(node) for node in module.graph.find_nodes(op="placeholder")]
            self._inputs = list(zip(program.names, weights, strict=True))
        text = _FILE.format(
            compile_id=self._compile_id,
            count=self._count,
            name=name,
            version=torch.__version__,
            imports="\n".join(sorted(program.imports, key=lambda line: (" = " in line, line))),
            classes="\n\n\n".join(program.classes),
            build=textwrap.indent("\n".join(program.build), " " * 4),
            inputs=textwrap.indent("\n".join(program.inputs), " " * 8),
            derived=textwrap.indent("".join(f"{line}\n" for line in program.derived), " " * 4),
        )
        self._count += 1
        dynamo.trace_artifact(f"hvcompile_{stem}", "string", lambda: text)
        if self._folder is None:
            return
        with writing(self._folder):
            (self._folder / f"{stem}.py").write_text(text, "utf-8")
            if program.constants:
                torch.save(program.constants, self._folder / f"{stem}.pt")

    @contextlib.contextmanager
    def lowering(self, trunk: Trunk | None) -> Iterator[None]:
        """Write what is generated while the block runs: Inductor's code, and the frame that Dynamo then rewrites."""
        del trunk
        if self._folder is None:
            yield
            return
        codes: list[str] = []
        with lowering.output_code(codes.append):
            yield
        dynamo.on_bytecode(self._frame)
        for place, code in enumerate(codes):
            with writing(self._folder):
                name = f"inductor_output_{place}.py" if place else "inductor_output.py"
                (self._folder / name).write_text(code, "utf-8")
        if self._lower == "inductor" and not codes:
            self._note("Inductor's code is not here: it handed none out")

    def before_weights_go(self, args: Sequence[Any], places: Sequence[int]) -> None:
        """Hold the weights that will have lost their memory when the first call comes."""
        if self._folder is not None:
            held = {place: args[place] for place in places}
            held = {
                place: _dequantized(item) if isinstance(item, QuantizedWeight) else item
                for place, item in held.items()
                if can_save(item) or isinstance(item, QuantizedWeight)
            }
            if sum(map(num_bytes, held.values())) <= self._limit_gib * 2**30:
                self._held = {place: item.detach() for place, item in held.items()}

    def on_stored(self, weights: StoredWeights, data: torch.Tensor, scale: torch.Tensor) -> None:
        """Hold a float8 copy under the names of its placeholders."""
        if self._folder is not None:
            self._stored |= {weights.data.name: data, weights.scale.name: scale}

    def around_calls(self, run: Callable[..., Any], derive: Callable[[Sequence[Any]], Any]) -> Callable[..., Any]:
        """Give a callable that runs ``run``, and saves what the first call is given and gives."""
        self._derived = derive
        return run if self._folder is None else FirstCall(run, self._save_inputs, self._save_outputs)

    def _frame(self, original: types.CodeType, rewritten: types.CodeType) -> None:
        if self._folder is None:
            return
        try:
            from depyf import decompile
        except ImportError:
            self._note("Dynamo's frame is not decompiled: depyf is not installed (pip install 'hvcompile[debug]')")
            return
        try:  # of a debugging aid, no failure may end the compilation that it looks at
            text = decompile(rewritten)
        except Exception as error:
            self._note(f"Dynamo's frame is not decompiled: depyf can't read its bytecode ({error})")
            return
        place = f"{original.co_filename}:{original.co_firstlineno}"
        heading = (
            f"# {original.co_qualname}, from {place}, as Dynamo rewrote it for graph {self._compile_id}: to be read,\n"
            "# not run. Decompiled by depyf. __compiled_fn_... is the graph of this folder.\n\n"
        )
        with writing(self._folder):
            (self._folder / "dynamo_frame.py").write_text(heading + text, "utf-8")

    def _save_inputs(self, given: Sequence[Any]) -> bool:
        """Save a call's inputs; returns whether these are all."""
        if self._folder is None or len(given) != len(self._inputs):
            return False
        hosts = {name: values_on_host(given[place]) for name, place in self._hosted.items()}
        if sum(map(num_bytes, hosts.values())) > self._limit_gib * 2**30:
            hosts = {}
        given = [self._held.get(place, item) for place, item in enumerate(given)]
        if hosts:
            given = [item.host.to(item.device) if isinstance(item, HostWeight) else item for item in given]
        wanted = {name: item for (name, _), item in zip(self._inputs, given, strict=True) if can_save(item)}
        weights = {name for name, weighs in self._inputs if weighs and name in wanted}
        size = sum(num_bytes(wanted[name]) for name in weights)
        lacking = len(given) - len(wanted)
        if lacking:
            self._note(
                f"{lacking} inputs are of a kind that torch.save can't give back and are drawn at random instead"
            )
        if size > self._limit_gib * 2**30:
            wanted = {name: item for name, item in wanted.items() if name not in weights}
            self._note(
                f"the weights are not kept and are drawn at random instead: they take {size / 2**30:.3g} GiB, more "
                f"than the {self._limit_gib:g} of options['dump_limit_gib']"
            )
        derived, is_whole = self._derived(given), len(wanted) == len(given)
        if isinstance(derived, Declined):
            self._note(f"the first call is computed by the graph of another folder, since in this one {derived.reason}")
            is_whole = False
        kept = wanted | (self._stored | hosts if weights <= set(wanted) else {})
        with writing(self._folder):
            save({name: compact(item) for name, item in kept.items()}, self._folder / "inputs.pt")
        self._held, self._stored = {}, {}
        return is_whole

    def _save_outputs(self, results: Sequence[Any]) -> None:
        if self._folder is not None:
            with writing(self._folder):
                save([compact(item) if can_save(item) else None for item in results], self._folder / "outputs.pt")

    def _note(self, line: str) -> None:
        """Say in the log and in the journal what this folder lacks."""
        log.info("dump %s: %s", self._folder, line)
        self._notes.append(line)
        self._write_journal()

    def _journal_text(self) -> str:
        content = {
            "torch": torch.__version__,
            "compile_id": self._compile_id,
            "lower": self._lower,
            "ranks": launch.num_ranks(),
            "passes": self._passes,
            "notes": self._notes,
        }
        return json.dumps(content, indent=2) + "\n"

    def _write_journal(self) -> None:
        if self._folder is not None:
            with writing(self._folder):
                (self._folder / "journal.json").write_text(self._journal_text(), "utf-8")


def _dequantized(weight: QuantizedWeight) -> torch.Tensor:
    data, scale = (part.to(weight.device) for part in weight.rows)
    return float8_format.dequantize(data, scale, weight.dtype)


def stem_of(name: str) -> str:
    """A pass's name as its file has it: ``FirstBlockCache`` becomes ``first_block_cache``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _fresh_folder(directory: Path, name: str) -> Path:
    """Make a folder that no other compilation has; ``mkdir`` decides between processes and threads."""
    with writing(directory):
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
