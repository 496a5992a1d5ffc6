"""The results of ``pareto.py``: a row a setting, as a table, as a page and as a plot."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvcompile.app.bench.contenders import CACHE_DIT, DIFFUSERS, EAGER, HVFAST, INDUCTOR

REFERENCE = INDUCTOR

INTERVAL = "cache_interval"
"""The option of a cache that computes every so many steps; it stands in place of a threshold."""
PERCENT = "computed_percent"
"""The option of a fixed schedule: how many of the steps it computes; it stands in place of a threshold too."""

MEASURES = ("saved", "seconds", "cpu_seconds", "psnr_db", "worst_psnr_db", "ssim", "temporal_psnr_db")
"""Columns of a setting, a value a clip; null in the JSON is an infinite PSNR: an identical clip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to generate: a system, and where it reuses steps its threshold and further options of the cache."""

    system: str
    threshold: float | None = None
    options: tuple[tuple[str, int | str], ...] = ()

    @property
    def series(self) -> str:
        """What the settings along one curve have in common."""
        along = (f"{name} {number}" for name, number in self.options if name not in {INTERVAL, PERCENT})
        return ", ".join((self.system, *along))

    @property
    def place(self) -> float | None:
        """Where on its curve the setting is: its threshold, or what stands in place of one; None off any curve."""
        instead = [float(number) for name, number in self.options if name in {INTERVAL, PERCENT}]
        return instead[0] if instead else self.threshold

    def __str__(self) -> str:
        return self.series if self.place is None else f"{self.series} at {self.place:g}"

    def record(self) -> dict[str, Any]:
        """The setting as JSON."""
        return {"system": self.system, "threshold": self.threshold, "options": dict(self.options)}


def setting_of(row: Mapping[str, Any]) -> Setting:
    """The setting that a row of the results is of."""
    return Setting(system=row["system"], threshold=row["threshold"], options=tuple(row["options"].items()))


def column(row: Mapping[str, Any], name: str) -> list[float]:
    """One figure of all clips of a row, identical ones as infinite."""
    return [math.inf if item is None else item for item in row[name]]


def middle(row: Mapping[str, Any], name: str) -> float:
    """The median over the clips; the mean of what was saved, which few values repeat."""
    return statistics.fmean(column(row, name)) if name == "saved" else statistics.median(column(row, name))


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text, for a table."""
    setting = setting_of(row)
    threshold = "" if setting.place is None else f"{setting.place:g}"
    if "error" in row:
        return [setting.series, threshold, *[""] * (len(HEADINGS) - 3), " ".join(row["error"].split())[:100]]
    of_clips = column(row, "psnr_db")
    return [
        setting.series,
        threshold,
        f"{100 * middle(row, 'saved'):.1f} %",
        f"{middle(row, 'seconds'):.2f}",
        f"{middle(row, 'cpu_seconds'):.2f}",
        decibels(statistics.median(of_clips)),
        decibels(statistics.fmean(of_clips)),
        decibels(min(of_clips)),
        decibels(min(column(row, "worst_psnr_db"))),
        f"{middle(row, 'ssim'):.4f}",
        decibels(middle(row, "temporal_psnr_db")),
        "",
    ]


def decibels(value: float) -> str:
    """A PSNR for a table."""
    return "identical" if math.isinf(value) else f"{value:.2f}"


HEADINGS = (
    "system",
    "threshold",
    "blocks saved",
    "s a clip",
    "CPU s",
    "PSNR, dB",
    "mean",
    "least",
    "worst frame",
    "SSIM",
    "temporal",
    "failed",
)


def table_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table; the last column only where something failed."""
    lines = [cells(row) for row in rows]
    width = len(HEADINGS) if any(line[-1] for line in lines) else len(HEADINGS) - 1
    return list(HEADINGS[:width]), [line[:width] for line in lines]


def markdown(rows: Sequence[Mapping[str, Any]], title: str, command: str) -> str:
    """The table as a page."""
    headings, lines = table_of(rows)
    aligned = [" | ".join(headings), "|".join(["---", *["---:"] * (len(headings) - 1)])]
    body = [" | ".join(cell.replace("|", "/") for cell in line) for line in lines]
    return "\n".join(
        [
            "# Speed against fidelity",
            "",
            f"{title}. Written by `{command}`.",
            "",
            "Blocks saved: the share of the computations of one block in one step that a setting did without, the mean",
            "over the clips. The other figures are medians over the clips. Seconds, and seconds of all processors, are",
            "of the denoising loop, without text encoding, decoding and, for what compiles, compiling. PSNR, SSIM and",
            "the PSNR of the change from frame to frame (temporal) are of the pixels against plain Inductor's, of a",
            "clip the mean over its frames; mean and least are over the clips, worst frame over all their frames.",
            "The threshold of a cache that computes every so many steps is that number.",
            "",
            *(f"| {line} |" for line in (*aligned, *body)),
            "",
        ]
    )


STYLES: Mapping[str, Mapping[str, Any]] = {
    HVFAST: {"color": "#1f5fbf", "marker": "o", "linestyle": "-", "linewidth": 2, "markersize": 5, "zorder": 4},
    DIFFUSERS: {
        "color": "#d9730d",
        "marker": "s",
        "linestyle": "--",
        "markersize": 10,
        "markerfacecolor": "none",
        "zorder": 3,
    },
    CACHE_DIT: {"color": "#2e8b57", "marker": "^", "linestyle": "-.", "markersize": 7, "zorder": 3},
}
"""The first two decide alike, so that one curve lies on the other: hollow marks stay visible around full ones."""
OPTION_COLOURS = ("#8e44ad", "#c0392b", "#5d6d7e", "#b7950b", "#117a8b", "#7d3c98")
OPTION_MARKERS = ("D", "v", "P", "X", "<", "*")
CLOCKS = {
    "seconds": "seconds a clip (denoising loop)",
    "cpu_seconds": "processor seconds a clip (denoising loop, one thread)",
}
NAMES = {HVFAST: "hvfast (compiled)", DIFFUSERS: "diffusers FirstBlockCache (eager)", CACHE_DIT: "cache-dit (eager)"}


def plot(rows: Sequence[Mapping[str, Any]], title: str, path: Path, *, clock: str) -> None:
    """Draw PSNR and SSIM over what was saved and over the time of a clip, a curve a series.

    Args:
        rows: of the results.
        title: the first line.
        path: the PNG; replaced if there.
        clock: the measure that is drawn as the time, a key of ``CLOCKS``.

    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = (("saved", "psnr_db"), (clock, "psnr_db"), ("saved", "ssim"), (clock, "ssim"))
    measured = [row for row in rows if "error" not in row]
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in measured:
        if setting_of(row).place is not None:
            series.setdefault(setting_of(row).series, []).append(row)
    series = dict(sorted(series.items(), key=lambda item: item[0] not in STYLES))
    with_options = [name for name in series if name not in STYLES]
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharey="row", layout="constrained")
    for name, group in series.items():
        ordered = sorted(group, key=lambda row: setting_of(row).place or 0)
        style = dict(STYLES.get(name, {}))
        if not style:
            place = with_options.index(name)
            style = {
                "color": OPTION_COLOURS[place % len(OPTION_COLOURS)],
                "marker": OPTION_MARKERS[place % len(OPTION_MARKERS)],
                "linestyle": ":",
                "linewidth": 1,
                "markersize": 6,
                "zorder": 5,
            }
        for axis, (x, y) in zip(axes.flat, panels, strict=True):
            scale = 100 if x == "saved" else 1
            points = [(scale * middle(row, x), middle(row, y), setting_of(row).place or 0) for row in ordered]
            points = [point for point in points if math.isfinite(point[1])]  # identical clips have no PSNR
            label = NAMES.get(name) or f"{name} at {' and '.join(f'{threshold:g}' for _, _, threshold in points)}"
            axis.plot([across for across, _, _ in points], [up for _, up, _ in points], label=label, **style)
            for across, up, threshold in points if name == HVFAST and x == "saved" else []:
                axis.annotate(
                    f"{threshold:g}",
                    (across, up),
                    textcoords="offset points",
                    xytext=(7, 7),
                    fontsize=9,
                    color=style["color"],
                )
    for axis, (x, y) in zip(axes.flat, panels, strict=True):
        axis.set_xlabel("block computations saved, %" if x == "saved" else CLOCKS[x])
        if x == "saved":
            axis.set_ylabel({"psnr_db": "PSNR, dB", "ssim": "SSIM"}[y])
        else:
            for row in measured:
                if row["system"] in (INDUCTOR, EAGER):
                    _draw_uncached(axis, middle(row, x), row["system"])
            axis.set_xlim(left=0)
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, texts = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"{title}\nmedians against the exact run; numbers are thresholds; better is higher, and nearer the middle line"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_uncached(axis: Any, seconds: float, name: str) -> None:
    axis.axvline(seconds, color="#999999", linewidth=1, zorder=1)
    axis.annotate(
        f"{name}, no cache",
        (seconds, 0.02),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(-4, 0),
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=9,
        color="#666666",
    )
