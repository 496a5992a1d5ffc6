"""The number of a step in its generation, inside the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import inline
from hvcompile.journal import Declined
from hvcompile.rewriting.following import clock_of
from hvcompile.rewriting.reuse import new_generation
from hvcompile.rewriting.skipping import why_unclear
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.roles import classify
from hvcompile.trunk.trunk import Trunk

PREFIX = "counted_"
STEPS = f"{PREFIX}steps"
"""Name of the state that holds how many steps are done."""


def why_not_counted(trunk: Trunk) -> Declined | None:
    """Why the steps of a generation can't be counted; None where they can."""
    unclear = why_unclear(trunk, classify(trunk))
    if unclear is None and trunk.earlier is not None:
        return Declined("the timestep is read in an earlier piece of the model, so its steps can't be counted here")
    return unclear


def add_step_number(trunk: Trunk, tag: str) -> fx.Node:
    """Count the steps of a generation, by what the first-block cache tells generations by: see ``new_generation``.

    Calls with other conditions, as guidance makes them, count apart.

    Args:
        trunk: of which ``why_not_counted`` says nothing; gains state, and the count before its first block.
        tag: the pass's name.

    Returns:
        A node of an int64 scalar, 0 in the first step.

    """
    roles = classify(trunk)
    assert roles.sample is not None
    stands_for = trunk.shared.nodes if trunk.shared is not None else {}
    sample = stands_for.get(roles.sample, roles.sample)
    anchor = trunk.blocks[0].call
    device = value(trunk.blocks[0].operands[0]).device
    clock = clock_of(trunk, [stands_for.get(node, node) for node in roles.clocks], device, anchor, tag)
    kept = {
        "steps": ((), torch.int64),
        "direction": (value(clock).shape, torch.float64),
        "last_clock": (value(clock).shape, torch.float64),
        "last_sample": (value(sample).shape, value(sample).dtype),
    }
    states = {name: trunk.add_state(f"{PREFIX}{name}", shape, dtype, device) for name, (shape, dtype) in kept.items()}

    def count(**held: Any) -> dict[str, Any]:
        same = torch.zeros_like(held["steps"])  # weights and conditions that change do not begin a generation
        _, number, follow = new_generation(**held, contents=same, last_contents=same)
        return {"number": number, "steps": number + 1, **{name: follow[name] for name in kept if name != "steps"}}

    given = {"clock": clock, "sample": sample} | {name: state.placeholder for name, state in states.items()}
    counted = inline(trunk.graph, count, given, before=anchor, tag=tag)
    for name, state in states.items():
        state.next_value = counted[name]
    return counted["number"]
