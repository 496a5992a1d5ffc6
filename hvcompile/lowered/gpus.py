"""GPUs to compile for, as their drivers describe them.

Sources: CUDA C++ Programming Guide, "Compute Capabilities" (threads, shared memory), and NVIDIA's architecture
whitepapers (multiprocessors, L2 cache, memory). cuDNN's attention comes first in torch's order on Hopper and newer data
center GPUs, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

from hvcompile.torch_private.absent_gpu import Gpu

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        num_multiprocessors=132,
        memory_bytes=85_029_158_912,
        shared_bytes=227 * _KIB,
        threads=2048,
        cache_bytes=50 * _MIB,
        attention=("cudnn", "flash"),
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        capability=(9, 0),
        num_multiprocessors=132,
        memory_bytes=141 * 1_000_000_000,
        shared_bytes=227 * _KIB,
        threads=2048,
        cache_bytes=50 * _MIB,
        attention=("cudnn", "flash"),
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability=(10, 0),
        num_multiprocessors=148,
        memory_bytes=180 * 1_000_000_000,
        shared_bytes=227 * _KIB,
        threads=2048,
        cache_bytes=126 * _MIB,
        attention=("cudnn", "flash"),
    ),
    "l20": Gpu(
        name="NVIDIA L20",
        capability=(8, 9),
        num_multiprocessors=92,
        memory_bytes=48 * _GIB,
        shared_bytes=99 * _KIB,
        threads=1536,
        cache_bytes=96 * _MIB,
        attention=("flash",),
    ),
    "l40s": Gpu(
        name="NVIDIA L40S",
        capability=(8, 9),
        num_multiprocessors=142,
        memory_bytes=48 * _GIB,
        shared_bytes=99 * _KIB,
        threads=1536,
        cache_bytes=96 * _MIB,
        attention=("flash",),
    ),
    "rtx4090": Gpu(
        name="NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        num_multiprocessors=128,
        memory_bytes=24 * _GIB,
        shared_bytes=99 * _KIB,
        threads=1536,
        cache_bytes=72 * _MIB,
        attention=("flash",),
    ),
    "rtx5090": Gpu(
        name="NVIDIA GeForce RTX 5090",
        capability=(12, 0),
        num_multiprocessors=170,
        memory_bytes=32 * _GIB,
        shared_bytes=99 * _KIB,
        threads=1536,
        cache_bytes=96 * _MIB,
        attention=("flash",),
    ),
}
"""GPUs by the short name that ``hvcompile lower --gpu`` takes."""
