"""What a captured graph computes and moves: operations and bytes by part, and the least time that a device takes.

Operations are those of matrix products, attention and convolutions, counted exactly. Bytes are counted as if all else
were fused. A product reads its operands and writes its result. Everything else runs in regions between products: a
region reads each tensor that it needs once, and writes each tensor that is read outside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping

import torch
from torch import fx

from hvcompile.graph.flops import FlopCounter
from hvcompile.graph.nodes import is_tensor, op_name, storage
from hvcompile.graph.subgraphs import is_call
from hvcompile.torch_private.fakes import num_bytes, value

REST = "rest"
"""Everything but products (``flops.py`` has their kinds): norms, modulation, activations, rotary embedding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The peaks that a vendor states for a device.

    Attributes:
        name: as the vendor writes it.
        flops: dense operations a second, by the dtype of the operands.
        bandwidth: of its memory, in bytes a second.

    """

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float


def _gpu(name: str, half: float, single: float, bandwidth: float, *, has_float8: bool = True) -> Device:
    """A device by its peaks in TFLOP/s (``half`` is 16-bit on tensor cores, ``single`` fp32 without them) and TB/s.

    Float8 reaches twice as much as 16 bits.
    """
    flops = {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: single * 1e12}
    if has_float8:
        flops[torch.float8_e4m3fn] = 2 * half * 1e12
    return Device(name=name, flops=flops, bandwidth=bandwidth * 1e12)


DEVICES: Mapping[str, Device] = {
    # NVIDIA's data sheets, and for the RTX 4090 and 5090 its architecture whitepapers (Ada, RTX Blackwell), without
    # sparsity; 16-bit figures of Ada and of the RTX 5090 are those with fp32 accumulation.
    "a100": _gpu("NVIDIA A100 80 GB SXM", 312.0, 19.5, 2.039, has_float8=False),
    "l20": _gpu("NVIDIA L20", 119.5, 59.8, 0.864),
    "l40s": _gpu("NVIDIA L40S", 362.0, 91.6, 0.864),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1.008),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", 209.5, 104.8, 1.792),
    "h100": _gpu("NVIDIA H100 SXM", 989.4, 67.0, 3.35),
    "h200": _gpu("NVIDIA H200 SXM", 989.4, 67.0, 4.8),
    "b200": _gpu("NVIDIA B200", 2250.0, 75.0, 8.0),
}
"""Devices by the short name that the command line takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one product costs, or all the rest.

    Attributes:
        part: a kind of product, see ``flops.py``, or ``REST``.
        flops: floating point operations.
        bytes: moved from and to memory.
        dtype: that it computes in.

    """

    part: str
    flops: int
    bytes: int
    dtype: torch.dtype

    def seconds(self, device: Device) -> float:
        """The least time on a device, in seconds: the longer of computing and moving, at the peak of each (roofline).

        Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
        """
        peak = device.flops.get(self.dtype, device.flops[torch.float32])
        return max(self.flops / peak, self.bytes / device.bandwidth)


def costs(graph: fx.Graph) -> list[Cost]:
    """The cost of each product of a graph, in order, and of the rest as one.

    A call of another graph (a block's body, a branch) costs nothing here: its products belong to that graph. Of an
    operation that holds products of several kinds, the first kind moves all the bytes.
    """
    counter = FlopCounter()
    products = {node: flops for node in graph.nodes if (flops := counter.by_kind(node))}
    of_products = []
    for node, flops in products.items():
        moved = _bytes(node) + sum(_bytes(item) for item in dict.fromkeys(node.all_input_nodes))
        for index, (part, number) in enumerate(flops.items()):
            of_products.append(Cost(part=part, flops=number, bytes=0 if index else moved, dtype=_dtype(node)))
    dtypes = [cost.dtype for cost in of_products]
    dtype = max(dtypes, key=dtypes.count, default=torch.float32)
    return [*of_products, Cost(part=REST, flops=0, bytes=_bytes_of_rest(graph, set(products)), dtype=dtype)]


def _dtype(node: fx.Node) -> torch.dtype:
    """The dtype that a product computes in; where operands are float8, its result is wider."""
    operands = [value(item).dtype for item in node.all_input_nodes if is_tensor(item)]
    narrow = [dtype for dtype in operands if dtype.is_floating_point and dtype.itemsize == 1]
    dtype: torch.dtype = (narrow or [value(node).dtype if is_tensor(node) else operands[0]])[0]
    return dtype


def _bytes(node: fx.Node) -> int:
    return num_bytes(value(node)) if is_tensor(node) else 0


def _is_call(node: fx.Node) -> bool:
    """Whether a node runs another graph, or is one of the results of that."""
    if op_name(node) == "getitem" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return is_call(node)


def _bytes_of_rest(graph: fx.Graph, products: set[fx.Node]) -> int:
    """Bytes that the regions between products read and write; of a table, only the rows that are gathered from it."""
    inputs = {node for node in graph.nodes if node.op in {"placeholder", "get_attr"} or _is_call(node)}
    outside = products | inputs  # in no region
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depth[node] = max(
            (depth[item] + (item in products or _is_call(item)) for item in node.all_input_nodes), default=0
        )
    owner: dict[Hashable, fx.Node] = {}
    for node in filter(is_tensor, graph.nodes):
        owner.setdefault(storage(node), node)
    total = 0
    read: set[tuple[fx.Node, int]] = set()
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if node in inputs and not _is_call(node):
            continue
        if owner.get(storage(node), node) is not node:
            continue  # a view, which moves nothing
        for item in filter(is_tensor, node.all_input_nodes):
            source = owner[storage(item)]
            is_outside = source in outside or depth[source] < depth[node]
            if node not in outside and node.op != "output" and is_outside and (source, depth[node]) not in read:
                if _is_gathered(node, item):
                    total += _bytes(node)
                    continue  # another reader may want all of it
                read.add((source, depth[node]))
                total += _bytes(source)
            is_computed_here = source not in outside
            leaves = node.op == "output" or node in outside or depth[source] < depth[node]
            if is_computed_here and leaves and source not in written:
                written.add(source)
                total += _bytes(source)
    return total


def _is_gathered(node: fx.Node, table: fx.Node) -> bool:
    """Whether an operation reads only those rows of a table that another operand names."""
    return op_name(node) in {"embedding", "index_select", "gather"} and _bytes(table) > _bytes(node)
