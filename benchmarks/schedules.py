"""Fixed schedules of the first-block cache on many clips at once: fidelity by front blocks, steps and bits of state.

``python benchmarks/schedules.py`` wraps the blocks of a pipeline as it is, with no compiler, and makes sixteen clips in
a batch: a schedule computes the same steps of every clip. The schedules are those that ``hvcompile tune`` would find on
the clips that ``pareto.py`` finds them by, and the forecasts are of the functions that the graphs are made of. It
leaves a table (.md) and all figures (.json). Finished settings are kept, and a run that was broken off goes on.

The state may be kept in fewer bits: the differences between computed steps, and the residuals. Float8 has a scale a
clip and a tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pareto
import torch
import typer

from hvcompile.app import metrics, pipelines
from hvcompile.app.bench.contenders import blocks_of
from hvcompile.app.tuning.schedule import Trajectory, schedules
from hvcompile.float8.format import DTYPE, LARGEST, SMALLEST_MAGNITUDE
from hvcompile.rewriting import forecast

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
NUMBERS = (16, 12, 10, 9)
"""Of steps computed, of 30."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": DTYPE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A schedule: how many steps it computes, and how the others are made."""

    front_blocks: int
    computed: int
    forecast: int = 1
    differences: str = "float32"
    residuals: str = "float32"


def rounded(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A tensor ``[clips, ...]`` as it comes back from a dtype."""
    if dtype != "float8":
        return tensor.to(DTYPES[dtype]).to(tensor.dtype)
    scale = tensor.abs().amax(dim=tuple(range(1, tensor.ndim)), keepdim=True).clamp(min=SMALLEST_MAGNITUDE) / LARGEST
    return (tensor / scale).to(DTYPES[dtype]).to(tensor.dtype) * scale


@dataclasses.dataclass
class Kept:
    """What one of guidance's calls keeps of computed steps: residuals, of block 1 and the rest, differences, clocks."""

    first: torch.Tensor
    rest: torch.Tensor
    differences: list[tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)
    clocks: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def ahead(self, first: torch.Tensor, clock: torch.Tensor, setting: Setting) -> torch.Tensor:
        """The rest as it is forecast, given block 1's residual."""
        found, used = self.rest, self.differences[: setting.forecast]
        if not used:
            return found
        enough = torch.tensor(True)
        if not setting.front_blocks:
            ahead: torch.Tensor = forecast.along_clock(clock, torch.stack(self.clocks[:2]), enough)
            return found + ahead * used[0][1]
        for clip in range(len(first)):
            vectors = [first[clip], first[clip] - self.first[clip], *(one[clip] for one, _ in used)]
            products = {pair: (vectors[pair[0]] * vectors[pair[1]]).sum() for pair in forecast.pairs(len(used))}
            usable, flags = forecast.usable(products, [enough] * len(used))
            for (_, difference), coefficient in zip(used, forecast.along_first_block(usable, flags), strict=True):
                found = found.index_add(0, torch.tensor([clip]), coefficient * difference[clip : clip + 1])
        return found

    def then(self, first: torch.Tensor, rest: torch.Tensor, clock: torch.Tensor, setting: Setting) -> Kept:
        """The next, after a computed step."""
        moved = (rounded(first - self.first, setting.differences), rounded(rest - self.rest, setting.differences))
        first, rest = rounded(first, setting.residuals), rounded(rest, setting.residuals)
        return Kept(first, rest, [moved, *self.differences][:2], [clock, *self.clocks][:2])


class Wrapped:
    """A pipeline whose blocks are skipped by a schedule, or recorded."""

    def __init__(self, model: str | None, **size: int) -> None:
        self.loaded = pipelines.load(model, None, None)
        self.pipe, self.transformer = self.loaded.pipe, self.loaded.pipe.transformer
        self.arguments = {**self.loaded.defaults, **size}
        self.num_steps = int(self.arguments["num_inference_steps"])
        self.setting: Setting | None = None
        self.steps: tuple[int, ...] = ()
        self.number, self.calls = 0, 1
        self.is_alone = True
        self.recorded: list[dict[str, Any]] = []
        self.blocks = blocks_of(self.transformer)
        for place, block in enumerate(self.blocks):
            block.forward = functools.partial(self._block, place, block.forward)
        self.transformer.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, _: Any, args: Any, kwargs: Any) -> None:
        self.clock = kwargs["timestep"][:1].double()
        self.slot, self.step = self.number % self.calls, self.number // self.calls
        self.number += 1
        self.is_skipped = self.setting is not None and self.step not in self.steps

    def _block(self, place: int, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_last, front = place == len(self.blocks) - 1, self.setting.front_blocks if self.setting else 1
        if place == 0:
            self.entered = hidden
        if self.is_skipped and place >= front:
            if is_last:
                hidden = hidden + self.kept[self.slot].ahead(self._first(hidden), self.clock, self.setting)  # type: ignore[arg-type]
            return hidden if self.is_alone else (hidden, args[0])
        output = forward(hidden, *args, **kwargs)
        self.is_alone = isinstance(output, torch.Tensor)
        left = output if self.is_alone else output[0]
        if place == 0:
            self.after_first = left
        if is_last and self.setting is None:
            self.recorded.append({"first": self.after_first - self.entered, "rest": left - self.after_first})
            self.recorded[-1]["clock"] = float(self.clock)
        elif is_last and self.setting is not None:
            first, rest = self._first(left), left - (self.after_first if front else self.entered)
            before = self.kept.get(self.slot)
            kept = Kept(rounded(first, self.setting.residuals), rounded(rest, self.setting.residuals))
            kept.clocks = [self.clock]
            self.kept[self.slot] = kept if before is None else before.then(first, rest, self.clock, self.setting)
        return output

    def _first(self, like: torch.Tensor) -> torch.Tensor:
        has_first = self.setting is None or self.setting.front_blocks
        return self.after_first - self.entered if has_first else torch.zeros_like(like)

    def make(self, prompts: tuple[str, ...], seeds: list[int], output_type: str = "np") -> Any:
        """Clips of prompts, each with a seed."""
        self.number, self.kept = 0, dict[int, Kept]()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            made = self.pipe(list(prompts), generator=generators, **{**self.arguments, "output_type": output_type})
        return made.frames

    def make_all(self) -> Any:
        """The clips that ``pareto.py`` measures."""
        jobs = [(prompt, seed) for prompt in pareto.PROMPTS for seed in range(2)]
        parts = [jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH)]
        return np.concatenate([self.make(*map(list, zip(*part, strict=True))) for part in parts]).astype(np.float32)  # type: ignore[arg-type]

    def trajectories(self) -> list[Trajectory]:
        """Of the clips by which schedules are found, a call of guidance each."""
        self.recorded.clear()
        self.make(pareto.OBSERVED, list(range(100, 100 + len(pareto.OBSERVED))), "latent")
        self.calls = len(self.recorded) // self.num_steps
        found = []
        for slot in range(self.calls):
            steps = self.recorded[slot :: self.calls]
            clocks = np.array([step["clock"] for step in steps])
            for clip in range(len(pareto.OBSERVED)):
                first, rest = (
                    torch.stack([step[kind][clip].flatten() for step in steps]).double() for kind in ("first", "rest")
                )
                products = [{"residual_0": (rows @ rows.T).numpy()} for rows in (rest, first + rest)]
                found.append(
                    Trajectory(clocks=clocks, first=(first @ first.T).numpy(), rest=products[0], whole=products[1])
                )
        return found


def table(rows: list[dict[str, Any]], title: str, command: str) -> str:
    """The page."""
    headings = ("front blocks", "steps computed", "forecast", "differences in", "residuals in", "blocks saved")
    lines = [
        f"# {title}\n\nWritten by `{command}`. PSNR of 16 prompts x 2 seeds against all steps computed, float32.\n",
        f"| {' | '.join(headings)} | PSNR mean | least |",
        "| ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        figures = row["psnr_db"]
        lines.append(
            f"| {row['front_blocks']} | {row['computed']} | {row['forecast']} | {row['differences']} | "
            f"{row['residuals']} | {100 * row['saved']:.1f} % | {statistics.fmean(figures):.2f} | {min(figures):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[str | None, typer.Option(help="Directory of a pipeline (default: the embedded one).")] = None,
    computed: Annotated[list[int] | None, typer.Option(help="Steps computed, of 30; give several.")] = None,
    bits_at: Annotated[int, typer.Option(help="Steps computed where fewer bits are tried.")] = 15,
    to: Annotated[Path, typer.Option("--output", help="The results, less .md and .json.")] = Path("schedules"),
) -> None:
    """Measure schedules."""
    torch.set_num_threads(1)
    pareto.quieten()
    size = {} if model is None else {"num_frames": 17, "height": 32, "width": 48, "num_inference_steps": 30}
    wrapped = Wrapped(model, **size)
    found = {front: schedules(wrapped.trajectories(), front) for front in (0, 1)}
    wanted = [Setting(front_blocks=front, computed=number) for front in (0, 1) for number in computed or NUMBERS]
    kinds = [("float32", "float32"), ("bfloat16", "float32"), ("float8", "float32"), ("float8", "bfloat16")]
    wanted += [
        Setting(front_blocks=1, computed=bits_at, differences=differences, residuals=residuals)
        for differences, residuals in kinds
    ]
    data = to.with_suffix(".json")
    rows = json.loads(data.read_text()) if data.exists() else []
    reference = wrapped.make_all()
    for setting in dict.fromkeys(wanted):
        named = dataclasses.asdict(setting)
        if any(named.items() <= row.items() for row in rows):
            continue
        wrapped.setting, wrapped.steps = setting, found[setting.front_blocks][setting.computed]
        psnr = [
            metrics.compare(clip, exact).mean_psnr for clip, exact in zip(wrapped.make_all(), reference, strict=True)
        ]
        share = 1 - setting.front_blocks / len(wrapped.blocks)
        saved = share * (1 - setting.computed / wrapped.num_steps)
        rows.append(
            {
                **named,
                "steps": list(wrapped.steps),
                "saved": round(saved, 4),
                "psnr_db": [round(item, 3) for item in psnr],
            }
        )
        data.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(named, round(saved, 3), round(statistics.fmean(psnr), 2), round(min(psnr), 2), flush=True)
    command = shlex.join(["python", "benchmarks/schedules.py", *sys.argv[1:]])
    to.with_suffix(".md").write_text(table(rows, f"Fixed schedules, {model or 'embedded tiny HunyuanVideo'}", command))


if __name__ == "__main__":
    typer.run(main)
