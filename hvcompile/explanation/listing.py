"""A program as text for a reader: a line a node, weights by their path, and what changed from one pass to the next.

``dump.source`` writes what Python can run; this is shorter, keeps one line a node so that two programs can be laid
side by side, and says a block's thirty weights in one word.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import is_tensor, is_weight, op_name
from hvcompile.graph.paths import module_path
from hvcompile.torch_private.dynamo import source_name
from hvcompile.torch_private.fakes import TAG, value
from hvcompile.torch_private.lowering import COND, INVOKE_SUBGRAPH

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_MOST_WEIGHTS = 3
"""Weights that a call is shown with; more are counted."""
_MOST_OWNERS = 3
"""Modules that counted weights are told to be of, each by its path; of more, the first and the last."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One node, or a row of weights.

    Attributes:
        name: of the node.
        text: what it computes, with dtype and shape.
        op: its operation; empty for inputs, constants and the output, which compute nothing.
        block: path of the block that it was traced in; empty outside of blocks.
        tag: the pass that made it; empty for a node of the model.

    """

    name: str
    text: str
    op: str = ""
    block: str = ""
    tag: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One graph of a program: the root, a body or a branch."""

    name: str
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A whole program after one pass: its graphs, each once, the root first."""

    name: str
    listings: tuple[Listing, ...]

    def op_counts(self) -> collections.Counter[str]:
        """How often each operation stands in the program, bodies counted once."""
        return collections.Counter(line.op for listing in self.listings for line in listing.lines if line.op)


def stage(name: str, module: fx.GraphModule, blocks: Collection[str] = ()) -> Stage:
    """Write a program out.

    Args:
        name: of the pass that made it.
        module: the root; bodies and branches are its submodules.
        blocks: paths of the trunk's blocks, to say of each node of the model which it belongs to.

    """
    weights = {node.name: _weight_path(node) for node in module.graph.find_nodes(op="placeholder") if is_weight(node)}
    graphs = {path or "root": item for path, item in module.named_modules() if isinstance(item, fx.GraphModule)}
    known = frozenset(blocks)
    listings = [Listing(name=path, lines=tuple(_lines(item.graph, weights, known))) for path, item in graphs.items()]
    return Stage(name=name, listings=tuple(listings))


def _weight_path(placeholder: fx.Node) -> str:
    path = [part for part in module_path(source_name(placeholder)) if part not in {"_parameters", "_buffers"}]
    return ".".join(path) or placeholder.name


def _owner(path: str) -> str:
    """The list member that a weight belongs to, or the module where it is in no list."""
    member = re.match(r"(.*?\.\d+)\.", path)
    return member[1] if member else path.rpartition(".")[0]


def _lines(graph: fx.Graph, weights: Mapping[str, str], blocks: frozenset[str]) -> Iterator[Line]:
    placeholders = list(graph.find_nodes(op="placeholder"))
    names = {node: _short(node) for node in placeholders}
    paths = {node: weights[node.name] for node in placeholders if node.name in weights}
    owners = {_owner(path) for path in paths.values()}
    is_body = len(owners) == 1 and all(
        re.search(r"\.\d+$", owner) for owner in owners
    )  # its weights are those of any of its blocks
    names |= {node: path.removeprefix(f"{_owner(path)}.") if is_body else path for node, path in paths.items()}

    for is_row, group in itertools.groupby(placeholders, lambda node: node in paths and not is_body):
        nodes = list(group)
        if is_row and len(nodes) > 1:
            yield Line(name=nodes[0].name, text=_count(nodes, paths))
        else:
            yield from (Line(name=node.name, text=f"{names[node]}{_type(node)}", tag=_tag(node)) for node in nodes)
    for node in graph.nodes:
        if node.op == "placeholder" or (node.op == "get_attr" and not is_tensor(node)):
            continue  # a reference to a body stands where it is called
        if node.op == "output":
            yield Line(name="output", text=f"return {_argument(node.args[0], names)}", tag=_tag(node))
            continue
        computed = node.op in {"call_function", "call_method", "call_module"}
        yield Line(
            name=node.name,
            text=f"{node.name}{_type(node)} = {_call(node, names, paths) if computed else f'constant {node.target}'}",
            op=op_name(node) if node.op in {"call_function", "call_method"} else "",
            block=_block(node, blocks),
            tag=_tag(node),
        )


def _short(placeholder: fx.Node) -> str:
    """An input by its name in the model's call; Dynamo's own says ``l_kwargs_timestep_``."""
    return re.sub(r"^l_(?:kwargs_|args_(?!\d))?(.+?)_?$", r"\1", placeholder.name)


def _tag(node: fx.Node) -> str:
    return str(node.meta.get(TAG, ""))


def _block(node: fx.Node, blocks: frozenset[str]) -> str:
    stack = node.meta.get("nn_module_stack") if blocks else None
    if not stack:
        return ""
    path = module_path(str([*stack.values()][-1][0]))
    found = (".".join(path[:length]) for length in range(1, len(path) + 1))
    return next((prefix for prefix in found if prefix in blocks), "")


def _type(node: fx.Node) -> str:
    held = value(node)
    if not isinstance(held, torch.Tensor):
        return ""
    kind, bits = re.fullmatch(r"([a-z]+)(.*)", str(held.dtype).removeprefix("torch.")).groups()  # type: ignore[union-attr]
    return f": {_DTYPES.get(kind, kind)}{bits}[{', '.join(map(str, held.shape))}]"


def _call(node: fx.Node, names: Mapping[fx.Node, str], paths: Mapping[fx.Node, str]) -> str:
    args: Sequence[Any] = node.args
    if node.target is INVOKE_SUBGRAPH:
        return f"{_target(args[0])}({', '.join(_operands(args[2:], names, paths))})"
    if node.target is COND:
        decided, *branches = args[:3]
        operands = ", ".join(_operands(args[3], names, paths))
        return f"cond({_argument(decided, names)}, {', '.join(map(_target, branches))}, ({operands}))"
    if op_name(node) == "getitem":
        return f"{_argument(args[0], names)}[{_index(args[1], names)}]"
    shown = [_argument(item, names) for item in args]
    shown += [f"{key}={_argument(item, names)}" for key, item in node.kwargs.items()]
    if node.op == "call_method":
        return f"{shown[0]}.{node.target}({', '.join(shown[1:])})"
    return f"{op_name(node)}({', '.join(shown)})"


def _target(node: Any) -> str:
    return str(node.target) if isinstance(node, fx.Node) else repr(node)


def _operands(operands: Sequence[Any], names: Mapping[fx.Node, str], paths: Mapping[fx.Node, str]) -> list[str]:
    """Operands of a body or a branch, of which most are weights: those are counted, a list member at a time."""
    held = [item for item in operands if item in paths]
    if len(held) <= _MOST_WEIGHTS:
        return [_argument(item, names) for item in operands]
    return [*(_argument(item, names) for item in operands if item not in paths), _count(held, paths)]


def _count(weights: Sequence[fx.Node], paths: Mapping[fx.Node, str]) -> str:
    """Many weights in a word, with the modules that they are of."""
    owners = [owner or "the model" for owner in dict.fromkeys(_owner(paths[node]) for node in weights)]
    whose = ", ".join(owners) if len(owners) <= _MOST_OWNERS else f"{owners[0]} .. {owners[-1]}"
    return f"{len(weights)} weights of {whose}"


def _argument(argument: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names.get(argument, argument.name)
    if isinstance(argument, (tuple, list)):
        inner = ", ".join(_argument(item, names) for item in argument)
        return f"[{inner}]" if isinstance(argument, list) else f"({inner}{',' * (len(argument) == 1)})"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{key}: {_argument(item, names)}" for key, item in argument.items()) + "}"
    if isinstance(argument, slice):
        return f"slice({_index(argument, names)})"
    if isinstance(argument, torch.device):
        return repr(str(argument))
    if isinstance(argument, (torch.dtype, torch.memory_format)):
        return str(argument).removeprefix("torch.")
    return getattr(argument, "__name__", None) or repr(argument)


def _index(index: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(index, (tuple, list)) and index:
        return ", ".join(_index(item, names) for item in index)
    if isinstance(index, slice):
        start, stop = ("" if end is None else _argument(end, names) for end in (index.start, index.stop))
        return f"{start}:{stop}" + ("" if index.step is None else f":{_argument(index.step, names)}")
    return "..." if index is Ellipsis else _argument(index, names)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a comparison, top to bottom.

    ``kind`` is "same" (``before`` and ``after`` are equal), "changed" (one node, with other operands) or "replaced"
    (``before`` is gone, ``after`` is new; one of them may be empty).
    """

    kind: str
    before: tuple[Line, ...]
    after: tuple[Line, ...]


def compare(before: Sequence[Line], after: Sequence[Line]) -> list[Part]:
    """Lay two versions of a graph side by side."""
    texts = [line.text for line in before], [line.text for line in after]
    parts: list[Part] = []
    for kind, start, stop, new_start, new_stop in difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        old, new = tuple(before[start:stop]), tuple(after[new_start:new_stop])
        parts += [Part(kind="same", before=old, after=new)] if kind == "equal" else _replaced(old, new)
    return parts


def _replaced(old: tuple[Line, ...], new: tuple[Line, ...]) -> Iterator[Part]:
    """Tell the nodes that are still there, with other operands, from those that went or came."""
    places = {line.name: place for place, line in enumerate(old)}
    done = new_done = 0
    for new_place, line in enumerate(new):
        place = places.get(line.name, -1)
        if place < done:
            continue
        if place > done or new_place > new_done:
            yield Part(kind="replaced", before=old[done:place], after=new[new_done:new_place])
        yield Part(kind="changed", before=(old[place],), after=(line,))
        done, new_done = place + 1, new_place + 1
    if done < len(old) or new_done < len(new):
        yield Part(kind="replaced", before=old[done:], after=new[new_done:])
