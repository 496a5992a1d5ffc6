"""Collectives as operations of a captured graph: DTensor redistributions that trace away into functional collectives.

Each is a plain function of a tensor and literals (the group goes by its name), so that a graph which calls it can be
printed, dumped and copied; called on an ``fx.Proxy`` it becomes one node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from hvcompile import inductor

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

# By group name and device type. A mesh can't be made while a graph is traced: its table of ranks would become a fake
# tensor. An entry is used only as long as its process group is the one that goes by the name.
_MESHES: dict[tuple[str, str], DeviceMesh] = {}


def mesh_of(group: str, device_type: str) -> DeviceMesh:
    """The one-dimensional mesh of a process group's ranks.

    Args:
        group: the name of a process group of this process (``ProcessGroup.group_name``).
        device_type: "cpu" or "cuda".

    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"this graph holds one rank's share of the work and talks to the others of group {group!r}: run it under "
            "torchrun, with the process group initialised as it was when the graph was compiled"
        )
    process_group = inductor.process_group(group)
    known = _MESHES.get((group, device_type))
    if known is None or known.get_group() is not process_group:
        known = _MESHES[group, device_type] = DeviceMesh.from_group(process_group, device_type)
    return known


def reshard(local: Any, group: str, source: int, target: int) -> Any:
    """Split another dimension over the ranks: an all-to-all.

    Args:
        local: this rank's part of a tensor that is split evenly over the ranks along dimension ``source``.
        group: the process group's name.
        source: the dimension that is split now.
        target: the dimension to split instead; a multiple of the ranks.

    Returns:
        This rank's part along ``target``, whole along ``source``; contiguous.

    """
    if isinstance(local, fx.Proxy):
        return local.tracer.create_proxy("call_function", reshard, (local, group, source, target), {})
    from torch.distributed.tensor import Shard

    return _redistribute(local, group, Shard(source), Shard(target))


def gather(local: Any, group: str, dim: int) -> Any:
    """Every rank's part of a tensor that is split evenly along ``dim``, joined in the order of the ranks."""
    if isinstance(local, fx.Proxy):
        return local.tracer.create_proxy("call_function", gather, (local, group, dim), {})
    from torch.distributed.tensor import Replicate, Shard

    return _redistribute(local, group, Shard(dim), Replicate())


def total(local: Any, group: str) -> Any:
    """The sum of a tensor over the ranks; the same bits on each."""
    if isinstance(local, fx.Proxy):
        return local.tracer.create_proxy("call_function", total, (local, group), {})
    from torch.distributed.tensor import Partial, Replicate

    return _redistribute(local, group, Partial(), Replicate())


def _redistribute(local: torch.Tensor, group: str, source: Placement, target: Placement) -> torch.Tensor:
    from torch.distributed.tensor import DTensor  # half a second to import, of which one process alone has no use

    mesh = mesh_of(group, local.device.type)
    moved = DTensor.from_local(local, mesh, [source], run_check=False).redistribute(mesh, [target]).to_local()
    wait = getattr(moved, "wait", None)  # run eagerly, it may still be on its way
    return moved if wait is None else wait()
