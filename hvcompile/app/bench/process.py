"""One contender of ``hvcompile bench`` in a process of its own: it builds the model, runs when told to, and answers.

What is measured is seen from outside, in the same way for every contender: the wall time of a step, what torch's
profiler records (attention calls tell what a step computed, compiled regions what ran), how many graphs Dynamo
captured, and the memory of the process or the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hvcompile.app import quiet

COMPUTED, PARTLY, REUSED = "#", "+", "."
"""Marks of a step in a sequence: it computed all blocks, some, or just the first of each list of blocks."""

ATTENTION = ("aten::_scaled_dot_product", "torch_attn::_varlen_attn", "hvcompile::float8_attention")
"""Every kernel behind scaled_dot_product_attention, varlen_attn, and attention in float8, has a name that begins so."""
REGION = "Torch-Compiled Region"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is generated: the clip in frames and pixels, and the prompt in tokens, of which the rest is padding."""

    num_frames: int
    height: int
    width: int
    text_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every contender is given alike.

    Attributes:
        model: directory or hub id of given weights; None for random ones.
        config: the transformer's configuration; empty for that of ``model``, or for HunyuanVideo's own.
        device, dtype: as torch writes them, without its name in front.
        threads: of torch's operations on the CPU; None for torch's own choice.
        steps: of a run.
        seed: of the first latents and the prompt's embedding.
        lower: "inductor", "aot" or "eager".

    """

    model: str | None
    config: Mapping[str, Any]
    shape: Shape
    steps: int
    threshold: float
    seed: int
    device: str
    dtype: str
    threads: int | None
    lower: str


class Contender:
    """A pipeline of a transformer and a scheduler, with one system put on it."""

    def __init__(self, system: str, protocol: Protocol) -> None:
        import torch

        import hvcompile.backend  # noqa: F401 - Dynamo and Inductor are in memory, for all alike, before it is measured
        from hvcompile.app.bench import contenders

        if protocol.threads is not None:
            torch.set_num_threads(protocol.threads)
        self.protocol, self.device = protocol, torch.device(protocol.device)
        self.pipe = pipeline(protocol)
        self.marks: list[tuple[float, float]] = []
        self.baseline = self._memory()
        self._stack = contextlib.ExitStack()
        self.how = self._stack.enter_context(
            contenders.applied(
                system, self.pipe, threshold=protocol.threshold, lower=protocol.lower, compile_peers=True
            )
        )

    def about(self) -> dict[str, Any]:
        """How the system was put on the model, and what the model is."""
        from hvcompile.app.bench import contenders

        transformer = self.pipe.transformer
        parameters = list(transformer.parameters())
        return {
            "how": self.how,
            "blocks": len(contenders.blocks_of(transformer)),
            "block_lists": self._num_lists(),
            "parameters": sum(parameter.numel() for parameter in parameters),
        }

    def run(self, latents_file: Path | None = None) -> dict[str, Any]:
        """Generate once; seconds of each step, the peak of memory, and a digest of the latents.

        Seconds are wall time, and processor time of this process, all its threads.

        Args:
            latents_file: where the latents go, as an array of the shape (frames, height, width, channels); None for
                nowhere.

        """
        import numpy as np

        self._reset_peak()
        captured = self._captured()
        latents = self._generate(self.protocol.shape)
        peak = self._peak()
        array = latents[0].float().cpu().numpy().transpose(1, 2, 3, 0)
        if latents_file is not None:
            np.save(latents_file, array)
        return {
            "step_seconds": self._step_seconds(0),
            "step_cpu_seconds": self._step_seconds(1),
            "peak_bytes": None if peak is None else max(0, peak - self.baseline),
            "digest": hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest(),
            "finite": bool(np.isfinite(array).all()),
            "graphs": self._captured() - captured,
        }

    def observe(self) -> dict[str, Any]:
        """Generate once under the profiler; what each step computed, and how many compiled regions it ran.

        What steps computed is left empty where blocks attend by kernels that are not known here.
        """
        with StepCounts() as counts:
            self._generate(self.protocol.shape, counts.next)
        full = counts.attention[0]  # the first step of a run has nothing to reuse
        blocks, lists = self.about()["blocks"], self._num_lists()
        computed = [blocks - (full - attention) for attention in counts.attention] if full >= blocks else []
        return {
            "steps": "".join(mark(count, blocks, lists) for count in computed),
            "blocks_computed": computed,
            "regions": counts.regions,
        }

    def recompile(self, cases: Sequence[tuple[str, Shape]]) -> list[dict[str, Any]]:
        """Generate other shapes in turn; how many graphs Dynamo captured for each, and the seconds each took."""
        found = []
        for name, shape in cases:
            captured, start = self._captured(), time.perf_counter()
            self._generate(shape)
            seconds = time.perf_counter() - start
            found.append({"case": name, "graphs": self._captured() - captured, "seconds": seconds})
        return found

    def close(self) -> None:
        """Take the system off again."""
        self._stack.close()

    def _num_lists(self) -> int:
        import torch

        return sum(isinstance(part, torch.nn.ModuleList) for part in self.pipe.transformer.children())

    def _generate(self, shape: Shape, on_step_end: Callable[[], None] = lambda: None) -> Any:
        import torch

        def step_end(*_: Any) -> dict[str, Any]:
            self._mark()
            on_step_end()
            return {}

        inputs = prompt(self.pipe.transformer, shape, self.protocol.seed)
        generator = torch.Generator().manual_seed(self.protocol.seed)  # on the CPU: the same noise on every device
        self.marks = []
        self._mark()
        return self.pipe(
            **inputs,
            num_frames=shape.num_frames,
            height=shape.height,
            width=shape.width,
            num_inference_steps=self.protocol.steps,
            generator=generator,
            output_type="latent",
            callback_on_step_end=step_end,
            callback_on_step_end_tensor_inputs=[],
        ).frames

    def _mark(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append((time.perf_counter(), time.process_time()))

    def _step_seconds(self, clock: int) -> list[float]:
        return [after[clock] - before[clock] for before, after in pairwise(self.marks)]

    @staticmethod
    def _captured() -> int:
        from hvcompile.torch_private import dynamo

        return dynamo.num_captured()

    def _memory(self) -> int:
        """Bytes that are taken now."""
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return _status("VmRSS") or 0

    def _reset_peak(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins again from here

    def _peak(self) -> int | None:
        """Bytes at most since ``_reset_peak``; None where the system does not tell.

        Not ``ru_maxrss``: on Linux that begins with the peak of the process which started this one.
        """
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _status("VmHWM")


def mark(num_computed: int, num_blocks: int, num_lists: int) -> str:
    """The mark of a step that computed so many of a model's blocks, which stand in so many lists."""
    if num_computed >= num_blocks:
        return COMPUTED
    return REUSED if num_computed <= num_lists else PARTLY


def _status(name: str) -> int | None:
    """A figure of this process in bytes, from Linux; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


class StepCounts:
    """Counts what each step of a run does, under torch's profiler; a pipeline's callback tells where a step ends.

    Nothing is put around the model, so what runs is what runs otherwise. The counts are of one step each: attention
    kernels, and compiled regions.
    """

    def __init__(self) -> None:
        self.attention: list[int] = []
        self.regions: list[int] = []

    def __enter__(self) -> StepCounts:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.stop()

    def next(self) -> None:
        """End a step, and begin the next."""
        self._profile.stop()
        names = [event.name for event in self._profile.events()]
        self.attention.append(sum(name.startswith(ATTENTION) for name in names))
        self.regions.append(sum(name.startswith(REGION) for name in names))
        self._start()

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile: Any = profile(activities=[ProfilerActivity.CPU])  # device kernels are launched from there too
        self._profile.start()


def pipeline(protocol: Protocol) -> Any:
    """A HunyuanVideoPipeline of a transformer and a scheduler alone: prompts come embedded, and latents are the result.

    Raises:
        InputError: the given weights can't be loaded, or are of another kind of model.

    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    from hvcompile.app import pipelines, tiny

    dtype, device = pipelines.DTYPES[protocol.dtype], torch.device(protocol.device)
    if protocol.model is None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:  # in its place from the first: the full model is 26 GB
                transformer = HunyuanVideoTransformer3DModel(**protocol.config)
        finally:
            torch.set_default_dtype(before)
        tiny.initialise(transformer, torch.Generator(device).manual_seed(tiny.SEED))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    else:
        transformer, scheduler = pipelines.load_transformer(protocol.model, dtype)
    transformer.requires_grad_(False).eval()
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=scheduler,
        text_encoder_2=None,
        tokenizer_2=None,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(transformer: Any, shape: Shape, seed: int) -> dict[str, Any]:
    """Text inputs drawn from a seed: the embedding, its mask with padding at the end, and the pooled embedding."""
    import torch

    config, device = transformer.config, transformer.device
    draw = torch.Generator().manual_seed(seed + 1)
    embedding = torch.randn(1, shape.text_tokens, config.text_embed_dim, generator=draw)
    return {
        "prompt_embeds": embedding.to(device, transformer.dtype),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=draw).to(
            device, transformer.dtype
        ),
        "prompt_attention_mask": (torch.arange(shape.text_tokens) < shape.prompt_tokens)[None].to(device),
    }


def serve(connection: Connection, system: str, protocol: Protocol, log: Path) -> None:
    """Be one contender: answer each request, a method's name and arguments, until the other side hangs up."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # with the compilers that it starts, so that all can be ended together
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    quiet.hide_progress_bars()
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    contender: Contender | None = None
    while True:
        try:
            request, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if contender is None:
                contender = Contender(system, protocol)
            method: Callable[..., Any] = getattr(contender, request)
            connection.send((True, method(*arguments)))
        except Exception as error:  # whatever a system raises is its row
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            connection.send((False, describe(error)))


def _leave_with_parent() -> None:
    """End this process, and the compilers that it started, when the one that started it is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def describe(error: BaseException) -> str:
    """Say what went wrong in a line."""
    from hvcompile.app import pipelines
    from hvcompile.errors import HvcompileError

    if isinstance(error, ImportError):
        return f"can't be imported ({pipelines.first_line(error)}): pip install 'hvcompile[bench]'"
    line = pipelines.first_line(error)
    return line if isinstance(error, HvcompileError) else f"{type(error).__name__}: {line}"
