"""Which steps to compute where their number is fixed: the schedule whose forecasts are off by least.

Some clips are made with every step computed. From what their blocks made in each step follows what a forecast would
have been off in any step, from any two steps computed before it. So all schedules can be compared, and none is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvcompile.rewriting.forecast import MOST_AHEAD, RIDGE

COMPUTED = {"threshold": 0.0, "warmup_steps": 10**9}
"""Fields of the cache with which every step is computed, and what the blocks made is kept until the next."""
SAMPLED = 2**16
"""Elements of a stream that are looked at, evenly spaced."""
MOST_STEPS = 128
"""Of a generation: the work grows with the fourth power, and 128 steps take seconds."""

Products = dict[str, NDArray[np.float64]]
"""Of a stream by its name, the inner products of what it was in each step with what it was in each other, [T, T]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One generation, T steps.

    Attributes:
        clocks: the steps' timesteps, [T].
        first: of block 1's residual, see ``Products``.
        rest: of the changes over blocks 2..N, a stream each.
        whole: of those over all blocks; where block 1's is not known of a stream, the same as ``rest``.

    """

    clocks: NDArray[np.float64]
    first: NDArray[np.float64]
    rest: Products
    whole: Products

    def joined(self, others: Sequence[Trajectory]) -> Trajectory:
        """The same generation where other ranks have other parts of its streams."""
        return Trajectory(
            clocks=self.clocks,
            first=sum((other.first for other in others), self.first),
            rest=_summed([self.rest, *(other.rest for other in others)]),
            whole=_summed([self.whole, *(other.whole for other in others)]),
        )

    def record(self) -> dict[str, Any]:
        """As JSON."""
        streams = {"rest": self.rest, "whole": self.whole}
        lists = {kind: {name: item.tolist() for name, item in held.items()} for kind, held in streams.items()}
        return {"clocks": self.clocks.tolist(), "first": self.first.tolist(), **lists}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Trajectory:
        """From JSON."""
        rest, whole = (
            {name: np.asarray(products) for name, products in record[kind].items()} for kind in ("rest", "whole")
        )
        return cls(clocks=np.asarray(record["clocks"]), first=np.asarray(record["first"]), rest=rest, whole=whole)


def _summed(parts: Sequence[Products]) -> Products:
    return {name: sum((part[name] for part in parts[1:]), products) for name, products in parts[0].items()}


class Recorder:
    """A probe, see ``runtime.probing``, that records generations of which the cache computes every step."""

    def __init__(self) -> None:
        self._graphs: set[int] = set()
        self._steps: dict[int, list[dict[str, torch.Tensor]]] = {}
        self._done: list[Trajectory] = []
        self._is_whole = True

    def __call__(self, graph: int, slot: int, state: Mapping[str, torch.Tensor]) -> None:
        """Look at what a call has left; names are those that ``FirstBlockCache`` gives its state."""
        if "first_residual" not in state:
            return
        self._graphs.add(graph)
        place = int(state["counters"][0]) - 1
        if place == 0 and slot in self._steps:
            self._done.append(_trajectory(self._steps.pop(slot)))
        steps = self._steps.setdefault(slot, [])
        self._is_whole &= place == len(steps)
        streams = {name: tensor for name, tensor in state.items() if name.startswith(("first_residual", "residual_"))}
        steps.append({name: _sampled(tensor) for name, tensor in streams.items()})
        steps[-1]["clock"] = state["last_clock"].double().cpu().clone()

    def end(self) -> None:
        """Keep the products alone of what was recorded: its generations are over."""
        self._done += map(_trajectory, self._steps.values())
        self._steps.clear()

    def trajectories(self) -> list[Trajectory]:
        """What was recorded; nothing where generations can't be told apart, or differ in their number of steps."""
        self.end()
        lengths = {len(trajectory.clocks) for trajectory in self._done}
        is_alike = len(lengths) == 1 and min(lengths) > 1
        return self._done if is_alike and self._is_whole and len(self._graphs) == 1 else []


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), SAMPLED), dtype=torch.float64, device=flat.device)
    return flat[places.long()].float().cpu()


def _trajectory(steps: Sequence[Mapping[str, torch.Tensor]]) -> Trajectory:
    rows = {name: torch.stack([step[name] for step in steps]).double() for name in steps[0].keys() - {"clock"}}
    first = rows.pop("first_residual")
    whole = {name: changes + first if changes.shape == first.shape else changes for name, changes in rows.items()}
    clocks = torch.stack([step["clock"] for step in steps]).numpy()
    moving = clocks[:, np.ptp(clocks, axis=0).argmax()]
    return Trajectory(
        clocks=moving,
        first=(first @ first.T).numpy(),
        rest={name: (changes @ changes.T).numpy() for name, changes in rows.items()},
        whole={name: (changes @ changes.T).numpy() for name, changes in whole.items()},
    )


def errors(trajectory: Trajectory, front_blocks: int = 1) -> NDArray[np.float64]:
    """How far a forecast would be off, squared and relative to the streams, times the step's length.

    A sampler adds what the model predicts times the step's length. By that alone an error would count as its square,
    and the short steps at the start as nearly nothing. But all that follows is made of what they leave.

    Args:
        trajectory: of a generation.
        front_blocks: 1 where forecasts go as far as block 1 says, 0 where they go straight on in the timestep.

    Returns:
        For the last step computed but one, a, the last one, b, and a step t that is reused: at [a + 1, b, t]. At
        [0, b, t] where b is the only one, so that b is repeated. Infinite where it is no number; 0 but for a < b < t.

    """
    num_steps = len(trajectory.clocks)
    before, last, step = np.ogrid[:num_steps, :num_steps, :num_steps]
    ahead = _along_first_block(trajectory.first) if front_blocks else _along_clock(trajectory.clocks)
    found = np.zeros((num_steps + 1, num_steps, num_steps))
    for products in (trajectory.rest if front_blocks else trajectory.whole).values():
        change, difference = _square(products, last, step), _square(products, before, last)
        turned = products[last, step] - products[last, last] - products[before, step] + products[before, last]
        scale = np.trace(products) / num_steps
        if scale == 0:  # a stream that the blocks leave as it is
            continue
        missed = change - 2 * ahead * turned + ahead * ahead * difference
        found[1:] += missed.clip(min=0) / scale
        found[:1] += change.clip(min=0) / scale
    found *= _lengths(trajectory.clocks)
    known = np.concatenate([np.broadcast_to(last < step, found[:1].shape), (before < last) & (last < step)])
    return np.where(known, np.where(np.isfinite(found), found, np.inf), 0.0)


def _along_first_block(first: NDArray[np.float64]) -> NDArray[np.float64]:
    """The coefficient of a forecast, at [a, b, t], see ``rewriting.forecast.along_first_block``."""
    before, last, step = np.ogrid[: len(first), : len(first), : len(first)]
    along = _square(first, before, last)
    across = first[last, step] - first[last, last] - first[before, step] + first[before, last]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(along > 0, (across / (along * (1 + RIDGE))).clip(-MOST_AHEAD, MOST_AHEAD), 0.0)


def _along_clock(clocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same of ``rewriting.forecast.along_clock``."""
    before, last, step = np.ix_(clocks, clocks, clocks)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(last != before, ((step - last) / (last - before)).clip(-MOST_AHEAD, MOST_AHEAD), 0.0)


def _square(products: NDArray[np.float64], one: Any, other: Any) -> NDArray[np.float64]:
    """The squared distance of two steps."""
    square: NDArray[np.float64] = products[one, one] - 2 * products[one, other] + products[other, other]
    return square


def _lengths(clocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """How long each step is; one whose clock falls ends at 0, another's last one is as long as the one before.

    Second-order samplers call twice at a time. A call whose clock stands until the next corrects the step before, and
    is as long.
    """
    differences = np.abs(np.diff(clocks))
    moving = np.flatnonzero(differences)
    if not moving.size:
        return np.ones(len(clocks))
    places = np.searchsorted(moving, np.arange(len(differences)), side="right") - 1
    differences = differences[moving[places.clip(min=0)]]
    return np.append(differences, clocks[-1] if 0 < clocks[-1] < clocks[0] else differences[-1])


def schedules(trajectories: Sequence[Trajectory], front_blocks: int = 1) -> dict[int, tuple[int, ...]]:
    """For each number of steps computed, those steps whose forecasts are off by least, by squares, in all.

    Args:
        trajectories: of generations of T steps each; without one, or with more than ``MOST_STEPS``, nothing is found.
        front_blocks: see ``errors``.

    Returns:
        The steps, from 0, by their number, 1 to T. None stands there whose error is no number.

    Source: schedules as shortest paths in a graph of the steps are LeMiCa's (arXiv:2511.00090), which repeats what was
    computed last, measures each edge by a generation of its own, and takes the path whose largest error is least.

    """
    if not trajectories or len(trajectories[0].clocks) > MOST_STEPS:
        return {}
    costs = np.mean([errors(trajectory, front_blocks) for trajectory in trajectories], axis=0)
    num_steps = costs.shape[1]
    # runs[a + 1, b, c]: of all steps between b and c, where a and b were computed last.
    runs = np.concatenate([np.zeros((*costs.shape[:2], 1)), costs.cumsum(axis=2)], axis=2)
    none = np.full((num_steps + 1, num_steps), np.inf)
    best = none.copy()
    best[0, 0] = 0.0  # the first step is always computed
    found: dict[int, tuple[int, ...]] = {}
    parents: list[NDArray[np.intp]] = []
    for number in range(1, num_steps + 1):
        whole = best + runs[:, :, num_steps]
        if np.isfinite(whole.min()):
            found[number] = _path(np.unravel_index(whole.argmin(), whole.shape), parents)
        # From (a, b) to (b, c): the best a of each.
        onward = best[:, :, None] + runs[:, :, :num_steps]
        onward = np.where(np.triu(np.ones((num_steps, num_steps), bool), 1), onward, np.inf)
        parents.append(onward.argmin(axis=0))
        best = none.copy()
        best[1:] = onward.min(axis=0)
    return found


def why_none(trajectories: Sequence[Trajectory]) -> str:
    """Why ``schedules`` finds none that leaves a step out."""
    if not trajectories:
        return "the steps of a generation can't be told apart"
    num_steps = len(trajectories[0].clocks)
    if num_steps > MOST_STEPS:
        return f"of generations of {num_steps} steps, more than {MOST_STEPS}, none is sought"
    return "what the blocks made is no number in some step of a clip"


def _path(end: Sequence[Any], parents: Sequence[NDArray[np.intp]]) -> tuple[int, ...]:
    """The steps computed on the way to the last two of them, (a + 1, b)."""
    before, last = map(int, end)
    steps = [last]
    for parent in reversed(parents):
        steps.append(before - 1)
        before, last = int(parent[before - 1, last]), before - 1
    return tuple(reversed(steps))
