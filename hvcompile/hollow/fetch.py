"""The operator by which a compiled graph brings weights from the host to the device while something else computes.

On CUDA copies run on a stream of their own. Their targets are allocated on the stream that computes, so torch's
allocator gives memory again that an earlier block's weights had: as many weights are on the device as the graph holds
at once, however far the host runs ahead. The copy waits for what that stream was given before, and that stream waits
for the copy when the weights are needed. The host waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


@torch.library.custom_op("hvcompile::fetch", mutates_args=())
def _fetch(
    hosts: Sequence[torch.Tensor],
    arriving: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    del after  # an order, for compilers
    is_cuda = device.type == "cuda"
    if is_cuda and arriving:
        torch.cuda.current_stream(device).wait_stream(_copying(device))
    targets = _targets(hosts, device)
    if is_cuda and hosts:
        copying = _copying(device)
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            _copy(targets, hosts)
    else:
        _copy(targets, hosts)
    return [*targets, torch.empty((), device=device)]


@_fetch.register_fake
def _(
    hosts: Sequence[torch.Tensor],
    arriving: Sequence[torch.Tensor],
    after: Sequence[torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    return [*_targets(hosts, device), torch.empty((), device=device)]


def _targets(hosts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device) for host in hosts]


def _copy(targets: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor]) -> None:
    for target, host in zip(targets, hosts, strict=True):
        target.copy_(host, non_blocking=True)


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies to a device. It holds nothing from call to call, and one is enough for one bus."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


FETCH = torch.ops.hvcompile.fetch.default
"""``(hosts, arriving, after, device)``: waits for weights that are on their way, and starts to bring others.

Args: tensors on the host to bring; what an earlier call returned and what is waited for; tensors that are computed
before the others are brought; the device. Returns a tensor on the device for each of ``hosts``, which may be read after
another call has taken it as ``arriving``, and an empty token: who takes the token runs after this call.
"""


@torch.library.custom_op("hvcompile::fetch_now", mutates_args=())
def _fetch_now(hosts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    targets = _targets(hosts, device)
    _copy(targets, hosts)
    return targets


@_fetch_now.register_fake
def _(hosts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return _targets(hosts, device)


FETCH_NOW = torch.ops.hvcompile.fetch_now.default
"""``(hosts, device)``: brings tensors from the host; what reads them waits, and nothing is computed meanwhile."""
