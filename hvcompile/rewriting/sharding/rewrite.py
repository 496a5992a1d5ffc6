"""The rewrite of a trunk for one rank's part of the sequence: its bodies, and the graph around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import fx

from hvcompile.graph.attention import arguments, is_attention
from hvcompile.graph.nodes import ancestors, contexts, descendants
from hvcompile.graph.tiles import Part
from hvcompile.journal import Declined, PassReport
from hvcompile.ranks import collectives
from hvcompile.ranks.split import Layout, Segment, Split
from hvcompile.rewriting.sharding.attention import SequenceAttention
from hvcompile.rewriting.sharding.resharder import CannotShard, Resharder, Rule, WantsSplit
from hvcompile.rewriting.sharding.rules import RULES
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.grid import sample_tokens
from hvcompile.trunk.operands import contiguous_like, is_activation
from hvcompile.trunk.roles import classify
from hvcompile.trunk.together import Sharding
from hvcompile.trunk.trunk import BlockCall, Body, Trunk

Layouts = dict[int, Layout]
"""Of a call's operands that come split, by place."""


class CountedAttention(Protocol):
    """Copies an attention one of whose operands is split, and says how its result is; ``count`` is how many it did."""

    count: int

    def __call__(self, resharder: Resharder, node: fx.Node) -> Layout | None:
        """Copy a node of the source."""
        ...


class Rewrite:
    """The rewrite of one trunk: everything is built beside it, and takes its place only where all of it is proven.

    Args:
        trunk: as it was captured and outlined.
        split: how the sequence lies on the ranks.
        attention: copies an attention one of whose operands is split.
        tag: the pass's name.
        kind: makes what copies a graph.
        rules: how to copy each operation but attention.

    """

    def __init__(
        self,
        trunk: Trunk,
        split: Split,
        attention: CountedAttention,
        tag: str,
        kind: Callable[..., Resharder] = Resharder,
        rules: Mapping[str, Rule] = RULES,
    ) -> None:
        self.trunk, self.split, self.attention, self.tag = trunk, split, attention, tag
        self.kind, self.rules = kind, rules
        self.bodies: dict[Body, tuple[Layouts, Resharder, list[Layout | None]]] = {}
        self.num_nodes = 0
        """Nodes of a body that could be copied: how far a rewrite that fails has come."""

    def rewrite_body(self, block: BlockCall, layouts: Layouts) -> list[Layout | None]:
        """Rewrite a block's body for operands that are split so; once, then check that this call's are the same.

        Returns:
            How each of its outputs is split.

        """
        body = block.body
        if body not in self.bodies:
            self.bodies[body] = self._copy_until_settled(block, layouts)
        wanted, _, results = self.bodies[body]
        for place, layout in layouts.items():
            if wanted.get(place) != layout:
                raise CannotShard(f"operand {place} of {block.path} is {layout}, unlike that of its siblings")
        return results

    def _copy_until_settled(self, block: BlockCall, known: Layouts) -> tuple[Layouts, Resharder, list[Layout | None]]:
        """Copy a body, again and again as operands turn out to be tables with a row a token, which come split then."""
        body, layouts, count = block.body, dict(known), self.attention.count
        placeholders = list(body.module.graph.find_nodes(op="placeholder"))
        pairs = zip(placeholders, block.operands, strict=True)
        splittable = {node for node, operand in pairs if is_activation(operand)}
        around = contexts(self.trunk.graph)[block.call]
        while True:
            self.attention.count = count
            resharder = self.kind(
                body.module.graph,
                self.split,
                self.tag,
                block.path,
                self.attention,
                self.rules,
                frozenset(splittable),
                around,
            )
            resharder.streams = frozenset(placeholders[place] for place in known)
            try:
                return layouts, resharder, self._copy_body(body, resharder, layouts, placeholders)
            except WantsSplit as wants:
                layouts[placeholders.index(wants.placeholder)] = wants.layout
            except CannotShard:
                hoisted = set(layouts) - set(known)
                if not hoisted:
                    raise
                # An operand that is a table for each token here and something else there is split where it is read.
                splittable -= {placeholders[place] for place in hoisted}
                layouts = dict(known)

    def _copy_body(
        self, body: Body, resharder: Resharder, layouts: Layouts, placeholders: list[fx.Node]
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

    def commit(self, around: Around, tokens: Sequence[Part] | Declined, summary: str) -> PassReport:
        """Put all that was built in place of what it was built from: one rank's part in place of the whole."""
        self.replace(around)
        self.trunk.sharding = Sharding(split=self.split, streams=around.streams, tokens=tokens)
        return PassReport(matched=(f"{summary}; gathered after the blocks: {', '.join(around.gathered)}",))

    def replace(self, around: Around) -> None:
        """Put the copied graphs in place of what they were copied from."""
        trunk, top = self.trunk, around.top
        for body, (_, resharder, _) in self.bodies.items():
            body.module.graph = resharder.graph
        trunk.module.graph = top.graph
        for block in trunk.blocks:
            block.call = top.env[block.call]
        for item in trunk.derived:
            item.sources = tuple(top.env[node] for node in item.sources)
            item.placeholders = tuple(top.env[node] for node in item.placeholders)
        for state in trunk.states:
            state.placeholder = top.env[state.placeholder]
            state.next_value = top.env[state.next_value] if state.next_value is not None else None
        if trunk.weights_content is not None:
            trunk.weights_content = top.env[trunk.weights_content]
        trunk.observed = {name: top.env[node] for name, node in trunk.observed.items()}


class Around:
    """The copy of the graph around the bodies, whose first block is given its stream ``stream`` split as ``entry``."""

    def __init__(self, rewrite: Rewrite, stream: int, entry: Layout) -> None:
        trunk = rewrite.trunk
        self._rewrite, self._stream, self._entry = rewrite, stream, entry
        self.top = rewrite.kind(
            trunk.graph, rewrite.split, rewrite.tag, "the graph between the blocks", rewrite.attention, rewrite.rules
        )
        self.streams: dict[fx.Node, Layout] = {}
        """What is one rank's part, in the new graph."""
        self.gathered: dict[str, None] = {}
        """Names of what is put together again."""
        self._calls = {block.call: block for block in trunk.blocks}
        self._before_blocks = ancestors([block.call for block in trunk.blocks])
        self._parts: dict[tuple[fx.Node, Layout], fx.Node] = {}

    def copy(self) -> None:
        """Copy every node.

        Raises:
            CannotShard: one can't be.

        """
        top, graph = self.top, self._rewrite.trunk.graph
        for node in graph.nodes:
            if node.op == "placeholder":
                top.placeholder(node, None)
            elif node in self._calls:
                self._call(node, self._calls[node])
            elif node.op == "output":
                self._output(node)
            elif node in self._before_blocks or any(self._is_several(item) for item in node.all_input_nodes):
                self._between(node)
            else:
                self._after(node)
        self.streams |= {top.env[node]: layout for node in graph.nodes if (layout := top.layout(node)) is not None}

    def _is_several(self, node: fx.Node) -> bool:
        return isinstance(self.top.layouts.get(node), list)

    def _call(self, node: fx.Node, block: BlockCall) -> None:
        """Copy a call of a body, its operands as the rewritten body takes them."""
        top, rewrite = self.top, self._rewrite
        layouts = {self._stream: self._entry} if block is rewrite.trunk.blocks[0] else {}
        layouts |= {
            place: layout for place, operand in enumerate(block.operands) if (layout := top.layout(operand)) is not None
        }
        results = rewrite.rewrite_body(block, layouts)
        wanted, resharder, _ = rewrite.bodies[block.body]
        operands = [
            self._part(operand, wanted[place]) if place in wanted else top.env[operand]
            for place, operand in enumerate(block.operands)
        ]
        top.env[node] = call = top.copy(node)
        call.args = (*call.args[:2], *operands)
        outputs: Any = resharder.end.args[0]
        call.meta["example_value"] = tuple(contiguous_like(value(item)) for item in outputs)
        top.layouts[node] = results

    def _part(self, node: fx.Node, layout: Layout) -> fx.Node:
        """An operand of a call that must come split; contiguous and unshared, as operands of a subgraph must be."""
        top = self.top
        if top.layout(node) == layout:
            return top.env[node]
        if top.layout(node) is not None:
            raise CannotShard(f"{node.name} is split along {top.layout(node)}, and wanted along {layout}")
        if node in top.joined and not top.may_split_again:
            raise top.refuse(node, "its tokens may have been moved since they left the block before")
        if (node, layout) not in self._parts:
            part = top.part_of(node, layout)
            copied = top.make(torch.clone, (part,), node, memory_format=torch.contiguous_format)
            self._parts[node, layout] = copied
            self.streams[copied] = layout
        return self._parts[node, layout]

    def _between(self, node: fx.Node) -> None:
        """Copy work between the blocks: on one rank's part where that is known to do, else on what all ranks have."""
        try:
            self.top.visit(node)
        except CannotShard:
            self.top.joined.add(node)
            self.top.env[node] = self.top.copy(node, self._wholes(node))
            self.top.layouts[node] = None

    def _after(self, node: fx.Node) -> None:
        """Copy work after the blocks, which is on what all ranks have."""
        self._tell_gathered(node)
        self.top.env[node] = self.top.copy(node, self._wholes(node))

    def _output(self, node: fx.Node) -> None:
        wholes = self._wholes(node)
        self.top.end.args = fx.map_arg(node.args, wholes.__getitem__)
        self.top.end.meta = dict(node.meta)
        self._tell_gathered(node)

    def _wholes(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        return {item: self.top.whole(item) for item in node.all_input_nodes}

    def _tell_gathered(self, node: fx.Node) -> None:
        split = [item.name for item in node.all_input_nodes if self.top.layout(item) is not None]
        self.gathered |= dict.fromkeys(split)


def split_sequence(trunk: Trunk, group: dist.ProcessGroup, ring: int, tag: str) -> PassReport:
    """Rewrite a trunk for this rank's part of its sequence.

    The dimension of the main stream that is the sequence is found by trying: it is the one along which every operation
    of the blocks is known to work on a part, and along which an attention runs.

    Args:
        trunk: rewritten in place, or left as it was.
        group: the ranks that share the sequence.
        ring: stretches of the sequence, between which keys travel.
        tag: the pass's name.

    Raises:
        CannotShard: there is no such dimension; says why of the one that got furthest.

    """
    first, stream = enter(trunk, group)
    failures: list[tuple[int, CannotShard]] = []
    for dim, length in _lengths(trunk, first.operands[stream], failures):
        name, rank, ranks = group.group_name, group.rank(), group.size()
        split = Split(group=name, rank=rank, ranks=ranks, length=length, ring=ring)
        rewrite = Rewrite(trunk, split, SequenceAttention(split), tag)
        entry = Layout(dim, (Segment(0, length, True),))
        try:
            rewrite.rewrite_body(first, {stream: entry})
            if not rewrite.attention.count:
                raise CannotShard(f"no attention of {first.path} runs along dimension {dim} of its stream")
            around = Around(rewrite, stream, entry)
            around.copy()
            tokens = sample_tokens(trunk, first.operands[stream], dim)
            return rewrite.commit(around, tokens, _summary(split, rewrite.attention.count))
        except CannotShard as verdict:
            failures.append((rewrite.num_nodes, verdict))
    # The dimension that got furthest is the sequence; why it failed is the reason.
    raise max(failures, key=lambda item: item[0], default=(0, CannotShard("the stream has a single token")))[1]


def enter(trunk: Trunk, group: dist.ProcessGroup) -> tuple[BlockCall, int]:
    """The first block and the place of its operand that is to be split.

    Raises:
        CannotShard: there is nothing to split.

    """
    if trunk.is_branched:
        raise CannotShard("the blocks already stand in a branch")
    first, stream = trunk.blocks[0], main_stream(trunk)
    device_type = value(first.operands[stream]).device.type
    collectives.mesh_of(group.group_name, device_type)  # it can't be made while the graph is traced
    return first, stream


def _lengths(trunk: Trunk, stream: fx.Node, failures: list[tuple[int, CannotShard]]) -> Iterator[tuple[int, int]]:
    """The dimensions of the stream that can be split, each with its length; ``failures`` gains why others can't."""
    for dim, size in enumerate(value(stream).shape):
        try:
            length = fakes.fix_size(size, trunk.graph)
        except ValueError as error:
            failures.append((0, CannotShard(f"{stream.name} can't be split: {error}")))
            continue
        if length >= 2:
            yield dim, length


def _summary(split: Split, num_attentions: int) -> str:
    padding = split.local * split.ranks - split.length
    tokens = f"{split.ranks} ranks share {split.length} tokens ({split.local} each" + (
        f", {padding} of them padding)" if padding else ")"
    )
    how = "the heads" if split.ring == 1 else f"ulysses x ring is {split.ulysses} x {split.ring}"
    return f"{tokens}, and {how} in the bodies' {num_attentions} attentions"


def main_stream(trunk: Trunk) -> int:
    """Which operand of the first block carries the sample: of its residual streams, the largest that comes from it.

    Raises:
        CannotShard: it has none.

    """
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


def head_counts(trunk: Trunk) -> list[int]:
    """How many heads the attentions of the blocks have."""
    counts: set[int] = set()
    for body in trunk.bodies:
        for node in filter(is_attention, body.module.graph.nodes):
            operands = [value(arguments(node)[name]) for name in ("query", "key", "value")]
            counts |= {fake.shape[1] for fake in operands if fake.ndim == 4 and isinstance(fake.shape[1], int)}
    return sorted(counts)
