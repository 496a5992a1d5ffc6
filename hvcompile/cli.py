"""The command line: ``hvcompile generate``, ``compare``, ``explain`` and ``bisect``."""

from __future__ import annotations

import importlib.metadata
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from hvcompile.errors import HvcompileError, InputError, OptionError

if TYPE_CHECKING:
    from hvcompile.bisect import Bisection
    from hvcompile.compare import FileComparison
    from hvcompile.explain import Explanation
    from hvcompile.generate import Result
    from hvcompile.metrics import Comparison, Quality, Step

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
    mode: Annotated[str | None, typer.Option(help="'exact': only rewrites that don't change numerics.")] = None,
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
    from hvcompile import generate as generation  # torch and diffusers take seconds to import; --help must not
    from hvcompile import launch

    request = generation.Request(
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
            result = generation.generate(request, display)
    except Exception as error:
        if launch.rank() > 0 and isinstance(error, InputError | OptionError):
            # All ranks were given the same, and the first says what is wrong with it; torchrun then ends the others.
            time.sleep(launch.GRACE_SECONDS)
        err.quiet = False
        _leave(error)
    out.print(summary(result))


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
    from hvcompile import compare

    try:
        result = compare.compare_files(reference, clip, sheet_file=sheet, json_file=json_file)
    except Exception as error:
        _leave(error)
    out.print(each_frame(result.quality))
    out.print(comparison_summary(result, sheet))


@app.command()
def explain(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory or hub id of a diffusers pipeline, or a Python script (default: the embedded tiny one)."
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Length of the clip.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    prompt: Annotated[str, typer.Option(help="Its length counts where the pipeline does not pad.")] = "a cat walks",
    mode: Annotated[str | None, typer.Option(help="'exact': only rewrites that don't change numerics.")] = None,
    gpu: Annotated[
        str, typer.Option(help="Whose peaks bound the step time: a100, l20, l40s, rtx4090, h100, h200 or b200.")
    ] = "h100",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write it all (.json).")] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with pictures and the graphs (.html).")
    ] = None,
) -> None:
    """Say what hvfast would do with MODEL, what it would not and why, and what a step costs; runs nothing.

    Of a pipeline only the configuration is read, no weights: a model of any size is explained on any machine. A script
    runs up to the first call of a model that it compiles with hvfast.
    """
    from hvcompile import explaining

    try:
        _quieten_loading()
        request = explaining.Request(
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
        )
        explanation = explaining.explain_request(request)
    except Exception as error:
        _leave(error)
    for part in explanation_tables(explanation, gpu):
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
) -> None:
    """Find the first pass or lowering of a dump after which outputs differ, or a NaN appears.

    Leaves with 1 where a fault is found, with 0 where none is.
    """
    try:
        from hvcompile import bisect as bisecting
        from hvcompile import dumped, outputs

        if json_file is not None:
            outputs.check(json_file, name="json", kind="JSON file", suffixes=(".json",))
        found = []
        for folder in dumped.folders(directory):
            with err.status(folder.name) as status:

                def show(what: str, folder: Path = folder, status: Status = status) -> None:
                    status.update(Text(f"{folder.name}: {what}"))

                one = bisecting.bisect(folder, tolerance=tolerance, lower=lower, observe=show)
            found.append(one)
            out.print(bisection_table(one))
            for note in one.notes:
                out.print(Text(f"note: {note}"), soft_wrap=True)
            out.print(Text(one.verdict()), soft_wrap=True)
        if json_file is not None:
            bisecting.write_json(found, json_file)
    except Exception as error:
        _leave(error)
    if any(one.finding for one in found):
        raise typer.Exit(1)


def bisection_table(found: Bisection) -> Table:
    """Lay out the stages that were run, and the worst of each stage's figures."""
    table = Table(title=str(found.folder), title_justify="left")
    for heading in ("stage", "what"):
        table.add_column(heading, overflow="fold")
    for heading in ("differs by", "relative", "not finite"):
        table.add_column(heading, justify="right")
    for place, stage in enumerate(found.stages):
        worst = max(stage.figures, key=lambda figure: figure.relative, default=None)
        mark = " <-" if found.finding and place == len(found.stages) - 1 else ""
        cells = ("", "") if worst is None or not place else (f"{worst.largest:.3g}", f"{worst.relative:.3g}")
        table.add_row(
            Text(stage.name + mark), Text(stage.what), *cells, str(sum(figure.not_finite for figure in stage.figures))
        )
    return table


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


def summary(result: Result) -> Table:
    """Lay out the closing table of a generation; with ``--compare``, two columns."""
    runs = [result.run] + ([result.comparison.plain] if result.comparison else [])
    table = Table(show_header=result.comparison is not None)
    table.add_column("")
    for run in runs:
        table.add_column(run.steps[0].backend, justify="right")
    table.add_row("seconds in all", *(f"{run.seconds:.2f}" for run in runs))
    table.add_row("seconds compiling", *(f"{run.compile_seconds:.2f}" for run in runs))
    table.add_row("seconds a step after", *(_number(run.step_seconds, ".4f") for run in runs))
    table.add_row("steps computed", *(str(len(run.steps) - run.num_reused) for run in runs))
    table.add_row("steps reused", *(str(run.num_reused) for run in runs))
    table.add_row("graphs", str(result.graphs))
    table.add_row("recompiles", str(result.recompiles))
    if result.comparison is not None:
        _add_comparison(table, result.comparison)
    num_frames, height, width, _ = result.run.frames.shape
    table.add_row("clip", _clip(width, height, num_frames))
    table.add_row("output", Text(str(result.output), overflow="fold"))
    if result.sheet is not None:
        table.add_row("contact sheet", Text(str(result.sheet), overflow="fold"))
    if result.report is not None:
        table.add_row("report", Text(str(result.report), overflow="fold"))
    return table


def explanation_tables(explanation: Explanation, gpu: str) -> list[Table]:
    """Lay out an explanation: the trunk, the passes, and what a step costs."""
    trunk = Table(title="trunk", title_justify="left")
    for heading in ("blocks", "of them first .. last", "operations", "streams"):
        trunk.add_column(heading, overflow="fold")
    for kind in explanation.kinds:
        streams = "\n".join(f"{stream.name} {list(stream.shape)}" for stream in kind.streams)
        trunk.add_row(str(kind.count), Text(f"{kind.first} .. {kind.last}"), str(kind.num_operations), Text(streams))
    trunk.caption = (
        f"{explanation.num_prologue} operations before the blocks, {explanation.num_epilogue} after them"
        if explanation.kinds
        else f"none: {explanation.reason}"
    )

    passes = Table("pass", "would do", "would leave, and why", title="passes", title_justify="left")
    for row in explanation.journal:
        reasons = "\n".join(f"{what}: {why}" for what, why in row.report.declined)
        passes.add_row(row.name, Text("\n".join(row.report.matched) or "nothing"), Text(reasons))

    cost = Table(title=f"a step that computes everything, in {explanation.dtype}", title_justify="left")
    cost.add_column("")
    for heading in ("TFLOP", "share", "GB moved", f"seconds at least, {gpu}"):
        cost.add_column(heading, justify="right")
    for part in explanation.costs:
        share = part.flops / explanation.flops if explanation.flops else 0.0
        cost.add_row(part.part, *_cost_row(part.flops, share, part.bytes, part.seconds))
    moved = sum(part.bytes for part in explanation.costs)
    cost.add_section()
    cost.add_row("all", *_cost_row(explanation.flops, 1.0, moved, explanation.seconds))
    reused = explanation.reused_flops
    cost.add_row("a step that reuses", *_cost_row(reused, reused / (explanation.flops or 1), None, None))

    if explanation.depends_on_data:
        cost.caption = "a length is known only when the model runs: it counts as 1, and these figures are too low"

    memory = Table("", "GB", title="memory", title_justify="left")
    memory.add_row("weights", f"{explanation.weight_bytes / 1e9:.3g}")
    memory.add_row("kept from step to step, a generation", f"{explanation.state_bytes / 1e9:.3g}")
    return [trunk, passes, cost, memory]


def _cost_row(flops: int, share: float, moved: int | None, seconds: float | None) -> tuple[str, ...]:
    gigabytes = "" if moved is None else f"{moved / 1e9:.3g}"
    return f"{flops / 1e12:.4g}", f"{share:.1%}", gigabytes, "" if seconds is None else f"{seconds:.3g}"


def comparison_summary(result: FileComparison, sheet: Path | None) -> Table:
    """Lay out the closing table of a comparison of two files."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_row("clip", _clip(result.width, result.height, result.frames))
    _add_quality(table, result.quality)
    if sheet is not None:
        table.add_row("contact sheet", Text(str(sheet), overflow="fold"))
    return table


def each_frame(quality: Quality) -> Table:
    """Lay out the figures of every frame; the change is from the frame before."""
    table = Table()
    for heading in ("frame", "PSNR, dB", "SSIM", "PSNR of the change, dB"):
        table.add_column(heading, justify="right")
    changes = (None, *quality.temporal_psnr)
    for frame, (psnr, ssim, change) in enumerate(zip(quality.psnr, quality.ssim, changes, strict=True)):
        table.add_row(str(frame), _number(psnr, ".2f"), f"{ssim:.4f}", _number(change, ".2f"))
    return table


def _add_comparison(table: Table, comparison: Comparison) -> None:
    table.add_row("speed-up a step", _number(comparison.step_speedup, ".2f", "x"))
    table.add_row("speed-up in all", _number(comparison.total_speedup, ".2f", "x"))
    _add_quality(table, comparison.quality)


def _add_quality(table: Table, quality: Quality) -> None:
    table.add_row("PSNR", _number(quality.mean_psnr, ".2f", " dB"))
    table.add_row("PSNR, worst frame", _number(min(quality.psnr), ".2f", " dB"))
    table.add_row("SSIM", _number(quality.mean_ssim, ".4f"))
    table.add_row("SSIM, worst frame", _number(min(quality.ssim), ".4f"))
    table.add_row("temporal PSNR", _number(quality.mean_temporal_psnr, ".2f", " dB"))
    table.add_row("temporal PSNR, worst", _number(min(quality.temporal_psnr, default=None), ".2f", " dB"))


def _clip(width: int, height: int, num_frames: int) -> str:
    return f"{width}x{height}, {num_frames} frame{'' if num_frames == 1 else 's'}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return "-"
    return "identical" if math.isinf(value) else f"{value:{form}}{unit}"


def _leave(error: Exception) -> NoReturn:
    """Leave with one line where the user gave something wrong; raise ``error`` again where the fault is ours."""
    if (message := _input_fault(error)) is None:
        raise error
    err.print(Text(f"error: {message}"), soft_wrap=True)
    raise typer.Exit(2) from error


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
