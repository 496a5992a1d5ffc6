"""The pass pipeline: what a pass is, what it reports, and the checks that run around every one.

A pass may fail in a way that nobody foresaw. That ends no compilation: the trunk is recovered anew, and the passes run
on it without that one (``PassFault``). The journal and the log give the exception as the reason.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile.errors import HvcompileError, InvalidRewriteError, OptionError, RequestedPassError
from hvcompile.graph.aliasing import shared_memory
from hvcompile.graph.costs import Device
from hvcompile.graph.nodes import is_tensor, op_name
from hvcompile.journal import Declined, JournalRow, PassReport
from hvcompile.torch_private.fakes import layout_key, shape_key, value
from hvcompile.trunk.operands import stride_order
from hvcompile.trunk.trunk import Trunk

log = logging.getLogger(__name__)

STRICT_VARIABLE = "HVCOMPILE_STRICT"
"""Set in the environment, it has an exception that nobody foresaw raised as it is, as in this package's own tests."""


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

    def moved(self, before: Sequence[fx.Node], after: Sequence[fx.Node]) -> Context:
        """The same for a trunk whose graph is a copy, with other placeholders in the place of these."""
        if list(before) == list(after):
            return self
        place = dict(zip(before, after, strict=True))
        return dataclasses.replace(self, given={place[node]: held for node, held in self.given.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A rewrite of the trunk; a subclass's fields are its options.

    ``section`` is its key in ``options``; ``is_exact`` says that it does not change numerics (it then also runs under
    ``mode="exact"``). ``tolerance`` is the relative difference that it may make to the outputs of a step that computes
    all blocks. ``switch`` names the field without which it does not run and that ``mode="max"`` sets; it may share its
    section with a pass that has none. ``needs`` are passes without whose rewrite it may not apply, be it asked for by
    name.
    """

    section: ClassVar[str]
    is_exact: ClassVar[bool]
    tolerance: ClassVar[float] = 0.0
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
            elif isinstance(setting, numbers.Real) and not isinstance(setting, int):
                object.__setattr__(self, field.name, float(setting))  # NumPy's, say, which no graph takes

    @property
    def compares_first_block(self) -> bool:
        """Whether the pass decides by how much the first block's results change from step to step."""
        return False

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


class PassFault(Exception):  # noqa: N818  (a verdict, caught by the backend, not an error of the user's)
    """A pass failed in a way that nobody foresaw, and left the trunk in no defined state.

    ``name`` is the pass's, ``declined`` the reason to give, and ``trunk`` what is left.
    """

    def __init__(self, name: str, declined: Declined, trunk: Trunk) -> None:
        super().__init__(name)
        self.name, self.declined, self.trunk = name, declined, trunk


def unforeseen(doing: str, error: Exception) -> Declined:
    """What becomes of an exception that nobody foresaw: a reason to leave the graph as it was, with a line in the log.

    Args:
        doing: what failed: the name of a pass, or of another stage.
        error: what it raised.

    Raises:
        Exception: the error itself where ``HVCOMPILE_STRICT`` is set, or where it is one of ours and raised on purpose.

    """
    is_on_purpose = isinstance(error, HvcompileError) and not isinstance(error, InvalidRewriteError)
    if is_on_purpose or os.environ.get(STRICT_VARIABLE, "0") not in {"", "0"}:
        raise error
    # Addresses differ from rank to rank, and the ranks compare reasons.
    message = re.sub(r"0x[0-9a-f]+", "0x...", next(iter(str(error).strip().splitlines()), ""))
    reason = f"it failed in a way that nobody foresaw: {type(error).__name__}: {message}"
    log.warning(
        "%s is left out: %s. This is a fault of hvcompile: please report it with the traceback, which "
        'TORCH_LOGS="+hvcompile" shows, and a dump holds',
        doing,
        reason,
    )
    log.debug("%s", doing, exc_info=error)
    return Declined(reason, doing, error)


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
    shared = shared_memory(trunk.module)
    if shared:
        raise InvalidRewriteError(f"{name} left calls that share memory: {shared}")
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
    faults: Mapping[str, Declined] | None = None,
) -> None:
    """Run the passes in order.

    Args:
        trunk: rewritten in place.
        passes: each with whether the user asked for it by name.
        observe: called with the pass's name and the trunk after each pass that changed it (dumps).
        journal: gains a row a pass, also where one raises.
        context: what the passes may know beside the graph; what depends on the passes is filled in.
        faults: names of passes that failed on this graph before, which are left out, and the reasons.

    Raises:
        RequestedPassError: a pass that was asked for by name could not apply.
        PassFault: another pass failed in a way that nobody foresaw.

    """
    faults, context = faults or {}, context or Context()
    running = [item for item, _ in passes if type(item).__name__ not in faults]
    for item, requested in passes:
        name, inputs = type(item).__name__, trunk.inputs
        if name in faults:
            _add_row(journal, item, faults[name].report(trunk.lists), {})
            continue
        compared = any(later.compares_first_block for later in running[running.index(item) + 1 :])
        known = dataclasses.replace(context, requested=requested, is_first_block_compared=compared)
        try:
            report, changes = _apply(item, trunk, known)
        except Exception as error:
            declined = unforeseen(name, error)
            _add_row(journal, item, declined.report(trunk.lists), {})
            if requested:
                raise _refusal(item, f"{declined.reason}; its traceback is this error's cause") from error
            raise PassFault(name, declined, trunk) from error
        _add_row(journal, item, report, changes)
        context = context.moved(inputs, trunk.inputs)
        if report.applied:
            observe(name, trunk)
        if requested and (report.unmet or not report.applied):
            raise _refusal(item, "; ".join(f"{what}: {why}" for what, why in report.unmet or report.declined))


def _apply(item: Pass, trunk: Trunk, context: Context) -> tuple[PassReport, dict[str, int]]:
    """Run a pass and check what it left; also says how the number of each operation changed."""
    signature, counts = _signature(trunk), op_counts(trunk)
    report = item.apply(trunk, context)
    _check(trunk, signature, type(item).__name__)
    changes = op_counts(trunk)
    changes.subtract(counts)
    return report, {op: n for op, n in sorted(changes.items()) if n}


def _add_row(journal: list[JournalRow], item: Pass, report: PassReport, op_changes: dict[str, int]) -> None:
    row = JournalRow(
        name=type(item).__name__,
        report=report,
        op_changes=op_changes,
        section=item.section,
        is_exact=item.is_exact,
        tolerance=item.tolerance,
        options={field.name: getattr(item, field.name) for field in dataclasses.fields(item)},
    )
    log.info("%s", row.line())
    journal.append(row)


def _refusal(item: Pass, reasons: str) -> RequestedPassError:
    return RequestedPassError(
        f"options ask for {item.section!r}, but {type(item).__name__} can't apply to this graph ({reasons}). "
        f"Drop {item.section!r} from options to run without it."
    )
