"""What compiled code does in one step: launches, library calls, copies, synchronisations, collectives, and memory."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvcompile.float8.format import DTYPE
from hvcompile.float8.rules import refusals
from hvcompile.graph.costs import Device
from hvcompile.graph.flops import UNKNOWN_TO_TORCH
from hvcompile.lowered.flows import Buffer, Flows, kernel_operands
from hvcompile.torch_private.absent_inputs import fake_tensors
from hvcompile.torch_private.fakes import num_bytes
from hvcompile.torch_private.generated_code import Hooks, run
from hvcompile.torch_private.storages import LiveBytes, storage_id

TRITON, LIBRARY, COPY, SYNC, COLLECTIVE, WAIT = "Triton", "library", "copy", "synchronisation", "collective", "wait"
TRANSFER = "transfer"
"""Weights that are brought from the host; its bytes are theirs."""

# Operators that move nothing: they allocate, or look at memory in another way.
_FREE = re.compile(
    r"(prim\.|hvcompile\.leave\.|aten\.(empty|empty_strided|as_strided|view|_unsafe_view|slice|select|permute|t"
    r"|transpose|unsqueeze|squeeze|expand|detach|split|split_with_sizes|alias)\.)"
)
# Operators that wait for the device, to know how much memory their results take.
_WAITING = re.compile(r"aten\.nonzero\.")
_NEW = "aten.empty"
_COPIES = re.compile(r"aten\.(copy_|clone|_to_copy|cat|constant_pad_nd|contiguous)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that the code has the device, or the host, do.

    Attributes:
        kind: one of this module's kinds.
        name: of the kernel or operator.
        where: the functions of the code that it stands in, the outermost first: a branch, a block's body.
        num_bytes: read and written, as if each operand were moved once; of a Triton kernel Inductor's own estimate.
        memory: of a collective and of a wait, what tells its result from all others.
        flops: floating point operations of a library call's products; those of Triton kernels are not counted.
        dtype: that those are computed in.

    """

    kind: str
    name: str
    where: tuple[str, ...]
    num_bytes: int
    memory: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32

    def seconds(self, device: Device) -> float:
        """The least time that it takes a device to compute and to move this, whichever takes longer (roofline).

        A model of the kernels alone: what comes from the host or from other ranks takes none here.

        Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
        """
        if self.kind not in {TRITON, LIBRARY, COPY}:
            return 0.0
        peak = device.flops.get(self.dtype, device.flops[torch.float32])
        return max(self.flops / peak, self.num_bytes / device.bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """One step of the compiled code.

    Attributes:
        events: in order.
        peak_bytes: the most that its buffers take at once, beside what it is given.
        peak_at: what was made when that was reached.
        input_bytes: of what it is given: weights, state, inputs.
        buffers: what its events wrote, and which of them read it.

    """

    events: tuple[Event, ...]
    buffers: tuple[Buffer, ...] = dataclasses.field(repr=False)
    peak_bytes: int
    peak_at: str
    input_bytes: int

    def count(self, kind: str) -> int:
        """How many events are of a kind."""
        return sum(event.kind == kind for event in self.events)

    @property
    def num_launches(self) -> int:
        """Triton kernels, library calls and copies; a library call may launch more than one kernel."""
        return sum(event.kind in {TRITON, LIBRARY, COPY} for event in self.events)

    @property
    def num_bytes(self) -> int:
        """Read and written on the device in all."""
        return sum(event.num_bytes for event in self.events if event.kind != TRANSFER)

    @property
    def flops(self) -> int:
        """Floating point operations of the products."""
        return sum(event.flops for event in self.events)

    def seconds(self, device: Device) -> float:
        """The least time of all kernels one after the other: see ``Event.seconds``."""
        return sum(event.seconds(device) for event in self.events)

    @property
    def transferred_bytes(self) -> int:
        """Brought from the host."""
        return sum(event.num_bytes for event in self.events if event.kind == TRANSFER)

    @property
    def has_branches(self) -> bool:
        """Whether the device decides what comes next."""
        return any(event.kind == SYNC and event.name == _DECISION for event in self.events)

    def by_function(self) -> Mapping[str, Mapping[str, float]]:
        """Mean number of events of each kind in one call of each function of the code; "" is outside of all."""
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        calls = collections.Counter(event.name for event in self.events if event.kind == _ENTER)
        for event in self.events:
            if event.kind != _ENTER:
                counts[event.where[-1] if event.where else ""][event.kind] += 1
        return {
            name: {kind: number / max(1, calls[name]) for kind, number in kinds.items()}
            for name, kinds in counts.items()
        }

    def overlaps(self) -> Sequence[tuple[str, int]]:
        """For each collective in order, what it is and how many launches stand between its start and its wait.

        One that nothing waits for has waited itself.
        """
        started: dict[int, tuple[int, int]] = {}
        result: list[tuple[str, int]] = []
        launches = 0
        for event in self.events:
            if event.kind == COLLECTIVE:
                started[event.memory] = len(result), launches
                result.append((event.name, 0))
            elif event.kind == WAIT and event.memory in started:
                place, at = started.pop(event.memory)
                result[place] = (result[place][0], launches - at)
            elif event.kind in {TRITON, LIBRARY, COPY}:
                launches += 1
        return result


# The arguments of a scaled product, in order.
_PRODUCT = ("self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum")

_ENTER = "enter"
_DECISION = "a decision"


def walk(code: str, numbers: Sequence[int] = (), *, reuse: bool, capability: tuple[int, int] = (9, 0)) -> Walk:
    """Run generated code on fake tensors.

    Args:
        code: as Inductor wrote it for the absent GPU.
        numbers: for the last inputs that are numbers: known at run time alone, such as how many keys are no padding.
        reuse: how the branch of a cache is decided.
        capability: compute capability of the GPU, by which float8 products refuse their arguments.

    Raises:
        RuntimeError and others: an operator refuses its arguments, as it would on the device.

    """
    recorder = _Recorder(reuse, max(numbers, default=1), capability)
    hooks = Hooks(
        on_kernel=recorder.on_kernel,
        before_operator=recorder.before_operator,
        on_operator=recorder.on_operator,
        on_item=recorder.on_item,
        on_enter=recorder.on_enter,
        on_leave=recorder.on_leave,
    )
    run(code, fake_tensors(), hooks, numbers, UNKNOWN_TO_TORCH)
    return Walk(
        events=tuple(recorder.events),
        peak_bytes=recorder.memory.peak,
        peak_at=recorder.peak_at,
        input_bytes=recorder.memory.outside,
        buffers=tuple(recorder.flows.buffers()),
    )


class _Recorder:
    """Keeps what the hooks tell of."""

    def __init__(self, reuse: bool, size: int, capability: tuple[int, int]) -> None:
        self._reuse, self._size, self._capability = reuse, size, capability
        self._where: list[str] = []
        self.events: list[Event] = []
        self.memory, self.flows = LiveBytes(), Flows()
        self.peak_at = ""

    def on_enter(self, name: str) -> None:
        self._add(_ENTER, name, 0)
        self._where.append(name)

    def on_leave(self, name: str) -> None:
        self._where.pop()

    def on_item(self, tensor: torch.Tensor) -> Any:
        is_decision = tensor.dtype == torch.bool
        self._add(SYNC, _DECISION if is_decision else f"a number, {tensor.dtype}", tensor.element_size())
        return self._reuse if is_decision else self._size

    def on_kernel(self, name: str, source: str, args: Sequence[Any]) -> None:
        estimate = re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)
        tensors = [item for item in args if isinstance(item, torch.Tensor)]
        self.memory.note(tensors)
        moved = round(float(estimate[1]) * 1e9) if estimate else sum(map(num_bytes, tensors))
        self.flows.event(len(self.events), *kernel_operands(source, args))
        self._add(TRITON, name, moved)

    def before_operator(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not name.startswith("aten._scaled_mm."):
            return
        given = {**dict(zip(_PRODUCT, args, strict=False)), **kwargs}
        found = refusals(
            *(given[item] for item in _PRODUCT[:4]),
            bias=given.get("bias"),
            dtype=given.get("out_dtype") or given["self"].dtype,
            capability=self._capability,
        )
        if found:
            raise RuntimeError(f"{'/'.join([*self._where, name])} would be refused: {'; '.join(found)}")

    def on_operator(
        self, name: str, operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor], flops: int
    ) -> None:
        self.memory.note([item for item in operands if item.device.type != "cpu"])
        if self.memory.add(results):
            self.peak_at = "/".join([*self._where, name])
        if name.startswith(_NEW):
            self.flows.new(results)
        if _FREE.match(name):
            return
        if name.startswith("hvcompile.fetch"):
            brought = sum(map(num_bytes, results[:-1] if name.startswith("hvcompile.fetch.") else results))
            if brought:
                self._add(TRANSFER, name, brought)
            return
        if _WAITING.match(name):
            self._add(SYNC, f"the size of {name}", 0)
        kind, memory = LIBRARY, 0
        if name.startswith("_c10d_functional.wait_tensor"):
            kind = WAIT
        elif name.startswith(("_c10d_functional.", "_dtensor.")):
            kind = COLLECTIVE
        elif _COPIES.match(name):
            kind = COPY
        if kind in {WAIT, COLLECTIVE}:
            memory = storage_id(operands[0] if kind == WAIT else results[0])
        outputs = set(map(storage_id, results))
        inputs = [item for item in operands if storage_id(item) not in outputs]
        self.flows.event(len(self.events), inputs, [] if kind == WAIT else results)
        moved = {} if kind == WAIT else {id(tensor): tensor for tensor in (*operands, *results)}
        self._add(
            kind,
            name,
            sum(map(num_bytes, moved.values())),
            memory=memory,
            flops=flops,
            dtype=DTYPE if "float8" in name else (operands or results)[0].dtype,
        )

    def _add(self, kind: str, name: str, num_bytes: int, **others: Any) -> None:
        self.events.append(Event(kind=kind, name=name, where=tuple(self._where), num_bytes=num_bytes, **others))
