"""Forecasts of what a skipped step would have computed, from the last computed steps, as graph code.

A residual R is taken to go on from the last computed one, R0, along the differences between the last computed ones::

    R = R0 + c1 * (R0 - R1) + c2 * (R1 - R2)

Every stream that is skipped takes the same two coefficients, and so does block 1, whose residual is known in each step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.float8.format import DTYPE, LARGEST, SMALLEST_MAGNITUDE
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.branch import Branch

RIDGE = 1e-3
"""Of the least squares, as a share of each difference's square: it keeps two that are almost parallel from
cancelling."""

CHANGE_SHARE = 0.5
"""Of block 1's change, that counts beside what its forecast has missed: blocks 2..N may turn where block 1 does not."""

MOST_AHEAD = 8.0
"""The largest coefficient, of either sign: a difference that is much smaller than the change says little of it."""

KEPT = {"full": None, "bfloat16": torch.bfloat16, "float8": DTYPE}
"""In which dtype differences are kept, None for that of what they are of."""

Products = Mapping[tuple[int, int], Any]
"""Inner products of block 1's residual (0), its change since the last computed step (1), and its differences (2, 3)."""


def pairs(order: int) -> list[tuple[int, int]]:
    """The pairs of which ``Products`` holds the inner product, for this many differences."""
    return [(0, 0), *itertools.combinations_with_replacement(range(1, order + 2), 2)]


def usable(products: Products, enough: Sequence[Any]) -> tuple[Products, list[Any]]:
    """Leave out the differences that say nothing of this generation.

    Args:
        products: of block 1.
        enough: for each difference, whether enough steps were computed for it, a bool scalar.

    Returns:
        The products, 0 where they are of a difference that is left out; and for each difference whether it may be
        used: there were enough steps, of numbers, and it is not nothing.

    """
    found: dict[tuple[int, int], Any] = dict(products)
    flags: list[Any] = []
    for vector, has_enough in enumerate(enough, 2):
        own = {pair: product for pair, product in found.items() if vector in pair}
        flag = has_enough & (found[vector, vector] > 0)
        for product in own.values():
            flag = flag & product.isfinite()
        flags.append(flag & flags[-1] if flags else flag)
        found |= {pair: torch.where(flags[-1], product, torch.zeros_like(product)) for pair, product in own.items()}
    return found, flags


def along_first_block(products: Products, flags: Sequence[Any]) -> list[Any]:
    """Coefficients by which block 1's own differences come closest to its change, in least squares.

    Nothing is assumed of the schedule. The combination is no longer than the change itself, and vanishes where the
    change has nothing to do with those before it. So a forecast falls back on what was computed last where there is
    nothing to go on along. Where two differences would take more than ``MOST_AHEAD`` of one, the first is taken alone.

    Args:
        products: of block 1; see ``usable``.
        flags: for each of one or two differences, whether it may be used; see there too.

    Returns:
        A float32 scalar for each difference.

    Source: the alignment of trajectories by a probe in DiCache (arXiv:2508.17356), which takes a clamped ratio of norms
    for one difference; by least squares it has a sign, and is reduced-rank extrapolation for several.

    """
    nothing, one = torch.zeros_like(products[1, 2]), torch.ones_like(products[1, 2])
    square = torch.where(flags[0], products[2, 2] * (1 + RIDGE), one)
    first = products[1, 2] / square
    # Less of a projection is a projection's share: it leaves more of the change, and never more than all of it.
    alone = first.clamp(-MOST_AHEAD, MOST_AHEAD)
    if len(flags) == 1:
        return [alone]
    other_square = torch.where(flags[1], products[3, 3] * (1 + RIDGE), one)
    # Two equations, by Cramer's rule; each is scaled by its square, for a product of both may leave float32's range.
    second, other, across = products[1, 3] / other_square, products[2, 3] / square, products[2, 3] / other_square
    rest = 1 - other * across
    both = [(first - other * second) / rest, (second - across * first) / rest]
    is_within = flags[1] & (both[0].abs() <= MOST_AHEAD) & (both[1].abs() <= MOST_AHEAD)
    return [torch.where(is_within, both[0], alone), torch.where(is_within, both[1], nothing)]


def along_clock(clock: Any, computed_clocks: Any, enough: Any) -> Any:
    """The coefficient by which a residual goes on as straight in the timestep as between the last two computed steps.

    Args:
        clock: this step's timesteps, float64 ``[K]``; those that stand count for nothing.
        computed_clocks: those of the last computed step and of the one before it, float64 ``[2, K]``.
        enough: whether this generation has computed two steps, a bool scalar.

    Returns:
        A float32 scalar, at most ``MOST_AHEAD``; 0 where there is no line to go on along.

    Source: first-order TaylorSeer (arXiv:2503.06923), which counts in steps; in the timestep its line is right where
    steps get longer.

    """
    last, before = computed_clocks[0], computed_clocks[1]
    step = last - before
    square = (step * step).sum()
    ahead = ((clock - last) * step).sum() / square
    is_usable = enough & (square > 0) & ahead.isfinite()
    return torch.where(is_usable, ahead.clamp(-MOST_AHEAD, MOST_AHEAD), torch.zeros_like(ahead)).to(torch.float32)


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
        differences: of block 1's residual between the last computed steps, latest first, up to two; none for no
            forecast.
        num_computed: steps computed in this generation, int64 scalar; None where nothing is forecast.
        summed_error: of block 1's forecasts since the last computed step, float32 scalar; None where it judges nothing.

    """

    differences: Sequence[Any] = ()
    num_computed: Any = None
    summed_error: Any = None

    def within(self, is_new: Any) -> Forecasting:
        """The same, of a generation that begins anew where ``is_new``, a bool scalar, says so."""
        if not self.differences:
            return self
        num_computed = torch.where(is_new, torch.zeros_like(self.num_computed), self.num_computed)
        return dataclasses.replace(self, num_computed=num_computed)

    @property
    def enough(self) -> list[Any]:
        """For each difference, whether this rank has computed the steps that it lies between."""
        return [self.num_computed > place for place in range(1, len(self.differences) + 1)]

    def ahead(self, products: Products, enough: Sequence[Any]) -> Ahead:
        """The forecast of one step, given block 1's products and what all ranks have enough steps for."""
        if not self.differences:
            return Ahead(self)
        products, flags = usable(products, enough)
        return Ahead(self, products, along_first_block(products, flags))


NO_FORECAST = Forecasting()
SMALL_STATE = ("num_computed", "summed_error")
"""Fields of ``Forecasting`` that are state of a few numbers."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The forecast of one step: its coefficients, float32 scalars, and what they were made of."""

    made_of: Forecasting
    products: Products = dataclasses.field(default_factory=dict)
    coefficients: Sequence[Any] = ()

    def judged(self, change: Any) -> Any:
        """What is compared with the threshold: the change itself, or what block 1's forecasts have missed."""
        if self.made_of.summed_error is None:
            return change
        return self._missed + CHANGE_SHARE * change

    @functools.cached_property
    def _missed(self) -> Any:
        return self.made_of.summed_error + error(self.products, self.coefficients)

    def follow(self, reused: Any) -> dict[str, Any]:
        """The coefficients by name, and the next values of the small state, given whether the step is reused."""
        found = {f"ahead_{place}": item for place, item in enumerate(self.coefficients, 1)}
        if self.coefficients:
            found["num_computed"] = self.made_of.num_computed + reused.logical_not().to(torch.int64)
        if self.made_of.summed_error is not None:
            found["summed_error"] = torch.where(reused, self._missed, torch.zeros_like(self._missed))
        return found


def is_scaled(keep: str) -> bool:
    """Whether differences that are kept so, see ``KEPT``, have a scale each."""
    return keep == "float8"


def widened(difference: Any, scale: Any) -> Any:
    """A difference as float32, of what is kept of it; the scale is None where there is none."""
    return difference.float() if scale is None else difference.float() * scale


def narrowed(
    miss: Branch, difference: fx.Node, dtype: torch.dtype, *, is_scaled: bool
) -> tuple[fx.Node, fx.Node | None]:
    """Add what is kept of a difference of numbers, and its scale, float32, by which its largest element just fits.

    Args:
        miss: the branch of a step that is computed.
        difference: in it.
        dtype: to keep it in.
        is_scaled: whether it has a scale.

    """
    if dtype == value(difference).dtype:
        return difference, None
    if not is_scaled:
        return _converted(miss, difference, dtype), None
    wide = _converted(miss, difference, torch.float32)
    peak = miss.call(torch.amax, miss.call(torch.abs, wide), example=value(wide).amax())
    scale = miss.call(torch.clamp_min, miss.call(torch.div, peak, LARGEST), SMALLEST_MAGNITUDE)
    return _converted(miss, miss.call(torch.div, wide, scale), dtype), scale


def _converted(branch: Branch, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if value(node).dtype == dtype:
        return node
    return branch.call(torch.ops.prims.convert_element_type.default, node, dtype, example=value(node).to(dtype))


def restored(
    hit: Branch, states: Sequence[fx.Node], ahead: Sequence[fx.Node], scales: Sequence[fx.Node] = ()
) -> fx.Node:
    """Add what a residual is in a step that reuses: the last, or what it is forecast to be, where that is a number.

    Args:
        hit: the branch of such a step.
        states: outside it, the last computed residual and its differences, latest first.
        ahead: outside it, the coefficients, as many as differences.
        scales: outside it, those of the differences; none where they need none.

    """
    last, *differences = [hit.env[state] for state in states]
    if not differences:
        return last
    forecast = last
    dtype = value(last).dtype
    for place, (difference, coefficient) in enumerate(zip(differences, ahead, strict=True)):
        factor = hit.env[coefficient]
        if scales:
            factor = hit.call(torch.mul, factor, hit.env[scales[place]])
        forecast = hit.call(torch.add, forecast, hit.call(torch.mul, _converted(hit, difference, dtype), factor))
    is_number = hit.call(torch.isfinite, forecast, example=value(forecast).isfinite())
    return hit.call(torch.where, is_number, forecast, last, example=value(last))
