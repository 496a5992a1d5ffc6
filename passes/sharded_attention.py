"""Sharded attention: the sequence split over the ranks of a mesh, and each attention over its heads instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hvcompile.errors import OptionError
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting.sharding import shared_inputs
from hvcompile.rewriting.sharding.attention import legal_degrees
from hvcompile.rewriting.sharding.batch import split_batch
from hvcompile.rewriting.sharding.resharder import CannotShard
from hvcompile.rewriting.sharding.rewrite import head_counts, split_sequence
from hvcompile.trunk.together import Group
from hvcompile.trunk.trunk import Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedAttention(Pass):
    """Split the sequence that runs through the trunk over the ranks of a process group.

    The residual stream that carries the sample is split along its sequence before the first block, and gathered after
    the last. What is computed per token is computed for this rank's tokens alone. The ranks of a sequence are laid out
    in ``ring`` rows of ``ulysses``. An attention works across them in two ways:

    - Ulysses. Within a row, all-to-alls give a rank the tokens of the whole row, for its share of the heads. Query, key
      and value travel in one, the result in another.
    - Ring. Each row's keys and values are a stretch of the sequence. They are passed on from row to row, while those at
      hand are attended to. The parts' results are merged by their log-sum-exp, in fp32.

    Streams of other tokens (text) stay whole on every rank. Their keys are counted once, beside those of the first
    stretch. So keys keep their order, and a mask is cut where they are. No length needs to be a multiple of the ranks:
    the last ranks' parts are padded, and the padding is cut off before it could be attended to. Parts of thousands of
    tokens are padded to a multiple of 16, which products are fastest with.

    Args:
        mesh: a mesh of one dimension, over the ranks that share the sequence. None takes all ranks of the default
            process group.
        ulysses: how many ranks share out the heads, 1 or more. None takes the most that divide both ranks and heads.
        ring: how many rows of such ranks pass keys and values on, 1 or more. ``ulysses`` times ``ring`` is the number
            of ranks. None takes as many as that leaves.
        cfg: 1, or 2 to share out the samples of one call as well, such as both halves of classifier-free guidance.
            ``mesh`` then has two dimensions: 2, and the ranks that share a sequence.
        timeout_seconds: how long the ranks wait for each other when they compare what they are about to run; above 0.

    Source: DeepSpeed Ulysses (arXiv:2309.14509), Ring Attention (arXiv:2310.01889), both as in USP (arXiv:2405.07719);
    text kept whole as in xDiT's and ParaAttention's HunyuanVideo.

    Given::

        root:
            ...
            hidden: f32[1, 13, 64] = linear(sample, embed.weight, embed.bias)
            ...
            invoke_subgraph = block_0(contiguous, contiguous_1, ..., 10 weights of blocks.0)
            ...
            getitem_3: f32[1, 13, 64] = invoke_subgraph_2[0]
            linear: f32[1, 13, 64] = linear(getitem_3, head.weight, head.bias)
            ...
        block_0:
            ...
            mixed: f32[1, 4, 13, 16] = scaled_dot_product_attention(transpose, transpose_1, transpose_2, None)

    Result, with Ulysses on rank 1 of 2::

        root:
            ...
            broadcast: f32[1, 13, 64] = broadcast(sample, ...)
            ...
            hidden: f32[1, 13, 64] = linear(broadcast, embed.weight, embed.bias)
            ...
            pad: f32[1, 14, 64] = pad(contiguous_1, (0, 0, 0, 1), ...)
            narrow_3: f32[1, 7, 64] = pad.narrow(1, 7, 7)
            clone: f32[1, 7, 64] = clone(narrow_3, memory_format=contiguous_format)
            ...
            invoke_subgraph = block_0(contiguous, clone, ..., 10 weights of blocks.0)
            ...
            getitem_4: f32[1, 7, 64] = invoke_subgraph_2[0]
            narrow_6: f32[1, 7, 64] = getitem_4.narrow(1, 0, 7)
            gather_1: f32[1, 14, 64] = gather(narrow_6, ..., 1)
            narrow_7: f32[1, 13, 64] = gather_1.narrow(1, 0, 13)
            linear: f32[1, 13, 64] = linear(narrow_7, head.weight, head.bias)
            ...
        block_0:
            ...
            stack: f32[3, 1, 4, 7, 16] = stack([getitem, getitem_1, getitem_2])
            reshard: f32[3, 1, 2, 14, 16] = reshard(stack, ..., 3, 2)
            ...
            mixed: f32[1, 2, 13, 16] = scaled_dot_product_attention(getitem_6, cat, cat_1, None)
            ...
            reshard_1: f32[1, 4, 7, 16] = reshard(flatten, ..., 1, 2)

    Result, with a ring on rank 1 of 2::

        ...
        block_0:
            ...
            stack: f32[2, 1, 4, 7, 16] = stack([getitem_1, getitem_2])
            pass_on: f32[2, 1, 4, 7, 16] = pass_on(stack, ..., 2)
            ...
            attended = scaled_dot_product_attention_with_lse(getitem, getitem_5, getitem_6)
            ...
            arrived: f32[2, 1, 4, 7, 16] = arrived(pass_on)
            ...
            attended_1 = scaled_dot_product_attention_with_lse(getitem, cat, cat_1)
            ...
            truediv: f32[1, 4, 7, 16] = truediv(add_3, unsqueeze_2)

    """

    section: ClassVar[str] = "context_parallel"
    is_exact: ClassVar[bool] = True

    mesh: DeviceMesh | None = None
    ulysses: int | None = None
    ring: int | None = None
    cfg: int = 1
    timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg not in {1, 2}:
            raise OptionError(f"context_parallel.cfg is {self.cfg}; allowed is 1 or 2")
        for name in ("ulysses", "ring"):
            degree = getattr(self, name)
            if degree is not None and degree < 1:
                raise OptionError(f"context_parallel.{name} is {degree}; allowed is a whole number, 1 or more")
        if self.cfg == 2 and (self.mesh is None or self.mesh.ndim != 2 or self.mesh.size(0) != 2):
            given = "there is no mesh" if self.mesh is None else f"mesh is of {tuple(self.mesh.shape)} ranks"
            raise OptionError(
                f"context_parallel.cfg is 2 and {given}; allowed is a mesh of two dimensions, 2 and the ranks that "
                'share a sequence: init_device_mesh(device, (2, ranks // 2), mesh_dim_names=("cfg", "sequence"))'
            )
        if self.cfg == 1 and self.mesh is not None and self.mesh.ndim != 1:
            raise OptionError(
                f"context_parallel.mesh has {self.mesh.ndim} dimensions; allowed is one, over the ranks that share a "
                'sequence, such as mesh["sequence"]: how they are laid out as ring x ulysses, those two options say'
            )
        if not 0 < self.timeout_seconds < float("inf"):
            raise OptionError(
                f"context_parallel.timeout_seconds is {self.timeout_seconds}; allowed is a number above 0"
            )

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the trunk for this rank; see the class."""
        del context
        where, tag = trunk.lists or "graph", type(self).__name__
        group = self._match_group(trunk)
        if isinstance(group, Declined):
            return group.report(where)
        declined = shared_inputs.refusal(trunk)
        if declined is not None:
            return declined.report(where)
        whole: Any = group if self.cfg == 1 else dist.group.WORLD
        trunk.group = Group(name=whole.group_name, timeout_seconds=self.timeout_seconds)
        degrees = self._check_degrees(group.size(), head_counts(trunk))
        if isinstance(degrees, Declined):
            return degrees.report(where)
        report = self._rewrite(trunk, group, degrees)
        if report.applied:
            shared_inputs.share(trunk, trunk.group, tag)
        return report

    def _match_group(self, trunk: Trunk) -> dist.ProcessGroup | Declined:
        """The ranks that share the sequence, or why there are none."""
        if trunk.sharding is not None:
            return Declined("the sequence is split over ranks already")
        if not dist.is_available() or not dist.is_initialized():
            return Declined(
                "no process group is initialised: start the script with torchrun, which makes one rank a GPU"
            )
        if self.cfg == 2 and self.mesh is not None:
            if self.mesh.size() != dist.get_world_size():
                return Declined(
                    f"cfg is 2 and mesh has {self.mesh.size()} of {dist.get_world_size()} ranks; allowed is all of them"
                )
            return self.mesh.get_group(1)
        group: Any = self.mesh.get_group() if self.mesh is not None else dist.group.WORLD
        if group.size() < 2:
            return Declined("the process group has a single rank")
        return group  # type: ignore[no-any-return]

    def _check_degrees(self, ranks: int, heads: Sequence[int]) -> _Degrees | Declined:
        """How the ranks are laid out, or why they can't be as the options say."""
        ulysses, ring = self.ulysses, self.ring
        if ulysses is None and ring is None:
            ulysses, note = max(legal_degrees(ranks, heads)), ""
            if ulysses < ranks:
                counts, ring = " and ".join(map(str, heads)), ranks // ulysses
                note = f"{ranks} ranks can't share {counts} heads: so {ulysses} do, and {ring} such rows pass on keys"
            return _Degrees(ranks // ulysses, note)
        ulysses = ranks // ring if ulysses is None and ring else ulysses or 1
        ring = ranks // ulysses if ring is None else ring
        if ulysses * ring == ranks:
            return _Degrees(ring)
        asked = ", ".join(f"{name} is {degree}" for name in ("ulysses", "ring") if (degree := getattr(self, name)))
        allowed = ", ".join(f"{degree} x {ranks // degree}" for degree in legal_degrees(ranks, heads))
        return Declined(
            f"{asked}, but {ranks} ranks share the sequence; allowed for ulysses x ring is one of {allowed}"
        )

    def _rewrite(self, trunk: Trunk, group: dist.ProcessGroup, degrees: _Degrees) -> PassReport:
        """Split the samples, where ``cfg`` says so, and then the sequence."""
        if self.cfg == 1:
            return self._split_sequence(trunk, group, degrees)
        halves = self._split_batch(trunk)
        if group.size() == 1 or not halves.applied:
            return halves
        report = self._split_sequence(trunk, group, degrees)
        matched = (*halves.matched, *report.matched)
        # It was asked for, and half of it is done by now: that the rest can't be is an error.
        return dataclasses.replace(report, matched=matched, declined=(), unmet=report.declined)

    def _split_batch(self, trunk: Trunk) -> PassReport:
        assert self.mesh is not None
        try:
            return split_batch(trunk, self.mesh.get_group(0), type(self).__name__)
        except CannotShard as verdict:
            return Declined(str(verdict)).report(trunk.lists)

    def _split_sequence(self, trunk: Trunk, group: dist.ProcessGroup, degrees: _Degrees) -> PassReport:
        try:
            report = split_sequence(trunk, group, degrees.ring, type(self).__name__)
        except CannotShard as verdict:
            return Declined(str(verdict)).report(trunk.lists)
        return dataclasses.replace(report, noted=(degrees.note,) if degrees.note else ())


@dataclasses.dataclass(frozen=True)
class _Degrees:
    """How many stretches the keys travel between, and what to say of the choice."""

    ring: int
    note: str = ""
