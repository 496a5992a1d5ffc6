"""Skipping blocks 2..N, or all: what moves into a branch, what leaves it, and what stands in for that on a skip."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Sequence

from torch import fx

from hvcompile.graph.inline import run_on_fakes
from hvcompile.graph.nodes import (
    ancestors,
    contexts,
    descendants,
    is_context_switch,
    is_scalar,
    is_size,
    is_tensor,
    is_weight,
    mutated_operand,
    op_name,
    reached_from,
    storage,
    tensor_kind,
    writers,
)
from hvcompile.journal import Declined
from hvcompile.torch_private.dynamo import source_name
from hvcompile.torch_private.fakes import is_data_dependent, numel_hint, provenance, value
from hvcompile.trunk.branch import is_submodule
from hvcompile.trunk.operands import as_operands, symbolic_sizes
from hvcompile.trunk.roles import SINUSOIDS, InputRoles, classify
from hvcompile.trunk.streams import is_residual
from hvcompile.trunk.trunk import BlockCall, Trunk

# Operations that only rearrange or cast tokens; replayed on block 1's outputs to find what a skipped trunk hands on.
_REARRANGING = {
    *("getitem", "cat", "concat", "chunk", "split", "reshape", "view", "flatten", "unflatten", "contiguous", "to"),
    *("transpose", "permute", "squeeze", "unsqueeze", "clone", "narrow", "unbind", "stack"),
    *("type", "type_as", "float", "double", "half", "bfloat16"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipPlan:
    """What moves into the branch, what it hands on, and the inputs by which the graph follows a generation.

    On several ranks the latter are what stands for the inputs: the first rank's. Of the first ``front_blocks``, 1 or 0,
    which run in every step, ``stream_in`` and ``stream_out`` are the stream that carries the sample, before and after;
    the latter is None where there is no such block.
    """

    first: BlockCall
    front_blocks: int
    stream_in: fx.Node
    stream_out: fx.Node | None
    moved: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]
    sample: fx.Node
    clocks: tuple[fx.Node, ...]


def plan_skip(trunk: Trunk, front_blocks: int = 1) -> SkipPlan | Declined:
    """Match the trunk, or say why it can't be cached; of its blocks, the first one or none runs in every step."""
    if trunk.is_branched:
        return Declined("the blocks already stand in a branch")
    if len(trunk.blocks) < 2:
        return Declined("a trunk of one block has nothing to skip")
    first, calls = trunk.blocks[0], [block.call for block in trunk.blocks[front_blocks:]]
    after, needed = descendants(calls), ancestors(calls)
    if first.call in descendants(block.call for block in trunk.blocks[1:]):
        return Declined(f"{first.path} reads the result of a later block")
    core = set(calls) | (after & needed)
    # What leaves of a tuple are its parts, also those that no block reads.
    core |= {user for node in core if not is_tensor(node) for user in node.users if user.target is operator.getitem}
    leaving = [node for node in trunk.graph.nodes if node in core and any(user not in core for user in node.users)]
    unkept = _why_not_kept(leaving)
    if unkept is not None:
        return unkept
    roles = classify(trunk)
    unclear = why_unclear(trunk, roles)
    if unclear is not None:
        return unclear
    assert roles.sample is not None
    stream = _main_stream(trunk, roles.sample)
    if isinstance(stream, Declined):
        return stream
    # By its sinusoids a timestep is known also when the trunk is rewritten: they stay where they are.
    timed = descendants(roles.clocks) - core
    outside = {node for node in timed if op_name(node) in SINUSOIDS}
    if front_blocks:
        outside |= {first.call, *first.outputs.values()}
    for node in leaving:
        if not _reaches_back(trunk, node, core, outside):
            return Declined(f"{node.name} leaves the blocks and continues no stream of {first.path}")
    moved = _with_private_work(trunk.graph, core, outside)
    within = contexts(trunk.graph)
    if len({within[node] for node in moved}) > 1:
        return Declined("some of the blocks, but not all, stand in an autocast region")
    parts = _parts_of_one(moved)
    if parts is not None:
        return parts
    for node in moved:
        if is_context_switch(node) or mutated_operand(node) is not None:
            return Declined(f"between the blocks stands {node.format_node()}, which acts on what is outside them")
    stands_for = trunk.shared.nodes if trunk.shared is not None else {}
    return SkipPlan(
        first=first,
        front_blocks=front_blocks,
        stream_in=stream[0],
        stream_out=stream[1] if front_blocks else None,
        moved=moved,
        leaving=tuple(leaving),
        sample=stands_for.get(roles.sample, roles.sample),
        clocks=tuple(stands_for.get(clock, clock) for clock in roles.clocks),
    )


def _why_not_kept(leaving: Sequence[fx.Node]) -> Declined | None:
    """Why what leaves the blocks can't be kept from step to step; None where it can."""
    if not leaving:
        return Declined("nothing that the blocks compute is read after them")
    if any(not is_tensor(node) for node in leaving):
        return Declined(
            f"{next(node for node in leaving if not is_tensor(node)).name} leaves the blocks and is no tensor"
        )
    if any(is_data_dependent(value(node)) for node in leaving):
        return Declined("what leaves the blocks has a length that depends on data, so no state can be made for it")
    return None


def why_unclear(trunk: Trunk, roles: InputRoles) -> Declined | None:
    """Why one generation can't be told from the next by the inputs; None where it can."""
    if not roles.weights:
        return Declined("the graph takes no parameters as inputs, so its state can't be tied to a model")
    if trunk.untold is not None:
        return trunk.untold
    if roles.sample is None:
        return Declined(
            "no input has the rank of the output, so the sample that is denoised can't be told from its conditions"
        )
    if roles.python_time is not None:
        return Declined(f"{roles.python_time} is a Python number; pass the timestep as a tensor")
    if not roles.clocks and trunk.earlier is None:
        return Declined("no input is a timestep, so one generation can't be told from the next")
    return None


def _parts_of_one(moved: Sequence[fx.Node]) -> Declined | None:
    """Why weights can't be operands of the branch, which may not share memory; copies in every step are too dear."""
    core, seen = set(moved), dict[Hashable, fx.Node]()
    for node in moved:
        for item in node.all_input_nodes:
            if item in core or not is_tensor(item) or not is_weight(item):
                continue
            other = seen.setdefault(storage(item), item)
            if other is not item:
                paths = " and ".join(source_name(weight) or weight.name for weight in (other, item))
                return Declined(f"{paths} are parts of one tensor, and the operands of a branch may not share memory")
    return None


def _main_stream(trunk: Trunk, sample: fx.Node) -> tuple[fx.Node, fx.Node] | Declined:
    """Block 1's input and output of the residual stream that carries the sample; of several, the largest."""
    first, reached = trunk.blocks[0], reached_from(trunk.graph, {sample: 0})
    streams = [item for item in first.body.streams.items() if is_residual(first.body, item[0])]
    pairs = [(first.operands[source], first.outputs.get(output)) for output, source in streams]
    found = [(entered, left) for entered, left in pairs if left is not None]
    found.sort(key=lambda pair: (bool(reached[pair[0]]), numel_hint(value(pair[0]))))
    if not found:
        return Declined(f"no output of {first.path} is one of its inputs plus something, so it has no residual")
    if not reached[found[-1][0]]:
        return Declined(
            f"{first.path} continues nothing that follows from the sample, so it can't tell how that changed"
        )
    return found[-1]


def _rewritten_source(trunk: Trunk, node: fx.Node) -> fx.Node | None:
    """For a block's output: the operand of which it is the next version; None for any other node."""
    for block in trunk.blocks:
        if node.target is operator.getitem and node.args[0] is block.call:
            source = block.body.streams.get(node.args[1])  # type: ignore[arg-type]
            return None if source is None else block.operands[source]
    return None


def _with_private_work(graph: fx.Graph, core: set[fx.Node], outside: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The core in graph order, with the work before it whose results only it reads."""
    private: set[fx.Node] = set()
    within = contexts(graph)
    context = within[next(node for node in graph.nodes if node in core)]
    written = writers(graph).keys()
    for node in reversed(graph.nodes):
        is_work = node.op in {"call_function", "call_method"} and not is_scalar(node) and node not in core | outside
        is_work = is_work and within[node] == context
        is_work = is_work and written.isdisjoint(storage(item) for item in (node, *node.all_input_nodes))
        if is_work and node.users and (core | private).issuperset(node.users):
            private.add(node)
    # A part of a tuple stays with the tuple, which can't be handed into a branch; what reads a float, with the float.
    for node in graph.nodes:
        operands = [item for item in node.all_input_nodes if item not in private and item.op != "get_attr"]
        if node in private and not all(is_tensor(item) or is_size(item) for item in operands):
            private.remove(node)
    return tuple(node for node in graph.nodes if node in core or node in private)


def operands_of_branches(
    trunk: Trunk, plan: SkipPlan, streams: Sequence[fx.Node], before: fx.Node, tag: str
) -> dict[fx.Node, fx.Node]:
    """What to pass to both branches for each node of the outer graph that one of them reads, these streams too."""
    core = set(plan.moved)
    external = [item for node in plan.moved for item in node.all_input_nodes if item not in core]
    wanted = [*symbolic_sizes(trunk.graph, before=plan.first.call)]
    wanted += [node for node in external if not is_submodule(node)]
    wanted += streams
    with trunk.graph.inserting_before(before):
        results = [output for block in trunk.blocks for output in block.outputs.values()]
        return as_operands(trunk.graph, wanted, tag, ready=results)


def counterparts_of(trunk: Trunk, plan: SkipPlan, before: fx.Node, tag: str) -> list[fx.Node]:
    """For each value that leaves, what it would be if the blocks that are skipped handed their streams on unchanged."""
    made: dict[fx.Node, fx.Node] = {}
    return [_counterpart(trunk, node, set(plan.moved), before, made, tag) for node in plan.leaving]


def _reaches_back(trunk: Trunk, node: fx.Node, core: set[fx.Node], outside: set[fx.Node]) -> bool:
    """Whether a value has a counterpart where blocks 2..N hand their streams on unchanged.

    Adds to ``outside`` the nodes that the counterpart is made of.
    """
    if node not in core:
        outside.add(node)
        return True
    source = _rewritten_source(trunk, node)
    if source is not None:
        return _reaches_back(trunk, source, core, outside)
    if op_name(node) == "invoke_subgraph":
        return False
    if op_name(node) in _REARRANGING:
        return all(_reaches_back(trunk, item, core, outside) for item in node.all_input_nodes)
    return any(_reaches_back(trunk, item, core, outside) for item in _alike(node))


def _alike(node: fx.Node) -> list[fx.Node]:
    """The operands of work between the blocks that are tensors like its result: the streams that it changes."""
    if not is_tensor(node):
        return []
    return [item for item in node.all_input_nodes if is_tensor(item) and tensor_kind(item) == tensor_kind(node)]


def _counterpart(
    trunk: Trunk, node: fx.Node, core: set[fx.Node], before: fx.Node, made: dict[fx.Node, fx.Node], tag: str
) -> fx.Node:
    """Build the value that a node would have if blocks 2..N handed their streams on unchanged."""
    if node not in core or node in made:
        return made.get(node, node)
    source = _rewritten_source(trunk, node)
    if source is None and op_name(node) not in _REARRANGING:
        source = next(item for item in _alike(node) if _reaches_back(trunk, item, core, set()))
    if source is not None:
        made[node] = _counterpart(trunk, source, core, before, made, tag)
        return made[node]
    replaced = {item: _counterpart(trunk, item, core, before, made, tag) for item in node.all_input_nodes}
    with trunk.graph.inserting_before(before):
        copied = trunk.graph.node_copy(node, lambda item: replaced[item])
    copied.meta = provenance(node, tag, run_on_fakes(copied))  # not the node's own value: this one may be a view
    made[node] = copied
    return copied
