"""The relative error that float8 makes in each linear layer, measured on the inputs of a call."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.float8 import format as float8_format
from hvcompile.float8 import linear as float8_linear
from hvcompile.float8.format import Granularity
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.nodes import op_name
from hvcompile.journal import Declined
from hvcompile.pipeline import Context
from hvcompile.torch_private.fakes import size_hint
from hvcompile.trunk.linears import Linear
from hvcompile.trunk.trunk import BlockCall, Trunk

log = logging.getLogger(__name__)


class _Recorder(fx.Interpreter):
    """Runs a body, and hands the operands and result of its linear layers on."""

    def __init__(
        self, body: fx.GraphModule, tell: Callable[[fx.Node, Sequence[torch.Tensor], torch.Tensor], None]
    ) -> None:
        super().__init__(body)
        self._tell = tell

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and op_name(n) == "linear":
            operands, named = self.fetch_args_kwargs_from_env(n)
            self._tell(n, (*operands, *named.values()), result)
        return result


class _Outlined(fx.Interpreter):
    """Runs an outlined graph, its blocks by a ``_Recorder``."""

    def __init__(
        self, trunk: Trunk, tell: Callable[[BlockCall, fx.Node, Sequence[torch.Tensor], torch.Tensor], None]
    ) -> None:
        super().__init__(trunk.module)
        self._blocks, self._tell = {block.call: block for block in trunk.blocks}, tell

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._blocks:
            return super().run_node(n)
        block = self._blocks[n]
        operands = self.fetch_args_kwargs_from_env(n)[0][2:]
        return _Recorder(block.body.module, functools.partial(self._tell, block)).run(*operands)


@torch.no_grad()
def measure_errors(
    trunk: Trunk, linears: Mapping[tuple[BlockCall, str], Linear], granularity: Granularity, context: Context
) -> dict[tuple[BlockCall, str], float]:
    """Run the graph as it is on the inputs of the call that is compiled, and each layer's float8 product beside it.

    Returns:
        For each block and weight, the norm of the difference over the norm of the layer's result; nothing where there
        are no inputs, or where weights are in float8 alone already.

    """
    if not context.given or any(isinstance(item, QuantizedWeight) for item in context.given.values()):
        log.warning("fp8.audit measures nothing here: that takes the first graph that is compiled for a model")
        return {}
    names = {(block, item.node): name for (block, name), item in linears.items()}
    errors: dict[tuple[BlockCall, str], float] = {}

    def tell(block: BlockCall, node: fx.Node, operands: Sequence[torch.Tensor], result: torch.Tensor) -> None:
        if (block, node) in names:
            given, weight, *bias = operands
            computed = float8_linear.linear(
                *float8_format.quantize(given, granularity),
                *float8_format.quantize(weight, granularity),
                bias[0] if bias else None,
                result.dtype,
            )
            exact = result.float()
            error = (float8_linear.shape_like(computed, given).float() - exact).norm() / exact.norm()
            if error.isfinite():  # none is defined where the layer gives zeros alone
                errors[block, names[block, node]] = round(error.item(), 6)

    inputs = _inputs(trunk, context)
    if isinstance(inputs, Declined):
        log.warning("fp8.audit measures nothing here: %s", inputs.reason)
        return {}
    _Outlined(trunk, tell).run(*inputs)
    return errors


def _inputs(trunk: Trunk, context: Context) -> list[Any] | Declined:
    """What the graph takes in the call that is compiled, derived inputs included; or why it does not compute that."""
    values = {node: size_hint(item) if isinstance(item, torch.SymInt) else item for node, item in context.given.items()}
    for item in trunk.derived:
        results = item.module(*(values[node] for node in item.sources))
        derived = results if item.read is None else item.read(results)
        if isinstance(derived, Declined):
            return derived
        values |= dict(zip(item.placeholders, derived, strict=True))
    return [values[node] for node in trunk.graph.find_nodes(op="placeholder")]
