"""What is said of a graph that is compiled as it was captured, without any rewrite, and where that is an error."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.errors import OffloadedWeightError, QuantizedWeightError, RequestedPassError
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.journal import Declined, JournalRow, PassReport
from hvcompile.options import Options
from hvcompile.rewriting.fetching import fetch_in_plain, is_kept_on_host
from hvcompile.runtime.hooks import describe, foreign_hooks, had_hooks, hooks_between_layers
from hvcompile.runtime.state import state_while_compiling
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.observer import Observer

log = logging.getLogger(__name__)

OUTLINE = "outline"
"""Name of the journal's row of what was outlined, beside those of the passes."""


def leave_as_captured(
    declined: Declined,
    settings: Options,
    journal: list[JournalRow],
    observer: Observer,
    args: Sequence[Any],
    piece: str = "",
) -> None:
    """Say why a graph is compiled without any rewrite, or raise where that can't be.

    Args:
        declined: the reason.
        settings: a pass that they ask for by name is an error, unless another piece of the model may have it.
        journal: gains the reason.
        observer: is told.
        args: of the call that is being compiled.
        piece: which piece of a broken model the graph is; empty where it may be the whole.

    """
    reason = f"{declined.what}: {declined.reason}" if declined.what else declined.reason
    for arg in args:
        if isinstance(arg, QuantizedWeight):
            raise QuantizedWeightError(
                f"{arg.path} has been kept in float8 alone since {arg.since}, and this graph of the model"
                f" can't be rewritten: {reason}. What helps: {arg.way_back}"
            ) from declined.cause
    if piece:
        reason += f"; {piece}"
    for item, requested in settings.passes:
        if requested and not piece:
            raise RequestedPassError(
                f"options ask for {item.section!r}, but this graph can't be rewritten: {reason}. "
                f"Drop {item.section!r} from options to compile it as it is."
            ) from declined.cause
    asked = ", ".join(item.section for item, requested in settings.passes if requested)
    reason += f"; options ask for {asked}, which another piece may have" if asked else ""
    warn_of_plain(settings.lower, reason)
    journal.append(JournalRow(name=OUTLINE, report=PassReport(declined=(("graph", reason),)), op_changes={}))
    observer.on_rewritten(None, journal, None)


def fetched_as_captured(
    captured: fx.GraphModule, example_inputs: Sequence[Any], args: Sequence[Any]
) -> tuple[fx.GraphModule, Sequence[Any], list[int]]:
    """A graph that gets no rewrite, but brings the weights that are on the host where it reads them.

    Args:
        captured: as Dynamo gives it; not changed.
        example_inputs: one per placeholder.
        args: of the call that is being compiled.

    Raises:
        OffloadedWeightError: gradients are enabled, and such a weight requires them.

    Returns:
        The graph, what it is compiled for, and the places of these weights among the inputs.

    """
    hosted = [place for place, arg in enumerate(args) if is_kept_on_host(arg)]
    if not hosted:
        return captured, example_inputs, []
    trained = next((args[place] for place in hosted if torch.is_grad_enabled() and args[place].requires_grad), None)
    if trained is not None:
        raise OffloadedWeightError(
            f"{trained.path} is kept on the host since hvcompile.offload and can't be trained there: call the model "
            "under torch.no_grad() or torch.inference_mode(), or hvcompile.restore(model) first"
        )
    module, hosts = fetch_in_plain(captured, hosted)
    kept = [item for place, item in enumerate(example_inputs) if place not in hosted]
    return module, [*kept, *map(value, hosts)], hosted


def refuse_hooks(asked: Collection[str]) -> None:
    """Raise where hooks cut a model between its layers, so that no piece of it can have what options ask for by name.

    Args:
        asked: sections of passes that were asked for by name.

    Raises:
        RequestedPassError: names the hooks, and what to use instead.

    """
    found = state_while_compiling()
    hooks = hooks_between_layers(found[0]) if found is not None else []
    if found is not None and hooks:
        raise RequestedPassError(
            f"options ask for {', '.join(map(repr, sorted(asked)))}, but hooks cut this {type(found[0]).__name__} "
            f"between its layers: {describe(hooks)}"
        )


def warn_of_plain(lower: str, reason: str) -> None:
    """Say that a graph is compiled as captured, once a model and reason; where hooks break the model, name them."""
    found = state_while_compiling()
    if found is None:
        log.warning("hvfast left a graph to plain %s: %s", lower, reason)
        return
    model, state = found
    hooks = foreign_hooks(model)
    if not hooks and had_hooks(model):
        log.info(
            "hvfast left a graph to plain %s, the last before a model without its hooks is whole: %s", lower, reason
        )
    elif not hooks:
        level = logging.WARNING if state.is_news(reason) else logging.INFO
        log.log(level, "hvfast left a graph to plain %s: %s", lower, reason)
    elif state.is_news(text := describe(hooks)):
        log.warning(
            "hooks break this %s into several graphs, and hvfast leaves those without a trunk to plain %s: %s",
            *(type(model).__name__, lower, text),
        )
    else:
        log.info("hvfast left a graph to plain %s: %s", lower, reason)
