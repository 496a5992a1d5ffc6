"""The trunk: a captured graph whose repeated blocks are calls of shared bodies. The vocabulary of every pass."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from hvcompile.float8 import format as float8_format
from hvcompile.float8.format import Granularity
from hvcompile.journal import Declined
from hvcompile.torch_private import dynamo, fakes
from hvcompile.torch_private.fakes import STORED, TAG, value

if TYPE_CHECKING:
    from hvcompile.ranks.split import Layout, Split


@dataclasses.dataclass(eq=False)
class Body:
    """One subgraph shared by all blocks that compute the same thing.

    ``streams`` maps an output's position to the position of the operand that it is the next version of: the residual
    streams (video, text) that run through the trunk.
    """

    name: str
    module: fx.GraphModule
    streams: dict[int, int]


@dataclasses.dataclass(eq=False)
class BlockCall:
    """One block of the trunk: a call of its body, in the top-level graph or, once a pass has moved it, in a branch."""

    path: str
    body: Body
    call: fx.Node

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """The call's operands, in the order of the body's placeholders."""
        return self.call.args[2:]  # type: ignore[return-value]

    @property
    def outputs(self) -> dict[int, fx.Node]:
        """The outputs that are read, by position."""
        return {user.args[1]: user for user in self.call.users if user.target is operator.getitem}  # type: ignore[misc]


@dataclasses.dataclass(eq=False, kw_only=True)
class State:
    """A tensor that lives from one call of the compiled graph to the next: a placeholder and the next value.

    ``shape`` may hold symbolic sizes. The runtime owns the tensor; it starts as zeros.
    """

    name: str
    placeholder: fx.Node
    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    next_value: fx.Node | None = None


@dataclasses.dataclass(eq=False, kw_only=True)
class StoredWeights:
    """Linear layers' weights that the graph takes as one float8 matrix: placeholders for its data and its scales.

    The runtime makes both from the sources, of which nothing else in the graph reads any (``quantized_weights.join``).
    """

    sources: tuple[fx.Node, ...]
    data: fx.Node
    scale: fx.Node
    granularity: Granularity
    keep_original: bool


@dataclasses.dataclass(eq=False, kw_only=True)
class Derived:
    """Inputs of the trunk's graph that follow from other inputs: a graph of its own, run anew only where those changed.

    Attributes:
        made_by: name of the pass; what runs instead where ``read`` refuses is that pass's ``instead``.
        module: takes ``sources`` in order and returns a tuple; it runs as it is, not compiled.
        sources: placeholders of the captured graph: conditions, weights, sizes.
        placeholders: what was added to the trunk's graph, one a value.
        read: makes of ``module``'s results the values that the placeholders are given, or says why the trunk's graph
            does not compute what was captured for them; None where the results are the values.

    """

    made_by: str
    module: fx.GraphModule
    sources: tuple[fx.Node, ...]
    placeholders: tuple[fx.Node, ...]
    read: Callable[[Sequence[torch.Tensor]], Sequence[Any] | Declined] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that run a graph together: the name of their process group, and how long they wait for each other."""

    name: str
    timeout_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the sequence is split over ranks, and which nodes of the top-level graph hold one rank's part of it."""

    split: Split
    streams: Mapping[fx.Node, Layout]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedInputs:
    """Inputs of which every rank takes the first one's.

    Attributes:
        nodes: what stands in the graph for each placeholder, the sample and the timesteps.
        apart: how far each rank's own are from the first one's; float32 ``[ranks, len(nodes)]``, each the sum of
            absolute differences over that of the first one's absolute values.

    """

    nodes: Mapping[fx.Node, fx.Node]
    apart: fx.Node


@dataclasses.dataclass(eq=False)
class Trunk:
    """A captured graph with its blocks outlined, and the inputs that passes have added to it: weights, then state.

    Prologue and epilogue are the nodes before the first and after the last block; they stay in ``module``'s graph.
    ``group`` is set where ranks run it together, ``sharding`` where they split its sequence, and then ``shared``.
    """

    module: fx.GraphModule
    blocks: list[BlockCall]
    lists: str
    stored: list[StoredWeights] = dataclasses.field(default_factory=list)
    states: list[State] = dataclasses.field(default_factory=list)
    observed: dict[str, fx.Node] = dataclasses.field(default_factory=dict)
    derived: list[Derived] = dataclasses.field(default_factory=list)
    group: Group | None = None
    sharding: Sharding | None = None
    shared: SharedInputs | None = None

    @property
    def graph(self) -> fx.Graph:
        """The top-level graph."""
        return self.module.graph

    @property
    def bodies(self) -> list[Body]:
        """The distinct bodies, in order of first call."""
        return list(dict.fromkeys(block.body for block in self.blocks))

    @property
    def is_branched(self) -> bool:
        """Whether a pass has moved blocks into a branch, out of the top-level graph."""
        return any(block.call.graph is not self.graph for block in self.blocks)

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders of the captured graph, without those that passes have added."""
        added = set(self.added)
        return [node for node in self.graph.nodes if node.op == "placeholder" and node not in added]

    @property
    def added(self) -> list[fx.Node]:
        """The placeholders that passes have added, in order: derived inputs, weights, state."""
        derived = [node for item in self.derived for node in item.placeholders]
        stored = [node for weights in self.stored for node in (weights.data, weights.scale)]
        return [*derived, *stored, *(state.placeholder for state in self.states)]

    @property
    def output(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    def add_state(
        self, name: str, shape: Iterable[int | torch.SymInt], dtype: torch.dtype, device: torch.device
    ) -> State:
        """Add a state tensor as a placeholder after all others; set ``next_value`` once its node exists."""
        placeholder = self._add_placeholder(f"state_{name}", shape, dtype, device)
        state = State(name=name, placeholder=placeholder, shape=tuple(shape), dtype=dtype, device=device)
        self.states.append(state)
        return state

    def add_derived(
        self,
        names: Sequence[str],
        examples: Sequence[Any],
        *,
        made_by: str,
        module: fx.GraphModule,
        sources: Sequence[fx.Node],
        read: Callable[[Sequence[torch.Tensor]], Sequence[Any] | Declined] | None = None,
    ) -> Derived:
        """Add inputs that ``module`` gives, a placeholder for each name, before weights and state; see ``Derived``."""
        derived = {node for item in self.derived for node in item.placeholders}
        later = set(self.added) - derived
        anchor = [node for node in self.graph.find_nodes(op="placeholder") if node not in later][-1]
        placeholders = []
        for name, example in zip(names, examples, strict=True):
            with self.graph.inserting_after(anchor):
                anchor = self.graph.placeholder(name)
            dynamo.mark_as_added(anchor)
            anchor.meta = {TAG: made_by, "example_value": example}
            placeholders.append(anchor)
        made = Derived(
            made_by=made_by,
            module=module,
            sources=tuple(sources),
            placeholders=tuple(placeholders),
            read=read,
        )
        self.derived.append(made)
        return made

    def split_body(self, body: Body, blocks: Sequence[BlockCall], suffix: str, tag: str) -> Body:
        """A body for some of a body's blocks to themselves: a copy of it where others keep it, else the body itself."""
        if all(block in blocks for block in self.blocks if block.body is body):
            return body
        name, count = f"{body.name}_{suffix}", 0
        while hasattr(self.module, name):
            count += 1
            name = f"{body.name}_{suffix}_{count}"
        made = Body(name, dynamo.clone_graph_module(body.module), dict(body.streams))
        setattr(self.module, name, made.module)
        for block in blocks:
            with self.graph.inserting_before(block.call):
                reference = self.graph.get_attr(name)
            reference.meta = {TAG: tag}
            old = block.call.args[0]
            block.call.args = (reference, name, *block.operands)
            if isinstance(old, fx.Node) and not old.users:
                self.graph.erase_node(old)
            block.body = made
        return made

    def add_operand(self, body: Body, node: fx.Node) -> fx.Node:
        """Hand one more value to every call of a body; returns the placeholder that it is inside."""
        last = list(body.module.graph.find_nodes(op="placeholder"))[-1]
        with body.module.graph.inserting_after(last):
            placeholder = body.module.graph.placeholder(node.name)
        placeholder.meta["example_value"] = value(node)
        for block in self.blocks:
            if block.body is body:
                block.call.args = (*block.call.args, node)
        return placeholder

    def drop_operand(self, body: Body, placeholder: fx.Node) -> None:
        """Hand a value that a body no longer reads to none of its calls."""
        position = list(body.module.graph.find_nodes(op="placeholder")).index(placeholder)
        body.module.graph.erase_node(placeholder)
        body.streams = {output: place - (place > position) for output, place in body.streams.items()}
        for block in self.blocks:
            if block.body is body:
                args = list(block.call.args)
                del args[2 + position]
                block.call.args = tuple(args)

    def store(
        self, sources: Sequence[fx.Node], name: str, *, granularity: Granularity, keep_original: bool
    ) -> StoredWeights:
        """Add the float8 matrix of some weights ``[N, K]``, stacked, as placeholders after all others."""
        first: torch.Tensor = value(sources[0])
        rows = sum(value(node).shape[0] for node in sources)
        data = self._add_placeholder(f"{name}_float8", (rows, first.shape[1]), float8_format.DTYPE, first.device)
        shape = (rows, 1) if granularity == "row" else ()
        scale = self._add_placeholder(f"{name}_scale", shape, torch.float32, first.device)
        for node in (data, scale):
            node.meta[STORED] = True
        stored = StoredWeights(
            sources=tuple(sources), data=data, scale=scale, granularity=granularity, keep_original=keep_original
        )
        self.stored.append(stored)
        return stored

    def _add_placeholder(
        self, name: str, shape: Iterable[int | torch.SymInt], dtype: torch.dtype, device: torch.device
    ) -> fx.Node:
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        with self.graph.inserting_after(placeholders[-1]):
            placeholder = self.graph.placeholder(name)
        mode = fakes.fake_mode(self.graph)
        if mode is None:
            raise ValueError("the graph has no tensor, so no input can be added to it")
        dynamo.mark_as_added(placeholder)
        placeholder.meta["example_value"] = fakes.fake_like(mode, tuple(shape), dtype, device)
        return placeholder
