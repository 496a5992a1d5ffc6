"""A wrong pass, found: break one on purpose, dump what the compiler does, and let ``hvcompile bisect`` name it.

    python examples/debug_graph.py [DIRECTORY]

writes the dump into DIRECTORY (default: ./dump), where every numbered file is a graph that runs alone.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import nn

from hvcompile.app import tables
from hvcompile.app.cli.console import out
from hvcompile.dump import bisect
from hvcompile.dump import read as dump_read
from hvcompile.journal import PassReport
from hvcompile.passes import PASSES
from hvcompile.pipeline import Context, Pass
from hvcompile.torch_private.fakes import provenance, value
from hvcompile.trunk.trunk import Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledResidual(Pass):
    """The fault: what a block adds to its stream is scaled by ``factor``, as by a slip in a fused residual."""

    section: ClassVar[str] = "scaled_residual"
    is_exact: ClassVar[bool] = True  # it says so

    factor: float = 1.01

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Scale the residual of every stream in every body."""
        for body in trunk.bodies:
            graph = body.module.graph
            operands: list[Any] = list(graph.find_nodes(op="placeholder"))
            (returned,) = graph.output_node().args
            results: list[Any] = list(returned)  # type: ignore[arg-type]
            for place, operand in body.streams.items():
                before, after = operands[operand], results[place]
                with graph.inserting_before(graph.output_node()):
                    results[place] = graph.call_function(torch.lerp, (before, after, self.factor))
                results[place].meta = provenance(after, type(self).__name__, value(after))
            graph.output_node().args = (tuple(results),)
        return PassReport(matched=tuple(body.name for body in trunk.bodies))


class Block(nn.Module):
    """A residual block: ``[batch, tokens, channels]`` in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Add what the block computes to the stream."""
        change: torch.Tensor = self.narrow(torch.nn.functional.gelu(self.wide(hidden + time)))
        return hidden + 0.2 * change


class Transformer(nn.Module):
    """The smallest model that all passes find something in: a sample, a timestep, blocks in a row."""

    def __init__(self, width: int = 16, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """One denoising step, ``[batch, tokens, channels]``."""
        hidden, time = sample, (timestep / 1000).cos()[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, time)
        return hidden


def main(directory: Path) -> None:
    """Show the fault, find it, switch it off."""
    torch.manual_seed(0)
    model, sample, timestep = Transformer().eval(), torch.randn(1, 12, 16), torch.tensor([900.0])
    options: dict[str, Any] = {"lower": "eager", "dump": directory}  # "inductor" works as well, and takes longer
    with torch.no_grad(), mock.patch("hvcompile.backend.PASSES", (ScaledResidual, *PASSES)):
        exact = model(sample, timestep)
        wrong = torch.compile(model, backend="hvfast", options=options)(sample, timestep)
        print(f"1. The compiled model is off by {(wrong - exact).abs().max():.2g}.")

        folder = dump_read.folders(directory)[-1]
        print(f"2. hvcompile bisect {folder}")
        found = bisect.bisect(folder)
        out.print(tables.bisection_table(found))
        print(found.verdict())

        torch._dynamo.reset()
        options = {"lower": "eager", "scaled_residual": False}
        right = torch.compile(model, backend="hvfast", options=options)(sample, timestep)
        print(f"3. Without that pass it is off by {(right - exact).abs().max():.2g}.")
    print(f"4. To see what the pass did, compare the graphs before and after it: diff {folder}/0[12]_*.py")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dump"))
