"""Weights that stay on the host, of which a compiled graph brings those of a block to the device when it needs them.

The parameter keeps its identity and is hollow (see ``parameter``); its values lie in pinned memory of the host, where
``state_dict`` finds them and ``load_state_dict`` writes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from hvcompile.errors import InputError, OffloadedWeightError, QuantizedWeightError
from hvcompile.hollow.memory import HostMemory
from hvcompile.hollow.parameter import HollowParameter, HollowStorage, empty_of, empty_out, fill
from hvcompile.torch_private.dynamo import compiled_module

LEAST_SHARE = 0.1
"""Of the model's bytes: lists of layers with less are no trunk (embedders, refiners), and stay on the device."""

_CURE = (
    "call hvcompile.restore(model) before you cast, change, fuse or copy the model or run it uncompiled (a call beyond "
    "Dynamo's recompile limit runs uncompiled as well). state_dict() and load_state_dict() work as they are"
)


class _Storage(HollowStorage):
    error, state, cure = OffloadedWeightError, "on the host", _CURE


class HostWeight(HollowParameter):
    """A parameter without memory on its device, whose values are on the host.

    Attributes:
        host: the values, of its shape, strides and dtype; nothing replaces this tensor as long as the weight is one.
        memory: what ``host`` was allocated by, and what comes of it is.

    """

    host: torch.Tensor
    memory: HostMemory
    storage_kind = _Storage
    since = "hvcompile.offload"
    elsewhere: ClassVar[str] = (
        "this model's weights are kept on the host since hvcompile.offload, so a torch.compile of it by another "
        "backend than hvfast can't read them: call hvcompile.restore(model) first. A backend that calls hvfast is "
        "known as one where it is functools.partial(hvfast, ...)"
    )

    @classmethod
    def answer(cls, name: str, args: Sequence[Any], kwargs: Any) -> Any:
        """What ``state_dict`` and ``load_state_dict`` ask for: the host's tensor, and a write into it."""
        if name == "detach":
            return _settled(args[0]).detach()  # shares values and version, and no more: its shape is the caller's
        if name == "copy_" and len(args) > 1:
            target, source = (_settled(item) if isinstance(item, HostWeight) else item for item in args[:2])
            target.copy_(source)
            return args[0]
        return NotImplemented

    @torch.no_grad()
    def moved_to(self, device: torch.device) -> HostWeight:
        """A weight of the same host's tensor, which thinks itself on a device."""
        moved = empty_of(self, HostWeight, self.path, device)
        moved.host, moved.memory = self.host, self.memory
        return moved  # type: ignore[no-any-return]

    def follow(self, moved: HollowParameter) -> bool:
        """Whether that is another place for the same values."""
        return isinstance(moved, HostWeight) and moved.host is self.host


def _settled(weight: HostWeight) -> torch.Tensor:
    """The host's tensor, once no transfer that was started reads it any more: who asks may write."""
    if weight.device.type == "cuda":
        torch.cuda.synchronize(weight.device)
    return weight.host


def values_on_host(weight: torch.Tensor) -> torch.Tensor:
    """What a graph takes for a weight that it fetches: the host's tensor, or an ordinary weight itself."""
    return weight.host if isinstance(weight, HostWeight) else weight


@torch.inference_mode(False)
@torch.no_grad()
def put_on_host(weight: torch.Tensor, path: str, device: torch.device, memory: HostMemory) -> None:
    """Make a parameter a ``HostWeight`` of a device; at no time is it there."""
    requires_grad = weight.requires_grad
    host = memory.copy_of(weight)
    try:
        empty_out(weight, path, HostWeight, device)
    except BaseException:
        weight.data = host  # it has let go of its own, and no value may be lost
        raise
    weight.host, weight.memory = host, memory  # type: ignore[attr-defined]
    weight.requires_grad_(requires_grad)


@torch.no_grad()
def bring_back(weight: HostWeight) -> None:
    """Make a weight that is kept on the host an ordinary parameter there."""
    fill(weight, _settled(weight), "host", "memory")


class Offloaded(NamedTuple):
    """What ``hvcompile.offload`` did.

    Attributes:
        host_weights: how many weights are on the host.
        host_bytes: what they take there.
        device_bytes: what all other weights and buffers take on the device.
        largest_block_bytes: of the weights that a block has on the host; two such blocks are on the device at once.
        host_blocks: how many blocks have weights on the host.
        resident_blocks: how many blocks are on the device as a whole.

    """

    host_weights: int
    host_bytes: int
    device_bytes: int
    largest_block_bytes: int
    host_blocks: int
    resident_blocks: int


@torch.inference_mode(False)
def offload(model: torch.nn.Module, device: torch.device | str = "cuda", *, resident_blocks: int = 1) -> Offloaded:
    """Keep the matrices of a model's repeated blocks on the host, for hvfast to fetch block by block.

    Call it before the model is compiled with ``backend="hvfast"``, in place of ``model.to(device)``. All but the
    blocks' matrices moves to the device. At no time is the model there as a whole. Blocks are the members of lists of
    equal modules that hold a tenth of the model's bytes or more.

    In the compiled graph the matrices of one block are on their way while the block before computes, so those of two
    blocks are on the device at once. A step that the first-block cache reuses fetches none, if the first block is on
    the device.

    Args:
        model: called under ``torch.no_grad()`` or ``torch.inference_mode()``. It may have been offloaded before.
        device: where the model computes.
        resident_blocks: how many blocks stay on the device as a whole, 0 or more, spread evenly: the first one, which
            runs in every step, and then as many as there is room for.

    Raises:
        InputError: the model is none or has no repeated blocks, the device is not there, or ``resident_blocks`` is
            negative.
        QuantizedWeightError: its weights are in float8 alone already.

    """
    inner: Any = compiled_module(model)
    if not isinstance(inner, torch.nn.Module):
        raise InputError(f"{type(model).__name__} is no torch.nn.Module: give a pipeline's model, as pipe.transformer")
    place = _placed(device)
    if isinstance(resident_blocks, bool) or not isinstance(resident_blocks, int) or resident_blocks < 0:
        raise InputError(f"resident_blocks is {resident_blocks!r}; allowed is a whole number, 0 or more")
    blocks = blocks_of(inner)
    if not blocks:
        raise InputError(
            f"{type(inner).__name__} has no list of equal blocks that holds a tenth of its bytes: nothing to keep on "
            "the host. Move it with .to(device)"
        )
    _refuse_hollow(inner)
    per_block = list(_put_blocks_on_host(inner, blocks, set(spread(len(blocks), resident_blocks)), place))
    weights = {id(weight): weight for own in per_block for weight in own}
    if not weights and resident_blocks < len(blocks):
        kinds = sorted({type(weight).__name__ for _, block in blocks for weight in block.parameters()})
        raise InputError(
            f"no matrix of the blocks can be kept on the host: their weights are {', '.join(kinds)}, or other modules "
            "read them too. Nothing was moved. Move the model with .to(device)"
        )
    torch.nn.Module.to(inner, place)  # diffusers' own warns of what it does not know of
    rest = {id(item): item for item in itertools.chain(inner.parameters(), inner.buffers()) if id(item) not in weights}
    return Offloaded(
        host_weights=len(weights),
        host_bytes=sum(map(num_bytes, weights.values())),
        device_bytes=sum(map(num_bytes, rest.values())),
        largest_block_bytes=max(sum(map(num_bytes, own)) for own in per_block),
        host_blocks=sum(bool(own) for own in per_block),
        resident_blocks=sum(not own for own in per_block),
    )


def _put_blocks_on_host(
    model: torch.nn.Module,
    blocks: Sequence[tuple[str, torch.nn.Module]],
    resident: Collection[int],
    device: torch.device,
) -> Iterator[list[torch.Tensor]]:
    """Give each block's weights on the host, once they are there; those of resident blocks become ordinary ones."""
    elsewhere, memory = _read_outside(model, [module for _, module in blocks]) | _of_adapters(model), HostMemory()
    for number, (path, block) in enumerate(blocks):
        own: list[torch.Tensor] = []
        for name, weight in block.named_parameters():
            if number in resident or id(weight) in elsewhere or not _is_matrix(weight):
                if isinstance(weight, HostWeight):
                    bring_back(weight)
                continue
            if not isinstance(weight, HostWeight):
                put_on_host(weight, f"{path}.{name}", device, memory)
            own.append(weight)
        yield own


def num_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor's elements, wherever they are."""
    return tensor.numel() * tensor.element_size()


def blocks_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The repeated blocks of a model with their paths: members of the outermost large lists of equal modules."""
    least = LEAST_SHARE * sum(map(num_bytes, model.parameters()))
    found: list[tuple[str, torch.nn.Module]] = []

    def look(path: str, module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            members = list(child.named_children()) if isinstance(child, torch.nn.ModuleList) else []
            is_large = sum(map(num_bytes, child.parameters())) >= least
            is_list = is_large and len({type(member) for _, member in members}) == 1
            count = len(found)
            if len(members) < 2 or not is_list:
                look(inner, child)
            if is_list and len(found) == count:  # a list of one may hold the whole stack
                found.extend((f"{inner}.{number}", member) for number, member in members)

    look("", model)
    return found


def spread(count: int, wanted: int) -> list[int]:
    """So many of ``count`` places, evenly spread from the first one on."""
    wanted = min(wanted, count)
    return [number * count // wanted for number in range(wanted)]


def _placed(device: torch.device | str) -> torch.device:
    try:
        place = torch.empty(0, device=device).device  # with the number of the current GPU
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without
        raise InputError(f"device {str(device)!r} is not there: {' '.join(str(error).split())[:120]}") from error
    if place.type == "meta":
        raise InputError("device is 'meta', on which nothing computes: give the one that the model runs on, as 'cuda'")
    return place


def _is_matrix(weight: torch.Tensor) -> bool:
    """Whether a weight is worth a transfer; vectors of all blocks take a thousandth of the model."""
    is_plain = type(weight) in {torch.nn.Parameter, HostWeight} and weight.layout is torch.strided
    return is_plain and weight.ndim > 1 and weight.numel() > 0 and _is_dense(weight)


def _is_dense(weight: torch.Tensor) -> bool:
    """Whether each element has a place of its own and none lies between; not so where a weight was expanded."""
    extent = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and stride != extent:
            return False
        extent *= size
    return True


def _read_outside(model: torch.nn.Module, blocks: Sequence[torch.nn.Module]) -> set[int]:
    """Weights that modules outside of the blocks have too."""
    inside = {id(module) for block in blocks for module in block.modules()}
    modules: Iterator[torch.nn.Module] = (module for module in model.modules() if id(module) not in inside)
    return {id(weight) for module in modules for weight in module.parameters(recurse=False)}


def _of_adapters(model: torch.nn.Module) -> set[int]:
    """Weights of adapters, which are small and may be swapped: PEFT's layers name the modules that hold them."""
    found: set[int] = set()
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            held = getattr(module, name, None)
            if isinstance(held, torch.nn.Module):
                found |= {id(weight) for weight in held.parameters()}
    return found


def _refuse_hollow(model: torch.nn.Module) -> None:
    for weight in model.parameters():
        if isinstance(weight, HollowParameter) and not isinstance(weight, HostWeight):
            raise QuantizedWeightError(
                f"{weight.path} is kept {weight.storage_kind.state} since {weight.since}: call "
                "hvcompile.restore(model) before hvcompile.offload"
            )
