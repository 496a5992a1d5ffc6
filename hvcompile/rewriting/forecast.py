"""Forecasts of what a skipped step would have computed, from the last computed steps, as graph code.

A residual R is taken to go on from the last computed one, R0, along the differences between the last computed ones::

    R = R0 + c1 * (R0 - R1) + c2 * (R1 - R2)

Every stream that is skipped takes the same two coefficients, and so does block 1, whose residual is known in each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.torch_private.fakes import value
from hvcompile.trunk.branch import Branch

RIDGE = 1e-3
"""Of the least squares, as a share of each difference's square: it keeps two that are almost parallel from
cancelling."""

CHANGE_SHARE = 0.5
"""Of block 1's change, that counts beside what its forecast has missed: blocks 2..N may turn where block 1 does not."""

MOST_AHEAD = 4.0
"""The largest coefficient, of either sign: a difference that is much smaller than the change says little of it."""

Products = Mapping[tuple[int, int], Any]
"""Inner products of block 1's residual (0), its change since the last computed step (1), and its differences (2, 3)."""


def pairs(order: int) -> list[tuple[int, int]]:
    """The pairs of which ``Products`` holds the inner product, for this many differences."""
    vectors = range(1, order + 2)
    return [(0, 0), *((row, column) for row in vectors for column in vectors if row <= column)]


def along_first_block(products: Products, num_computed: Any, order: int) -> list[Any]:
    """Coefficients by which block 1's own differences come closest to its change, in least squares.

    Nothing is assumed of the schedule. The combination is no longer than the change itself, up to the ridge, and
    vanishes where the change has nothing to do with those before it. So a forecast falls back on what was computed last
    where there is nothing to go on along.

    Args:
        products: of block 1.
        num_computed: steps computed in this generation, int64 scalar; a coefficient is 0 where its difference reaches
            into the generation before.
        order: how many differences there are, 1 or 2.

    Returns:
        A float32 scalar for each difference.

    Source: the alignment of trajectories by a probe in DiCache (arXiv:2508.17356), which takes a clamped ratio of norms
    for one difference; by least squares it has a sign, and is reduced-rank extrapolation for several.

    """
    change, square = products[1, 2], products[2, 2] * (1 + RIDGE)
    if order == 1:
        return [_known(change / square, num_computed, 2)]
    is_known = num_computed > 2
    nothing = torch.zeros_like(square)
    other_change = torch.where(is_known, products[1, 3], nothing)
    other_square = torch.where(is_known, products[3, 3] * (1 + RIDGE), torch.ones_like(square))
    both = torch.where(is_known, products[2, 3], nothing)
    # Two equations, by Cramer's rule; each is scaled by its square, for a product of both may leave float32's range.
    first, second, other, across = change / square, other_change / other_square, both / square, both / other_square
    rest = 1 - other * across
    return [
        _known((first - other * second) / rest, num_computed, 2),
        _known((second - across * first) / rest, num_computed, 3),
    ]


def along_clock(clock: Any, computed_clocks: Any, num_computed: Any, order: int) -> list[Any]:
    """Coefficients of the polynomial through the last computed steps, as a function of the clock.

    Args:
        clock: this step's timesteps, float64 ``[K]``; where there are several, their sum is the clock.
        computed_clocks: sums at the last computed steps, float64 ``[3]``, latest first.
        num_computed: as of ``along_first_block``.
        order: of the polynomial, 1 or 2; lower where too few steps were computed.

    Returns:
        A float32 scalar for each difference.

    Source: Newton's interpolation; TaylorSeer (arXiv:2503.06923) forecasts features of skipped steps so.

    """
    now = clock.sum()
    last, earlier, earliest = computed_clocks[0], computed_clocks[1], computed_clocks[2]
    linear = (now - last) / (last - earlier)
    if order == 1:
        return [_known(linear, num_computed, 2)]
    bend = (now - earlier) / (last - earliest)
    is_bent = (num_computed > 2) & bend.isfinite()
    of_second = -(now - last) * bend / (earlier - earliest)
    first = linear * (1 + torch.where(is_bent, bend, torch.zeros_like(bend)))
    return [_known(first, num_computed, 2), _known(of_second, num_computed, 3)]


def _known(coefficient: Any, num_computed: Any, needed: int) -> Any:
    """A coefficient as float32, bounded; 0 where too few steps were computed for it, or where it is no number."""
    is_known = (num_computed >= needed) & coefficient.isfinite()
    known = torch.where(is_known, coefficient, torch.zeros_like(coefficient))
    return known.clamp(-MOST_AHEAD, MOST_AHEAD).float()


def error(products: Products, coefficients: Sequence[Any]) -> Any:
    """How far block 1's forecast is from its residual, relative to that; both as Euclidean norms, a float32 scalar.

    Taken from inner products, so that no stream is read again: exact to about 3e-4 of the change since the last
    computed step, in float32.
    """
    square = products[1, 1]
    for place, coefficient in enumerate(coefficients, 2):
        square = square - 2 * coefficient * products[1, place] + coefficient * coefficient * products[place, place]
    if len(coefficients) > 1:
        square = square + 2 * coefficients[0] * coefficients[1] * products[2, 3]
    return (square.clamp(min=0) / products[0, 0]).sqrt()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecasting:
    """What a step's forecast is made of.

    Attributes:
        order: how many differences are gone on along, up to 2; 0 for no forecast.
        differences: block 1's, between the last computed steps, latest first; none where it is not forecast itself.
        num_computed: steps computed in this generation, int64 scalar; None where nothing is forecast.
        computed_clocks: float64 ``[3]``, see ``along_clock``; None where block 1 gives the coefficients.
        summed_error: of block 1's forecasts since the last computed step, float32 scalar; None where it judges nothing.

    """

    order: int = 0
    differences: Sequence[Any] = ()
    num_computed: Any = None
    computed_clocks: Any = None
    summed_error: Any = None

    def ahead(self, products: Products, clock: Any, is_new: Any) -> Ahead:
        """The forecast of one step.

        Args:
            products: of block 1.
            clock: this step's timesteps, float64 ``[K]``.
            is_new: whether the step begins a generation, bool scalar.

        """
        if not self.order:
            return Ahead(self, products, clock)
        num_computed = torch.where(is_new, torch.zeros_like(self.num_computed), self.num_computed)
        if self.computed_clocks is None:
            coefficients = along_first_block(products, num_computed, self.order)
        else:
            coefficients = along_clock(clock, self.computed_clocks, num_computed, self.order)
        return Ahead(self, products, clock, num_computed, coefficients)


NO_FORECAST = Forecasting()
SMALL_STATE = ("num_computed", "computed_clocks", "summed_error")
"""Fields of ``Forecasting`` that are state of a few numbers."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The forecast of one step: its coefficients, float32 scalars, and what they were made of."""

    made_of: Forecasting
    products: Products
    clock: Any
    num_computed: Any = None
    coefficients: Sequence[Any] = ()

    def judged(self, change: Any) -> Any:
        """What is compared with the threshold: the change itself, or what block 1's forecasts have missed."""
        if self.made_of.summed_error is None:
            return change
        return self._missed() + CHANGE_SHARE * change

    def _missed(self) -> Any:
        return self.made_of.summed_error + error(self.products, self.coefficients)

    def follow(self, reused: Any) -> dict[str, Any]:
        """The coefficients by name, and the next values of the small state, given whether the step is reused."""
        found = {f"ahead_{place}": item for place, item in enumerate(self.coefficients, 1)}
        if self.num_computed is not None:
            found["num_computed"] = self.num_computed + reused.logical_not().to(torch.int64)
        if self.made_of.summed_error is not None:
            missed = self._missed()
            found["summed_error"] = torch.where(reused, missed, torch.zeros_like(missed))
        if self.made_of.computed_clocks is not None:
            clocks = self.made_of.computed_clocks
            now = torch.stack([self.clock.sum(), clocks[0], clocks[1]])
            found["computed_clocks"] = torch.where(reused, clocks, now)
        return found


def restored(hit: Branch, states: Sequence[fx.Node], ahead: Sequence[fx.Node]) -> fx.Node:
    """Add what a residual is in a step that reuses: the last, or what it is forecast to be, where that is a number.

    Args:
        hit: the branch of such a step.
        states: outside it, the last computed residual and its differences, latest first.
        ahead: outside it, the coefficients, as many as differences.

    """
    last, *differences = [hit.env[state] for state in states]
    if not differences:
        return last
    forecast = last
    for difference, coefficient in zip(differences, ahead, strict=True):
        forecast = hit.call(torch.add, forecast, hit.call(torch.mul, difference, hit.env[coefficient]))
    is_number = hit.call(torch.isfinite, forecast, example=value(forecast).isfinite())
    return hit.call(torch.where, is_number, forecast, last, example=value(last))
