"""Calls of other graphs: ``cond``, which runs one of two, and ``invoke_subgraph``."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from hvcompile.torch_private.lowering import COND, INVOKE_SUBGRAPH


def is_call(node: fx.Node) -> bool:
    """Whether a node runs another graph."""
    return node.op == "call_function" and node.target in {COND, INVOKE_SUBGRAPH}


def callees(owner: fx.GraphModule, call: fx.Node) -> tuple[dict[str, fx.GraphModule], list[Any]]:
    """The graphs that a call may run, by their names in ``owner``, and the operands that each gets."""
    is_cond = call.target is COND
    references: Any = call.args[1:3] if is_cond else call.args[:1]
    operands: Any = call.args[3] if is_cond else call.args[2:]
    names = [str(node.target) for node in references]
    return {name: operator.attrgetter(name)(owner) for name in names}, list(operands)
