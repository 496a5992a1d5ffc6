"""The door to private fake tensors and symbolic sizes: reading what Dynamo recorded without installing a guard.

All names were checked on torch 2.11.0 and 2.13.0.

- ``torch._subclasses.fake_tensor.FakeTensor`` and ``FakeTensorMode``: to find the fake mode of the captured graph, and
  to make another fake tensor in it.
- ``torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode``: what an operator that needs to know a
  data-dependent size raises while it is traced. In 2.11 and 2.12 attention by torch's math kernel is one.
- ``SymInt.node`` (its ``hint``, ``expr`` and ``shape_env``) and ``ShapeEnv.bound_sympy``: reading a symbolic size
  without installing a guard on it. ``int(size)`` and ``size == other`` install one.
- ``ShapeEnv.create_unbacked_symint`` and ``ignore_fresh_unbacked_symbols``: a size that no code may be specialised to,
  and on which no guard can be put that Dynamo, which knows nothing of the input, would have to check.
- ``torch._check``: bounds for such a size.

``TAG``, ``STORED``, ``value`` and ``provenance`` are not private torch: they name what the project itself, and Dynamo
by its ``example_value``, keep in ``node.meta``. They stand here because all the rest reads fake values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

TAG = "hvcompile"  # node.meta key: the name of the pass that made the node
STORED = "hvcompile_stored"  # node.meta key: a placeholder for a weight that the runtime keeps
FAKES: tuple[type, ...] = (FakeTensor,)
"""What a tensor that Dynamo made to trace with is an instance of."""


def value(node: fx.Node) -> Any:
    """The fake value that Dynamo recorded for a node: a tensor, a symbolic or plain number, or a tuple of these."""
    return node.meta.get("example_value")


def provenance(node: fx.Node, tag: str, fake: Any) -> dict[str, Any]:
    """Meta for a node that stands for another: where that was traced, who made this one, and its fake value.

    Nothing else is taken along: ``unbacked_bindings``, say, would bind a data-dependent size twice.
    """
    kept: dict[str, Any] = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    return {**kept, TAG: tag, "example_value": fake}


def size_hint(size: int | torch.SymInt) -> int:
    """A symbolic size's value in the run that was captured, read without installing a guard.

    Of one that depends on data, the most that it can be, or 1 where nothing bounds it.
    """
    if isinstance(size, torch.SymInt):
        hint = size.node.hint  # private: int(size) would install a guard (2.11.0, 2.13.0)
        if hint is None:
            # Private: what the graph's shape environment knows of it (2.11.0, 2.13.0).
            most = size.node.shape_env.bound_sympy(size.node.expr).upper
            return int(most) if most.is_Integer and most < sys.maxsize else _most(size)
        return int(hint)
    return int(size)


def _most(size: torch.SymInt) -> int:
    """The most that a size can be by a bound that is a symbolic size itself, or 1."""
    env, symbol = size.node.shape_env, size.node.expr
    # Private: bounds that are no numbers, checked where the graph runs, and what sizes were in the captured run, under
    # its old name before 2.13 (2.11.0, 2.13.0).
    values = getattr(env, "backed_var_to_val", None) or env.var_to_val
    for bound in env.deferred_runtime_asserts.get(symbol, ()):
        if isinstance(bound.expr, sympy.LessThan) and bound.expr.lhs == symbol:
            most = env.replace(bound.expr.rhs).xreplace(values)
            if most.is_Integer:
                return int(most)
    return 1


def number_hint(number: Any) -> float | None:
    """A symbolic number's value in the run that was captured; None where it depends on data."""
    hint = number.node.hint  # private: as in ``size_hint``
    return None if hint is None else float(hint)


def fix_number(number: torch.SymFloat) -> None:
    """Make a symbolic number the one of the run that was captured: Dynamo guards on it."""
    float(number)


def is_fixed(number: Any) -> bool:
    """Whether a symbolic number can be but one, on which Dynamo guards where it came from an input."""
    # Private: as in ``symbol_of``.
    symbolic = isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool)
    return symbolic and not number.node.expr.free_symbols and number.node.hint is not None


def literal_of(number: Any) -> Any:
    """The plain number that a fixed symbolic one is, to the last bit; sympy's own has fewer digits."""
    return number.node.hint  # private: as in ``size_hint``


def is_data_dependent(tensor: torch.Tensor) -> bool:
    """Whether a size of a fake tensor is known only when the graph runs."""
    # Private: as in ``size_hint``.
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in tensor.shape)


def numel_hint(tensor: torch.Tensor) -> int:
    """Number of elements of a fake tensor, with symbolic sizes replaced by their hints."""
    total = 1
    for size in tensor.shape:
        total *= size_hint(size)
    return total


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; a symbolic size counts as in the run that was captured."""
    return numel_hint(tensor) * tensor.element_size()


def shape_key(tensor: torch.Tensor) -> tuple[str, ...]:
    """A shape as text: comparing symbolic sizes with ``==`` would install a guard."""
    return tuple(str(size) for size in tensor.shape)


def layout_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Everything of a fake tensor that the code compiled for it depends on."""
    strides = tuple(str(stride) for stride in tensor.stride()) if tensor.layout is torch.strided else ()
    return (type(tensor).__name__ == "FakeTensor", shape_key(tensor), strides, str(tensor.dtype), str(tensor.device))


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode in which Dynamo captured this graph."""
    for node in graph.nodes:
        if isinstance(value(node), FakeTensor):
            # Private: a tensor of another mode can't meet the graph's own (2.11.0, 2.13.0).
            return value(node).fake_mode  # type: ignore[no-any-return]
    return None


def fake_mode_of(tensor: torch.Tensor) -> Any:
    """The fake mode of a fake tensor, as a context; nothing for a real one."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else contextlib.nullcontext()


def fake_like(
    mode: FakeTensorMode, shape: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device
) -> Any:
    """A fake contiguous tensor of this shape (symbolic sizes allowed) in the graph's own fake mode."""
    with mode:
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def unbacked_size(mode: FakeTensorMode, least: int, most: int | torch.SymInt) -> torch.SymInt:
    """A new size from ``least`` to ``most`` that is known only when the graph runs."""
    # Private: the public torch.library hands such sizes to fake kernels of operators alone (2.11.0, 2.13.0).
    env: Any = mode.shape_env
    with env.ignore_fresh_unbacked_symbols():  # it is an input: no operation of the graph makes it
        size: torch.SymInt = env.create_unbacked_symint()
    for bound in (size >= least, size <= most):
        # Private by name, and the way torch's own documentation bounds such a size (2.11.0, 2.13.0).
        torch._check(bound)  # type: ignore[no-untyped-call]
    return size


def at_least(size: torch.SymInt, least: int) -> None:
    """Have a size that is known only when the graph runs be so much or more, while graphs are traced."""
    # Private by name: as in ``unbacked_size`` (2.11.0, 2.13.0).
    torch._check(size >= least)  # type: ignore[no-untyped-call]


def is_traceable(operation: Callable[..., Any], *fakes: Any, **kwargs: Any) -> bool:
    """Whether an operation can be traced on fake tensors of which some sizes are known only when the graph runs."""
    mode = next(item.fake_mode for item in fakes if isinstance(item, FakeTensor))
    try:
        with mode, torch.no_grad():
            operation(*fakes, **kwargs)
    except GuardOnDataDependentSymNode:  # private: its public bases are raised for other reasons (2.11.0, 2.13.0)
        return False
    return True


def symbol_of(node: fx.Node) -> Any:
    """The symbol that a node's value is, backed or not; None where it is no number or an expression of symbols."""
    size = value(node)
    # Private: a size's sympy expression, by which it is known again without a guard (2.11.0, 2.13.0).
    return size.node.expr if isinstance(size, torch.SymInt) and size.node.expr.is_symbol else None


def expression_of(number: Any) -> Any:
    """A number as a sympy expression; None where it is not an integer."""
    if isinstance(number, torch.SymInt):
        return number.node.expr  # private: as in ``symbol_of``
    return sympy.Integer(number) if isinstance(number, int) and not isinstance(number, bool) else None


def symbols_of(graph: fx.Graph) -> dict[int, Any]:
    """Map the position of each symbolic-size placeholder to its symbol."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    # Private: as in ``symbol_of``.
    return {
        index: value(node).node.expr for index, node in enumerate(placeholders) if isinstance(value(node), torch.SymInt)
    }


def evaluate_size(size: int | torch.SymInt, symbols: Mapping[Any, int]) -> int:
    """The concrete value of a symbolic size, given the value of each symbol."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr.subs(dict(symbols)))  # private: as in ``symbol_of``
    return int(size)


def fix_size(size: int | torch.SymInt, graph: fx.Graph) -> int:
    """The concrete value of a size, on which the compiled graph then depends: Dynamo guards on each of its symbols.

    Raises:
        ValueError: the size depends on data.

    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is None:
        raise ValueError(f"a length, {size}, depends on data")
    symbols = size.node.expr.free_symbols  # private: as in ``symbol_of``
    for node in graph.find_nodes(op="placeholder"):
        if symbol_of(node) in symbols:
            int(value(node))
    return int(size)
