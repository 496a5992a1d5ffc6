"""The door to a GPU that is not there: Inductor and Triton's compiler work for it, and nothing runs.

Within ``absent_gpu`` a CUDA device can be asked what it is. Fake CUDA tensors go through Dynamo, AOTAutograd and
Inductor as on that device. Triton and ptxas compile every kernel. What would run a kernel raises ``LaunchError``.

All names were checked on torch 2.13.0; the experiments that found them were made there. None of torch's interfaces is
made to be deceived like this, so all of them are private; each has its reason beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import io
import os
import re
import shutil
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hvcompile.errors import InputError
from hvcompile.torch_private.absent_attention import Choose, attention_on_cuda, forgetting
from hvcompile.torch_private.absent_inputs import constants_on_cpu

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What Inductor, Triton and torch's own kernels ask of a CUDA device.

    Attributes:
        name: as its driver gives it.
        capability: compute capability, major and minor.
        num_multiprocessors: streaming multiprocessors.
        memory_bytes: of the device.
        shared_bytes: shared memory that one block can have at most (opted in).
        threads: that a multiprocessor holds at most.
        cache_bytes: of the L2 cache.

    """

    name: str
    capability: tuple[int, int]
    num_multiprocessors: int
    memory_bytes: int
    shared_bytes: int
    threads: int
    cache_bytes: int

    @property
    def arch(self) -> str:
        """The name that compilers have for its instruction set, as "sm_90"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def properties(self) -> Any:
        """What ``torch.cuda.get_device_properties`` would give."""
        return types.SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.num_multiprocessors,
            total_memory=self.memory_bytes,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=self.threads,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.shared_bytes,
            shared_memory_per_multiprocessor=self.shared_bytes + 1024,
            L2_cache_size=self.cache_bytes,
            is_integrated=0,
            is_multi_gpu_board=0,
            gcnArchName="",
            clock_rate=1_980_000,
            memory_clock_rate=2_619_000,
            memory_bus_width=5120,
            pci_bus_id=0,
            pci_device_id=0,
            pci_domain_id=0,
            uuid="0",
        )


class LaunchError(Exception):
    """Something was to run on a device that is not there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonKernel:
    """A Triton kernel as ptxas made it.

    Attributes:
        name: Inductor's.
        kind: Inductor's: pointwise, reduction, ...
        registers: of a thread.
        stack_bytes: of a thread: its memory, for what spills, for arrays, and for arguments of a failed assertion.
        spill_bytes: of a thread: what it writes there because registers are full, as ptxas counts instructions.
        shared_bytes: of a block.
        num_configs: how many ways to launch it autotuning would try; the first one was compiled.

    """

    name: str
    kind: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    num_configs: int


@dataclasses.dataclass
class Compilation:
    """What was compiled: Inductor's code, a text a graph; every Triton kernel; those that failed, and why.

    ``measured`` are the shapes of the products that Inductor would measure on the device to decide on padding.
    """

    code: list[str] = dataclasses.field(default_factory=list)
    kernels: list[TritonKernel] = dataclasses.field(default_factory=list)
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    measured: list[str] = dataclasses.field(default_factory=list)


def decide_items(decide: Callable[[torch.Tensor], Any]) -> contextlib.AbstractContextManager[Any]:
    """Have ``decide`` answer ``item`` of fake tensors, whose numbers nobody knows."""

    def item(tensor: torch.Tensor) -> Any:  # a function, so that it becomes a method
        return decide(tensor)

    return mock.patch.object(FakeTensor, "item", item, create=True)


def check_tools(*, compile_kernels: bool = True) -> None:
    """Raise InputError where a compiler is missing that this needs, or would not be used."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise InputError(
            "triton is not installed, which compiles kernels for a GPU: pip install triton (on Linux)"
        ) from error
    if compile_kernels and os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise InputError("TRITON_INTERPRET is set, with which Triton compiles nothing: unset it")
    if not _is_built_with_cuda() and shutil.which("g++") is None:
        raise InputError("g++ is not on the path, which this needs where torch was built for CPUs alone: install it")


@contextlib.contextmanager
def absent_gpu(
    gpu: Gpu, choose_attention: Choose, *, count: int = 1, compile_kernels: bool = True
) -> Iterator[Compilation]:
    """Within, ``count`` devices of a kind seem to be there, for this process; what would launch a kernel raises.

    Args:
        gpu: the kind.
        choose_attention: which kernel of attention torch takes on it.
        count: how many.
        compile_kernels: compile each Triton kernel to machine code, in tens of milliseconds to seconds each.

    Yields:
        What is compiled, as it comes.

    Raises:
        InputError: a compiler is missing.

    """
    check_tools(compile_kernels=compile_kernels)
    _load_guard()
    compilation = Compilation()
    with contextlib.ExitStack() as stack:
        for patch in (
            *_cuda(gpu, count),
            *_inductor(compilation),
            *_triton(gpu, compilation, compile_kernels),
            attention_on_cuda(choose_attention),
            constants_on_cpu(),
            forgetting(),
        ):
            stack.enter_context(patch)
        yield compilation


def _is_built_with_cuda() -> bool:
    return bool(torch.backends.cuda.is_built())  # type: ignore[no-untyped-call]


@functools.cache
def _load_guard() -> None:
    """Register a device guard for CUDA that does nothing; operators on fake CUDA tensors ask for one.

    A build with CUDA has one, and FakeTensorMode puts the idle one in its place by itself.
    """
    if _is_built_with_cuda():
        return
    root = Path(torch.__file__).parent
    library = Path(tempfile.mkdtemp(prefix="hvcompile_")) / "guard.so"
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(["g++", "-x", "c++", "-", *flags, "-o", str(library)], input=_GUARD, text=True, check=True)
    ctypes.CDLL(str(library))


def _cuda(gpu: Gpu, count: int) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """What asks torch for the device."""
    from torch._dynamo import device_interface  # Inductor asks through it

    properties = gpu.properties()
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "synchronize": lambda *_: None,
        "get_device_capability": lambda *_, **__: gpu.capability,
        "get_device_properties": lambda *_, **__: properties,
        "get_device_name": lambda *_, **__: gpu.name,
        "is_bf16_supported": lambda *_, **__: True,
        "get_arch_list": lambda: [gpu.arch],
        "is_tf32_supported": lambda: True,
        "mem_get_info": lambda *_: (gpu.memory_bytes, gpu.memory_bytes),
        "set_device": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    interface = device_interface.CudaInterface
    for name, answer in answers.items():
        yield mock.patch.object(torch.cuda, name, answer)
        if hasattr(interface, name):
            yield mock.patch.object(interface, name, staticmethod(answer))
    for name in ("get_raw_stream", "exchange_device", "maybe_exchange_device"):
        yield mock.patch.object(interface, name, staticmethod(lambda _: 0))
    yield mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [properties] * count})
    yield mock.patch.object(torch.backends.cudnn, "is_available", return_value=True)
    yield mock.patch.object(torch.backends.cuda, "is_flash_attention_available", return_value=True)
    yield mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0")
    for name in ("_cuda_getCurrentRawStream", "_cuda_getDevice"):
        yield mock.patch.object(torch._C, name, return_value=0, create=True)
    # Fake tensors stay as on a machine without a device: no context is made, and the guard does nothing.
    yield mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True))


def _inductor(compilation: Compilation) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """What Inductor would do on the device while it compiles, and where its code is told."""
    import torch._inductor.async_compile
    import torch._inductor.compile_fx
    from torch._inductor import config, graph
    from torch._inductor.fx_passes import pad_mm
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder as Folder

    # One process and no cache: what is patched is patched in this one, and every kernel is seen. Inductor writes its
    # estimate of a kernel's bytes into the code where joined kernels are to be measured, of which there are none.
    yield config.patch(
        compile_threads=1,
        force_disable_caches=True,
        autotune_local_cache=False,
        worker_start_method="subprocess",
        use_static_cuda_launcher=False,
        benchmark_combo_kernel=True,
    )
    yield mock.patch.object(graph.GraphLowering, "save_output_code", staticmethod(compilation.code.append))

    # Whether to pad a product is measured on the device.
    def measure(match: Any, first: Any, second: Any, *_: Any, **__: Any) -> bool:
        compilation.measured.append(f"{tuple(first.shape)} x {tuple(second.shape)}")
        return False

    yield mock.patch.object(pad_mm, "_should_pad", measure)

    # Constants are folded where they will lie.
    fold = Folder._deduce_value

    def fold_on_cpu(self: Any, node: Any) -> Any:
        kwargs = node.kwargs
        try:
            if getattr(kwargs.get("device"), "type", "") == "cuda":
                node.kwargs = {**kwargs, "device": torch.device("cpu")}
            return fold(self, node)
        finally:
            node.kwargs = kwargs

    yield mock.patch.object(Folder, "_deduce_value", fold_on_cpu)


class _Driver:
    """What Triton asks of a driver: to compile, the target alone."""

    def __init__(self, gpu: Gpu) -> None:
        self._capability = gpu.capability[0] * 10 + gpu.capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    @staticmethod
    def is_active() -> bool:
        return True


_KNOWN: dict[tuple[str, ...], Mapping[str, int]] = {}
"""Kernels that this process has compiled, and what they take: fields of ``TritonKernel``."""


def _triton(
    gpu: Gpu, compilation: Compilation, compile_kernels: bool
) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Triton's driver, and what compiles and launches Inductor's kernels."""
    import triton
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    def precompile(self: Any, *_: Any, **__: Any) -> None:
        if not compile_kernels:
            return
        name = self.inductor_meta.get("kernel_name", self.fn.__name__)
        # The same kernel goes by many names, which end in a number of its graph.
        source = self.fn.src.replace(self.fn.__name__, "kernel")
        key = (gpu.arch, source, repr(self.triton_meta), repr(self.configs[0]))
        try:
            if key not in _KNOWN:
                _KNOWN[key] = _resources(lambda: self._precompile_config(self.configs[0]).kernel)
        except Exception as error:  # whatever Triton, LLVM or ptxas raise: it is what is looked for
            compilation.failures.append((name, f"{type(error).__name__}: {error}"))
            return
        compilation.kernels.append(
            TritonKernel(
                name=name,
                kind=str(self.heuristic_type).split(".")[-1].lower(),
                num_configs=len(self.configs),
                **_KNOWN[key],
            )
        )

    def launch(self: Any, *_: Any, **__: Any) -> None:
        raise LaunchError(f"{self.fn.__name__} was to be launched on a GPU that is not there")

    yield mock.patch.object(CachingAutotuner, "precompile", precompile)
    yield mock.patch.object(CachingAutotuner, "run", launch)
    yield mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None)
    # To ask Triton for the driver that is active would have it look for one.
    yield mock.patch.object(triton.runtime.driver, "_active", _Driver(gpu))


def _resources(compile_kernel: Callable[[], Any]) -> Mapping[str, int]:
    """What a kernel takes: fields of ``TritonKernel``.

    Raises:
        RuntimeError: ptxas, or cuobjdump, did not say what is looked for.

    """
    from triton import knobs

    binary = compile_kernel()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    figures = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if figures is None:
        raise RuntimeError(f"cuobjdump does not tell registers and stack: {usage!r}")
    registers, stack_bytes = int(figures[1]), int(figures[2])
    return {
        "registers": registers,
        "stack_bytes": stack_bytes,
        "spill_bytes": _spilled(compile_kernel) if stack_bytes else 0,
        "shared_bytes": binary.metadata.shared,
    }


def _spilled(compile_kernel: Callable[[], Any]) -> int:
    """Bytes that a thread writes to memory because registers are full, of which machine code does not tell.

    ptxas tells while it compiles. So Triton compiles once more, whatever its cache has, by its own options for ptxas,
    which differ by its version and by the device.
    """
    from triton import knobs

    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compile_kernel()
    figures = re.findall(r"(\d+) bytes spill stores", log.getvalue())
    if not figures:
        raise RuntimeError(f"ptxas does not tell what spills: {log.getvalue()!r}")
    return sum(map(int, figures))
