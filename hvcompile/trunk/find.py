"""Finding the repeated blocks of a captured graph, from ``nn_module_stack`` and data flow alone.

Dynamo records for every compute node the modules that it was traced in. A path with an index in it, such as
``transformer_blocks.3.attn.to_q``, places the node in a member of a module list. The members of one list, run one
after the other, are candidates for the trunk. Small lists (embedders, refiners, adapters) are candidates too, so the
trunk is the chain of lists that does the most arithmetic. A list joins the chain of the list before it only if the
tokens that enter it are exactly the tokens that left the other.

No class name and no module name is looked at; names serve only to tell one module from another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import fx

from hvcompile.graph.flops import FlopCounter
from hvcompile.graph.nodes import is_scalar, is_tensor, op_name
from hvcompile.graph.paths import module_path
from hvcompile.journal import Declined
from hvcompile.torch_private.fakes import numel_hint, shape_key, value

# Lists may take turns. If the members of one do together less than this share of the arithmetic of the largest of
# these, they are work between the blocks (an adapter, a projection), not blocks.
MINOR_LIST_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of one member of a module list: which list, which member, and which call of it."""

    list_path: tuple[str, ...]
    index: int
    call: str

    @property
    def path(self) -> str:
        """The member's dotted path in the model, such as ``transformer_blocks.3``."""
        return ".".join((*self.list_path, str(self.index)))


@dataclasses.dataclass(eq=False)
class Block:
    """The nodes of one call of one list member, in graph order."""

    owner: ModuleCall
    nodes: list[fx.Node]

    @property
    def path(self) -> str:
        """The member's dotted path."""
        return self.owner.path


def owner_of(node: fx.Node, depth: int) -> ModuleCall | None:
    """The list member that a node was traced in, at the ``depth``-th index of its module path; None if in no list."""
    for call, (expression, _) in (node.meta.get("nn_module_stack") or {}).items():
        path = module_path(str(expression))
        indices = [position for position, part in enumerate(path) if part.isdigit()]
        if len(indices) > depth and indices[depth] == len(path) - 1:
            return ModuleCall(list_path=path[:-1], index=int(path[-1]), call=str(call))
    return None


def find_blocks(graph: fx.Graph, depth: int) -> list[Block]:
    """All calls of list members in graph order, where the list is at the ``depth``-th index of the module path.

    Arithmetic on sizes that are known outside the blocks belongs to no block. Dynamo traces it in the first block that
    needs it, and later blocks read the result.
    """
    blocks: dict[ModuleCall, Block] = {}
    sizes: set[fx.Node] = {node for node in graph.find_nodes(op="placeholder") if is_scalar(node)}
    for node in graph.nodes:
        if node.op in {"placeholder", "get_attr", "output"}:
            continue
        if is_scalar(node) and sizes.issuperset(node.all_input_nodes):
            sizes.add(node)
            continue
        owner = owner_of(node, depth)
        if owner is None and is_scalar(node):
            sizes.add(node)
        elif owner is not None:
            blocks.setdefault(owner, Block(owner, [])).nodes.append(node)
    return list(blocks.values())


@dataclasses.dataclass
class _ListRun:
    """Consecutive blocks of one or more lists that take turns."""

    blocks: list[Block]

    def span(self, places: dict[fx.Node, int]) -> tuple[int, int]:
        return places[self.blocks[0].nodes[0]], max(places[block.nodes[-1]] for block in self.blocks)

    def arithmetic(self, counter: FlopCounter) -> int:
        return sum(counter.arithmetic(node) for block in self.blocks for node in block.nodes)


def _runs(graph: fx.Graph, blocks: Sequence[Block], counter: FlopCounter) -> list[_ListRun]:
    """Group blocks by list, merge lists whose members take turns, and drop the minor ones of those."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    by_list: dict[tuple[str, ...], _ListRun] = {}
    for block in blocks:
        by_list.setdefault(block.owner.list_path, _ListRun([])).blocks.append(block)

    merged: list[list[_ListRun]] = []
    end = -1
    for run in sorted(by_list.values(), key=lambda run: run.span(places)[0]):
        first, last = run.span(places)
        if merged and first < end:
            merged[-1].append(run)
        else:
            merged.append([run])
        end = max(end, last)

    result = []
    for lists in merged:
        largest = max(run.arithmetic(counter) for run in lists)
        kept = [run for run in lists if run.arithmetic(counter) >= MINOR_LIST_SHARE * largest]
        members = [block for run in kept for block in run.blocks]
        result.append(_ListRun(sorted(members, key=lambda block: places[block.nodes[0]])))
    return result


def entering(block: Block) -> list[fx.Node]:
    """The nodes outside the block that it reads, in order of first use."""
    inside = set(block.nodes)
    operands = dict.fromkeys(operand for node in block.nodes for operand in node.all_input_nodes)
    return [operand for operand in operands if operand not in inside]


def leaving(block: Block) -> list[fx.Node]:
    """The block's nodes that are read outside it, in graph order."""
    inside = set(block.nodes)
    return [node for node in block.nodes if any(user not in inside for user in node.users)]


def _continues(earlier: _ListRun, later: _ListRun, owners: dict[fx.Node, Block]) -> bool:
    """Whether the tokens that ``later`` works on are the tokens that left ``earlier``, no more and no fewer.

    Walks back from the first block of ``later``, through work that is in no block, to the blocks that it came from. A
    list that supplies one of several streams (a text refiner) supplies fewer tokens than the first block passes on.
    """
    last, members = earlier.blocks[-1], set(map(id, earlier.blocks))
    tokens_in = tokens_out = 0
    streams: set[tuple[str, ...]] = set()
    counted: set[fx.Node] = set()
    for operand in entering(later.blocks[0]):
        leaves: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack = [operand]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in owners:
                leaves.add(node)
            else:
                stack.extend(node.all_input_nodes)
        if not leaves or not is_tensor(operand):
            continue
        if any(id(owners[leaf]) not in members for leaf in leaves):
            if any(owners[leaf] is last for leaf in leaves):
                return False  # tokens of another list join here: that list is not part of this chain
            continue
        if not any(owners[leaf] is last for leaf in leaves):
            continue
        tokens_in += numel_hint(value(operand))
        streams.add(shape_key(value(operand)))
        for leaf in leaves - counted:
            if owners[leaf] is last and is_tensor(leaf):
                tokens_out += numel_hint(value(leaf))
        counted |= leaves
    results = [value(node) for node in leaving(later.blocks[0]) if is_tensor(node)]
    if not {shape_key(result) for result in results} & streams:
        return False  # a head or a projection: it changes the shape of its input
    return 0 < sum(map(numel_hint, results)) <= tokens_in == tokens_out


def _has_repeats(run: _ListRun) -> bool:
    programs = [tuple(op_name(node) for node in block.nodes) for block in run.blocks]
    return len(set(programs)) < len(programs)


def find_trunk(graph: fx.Graph) -> list[Block] | Declined:
    """The trunk's blocks in order of execution, or why there are none.

    Looks at the outermost index of each module path first, and deeper only if no list there has two blocks: the model
    may itself be in a list.
    """
    counter = FlopCounter()
    for depth in range(3):
        runs = _runs(graph, find_blocks(graph, depth), counter)
        owners = {node: block for run in runs for block in run.blocks for node in block.nodes}
        chains: list[list[_ListRun]] = []
        for run in runs:
            if chains and _continues(chains[-1][-1], run, owners):
                chains[-1].append(run)
            else:
                chains.append([run])
        candidates = [chain for chain in chains if sum(len(run.blocks) for run in chain) > 1]
        if depth:  # a block contains lists too, such as the layers of its MLP; only alike members are blocks
            candidates = [chain for chain in candidates if any(map(_has_repeats, chain))]
        if candidates:
            best = max(candidates, key=lambda chain: sum(run.arithmetic(counter) for run in chain))
            return [block for run in best for block in run.blocks]
    return Declined(
        "no module list with two or more members is called in this graph"
        " (if Dynamo broke the model into several graphs, fullgraph=True keeps it whole or says where it breaks)"
    )


def describe_lists(blocks: Iterable[Block]) -> str:
    """The trunk's lists with their lengths, such as ``transformer_blocks x 20, single_transformer_blocks x 40``."""
    counts: dict[str, int] = {}
    for block in blocks:
        name = ".".join(block.owner.list_path)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} x {count}" for name, count in counts.items())
