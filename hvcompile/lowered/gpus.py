"""GPUs to compile for, as their drivers describe them.

Sources: CUDA C++ Programming Guide, "Compute Capabilities" (threads, shared memory), and NVIDIA's architecture
whitepapers (multiprocessors, L2 cache, memory).
"""

from __future__ import annotations

from collections.abc import Mapping

from hvcompile.graph.costs import DEVICES, Device
from hvcompile.torch_private.absent_gpu import Gpu

_GIB = 1 << 30


def _gpu(name: str, capability: tuple[int, int], num_multiprocessors: int, memory_bytes: int, cache_mib: int) -> Gpu:
    """A GPU; what a multiprocessor holds follows from the compute capability (9.0 and 10.0 are data center GPUs)."""
    is_data_center = capability in {(9, 0), (10, 0)}
    return Gpu(
        name=name,
        capability=capability,
        num_multiprocessors=num_multiprocessors,
        memory_bytes=memory_bytes,
        shared_bytes=(227 if is_data_center else 99) << 10,
        threads=2048 if is_data_center else 1536,
        cache_bytes=cache_mib << 20,
    )


GPUS: Mapping[str, Gpu] = {
    "h100": _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 85_029_158_912, 50),
    "h200": _gpu("NVIDIA H200", (9, 0), 132, 141 * 10**9, 50),
    "b200": _gpu("NVIDIA B200", (10, 0), 148, 180 * 10**9, 126),
    "l20": _gpu("NVIDIA L20", (8, 9), 92, 48 * _GIB, 96),
    "l40s": _gpu("NVIDIA L40S", (8, 9), 142, 48 * _GIB, 96),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 24 * _GIB, 72),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 32 * _GIB, 96),
}
"""GPUs by the short name that ``hvcompile lower --gpu`` takes."""


def peaks(gpu: Gpu) -> Device | None:
    """What a GPU computes and moves in a second at most, as its vendor states; None for one that is not in ``GPUS``."""
    return next((DEVICES[key] for key, item in GPUS.items() if item == gpu), None)
