"""Explaining a model without running it: the trunk that is found, what each pass would do, and what a step costs.

The model is traced by Dynamo with fake tensors and nothing is computed, so that a model of any size can be explained
where it does not fit: build it under ``torch.device("meta")`` and hand in inputs made there.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.as_captured import OUTLINE
from hvcompile.backend import rewrite
from hvcompile.errors import OptionError, UntraceableModelError
from hvcompile.explanation.listing import Stage, stage
from hvcompile.explanation.memory import Need, needs_of
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.costs import DEVICES, Cost, Device, costs
from hvcompile.graph.nodes import is_tensor, is_weight
from hvcompile.hollow.parameter import HollowParameter
from hvcompile.journal import Declined, JournalRow
from hvcompile.options import Options, parse
from hvcompile.passes import PASSES
from hvcompile.ranks import collectives
from hvcompile.torch_private import dynamo, lowering
from hvcompile.torch_private.fakes import is_data_dependent, num_bytes, size_hint, value
from hvcompile.trunk.observer import CAPTURED, OUTLINED, Observer
from hvcompile.trunk.trunk import BlockCall, Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """A residual stream through a block: its name in the body and its shape, such as ``[batch, tokens, channels]``."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Blocks that share one body: how many, the first and last of them, their operations, and their streams."""

    count: int
    first: str
    last: str
    num_operations: int
    streams: tuple[Stream, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """Blocks of one kind that run one after the other.

    ``kind`` is their place in ``Explanation.kinds``; ``is_skipped`` says that a pass put them into a branch that a
    reused step does not run.
    """

    kind: int
    count: int
    first: str
    last: str
    is_skipped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCost:
    """What one part of a step costs: operations, bytes moved, and seconds at least on a device, if one is named."""

    part: str
    flops: int
    bytes: int
    seconds: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """What hvfast makes of a model.

    Attributes:
        reason: why no trunk was found; empty if one was.
        lists: the module lists of the trunk with their lengths.
        kinds: block kinds in order of first call.
        stretches: the blocks in the order in which they run.
        num_prologue: operations before the first block.
        num_epilogue: operations after the last block.
        journal: what each pass would do, and why not.
        costs: a step that computes everything, by part.
        reused_flops: operations that every step computes: all but those of blocks that a pass put into a branch.
        weight_bytes: of the parameters that the graph reads.
        state_bytes: that the passes keep from step to step, for each generation (or guidance half) that runs.
        derived_bytes: that follow from conditions or weights alone and are kept as long as these are.
        staging_bytes: sent and received at most by one collective, where ranks share the work.
        passed_seconds, reused_seconds: the least time on the device after the passes, of a step that computes
            everything and of one that reuses, without communication.
        reused_bytes: moved by a step that reuses.
        dtype: that most products compute in.
        device: whose peaks bound the seconds; empty if none was named.
        depends_on_data: whether some length is known only when the model runs (text without its padding, say); such a
            length counts as the most that it can be, or as 1 where nothing bounds it.
        needs: what memory the model needs on the device, for each way to run it; empty where there is no trunk.
        stages: the program as it was captured and after each rewrite, as text.

    """

    reason: str
    lists: str
    kinds: tuple[BlockKind, ...]
    stretches: tuple[Stretch, ...]
    num_prologue: int
    num_epilogue: int
    journal: tuple[JournalRow, ...]
    costs: tuple[PartCost, ...]
    reused_flops: int
    weight_bytes: int
    state_bytes: int
    dtype: str
    device: str
    depends_on_data: bool
    stages: tuple[Stage, ...] = dataclasses.field(repr=False)
    derived_bytes: int = 0
    staging_bytes: int = 0
    passed_seconds: float | None = None
    reused_seconds: float | None = None
    reused_bytes: int | None = None
    needs: tuple[Need, ...] = ()

    @property
    def flops(self) -> int:
        """Operations of a computed step."""
        return sum(part.flops for part in self.costs)

    @property
    def seconds(self) -> float | None:
        """The least time of a computed step on the device that was named: a bound, not a forecast."""
        known = [part.seconds for part in self.costs if part.seconds is not None]
        return sum(known) if known else None


class _CaptureDoneError(Exception):
    """Ends a traced call once its graph is in hand."""


def capture(model: torch.nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Trace one call of a model as one graph, computing nothing.

    Raises:
        UntraceableModelError: Dynamo can't keep the call in one graph.

    """
    return _capture(model, args, kwargs)[0]


def _capture(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, Sequence[Any]]:
    """The graph of a call, and the graph's inputs."""
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def keep(module: fx.GraphModule, inputs: Any) -> Any:
        graphs.append((dynamo.clone_graph_module(module), list(inputs)))

        def stop(*_: Any) -> None:
            raise _CaptureDoneError

        return stop

    def call(model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return model.forward(*args, **kwargs)

    # Dynamo keeps what it compiled with the code object, so a fresh one leaves no trace in the model's own.
    fresh = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    try:
        with torch.no_grad(), dynamo.autocast_on_meta():
            torch.compile(fresh, backend=keep, fullgraph=True, dynamic=False)(model, args, kwargs)
    except _CaptureDoneError:
        return graphs[-1]
    except dynamo.UNTRACEABLE as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UntraceableModelError(
            f"{type(model).__name__} does not trace as one graph: {line}. torch.compile with fullgraph=True on the "
            "same call says where it breaks. Without it, hvfast rewrites the piece that holds the blocks; "
            "hvcompile.stats(model).journal then says what it did with each piece"
        ) from error
    raise UntraceableModelError(f"the call of {type(model).__name__} computes nothing, so there is no graph")


def explain(
    model: torch.nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    device: Device | str | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say what hvfast would do with a call of a model, and what the call costs; nothing is computed.

    Args:
        model: the module; on the meta device if it should take no memory.
        args: of the call, on the model's device.
        options: as for ``torch.compile``; a pass that is asked for and can't apply is told of, not raised.
        mode: as for ``torch.compile``.
        device: whose peaks bound the step time, or its key in ``graph.costs.DEVICES``, as "h100"; None for no bound.
        kwargs: of the call.

    Raises:
        OptionError: ``options``, ``mode`` or ``device`` is invalid.
        QuantizedWeightError: the model's weights are in float8 alone already, and such options could not compile it.
        UntraceableModelError: Dynamo can't keep the call in one graph.

    """
    settings = parse(PASSES, options, mode)  # before the trace, which can take half a minute
    if device is not None and not isinstance(device, Device):
        if device not in DEVICES:
            raise OptionError(
                f"device {device!r} is unknown: give one of {', '.join(DEVICES)}, or a graph.costs.Device"
            )
        device = DEVICES[device]
    graph, inputs = _capture(model, args, kwargs)
    with torch.no_grad():  # as it was captured
        return explain_graph(graph, inputs, settings, device)


def explain_graph(
    captured: fx.GraphModule, inputs: Sequence[Any], settings: Options, device: Device | None = None
) -> Explanation:
    """Say what hvfast would do with a graph captured by Dynamo, which is not changed; see ``explain``.

    ``inputs`` are the graph's, from which weights are known that are in float8 alone already, or on
    the host.
    """
    witness, journal = _Witness(captured), list[JournalRow]()
    freed = {place: item for place, item in enumerate(inputs) if isinstance(item, HollowParameter)}
    # A pass that was asked for and can't apply is told of, not raised.
    optional = dataclasses.replace(settings, passes=tuple((item, False) for item, _ in settings.passes))
    trunk = rewrite(captured, optional, journal, witness, known_args=freed, planned_for=device)
    common = _common(captured, inputs, device)
    if isinstance(trunk, Declined):
        return _explain_captured(trunk.reason, captured, common)
    computed, reused = _after(trunk)
    state_bytes = sum(num_bytes(value(state.placeholder)) for state in trunk.states)
    return Explanation(
        reason="",
        lists=trunk.lists,
        kinds=witness.kinds,
        stretches=tuple(_stretches(trunk, witness.kind_of)),
        num_prologue=witness.num_prologue,
        num_epilogue=witness.num_epilogue,
        journal=tuple(row for row in journal if row.name != OUTLINE),
        reused_flops=sum(cost.flops for cost in costs(trunk.graph))
        + sum(witness.flops_of[block] for block in trunk.blocks if block.call.graph is trunk.graph),
        state_bytes=state_bytes,
        needs=tuple(dataclasses.replace(item, state_bytes=state_bytes) for item in witness.needs),
        stages=tuple(witness.stages),
        derived_bytes=sum(
            num_bytes(value(node)) for item in trunk.derived for node in item.placeholders if is_tensor(node)
        ),
        staging_bytes=_staging_bytes(trunk),
        passed_seconds=sum(cost.seconds(device) for cost in computed) if device is not None else None,
        reused_seconds=sum(cost.seconds(device) for cost in reused) if device is not None else None,
        reused_bytes=sum(cost.bytes for cost in reused),
        **common,
    )


class _Witness(Observer):
    """Keeps each stage as text, and of the outlined trunk what the passes go on to change."""

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured
        self.stages: list[Stage] = []
        self.kinds: tuple[BlockKind, ...] = ()
        self.kind_of: dict[BlockCall, int] = {}
        self.flops_of: dict[BlockCall, int] = {}
        self.num_prologue = self.num_epilogue = 0
        self.needs: tuple[Need, ...] = ()

    def on_stage(self, name: str, module: fx.GraphModule, trunk: Trunk | None) -> None:
        """Keep a stage's text; the captured graph's once the blocks in it are known."""
        if trunk is None:
            return
        if name != OUTLINED:
            self.stages.append(stage(name, module))
            return
        self.stages = [
            stage(CAPTURED, self._captured, [block.path for block in trunk.blocks]),
            stage(OUTLINE, module),
        ]
        self.kinds = tuple(_kind(trunk, number) for number in range(len(trunk.bodies)))
        self.kind_of = {block: trunk.bodies.index(block.body) for block in trunk.blocks}
        flops_of_body = {body: sum(cost.flops for cost in costs(body.module.graph)) for body in trunk.bodies}
        self.flops_of = {block: flops_of_body[block.body] for block in trunk.blocks}
        self.num_prologue, self.num_epilogue = _around(trunk)
        self.needs = needs_of(trunk)


def _common(captured: fx.GraphModule, inputs: Sequence[Any], device: Device | None) -> dict[str, Any]:
    """What an explanation says of the captured graph, whether it has a trunk or not."""
    spent = costs(captured.graph)
    return {
        "costs": tuple(_total(part, spent, device) for part in dict.fromkeys(cost.part for cost in spent)),
        "weight_bytes": _weight_bytes(captured.graph, inputs),
        "depends_on_data": any(is_data_dependent(value(node)) for node in captured.graph.nodes if is_tensor(node)),
        "dtype": str(spent[-1].dtype).removeprefix("torch."),
        "device": device.name if device is not None else "",
    }


def _explain_captured(reason: str, captured: fx.GraphModule, common: Mapping[str, Any]) -> Explanation:
    """The explanation of a graph that stays as it is."""
    return Explanation(
        reason=reason,
        lists="",
        kinds=(),
        stretches=(),
        num_prologue=0,
        num_epilogue=0,
        journal=(),
        reused_flops=sum(part.flops for part in common["costs"]),
        state_bytes=0,
        stages=(stage(CAPTURED, captured),),
        **common,
    )


def _after(trunk: Trunk) -> tuple[list[Cost], list[Cost]]:
    """What is left to do after the passes: in a step that computes everything, and in one that reuses."""
    of_body = {body: costs(body.module.graph) for body in trunk.bodies}
    always = costs(trunk.graph)
    computed, reused = list(always), list(always)
    for block in trunk.blocks:
        computed += of_body[block.body]
        if block.call.graph is trunk.graph:
            reused += of_body[block.body]
    computing = {block.call.graph for block in trunk.blocks}
    for call in trunk.graph.find_nodes(op="call_function", target=lowering.COND):
        for reference in call.args[1:3]:
            branch = getattr(trunk.module, reference.target).graph
            (computed if branch in computing else reused).extend(costs(branch))
    return computed, reused


def _staging_bytes(trunk: Trunk) -> int:
    """Of the largest collective, what a rank sends from and receives into; they run one after the other."""
    graphs = [module.graph for module in trunk.module.modules() if isinstance(module, fx.GraphModule)]
    moving = [
        node
        for graph in graphs
        for node in graph.nodes
        if node.op == "call_function"
        and getattr(node.target, "__module__", "") == collectives.__name__
        and is_tensor(node)
    ]
    sizes = [
        sum(num_bytes(value(item)) for item in (node, *filter(is_tensor, node.all_input_nodes))) for node in moving
    ]
    return max(sizes, default=0)


def _total(part: str, spent: list[Cost], device: Device | None) -> PartCost:
    members = [cost for cost in spent if cost.part == part]
    return PartCost(
        part=part,
        flops=sum(cost.flops for cost in members),
        bytes=sum(cost.bytes for cost in members),
        seconds=sum(cost.seconds(device) for cost in members) if device is not None else None,
    )


def _weight_bytes(graph: fx.Graph, inputs: Sequence[Any]) -> int:
    placeholders = graph.find_nodes(op="placeholder")
    weights = {node for node in placeholders if is_tensor(node) and is_weight(node)}
    freed = [held for held in inputs if isinstance(held, QuantizedWeight)]
    weights -= {node for node, held in zip(placeholders, inputs, strict=False) if isinstance(held, QuantizedWeight)}
    joined = {id(held.joined): held.joined.num_bytes for held in freed}
    kept: int = sum(num_bytes(value(node)) for node in weights)
    return kept + sum(joined.values())


def _kind(trunk: Trunk, number: int) -> BlockKind:
    body = trunk.bodies[number]
    members = [block for block in trunk.blocks if block.body is body]
    placeholders = list(body.module.graph.find_nodes(op="placeholder"))
    streams = [placeholders[place] for place in dict.fromkeys(body.streams.values())]
    operations = [node for node in body.module.graph.nodes if node.op in {"call_function", "call_method"}]
    return BlockKind(
        count=len(members),
        first=members[0].path,
        last=members[-1].path,
        num_operations=len(operations),
        streams=tuple(
            Stream(name=node.name, shape=tuple(size_hint(size) for size in value(node).shape)) for node in streams
        ),
    )


def _stretches(trunk: Trunk, kinds: Mapping[BlockCall, int]) -> Iterator[Stretch]:
    """Group the blocks as they run, after the passes, which may have given some of a kind bodies of their own."""

    def group(block: BlockCall) -> tuple[int, bool]:
        return kinds[block], block.call.graph is not trunk.graph

    for (kind, is_skipped), members in itertools.groupby(trunk.blocks, group):
        blocks = list(members)
        yield Stretch(kind=kind, count=len(blocks), first=blocks[0].path, last=blocks[-1].path, is_skipped=is_skipped)


def _around(trunk: Trunk) -> tuple[int, int]:
    """Count the operations before the first block and after the last."""
    nodes = [node for node in trunk.graph.nodes if node.op in {"call_function", "call_method"}]
    first, last = nodes.index(trunk.blocks[0].call), nodes.index(trunk.blocks[-1].call)
    return first, len(nodes) - last - 1
