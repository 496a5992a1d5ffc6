"""The rewrite of a trunk for half of the samples of a call, such as both halves of classifier-free guidance."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from hvcompile.journal import Declined, PassReport
from hvcompile.ranks.split import Layout, Segment, Split
from hvcompile.rewriting.sharding.attention import BatchAttention
from hvcompile.rewriting.sharding.resharder import CannotShard
from hvcompile.rewriting.sharding.rewrite import Around, Rewrite, enter
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.roles import classify
from hvcompile.trunk.trunk import Trunk


def split_batch(trunk: Trunk, group: dist.ProcessGroup, tag: str) -> PassReport:
    """Rewrite a trunk for this rank's half of the samples, which have nothing to do with each other.

    Args:
        trunk: rewritten in place, or left as it was.
        group: the two ranks that share the samples.
        tag: the pass's name.

    Raises:
        CannotShard: the batch can't be halved.

    """
    first, stream = enter(trunk, group)
    sample, size = classify(trunk).sample, value(first.operands[stream]).shape[0]
    if sample is None or str(value(sample).shape[0]) != str(size):
        raise CannotShard("the first dimension of what enters the blocks is not that of the samples")
    try:
        batch = fakes.fix_size(size, trunk.graph)
    except ValueError as error:
        raise CannotShard(f"the batch can't be split: {error}") from error
    if batch % 2:
        raise CannotShard(
            f"cfg is 2, and a call has {batch} sample{'s' if batch > 1 else ''}: where a pipeline calls the model "
            "once for each half of the guidance, as HunyuanVideo's does, a graph has nothing to share out. Drop cfg"
        )
    split = Split(group=group.group_name, rank=group.rank(), ranks=2, length=batch)
    rewrite = Rewrite(trunk, split, BatchAttention(), tag)
    entry = Layout(0, (Segment(0, batch, True),))
    rewrite.rewrite_body(first, {stream: entry})
    around = Around(rewrite, stream, entry)
    around.copy()
    tokens = Declined("samples are split over the ranks, and the sequence is not")
    report = rewrite.commit(around, tokens, f"{batch} samples, half of them to each of 2 rows of ranks")
    assert trunk.sharding is not None
    # Each half decides by itself whether it reuses a step.
    trunk.sharding = dataclasses.replace(trunk.sharding, streams={})
    return report
