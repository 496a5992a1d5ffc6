"""Whether a step may reuse the last computed one: the parts of the first-block cache's decision, as graph code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvcompile.ranks import collectives
from hvcompile.ranks.fingerprints import hash_of
from hvcompile.rewriting import forecast
from hvcompile.rewriting.forecast import NO_FORECAST, Forecasting, Products


def new_generation(
    steps: Any,
    *,
    contents: Any,
    last_contents: Any,
    clock: Any,
    last_clock: Any,
    direction: Any,
    sample: Any,
    last_sample: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """Whether a step begins a generation, its number there, and what the next step compares with.

    Args:
        steps: done in this generation, int64 scalar.
        contents: of weights and conditions, int64 ``[N]``: see ``contents``.
        last_contents: those of the step before, same shape.
        clock: this step's timesteps, float64 ``[K]``.
        last_clock: those of the step before, same shape.
        direction: sign of the clock's movement in this generation, 0 where it has not moved yet, same shape.
        sample: what is denoised, any shape.
        last_sample: that of the step before, same shape.

    Returns:
        A bool scalar; an int64 scalar, from 0; and the next ``direction``, ``last_clock``, ``last_contents`` and
        ``last_sample``. A call that repeats a generation's first one, as where that was broken off, is the first too.

    """
    moved = (clock - last_clock).sign()
    turned_back = (moved * direction < 0).any()
    # Two generations of one step each look like two steps of one. They differ in the sample where no clock has
    # moved, and where one of several has (guidance is one too) they may have begun from the same sample.
    has_moved, is_same_sample = moved != 0, (sample == last_sample).all()
    is_other_guidance = has_moved.any() & has_moved.logical_not().any() & is_same_sample
    stands, is_start = has_moved.any().logical_not(), (direction == 0).all()
    is_other_sample = stands & is_same_sample.logical_not()
    # The host has found this state by what it can see of weights and conditions: the same, unmodified tensors. Those
    # may have been written to all the same (a LoRA that was merged or swapped), and then this is another model's step.
    is_other = (contents != last_contents).any()
    is_new = (steps == 0) | is_other | turned_back | (is_start & (is_other_sample | is_other_guidance))
    number = torch.where(is_new | (is_start & stands), torch.zeros_like(steps), steps)
    moved = torch.where(moved == 0, direction, moved)
    follow = {
        "direction": torch.where(is_new, torch.zeros_like(moved), moved),
        "last_clock": clock.clone(),
        "last_contents": contents.clone(),
        # It comes back as state, which is contiguous, whatever the sample's layout is.
        "last_sample": sample.clone(memory_format=torch.contiguous_format),
    }
    return is_new, number, follow


def contents(*, weights: Any, fakes: Mapping[str, torch.Tensor], **conditions: Any) -> dict[str, Any]:
    """What tells whether weights and conditions hold what they did, as graph code.

    Args:
        weights: the weights' content, int64 scalar; see ``trunk.Trunk.weights_content``.
        fakes: the fake value of each condition.
        conditions: tensors of any shape and dtype.

    Returns:
        "contents", int64 ``[1 + conditions]``: the first, and a hash of all of each condition.

    """
    device = fakes["weights"].device
    hashes = [hash_of(tensor, fakes[name]).to(device) for name, tensor in conditions.items()]
    return {"contents": torch.stack([weights, *hashes])}


def counted(steps: Any, streak: Any, reused: Any) -> Any:
    """The next counters, int64 ``[steps done, hits in a row]``, after a step of this number; see ``decide``."""
    return torch.stack([steps + 1, torch.where(reused, streak + 1, torch.zeros_like(streak))])


BITS = 62
"""Of a word: those of an int64, less its sign and one to spare."""


def is_one_of(number: Any, numbers: Sequence[int]) -> Any:
    """Whether a number is one of those given, as a bool scalar: a bit of a constant, not a comparison with each.

    Args:
        number: int64 scalar, 0 or more.
        numbers: 0 or more each.

    """
    words: dict[int, int] = {}
    for item in numbers:
        words[item // BITS] = words.get(item // BITS, 0) | 1 << item % BITS
    found = torch.zeros_like(number, dtype=torch.bool)
    for place, word in words.items():
        bit = number - place * BITS
        is_within = (bit >= 0) & (bit < BITS)
        found = found | (is_within & ((torch.full_like(number, word) >> bit.clamp(0, BITS - 1)) % 2 == 1))
    return found


def near_end(last_steps: int, is_new: Any, *, past_clocks: Any, last_clock: Any, clock: Any) -> tuple[Any, Any, Any]:
    """Whether a step is one of the last of its generation.

    Args:
        last_steps: how many timesteps are the last ones.
        is_new: whether the step begins a generation, bool scalar.
        past_clocks: the two values that each clock had before its last, float64 ``[2, K]``, oldest first.
        last_clock: the timesteps of the step before, float64 ``[K]``.
        clock: this step's, same shape.

    Returns:
        Whether that can be told (there are three timesteps), whether it is one, both bool scalars; and the two
        rows of the next ``past_clocks``.

    """
    # A generation begins with three equal values; a value that comes again changes nothing.
    earliest, earlier = torch.where(is_new, torch.stack([clock, clock]), past_clocks)
    last = torch.where(is_new, clock, last_clock)
    earliest, earlier = torch.where(clock == last, earliest, earlier), torch.where(clock == last, earlier, last)
    is_known = ((earliest != earlier) & (earlier != clock)).any()
    is_near_end = (steps_left(earliest, earlier, clock) < last_steps + 0.5).any()
    return is_known, is_near_end, [earliest, earlier]


def steps_left(earlier: Any, last: Any, clock: Any) -> Any:
    """Steps until each clock reaches its end, this one included; infinite for a clock without three distinct values.

    The clock is taken as a projective function of the step number (a constant cross-ratio): exact for even spacing
    and for flow matching's shift ``s*x / (1 + (s - 1)*x)`` of it. Arguments are float64 ``[K]``, oldest first.
    """
    rises = clock > last
    end = torch.where(rises, torch.where(clock <= 1, torch.ones_like(clock), torch.full_like(clock, 1000.0)), 0.0)
    ratio = (earlier - clock) * (last - end) / ((last - clock) * (earlier - end))
    left = 2 * (ratio - 1) / (2 - ratio)
    is_moving = (earlier != last) & (last != clock)
    return torch.where(is_moving, left, torch.full_like(clock, math.inf))


def relative_change(
    residual: Any,
    first: Any,
    flags: list[Any],
    *,
    forecasting: Forecasting = NO_FORECAST,
    is_ours: Any = None,
    group: str | None = None,
) -> tuple[Any, list[Any], Products, list[Any]]:
    """How much a residual has changed, and what holds on all ranks; over a group, where there is one.

    Args:
        residual: of this step, any shape.
        first: of the last computed step, same shape.
        flags: what is so on this rank, such as whether it may reuse, each a bool scalar.
        forecasting: what a forecast is made of, on this rank.
        is_ours: which of its elements count on this rank, bool, broadcasts to it; None for all.
        group: name of the process group whose ranks decide alike; None for a single rank.

    Returns:
        The mean absolute difference over the mean absolute value of ``first``, a float32 scalar; for each flag whether
        it is so on all ranks, a bool scalar; the inner products that a forecast is made of, where there is one; and for
        each of its differences whether all ranks have computed enough steps.

    """
    moved = residual.float() - first.float()
    change, extent = moved.abs(), first.float().abs()
    products = {}
    differences, enough = forecasting.differences, forecasting.enough
    if differences:
        vectors = [residual.float(), moved, *(item.float() for item in differences)]
        products = {pair: vectors[pair[0]] * vectors[pair[1]] for pair in forecast.pairs(len(differences))}
    if group is None:
        found = {pair: item.sum() for pair, item in products.items()}
        return change.mean() / extent.mean(), flags, found, enough
    sums = [
        (item if is_ours is None else torch.where(is_ours, item, torch.zeros_like(item))).sum()
        for item in (change, extent, *products.values())
    ]
    # Nor may one forecast what another can't.
    lacking = _lacking([*flags, *enough], sums[0].dtype)
    sums = collectives.total(torch.stack([*sums, *lacking]), group)
    found = {pair: sums[place] for place, pair in enumerate(products, 2)}
    agreed = [sums[2 + len(found) + place] == 0 for place in range(len(lacking))]
    return sums[0] / sums[1], agreed[: len(flags)], found, agreed[len(flags) :]


def on_all_ranks(flags: Sequence[Any], group: str | None) -> list[Any]:
    """For each flag, a bool scalar, whether it is so on all ranks of a group; the flags where there is no group."""
    if group is None:
        return list(flags)
    sums = collectives.total(torch.stack(_lacking(flags, torch.float32)), group)
    return [sums[place] == 0 for place in range(len(flags))]


def _lacking(flags: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """What sums over ranks to 0 where a flag is so on all of them.

    One rank that may not reuse (its state was reset) keeps all from it: they must take the same branch.
    """
    return [flag.logical_not().to(dtype) for flag in flags]
