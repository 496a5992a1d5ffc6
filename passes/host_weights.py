"""Host weights: weights that ``hvcompile.offload`` keeps on the host, brought block by block while others compute."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting.fetching import fetch_ahead, hosted_in
from hvcompile.trunk.trunk import Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostWeights(Pass):
    """Bring the weights of each block from the host while the block before it computes.

    It applies to a model of which ``hvcompile.offload`` keeps weights on the host. Before each block with such weights
    stands a ``fetch``, which waits for these and starts to bring those of the next. The order is fixed by data: a fetch
    takes a result of the block before, and the block takes its token. So the weights of two blocks are on the device at
    once, and no more. Blocks that the first-block cache skips are in a branch, and so are their fetches: a step that
    reuses brings none of theirs. Weights in float8 are brought in float8.

    Switched off, or where it can't apply, weights are brought where they are read, and nothing computes meanwhile.

    Source: group offloading with streams, as in diffusers' ``enable_group_offload``, inside the graph.

    Given::

        root:
            ...
            invoke_subgraph = block_0(contiguous, ..., 6 weights of blocks.0)
            getitem_2: f32[1, 12, 16] = invoke_subgraph[0]
            ...
            invoke_subgraph_1 = block_0(getitem_2, ..., 6 weights of blocks.1)
            getitem_3: f32[1, 12, 16] = invoke_subgraph_1[0]
            invoke_subgraph_2 = block_0(getitem_3, ..., 6 weights of blocks.2)

    Result::

        root:
            ...
            fetch_default = fetch.default([blocks_0_attend_weight_on_host, ...], [], [], ...)
            getitem_2: f32[16, 16] = fetch_default[0]
            ...
            fetch_default_1 = fetch.default([blocks_1_attend_weight_on_host, ...], [getitem_2], [], ...)
            getitem_6: f32[16, 16] = fetch_default_1[0]
            ...
            getitem_9: f32[] = fetch_default_1[3]
            invoke_subgraph = block_0(contiguous, getitem_2, ..., getitem_9)
            getitem_10: f32[1, 12, 16] = invoke_subgraph[0]
            ...
            fetch_default_2 = fetch.default([blocks_2_attend_weight_on_host, ...], [getitem_6], [getitem_10], ...)
            ...
            invoke_subgraph_1 = block_0(getitem_10, getitem_6, ..., getitem_14)
            getitem_15: f32[1, 12, 16] = invoke_subgraph_1[0]
            fetch_default_3 = fetch.default([], [getitem_11], [getitem_15], ...)
            getitem_16: f32[] = fetch_default_3[0]
            invoke_subgraph_2 = block_0(getitem_15, getitem_11, ..., getitem_16)
            ...
        block_0:
            ...
            fetched: f32[]
            ...

    """

    section: ClassVar[str] = "host_weights"
    is_exact: ClassVar[bool] = True

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the calls of the blocks; see the class."""
        hosted = hosted_in(trunk, context.given)
        if not hosted:
            reason = "all weights are on the device; hvcompile.offload(model) keeps those of the blocks on the host"
            return Declined("they are fetched already" if trunk.hosted else reason).report("weights")
        fetched = fetch_ahead(trunk, hosted, HostWeights.__name__)
        total, most = (f"{size / 2**20:.4g} MiB" for size in (fetched.num_bytes, fetched.most_bytes))
        return PassReport(
            matched=(
                f"{len(fetched.blocks)} of {len(trunk.blocks)} blocks have weights on the host: {total} are brought in "
                f"a step that computes them, at most {most} are on the device at once",
            ),
            table=tuple({"block": path, "bytes": size} for path, size in fetched.blocks),
        )
