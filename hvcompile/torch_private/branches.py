"""The door to how Inductor hands operands to the branches of a ``cond``.

All names were checked on torch 2.11.0 and 2.13.0.

Branches are compiled for operands that lie in memory as they were traced. Inductor chooses the layout of what a graph
computes by itself, and gives it to the branches as it is; then they read it wrong, silently where ``size_asserts`` is
off. For ``invoke_subgraph`` it sees to the layout, with the function that is used here.

- ``torch._inductor.ir.Conditional.create``: lowers a ``cond``, given its operands.
- ``torch._inductor.virtualized.V.graph.current_node``: the node that is being lowered, whose operands know how they
  were traced.
- ``torch._inductor.lowering.constrain_to_fake_tensor``: gives an operand the strides of its fake value, by a copy only
  where it has others and can't be computed anew with these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor.ir import Conditional
from torch._inductor.lowering import constrain_to_fake_tensor
from torch._inductor.virtualized import V

_CREATE = Conditional.create.__func__  # type: ignore[attr-defined]


def _create(cls: Any, predicate: Any, true_fn: Any, false_fn: Any, operands: Sequence[Any]) -> Any:
    nodes: Any = V.graph.current_node.args[-1]
    laid_out = []
    for node, operand in zip(nodes, operands, strict=True):
        fake = node.meta["val"] if isinstance(node, fx.Node) else node
        is_tensor = isinstance(fake, torch.Tensor)
        laid_out.append(constrain_to_fake_tensor(operand, fake) if is_tensor else operand)  # type: ignore[no-untyped-call]
    return _CREATE(cls, predicate, true_fn, false_fn, laid_out)


@contextlib.contextmanager
def operands_as_traced() -> Iterator[None]:
    """Within, Inductor gives the branches of a ``cond`` their operands as they were traced."""
    with mock.patch.object(Conditional, "create", classmethod(_create)):
        yield
