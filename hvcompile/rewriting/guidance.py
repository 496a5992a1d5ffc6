"""Guidance by several calls a step: the later ones do what the first did, reuse or compute, as graph code.

A guided step adds the difference of two predictions, times a scale well above 1, to one of them. Where one was computed
and the other repeats an earlier step, what they differ by is mostly that, and the scale enlarges it. Where both repeat
the same step, their errors are alike and cancel.

The first call of a step leaves a record: its timestep and sample, what its conditions and weights hold, what it did,
and which step it holds. A call is of the same step where timestep and sample are equal, conditions or weights are not,
and its own generation has not been there yet. It takes the first one's number of the step, for it may have been left
out of earlier ones, as where guidance starts late. Where the first one computed, it computes. Where the first one
reuses, it does too if it holds the same step, and decides by its own change if not, or computes where there is none.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from hvcompile.ranks.fingerprints import hash_of

RECORD = ("lead_clock", "lead_marks", "lead_reused", "lead_number")
"""The names of a record's parts; see ``Lead``."""


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
        last_clock: those of the last call of this call's own generation, same shape.
        marks: of this call, see the function; None where calls decide apart.
        past_marks: hashes of the samples of the generation's last call and of its last computed one, int64 ``[2]``.
        lead_clock: timesteps of the first call, float64 ``[K]``.
        lead_marks: its marks, and the hash of the sample that what it holds was computed of; int64 ``[N + 2]``.
        lead_reused: whether it reused, bool scalar.
        lead_number: of the step in its generation, int64 scalar.

    """

    clock: Any = None
    last_clock: Any = None
    marks: Any = None
    past_marks: Any = None
    lead_clock: Any = None
    lead_marks: Any = None
    lead_reused: Any = None
    lead_number: Any = None

    @functools.cached_property
    def _is_followed(self) -> Any:
        """Whether this call is another of that step, which its own generation has not been at yet; a bool scalar."""
        is_equal = self.marks == self.lead_marks[:-1]  # weights, conditions, sample
        is_other = is_equal[:-1].logical_not().any()
        is_again = (self.clock == self.last_clock).all() & (self.marks[-1] == self.past_marks[0])
        return (self.clock == self.lead_clock).all() & is_equal[-1] & is_other & is_again.logical_not()

    def number(self, own: Any) -> Any:
        """The number of this step: the first call's where this is another of that step, else its own."""
        return own if self.marks is None else torch.where(self._is_followed, self.lead_number, own)

    def flags(self, allowed: Any) -> list[Any]:
        """Whether this call, which may reuse where ``allowed``, still may; and whether it need not change little.

        It need not where the first call reuses and both hold the same step: else their errors are not alike.
        """
        if self.marks is None:
            return [allowed, torch.zeros_like(allowed)]
        return [
            allowed & (self.lead_reused | self._is_followed.logical_not()),
            self._is_followed & self._holds_the_same,
        ]

    def flags_of_schedule(self, allowed: Any) -> list[Any]:
        """The same where no change decides: a call that holds another step than the first one does not reuse."""
        may, follows = self.flags(allowed)
        if self.marks is not None:
            may = may & (self._holds_the_same | self._is_followed.logical_not())
        return [may, follows]

    @property
    def _holds_the_same(self) -> Any:
        """Whether what this call holds was computed of the same sample as what the first one holds; a bool scalar."""
        return self.past_marks[1] == self.lead_marks[-1]

    def follow(self, reused: Any, number: Any) -> dict[str, Any]:
        """The next ``past_marks``, and the next record: the same, or this call's where it is the first of its step.

        Args:
            reused: whether this call does, bool scalar.
            number: of this step, see there.

        """
        if self.marks is None:
            return {}
        computed = torch.where(reused, self.past_marks[1], self.marks[-1])
        now = (self.clock, torch.cat([self.marks, computed.reshape(1)]), reused, number)
        before = (self.lead_clock, self.lead_marks, self.lead_reused, self.lead_number)
        record = {
            name: torch.where(self._is_followed, old, new) for name, old, new in zip(RECORD, before, now, strict=True)
        }
        return {"past_marks": torch.stack([self.marks[-1], computed]), **record}


APART = Lead()
