"""Which calls of a VAE's decoder one decoding makes, and which of them may run apart from the others.

A VAE that decodes in tiles calls its ``decoder`` once a tile, or once a tile and some frames. Some hand a cache from
one call to the next. Here the decoding runs on the meta device, where nothing is computed: every call is seen, with
what it is given and the shape of what it gives. Calls that share something are a chain, which stays on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hvcompile.torch_private.drawing import Drawing
from hvcompile.torch_private.storages import storage_id, version_of

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_OWN = ("_parameters", "_buffers", "_modules")
"""What a module keeps tensors and modules in."""


class UnshareableError(Exception):
    """The calls of a decoder can't be told apart; the message says why, as a part of a sentence."""


@dataclass(frozen=True)
class Call:
    """One call of the decoder.

    Attributes:
        chain: number of the calls that must run on one rank, one after the other.
        size: values that it is given, as a measure of its work.
        answer: what it returns, on the meta device.

    """

    chain: int
    size: int
    answer: Any

    @property
    def results(self) -> list[torch.Tensor]:
        """What it returns that is no cache: a tensor, or the tensors of a tuple."""
        return results(self.answer)


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
class Plan:
    """Stands for a decoder while a decoding runs on the meta device, and keeps its calls.

    Raises:
        UnshareableError: from a call, where what it does depends on more than its chain.

    """

    decoder: nn.Module
    calls: list[Call] = field(default_factory=list)
    _chain_of: dict[int, int] = field(default_factory=dict)
    _held: list[Any] = field(default_factory=list)  # an id is an object's own as long as the object is there
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)
    _known: dict[Any, Any] = field(default_factory=dict)
    _num_chains: int = 0

    def __post_init__(self) -> None:
        for name, module in self.decoder.named_modules():
            if vars(module).keys() & {"_hf_hook", "_diffusers_hook"}:  # of accelerate and of diffusers
                where = f"{name} of its decoder" if name else "its decoder"
                raise UnshareableError(f"{where} carries a hook that moves weights while it runs")
        tensors = [*self.decoder.named_parameters(), *self.decoder.named_buffers()]
        self._weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder on the meta device with what it is given, and note the call."""
        given = _Given(self._chain_of)
        meta_args, meta_kwargs = given.on_meta(args), {name: given.on_meta(value) for name, value in kwargs.items()}
        size = sum(tensor.numel() for tensor in given.tensors)
        if len(given.chains) > 1:
            raise UnshareableError("a call of its decoder takes what several others made")
        if given.chains:
            (chain,) = given.chains
        else:
            chain, self._num_chains = self._num_chains, self._num_chains + 1
        if given.holds_state:
            answer = self._run(meta_args, meta_kwargs, given.tensors)
        else:
            key = repr((_signature(args), _signature(kwargs)))
            if key not in self._known:
                self._known[key] = self._run(meta_args, meta_kwargs, given.tensors)
            kept = self._known[key]
            answer = with_results(kept, [torch.empty_like(tensor) for tensor in results(kept)])
            if any(isinstance(part, (list, dict)) for part in _parts(kept)):
                del self._known[key]  # a cache is one tile's own
        for item in (*given.containers, *_parts(answer)):
            self._chain_of[id(item)] = chain
            self._held.append(item)
        self.calls.append(Call(chain=chain, size=size, answer=answer))
        return answer

    def _run(self, args: Any, kwargs: Mapping[str, Any], tensors: list[torch.Tensor]) -> Any:
        before = _attributes(self.decoder)
        versions = [version_of(tensor) for tensor in (*tensors, *self._weights.values())]
        with torch.compiler.set_stance("force_eager"), Drawing() as drawing:
            answer = torch.func.functional_call(self.decoder, self._weights, args, dict(kwargs))
        if drawing.names:
            raise UnshareableError(f"its decoder draws random numbers ({drawing.names[0]})")
        if _attributes(self.decoder) != before:
            raise UnshareableError("its decoder keeps something of a call for the next one in an attribute")
        if versions != [version_of(tensor) for tensor in (*tensors, *self._weights.values())]:
            raise UnshareableError("its decoder writes into what it is given, or into its own weights")
        own, made = {storage_id(tensor) for tensor in tensors}, results(answer)
        if not made or not isinstance(answer, (torch.Tensor, tuple)):
            raise UnshareableError(f"its decoder returns a {type(answer).__name__}, not a tensor or a tuple with one")
        if any(not tensor.is_meta or storage_id(tensor) in own for tensor in made):
            raise UnshareableError("its decoder returns what it was given, or something made elsewhere")
        return answer

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
            elif value.is_meta and cache != "known":
                raise UnshareableError("a call of its decoder takes what was made from an earlier call's result")
            elif not value.is_meta and cache is not None:
                raise UnshareableError("its decoder is given a cache that was filled before")
            meta = value if value.is_meta else torch.empty_like(value, device="meta")
            if cache is None:
                self.tensors.append(meta)
            return meta
        if isinstance(value, tuple):
            return tuple(self.on_meta(part, cache=cache) for part in value)
        if isinstance(value, (list, dict)):
            self.holds_state = True
            self.containers.append(value)
            cache = "known" if self._follow(value) or cache == "known" else "new"
            for part in value if isinstance(value, list) else value.values():
                self.on_meta(part, cache=cache)
            return value
        if not isinstance(value, _PLAIN):
            raise UnshareableError(f"its decoder is given a {type(value).__name__}, which may carry something along")
        return value

    def _follow(self, value: Any) -> bool:
        """Note the chain that a value comes from; False where it comes from none."""
        if id(value) not in self.chain_of:
            return False
        self.chains.add(self.chain_of[id(value)])
        self.holds_state = True
        return True


def _parts(value: Any) -> Iterator[Any]:
    """The tensors, lists and dicts in what a decoder returned."""
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


def _attributes(decoder: nn.Module) -> list[Any]:
    """The plain attributes of all its modules, so that a change of one shows; lists and dicts with what is in them."""
    return [
        (name, key, _content(value))
        for name, module in decoder.named_modules()
        for key, value in vars(module).items()
        if key not in _OWN and "hooks" not in key
    ]


def _content(value: Any) -> Any:
    """A value by what it is: its identity, and of what is in a list or dict each."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple, set)):
        return id(value), [_content(part) for part in value]
    if isinstance(value, dict):
        return id(value), [(str(name), _content(part)) for name, part in value.items()]
    return _Same(value)


class _Same:
    """Holds an object, so that no other gets its id, and equals what holds the same one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
