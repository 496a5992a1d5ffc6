"""The floating point operations of nodes: each operation runs on the meta device, where torch counts its products.

Torch decides what an operation is made of. A formula of our own for each of ``einsum``, ``baddbmm`` and
``multi_head_attention_forward`` would be wrong for some way of calling them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

import hvcompile.float8.attention
import hvcompile.graph.block_sparse  # noqa: F401 - registers its operator, as the one above does
from hvcompile.torch_private import kernels
from hvcompile.torch_private.fakes import FAKES, numel_hint, size_hint, value
from hvcompile.torch_private.subclasses import is_wrapper

log = logging.getLogger(__name__)

LINEAR, ATTENTION, CONVOLUTION = "linear", "attention", "convolution"
"""The kinds of products."""

_PLAIN: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter, *FAKES)
_aten = torch.ops.aten
# Matrix products of queries, keys and values with each other; within an operation whose name says attention, mm and
# addmm are the projections.
_BATCHED = {_aten.bmm, _aten.baddbmm}


def _of_vector(matrix: Any, *_: Any, **__: Any) -> Any:
    return 2 * math.prod(matrix)


def _of_added_vector(_: Any, matrix: Any, *__: Any, **___: Any) -> Any:
    return 2 * math.prod(matrix)


def _of_added_batch(_: Any, first: Any, second: Any, *__: Any, **___: Any) -> Any:
    return 2 * math.prod(first) * int(second[-1])


def _of_attention(query: Any, key: Any, values: Any, *_: Any, **__: Any) -> Any:
    return 2 * math.prod(query[:-1]) * int(key[-2]) * int(query[-1] + values[-1])


def _of_blocks(query: Any, key: Any, values: Any, *others: Any, **_: Any) -> Any:
    del key
    reads = others[-1]
    return 2 * math.prod(query[:2]) * reads * int(query[-1] + values[-1])


UNKNOWN_TO_TORCH: Mapping[Any, Any] = {
    _aten.mv: _of_vector,
    _aten.dot: _of_vector,
    _aten.vdot: _of_vector,
    _aten.addmv: _of_added_vector,
    _aten.addbmm: _of_added_batch,
    kernels.FLASH_ATTENTION_FOR_CPU: _of_attention,
    torch.ops.hvcompile.float8_attention: _of_attention,
    torch.ops.hvcompile.block_sparse_attention: _of_blocks,
}
"""Products that torch's counter does not count, with formulas that take the operands' shapes."""


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A tensor as far as a count depends on it."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return repr(self)


class _UncountableError(Exception):
    """An operand is something else than a plain tensor or number."""


class FlopCounter:
    """The operations of a graph's nodes, of which the first alone is run where several call the same on equal shapes.

    A model has many nodes and few such calls: HunyuanVideo's 60 blocks 8,272 and a hundred; counted one by one, its
    recovery takes 5.9 s, not 0.8. Whoever counts makes a counter, which goes when they are done.
    """

    def __init__(self) -> None:
        self._counted: dict[Any, Mapping[str, int]] = {}

    def by_kind(self, node: fx.Node) -> Mapping[str, int]:
        """A node's floating point operations by kind of product; empty for communication, and where it has none.

        A symbolic size counts as in the captured run, and one that depends on data as ``size_hint`` has it.
        """
        if node.op not in {"call_function", "call_method"} or not any(
            isinstance(value(item), torch.Tensor) for item in node.all_input_nodes
        ):
            return {}
        # Communication computes nothing, and must not be run.
        if any(name in f"{getattr(node.target, '__module__', '')} {node.target}" for name in ("distributed", "c10d")):
            return {}
        if getattr(node.target, "__module__", "").endswith("collectives"):
            return {}
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), _described)
        except _UncountableError:
            return {}
        key = (node.op, node.target, repr(args), repr(kwargs))
        if key not in self._counted:
            self._counted[key] = _count(node, args, kwargs)
        return self._counted[key]

    def arithmetic(self, node: fx.Node) -> int:
        """A node's floating point operations: those of its products, else one for each element of its result."""
        result = value(node)
        return sum(self.by_kind(node).values()) or (numel_hint(result) if isinstance(result, torch.Tensor) else 0)


def _described(node: fx.Node) -> Any:
    return _describe(value(node))


def _describe(argument: Any) -> Any:
    if type(argument) in _PLAIN or is_wrapper(argument):
        return _Shape(tuple(map(size_hint, argument.shape)), argument.dtype)
    if isinstance(argument, torch.SymInt):
        return size_hint(argument)
    if isinstance(argument, (tuple, list)):
        return tuple(map(_describe, argument))
    if isinstance(argument, (int, float, bool)):
        return argument
    raise _UncountableError


def _on_meta(argument: Any) -> Any:
    """An argument of ``_describe``'s as a call takes it: shapes become tensors on the meta device."""
    if isinstance(argument, _Shape):
        return torch.empty(argument.sizes, dtype=argument.dtype, device="meta")
    if isinstance(argument, slice):
        return slice(*map(_on_meta, (argument.start, argument.stop, argument.step)))
    if isinstance(argument, (tuple, list)):
        return type(argument)(_on_meta(item) for item in argument)
    if isinstance(argument, Mapping):
        return {name: _on_meta(item) for name, item in argument.items()}
    return argument


def _count(node: fx.Node, args: Any, kwargs: Any) -> Mapping[str, int]:
    target: Any = node.target
    name = target if node.op == "call_method" else getattr(target, "__name__", str(target))
    counter = FlopCounterMode(display=False, custom_mapping=dict(UNKNOWN_TO_TORCH))
    try:
        with torch.no_grad():
            args, kwargs = _on_meta(tuple(args)), _on_meta(kwargs)
            with counter:
                (getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs))
    except Exception as error:  # the operation asks for values, or for another device: it is no product
        log.debug("operations of %s are not counted: %s", name, error)
        return {}
    flops: dict[str, int] = {}
    for packet, number in counter.get_flop_counts().get("Global", {}).items():
        kind = LINEAR
        if "conv" in str(packet):
            kind = CONVOLUTION
        elif "attention" in str(packet) or ("attention" in name and packet in _BATCHED):
            kind = ATTENTION
        if number:
            flops[kind] = flops.get(kind, 0) + int(number)
    return flops
