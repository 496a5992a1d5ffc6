"""The relative error that float8 makes in each linear layer, measured on the inputs of a call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from hvcompile.float8 import format as float8_format
from hvcompile.float8 import linear as float8_linear
from hvcompile.float8.format import Granularity
from hvcompile.graph.nodes import op_name
from hvcompile.pipeline import Context
from hvcompile.rewriting.recording import record
from hvcompile.trunk.linears import Linear
from hvcompile.trunk.trunk import BlockCall, Trunk

log = logging.getLogger(__name__)


def measure_errors(
    trunk: Trunk, linears: Mapping[tuple[BlockCall, str], Linear], granularity: Granularity, context: Context
) -> dict[tuple[BlockCall, str], float]:
    """Run the graph as it is on the inputs of the call that is compiled, and each layer's float8 product beside it.

    Returns:
        For each block and weight, the norm of the difference over the norm of the layer's result; nothing where there
        are no inputs, or where weights are in float8 alone already.

    """
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

    declined = record(trunk, context, lambda node: op_name(node) == "linear", tell)
    if declined is not None:
        log.warning("fp8.audit measures nothing here: %s", declined.reason)
    return errors
