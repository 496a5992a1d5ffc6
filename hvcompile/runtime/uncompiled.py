"""Calls that run as they were written, since Dynamo compiles a function no more: they are counted and told of."""

from __future__ import annotations

import logging
import re

from hvcompile.runtime.state import states_called
from hvcompile.torch_private.limits import Refusal

log = logging.getLogger(__name__)

# Dynamo's number of a graph, before the guard that refused a call.
_NUMBER = re.compile(r"^\d+/\d+: ")


def count(refusal: Refusal) -> None:
    """Count a call that is not compiled, and say so once a model and function."""
    states = states_called(refusal.model, refusal.frame)
    news = [state.is_news(f"no more of {refusal.function}") for state in states]
    for state in states if not refusal.is_error else ():
        with state.lock:
            state.eager_calls += 1
    text = describe(refusal)
    log.log(logging.WARNING if any(news) or not news else logging.INFO, "%s", text)


def describe(refusal: Refusal) -> str:
    """What happened to a call, what kept changing, and what to do."""
    name = type(refusal.model).__name__ if refusal.model is not None else "function"
    what = "does not compile" if refusal.is_error else "runs, as it was written,"
    changing = "; ".join(dict.fromkeys(_NUMBER.sub("", reason) for reason in refusal.reasons[:1]))
    return (
        f"hvfast {what} a call of this {name} that fits none of its graphs: {refusal.function} reached its limit "
        f"{refusal.limit} ({refusal.value}). What kept changing: {changing or 'Dynamo does not say'}. Compile with "
        "dynamic=True, mark what changes by torch._dynamo.mark_dynamic, or raise "
        f"torch._dynamo.config.{refusal.limit}; hvcompile.stats counts such calls as eager_calls"
    )
