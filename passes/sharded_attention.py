"""Sharded attention: the sequence split over the ranks of a mesh, and each attention over its heads instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from hvcompile.errors import OptionError
from hvcompile.graph.attention import arguments, is_attention
from hvcompile.graph.nodes import ancestors, contexts, descendants
from hvcompile.journal import PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.ranks import collectives
from hvcompile.ranks.split import Layout, Segment, Split
from hvcompile.rewriting.sharding import shared_inputs
from hvcompile.rewriting.sharding.exchange import Heads, Mask, Ring, refusal
from hvcompile.rewriting.sharding.resharder import CannotShard, Resharder, WantsSplit
from hvcompile.rewriting.sharding.rules import RULES
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.operands import is_activation
from hvcompile.trunk.roles import classify
from hvcompile.trunk.trunk import BlockCall, Body, Group, Sharding, Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedAttention(Pass):
    """Split the sequence that runs through the trunk over the ranks of a process group.

    The residual stream that carries the sample is split on its sequence dimension before the first block and gathered
    after the last; all that is computed per token is computed for this rank's tokens alone. The ranks of a sequence are
    laid out in ``ring`` rows of ``ulysses``, and an attention works across them in two ways:

    - Ulysses: within a row, all-to-alls (DTensor redistributions where there is one row) give a rank the tokens of the
      whole row for its share of the heads: one for query, key and value together, one for the result.
    - Ring: each row's keys and values, a stretch of the sequence, are passed on from row to row while what is there is
      attended to. The parts' results are merged by their log-sum-exp, in fp32.

    Streams of other tokens (text) stay whole on every rank; their keys are counted once, beside those of the first
    stretch. So keys keep their order, a mask is cut where they are, and neither length needs to be a multiple of the
    ranks: the last ranks' parts are padded, and the padding is cut off before it could be attended to.

    Args:
        mesh: one dimension over the ranks that share the sequence; None for all ranks of the default process group.
        ulysses: ranks in a row, which share out the heads. None for the most that divide ranks and heads.
        ring: rows, 1 or more; ``ulysses`` times ``ring`` is the number of ranks. None for as many as that takes.
        cfg: 2 for the samples of one call, such as both halves of classifier-free guidance, to be shared out as well:
            half of them to each row of a ``mesh`` of two dimensions, 2 and the ranks that share a sequence.
        timeout_seconds: how long the ranks wait for each other when they compare what they are about to run.

    Source: DeepSpeed Ulysses (arXiv:2309.14509), Ring Attention (arXiv:2310.01889), both as in USP (arXiv:2405.07719);
    text kept whole as in xDiT's and ParaAttention's HunyuanVideo.

    Before::

        a = invoke_subgraph(block_0, video [B, V, C], text, cos [V, D])
        block_0: attended = scaled_dot_product_attention(q, k, v [B, H, V + T, D], mask)

    After, with Ulysses over N ranks::

        local = pad(video).narrow(1, rank * L, L)
        a = invoke_subgraph(block_0, local [B, L, C], text, pad(cos).narrow(0, rank * L, L)); ... ; gather(...)
        block_0: q, k, v = reshard(stack(video part), sequence -> heads)[:V] | text[this rank's heads]
                 attended = scaled_dot_product_attention(q, k, v [B, H / N, V + T, D], mask)
                 attended = reshard([part of rank 0 | text | part of rank 1 | text ...], heads -> sequence)

    After, with a ring of 2, on the ranks of the first stretch::

        block_0: coming = pass_on(stack(k, v of this stretch))
                 part_0 = scaled_dot_product_attention_with_lse(q, k | text, v | text, mask of both)
                 k, v = arrived(coming)
                 part_1 = scaled_dot_product_attention_with_lse(q, k[:valid], v[:valid], mask of these)
                 attended = sum(part * exp(lse - max)) / sum(exp(lse - max))

    """

    section: ClassVar[str] = "context_parallel"
    is_exact: ClassVar[bool] = True

    mesh: DeviceMesh | None = None
    ulysses: int | None = None
    ring: int | None = None
    cfg: int = 1
    timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
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
        where = trunk.lists or "graph"
        if trunk.sharding is not None:
            return PassReport(declined=((where, "the sequence is split over ranks already"),))
        group = self._group()
        if isinstance(group, str):
            return PassReport(declined=((where, group),))
        if reason := shared_inputs.refusal(trunk):
            return PassReport(declined=((where, reason),))
        whole: Any = group if self.cfg == 1 else dist.group.WORLD
        trunk.group = Group(name=whole.group_name, timeout_seconds=self.timeout_seconds)
        chosen = self._degrees(group.size(), _head_counts(trunk))
        if isinstance(chosen, str):
            return PassReport(declined=((where, chosen),))
        if self.cfg == 1:
            report = self._split_sequence(trunk, group, *chosen)
        else:
            report = self._split_both(trunk, group, *chosen)
        if report.applied:
            shared_inputs.share(trunk, trunk.group, type(self).__name__)
        return report

    def _split_both(self, trunk: Trunk, group: dist.ProcessGroup, ring: int, note: str) -> PassReport:
        halves = self._split_batch(trunk)
        if group.size() == 1 or not halves.applied:
            return halves
        report = self._split_sequence(trunk, group, ring, note)
        matched = (*halves.matched, *report.matched)
        # It was asked for, and half of it is done by now: that the rest can't be is an error.
        return dataclasses.replace(report, matched=matched, declined=(), unmet=report.declined)

    def _split_batch(self, trunk: Trunk) -> PassReport:
        assert self.mesh is not None
        try:
            return _SplitBatch(trunk, self.mesh.get_group(0), 1).run()
        except CannotShard as verdict:
            return PassReport(declined=((trunk.lists, str(verdict)),))

    def _split_sequence(self, trunk: Trunk, group: dist.ProcessGroup, ring: int, note: str) -> PassReport:
        try:
            report = _Rewrite(trunk, group, ring).run()
        except CannotShard as verdict:
            return PassReport(declined=((trunk.lists, str(verdict)),))
        return dataclasses.replace(report, noted=(note,) if note else ())

    def _degrees(self, ranks: int, heads: Sequence[int]) -> tuple[int, str] | str:
        """How many stretches the keys travel between, and what to say of it; or why there is no such number."""
        ulysses, ring = self.ulysses, self.ring
        if ulysses is None and ring is None:
            ulysses, told = max(_degrees(ranks, heads)), ""
            if ulysses < ranks:
                counts, ring = " and ".join(map(str, heads)), ranks // ulysses
                told = f"{ranks} ranks can't share {counts} heads: so {ulysses} do, and {ring} such rows pass on keys"
            return ranks // ulysses, told
        ulysses = ranks // ring if ulysses is None and ring else ulysses or 1
        ring = ranks // ulysses if ring is None else ring
        if ulysses * ring == ranks:
            return ring, ""
        given = ", ".join(f"{name} is {held}" for name in ("ulysses", "ring") if (held := getattr(self, name)))
        allowed = ", ".join(f"{degree} x {ranks // degree}" for degree in _degrees(ranks, heads))
        return f"{given}, but {ranks} ranks share the sequence; allowed for ulysses x ring is one of {allowed}"

    def _group(self) -> dist.ProcessGroup | str:
        """The ranks that share the sequence, or why there are none."""
        if not dist.is_available() or not dist.is_initialized():
            return "no process group is initialised: start the script with torchrun, which makes one rank a GPU"
        if self.cfg == 2 and self.mesh is not None:
            if self.mesh.size() != dist.get_world_size():
                return (
                    f"cfg is 2 and mesh has {self.mesh.size()} of {dist.get_world_size()} ranks; allowed is all of them"
                )
            return self.mesh.get_group(1)
        group: Any = self.mesh.get_group() if self.mesh is not None else dist.group.WORLD
        if group.size() < 2:
            return "the process group has a single rank"
        return group  # type: ignore[no-any-return]


class _Rewrite:
    """The rewrite of one trunk: everything is built beside it, and takes its place only where all of it is proven."""

    def __init__(self, trunk: Trunk, group: dist.ProcessGroup, ring: int) -> None:
        self.trunk, self.group, self.ring = trunk, group, ring
        self.tag = ShardedAttention.__name__
        self.bodies: dict[Body, tuple[dict[int, Layout], Resharder, list[Layout | None]]] = {}
        self.num_attentions = self.num_nodes = 0

    def run(self) -> PassReport:
        trunk, first = self.trunk, self.trunk.blocks[0]
        if trunk.is_branched:
            raise CannotShard("the blocks already stand in a branch")
        stream = _main_stream(trunk)
        failures: list[tuple[int, CannotShard]] = []
        fake = value(first.operands[stream])
        collectives.mesh_of(self.group.group_name, fake.device.type)  # it can't be made while the graph is traced
        for dim in range(fake.ndim):
            try:
                length = fakes.fix_size(fake.shape[dim], trunk.graph)
            except ValueError as error:
                failures.append((0, CannotShard(f"{first.operands[stream].name} can't be split: {error}")))
                continue
            if length < 2:
                continue
            group, rank, ranks = self.group.group_name, self.group.rank(), self.group.size()
            self.split = Split(group=group, rank=rank, ranks=ranks, length=length, ring=self.ring)
            entry = Layout(dim, (Segment(0, length, True),))
            self.bodies, self.num_nodes, self.num_attentions = {}, 0, 0
            try:
                self._body(first, {stream: entry})
                if not self.num_attentions:
                    raise CannotShard(f"no attention of {first.path} runs along dimension {dim} of its stream")
                return self._top(stream, entry)
            except CannotShard as verdict:
                failures.append((self.num_nodes, verdict))
        # The dimension that got furthest is the sequence; why it failed is the reason.
        raise max(failures, key=lambda item: item[0], default=(0, CannotShard("the stream has a single token")))[1]

    # Bodies

    def _body(self, block: BlockCall, given: Mapping[int, Layout]) -> list[Layout | None]:
        """Rewrite a block's body for operands that are split so; once, then check that this call's are the same."""
        body = block.body
        if body in self.bodies:
            wanted, _, results = self.bodies[body]
            for place, layout in given.items():
                if wanted.get(place) != layout:
                    raise CannotShard(f"operand {place} of {block.path} is {layout}, unlike that of its siblings")
            return results
        placeholders = list(body.module.graph.find_nodes(op="placeholder"))
        layouts, splittable = (
            dict(given),
            {node for node, operand in zip(placeholders, block.operands, strict=True) if is_activation(operand)},
        )
        while True:
            source, may_split = body.module.graph, frozenset(splittable)
            around = contexts(self.trunk.graph)[block.call]
            resharder = Resharder(source, self.split, self.tag, block.path, self._attention, RULES, may_split, around)
            attentions = self.num_attentions
            try:
                results = self._copy_body(body, resharder, layouts, placeholders)
            except WantsSplit as wants:
                layouts[placeholders.index(wants.placeholder)] = wants.layout
                self.num_attentions = attentions
            except CannotShard:
                hoisted = set(layouts) - set(given)
                if not hoisted:
                    raise
                # An operand that is a table for each token here and something else there is split where it is read.
                splittable -= {placeholders[place] for place in hoisted}
                layouts, self.num_attentions = dict(given), attentions
            else:
                self.bodies[body] = (layouts, resharder, results)
                return results

    def _copy_body(
        self, body: Body, resharder: Resharder, layouts: Mapping[int, Layout], placeholders: list[fx.Node]
    ) -> list[Layout | None]:
        for place, node in enumerate(placeholders):
            resharder.placeholder(node, layouts.get(place))
        for count, node in enumerate(body.module.graph.nodes):
            self.num_nodes = max(self.num_nodes, count)
            if node.op not in {"placeholder", "output"}:
                resharder.visit(node)
        outputs: Any = body.module.graph.output_node().args[0]
        for node in outputs:
            layout = resharder.layout(node)
            if layout is not None and not layout.is_complete(self.split):
                raise resharder.refuse(node, "the block hands on only some of the tokens")
        resharder.end.args = (tuple(resharder.env[node] for node in outputs),)
        resharder.end.meta = dict(body.module.graph.output_node().meta)
        return [resharder.layout(node) for node in outputs]

    # The graph around the bodies

    def _top(self, stream: int, entry: Layout) -> PassReport:
        trunk, split = self.trunk, self.split
        top = Resharder(trunk.graph, split, self.tag, "the graph between the blocks", self._attention, RULES)
        calls = {block.call: block for block in trunk.blocks}
        needed = ancestors([block.call for block in trunk.blocks])
        locals_: dict[tuple[fx.Node, Layout], fx.Node] = {}
        streams: dict[fx.Node, Layout] = {}
        gathered: list[str] = []

        def local(node: fx.Node, layout: Layout) -> fx.Node:
            """An operand of a call that must come split; contiguous and unshared, as operands of a subgraph must be."""
            if top.layout(node) == layout:
                return top.env[node]
            if top.layout(node) is not None:
                raise CannotShard(f"{node.name} is split along {top.layout(node)}, and wanted along {layout}")
            if (node, layout) not in locals_:
                part = top.part_of(node, layout)
                copied = top.make(torch.clone, (part,), node, memory_format=torch.contiguous_format)
                locals_[node, layout] = copied
                streams[copied] = layout
            return locals_[node, layout]

        for node in trunk.graph.nodes:
            if node.op == "placeholder":
                top.placeholder(node, None)
            elif node in calls:
                block = calls[node]
                given = {place: entry} if block is trunk.blocks[0] and (place := stream) >= 0 else {}
                for place, operand in enumerate(block.operands):
                    if (layout := top.layout(operand)) is not None:
                        given[place] = layout
                results = self._body(block, given)
                wanted, resharder, _ = self.bodies[block.body]
                operands = [
                    local(operand, wanted[place]) if place in wanted else top.env[operand]
                    for place, operand in enumerate(block.operands)
                ]
                top.env[node] = call = top.copy(node)
                call.args = (*call.args[:2], *operands)
                outputs: Any = resharder.end.args[0]
                call.meta["example_value"] = tuple(value(item) for item in outputs)
                top.layouts[node] = results
            elif node.op == "output":
                made = {item: top.whole(item) for item in node.all_input_nodes}
                top.end.args = fx.map_arg(node.args, made.__getitem__)
                top.end.meta = dict(node.meta)
                gathered += [item.name for item in made if top.layout(item) is not None]
            elif node in needed or any(isinstance(top.layouts.get(item), list) for item in node.all_input_nodes):
                self._between(top, node)
            else:
                gathered += [item.name for item in node.all_input_nodes if top.layout(item) is not None]
                top.env[node] = top.copy(node, {item: top.whole(item) for item in node.all_input_nodes})
        streams |= {top.env[node]: layout for node in trunk.graph.nodes if (layout := top.layout(node)) is not None}
        return self._commit(top, streams, dict.fromkeys(gathered))

    def _between(self, top: Resharder, node: fx.Node) -> None:
        """Copy work between the blocks: on one rank's part where that is known to do, else on what all ranks have."""
        try:
            top.visit(node)
        except CannotShard:
            top.env[node] = top.copy(node, {item: top.whole(item) for item in node.all_input_nodes})
            top.layouts[node] = None

    def _commit(self, top: Resharder, streams: dict[fx.Node, Layout], gathered: Mapping[str, None]) -> PassReport:
        trunk, split = self.trunk, self.split
        for body, (_, resharder, _) in self.bodies.items():
            body.module.graph = resharder.graph
        trunk.module.graph = top.graph
        for block in trunk.blocks:
            block.call = top.env[block.call]
        for state in trunk.states:
            state.placeholder = top.env[state.placeholder]
            state.next_value = top.env[state.next_value] if state.next_value is not None else None
        trunk.observed = {name: top.env[node] for name, node in trunk.observed.items()}
        trunk.sharding = Sharding(split=split, streams=streams)
        return PassReport(matched=(f"{self._told()}; gathered after the blocks: {', '.join(gathered)}",))

    def _told(self) -> str:
        split = self.split
        padding = split.local * split.ranks - split.length
        tokens = f"{split.ranks} ranks share {split.length} tokens ({split.local} each" + (
            f", {padding} of them padding)" if padding else ")"
        )
        how = "the heads" if split.ring == 1 else f"ulysses x ring is {split.ulysses} x {split.ring}"
        return f"{tokens}, and {how} in the bodies' {self.num_attentions} attentions"

    # Attention

    def _attention(self, resharder: Resharder, node: fx.Node) -> Layout | None:
        """Surround an attention by redistributions: the whole sequence of a share of the heads in its place."""
        given = arguments(node)
        operands: dict[str, fx.Node] = {name: given[name] for name in ("query", "key", "value")}
        mask, layouts = given.get("attn_mask"), {name: resharder.layout(item) for name, item in operands.items()}
        if layouts["key"] is None and layouts["value"] is None and layouts["query"] is not None:
            if given.get("is_causal"):
                raise resharder.refuse(node, "it is causal, and its queries would be counted from each rank's first")
            return self._attend_to_whole(resharder, node, operands["query"], mask)
        reason = self._check_attention(operands, layouts)
        if mask is not None and resharder.layouts.get(mask) is not None:
            reason = "its mask depends on the tokens that are split"
        if reason:
            raise resharder.refuse(node, reason)
        shapes = {name: (int(value(item).shape[1]), int(value(item).shape[3])) for name, item in operands.items()}
        heads = Heads(self.split, layouts, shapes)
        self.num_attentions += 1
        if self.split.ring > 1:
            self._ring(resharder, node, heads, operands, given)
            return layouts["query"]
        local = resharder.inline(heads.to_heads, {name: resharder.env[item] for name, item in operands.items()}, node)
        replaced = {item: local[name] for name, item in operands.items()}
        if isinstance(mask, fx.Node) and value(mask).ndim > 2 and fakes.size_hint(value(mask).shape[-3]) != 1:
            ours = heads.ours("query")
            cut = (resharder.env[mask], value(mask).ndim - 3, ours.start, ours.stop - ours.start)
            replaced[mask] = resharder.make(torch.narrow, cut, node)
        attention = resharder.copy(node, replaced)
        resharder.run(attention, node)
        resharder.env[node] = resharder.inline(heads.to_sequence, {"attended": attention}, node)["attended"]
        return layouts["query"]

    def _ring(
        self,
        resharder: Resharder,
        node: fx.Node,
        heads: Heads,
        operands: Mapping[str, fx.Node],
        given: Mapping[str, Any],
    ) -> None:
        """Put parts that travel, and are merged, in place of an attention."""
        layouts, mask = heads.layouts, given.get("attn_mask")
        reason = refusal(heads.shapes, given)
        if not reason and not is_attention(node):
            reason = "it is one kernel's own operator, whose parts are not known to merge"
        if reason:
            raise resharder.refuse(node, reason)
        assert layouts["key"] is not None
        dtype = value(node).dtype  # in an autocast region not that of its operands, and kernels' own operators want it
        env, parts = {name: resharder.env[item] for name, item in operands.items()}, None
        for name, item in operands.items():
            if value(item).dtype != dtype:
                env[name] = resharder.make("to", (env[name], dtype), node)
        if isinstance(mask, fx.Node):
            shape = [fakes.size_hint(size) for size in value(mask).shape]
            env["attn_mask"] = resharder.env[mask]
            parts = Mask(self.split, layouts["query"], layouts["key"], shape, heads.ours("query"))
        ring = Ring(heads, parts, given.get("scale"), dtype)
        resharder.env[node] = resharder.inline(ring.attend, env, node)["attended"]

    def _check_attention(self, operands: Mapping[str, fx.Node], layouts: Mapping[str, Layout | None]) -> str:
        """Why an attention can't run over the heads; empty if it can."""
        if len(set(operands.values())) < 3:
            return "two of query, key and value are one tensor"
        if layouts["key"] != layouts["value"]:
            return f"its keys are {layouts['key'] or 'whole'} and its values {layouts['value'] or 'whole'}"
        for name, item in operands.items():
            layout, fake = layouts[name], value(item)
            if layout is not None and (fake.ndim != 4 or layout.dim != 2):
                return f"its sequence is dimension {fake.ndim - 2} of {fake.ndim}, and the stream's is {layout.dim}"
            if layout is not None and not (layout.is_complete(self.split) and layout.num_split == 1):
                return f"it attends to parts of the sequence ({layout})"
            heads = fake.shape[1]
            if not isinstance(heads, int) or heads % self.split.ulysses:
                legal = _degrees(self.split.ranks, [heads] if isinstance(heads, int) else [])
                return (
                    f"{self.split.ulysses} ranks can't share its {heads} heads: allowed for ulysses is one of "
                    f"{', '.join(map(str, legal))}, and the rest of the {self.split.ranks} ranks for ring"
                )
        return ""

    def _attend_to_whole(self, resharder: Resharder, node: fx.Node, query: fx.Node, mask: Any) -> Layout:
        """Attention to tokens that every rank has: each token's result is its own."""
        layout = resharder.layout(query)
        assert layout is not None
        if layout.dim != value(query).ndim - 2:
            raise resharder.refuse(node, "the dimension that would be split is not that of its queries")
        replaced = {}
        if isinstance(mask, fx.Node) and value(mask).ndim > 1 and fakes.size_hint(value(mask).shape[-2]) != 1:
            replaced[mask] = resharder.part_of(mask, layout.at(value(mask).ndim - 2))
        resharder.env[node] = resharder.copy(node, replaced)
        return layout


class _SplitBatch(_Rewrite):
    """The same for the samples of a batch: they have nothing to do with each other, so nothing is exchanged within."""

    def run(self) -> PassReport:
        trunk, first = self.trunk, self.trunk.blocks[0]
        if trunk.is_branched:
            raise CannotShard("the blocks already stand in a branch")
        stream, sample = _main_stream(trunk), classify(trunk).sample
        fake = value(first.operands[stream])
        collectives.mesh_of(self.group.group_name, fake.device.type)  # it can't be made while the graph is traced
        if sample is None or str(value(sample).shape[0]) != str(fake.shape[0]):
            raise CannotShard("the first dimension of what enters the blocks is not that of the samples")
        try:
            batch = fakes.fix_size(fake.shape[0], trunk.graph)
        except ValueError as error:
            raise CannotShard(f"the batch can't be split: {error}") from error
        if batch % 2:
            raise CannotShard(
                f"cfg is 2, and a call has {batch} sample{'s' if batch > 1 else ''}: where a pipeline calls the model "
                "once for each half of the guidance, as HunyuanVideo's does, a graph has nothing to share out. Drop cfg"
            )
        self.split = Split(group=self.group.group_name, rank=self.group.rank(), ranks=2, length=batch)
        entry = Layout(0, (Segment(0, batch, True),))
        self._body(first, {stream: entry})
        report = self._top(stream, entry)
        assert trunk.sharding is not None
        # Each half decides by itself whether it reuses a step.
        trunk.sharding = dataclasses.replace(trunk.sharding, streams={})
        return report

    def _told(self) -> str:
        return f"{self.split.length} samples, half of them to each of 2 rows of ranks"

    def _attention(self, resharder: Resharder, node: fx.Node) -> Layout | None:
        given = arguments(node)
        tensors = [
            item for name in ("query", "key", "value", "attn_mask") if isinstance(item := given.get(name), fx.Node)
        ]
        layouts = {layout for item in tensors if (layout := resharder.layout(item)) is not None}
        if len(layouts) > 1 or {layout.dim for layout in layouts} != {0}:
            raise resharder.refuse(node, "its operands are split in different ways")
        (layout,) = layouts
        wholes = [item for item in tensors if resharder.layout(item) is None]
        batched = [item for item in wholes if value(item).ndim == value(node).ndim and value(item).shape[0] != 1]
        resharder.env[node] = resharder.copy(node, {item: resharder.part_of(item, layout) for item in batched})
        return layout


def _head_counts(trunk: Trunk) -> list[int]:
    """How many heads the attentions of the blocks have."""
    found: set[int] = set()
    for body in trunk.bodies:
        for node in filter(is_attention, body.module.graph.nodes):
            fakes = [value(arguments(node)[name]) for name in ("query", "key", "value")]
            found |= {fake.shape[1] for fake in fakes if fake.ndim == 4 and isinstance(fake.shape[1], int)}
    return sorted(found)


def _degrees(ranks: int, heads: Iterable[int]) -> list[int]:
    """Over how many ranks so many heads can be shared out, where that must divide the ranks as well."""
    return [degree for degree in range(1, ranks + 1) if not any(count % degree for count in (ranks, *heads))]


def _main_stream(trunk: Trunk) -> int:
    """Which operand of the first block carries the sample: of its residual streams, the largest that comes from it."""
    first = trunk.blocks[0]
    sample = classify(trunk).sample
    from_sample = descendants([sample]) if sample is not None else set()
    places = sorted(set(first.body.streams.values()))
    if not places:
        raise CannotShard(f"no output of {first.path} continues one of its inputs")
    return max(
        places,
        key=lambda place: (first.operands[place] in from_sample, fakes.numel_hint(value(first.operands[place]))),
    )
