"""Collectives as operations of a captured graph.

Gathers and sums are DTensor redistributions, which trace away into functional collectives. The rest are functional
all-to-alls. Traffic between some ranks of a group (its rows or columns) is one all-to-all of the whole group, in which
the other ranks get nothing. So no further process group has to be made, by ranks that might not all come to make it.

Each collective is a plain function of a tensor and literals; the process group goes by its name. So a graph that calls
one can be printed, dumped and copied. Called on an ``fx.Proxy``, a collective becomes one node.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from hvcompile.torch_private import distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

_Parameters = ParamSpec("_Parameters")

# By group name and device type. A mesh can't be made while a graph is traced: its table of ranks would become a fake
# tensor. An entry is used only while its process group is the one of that name.
_MESHES: dict[tuple[str, str], DeviceMesh] = {}


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of this process that has a name.

    Raises:
        RuntimeError: no group has it.

    """
    if dist.is_available():
        with contextlib.suppress(RuntimeError):
            return distributed.process_group(name)
    raise RuntimeError(
        f"this graph holds one rank's share of the work and talks to the others of process group {name!r}, which is "
        "gone or was never made: run it under torchrun, with the process group initialised as it was when the graph "
        "was compiled, or call torch.compiler.reset() and compile for this process alone"
    )


def _one_node(function: Callable[_Parameters, Any]) -> Callable[_Parameters, Any]:
    """Make a function of a tensor into graph code: called on an ``fx.Proxy``, it becomes one node."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Any:
        if isinstance(args[0], fx.Proxy):
            return args[0].tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call


def mesh_of(group: str, device_type: str) -> DeviceMesh:
    """The one-dimensional mesh of a process group's ranks.

    Args:
        group: the name of a process group of this process (``ProcessGroup.group_name``).
        device_type: "cpu" or "cuda".

    """
    own = process_group(group)
    mesh = _MESHES.get((group, device_type))
    # A mesh holds its group by name alone: of a group that was made anew under that name it gives the new one.
    is_same = mesh is not None and mesh.get_group() is own and mesh.size() == own.size()
    if mesh is None or not is_same:
        mesh = _MESHES[group, device_type] = DeviceMesh.from_group(own, device_type)
    return mesh


@_one_node
def reshard(local: Any, group: str, source: int, target: int, rows: int = 1) -> Any:
    """Split another dimension over the ranks of each row: one all-to-all.

    DTensor's redistribution is not used here. On CUDA it is an operator of its own that Inductor neither orders nor
    keeps from copying, and on CPUs an all-gather.

    Args:
        local: this rank's part of a tensor that is split evenly over the ranks of a row along dimension ``source``.
        group: the process group's name.
        source: the dimension that is split now.
        target: the dimension to split instead; a multiple of the ranks of a row.
        rows: into how many equal parts of consecutive ranks the group is cut.

    Returns:
        This rank's part along ``target``, whole along ``source``.

    """
    own = process_group(group)
    size, rank = own.size(), own.rank()
    columns = size // rows
    splits = [int(other // columns == rank // columns) for other in range(size)]
    pieces = local.unflatten(target, (columns, -1)).movedim(target, 0).contiguous()
    moved = arrived(distributed.all_to_all(pieces, splits, splits, group))
    return moved.movedim(0, source).flatten(source, source + 1)


@distributed.left_running
@_one_node
def pass_on(local: Any, group: str, rows: int) -> Any:
    """Send a tensor to the same column of the next row, and receive that of the row before; a ring.

    Args:
        local: a tensor of the same shape on all ranks. It must not change until ``arrived`` has returned.
        group: the process group's name.
        rows: into how many equal parts of consecutive ranks the group is cut.

    Returns:
        The other rank's tensor, still on its way; ``arrived`` waits for it.

    """
    own = process_group(group)
    size, rank = own.size(), own.rank()
    columns, length = size // rows, local.shape[0]
    receiver, sender = (rank + columns) % size, (rank - columns) % size
    rows_out = [length * (other == receiver) for other in range(size)]
    rows_in = [length * (other == sender) for other in range(size)]
    return distributed.all_to_all(local.contiguous(), rows_in, rows_out, group)


@_one_node
def arrived(moving: Any) -> Any:
    """Wait for a tensor that ``pass_on`` returned, and return it."""
    return distributed.wait(moving)


@_one_node
def gather(local: Any, group: str, dim: int) -> Any:
    """Every rank's part of a tensor that is split evenly along ``dim``, joined in the order of the ranks."""
    from torch.distributed.tensor import Replicate, Shard

    return _redistribute(local, group, Shard(dim), Replicate())


@_one_node
def broadcast(local: Any, group: str) -> Any:
    """Rank 0's tensor on every rank, bit for bit; contiguous."""
    return distributed.wait(distributed.broadcast(local.contiguous(), group))


@_one_node
def total(local: Any, group: str) -> Any:
    """The sum of a tensor over the ranks; the same bits on each."""
    from torch.distributed.tensor import Partial, Replicate

    return _redistribute(local, group, Partial(), Replicate())


def _redistribute(local: torch.Tensor, group: str, source: Placement, target: Placement) -> torch.Tensor:
    from torch.distributed.tensor import DTensor  # half a second to import, of which one process alone has no use

    mesh = mesh_of(group, local.device.type)
    moved = DTensor.from_local(local, mesh, [source], run_check=False).redistribute(mesh, [target]).to_local()
    wait = getattr(moved, "wait", None)  # run eagerly, it may still be on its way
    return moved if wait is None else wait()
