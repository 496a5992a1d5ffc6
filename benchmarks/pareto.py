"""Speed against fidelity of reusing steps: this project's cache, its options, and peers, on one model.

``python benchmarks/pareto.py`` generates every prompt with every seed exactly (plain Inductor) and then with each
setting of each system, and measures what share of the block computations a setting saved, how long the denoising took,
and how far the pixels are from the exact run's. It leaves a table (.md), all figures (.json) and a plot (.png).
Finished settings are kept in the JSON as the run goes on; started again, it goes on where it was broken off.

Peers run as their users get them, eagerly: diffusers' ``FirstBlockCacheConfig``, ``TaylorSeerCacheConfig`` in its light
form and ``MagCacheConfig``, calibrated on the first clip; and cache-dit's ``DBCacheConfig`` with one front block and no
warm-up, alone and with TaylorSeer. ``pip install ".[bench]"`` has what is needed; a peer that
is missing or fails is a row that says so. Seconds are wall clock of the denoising loop after compilation, text encoding
and decoding left out: run it on a machine that does nothing else. CPU seconds, of all threads, depend less on that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pareto_report import MEASURES, PERCENT, REFERENCE, Setting, markdown, plot, setting_of, table_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hvcompile.app.bench import contenders
from hvcompile.app.bench.contenders import EAGER, EXACT, HVFAST, INDUCTOR, MAG_CACHE, PEERS, TAYLOR_SEER

ROOT = Path(__file__).resolve().parent.parent

PROMPTS = (
    "a red circle moves to the left over a blue background",
    "a blue square moves to the right over a white background",
    "a green triangle rises over a black background",
    "a yellow diamond falls over a grey background",
    "a big white circle moves right quickly over a green background",
    "a small orange square moves left slowly over a black background",
    "a purple triangle moves down over a white background",
    "a big blue diamond moves up slowly over a grey background",
    "a small red square falls quickly over a white background",
    "a yellow circle rises over a green background",
    "a yellow triangle bounces left and right over a blue background",
    "a white square bounces up and down over a black background",
    "a big purple circle moves to the right over a grey background",
    "a small green diamond moves to the left quickly over a white background",
    "a red circle moves to the left and a yellow square moves to the right over a black background",
    "a blue triangle moves up and a red diamond moves down over a white background",
)
"""In the words that the embedded model knows; other models take them too."""
THRESHOLDS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
OPTIONS = (
    *("forecast=1", "forecast=2", "forecast=1,decide_by=error", "forecast=2,decide_by=error"),
    *("guidance=apart", "forecast=1,guidance=apart"),
    *("warmup_steps=5", "max_consecutive_hits=1", "last_steps_computed=3", "warmup_steps=3,max_consecutive_hits=2"),
)
OPTION_THRESHOLDS = (0.06, 0.1, 0.15, 0.2, 0.3)
OBSERVED = (
    "a green square moves up over a white background",
    "a blue circle grows over a yellow background",
    "a white triangle moves to the right over a black background",
    "a red square spins over a blue background",
)
"""The clips by which schedules are found; seeds from 100 keep them apart from those that are measured."""
PERCENTS = (70, 60, 50, 40, 33, 30)
"""Of the steps, that a fixed schedule computes."""
INTERVALS = (2, 3, 4, 5)
"""Of TaylorSeer, which computes every so many steps and has no threshold."""

SCHEDULED, OF_NO_BLOCK = "hvfast, schedule", "hvfast, schedule of no block"
FRONT_BLOCKS = {SCHEDULED: 1, OF_NO_BLOCK: 0}
"""Of fixed schedules, how many blocks they compute in every step."""
OURS = (EXACT, HVFAST, *FRONT_BLOCKS)

out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # a file has no width of its own
err = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is generated, and how: the same for every setting."""

    model: str | None
    dtype: str | None
    device: str | None
    prompts: tuple[str, ...]
    seeds: int
    size: Mapping[str, int]
    lower: str

    @property
    def clips(self) -> list[tuple[str, int]]:
        """Every prompt with every seed."""
        return [(prompt, seed) for prompt in self.prompts for seed in range(self.seeds)]

    @functools.cached_property
    def schedules(self) -> dict[int, dict[int, tuple[int, ...]]]:
        """By front blocks, the best schedule of each number of steps computed, found on other clips."""
        from hvcompile.app.tuning.schedule import COMPUTED, Recorder, schedules
        from hvcompile.runtime.probing import probing

        model, recorder, fields = Model(self, {}), Recorder(), dict(COMPUTED)
        threshold = fields.pop("threshold")
        with (
            contenders.applied(HVFAST, model.pipe, threshold=threshold, options=fields, lower=self.lower),
            probing(recorder),
        ):
            for seed, prompt in enumerate(OBSERVED, 100):
                model.generate(prompt, seed, output_type="latent")
        return {front: schedules(recorder.trajectories(), front) for front in FRONT_BLOCKS.values()}


def settings(
    thresholds: Sequence[float],
    options: Sequence[str],
    option_thresholds: Sequence[float],
    percents: Sequence[int],
    peers: bool,
) -> list[Setting]:
    """All settings in the order in which they are measured, the reference first."""
    found = [Setting(system=system) for system in (REFERENCE, EXACT, EAGER)]
    found += [Setting(system=HVFAST, threshold=threshold) for threshold in thresholds]
    for text in options:
        found += [Setting(system=HVFAST, threshold=threshold, options=parsed(text)) for threshold in option_thresholds]
    found += [Setting(system=system, options=((PERCENT, each),)) for system in FRONT_BLOCKS for each in percents]
    if peers:
        by_threshold = [system for system in PEERS if system != TAYLOR_SEER]
        found += [Setting(system=system, threshold=threshold) for system in by_threshold for threshold in thresholds]
        found += [Setting(system=TAYLOR_SEER, options=(("cache_interval", interval),)) for interval in INTERVALS]
    return list(dict.fromkeys(found))


def parsed(text: str) -> tuple[tuple[str, int | str], ...]:
    """Options of the cache from ``name=value,name=value``, whole numbers and words."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return tuple((name.strip(), int(word) if word.strip("- ").isdigit() else word.strip()) for name, word in pairs)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: write options as warmup_steps=5,max_consecutive_hits=2") from error


# Generating.


class Model:
    """A pipeline fresh from its files, so that nothing a setting did to it reaches the next.

    ``encoded`` holds what prompts were encoded to, and spares the text encoders every further run of a prompt. The
    clock of a clip starts when its prompt is encoded.
    """

    def __init__(self, job: Job, encoded: dict[str, Any]) -> None:
        from hvcompile.app import pipelines

        self.job, self.encoded = job, encoded
        self.loaded = pipelines.load(job.model, job.dtype, job.device)
        self.pipe, self.transformer = self.loaded.pipe, self.loaded.pipe.transformer
        self.arguments: dict[str, Any] = {**self.loaded.defaults, **job.size}
        self.marks: list[tuple[float, float]] = []
        if hasattr(self.pipe, "encode_prompt"):
            self.pipe.encode_prompt = self._remembering(self.pipe.encode_prompt)

    @property
    def num_steps(self) -> int:
        """Denoising steps of a clip."""
        return int(self.arguments.get("num_inference_steps") or self.loaded.default("num_inference_steps"))

    @functools.cached_property
    def calls_a_step(self) -> float:
        """How often a step calls the transformer: twice where guidance takes passes of its own. Asked for eagerly."""
        calls = [0]
        hook = self.transformer.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        self.generate(*self.job.clips[0], output_type="latent", num_inference_steps=2)
        hook.remove()
        return calls[0] / 2

    @property
    def blocks(self) -> list[Any]:
        """The transformer's blocks."""
        return contenders.blocks_of(self.transformer)

    def generate(self, prompt: str, seed: int, **changed: Any) -> Clip:
        """Run the pipeline once."""
        import torch

        self.marks = []
        self._mark()
        frames = self.pipe(
            prompt,
            generator=torch.Generator().manual_seed(seed),  # on the CPU: the same noise on every device
            callback_on_step_end=self._mark,
            callback_on_step_end_tensor_inputs=[],
            **{**self.arguments, "output_type": "np", **changed},
        ).frames[0]
        (start, cpu_start), (end, cpu_end) = self.marks[0], self.marks[-1]
        return Clip(frames=frames, seconds=end - start, cpu_seconds=cpu_end - cpu_start)

    def _mark(self, *_: Any) -> dict[str, Any]:
        import torch

        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        self.marks.append((time.perf_counter(), time.process_time()))
        return {}

    def _remembering(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)
        def encoded(*args: Any, **kwargs: Any) -> Any:
            key = repr((args, sorted(kwargs.items())))
            if key not in self.encoded:
                self.encoded[key] = encode(*args, **kwargs)
            self.marks = []
            self._mark()
            return self.encoded[key]

        return encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """One generated clip: its pixels or latents, and the wall and processor time of its denoising loop."""

    frames: Any
    seconds: float
    cpu_seconds: float


@contextlib.contextmanager
def applied(model: Model, setting: Setting) -> Iterator[Callable[[], int]]:
    """Put a setting on a model; gives a count of the block computations it saved so far."""
    if setting.system in OURS:
        saved: Callable[[], int] = functools.partial(saved_by_hvfast, model, FRONT_BLOCKS.get(setting.system, 1))
    elif setting.system == INDUCTOR:
        saved = int  # none
    else:
        saved = saved_eagerly(model)
    from hvcompile.app.tuning.candidates import scheduled

    options: dict[str, Any] = dict(setting.options)
    system, threshold = setting.system, setting.threshold
    if system == MAG_CACHE:
        options |= calibrated(model)
    if system in FRONT_BLOCKS:
        number, front = max(1, round(model.num_steps * options.pop(PERCENT) / 100)), FRONT_BLOCKS[system]
        system, options = HVFAST, scheduled(model.job.schedules[front], front)[number].section()
        threshold = options.pop("threshold")
    with contenders.applied(system, model.pipe, threshold=threshold, options=options, lower=model.job.lower):
        yield saved


def calibrated(model: Model) -> dict[str, Any]:
    """What MagCache needs to know of a model: how residuals' magnitudes change over the steps of one clip."""
    from diffusers.hooks import MagCacheConfig

    told = io.StringIO()  # it prints them, and keeps them nowhere
    model.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=model.num_steps))
    with contextlib.redirect_stdout(told):
        model.generate(*model.job.clips[0], output_type="latent")
    model.transformer.disable_cache()
    ratios = re.search(r"\[[^\[\]]*,[^\[\]]*\]", told.getvalue())
    if ratios is None:
        raise RuntimeError("MagCache's calibration gave no ratios")
    return {"mag_ratios": json.loads(ratios[0]), "num_inference_steps": model.num_steps}


def saved_by_hvfast(model: Model, front_blocks: int) -> int:
    """Block computations that the cache saved so far: of every reused step all but the front blocks."""
    import hvcompile
    from hvcompile.errors import UncompiledModelError

    try:
        return hvcompile.stats(model.transformer).hits * (len(model.blocks) - front_blocks)
    except UncompiledModelError:  # its first call is still to come
        return 0


def saved_eagerly(model: Model) -> Callable[[], int]:
    """Count from here on the block computations that calls of an eager model did without."""
    import torch

    computed, calls = [0], [0]

    def one_more(of: list[int]) -> Callable[..., None]:
        def add(*_: Any) -> None:
            of[0] += 1

        return add

    model.transformer.register_forward_pre_hook(one_more(calls))
    for block in model.blocks:  # caches replace a block's own forward, but not that of the layers in it
        layer = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
        layer.register_forward_pre_hook(one_more(computed))
    return lambda: calls[0] * len(model.blocks) - computed[0]


def measure(
    setting: Setting, model: Model, references: Path, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Generate all clips with one setting; gives its row of the results.

    Args:
        setting: what is measured.
        model: a fresh one.
        references: directory of the exact clips' pixels, which the reference setting writes and the others read.
        advance: called when a clip is done.

    """
    import numpy as np
    import torch

    from hvcompile.app import metrics

    torch._dynamo.reset()
    clips = model.job.clips
    columns: dict[str, list[float | None]] = {name: [] for name in MEASURES}
    num_blocks = model.calls_a_step * model.num_steps * len(model.blocks)
    with applied(model, setting) as saved:
        start = time.perf_counter()
        model.generate(*clips[0], output_type="latent", num_inference_steps=2)
        compile_s = time.perf_counter() - start
        for number, (prompt, seed) in enumerate(clips):
            before = saved()
            clip = model.generate(prompt, seed)
            share = (saved() - before) / num_blocks
            pixels = np.asarray(clip.frames, dtype=np.float32)
            if setting.system == REFERENCE:
                np.save(references / f"{number}.npy", pixels)
            quality = metrics.compare(pixels, np.load(references / f"{number}.npy", mmap_mode="r"))
            row = (share, clip.seconds, clip.cpu_seconds, quality.mean_psnr, min(quality.psnr), quality.mean_ssim)
            for name, figure in zip(MEASURES, (*row, quality.mean_temporal_psnr), strict=True):
                is_number = figure is not None and math.isfinite(figure)
                columns[name].append(round(figure, 5) if figure is not None and is_number else None)
            advance()
    return {
        **setting.record(),
        "date": now(),
        "load_average": os.getloadavg()[0],
        "compile_s": round(compile_s, 3),
        **columns,
    }


def run(
    job: Job, wanted: Sequence[Setting], rows: list[dict[str, Any]], keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Measure the settings that ``rows`` lacks, and add them; ``keep`` is called with all rows after each."""
    done = [setting_of(row) for row in rows if "error" not in row]
    missing = [setting for setting in wanted if setting not in done]
    if not missing:
        return
    reference = Setting(system=REFERENCE)
    if reference not in missing:  # its pixels are not kept, only its figures
        missing.insert(0, reference)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    encoded: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="hvcompile-pareto-") as folder,
        Progress(*columns, TimeRemainingColumn(), console=err) as progress,
    ):
        bar = progress.add_task("", total=len(missing) * len(job.clips))
        for place, setting in enumerate(missing):
            progress.update(bar, description=str(setting), completed=place * len(job.clips))
            try:
                row = measure(setting, Model(job, encoded), Path(folder), functools.partial(progress.advance, bar))
            except Exception as error:  # a peer's fault, of whatever kind, must not end the run
                if setting.system not in PEERS:
                    raise
                row = {**setting.record(), "date": now(), "error": f"{type(error).__name__}: {error}"}
            rows[:] = [other for other in rows if setting_of(other) != setting] + [row]
            rows.sort(key=lambda item: wanted.index(setting_of(item)) if setting_of(item) in wanted else len(wanted))
            keep(rows)


def now() -> str:
    """The time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def conditions(job: Job, model: Model) -> dict[str, Any]:
    """What figures must have in common to stand in one table."""
    import torch

    from hvcompile.app import identity

    versions = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "cache-dit"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = model.loaded.device
    return {
        "model": job.model or "embedded",
        "weights": identity.of_weights(model.pipe),
        "arguments": dict(model.arguments),
        "num_steps": model.num_steps,
        "blocks": len(model.blocks),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "lower": job.lower,
        "prompts": list(job.prompts),
        "seeds": job.seeds,
        "versions": versions,
    }


def earlier(path: Path, now_holds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run under the same conditions; none where there is none."""
    try:
        record = json.loads(path.read_text())
        return list(record["settings"]) if record["conditions"] == now_holds else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the JSON, a setting a line, so that a diff shows settings."""
    top = json.dumps({**header, "settings": []}, indent=2, allow_nan=False)
    lines = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in rows)
    part = path.with_name(f".{path.name}")
    part.write_text(top.replace('"settings": []', f'"settings": [\n{lines}\n  ]') + "\n")
    part.replace(path)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file, without empty ones and those that begin with #."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"prompts {str(path)!r} can't be read: give a text file, one prompt a line") from error
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise typer.BadParameter(f"prompts {str(path)!r} holds no prompt: give a text file, one prompt a line")
    return found


def quieten() -> None:
    """Turn off the bars and the chatter of the libraries, which would break into the progress bar."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")


def check_settings(wanted: Sequence[Setting]) -> None:
    """Refuse options that the cache doesn't take, before anything is measured."""
    from hvcompile.errors import OptionError
    from hvcompile.options import parse
    from hvcompile.passes import PASSES

    for setting in wanted:
        if setting.system == HVFAST:
            cache = {"threshold": setting.threshold, **dict(setting.options)}
            try:
                parse(PASSES, {"first_block_cache": cache}, None)
            except OptionError as error:
                raise typer.BadParameter(str(error)) from error


def main(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a diffusers pipeline (default: the embedded one).")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line (default: 16 of this script).")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every prompt, from 0.")] = 2,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(min=2, help="Length of a clip.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="Of every system; give several.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(help="Of hvfast's cache, as warmup_steps=5,max_consecutive_hits=2; give several."),
    ] = None,
    options_threshold: Annotated[list[float] | None, typer.Option(help="Thresholds to try the options at.")] = None,
    percent: Annotated[
        list[int] | None,
        typer.Option(min=1, max=100, help="Of the steps, that fixed schedules compute; give several."),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Measure diffusers' cache and cache-dit too.")] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; 1 is steadier on a machine in use.")] = None,
    lower: Annotated[str, typer.Option(help="inductor; eager tries the script out without compiling.")] = "inductor",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again, whatever the JSON holds.")] = False,
    to: Annotated[Path, typer.Option("--output", help="The results, less their endings .json, .md and .png.")] = (
        ROOT / "docs" / "measurements" / "pareto_cpu"
    ),
) -> None:
    """Measure, tabulate and draw speed against fidelity."""
    wanted = settings(
        list(THRESHOLDS) if threshold is None else threshold,
        list(OPTIONS) if options is None else options,
        list(OPTION_THRESHOLDS) if options_threshold is None else options_threshold,
        list(PERCENTS) if percent is None else percent,
        peers,
    )
    chosen = read_prompts(prompts) if prompts is not None else PROMPTS
    import torch

    from hvcompile.app.grid import Grid
    from hvcompile.errors import InputError

    check_settings(wanted)
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = {"num_inference_steps": steps, "num_frames": frames, "height": height, "width": width}
    size = {name: value for name, value in sizes.items() if value is not None}
    job = Job(model=model, dtype=dtype, device=device, prompts=chosen, seeds=seeds, size=size, lower=lower)
    quieten()
    try:
        first = Model(job, {})
        Grid.of(first.pipe).check(height=height, width=width, frames=frames)
        hold = conditions(job, first)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    command = shlex.join(["python", "benchmarks/pareto.py", *sys.argv[1:]])
    header = {"command": command, "conditions": hold}
    data = to.with_name(f"{to.name}.json")
    data.parent.mkdir(parents=True, exist_ok=True)
    rows = [] if fresh else earlier(data, hold)
    run(job, wanted, rows, functools.partial(write, data, header))

    shown = [row for row in rows if setting_of(row) in wanted]
    headings, lines = table_of(shown)
    table = Table()
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading in (headings[0], "failed") else "right", no_wrap=heading != headings[0]
        )
    for line in lines:
        table.add_row(*line)
    out.print(table)
    name = "embedded tiny HunyuanVideo" if model is None else model
    title = (
        f"{name}, {hold['num_steps']} steps, {len(job.prompts)} prompts x {job.seeds} seeds, "
        f"{hold['dtype']} on {hold['device'].upper()}"
    )
    page = to.with_name(f"{to.name}.md")
    page.write_text(markdown(shown, title, command))
    out.print(f"written to {data} and {page}", soft_wrap=True)
    try:
        # One thread's processor time is the wall time that it would take on a machine with nothing else to do.
        clock = "cpu_seconds" if hold["device"] == "cpu" and hold["threads"] == 1 else "seconds"
        plot(shown, title, to.with_name(f"{to.name}.png"), clock=clock)
    except ImportError as error:
        err.print(f"no plot, for {error.name} is missing: pip install '.\\[bench]'", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
