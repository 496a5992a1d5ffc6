"""Which calls of a VAE's decoder one decoding makes, and which of them may run apart from the others.

A VAE that decodes in tiles calls its ``decoder`` once a tile, or once a tile and some frames. Some hand a cache from
one call to the next. Here the decoding runs on the meta device, where nothing is computed: every call is seen, with
what it is given and the shape of what it gives. Calls that share something are a chain, which stays on one rank.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hvcompile.ranks.attributes import PLAIN, content_of, kept_by
from hvcompile.ranks.surroundings import Surroundings
from hvcompile.torch_private.operations import ForeignTensorError, Operations, tensors_in
from hvcompile.torch_private.storages import storage_id, version_of


class UnshareableError(Exception):
    """The calls of a decoder can't be told apart; the message says why, as a part of a sentence."""


@dataclass(frozen=True)
class Call:
    """One call of the decoder.

    Attributes:
        chain: number of the calls that must run on one rank, one after the other.
        size: values that it is given, as a measure of its work.
        answer: what it returns, on the meta device.
        contents: what the lists and dicts that it is given hold afterwards, on the meta device.

    """

    chain: int
    size: int
    answer: Any
    contents: tuple[Any, ...] = ()

    @property
    def results(self) -> list[torch.Tensor]:
        """What it returns that is no cache: a tensor, or the tensors of a tuple."""
        return results(self.answer)

    def elsewhere(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What it returns where another rank makes it; leaves in its lists and dicts what code could look for there."""
        containers = [part for part in _parts((args, *kwargs.values())) if isinstance(part, (list, dict))]
        _refill(containers, self.contents)
        return _fresh(self.answer)


def results(answer: Any) -> list[torch.Tensor]:
    """The tensors that a decoder returned, without those inside of caches."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def with_results(answer: Any, tensors: list[torch.Tensor]) -> Any:
    """What a decoder returned with other tensors in the places of ``results``."""
    left = iter(tensors)
    if not isinstance(answer, tuple):
        return next(left)
    return tuple(next(left) if isinstance(part, torch.Tensor) else part for part in answer)


@dataclass
class _Known:
    """What a call does that comes after the same calls, with arguments of the same shapes.

    Attributes:
        operations: a digest of those that it ran.
        answer: what it returned.
        contents: what its lists and dicts held afterwards; none where that had not changed.
        is_sure: whether it has run twice, and did the same.

    """

    operations: str
    answer: Any
    contents: list[Any]
    is_sure: bool = False

    @property
    def is_copyable(self) -> bool:
        """Whether all that it left behind is tensors, plain values, and lists and dicts with such."""
        parts = [part for content in self.contents for part in _values(content)]
        return all(isinstance(part, (torch.Tensor, *PLAIN)) for part in parts) and _is_copyable(self.answer)

    def once_more(self, containers: list[Any]) -> Any:
        """Answer, and leave the same in other lists and dicts, with tensors of their own."""
        _refill(containers, self.contents)
        return _fresh(self.answer)


@dataclass
class Plan:
    """Stands for a decoder while a decoding runs on the meta device, and keeps its calls.

    Args:
        decoder: on the meta device, and a copy that nobody else has.

    Attributes:
        hidden: storages on the meta device that stand for what ranks don't send to each other: weights and caches.

    Raises:
        UnshareableError: from a call, where what it does depends on more than its chain.

    """

    decoder: nn.Module
    calls: list[Call] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)
    _chain_of: dict[int, int] = field(default_factory=dict)
    _held: list[Any] = field(default_factory=list)  # an id is an object's own as long as the object is there
    _versions: dict[int, int] = field(default_factory=dict)
    _made: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _known: dict[str, _Known] = field(default_factory=dict)
    _past: dict[int, str] = field(default_factory=dict)
    _num_chains: int = 0

    def __post_init__(self) -> None:
        for name, module in self.decoder.named_modules():
            where = f"{name} of its decoder" if name else "its decoder"
            kept = vars(module)
            if kept.keys() & {"_hf_hook", "_diffusers_hook"}:  # of accelerate and of diffusers
                raise UnshareableError(f"{where} carries a hook that moves weights while it runs")
            if any(hooks for key, hooks in kept.items() if "hooks" in key and "forward" in key):
                raise UnshareableError(f"{where} carries a hook that runs with it, and may keep something")
            if module.training and getattr(module, "track_running_stats", False):
                raise UnshareableError(f"{where} keeps statistics of what it is given: call vae.eval() before")
        self._weights = [*self.decoder.parameters(), *self.decoder.buffers()]
        self._kept = kept_by(self.decoder)
        self._around = Surroundings(self.decoder)
        self.hidden |= set(map(storage_id, self._weights))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder on the meta device with what it is given, and note the call."""
        given = _Given(self._chain_of, self._versions)
        meta_args, meta_kwargs = given.on_meta(args), {name: given.on_meta(value) for name, value in kwargs.items()}
        size = sum(tensor.numel() for tensor in given.tensors)
        if len(given.chains) > 1:
            raise UnshareableError("a call of its decoder takes what several others made")
        if given.chains:
            (chain,) = given.chains
        else:
            chain, self._num_chains = self._num_chains, self._num_chains + 1
        key = repr((_signature(args), _signature(kwargs)))
        if given.holds_state:
            key = self._past[chain] = hashlib.sha256(f"{self._past.get(chain)} {key}".encode()).hexdigest()
            answer = self._answer(key, meta_args, meta_kwargs, given, self._made.get(chain, []))
        else:
            if key not in self._known:
                self._answer(key, meta_args, meta_kwargs, given)
            answer = self._answer(key, meta_args, meta_kwargs, given)
        parts = list(_parts(answer))
        for item in (*given.containers, *parts):
            self._chain_of[id(item)] = chain
            self._held.append(item)
        self._versions |= {id(part): version_of(part) for part in results(answer)}
        made = [*tensors_in([*given.containers, *parts])]
        self._see_no_alias(answer, given.containers)
        self._made.setdefault(chain, []).extend(made)
        self.hidden |= set(map(storage_id, made)) - set(map(storage_id, results(answer)))
        contents = tuple(map(_fresh, given.containers))
        self.calls.append(Call(chain=chain, size=size, answer=_fresh(answer), contents=contents))
        return answer

    def _answer(
        self, key: str, args: Any, kwargs: Mapping[str, Any], given: _Given, made: list[torch.Tensor] | None = None
    ) -> Any:
        """What a call returns: run twice, and known from then on where both ran the same operations."""
        known = self._known.get(key)
        if known is not None and known.is_sure:
            return known.once_more(given.containers)
        before = content_of(given.containers)
        answer, operations = self._run(args, kwargs, given.tensors, made)
        if known is None:
            is_as_before = content_of(given.containers) == before
            contents = [] if is_as_before else [copy.copy(container) for container in given.containers]
            self._known[key] = _Known(operations, answer, contents)
        elif known.operations != operations:
            raise UnshareableError("its decoder does other things when it is called once more")
        else:
            known.is_sure = known.is_copyable
        return answer

    def _run(
        self, args: Any, kwargs: Mapping[str, Any], tensors: list[torch.Tensor], made: list[torch.Tensor] | None = None
    ) -> tuple[Any, str]:
        """What the decoder returns, and what tells the operations that it ran from others."""
        with torch.compiler.set_stance("force_eager"), Operations([*self._weights, *tensors], made or ()) as seen:
            try:
                answer = self.decoder(*args, **kwargs)
            except ForeignTensorError:
                answer = None
        if seen.draws:
            raise UnshareableError(f"its decoder draws random numbers ({seen.draws[0]})")
        if seen.writes:
            raise UnshareableError(
                f"its decoder writes into what it is given, or into what is kept between calls ({seen.writes[0]})"
            )
        if seen.strays:
            raise UnshareableError(f"its decoder reads a tensor that it was not given ({seen.strays[0]})")
        self.check()
        found = results(answer)
        if not found or not (isinstance(answer, torch.Tensor) or type(answer) is tuple):
            raise UnshareableError(f"its decoder returns a {type(answer).__name__}, not a tensor or a tuple with one")
        own, storages = {storage_id(tensor) for tensor in tensors}, [storage_id(tensor) for tensor in found]
        if any(not tensor.is_meta for tensor in found) or own & set(storages):
            raise UnshareableError("its decoder returns what it was given, or something made elsewhere")
        return answer, seen.digest

    def _see_no_alias(self, answer: Any, containers: list[Any]) -> None:
        """Raise where what decode writes into a result would be in another one, or in a cache, were it not sent."""
        storages = [storage_id(tensor) for tensor in results(answer)]
        rest = [part for part in answer if not isinstance(part, torch.Tensor)] if isinstance(answer, tuple) else []
        kept = {storage_id(part) for part in tensors_in([*containers, *rest])}
        if len(set(storages)) < len(storages) or kept.intersection(storages):
            raise UnshareableError("its decoder returns a tensor twice, or one that it hands on in a cache too")

    def check(self) -> None:
        """See that the decoder still is as it was before its first call.

        Raises:
            UnshareableError: it, or what calls it, has changed something of it.

        """
        if kept_by(self.decoder) != self._kept:
            raise UnshareableError("its decoder keeps something of a call for the next one in an attribute")
        if self._around.have_changed():
            raise UnshareableError("its decoder changes something in a global, a closure or a class")

    def owners(self, ranks: int) -> list[int]:
        """The rank of each call: whole chains, the largest first, each to the rank with the least work so far."""
        work = dict.fromkeys((call.chain for call in self.calls), 0)
        for call in self.calls:
            work[call.chain] += call.size
        loads, owner = [0] * ranks, {}
        for chain in sorted(work, key=lambda item: (-work[item], item)):
            owner[chain] = loads.index(min(loads))
            loads[owner[chain]] += work[chain]
        return [owner[call.chain] for call in self.calls]

    @property
    def num_chains(self) -> int:
        """How many parts there are that may run apart."""
        return self._num_chains

    def digest(self) -> str:
        """Text that is the same on ranks that plan the same."""
        return repr([(call.chain, call.size, _signature(call.results)) for call in self.calls])


@dataclass
class _Given:
    """What one call is given: ``chains`` of earlier calls that it depends on, tensors, and what may change in it."""

    chain_of: Mapping[int, int]
    versions: Mapping[int, int]
    chains: set[int] = field(default_factory=set)
    tensors: list[torch.Tensor] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    holds_state: bool = False

    def on_meta(self, value: Any, *, cache: str | None = None) -> Any:
        """The value with its tensors on the meta device; a list or dict stays the same object.

        Args:
            value: an argument, or a part of one.
            cache: of the list or dict that it is in: "known" of an earlier call, or "new"; None outside of them.

        """
        if isinstance(value, torch.Tensor):
            if value.is_meta and id(value) in self.chain_of:
                self._follow(value)
                if version_of(value) != self.versions.get(id(value), version_of(value)):
                    raise UnshareableError("decode writes into a result of its decoder that a later call takes")
                if cache is not None and id(value) in self.versions:
                    raise UnshareableError("decode puts a result of its decoder into a list or dict for a later call")
            elif value.is_meta and cache != "known":
                raise UnshareableError("a call of its decoder takes what was made from an earlier call's result")
            elif not value.is_meta and cache is not None:
                raise UnshareableError("its decoder is given a cache that was filled before")
            meta = value if value.is_meta else torch.empty_like(value, device="meta")
            if cache is None:
                self.tensors.append(meta)
            return meta
        if type(value) in {tuple, torch.Size}:
            return tuple(self.on_meta(part, cache=cache) for part in value)
        if type(value) in {list, dict}:  # a class of its own may hold more
            self.holds_state = True
            self.containers.append(value)
            cache = "known" if self._follow(value) or cache == "known" else "new"
            for part in value if isinstance(value, list) else value.values():
                self.on_meta(part, cache=cache)
            return value
        if not isinstance(value, PLAIN):
            raise UnshareableError(f"its decoder is given a {type(value).__name__}, which may carry something along")
        return value

    def _follow(self, value: Any) -> bool:
        """Note the chain that a value comes from; False where it comes from none."""
        if id(value) not in self.chain_of:
            return False
        self.chains.add(self.chain_of[id(value)])
        self.holds_state = True
        return True


def _refill(containers: list[Any], contents: Iterable[Any]) -> None:
    """Put contents into lists and dicts, with tensors of their own; all stay as they are where there are none."""
    for container, content in zip(containers, contents, strict=False):
        container.clear()
        fresh = _fresh(content)
        container.extend(fresh) if isinstance(container, list) else container.update(fresh)


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _is_copyable(value: Any) -> bool:
    if type(value) in {list, tuple, dict}:
        return all(map(_is_copyable, _values(value)))
    return isinstance(value, (torch.Tensor, *PLAIN))


def _fresh(value: Any) -> Any:
    """A copy with tensors of its own."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value)
    if isinstance(value, dict):
        return {name: _fresh(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_fresh, value))
    return value


def _parts(value: Any) -> Iterator[Any]:
    """The tensors, lists and dicts in what a decoder is given or returns, in the order of ``_Given``."""
    if isinstance(value, (torch.Tensor, list, dict)):
        yield value
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _parts(part)


def _signature(value: Any) -> Any:
    """All that the shape of a call's result may depend on, where it holds no state."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), str(value.device.type)
    if isinstance(value, (tuple, list)):
        return tuple(_signature(part) for part in value)
    if isinstance(value, Mapping):
        return {name: _signature(part) for name, part in value.items()}
    return value
