"""The pass pipeline: what a pass is, what it reports, and the checks that run around every one."""

from __future__ import annotations

import collections
import dataclasses
import logging
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile.errors import InvalidRewriteError, OptionError, RequestedPassError
from hvcompile.graph.costs import Device
from hvcompile.graph.nodes import is_tensor, op_name
from hvcompile.journal import JournalRow, PassReport
from hvcompile.torch_private.fakes import layout_key, shape_key, value
from hvcompile.trunk.trunk import Trunk, stride_order

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may know beside the graph.

    Attributes:
        requested: whether the user asked for the pass by name.
        given: the inputs of the call that is being compiled, by placeholder; empty where nothing will run.
        planned_for: a device that is planned for, where nothing will run.
        is_first_block_compared: whether a pass that runs later compares the first block's results from step to step.

    """

    requested: bool = False
    given: Mapping[fx.Node, Any] = dataclasses.field(default_factory=dict)
    planned_for: Device | None = None
    is_first_block_compared: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A rewrite of the trunk; a subclass's fields are its options.

    ``section`` is its key in ``options``; ``is_exact`` says that it does not change numerics (it then also runs under
    ``mode="exact"``). ``tolerance`` is the relative difference that it may make to the outputs of a step that computes
    all blocks; ``compares_first_block`` that it decides by how much the first block's results change. ``switch`` names
    the field without which it does not run and that ``mode="max"`` sets; it may share its section with a pass that has
    none. ``needs`` are passes without whose rewrite it may not apply, be it asked for by name.
    """

    section: ClassVar[str]
    is_exact: ClassVar[bool]
    tolerance: ClassVar[float] = 0.0
    compares_first_block: ClassVar[bool] = False
    switch: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the fields' types; a subclass goes on with their values."""
        fields = dataclasses.fields(self)
        hints = typing.get_type_hints(type(self)) if fields else {}
        for field in fields:
            setting = getattr(self, field.name)
            require_type(setting, hints[field.name], f"{self.section}.{field.name}")
            if isinstance(setting, list):
                object.__setattr__(self, field.name, tuple(setting))

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the trunk in place, or leave it as it was and say why."""
        raise NotImplementedError(f"{type(self).__name__} has no apply")

    def instead(self) -> Pass | None:
        """The pass as it runs for inputs that one of its derived inputs refuses; None for not at all."""
        return None


def require_type(setting: Any, hint: Any, name: str) -> None:
    """Raise OptionError, which names the option, where a setting is not of the type that its field has."""
    if typing.get_origin(hint) is tuple:  # of any length; a list does as well
        (kind, _) = typing.get_args(hint)
        if not isinstance(setting, (list, tuple)) or not all(isinstance(item, kind) for item in setting):
            raise OptionError(f"{name} is {setting!r}; allowed is a list of {kind.__name__}")
        return
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        exact = isinstance(setting, kind) and (kind is bool or not isinstance(setting, bool))
        if exact or (kind is float and isinstance(setting, numbers.Real) and not isinstance(setting, bool)):
            return
    wanted = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
    raise OptionError(f"{name} is {setting!r}, a {type(setting).__name__}; allowed is {wanted}")


def off_rows(switched_off: Sequence[tuple[str, str]]) -> list[JournalRow]:
    """A row for each pass that does not run, given its name and the reason."""
    rows = [
        JournalRow(name=name, report=PassReport(declined=(("switched off", reason),)), op_changes={})
        for name, reason in switched_off
    ]
    for row in rows:
        log.info("%s", row.line())
    return rows


def op_counts(trunk: Trunk) -> collections.Counter[str]:
    """How often each operation stands in the program, bodies counted once."""
    graphs = [module.graph for module in trunk.module.modules() if isinstance(module, fx.GraphModule)]
    return collections.Counter(
        op_name(node) for graph in graphs for node in graph.nodes if node.op in {"call_function", "call_method"}
    )


def _signature(trunk: Trunk) -> tuple[list[Any], list[Any]]:
    """The calling convention that Dynamo relies on: original inputs in order, and original outputs."""
    results: Any = trunk.output.args[0]
    inputs = [(node.target, value(node)) for node in trunk.inputs]
    return inputs, [value(node) if isinstance(node, fx.Node) and is_tensor(node) else repr(node) for node in results]


def _signature_key(signature: tuple[list[Any], list[Any]]) -> tuple[Any, ...]:
    """A signature made comparable; late, because a pass may make a symbolic size a number."""
    inputs, outputs = signature
    return (
        tuple((name, layout_key(held) if isinstance(held, torch.Tensor) else "") for name, held in inputs),
        tuple((shape_key(held), held.dtype) if isinstance(held, torch.Tensor) else held for held in outputs),
    )


def _check(trunk: Trunk, before: tuple[list[Any], list[Any]], name: str) -> None:
    """Postconditions of every pass: well-formed graphs, the same signature, state that has a next value."""
    for module in trunk.module.modules():
        if isinstance(module, fx.GraphModule):
            module.graph.lint()
            module.recompile()
    wanted, found = _signature_key(before), _signature_key(_signature(trunk))
    if wanted != found:
        raise InvalidRewriteError(f"{name} changed the graph's signature from {wanted} to {found}")
    placeholders = list(trunk.graph.find_nodes(op="placeholder"))
    if placeholders[len(trunk.inputs) :] != trunk.added:
        raise InvalidRewriteError(f"{name} left the placeholders that it added out of order")
    for state in trunk.states:
        if state.next_value is None or shape_key(value(state.next_value)) != shape_key(value(state.placeholder)):
            raise InvalidRewriteError(f"{name} left state {state.name!r} without a next value of its own shape")
        if stride_order(value(state.next_value)) != tuple(range(len(state.shape))):
            raise InvalidRewriteError(f"{name} left state {state.name!r} with a next value that is not contiguous")


def run(
    trunk: Trunk,
    passes: Sequence[tuple[Pass, bool]],
    observe: Callable[[str, Trunk], None],
    journal: list[JournalRow],
    context: Context | None = None,
) -> None:
    """Run the passes in order.

    Args:
        trunk: rewritten in place.
        passes: each with whether the user asked for it by name.
        observe: called with the pass's name and the trunk after each pass that changed it (dumps).
        journal: gains a row a pass, also where one raises.
        context: what the passes may know beside the graph; what depends on the passes is filled in.

    Raises:
        RequestedPassError: a pass that was asked for by name could not apply.
        InvalidRewriteError: a pass broke a postcondition.

    """
    for place, (item, requested) in enumerate(passes):
        compared = any(later.compares_first_block for later, _ in passes[place + 1 :])
        known = dataclasses.replace(context or Context(), requested=requested, is_first_block_compared=compared)
        name, signature, counts = type(item).__name__, _signature(trunk), op_counts(trunk)
        report = item.apply(trunk, known)
        _check(trunk, signature, name)
        changes = op_counts(trunk)
        changes.subtract(counts)
        row = JournalRow(
            name=name,
            report=report,
            op_changes={op: n for op, n in sorted(changes.items()) if n},
            section=item.section,
            is_exact=item.is_exact,
            tolerance=item.tolerance,
            options={field.name: getattr(item, field.name) for field in dataclasses.fields(item)},
        )
        log.info("%s", row.line())
        journal.append(row)
        if report.applied:
            observe(name, trunk)
        if requested and (report.unmet or not report.applied):
            reasons = "; ".join(f"{what}: {why}" for what, why in report.unmet or report.declined)
            raise RequestedPassError(
                f"options ask for {item.section!r}, but {name} can't apply to this graph ({reasons}). "
                f"Drop {item.section!r} from options to run without it."
            )
