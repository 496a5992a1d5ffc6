"""Pieces of a model that Dynamo broke into several graphs: which piece a graph is, why, and what can be done."""

from __future__ import annotations

from torch import fx

from hvcompile.graph.nodes import is_parameter
from hvcompile.journal import Declined
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.fakes import value

LEAST_SHARE = 0.25
"""Of the weights of the model around it, what a part holds at least that denoises; a refiner holds a few percent."""

_SWITCH = "torch._dynamo.config.{} = True, set before the first call,"
_SHAPES, _SCALARS = map(_SWITCH.format, ("capture_dynamic_output_shape_ops", "capture_scalar_outputs"))


def piece_note(captured: fx.GraphModule) -> str:
    """Which piece of a model a graph is, why it is one, and what to do; empty where the graph may be the whole."""
    broke = dynamo.break_of(captured)
    if broke is not None:
        at = f"{broke.place} ({broke.line})" if broke.line else broke.place
        return f"this is a piece of the model, which Dynamo broke at {at}: {_why(broke.reason)}"
    caller = dynamo.caller()
    if caller is not None and caller[1]:
        return f"this is a piece of the model, called at {caller[0]}, where Dynamo broke the function around it"
    if caller is not None:
        return (
            f"this is a piece of the model, called at {caller[0]} by a function that Dynamo did not capture. It "
            "captures none that it would have to break inside a loop or a with statement; TORCH_LOGS=graph_breaks says "
            f"what broke it. If that is indexing by a mask, {_SHAPES} keeps it; if .item() or .tolist(), {_SCALARS} "
            "does"
        )
    return ""


def ends_early(captured: fx.GraphModule) -> Declined | None:
    """Why what leaves a graph is not what the model returns; None where it may be."""
    if dynamo.break_of(captured) is None:
        return None
    return Declined(
        "this graph is a piece of the model and ends where Dynamo broke it, so what leaves it is not what the model "
        "returns, and the sample that is denoised can't be told from its conditions"
    )


def is_minor(captured: fx.GraphModule) -> Declined | None:
    """Why a graph is a small part of a model; None where it isn't.

    An embedder or a refiner may look like a model of its own: what it is given has the shape of what it returns, and it
    takes the timestep. What is given there is a prompt.
    """
    around = dynamo.outermost_caller()
    if around is None:
        return None
    placeholders = captured.graph.find_nodes(op="placeholder")
    held = sum(value(node).numel() for node in placeholders if is_parameter(node))
    total = sum(parameter.numel() for parameter in around.parameters())
    if held >= LEAST_SHARE * total:
        return None
    return Declined(
        f"this graph holds {held / total:.0%} of the weights of the {type(around).__name__} that it is a part of: what "
        "it takes need not be the sample that is denoised"
    )


def _why(reason: str) -> str:
    """Dynamo's reason for a break in one sentence, with what can be done."""
    if "capture_dynamic_output_shape_ops" in reason:
        return f"the length of a result depends on data. {_SHAPES} keeps it in the graph"
    if "capture_scalar_outputs" in reason:
        return f"a number is read from a tensor. {_SCALARS} keeps that in the graph, and may move the break to later"
    if "generic_jump" in reason or "branching" in reason:
        return (
            "a branch depends on a tensor's content, so no option keeps the model whole, fullgraph=True neither. What "
            "comes after it is a piece of its own, where blocks are found and rewritten as in a whole model"
        )
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "for no stated reason")
    return f"{first}. fullgraph=True makes that an error, which tells more"
