"""What attention that skips blocks of keys leaves out, a layer and head, measured on the inputs of a call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.attention_kernels import scaled_dot_product_attention_with_lse
from hvcompile.graph.block_sparse import block_sparse_attention
from hvcompile.pipeline import Context
from hvcompile.rewriting.recording import record
from hvcompile.rewriting.step_number import STEPS
from hvcompile.trunk.trunk import BlockCall, Trunk

log = logging.getLogger(__name__)


def measure(trunk: Trunk, context: Context) -> tuple[dict[str, Any], ...]:
    """Run the rewritten graph on the inputs of the call that is compiled, and dense attention beside each sparse one.

    What enters a layer has been through the sparse ones before it. Text is not counted: all of it is read.

    Returns:
        A row a block, attention and head: the share of the softmax's mass on the video's own tokens that was read, the
        least of that over queries, the norm of the difference to dense attention over its norm, and the share of the
        blocks that was read; means over samples and queries. On ranks that share out the heads, those of this rank.

    """
    rows: list[dict[str, Any]] = []

    def tell(block: BlockCall, node: fx.Node, operands: Sequence[Any], result: Any) -> None:
        query, key, value, indices, counts, _, scale, _ = operands
        dense, all_sums = scaled_dot_product_attention_with_lse(query, key, value, scale=scale)
        mass = (result[1] - all_sums).exp()
        split = trunk.sharding.split if trunk.sharding is not None else None
        heads = query.shape[1]  # of this rank
        before = 0 if split is None else split.rank % split.ulysses * heads
        density = (counts.double() / indices.shape[-1]).mean((0, 2)).expand(heads)
        for head in range(heads):
            exact = dense[:, head].double()
            error = (result[0][:, head].double() - exact).norm() / exact.norm()
            figures = {
                "mass": mass[:, head].double().mean(),
                "least_mass": mass[:, head].double().min(),
                "error": error,
                "blocks": density[head],
            }
            read = {name: round(float(figure), 6) for name, figure in figures.items()}
            rows.append({"block": block.path, "attention": node.name, "head": before + head, **read})

    # As in a step after those that read everything.
    states = {STEPS: 2**31}
    declined = record(trunk, context, lambda node: node.target is block_sparse_attention, tell, states)
    if declined is not None:
        log.warning("sparse_attention.audit measures nothing here: %s", declined.reason)
    return tuple(rows)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in words."""
    mass, error, blocks = (torch.tensor([row[name] for row in rows]) for name in ("mass", "error", "blocks"))
    return (
        f"on this call {blocks.mean():.1%} of the blocks hold {mass.mean():.1%} of the mass (least of a head "
        f"{mass.min():.1%}), and outputs are off by {error.mean():.3f} (most of a head {error.max():.3f})"
    )
