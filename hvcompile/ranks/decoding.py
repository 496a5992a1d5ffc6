"""Decoding a video with the ranks of a process group together: each decodes some of the VAE's tiles."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hvcompile.errors import DisagreementError, InputError, RunError, one_line
from hvcompile.ranks.tile_calls import Plan, UnshareableError, results, with_results
from hvcompile.torch_private.drawing import Drawing
from hvcompile.torch_private.storages import version_of

_log = logging.getLogger(__name__)

Tell = Callable[[int, int], None]
"""Told after each of this rank's tiles how many are done, and how many there are for it."""


@dataclass
class Decoding:
    """What became of the last decoding within ``share_decoding``.

    Attributes:
        num_tiles: calls of the decoder in all; 0 where nothing was decoded yet, or they could not be counted.
        num_own: of them, those of this rank.
        reason: why each rank decoded all of it, as a part of a sentence; None where the ranks shared it.

    """

    num_tiles: int = 0
    num_own: int = 0
    reason: str | None = None


@contextlib.contextmanager
def share_decoding(
    vae: nn.Module, group: dist.ProcessGroup | None = None, *, tell: Tell | None = None
) -> Iterator[Decoding]:
    """Within, the ranks share the tiles of each ``vae.decode``, and each gets the whole result.

    The VAE's own ``decode`` runs, with its own tiles and its own blending; nothing but the calls of ``vae.decoder``
    is done elsewhere. So the result has the bits that the first rank alone would make. All ranks call ``decode`` alike,
    and the first rank's latents count. Where the VAE makes one call alone, or calls that can't be told apart, every
    rank decodes all of it, as without, and ``reason`` and the log say why.

    Args:
        vae: has a ``decode``, and a module ``decoder`` that it calls for each tile, as those of diffusers. Tiling is
            switched on before (``enable_tiling``). The decoder may be compiled.
        group: the ranks; all of the default process group where None. A process alone decodes as without.
        tell: told after each of this rank's tiles; on one rank too.

    Yields:
        What became of the last decoding.

    Raises:
        InputError: the VAE has no such parts, or its ``decode`` is replaced already.
        DisagreementError: from ``decode``, where the ranks' latents or tiles differ, or a rank did not come.
        RunError: from ``decode``, on all ranks, where the decoder failed on another one.

    """
    if not isinstance(getattr(vae, "decoder", None), nn.Module) or not callable(getattr(vae, "decode", None)):
        raise InputError(f"a {type(vae).__name__} has no decode with a decoder to share: give a VAE, such as pipe.vae")
    if "decode" in vars(vae):
        raise InputError(
            f"the decode of this {type(vae).__name__} is replaced already, by torch.compile or by another "
            "share_decoding: compile vae.decoder instead, and share once"
        )
    num_ranks = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    state = Decoding()
    if num_ranks == 1 and tell is None:
        yield state
        return
    shared = _Shared(vae, group, num_ranks, tell, state)
    vae.decode = shared.decode  # type: ignore[assignment]
    try:
        yield state
    finally:
        del vae.decode


class _Seat(nn.Module):
    """Sits in a decoder's place; all but its calls is the decoder's."""

    def __init__(self, decoder: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.seated, self.answer = decoder, answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("seated"), name)


@dataclass
class _Share:
    """Stands for the decoder while this rank decodes its tiles; of all others it gives the shape alone."""

    plan: Plan
    decoder: nn.Module
    owners: list[int]
    rank: int
    tell: Tell | None
    made: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _given_out: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # a shape, and what it stands for
    _index: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        index, self._index = self._index, self._index + 1
        call = self.plan.calls[index]
        fakes = [torch.empty_like(tensor) for tensor in call.results]
        if self.owners[index] == self.rank:
            answer = self.decoder(*self._real(args), **{name: self._real(value) for name, value in kwargs.items()})
            found, planned = _shapes(results(answer)), _shapes(fakes)
            if found != planned:
                raise RuntimeError(f"call {index} of the decoder gave {found}, where {planned} was foreseen")
            self.made[index] = results(answer)
            if self.tell is not None:
                self.tell(len(self.made), self.owners.count(self.rank))
        else:
            answer = call.answer
        self._given_out += zip(fakes, self.made.get(index, []), strict=False)
        return with_results(answer, fakes)

    def _real(self, value: Any) -> Any:
        """What an argument stands for, where it is an earlier call's result."""
        if isinstance(value, tuple):
            return tuple(self._real(part) for part in value)
        return next((real for fake, real in self._given_out if fake is value), value)


def _shapes(tensors: list[torch.Tensor]) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]


@dataclass
class _Shared:
    """A VAE whose ``decode`` is shared."""

    vae: Any
    group: dist.ProcessGroup | None
    num_ranks: int
    tell: Tell | None
    state: Decoding

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """``vae.decode`` by all ranks."""
        given = _tensors(args, kwargs)
        plan, reason = self._planned(given, args, kwargs)
        if self.num_ranks > 1:
            reason = self._agree(plan, reason, given)
        state = self.state
        state.num_tiles = state.num_own = len(plan.calls) if plan is not None else 0
        state.reason = reason
        if self.num_ranks > 1 and reason is not None:
            _log.info("every rank decodes all of the video: %s", reason)
        if plan is None:
            return self._run(None, args, kwargs)
        if self.num_ranks == 1 or reason is not None:
            return self._run(self._counted(len(plan.calls)), args, kwargs)
        args, kwargs = self._first_ranks(args, kwargs)
        return self._together(plan, args, kwargs)

    def _run(self, answer: Callable[..., Any] | None, args: Any, kwargs: Any) -> Any:
        """The VAE's own ``decode``; with ``answer`` in the decoder's place, if there is one."""
        own = type(self.vae).decode
        if answer is None:
            return own(self.vae, *args, **kwargs)
        decoder = self.vae.decoder
        self.vae.decoder = _Seat(decoder, answer)
        try:
            return own(self.vae, *args, **kwargs)
        finally:
            self.vae.decoder = decoder

    def _planned(self, given: list[torch.Tensor], args: Any, kwargs: Any) -> tuple[Plan | None, str | None]:
        """The calls that ``decode`` will make; or None and why they can't be told."""
        if torch.is_grad_enabled():
            return None, "gradients are asked for: call decode under torch.no_grad()"
        if any(torch.is_autocast_enabled(tensor.device.type) for tensor in given):
            return None, "autocast is on, and the decoder's calls are foreseen without"
        try:
            # In inference mode nothing counts writes. What is planned with is a copy: the decoder, what decode is given
            # and the state of random numbers stay as they are.
            devices = {tensor.device for tensor in given if tensor.device.type == "cuda"}
            with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices), Drawing() as drawing:
                plan = Plan(_on_meta(self.vae.decoder))
                own_args, own_kwargs = _with_tensors(torch.Tensor.clone, args, kwargs)
                copies = _tensors(own_args, own_kwargs)
                versions = list(map(version_of, copies))
                self._run(plan, own_args, own_kwargs)
            if drawing.names:
                return None, f"it draws random numbers ({drawing.names[0]})"
            if versions != list(map(version_of, copies)):
                return None, "it writes into what it is given"
        except UnshareableError as error:
            return None, str(error)
        except Exception as error:  # of a VAE that nobody foresaw; where it is the user's fault, ``decode`` says so
            return None, f"its calls can't be foreseen ({type(error).__name__}: {one_line(error)[:120]})"
        if plan.num_chains < 2:
            return plan, "it is one piece: one tile, or tiles of which each needs the one before"
        return plan, None

    def _counted(self, total: int) -> Callable[..., Any]:
        """The decoder, with each call told."""
        decoder, done = self.vae.decoder, 0

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            made = decoder(*args, **kwargs)
            done += 1
            if self.tell is not None:
                self.tell(done, total)
            return made

        return answer

    def _agree(self, plan: Plan | None, reason: str | None, given: list[torch.Tensor]) -> str | None:
        """One reason for all ranks not to share; raises where their inputs or plans differ."""
        shapes = _shapes(given)
        everyone = self._told((shapes, plan.digest() if plan is not None else None, reason))
        if any(other[0] != shapes for other in everyone):
            each = ", ".join(f"rank {rank}: {other[0]}" for rank, other in enumerate(everyone))
            raise DisagreementError(f"the ranks decode different latents ({each}): share_decoding is for one video")
        reasons = [other[2] for other in everyone if other[2] is not None]
        if reasons:
            return str(reasons[0])
        if any(other[1] != everyone[0][1] for other in everyone):
            raise DisagreementError("the ranks decode other tiles: give all the same vae, tiling and latents")
        return None

    def _first_ranks(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with the first rank's tensors: others may differ from them in the last bits."""

        def same(tensor: torch.Tensor) -> torch.Tensor:
            sent = tensor.clone(memory_format=torch.contiguous_format)
            self._reached(lambda: dist.broadcast(sent, group_src=0, group=self.group))
            return sent

        return _with_tensors(same, args, kwargs)

    def _together(self, plan: Plan, args: Any, kwargs: Any) -> Any:
        rank = dist.get_rank(self.group)
        owners = plan.owners(self.num_ranks)
        self.state.num_own = owners.count(rank)
        share = _Share(plan, self.vae.decoder, owners, rank, self.tell)
        shape = self._well(functools.partial(self._run, share, args, kwargs))
        made = share.made
        del share
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).device
        self._gather(plan, owners, rank, made, device)
        if rank != 0:
            self._well(lambda: None)
            contiguous = torch.contiguous_format
            joined = [torch.empty_like(tensor, device=device, memory_format=contiguous) for tensor in _whole(shape)]
        else:
            joined = _whole(shape := self._well(lambda: self._run(_Replay(plan, made), args, kwargs)))
            joined = [tensor.contiguous() for tensor in joined]
        for tensor in joined:
            self._reached(functools.partial(dist.broadcast, tensor, group_src=0, group=self.group))
        if isinstance(shape, torch.Tensor):
            return joined[0]
        return (joined[0],) if isinstance(shape, tuple) else type(shape)(sample=joined[0])

    def _gather(
        self, plan: Plan, owners: list[int], rank: int, made: dict[int, list[torch.Tensor]], device: Any
    ) -> None:
        """Bring all results to the first rank, one after the other; elsewhere ``made`` is empty afterwards."""
        for index, (call, owner) in enumerate(zip(plan.calls, owners, strict=True)):
            if owner == 0:
                continue
            if rank == owner:
                for tensor in made.pop(index):
                    send = functools.partial(dist.send, tensor.contiguous(), group_dst=0, group=self.group)
                    self._reached(send)
            elif rank == 0:
                made[index] = [
                    torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
                    for tensor in call.results
                ]
                for tensor in made[index]:
                    self._reached(functools.partial(dist.recv, tensor, group_src=owner, group=self.group))

    def _well(self, work: Callable[[], Any]) -> Any:
        """Do this rank's work; raise on all ranks where one of them failed."""
        failed: Exception | None = None
        done = None
        try:
            done = work()
        except Exception as error:
            failed = error
        everyone = self._told(None if failed is None else f"{type(failed).__name__}: {one_line(failed)}")
        if failed is not None:
            raise failed
        for rank, problem in enumerate(everyone):
            if problem is not None:
                raise RunError(f"rank {rank} failed while it decoded its tiles: {problem[:300]}")
        return done

    def _told(self, what: Any) -> list[Any]:
        """What each rank tells."""
        everyone: list[Any] = [None] * self.num_ranks
        self._reached(lambda: dist.all_gather_object(everyone, what, group=self.group))
        return everyone

    def _reached(self, talk: Callable[[], Any]) -> None:
        """Talk to the others; raises DisagreementError where one is gone."""
        try:
            talk()
        except RuntimeError as error:
            raise DisagreementError(
                f"the ranks could not share the decoding, one of them is gone or late: {one_line(error)[:200]}"
            ) from error


@dataclass
class _Replay:
    """Stands for the decoder while the first rank joins the tiles: each call is answered with what was made of it."""

    plan: Plan
    made: dict[int, list[torch.Tensor]]
    _index: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        index, self._index = self._index, self._index + 1
        return with_results(self.plan.calls[index].answer, self.made.pop(index))


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments of a call that are tensors."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _with_tensors(change: Callable[[torch.Tensor], torch.Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, with each that is a tensor changed."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) else value

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}


def _on_meta(decoder: nn.Module) -> nn.Module:
    """A copy of a decoder without its weights' content."""
    tensors: list[torch.Tensor] = [*decoder.parameters(), *decoder.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        meta = torch.empty_like(tensor, device="meta")
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_weight else meta
    return copy.deepcopy(decoder, memo)


def _whole(decoded: Any) -> list[torch.Tensor]:
    """The tensor that ``decode`` returned, alone or in the tuple or the output class of diffusers."""
    if isinstance(decoded, torch.Tensor):
        return [decoded]
    return [decoded[0] if isinstance(decoded, tuple) else decoded.sample]
