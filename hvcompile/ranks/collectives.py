"""Collectives as operations of a captured graph: DTensor redistributions that trace away into functional collectives.

What moves between some ranks of a group alone, its rows and columns, is one all-to-all of the group in which the others
get nothing: no other process group has to be made, by ranks that might not all come to make it.

Each is a plain function of a tensor and literals (the group goes by its name), so that a graph which calls it can be
printed, dumped and copied; called on an ``fx.Proxy`` it becomes one node.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from hvcompile.torch_private import distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

# By group name and device type. A mesh can't be made while a graph is traced: its table of ranks would become a fake
# tensor. An entry is used only as long as its process group is the one that goes by the name.
_MESHES: dict[tuple[str, str], DeviceMesh] = {}


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of this process that goes by a name.

    Raises:
        RuntimeError: there is none.

    """
    if dist.is_available():
        with contextlib.suppress(RuntimeError):
            return distributed.process_group(name)
    raise RuntimeError(
        f"this graph holds one rank's share of the work and talks to the others of process group {name!r}, which is "
        "gone or was never made: run it under torchrun, with the process group initialised as it was when the graph "
        "was compiled, or call torch.compiler.reset() and compile for this process alone"
    )


def mesh_of(group: str, device_type: str) -> DeviceMesh:
    """The one-dimensional mesh of a process group's ranks.

    Args:
        group: the name of a process group of this process (``ProcessGroup.group_name``).
        device_type: "cpu" or "cuda".

    """
    own = process_group(group)
    known = _MESHES.get((group, device_type))
    # A mesh holds its group by name alone: of a group that was made anew under that name it gives the new one.
    is_same = known is not None and known.get_group() is own and known.size() == own.size()
    if known is None or not is_same:
        known = _MESHES[group, device_type] = DeviceMesh.from_group(own, device_type)
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


def reshard_row(local: Any, group: str, source: int, target: int, rows: int) -> Any:
    """As ``reshard``, among the ranks of each of ``rows`` equally many that follow each other."""
    if isinstance(local, fx.Proxy):
        return local.tracer.create_proxy("call_function", reshard_row, (local, group, source, target, rows), {})
    own = process_group(group)
    size, rank = own.size(), own.rank()
    columns = size // rows
    splits = [int(other // columns == rank // columns) for other in range(size)]
    pieces = local.unflatten(target, (columns, -1)).movedim(target, 0).contiguous()
    moved = arrived(distributed.all_to_all(pieces, splits, splits, group))
    return moved.movedim(0, source).flatten(source, source + 1)


def pass_on(local: Any, group: str, rows: int) -> Any:
    """Hand a tensor to the rank below, in the next of ``rows`` rows, and get that of the rank above; a ring.

    Args:
        local: a tensor of the same shape on all ranks.
        group: the process group's name.
        rows: as many equal parts of the group, of ranks that follow each other.

    Returns:
        What the rank above had, once ``arrived`` has waited for it; until then ``local`` must stay as it is.

    """
    if isinstance(local, fx.Proxy):
        return local.tracer.create_proxy("call_function", pass_on, (local, group, rows), {})
    own = process_group(group)
    size, rank = own.size(), own.rank()
    columns, length = size // rows, local.shape[0]
    to, of = (rank + columns) % size, (rank - columns) % size
    given = [length * (other == to) for other in range(size)]
    taken = [length * (other == of) for other in range(size)]
    return distributed.all_to_all(local.contiguous(), taken, given, group)


def arrived(moving: Any) -> Any:
    """Wait for what ``pass_on`` gave."""
    if isinstance(moving, fx.Proxy):
        return moving.tracer.create_proxy("call_function", arrived, (moving,), {})
    return distributed.wait(moving)


def gather(local: Any, group: str, dim: int) -> Any:
    """Every rank's part of a tensor that is split evenly along ``dim``, joined in the order of the ranks."""
    if isinstance(local, fx.Proxy):
        return local.tracer.create_proxy("call_function", gather, (local, group, dim), {})
    from torch.distributed.tensor import Replicate, Shard

    return _redistribute(local, group, Shard(dim), Replicate())


def broadcast(local: Any, group: str) -> Any:
    """The first rank's tensor, bit for bit, in place of each rank's own; contiguous."""
    if isinstance(local, fx.Proxy):
        return local.tracer.create_proxy("call_function", broadcast, (local, group), {})
    return distributed.wait(distributed.broadcast(local.contiguous(), group))


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
