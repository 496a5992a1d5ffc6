"""What a captured graph computes and moves: operations and bytes by part, and the least time that a device takes.

Operations are those of matrix products, attention and convolutions, counted exactly. Bytes are counted as after
fusion: a product reads its operands and writes its result; everything else runs in regions between products, and a
region reads each tensor that it needs once and writes each tensor that is read outside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping

import torch
from torch import fx

from hvcompile.inductor import numel_hint, value
from hvcompile.nodes import is_tensor, op_name, storage
from hvcompile.structure import PRODUCTS, arithmetic

LINEAR, ATTENTION, CONVOLUTION, REST = "linear", "attention", "convolution", "rest"
"""The parts; ``rest`` is all that is no product: norms, modulation, activations, rotary embedding, residuals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The peaks that a vendor states for a device: dense operations a second by dtype, and bytes a second of memory."""

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float


def _gpu(name: str, half: float, single: float, bandwidth: float, *, has_float8: bool = True) -> Device:
    """Peaks in TFLOP/s (16-bit tensor cores, of which float8 gives twice as much; fp32 without them) and TB/s."""
    flops = {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: single * 1e12}
    if has_float8:
        flops[torch.float8_e4m3fn] = 2 * half * 1e12
    return Device(name=name, flops=flops, bandwidth=bandwidth * 1e12)


DEVICES: Mapping[str, Device] = {
    # NVIDIA's data sheets, without sparsity; Ada's 16-bit figures are those with fp32 accumulation.
    "a100": _gpu("NVIDIA A100 80 GB SXM", 312.0, 19.5, 2.039, has_float8=False),
    "l20": _gpu("NVIDIA L20", 119.5, 59.8, 0.864),
    "l40s": _gpu("NVIDIA L40S", 362.0, 91.6, 0.864),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1.008),
    "h100": _gpu("NVIDIA H100 SXM", 989.4, 67.0, 3.35),
    "h200": _gpu("NVIDIA H200 SXM", 989.4, 67.0, 4.8),
    "b200": _gpu("NVIDIA B200", 2250.0, 75.0, 8.0),
}
"""Devices by the short name that the command line takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One operation, or all that is no product: operations, bytes moved, and the dtype that it computes in."""

    part: str
    flops: int
    bytes: int
    dtype: torch.dtype

    def seconds(self, device: Device) -> float:
        """The least time on a device: the longer of computing at peak and moving at peak (the roofline model).

        Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
        """
        peak = device.flops.get(self.dtype, device.flops[torch.float32])
        return max(self.flops / peak, self.bytes / device.bandwidth)


def costs(graph: fx.Graph) -> list[Cost]:
    """Every product of a captured graph with what it costs, and the rest as one."""
    products = [node for node in graph.nodes if _part(node) != REST]
    found = [
        Cost(
            part=_part(node),
            flops=arithmetic(node),
            bytes=_bytes(node) + sum(_bytes(item) for item in dict.fromkeys(node.all_input_nodes)),
            dtype=value(node if is_tensor(node) else node.all_input_nodes[0]).dtype,
        )
        for node in products
    ]
    dtype = max((cost.dtype for cost in found), key=[cost.dtype for cost in found].count, default=torch.float32)
    return [*found, Cost(part=REST, flops=0, bytes=_bytes_of_rest(graph), dtype=dtype)]


def _part(node: fx.Node) -> str:
    if node.op not in {"call_function", "call_method"}:
        return REST
    name = op_name(node)
    if "scaled_dot_product" in name:
        return ATTENTION  # where a kernel is pinned, a tuple
    if not is_tensor(node):
        return REST
    if name.startswith("conv"):
        return CONVOLUTION
    return LINEAR if name in PRODUCTS else REST


def _bytes(node: fx.Node) -> int:
    return numel_hint(value(node)) * value(node).element_size() if is_tensor(node) else 0


def _bytes_of_rest(graph: fx.Graph) -> int:
    """Bytes that the regions between products read and write."""
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depth[node] = max((depth[item] + (_part(item) != REST) for item in node.all_input_nodes), default=0)
    owner: dict[Hashable, fx.Node] = {}
    for node in filter(is_tensor, graph.nodes):
        owner.setdefault(storage(node), node)
    total = 0
    read: set[tuple[fx.Node, int]] = set()
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in {"placeholder", "get_attr"} or owner.get(storage(node), node) is not node:
            continue  # an input, or a view, which moves nothing
        for item in filter(is_tensor, node.all_input_nodes):
            source = owner[storage(item)]
            is_given = source.op in {"placeholder", "get_attr"}
            is_outside = is_given or _part(source) != REST or depth[source] < depth[node]
            if _part(node) == REST and node.op != "output" and is_outside and (source, depth[node]) not in read:
                read.add((source, depth[node]))
                total += _bytes(source)
            is_made_here = not is_given and _part(source) == REST
            leaves = node.op == "output" or _part(node) != REST or depth[source] < depth[node]
            if is_made_here and leaves and source not in written:
                written.add(source)
                total += _bytes(source)
    return total
