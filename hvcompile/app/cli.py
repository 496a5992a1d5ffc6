"""The command line: ``hvcompile generate``, ``compare``, ``explain``, ``bisect`` and ``bench``."""

from __future__ import annotations

import importlib.metadata
import math
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.text import Text

from hvcompile import outputs
from hvcompile.app import tables
from hvcompile.errors import HvcompileError, InputError, OptionError
from hvcompile.torch_private.torchao import quiet_import

if TYPE_CHECKING:
    from hvcompile.app.metrics import Step

app = typer.Typer(name="hvcompile", no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

COMPUTED, REUSED = "█", "·"
STRIP = 32
"""Marks in sight; of a longer run, the latest."""


def _version(wanted: bool) -> None:
    if wanted:
        try:
            number = importlib.metadata.version("hvcompile")
        except importlib.metadata.PackageNotFoundError:
            number = "(run from its source, not installed)"
        out.print(f"hvcompile {number}", markup=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fast video diffusion: the torch.compile backend hvfast, at the command line."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a diffusers pipeline (default: an embedded tiny one).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length of the clip.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first noise; the same on every device.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    true_cfg: Annotated[
        float | None, typer.Option(help="True guidance scale; above 1, with --negative-prompt, two calls a step.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of the first-block cache: a larger one reuses more steps.")
    ] = None,
    fp8: Annotated[
        bool | None,
        typer.Option("--fp8/--no-fp8", help="Linear layers in float8, or not (default: where GPUs gain from it)."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="'exact': only rewrites that don't change numerics; 'max': all, float8 attention too."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The video file; replaced if there.")] = Path(
        "out.mp4"
    ),
    fps: Annotated[int, typer.Option(help="Frames a second of the video file.")] = 24,
    compare: Annotated[bool, typer.Option("--compare", help="Also run plain torch.compile, and measure both.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Contact sheet of --compare (default: beside the output, .sheet.png).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures of --compare go.")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report: each step, the trunk, the passes (.html).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: a GPU if there is one).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on the CPU).")
    ] = None,
    dump: Annotated[Path | None, typer.Option(help="Directory for the graphs before and after each pass.")] = None,
    rank_timeout: Annotated[
        float, typer.Option(help="Under torchrun: seconds after which a rank that waits for another gives up.")
    ] = 120.0,
) -> None:
    """Make a video of PROMPT; what is not given is as the model likes it.

    Under torchrun all ranks share the work on one video, and the first one writes it.
    """
    with quiet_import():
        from hvcompile.app import generate  # diffusers takes seconds to import; --help must not
        from hvcompile.ranks import launch

    request = generate.Request(
        prompt=prompt,
        output=output,
        model=model,
        steps=steps,
        frames=frames,
        height=height,
        width=width,
        seed=seed,
        guidance=guidance,
        true_cfg=true_cfg,
        negative_prompt=negative_prompt,
        threshold=threshold,
        fp8=fp8,
        mode=mode,
        dump=dump,
        compare=compare,
        sheet_file=sheet,
        json_file=json_file,
        html_file=html_file,
        device=device,
        dtype=dtype,
        fps=fps,
        rank_timeout=rank_timeout,
    )
    out.quiet = err.quiet = launch.rank() > 0
    try:
        request.check()
        _quieten_loading()
        with Display() as display:
            result = generate.generate(request, display)
    except Exception as error:
        _leave_in_turn(error)
    out.print(tables.summary(result))


@app.command("compare")
def compare_clips(
    reference: Annotated[Path, typer.Argument(help="The video as it should be.")],
    clip: Annotated[Path, typer.Argument(help="Another of the same size and length.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet: both, and what differs (.png).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures (.json).")] = None,
) -> None:
    """Measure the video file CLIP against REFERENCE, each frame and its motion.

    A video file is compressed, and what that lost counts here. ``hvcompile generate --compare`` measures the pixels
    themselves, against the exact run of the same prompt and seed.
    """
    from hvcompile.app import compare

    try:
        result = compare.compare_files(reference, clip, sheet_file=sheet, json_file=json_file)
    except Exception as error:
        _leave(error)
    out.print(tables.each_frame(result.quality))
    out.print(tables.comparison_summary(result, sheet))


@app.command()
def explain(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory or hub id of a diffusers pipeline, or a Python script (default: the embedded tiny one)."
        ),
    ] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Of the script, after --.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length of the clip.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Its length counts where the pipeline does not pad.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="'exact': only rewrites that don't change numerics; 'max': all, float8 attention too."),
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="Whose peaks bound the step time: a100, l20, l40s, rtx4090, h100, h200 or b200.")
    ] = "h100",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (default), float16 or float32.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write it all (.json).")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with pictures and the graphs (.html).")
    ] = None,
) -> None:
    """Say what hvfast would do with MODEL, what it would not and why, and what a step costs; runs nothing.

    Of a pipeline only the configuration is read, no weights: a model of any size is explained on any machine. A script
    runs up to the first call of a model that it compiles with hvfast.
    """
    with quiet_import():
        from hvcompile.app import explain as app_explain

    try:
        _quieten_loading()
        request = app_explain.Request(
            model=model,
            frames=frames,
            height=height,
            width=width,
            prompt=prompt,
            mode=mode,
            gpu=gpu,
            dtype=dtype,
            json_file=json_file,
            html_file=html_file,
            arguments=tuple(arguments or ()),
        )
        explanation = app_explain.explain_request(request)
    except Exception as error:
        _leave(error)
    for part in tables.explanation_tables(explanation, gpu):
        out.print(part)


@app.command()
def bisect(
    directory: Annotated[Path, typer.Argument(help="What HVCOMPILE_DUMP named, or one graph_... folder in it.")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Relative difference that is no fault (default: by dtype; 1e-4 in float32, 3e-2 in bfloat16)."
        ),
    ] = None,
    lower: Annotated[
        str | None, typer.Option(help="eager, aot or inductor: how far to go (default: as far as the dumped run).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write it all (.json).")] = None,
    rank_timeout: Annotated[
        float, typer.Option(help="Under torchrun: seconds after which a rank that waits for another gives up.")
    ] = 120.0,
) -> None:
    """Find the first pass or lowering of a dump after which outputs differ, or a NaN appears.

    The dump of several ranks is looked at by as many, under torchrun: torchrun --nproc-per-node=N -m hvcompile bisect.

    Leaves with 1 where a fault is found, with 0 where none is.
    """
    with quiet_import():
        from hvcompile.dump import bisect
        from hvcompile.dump import read as dump_read
        from hvcompile.ranks import launch
        from hvcompile.ranks.store import Exchange

    out.quiet = err.quiet = launch.rank() > 0
    try:
        if not 0 < rank_timeout < math.inf:
            raise InputError(f"rank-timeout is {rank_timeout:g}; allowed is a finite number of seconds, above 0")
        if json_file is not None:
            outputs.check(json_file, name="json", kind="JSON file", suffixes=(".json",))
        directory = dump_read.of_rank(directory, launch.rank(), launch.num_ranks())
        found = []
        with launch.joined(launch.own_device(dump_read.device(directory)), rank_timeout):
            exchange = Exchange(rank_timeout)
            for folder in bisect.folders_of_all(directory, exchange):
                with err.status(folder.name) as status:

                    def show(what: str, folder: Path = folder, status: Status = status) -> None:
                        status.update(Text(f"{folder.name}: {what}"))

                    one = bisect.bisect(folder, tolerance=tolerance, lower=lower, observe=show, exchange=exchange)
                found.append(one)
                out.print(tables.bisection_table(one))
                for note in one.notes:
                    out.print(Text(f"note: {note}"), soft_wrap=True)
                out.print(Text(one.verdict()), soft_wrap=True)
            if json_file is not None and launch.rank() == 0:
                bisect.write_json(found, json_file)
            exchange.finish()  # torchrun ends all when the first leaves with 1
    except Exception as error:
        _leave_in_turn(error)
    if any(one.finding for one in found):
        raise typer.Exit(1)


@app.command("bench")
def bench_contenders(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory or hub id of a HunyuanVideo pipeline (default: a tiny one, random weights)."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Dual-stream and single-stream blocks of the random model, such as 20+40.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the random model, a multiple of 16.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Size of the clip in video tokens, about.")] = None,
    frames: Annotated[int | None, typer.Option(help="Or: length of the clip,")] = None,
    height: Annotated[int | None, typer.Option(help="its height in pixels,")] = None,
    width: Annotated[int | None, typer.Option(help="and its width in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a run.")] = None,
    threshold: Annotated[float, typer.Option(help="Of every first-block cache.")] = 0.06,
    repeats: Annotated[int, typer.Option(help="Rounds, in each of which every contender runs once.")] = 3,
    contenders: Annotated[
        str, typer.Option(help="Which, with commas between; eager always runs.")
    ] = "eager,inductor,diffusers,cache-dit,exact,hvfast",
    seed: Annotated[int, typer.Option(help="Of the first latents and the prompt's embedding.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: a GPU if there is one).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on the CPU).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch, on the CPU.")] = None,
    lower: Annotated[
        str, typer.Option(help="inductor; aot or eager try the command out without compiling.")
    ] = "inductor",
    full: Annotated[
        bool, typer.Option("--full", help="The full model at 1280x720, 129 frames, 30 steps, in bfloat16.")
    ] = False,
    shapes: Annotated[
        bool | None,
        typer.Option("--shapes/--no-shapes", help="Count recompilations over other shapes too (default: not in full)."),
    ] = None,
    restart: Annotated[
        bool | None,
        typer.Option("--restart/--resident", help="End a process after its turn, to free memory (default: in full)."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for one answer of a contender (default: 1800; in full 21600).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write it all (.json).")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw it (.png).")] = None,
) -> None:
    """Measure hvfast beside eager, torch.compile and other caches, compiled as far as they compile.

    All are given the same weights, latents, prompt, threshold and schedule; each runs in a process of its own, and
    only one at a time. A peer that is missing (it comes with the extra "bench") or fails is a row that says so.

    Leaves with 1 where eager, torch.compile or hvfast itself failed.
    """
    with quiet_import():
        from hvcompile.app.bench import results
        from hvcompile.app.bench import run as bench_run
        from hvcompile.app.bench.contenders import PEERS

    request = bench_run.Request(
        model=model,
        blocks=blocks,
        hidden=hidden,
        tokens=tokens,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        threshold=threshold,
        repeats=repeats,
        contenders=tuple(key.strip() for key in contenders.split(",") if key.strip()),
        seed=seed,
        device=device,
        dtype=dtype,
        threads=threads,
        lower=lower,
        full=full,
        shapes=shapes,
        restart=restart,
        timeout=timeout,
        json_file=json_file,
        plot_file=plot_file,
    )
    try:
        _quieten_loading()
        with err.status("") as status:

            def show(doing: str) -> None:
                if err.is_terminal:
                    status.update(Text(doing))
                else:
                    err.print(Text(doing), soft_wrap=True)

            terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # then, too, what is there is kept
            try:
                result = bench_run.bench(request, show)
            finally:
                signal.signal(signal.SIGTERM, terminate)
        if json_file is not None:
            outputs.write_json({"command": _command(), **result.record()}, json_file)
        if plot_file is not None:
            results.plot(result, plot_file)
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        err.print(Text("no plot, for matplotlib is missing: pip install '.[bench]'"), soft_wrap=True)
    except Exception as error:
        _leave(error)
    out.print(Text(result.title()), soft_wrap=True)
    for table in tables.bench_tables(result):
        out.print(table)
    for path in (json_file, plot_file):
        if path is not None and path.exists():
            out.print(Text(f"written to {path}"), soft_wrap=True)
    if result.conditions.get("interrupted"):
        err.print("interrupted: the figures are of what was measured until then")
        raise typer.Exit(130)
    if any((row.error or row.cases_error) and row.system not in PEERS for row in result.rows):
        raise typer.Exit(1)


def _command() -> str:
    """What the user typed, in the words of the installed command."""
    name = Path(sys.argv[0]).name
    return shlex.join(["hvcompile" if name == "__main__.py" else name, *sys.argv[1:]])


class Display:
    """The progress of a generation: a line a run: a mark a step, how many were reused, the last difference."""

    def __init__(self, console: Console = err) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.phase = self.progress.add_task("starting", total=None)
        self.run = self.phase
        self.marks = ""

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.update(self.phase, visible=False)
        self.progress.stop()

    def __call__(self, event: str | Step) -> None:
        """Show a phase (text) or a step that is done."""
        if isinstance(event, str):
            self.progress.reset(self.phase, description=event, visible=True)
            return
        if event.index == 0:
            self.marks = ""
            self.run = self.progress.add_task("", total=event.num_steps)
            # its time is that of its first step too, which was shown as a phase
            self.progress.tasks[-1].start_time = self.progress.tasks[0].start_time
            self.progress.update(self.phase, visible=False)
        self.marks += REUSED if event.reused else COMPUTED
        strip = self.marks.ljust(event.num_steps)[max(0, len(self.marks) - STRIP) :][:STRIP]
        text = f"{event.backend} {strip} {len(self.marks)}/{event.num_steps}, {self.marks.count(REUSED)} reused"
        if event.difference is not None and math.isfinite(event.difference):
            text += f", last {event.difference:.3f}"
        self.progress.update(self.run, advance=1, description=text)


def _leave(error: Exception) -> NoReturn:
    """Leave with one line where the user gave something wrong; raise ``error`` again where the fault is ours."""
    if (message := _input_fault(error)) is None:
        raise error
    err.print(Text(f"error: {message}"), soft_wrap=True)
    raise typer.Exit(2) from error


def _leave_in_turn(error: Exception) -> NoReturn:
    """Leave as ``_leave`` does, the first of several ranks before the others."""
    from hvcompile.ranks import launch

    if launch.rank() > 0 and isinstance(error, InputError | OptionError):
        # All ranks were given the same, and the first says what is wrong with it; torchrun then ends the others.
        time.sleep(launch.GRACE_SECONDS)
    err.quiet = False
    _leave(error)


def _input_fault(error: BaseException | None) -> str | None:
    """Find the HvcompileError at or below ``error`` (Dynamo wraps what a backend raises); its message in one line."""
    while error is not None:
        if isinstance(error, HvcompileError):
            return " ".join(str(error).split())
        error = error.__cause__ or getattr(error, "inner_exception", None) or error.__context__
    return None


def _quieten_loading() -> None:
    """Turn off the loading bars of the libraries, which would break into ours."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
