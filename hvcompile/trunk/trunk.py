"""The trunk: a captured graph whose repeated blocks are calls of shared bodies. The vocabulary of every pass."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.float8 import format as float8_format
from hvcompile.float8.format import Granularity
from hvcompile.journal import Declined
from hvcompile.torch_private import dynamo, fakes
from hvcompile.torch_private.fakes import STORED, TAG, value
from hvcompile.trunk.lineage import Earlier
from hvcompile.trunk.together import Group, Sharding, SharedInputs


@dataclasses.dataclass(eq=False)
class Body:
    """One subgraph shared by all blocks that compute the same thing.

    Attributes:
        name: of the submodule, in the trunk's module.
        module: the subgraph.
        streams: for each output that is the next version of an operand, their positions, output to operand. These are
            the residual streams (video, text) that run through the trunk.

    """

    name: str
    module: fx.GraphModule
    streams: dict[int, int]


@dataclasses.dataclass(eq=False)
class BlockCall:
    """One block of the trunk: a call of its body.

    Attributes:
        path: of the block in the model, such as ``transformer_blocks.3``.
        body: what is called.
        call: the node, in the top-level graph or, once a pass has moved it, in a branch.

    """

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
    """A tensor that lives from one call of the compiled graph to the next; the runtime owns it, and starts with zeros.

    Attributes:
        name: unique among the trunk's states.
        placeholder: the value that a call gets.
        shape: may hold symbolic sizes.
        dtype: of the tensor.
        device: of the tensor.
        next_value: the node of the value that the next call gets; None until the pass has made it.
        may_be_left: whether a call may say that it leaves it as it is; see ``runtime.left_state``.
        is_shared: whether all generations of a model share it, which else have one each.

    """

    name: str
    placeholder: fx.Node
    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    next_value: fx.Node | None = None
    may_be_left: bool = False
    is_shared: bool = False


@dataclasses.dataclass(eq=False, kw_only=True)
class StoredWeights:
    """Weights of linear layers that the graph takes as one float8 matrix, which ``float8.weights.join`` makes.

    Attributes:
        sources: placeholders of the weights, stacked in this order; nothing else in the graph reads them.
        data: placeholder of the float8 matrix.
        scale: placeholder of its scales.
        granularity: how many scales there are.
        keep_original: whether the runtime keeps the weights, in the CPU's memory.

    """

    sources: tuple[fx.Node, ...]
    data: fx.Node
    scale: fx.Node
    granularity: Granularity
    keep_original: bool


@dataclasses.dataclass(eq=False, kw_only=True)
class Derived:
    """Inputs of the trunk's graph that follow from other inputs.

    What follows from numbers alone is kept, and right for as long as these are equal. What follows from tensors is kept
    if the pass asks for it, and a tensor that is the same, unmodified object may have been written to unseen. So the
    pass that asks also has the graph check in every step that the values fit the tensors.

    Attributes:
        made_by: name of the pass. If ``read`` refuses, that pass's ``instead`` says what runs in its place.
        module: takes ``sources`` in order and returns a tuple; it runs as it is, not compiled.
        sources: placeholders of the captured graph: conditions, weights, sizes.
        is_kept: whether the values serve later calls too; else they are computed in every call.
        placeholders: what was added to the trunk's graph, one for each value.
        read: makes the placeholders' values of ``module``'s results, or says why the trunk's graph does not compute
            for them what was captured; None where the results are the values.

    """

    made_by: str
    module: fx.GraphModule
    sources: tuple[fx.Node, ...]
    placeholders: tuple[fx.Node, ...]
    is_kept: bool = True
    read: Callable[[Sequence[torch.Tensor]], Sequence[Any] | Declined] | None = None


@dataclasses.dataclass(eq=False)
class Trunk:
    """A captured graph with its blocks outlined, and the inputs that passes have added to it.

    Prologue and epilogue are the nodes before the first and after the last block; they stay in ``module``'s graph.

    Attributes:
        module: holds the top-level graph and the bodies.
        blocks: in order of execution.
        lists: the module lists that the blocks come from, as text.
        stored: weights that passes have put into float8.
        states: tensors that live from call to call.
        observed: a step's decision, which the runtime records: the nodes of "reused" and "difference"; may be empty.
        derived: inputs that follow from others.
        group: the ranks that run the graph together; None where it runs alone.
        sharding: how they split its sequence; None where they don't.
        shared: set where ``sharding`` is.
        weights_content: placeholder of what tells whether the weights hold what they did, an int64 scalar; None where
            no pass has asked for it.
        earlier: what earlier graphs of the model tell of the inputs, where it takes no timestep; None where they don't.
        hosted: by placeholder of what lies on the host, that of the tensor there; of a float8 matrix the same.
        untold: why one generation can't be told from the next, where the graph is a piece of a model.

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
    weights_content: fx.Node | None = None
    earlier: Earlier | None = None
    untold: Declined | None = None
    hosted: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)

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
        """The placeholders that passes have added, in order.

        Derived inputs, weights in float8, those on the host, and what is added late, after the captured graph's own.
        """
        derived = [node for item in self.derived for node in item.placeholders]
        stored = [node for weights in self.stored for node in (weights.data, weights.scale)]
        hosted = [host for node, host in self.hosted.items() if node is not host]
        return [*derived, *stored, *hosted, *self.added_late]

    @property
    def added_late(self) -> list[fx.Node]:
        """The last placeholders: what earlier graphs tell, the weights' content, and state."""
        content = [] if self.weights_content is None else [self.weights_content]
        return [*(self.earlier.added if self.earlier else []), *content, *(state.placeholder for state in self.states)]

    @property
    def output(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    def add_earlier(self, device: torch.device) -> Earlier:
        """Add what earlier graphs tell, ``Earlier.clock``, ``mark`` and ``content``, as placeholders before state."""
        earlier = self.earlier
        assert earlier is not None
        earlier.clock = self._add_placeholder("earlier_clock", (earlier.num_clocks,), torch.float64, device)
        earlier.mark = self._add_placeholder("earlier_sample", (1,), torch.int64, device)
        earlier.content = self._add_placeholder("earlier_content", (1,), torch.int64, device)
        return earlier

    def add_state(
        self, name: str, shape: Iterable[int | torch.SymInt], dtype: torch.dtype, device: torch.device
    ) -> State:
        """Add a state tensor as a placeholder after all others; set ``next_value`` when its node exists."""
        placeholder = self._add_placeholder(f"state_{name}", shape, dtype, device, is_last=True)
        state = State(name=name, placeholder=placeholder, shape=tuple(shape), dtype=dtype, device=device)
        self.states.append(state)
        return state

    def add_weights_content(self, device: torch.device) -> fx.Node:
        """Add a number that differs where the weights' content does, as a placeholder before state.

        The runtime makes it in every call, an int64 scalar, of some elements of each weight that the graph takes.
        """
        assert self.weights_content is None
        self.weights_content = self._add_placeholder("weights_content", (), torch.int64, device)
        return self.weights_content

    def add_derived(
        self,
        names: Sequence[str],
        examples: Sequence[Any],
        *,
        made_by: str,
        module: fx.GraphModule,
        sources: Sequence[fx.Node],
        is_kept: bool = True,
        read: Callable[[Sequence[torch.Tensor]], Sequence[Any] | Declined] | None = None,
    ) -> Derived:
        """Add inputs that ``module`` computes; see ``Derived``.

        Args:
            names: of the placeholders, which stand before those of weights and state.
            examples: a fake value for each.
            made_by: as of ``Derived``.
            module: as of ``Derived``.
            sources: as of ``Derived``.
            is_kept: as of ``Derived``.
            read: as of ``Derived``.

        """
        already = {node for item in self.derived for node in item.placeholders}
        later = set(self.added) - already
        anchor = [node for node in self.graph.find_nodes(op="placeholder") if node not in later][-1]
        placeholders = []
        for name, example in zip(names, examples, strict=True):
            with self.graph.inserting_after(anchor):
                anchor = self.graph.placeholder(name)
            dynamo.mark_as_added(anchor)
            anchor.meta = {TAG: made_by, "example_value": example}
            placeholders.append(anchor)
        derived = Derived(
            made_by=made_by,
            module=module,
            sources=tuple(sources),
            placeholders=tuple(placeholders),
            is_kept=is_kept,
            read=read,
        )
        self.derived.append(derived)
        return derived

    def split_body(self, body: Body, blocks: Sequence[BlockCall], suffix: str, tag: str) -> Body:
        """Give some of a body's blocks a body of their own.

        Args:
            body: that they share with others.
            blocks: that get a body of their own.
            suffix: of its name.
            tag: name of the pass.

        Returns:
            A copy of the body; the body itself where all its blocks are among these.

        """
        if all(block in blocks for block in self.blocks if block.body is body):
            return body
        name, count = f"{body.name}_{suffix}", 0
        while hasattr(self.module, name):
            count += 1
            name = f"{body.name}_{suffix}_{count}"
        copied = Body(name, dynamo.clone_graph_module(body.module), dict(body.streams))
        setattr(self.module, name, copied.module)
        for block in blocks:
            with self.graph.inserting_before(block.call):
                reference = self.graph.get_attr(name)
            reference.meta = {TAG: tag}
            old = block.call.args[0]
            block.call.args = (reference, name, *block.operands)
            block.body = copied
            if isinstance(old, fx.Node) and not old.users:
                self.graph.erase_node(old)
        return copied

    def add_operand(self, body: Body, node: fx.Node) -> fx.Node:
        """Pass one more value to every call of a body; returns its placeholder inside."""
        placeholders, name = list(body.module.graph.find_nodes(op="placeholder")), node.name
        while any(item.target == name for item in placeholders):
            name += "_"
        with body.module.graph.inserting_after(placeholders[-1]):
            placeholder = body.module.graph.placeholder(name)
        placeholder.meta["example_value"] = value(node)
        for block in self.blocks:
            if block.body is body:
                block.call.args = (*block.call.args, node)
        return placeholder

    def drop_operand(self, body: Body, placeholder: fx.Node) -> None:
        """Stop passing a value that a body no longer reads."""
        position = list(body.module.graph.find_nodes(op="placeholder")).index(placeholder)
        body.module.graph.erase_node(placeholder)
        body.streams = {output: operand - (operand > position) for output, operand in body.streams.items()}
        for block in self.blocks:
            if block.body is body:
                args = list(block.call.args)
                del args[2 + position]
                block.call.args = tuple(args)

    def store(
        self, sources: Sequence[fx.Node], name: str, *, granularity: Granularity, keep_original: bool
    ) -> StoredWeights:
        """Add the float8 matrix of some weights ``[N, K]``, stacked, as placeholders after all others.

        Args:
            sources: placeholders of the weights; all have the same K.
            name: of the matrix, from which the placeholders get theirs.
            granularity: "row" for a scale a row, else one for all.
            keep_original: whether the runtime keeps the weights.

        """
        first: torch.Tensor = value(sources[0])
        rows = sum(value(node).shape[0] for node in sources)
        data = self._add_placeholder(f"{name}_float8", (rows, first.shape[1]), float8_format.DTYPE, first.device)
        shape = (rows, 1) if granularity == "row" else ()
        scale = self._add_placeholder(f"{name}_scale", shape, torch.float32, first.device)
        data.meta[STORED] = scale.meta[STORED] = True
        stored = StoredWeights(
            sources=tuple(sources), data=data, scale=scale, granularity=granularity, keep_original=keep_original
        )
        self.stored.append(stored)
        return stored

    def _add_placeholder(
        self,
        name: str,
        shape: Iterable[int | torch.SymInt],
        dtype: torch.dtype,
        device: torch.device,
        is_last: bool = False,
    ) -> fx.Node:
        """Add a placeholder after all others, or before those of state."""
        states = set() if is_last else {state.placeholder for state in self.states}
        placeholders = [node for node in self.graph.find_nodes(op="placeholder") if node not in states]
        with self.graph.inserting_after(placeholders[-1]):
            placeholder = self.graph.placeholder(name)
        if (mode := fakes.fake_mode(self.graph)) is None:
            raise ValueError("the graph has no tensor, so no input can be added to it")
        dynamo.mark_as_added(placeholder)
        placeholder.meta["example_value"] = fakes.fake_like(mode, tuple(shape), dtype, device)
        return placeholder
