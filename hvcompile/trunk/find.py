"""Finding the repeated blocks of a captured graph, from ``nn_module_stack`` and data flow alone.

Dynamo records for every compute node the modules that it was traced in. A path with an index in it, such as
``transformer_blocks.3.attn.to_q``, places the node in a member of a module list. The members of one list, run one
after the other, are candidates for the trunk if they do what blocks do: a value that enters one comes out in the same
shape, and feeds the next. Small lists (embedders, refiners, adapters) may do so too. The trunk is the chain of lists
that does the most arithmetic, and more than any single member of a list beside it. A list joins the chain of the list
before it only if the tokens that enter it are exactly the tokens that left the other.

No class name and no module name is looked at; names serve only to tell one module from another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from hvcompile.graph.flops import FlopCounter
from hvcompile.graph.nodes import is_scalar, is_tensor, is_weight, op_name
from hvcompile.graph.paths import module_path
from hvcompile.journal import Declined
from hvcompile.torch_private.fakes import numel_hint, shape_key, value

# Lists may take turns. If the members of one do together less than this share of the arithmetic of the largest of
# these, they are work between the blocks (an adapter, a projection), not blocks.
MINOR_LIST_SHARE = 0.1

# Operations through which a residual stream leaves a block: what adds to it, and what moves or casts it.
_ADDING = {"add", "iadd", "sub", "isub"}
_RESIDUAL = _ADDING | {
    *("to", "type_as", "type", "float", "half", "bfloat16", "clone", "contiguous", "dropout", "where", "cat", "concat"),
    *("getitem", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "narrow", "permute", "transpose"),
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"),
}


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
        # An embedder that is called for every block adds to no stream.
        adding = [run for run in lists if any(map(_is_residual, run.blocks))] or lists
        largest = max(run.arithmetic(counter) for run in adding)
        kept = [run for run in adding if run.arithmetic(counter) >= MINOR_LIST_SHARE * largest]
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
    return len(set(map(_program, run.blocks))) < len(run.blocks)


def _program(block: Block) -> tuple[str, ...]:
    return tuple(map(op_name, block.nodes))


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """A tensor's shape, in which any symbolic size is like any other: one length has many expressions."""
    return tuple(size if isinstance(size, int) else None for size in value(node).shape)


def _carried(block: Block) -> set[tuple[Any, ...]]:
    """The shapes of the values that enter a block and come out again."""
    entered = {_shape(node) for node in entering(block) if is_tensor(node) and not is_weight(node)}
    return entered & {_shape(node) for node in leaving(block) if is_tensor(node)}


def _is_residual(block: Block) -> bool:
    """Whether something that leaves a block is what entered it plus something."""
    inside = set(block.nodes)
    stack = [(node, False) for node in leaving(block)]
    seen: set[tuple[fx.Node, bool]] = set()
    while stack:
        node, is_added = item = stack.pop()
        if node not in inside:
            if is_added and is_tensor(node) and not is_weight(node):
                return True
        elif item not in seen and op_name(node).rstrip("_") in _RESIDUAL:
            added = is_added or op_name(node).rstrip("_") in _ADDING
            stack.extend((source, added) for source in node.all_input_nodes)
        seen.add(item)
    return False


def _feeds(earlier: Block, later: Block, owners: dict[fx.Node, Block]) -> bool:
    """Whether what ``earlier`` carries becomes, through work in no block at most, what ``later`` carries."""
    carried = _carried(earlier)
    sources = {node for node in leaving(earlier) if is_tensor(node) and _shape(node) in carried}
    wanted = _carried(later)
    stack = [node for node in entering(later) if is_tensor(node) and _shape(node) in wanted]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in sources:
            return True
        if node not in seen and node not in owners:
            stack.extend(node.all_input_nodes)
        seen.add(node)
    return False


@dataclasses.dataclass(frozen=True)
class _Chain:
    """Lists whose members run one after the other on the same tokens."""

    runs: list[_ListRun]
    arithmetic: int

    @property
    def blocks(self) -> list[Block]:
        return [block for run in self.runs for block in run.blocks]

    def has_stream(self, owners: dict[fx.Node, Block]) -> bool:
        """Whether a value runs through two of the blocks, one after the other, that are alike or add to it."""
        for pair in itertools.pairwise(self.blocks):
            programs = {_program(block) for block in pair}
            if (len(programs) == 1 or all(map(_is_residual, pair))) and _feeds(*pair, owners):
                return True
        return False


def _chains(graph: fx.Graph, depth: int, counter: FlopCounter) -> tuple[list[_Chain], list[_Chain]]:
    """The chains of lists at the ``depth``-th index of the module path; and of those, which may be the trunk."""
    runs = _runs(graph, find_blocks(graph, depth), counter)
    owners = {node: block for run in runs for block in run.blocks for node in block.nodes}
    grouped: list[list[_ListRun]] = []
    for run in runs:
        before = grouped[-1][-1] if grouped else None
        if before is not None and _is_residual(before.blocks[-1]) and _continues(before, run, owners):
            grouped[-1].append(run)
        else:
            grouped.append([run])
    chains = [_Chain(runs, sum(run.arithmetic(counter) for run in runs)) for runs in grouped]
    candidates = [chain for chain in chains if len(chain.blocks) > 1 and chain.has_stream(owners)]
    if depth:  # a block contains lists too, such as the layers of its MLP; only alike members are blocks
        candidates = [chain for chain in candidates if any(map(_has_repeats, chain.runs))]
    return chains, candidates


def find_trunk(graph: fx.Graph) -> list[Block] | Declined:
    """The trunk's blocks in order of execution, or why there are none.

    Lists at every index of the module paths compete, since the model may itself be in a list. A list inside the members
    of another does less arithmetic than these, so it is taken only where they are no blocks.
    """
    counter = FlopCounter()
    singles: list[tuple[int, Block]] = []
    chains: list[_Chain] = []
    best: _Chain | None = None
    for depth in range(3):
        found, candidates = _chains(graph, depth, counter)
        chains += found
        singles += [(chain.arithmetic, chain.blocks[0]) for chain in found if len(chain.blocks) == 1]
        for chain in candidates:
            if best is None or chain.arithmetic > best.arithmetic:
                best = chain
    if best is None:
        return _no_blocks(graph, chains, counter)
    inside = set(best.blocks[0].nodes)
    beside = [(size, block) for size, block in singles if inside.isdisjoint(block.nodes)]
    size, block = max(beside, key=lambda item: item[0], default=(0, None))
    if block is not None and size > best.arithmetic:
        total = sum(map(counter.arithmetic, graph.nodes))
        return Declined(
            f"{block.path}, a block alone, does {size / total:.0%} of the graph's arithmetic, and the largest list of "
            f"several, {describe_lists(best.blocks)}, {best.arithmetic / total:.0%}: the model has one block"
        )
    return best.blocks


def _no_blocks(graph: fx.Graph, chains: Sequence[_Chain], counter: FlopCounter) -> Declined:
    several = [chain for chain in chains if len(chain.blocks) > 1]
    if not several:
        return Declined("no module list with two or more members is called in this graph")
    largest = max(several, key=lambda chain: chain.arithmetic)
    share = largest.arithmetic / max(sum(map(counter.arithmetic, graph.nodes)), 1)
    return Declined(
        "no module list in this graph is one of blocks: no residual stream runs through the members of the largest, "
        f"{describe_lists(largest.blocks)}, which does {share:.0%} of the graph's arithmetic"
    )


def describe_lists(blocks: Iterable[Block]) -> str:
    """The trunk's lists with their lengths, such as ``transformer_blocks x 20, single_transformer_blocks x 40``."""
    counts: dict[str, int] = {}
    for block in blocks:
        name = ".".join(block.owner.list_path)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} x {count}" for name, count in counts.items())
