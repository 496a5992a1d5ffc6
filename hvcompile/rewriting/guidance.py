"""Guidance by several calls a step: the later ones do what the first did, reuse or compute, as graph code.

A guided step adds the difference of two predictions, times a scale well above 1, to one of them. Where one was computed
and the other repeats an earlier step, what they differ by is mostly that, and the scale enlarges it. Where both repeat
the same step, their errors are alike and cancel.

The first call of a step leaves a record: its timestep, its sample, what its conditions hold, and what it did. A call is
of the same step where timestep, sample and weights are equal and the conditions are not.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from hvcompile.runtime.fingerprints import hash_of

RECORD = ("lead_clock", "lead_marks", "lead_reused")
"""The names of a record's parts: float64 ``[K]``, int64 ``[N + 1]`` and a bool scalar."""


def marks(*, contents: Any, sample: Any, like: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """What tells calls apart, as graph code.

    Args:
        contents: of the weights, then of each condition, int64 ``[N]``.
        sample: what is denoised, any shape.
        like: the sample's fake value.
        device: of the contents.

    Returns:
        "marks", int64 ``[N + 1]``: the contents, and a hash of the sample.

    """
    return {"marks": torch.cat([contents, hash_of(sample, like).to(device).reshape(1)])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lead:
    """What the first call of the latest step did, and what tells whether another is of that step.

    Attributes:
        clock: timesteps of this call, float64 ``[K]``.
        marks: of this call, see the function; None where calls decide apart.
        lead_clock: timesteps of the first call, float64 ``[K]``.
        lead_marks: its marks.
        lead_reused: whether it reused, bool scalar.

    """

    clock: Any = None
    marks: Any = None
    lead_clock: Any = None
    lead_marks: Any = None
    lead_reused: Any = None

    @functools.cached_property
    def _is_followed(self) -> Any:
        """Whether this call is another of that step; a bool scalar."""
        is_equal = self.marks == self.lead_marks  # weights, conditions, sample
        is_same_step = (self.clock == self.lead_clock).all() & is_equal[0] & is_equal[-1]
        return is_same_step & is_equal[1:-1].logical_not().any()

    def flags(self, allowed: Any) -> list[Any]:
        """Whether this call, which may reuse where ``allowed``, still may; and whether it need not change little."""
        if self.marks is None:
            return [allowed, torch.zeros_like(allowed)]
        return [allowed & (self.lead_reused | self._is_followed.logical_not()), self._is_followed]

    def follow(self, reused: Any) -> dict[str, Any]:
        """The next record, by the names in ``RECORD``: the same, or this call's where it is the first of its step."""
        if self.marks is None:
            return {}
        now = (self.clock, self.marks, reused)
        before = (self.lead_clock, self.lead_marks, self.lead_reused)
        return {
            name: torch.where(self._is_followed, old, new) for name, old, new in zip(RECORD, before, now, strict=True)
        }


APART = Lead()
