"""Sharded attention: the sequence split over the ranks of a mesh, and each attention over its heads instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from hvcompile import collectives, inductor
from hvcompile.errors import OptionError
from hvcompile.inductor import value
from hvcompile.inputs import classify
from hvcompile.nodes import ancestors, contexts, descendants
from hvcompile.pipeline import Context, Pass, PassReport
from hvcompile.sharding import CannotShard, Layout, Resharder, Segment, Split, WantsSplit
from hvcompile.trunk import BlockCall, Body, Group, Sharding, Trunk, is_activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedAttention(Pass):
    """Split the sequence that runs through the trunk over the ranks of a process group.

    The residual stream that carries the sample is split on its sequence dimension before the first block and gathered
    after the last; all that is computed per token is computed for this rank's tokens alone. Around each attention,
    DTensor redistributions give a rank the whole sequence of its share of the heads instead (Ulysses): one all-to-all
    for query, key and value together, one for the result. Streams of other tokens (text) stay whole on every rank, and
    only their heads are shared out. So keys keep their order, a mask stays as it is, and neither length needs to be a
    multiple of the ranks: the last ranks' parts are padded, and the padding is cut off before it could be attended to.

    Args:
        mesh: one dimension over the ranks that share the sequence; None for all ranks of the default process group.
        ulysses: over how many ranks the heads are shared out: as many as the mesh has. None for that number.
        timeout_seconds: how long the ranks wait for each other when they compare what they are about to run.

    Source: DeepSpeed Ulysses (arXiv:2309.14509); text kept whole as in xDiT's and ParaAttention's HunyuanVideo.

    Before::

        a = invoke_subgraph(block_0, video [B, V, C], text, cos [V, D])
        block_0: attended = scaled_dot_product_attention(q, k, v [B, H, V + T, D], mask)

    After::

        local = pad(video).narrow(1, rank * L, L)
        a = invoke_subgraph(block_0, local [B, L, C], text, pad(cos).narrow(0, rank * L, L)); ... ; gather(...)
        block_0: q, k, v = reshard(stack(video part), sequence -> heads)[:V] | text[this rank's heads]
                 attended = scaled_dot_product_attention(q, k, v [B, H / N, V + T, D], mask)
                 attended = reshard([part of rank 0 | text | part of rank 1 | text ...], heads -> sequence)

    """

    section: ClassVar[str] = "context_parallel"
    is_exact: ClassVar[bool] = True

    mesh: DeviceMesh | None = None
    ulysses: int | None = None
    timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.mesh is not None and self.mesh.ndim != 1:
            raise OptionError(
                f"context_parallel.mesh has {self.mesh.ndim} dimensions; allowed is one: give the dimension over the "
                'ranks that share a sequence, such as mesh["ulysses"]'
            )
        if self.ulysses is not None and self.ulysses < 1:
            raise OptionError(f"context_parallel.ulysses is {self.ulysses}; allowed is a whole number, 1 or more")
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
        trunk.group = Group(name=group.group_name, timeout_seconds=self.timeout_seconds)
        if self.ulysses not in {None, group.size()}:
            reason = f"ulysses is {self.ulysses}, but {group.size()} ranks share the sequence; allowed is that number"
            return PassReport(declined=((where, reason),))
        try:
            return _Rewrite(trunk, group).run()
        except CannotShard as verdict:
            return PassReport(declined=((where, str(verdict)),))

    def _group(self) -> dist.ProcessGroup | str:
        """The ranks that share the sequence, or why there are none."""
        if not dist.is_available() or not dist.is_initialized():
            return "no process group is initialised: start the script with torchrun, which makes one rank a GPU"
        group: Any = self.mesh.get_group() if self.mesh is not None else dist.group.WORLD
        if group.size() < 2:
            return "the process group has a single rank"
        return group  # type: ignore[no-any-return]


class _Rewrite:
    """The rewrite of one trunk: everything is built beside it, and takes its place only where all of it is proven."""

    def __init__(self, trunk: Trunk, group: dist.ProcessGroup) -> None:
        self.trunk, self.group = trunk, group
        self.tag = ShardedAttention.__name__
        self.bodies: dict[Body, tuple[dict[int, Layout], Resharder, list[Layout | None]]] = {}
        self.num_attentions = 0

    def run(self) -> PassReport:
        trunk, first = self.trunk, self.trunk.blocks[0]
        if any(block.call.graph is not trunk.graph for block in trunk.blocks):
            raise CannotShard("the blocks already stand in a branch")
        stream = _main_stream(trunk)
        failures: list[tuple[int, CannotShard]] = []
        fake = value(first.operands[stream])
        collectives.mesh_of(self.group.group_name, fake.device.type)  # it can't be made while the graph is traced
        for dim in range(fake.ndim):
            try:
                length = inductor.fix_size(fake.shape[dim], trunk.graph)
            except ValueError as error:
                failures.append((0, CannotShard(f"{first.operands[stream].name} can't be split: {error}")))
                continue
            if length < 2:
                continue
            self.split = Split(
                group=self.group.group_name, rank=self.group.rank(), ranks=self.group.size(), length=length
            )
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
            resharder = Resharder(source, self.split, self.tag, block.path, self._attention, may_split, around)
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
        top = Resharder(trunk.graph, split, self.tag, "the graph between the blocks", self._attention)
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
        padding = split.local * split.ranks - split.length
        heads = f"{split.ranks} ranks share {split.length} tokens ({split.local} each" + (
            f", {padding} of them padding)" if padding else ")"
        )
        return PassReport(
            matched=(
                f"{heads}, and the heads in the bodies' {self.num_attentions} attentions; gathered after the blocks: "
                + ", ".join(gathered),
            )
        )

    # Attention

    def _attention(self, resharder: Resharder, node: fx.Node) -> Layout | None:
        """Surround an attention by redistributions: the whole sequence of a share of the heads in its place."""
        names = ("query", "key", "value", "attn_mask")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False))
        given |= {name: node.kwargs[name] for name in names if name in node.kwargs}
        operands: dict[str, fx.Node] = {name: given[name] for name in names[:3]}
        mask, layouts = given.get("attn_mask"), {name: resharder.layout(item) for name, item in operands.items()}
        if layouts["key"] is None and layouts["value"] is None and layouts["query"] is not None:
            return self._attend_to_whole(resharder, node, operands["query"], mask)
        reason = self._check_attention(operands, layouts)
        if mask is not None and resharder.layouts.get(mask) is not None:
            reason = "its mask depends on the tokens that are split"
        if reason:
            raise resharder.refuse(node, reason)
        heads = _Heads(self.split, layouts, {name: int(value(item).shape[1]) for name, item in operands.items()})
        local = resharder.inline(heads.to_heads, {name: resharder.env[item] for name, item in operands.items()}, node)
        replaced = {item: local[name] for name, item in operands.items()}
        if isinstance(mask, fx.Node) and value(mask).ndim > 2 and inductor.size_hint(value(mask).shape[-3]) != 1:
            ours = heads.ours("query")
            cut = (resharder.env[mask], value(mask).ndim - 3, ours.start, ours.stop - ours.start)
            replaced[mask] = resharder.make(torch.narrow, cut, node)
        attention = resharder.copy(node, replaced)
        resharder.run(attention, node)
        resharder.env[node] = resharder.inline(heads.to_sequence, {"attended": attention}, node)["attended"]
        self.num_attentions += 1
        return layouts["query"]

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
            if not isinstance(heads, int) or heads % self.split.ranks:
                return (
                    f"{self.split.ranks} ranks can't share its {heads} heads: use a number of ranks that divides them"
                )
        return ""

    def _attend_to_whole(self, resharder: Resharder, node: fx.Node, query: fx.Node, mask: Any) -> Layout:
        """Attention to tokens that every rank has: each token's result is its own."""
        layout = resharder.layout(query)
        assert layout is not None
        if layout.dim != value(query).ndim - 2:
            raise resharder.refuse(node, "the dimension that would be split is not that of its queries")
        replaced = {}
        if isinstance(mask, fx.Node) and value(mask).ndim > 1 and inductor.size_hint(value(mask).shape[-2]) != 1:
            replaced[mask] = resharder.part_of(mask, layout.at(value(mask).ndim - 2))
        resharder.env[node] = resharder.copy(node, replaced)
        return layout


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Graph code around one attention: from a part of the sequence to a share of the heads, and back.

    ``layouts`` says of query, key and value (each ``[B, H, S, D]``) what lies along S, ``counts`` how many heads each
    has. Of tokens that every rank has, only the rank's own heads are taken.
    """

    split: Split
    layouts: Mapping[str, Layout | None]
    counts: Mapping[str, int]

    def ours(self, name: str) -> slice:
        """The heads of this rank."""
        share = self.counts[name] // self.split.ranks
        return slice(self.split.rank * share, (self.split.rank + 1) * share)

    def to_heads(self, **whole: Any) -> dict[str, Any]:
        """Query, key and value over the whole sequence: ``[B, H / N, S, D]``."""
        split, found = self.split, dict[str, Any]()
        parts: dict[str, Any] = {}
        places = {
            name: next(place for place, _, item in layout.offsets(split) if item.is_split)
            for name, layout in self.layouts.items()
            if layout is not None
        }
        for count in dict.fromkeys(self.counts[name] for name in places):  # as a rule one: a single all-to-all
            alike = [name for name in places if self.counts[name] == count]
            ours = torch.stack([whole[name][:, :, places[name] : places[name] + split.local] for name in alike])
            theirs = collectives.reshard(ours, split.group, 3, 2)
            parts |= {name: theirs[number][:, :, : split.length] for number, name in enumerate(alike)}
        for name, held in whole.items():
            layout = self.layouts[name]
            if layout is None:
                found[name] = held[:, self.ours(name)]
                continue
            pieces = [
                parts[name] if item.is_split else held[:, self.ours(name), place : place + item.stop]
                for place, _, item in layout.offsets(split)
            ]
            found[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return found

    def to_sequence(self, attended: Any) -> dict[str, Any]:
        """The result, laid out as the queries were, from ``[B, H / N, S, D]``."""
        split, layout, pieces = self.split, self.layouts["query"], []
        if layout is None:
            return {"attended": collectives.gather(attended, split.group, 1)}
        for _, place, item in layout.offsets(split):
            piece = attended[:, :, place : place + item.stop - item.start]
            if item.is_split:
                padding = split.local * split.ranks - split.length
                piece = torch.nn.functional.pad(piece, (0, 0, 0, padding)) if padding else piece
                piece = piece.unflatten(2, (split.ranks, split.local))
            else:  # every rank needs these tokens of each: they travel in the same all-to-all
                piece = piece.unsqueeze(2).expand(-1, -1, split.ranks, -1, -1)
            pieces.append(piece)
        packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3)
        return {"attended": collectives.reshard(packed.flatten(2, 3), split.group, 1, 2)}


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
        key=lambda place: (first.operands[place] in from_sample, inductor.numel_hint(value(first.operands[place]))),
    )
