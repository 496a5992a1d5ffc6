"""What sits in a decoder's place while a VAE decodes: one that answers each of its calls.

``Share`` decodes this rank's calls, and answers all others with their shape alone. ``Replay`` answers each with what
was made of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hvcompile.ranks.tile_calls import Plan, UnshareableError, results, with_results
from hvcompile.torch_private.operations import Shapes

Tell = Callable[[int, int], None]
"""Told after each of this rank's tiles how many are done, and how many there are for it."""


class Seat(nn.Module):
    """Sits in a decoder's place; all but its calls is the decoder's.

    Args:
        decoder: whose attributes it has, and on which it sets them.
        answer: is called for the decoder.
        is_open: whether attributes may be set.

    Raises:
        UnshareableError: from setting an attribute where it is not open.

    """

    def __init__(self, decoder: nn.Module, answer: Callable[..., Any], *, is_open: bool) -> None:
        super().__init__()
        self.answer, self.is_open, self.seated = answer, is_open, decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``answer`` returns."""
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("seated"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "seated" not in vars(self).get("_modules", {}):
            super().__setattr__(name, value)
        elif self.is_open:
            setattr(self.seated, name, value)
        else:
            raise UnshareableError(f"decode sets {name!r} of its decoder")

    def __delattr__(self, name: str) -> None:
        if not self.is_open:
            raise UnshareableError(f"decode deletes {name!r} of its decoder")
        delattr(self.seated, name)


@dataclass
class Share:
    """Stands for the decoder while this rank decodes its tiles; of all others it gives the shape alone.

    Attributes:
        made: what this rank has made, by the number of the call.
        shapes: the mode that decode runs within, which is off while this rank decodes.

    """

    plan: Plan
    decoder: nn.Module
    owners: list[int]
    rank: int
    tell: Tell | None
    made: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=Shapes)
    _given_out: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # a shape, and what it stands for
    _index: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the next call."""
        index, self._index = self._index, self._index + 1
        call = self.plan.calls[index]
        fakes = [torch.empty_like(tensor) for tensor in call.results]
        if self.owners[index] == self.rank:
            with self.shapes.paused():
                answer = self.decoder(*self._real(args), **{name: self._real(value) for name, value in kwargs.items()})
            found, planned = shapes(results(answer)), shapes(fakes)
            if found != planned:
                raise RuntimeError(f"call {index} of the decoder gave {found}, where {planned} was foreseen")
            self.made[index] = results(answer)
            if self.tell is not None:
                self.tell(len(self.made), self.owners.count(self.rank))
        else:
            answer = call.elsewhere(args, kwargs)
        self._given_out += zip(fakes, self.made.get(index, []), strict=False)
        return with_results(answer, fakes)

    def _real(self, value: Any) -> Any:
        """What an argument stands for, where it is an earlier call's result."""
        if isinstance(value, tuple):
            return tuple(self._real(part) for part in value)
        return next((real for fake, real in self._given_out if fake is value), value)


@dataclass
class Replay:
    """Stands for the decoder while the first rank joins the tiles: each call is answered with what was made of it."""

    plan: Plan
    made: dict[int, list[torch.Tensor]]
    _index: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the next call."""
        index, self._index = self._index, self._index + 1
        return with_results(self.plan.calls[index].elsewhere(args, kwargs), self.made.pop(index))


def shapes(tensors: list[torch.Tensor]) -> list[tuple[tuple[int, ...], str]]:
    """The shape and dtype of each."""
    return [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]


def on_meta(decoder: nn.Module) -> nn.Module:
    """A copy of a decoder without its weights' content."""
    tensors: list[torch.Tensor] = [*decoder.parameters(), *decoder.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        meta = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_weight else meta
    return copy.deepcopy(decoder, memo)
