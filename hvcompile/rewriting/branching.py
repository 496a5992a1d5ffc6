"""The branch that computes the blocks, the one that reuses what they changed, and the state between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from hvcompile.graph.aliasing import refresh
from hvcompile.graph.nodes import settle
from hvcompile.rewriting.forecast import KEPT, is_scaled, narrowed, restored
from hvcompile.rewriting.guidance import RECORD
from hvcompile.rewriting.skipping import SkipPlan, counterparts_of, operands_of_branches
from hvcompile.runtime.left_state import LEAVE
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.branch import Branch, add_cond, is_submodule
from hvcompile.trunk.trunk import State, Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached:
    """The state of the cache.

    Attributes:
        residuals: those of each stream that leaves, then block 1's where it is computed in every step; each with the
            differences between the last computed ones, latest first.
        scales: for each of those, the scale of each of its differences; none where they need none.
        is_number: whether all of them are finite, where block 1 doesn't tell; else None.
        small: what decisions follow.

    """

    residuals: list[list[State]]
    scales: list[list[State]]
    is_number: State | None
    small: dict[str, State]

    @property
    def first(self) -> list[State]:
        """Block 1's residual and its differences."""
        return self.residuals[-1]

    @property
    def kept(self) -> list[State]:
        """What only a computed step writes."""
        residuals = [state for states in (*self.residuals, *self.scales) for state in states]
        return residuals if self.is_number is None else [*residuals, self.is_number]


def add_state(
    trunk: Trunk,
    plan: SkipPlan,
    given: Mapping[str, fx.Node],
    *,
    order: int,
    keep: str,
    small: Mapping[str, torch.dtype],
) -> Cached:
    """Add what a cache keeps.

    Args:
        trunk: gains the state.
        plan: what is skipped.
        given: the nodes of "clock", "contents" and, where guidance's calls decide together, "marks".
        order: how many differences are kept with each residual.
        keep: in which dtype these are, see ``forecast.KEPT``.
        small: further state, scalars or a few rows of clocks, by its name.

    """
    main, sample, clock_shape = value(plan.stream_in), value(plan.sample), value(given["clock"]).shape

    def kept(name: str, like: torch.Tensor) -> list[State]:
        dtypes = {name: like.dtype}
        dtypes |= {f"{name}_difference_{place}": KEPT[keep] or like.dtype for place in range(1, order + 1)}
        return [trunk.add_state(item, like.shape, dtype, like.device) for item, dtype in dtypes.items()]

    first = [kept("first_residual", value(plan.stream_out))] if plan.stream_out is not None else []
    residuals = [*(kept(f"residual_{place}", value(node)) for place, node in enumerate(plan.leaving)), *first]
    num_scales = order if is_scaled(keep) else 0
    scales = [
        [
            trunk.add_state(f"{last.name}_scale_{place}", (), torch.float32, last.device)
            for place in range(1, num_scales + 1)
        ]
        for last, *_ in residuals
    ]
    is_number = None if first else trunk.add_state("is_number", (), torch.bool, main.device)
    states = {
        "counters": trunk.add_state("counters", (2,), torch.int64, main.device),
        "direction": trunk.add_state("direction", clock_shape, torch.float64, main.device),
        "last_clock": trunk.add_state("last_clock", clock_shape, torch.float64, main.device),
        "last_contents": trunk.add_state("last_contents", value(given["contents"]).shape, torch.int64, main.device),
        "last_sample": trunk.add_state("last_sample", sample.shape, sample.dtype, sample.device),
    }
    for name, dtype in small.items():
        shape = (2, *clock_shape) if name in ROWS_OF_CLOCKS else ()
        states[name] = trunk.add_state(name, shape, dtype, main.device)
    if "marks" in given:
        states["past_marks"] = trunk.add_state("past_marks", (2,), torch.int64, main.device)
        kinds = [(clock_shape, torch.float64), ((value(given["marks"]).shape[0] + 1,), torch.int64)]
        kinds += [((), torch.bool), ((), torch.int64)]
        for name, (shape, dtype) in zip(RECORD, kinds, strict=True):
            states[name] = trunk.add_state(name, shape, dtype, main.device)
            states[name].is_shared = True
    return Cached(residuals=residuals, scales=scales, is_number=is_number, small=states)


def small_state(
    *, last_steps_computed: int, forecast: int, front_blocks: int, decide_by: str
) -> dict[str, torch.dtype]:
    """What a cache of these options keeps beside what every decision follows; see ``passes.FirstBlockCache``."""
    wanted = {
        "past_clocks": (torch.float64, last_steps_computed > 0),
        "num_computed": (torch.int64, forecast > 0),
        "computed_clocks": (torch.float64, forecast > 0 and not front_blocks),
        "summed_error": (torch.float32, decide_by == "error"),
    }
    return {name: dtype for name, (dtype, is_wanted) in wanted.items() if is_wanted}


ROWS_OF_CLOCKS = ("past_clocks", "computed_clocks")
"""State of two earlier clocks each; what else is small is a scalar."""


def add_branches(
    trunk: Trunk, plan: SkipPlan, cached: Cached, reused: fx.Node, ahead: Sequence[fx.Node], anchor: fx.Node, tag: str
) -> None:
    """Put the blocks into the second branch of a ``cond`` on ``reused``; the first goes on without them.

    Args:
        trunk: what follows its blocks reads the ``cond`` from here on.
        plan: what moves into the branch.
        cached: gains its next values.
        reused: the predicate, a bool scalar.
        ahead: the coefficients of the forecast, a float32 scalar for each difference that is kept.
        anchor: the node before which the new ones stand.
        tag: the pass's name.

    """
    counterparts = counterparts_of(trunk, plan, anchor, tag)
    ends = [plan.stream_in, plan.stream_out] if plan.stream_out is not None else []
    read = [*counterparts, *ends, *ahead, *(state.placeholder for state in cached.kept)]
    passed = operands_of_branches(trunk, plan, read, anchor, tag)
    miss, hit = Branch(trunk.module, passed, tag), Branch(trunk.module, passed, tag)

    miss.copy(plan.moved)
    for block in trunk.blocks[plan.front_blocks :]:
        block.call = miss.env[block.call]
    computed = [miss.env[node] for node in plan.leaving]
    changes = [miss.call(torch.sub, now, miss.env[base]) for now, base in zip(computed, counterparts, strict=True)]
    if plan.stream_out is not None:
        # Taken anew where it is kept: a step that reuses need not write it.
        changes.append(miss.call(torch.sub, miss.env[plan.stream_out], miss.env[plan.stream_in]))
    handed_on = [
        hit.call(torch.add, hit.env[base], restored(hit, _placeholders(residual), ahead, _placeholders(scales)))
        for base, residual, scales in zip(counterparts, cached.residuals, cached.scales, strict=False)
    ]
    left = [hit.make(LEAVE, hit.env[state.placeholder]) for state in cached.kept]
    branches = {
        "cache_hit": (hit, [*handed_on, *left]),
        "cache_miss": (miss, [*computed, *_kept(miss, cached, changes)]),
    }
    outputs = add_cond(trunk.module, reused, branches, passed.values(), before=anchor)
    _take_results(trunk, plan, cached, outputs)


def _placeholders(states: Sequence[State]) -> list[fx.Node]:
    return [state.placeholder for state in states]


def _kept(miss: Branch, cached: Cached, changes: Sequence[fx.Node]) -> list[fx.Node]:
    """What a computed step keeps of its changes, in the order of ``Cached.kept``."""
    kept: list[fx.Node] = []
    kept_scales: list[fx.Node] = []
    for now, (last, *differences), scales in zip(changes, cached.residuals, cached.scales, strict=True):
        kept.append(now)
        if differences:
            # What is no number must not outlive the step: nothing is a difference that leads nowhere.
            moved = miss.call(torch.nan_to_num, miss.call(torch.sub, now, miss.env[last.placeholder]), 0.0, 0.0, 0.0)
            moved, scale = narrowed(miss, moved, differences[0].dtype, is_scaled=bool(scales))
            kept.append(moved)
            kept_scales += [] if scale is None else [scale]
        kept += [miss.env[state.placeholder] for state in differences[:-1]]
        kept_scales += [miss.env[state.placeholder] for state in scales[:-1]]
    kept += kept_scales
    if cached.is_number is not None:
        flags = []
        for now in changes:
            finite = miss.call(torch.isfinite, now, example=value(now).isfinite())
            flags.append(miss.call(torch.all, finite, example=value(finite).all()))
        every = flags[0]
        for flag in flags[1:]:
            every = miss.call(torch.logical_and, every, flag)
        kept.append(every)
    return kept


def _take_results(trunk: Trunk, plan: SkipPlan, cached: Cached, outputs: Sequence[fx.Node]) -> None:
    """Have what follows the blocks read the ``cond``, and erase what has moved into it."""
    core = set(plan.moved)
    bodies = {item for node in plan.moved for item in node.all_input_nodes if item not in core and is_submodule(item)}
    for node, replacement in zip(plan.leaving, outputs, strict=False):
        for user in list(node.users):
            if user not in core:
                user.replace_input_with(node, replacement)
    for state, output in zip(cached.kept, outputs[len(plan.leaving) :], strict=True):
        state.next_value, state.may_be_left = output, True
    for node in reversed(plan.moved):
        trunk.graph.erase_node(node)
    for node in bodies:
        if not node.users:
            trunk.graph.erase_node(node)
    settle(trunk.graph)
    refresh(trunk.graph, set(outputs))
