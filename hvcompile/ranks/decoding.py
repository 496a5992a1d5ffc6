"""Decoding a video with the ranks of a process group together: each decodes some of the VAE's tiles."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hvcompile.errors import DisagreementError, InputError, RunError, one_line
from hvcompile.ranks.attributes import PLAIN
from hvcompile.ranks.fingerprints import sketch
from hvcompile.ranks.seat import Replay, Seat, Share, Tell, on_meta, shapes
from hvcompile.ranks.surroundings import kept
from hvcompile.ranks.tile_calls import Plan, UnshareableError
from hvcompile.torch_private.operations import Around, ForeignTensorError
from hvcompile.torch_private.storages import version_of

_log = logging.getLogger(__name__)


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
        InputError: the VAE has no such parts, its ``decode`` is replaced already, or this rank is not in the group.
            From ``decode``, where another thread is in it.
        DisagreementError: from ``decode``, where the ranks' latents, tiles or weights differ, or a rank did not come.
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
    if num_ranks < 1:
        raise InputError(
            "this rank is not in the group that shares the decoding: share on the ranks of the group alone"
        )
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


@dataclass
class _Shared:
    """A VAE whose ``decode`` is shared."""

    vae: Any
    group: dist.ProcessGroup | None
    num_ranks: int
    tell: Tell | None
    state: Decoding
    _running: threading.Lock = field(default_factory=threading.Lock)
    _thread: int | None = None

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """``vae.decode`` by all ranks."""
        if self._thread == threading.get_ident():  # a decode that calls itself
            return type(self.vae).decode(self.vae, *args, **kwargs)
        if not self._running.acquire(blocking=False):
            raise InputError("another thread decodes with this VAE: within share_decoding, decode one after the other")
        self._thread = threading.get_ident()
        try:
            return self._decode(args, kwargs)
        finally:
            self._thread = None
            self._running.release()

    def _decode(self, args: Any, kwargs: Any) -> Any:
        try:
            plan, reason = self._planned(args, kwargs)
        except BaseException:  # the user stops it, while the others wait to compare plans
            if self.num_ranks > 1:
                self._told(None)
            raise
        if self.num_ranks > 1:
            reason = self._agree(plan, reason, args, kwargs)
        state = self.state
        state.num_tiles = state.num_own = len(plan.calls) if plan is not None else 0
        state.reason = reason
        if self.num_ranks > 1 and reason is not None:
            _log.info("every rank decodes all of the video: %s", reason)
        if plan is None:
            return type(self.vae).decode(self.vae, *args, **kwargs)
        if self.num_ranks == 1 or reason is not None:
            return _run(self.vae, self._counted(len(plan.calls)), args, kwargs)
        args, kwargs = self._first_ranks(args, kwargs)
        return self._together(plan, args, kwargs)

    def _planned(self, args: Any, kwargs: Any) -> tuple[Plan | None, str | None]:
        """The calls that ``decode`` will make; or None and why they can't be told."""
        given = _tensors(args, kwargs)
        if torch.is_grad_enabled():
            return None, "gradients are asked for: call decode under torch.no_grad()"
        if any(torch.is_autocast_enabled(tensor.device.type) for tensor in given):
            return None, "autocast is on, and the decoder's calls are foreseen without"
        others = [value for value in (*args, *kwargs.values()) if not isinstance(value, (torch.Tensor, *PLAIN))]
        if others or not given:
            what = f"a {type(others[0]).__name__}" if others else "no tensor"
            return None, f"decode is given {what}, where tensors and numbers are foreseen"
        try:
            # In inference mode nothing counts writes. What is planned with are copies: the VAE, what decode is given
            # and the state of random numbers stay as they are.
            devices = {tensor.device for tensor in given if tensor.device.type == "cuda"}
            with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices), self._kept():
                bring = getattr(vars(self.vae).get("_hf_hook"), "pre_forward", None)
                if bring is not None:  # model offload brings the VAE, as decode would; its copy can't be moved
                    bring(self.vae)
                return _plan(self.vae, args, kwargs)
        except (UnshareableError, ForeignTensorError) as error:
            return None, str(error)
        except Exception as error:  # of a VAE that nobody foresaw; where it is the user's fault, ``decode`` says so
            return None, f"its calls can't be foreseen ({type(error).__name__}: {one_line(error)[:120]})"

    def _kept(self) -> contextlib.AbstractContextManager[None]:
        """Within, what decode changes beside its VAE's own attributes comes back afterwards."""
        return kept(self.vae, but=("decode",))

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

    def _agree(self, plan: Plan | None, reason: str | None, args: Any, kwargs: Any) -> str | None:
        """One reason for all ranks not to share; raises where their inputs, plans or weights differ."""
        given = [
            *shapes(_tensors(args, kwargs)),
            *((name, value) for name, value in (*enumerate(args), *kwargs.items()) if isinstance(value, PLAIN)),
        ]
        weights = None if plan is None or reason is not None else _weights_of(self.vae.decoder)
        everyone = self._told((given, plan.digest() if plan is not None else None, weights, reason))
        if None in everyone:
            raise RunError(f"rank {everyone.index(None)} was stopped before it decoded its tiles")
        if any(other[0] != given for other in everyone):
            each = ", ".join(f"rank {rank}: {other[0]}" for rank, other in enumerate(everyone))
            raise DisagreementError(f"the ranks decode different latents ({each}): share_decoding is for one video")
        reasons = [other[3] for other in everyone if other[3] is not None]
        if reasons:
            return str(reasons[0])
        if any(other[1] != everyone[0][1] for other in everyone):
            raise DisagreementError("the ranks decode other tiles: give all the same vae, tiling and latents")
        differs = [str(rank) for rank, other in enumerate(everyone) if other[2] != everyone[0][2]]
        if differs:
            raise DisagreementError(
                f"the decoder of rank {', '.join(differs)} has other weights than rank 0's: load the same on all ranks"
            )
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
        device = _tensors(args, kwargs)[0].device

        def decoded() -> tuple[Any, dict[int, list[torch.Tensor]]]:
            share = Share(plan, self.vae.decoder, owners, rank, self.tell)
            # What decode sets on its VAE it sets once: the first rank runs it again to join the tiles.
            vae = _twin(self.vae) if rank == 0 else self.vae
            with share.shapes, self._kept() if rank == 0 else contextlib.nullcontext():
                shape = _run(vae, share, args, kwargs)
            if rank == 0:  # memory for the others' tiles, while all can still be told that there is none
                share.made |= {
                    index: [_room_for(tensor, device) for tensor in call.results]
                    for index, (call, owner) in enumerate(zip(plan.calls, owners, strict=True))
                    if owner != 0
                }
            return shape, share.made

        shape, made = self._well(decoded)
        self._gather(owners, rank, made)

        def joining() -> tuple[Any, torch.Tensor]:
            if rank != 0:
                return shape, _room_for(_video_of(shape), device)
            decoded = _run(self.vae, Replay(plan, made), args, kwargs)
            return decoded, _video_of(decoded).contiguous()

        shape, video = self._well(joining)
        self._reached(lambda: dist.broadcast(video, group_src=0, group=self.group))
        if isinstance(shape, torch.Tensor):
            return video
        return (video,) if isinstance(shape, tuple) else type(shape)(sample=video)

    def _gather(self, owners: list[int], rank: int, made: dict[int, list[torch.Tensor]]) -> None:
        """Bring all results into the first rank's ``made``, one after the other; elsewhere it is empty afterwards."""
        for index, owner in enumerate(owners):
            if owner == 0:
                continue
            if rank == owner:
                for tensor in made.pop(index):
                    send = functools.partial(dist.send, tensor.contiguous(), group_dst=0, group=self.group)
                    self._reached(send)
            elif rank == 0:
                for tensor in made[index]:
                    self._reached(functools.partial(dist.recv, tensor, group_src=owner, group=self.group))

    def _well(self, work: Callable[[], Any]) -> Any:
        """Do this rank's work; raise on all ranks where one of them failed."""
        failed: BaseException | None = None
        done = None
        try:
            done = work()
        except BaseException as error:  # also where the user stops it: the others wait
            failed = error
        try:
            everyone = self._told(None if failed is None else f"{type(failed).__name__}: {one_line(failed)}")
        finally:
            if failed is not None:  # rather than that the others are gone
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


def _plan(vae: Any, args: Any, kwargs: Any) -> tuple[Plan | None, str | None]:
    """The calls that a copy of a VAE makes with copies of what it is given; or None and why they can't be shared."""
    decoder = on_meta(vae.decoder)
    plan = Plan(decoder)
    args, kwargs = _with_tensors(torch.Tensor.clone, args, kwargs)
    copies = _tensors(args, kwargs)
    versions = list(map(version_of, copies))
    with Around(copies, plan.hidden) as seen:

        def answer(*call_args: Any, **call_kwargs: Any) -> Any:
            with seen.paused():
                return plan(*call_args, **call_kwargs)

        twin = _twin(vae)
        vars(twin).pop("_hf_hook", None)
        decoded = _run(twin, answer, args, kwargs, decoder=decoder)
    plan.check()
    if seen.draws:
        return None, f"it draws random numbers ({seen.draws[0]})"
    if versions != list(map(version_of, copies)):
        return None, "it writes into what it is given"
    if _video_of(decoded) is None:
        return None, f"decode returns a {type(decoded).__name__} of which more than the video is to be sent"
    if plan.num_chains < 2:
        return plan, "it is one piece: one tile, or tiles of which each needs the one before"
    return plan, None


def _run(vae: Any, answer: Callable[..., Any], args: Any, kwargs: Any, *, decoder: nn.Module | None = None) -> Any:
    """The VAE's own ``decode`` with ``answer`` in its decoder's place; ``decoder`` is what that looks like."""
    own = vae.decoder
    vae.decoder = Seat(own if decoder is None else decoder, answer, is_open=decoder is None)
    try:
        return type(vae).decode(vae, *args, **kwargs)
    finally:
        vae.decoder = own


def _twin(vae: Any) -> Any:
    """A VAE with the same modules, whose own attributes, lists and dicts are apart."""
    twin = copy.copy(vae)
    for name, value in vars(vae).items():
        if isinstance(value, (list, dict, set)):
            vars(twin)[name] = copy.copy(value)
    vars(twin).pop("decode", None)
    return twin


def _weights_of(decoder: nn.Module) -> str:
    """What tells a decoder's weights from others: a sample of each, and of its buffers."""
    digest = hashlib.sha256()
    for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
        content: Any
        try:
            content = int(sketch(tensor).item())
        except Exception as error:  # of a kind of tensor that nobody foresaw
            content = type(error)
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape), content)).encode())
    return digest.hexdigest()


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments of a call that are tensors."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _with_tensors(change: Callable[[torch.Tensor], torch.Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, with each that is a tensor changed."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) else value

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}


def _room_for(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory for what another rank made."""
    return torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)


def _video_of(decoded: Any) -> Any:
    """What ``decode`` returned: a tensor alone, in a tuple, or as ``sample`` in a dataclass; None if it is more."""
    if type(decoded) is tuple and len(decoded) == 1:
        (decoded,) = decoded
    elif dataclasses.is_dataclass(decoded) and not isinstance(decoded, type):
        fields = {item.name: getattr(decoded, item.name) for item in dataclasses.fields(decoded)}
        decoded = fields.pop("sample", None)
        if any(value is not None for value in fields.values()):
            return None
    return decoded if isinstance(decoded, torch.Tensor) else None
