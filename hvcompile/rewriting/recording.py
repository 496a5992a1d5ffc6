"""Running an outlined graph on the inputs of the call that is compiled, with a look at some of its operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.hollow.parameter import HollowParameter
from hvcompile.journal import Declined
from hvcompile.pipeline import Context
from hvcompile.torch_private.fakes import size_hint
from hvcompile.trunk.trunk import BlockCall, Trunk

Tell = Callable[[BlockCall, fx.Node, Sequence[Any], Any], None]
"""Hears of an operation: its block, its node, its operands (those by name after the others), and its result."""


class _Body(fx.Interpreter):
    """Runs a body, and tells of some of its nodes."""

    def __init__(
        self,
        body: fx.GraphModule,
        is_wanted: Callable[[fx.Node], bool],
        tell: Callable[[fx.Node, Sequence[Any], Any], None],
    ) -> None:
        super().__init__(body)
        self._is_wanted, self._tell = is_wanted, tell

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and self._is_wanted(n):
            operands, named = self.fetch_args_kwargs_from_env(n)
            self._tell(n, (*operands, *named.values()), result)
        return result


class _Outlined(fx.Interpreter):
    """Runs an outlined graph, its blocks by a ``_Body``."""

    def __init__(self, trunk: Trunk, is_wanted: Callable[[fx.Node], bool], tell: Tell) -> None:
        super().__init__(trunk.module)
        self._blocks = {block.call: block for block in trunk.blocks}
        self._is_wanted, self._tell = is_wanted, tell

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._blocks:
            return super().run_node(n)
        block = self._blocks[n]
        operands = self.fetch_args_kwargs_from_env(n)[0][2:]
        return _Body(block.body.module, self._is_wanted, functools.partial(self._tell, block)).run(*operands)


@torch.no_grad()
def record(
    trunk: Trunk,
    context: Context,
    is_wanted: Callable[[fx.Node], bool],
    tell: Tell,
    states: Mapping[str, int] | None = None,
) -> Declined | None:
    """Run the graph as it is on the inputs of the call that is compiled.

    Args:
        trunk: with its blocks at the top level.
        context: of the pass that asks.
        is_wanted: which nodes of the bodies are told of.
        tell: hears of them.
        states: what some of the trunk's states are filled with, by name; the others with 0.

    Returns:
        Why nothing was run; None where it was.

    """
    if not context.given or any(isinstance(item, HollowParameter) for item in context.given.values()):
        return Declined("that takes the first graph that is compiled for a model, and all of its weights on the device")
    inputs = _inputs(trunk, context, states or {})
    if isinstance(inputs, Declined):
        return inputs
    _Outlined(trunk, is_wanted, tell).run(*inputs)
    return None


def _inputs(trunk: Trunk, context: Context, states: Mapping[str, int]) -> list[Any] | Declined:
    """What the graph takes in the call that is compiled, derived inputs included; or why it does not compute that."""
    values = {node: size_hint(item) if isinstance(item, torch.SymInt) else item for node, item in context.given.items()}
    for state in trunk.states:
        shape = [size_hint(size) for size in state.shape]
        values[state.placeholder] = torch.full(shape, states.get(state.name, 0), dtype=state.dtype, device=state.device)
    for item in trunk.derived:
        results = item.module(*(values[node] for node in item.sources))
        derived = results if item.read is None else item.read(results)
        if isinstance(derived, Declined):
            return derived
        values |= dict(zip(item.placeholders, derived, strict=True))
    return [values[node] for node in trunk.graph.find_nodes(op="placeholder")]
