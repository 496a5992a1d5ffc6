"""Compiling a call of a model for a GPU that is not there, as far as machine code, and looking at what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh

from hvcompile.backend import lower as hand_over
from hvcompile.backend import rewrite, sealed_inputs
from hvcompile.errors import InputError, OptionError
from hvcompile.explanation.explain import capture
from hvcompile.graph.attention_kernels import describe, expected
from hvcompile.graph.nodes import is_tensor
from hvcompile.graph.paths import parameter_path
from hvcompile.hollow.host import HostWeight
from hvcompile.journal import Declined, JournalRow
from hvcompile.lowered.gpus import GPUS
from hvcompile.lowered.walk import Walk, walk
from hvcompile.options import Options, parse
from hvcompile.passes import PASSES
from hvcompile.sealing import seal
from hvcompile.torch_private.absent_gpu import Compilation, Gpu, TritonKernel, absent_gpu
from hvcompile.torch_private.absent_inputs import fake_tensors, on_gpu
from hvcompile.torch_private.distributed import absent_ranks, has_absent_ranks
from hvcompile.torch_private.fakes import size_hint, value
from hvcompile.torch_private.lowering import LOWERINGS, to_inductor
from hvcompile.trunk.observer import Observer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """A call of a model as it was compiled for a GPU.

    Attributes:
        gpu: what it was compiled for.
        ranks: how many ranks share the call.
        journal: what each pass did, and why not; empty for plain Inductor.
        code: Inductor's, a text a graph; the last one is the call's.
        kernels: every Triton kernel, as ptxas made it; empty where they were not compiled.
        failures: Triton kernels that did not compile, by name, and why.
        measured: shapes of products that Inductor would measure on the GPU, to decide whether to pad them.
        computed: what a step does that computes everything.
        reused: what a step does that reuses; None where no step can.
        seconds: what compiling took here.

    """

    gpu: Gpu
    ranks: int
    journal: tuple[JournalRow, ...]
    code: tuple[str, ...] = dataclasses.field(repr=False)
    kernels: tuple[TritonKernel, ...]
    failures: tuple[tuple[str, str], ...]
    measured: tuple[str, ...]
    computed: Walk = dataclasses.field(repr=False)
    reused: Walk | None = dataclasses.field(repr=False)
    seconds: float

    @property
    def spilling(self) -> tuple[TritonKernel, ...]:
        """The kernels whose values do not fit in registers."""
        return tuple(kernel for kernel in self.kernels if kernel.spill_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most memory that the call takes: its inputs, weights and state among them, and its buffers."""
        return max(item.input_bytes + item.peak_bytes for item in (self.computed, self.reused) if item is not None)


def lower(
    model: torch.nn.Module,
    *args: Any,
    device: Gpu | str = "h100",
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    ranks: int = 1,
    rank: int = 0,
    plain: bool = False,
    dynamic: bool = False,
    compile_kernels: bool = True,
    **kwargs: Any,
) -> Lowered:
    """Compile a call of a model for a GPU that is not there; nothing is computed, and no weight is read.

    Needs triton, and g++ where torch was built for CPUs alone.

    Args:
        model: the module; on the meta device if it should take no memory. It is not changed.
        args: of the call, on the model's device.
        device: the GPU, or its key in ``GPUS``.
        options: as for ``torch.compile``.
        mode: as for ``torch.compile``.
        ranks: how many ranks, each with such a GPU, share the call.
        rank: which of them this is.
        plain: compile by plain Inductor, without any rewrite.
        dynamic: compile for other sizes of the tensors as well, as ``torch.compile(dynamic=True)`` does.
        compile_kernels: whether Triton and ptxas compile the kernels too.
        kwargs: of the call.

    Raises:
        OptionError: ``options``, ``mode`` or ``device`` is invalid.
        InputError: a compiler is missing, or there is a process group already.
        UntraceableModelError: Dynamo can't keep the call in one graph.
        RequestedPassError: a pass that options ask for by name can't apply.

    """
    gpu = gpu_of(device)
    with settings_for(options, mode, ranks, rank) as settings:
        return lower_call(
            (model, args, kwargs),
            settings,
            gpu,
            ranks=ranks,
            rank=rank,
            plain=plain,
            dynamic=dynamic,
            compile_kernels=compile_kernels,
        )


@contextlib.contextmanager
def settings_for(options: Mapping[str, Any] | None, mode: str | None, ranks: int, rank: int = 0) -> Iterator[Options]:
    """Options, parsed, and within a group of so many ranks.

    Where the ranks are to share out samples too (``context_parallel.cfg``), a mesh of them is made, for they are not
    there to make one.

    Raises:
        OptionError: one is invalid.
        InputError: there is a process group already.

    """
    _check_ranks(ranks, rank, has_group=dist.is_initialized())
    with absent_ranks(ranks, rank):
        section = (options or {}).get("context_parallel")
        if isinstance(section, Mapping) and section.get("cfg") == 2 and "mesh" not in section and ranks % 2 == 0:
            mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("samples", "sequence"))
            options = {**(options or {}), "context_parallel": {**section, "mesh": mesh}}
        yield parse(PASSES, options, mode)


def _check_ranks(ranks: int, rank: int, *, has_group: bool) -> None:
    if not 0 <= rank < ranks:
        raise OptionError(f"rank is {rank}; allowed is 0 to {ranks - 1}, for there are {ranks} ranks")
    if ranks > 1 and has_group:
        raise InputError("this process has a process group: ranks that are not there can't be added to it")


def gpu_of(device: Gpu | str) -> Gpu:
    """The GPU that a name stands for; raises OptionError for none."""
    gpu = device if isinstance(device, Gpu) else GPUS.get(device)
    if gpu is None:
        raise OptionError(f"device {device!r} is unknown: give one of {', '.join(GPUS)}, or a lowered.gpus.Gpu")
    return gpu


def lower_call(
    call: tuple[torch.nn.Module, Sequence[Any], Mapping[str, Any]],
    settings: Options,
    gpu: Gpu,
    *,
    ranks: int = 1,
    rank: int = 0,
    plain: bool = False,
    dynamic: bool = False,
    compile_kernels: bool = True,
) -> Lowered:
    """As ``lower``, of options that are parsed already.

    Args:
        call: a module, and what it is called with.
        settings: the options.
        gpu: compiled for.
        ranks: see ``lower``; as all that follow.
        rank: of them.
        plain: by Inductor alone.
        dynamic: for other sizes too.
        compile_kernels: to machine code.

    """
    _check_ranks(ranks, rank, has_group=dist.is_initialized() and not has_absent_ranks())
    begin = time.monotonic()
    with on_absent(gpu, ranks, compile_kernels) as compilation, absent_ranks(ranks, rank):
        fakes = fake_tensors()
        model, (args, kwargs) = on_gpu(fakes, call[0], call[1:], dynamic=dynamic)
        with fakes:  # else Dynamo would make a mode of its own
            graph = capture(model, *args, **kwargs)
        inputs = [value(node) for node in graph.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            known = {**dict(enumerate(inputs)), **_on_host(call[0], graph)}
            journal, numbers = _compile_plainly(graph, inputs) if plain else _compile(graph, inputs, settings, known)
        seconds = time.monotonic() - begin
        code = compilation.code[-1]
        computed = walk(code, numbers, reuse=False, capability=gpu.capability)
        reused = walk(code, numbers, reuse=True, capability=gpu.capability) if computed.has_branches else None
    return Lowered(
        gpu=gpu,
        ranks=ranks,
        journal=tuple(journal),
        code=tuple(compilation.code),
        kernels=tuple(compilation.kernels),
        failures=tuple(compilation.failures),
        measured=tuple(dict.fromkeys(compilation.measured)),
        computed=computed,
        reused=reused,
        seconds=seconds,
    )


def on_absent(gpu: Gpu, count: int = 1, compile_kernels: bool = True) -> contextlib.AbstractContextManager[Compilation]:
    """``absent_gpu``, where attention takes the kernel that we know torch to take."""

    def choose(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, has_mask: bool) -> str:
        return expected(describe(query, key, value, has_mask=has_mask))

    return absent_gpu(gpu, choose, count=count, compile_kernels=compile_kernels)


def _on_host(model: torch.nn.Module, graph: fx.GraphModule) -> dict[int, HostWeight]:
    """The weights of a model that are kept on the host, by their places among a graph's inputs."""
    weights = {path: item for path, item in model.named_parameters() if isinstance(item, HostWeight)}
    places = enumerate(map(parameter_path, graph.graph.find_nodes(op="placeholder")))
    return {place: weights[path] for place, path in places if path in weights}


def _compile(
    captured: fx.GraphModule, inputs: Sequence[Any], settings: Options, known: Mapping[int, Any]
) -> tuple[list[JournalRow], Sequence[int]]:
    """What the backend does up to the first call, but for the weights, which are not there to be quantised.

    Returns:
        The journal, and the most that each number can be that the runtime reads from conditions.

    """
    journal: list[JournalRow] = []
    observer = Observer()
    trunk = rewrite(captured, settings, journal, observer, known_args=known)
    if isinstance(trunk, Declined):
        LOWERINGS["inductor"](captured, inputs)
        return journal, ()
    plan = seal(trunk)
    hand_over(trunk.module, sealed_inputs(trunk, plan, inputs), settings, observer, trunk)
    return journal, [size_hint(value(node)) for node in trunk.added if not is_tensor(node)]


def _compile_plainly(captured: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[JournalRow], Sequence[int]]:
    to_inductor(captured, inputs, recomputing={})
    return [], ()
