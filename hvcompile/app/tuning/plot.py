"""The curves of a tuning: what is reused, and the time that is left, against fidelity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from hvcompile import outputs
from hvcompile.app.tuning.candidates import Candidate
from hvcompile.app.tuning.results import Row
from hvcompile.app.tuning.tune import Outcome

PANELS: tuple[tuple[str, Callable[[Row], float], str, Callable[[Row], float | None]], ...] = (
    ("steps reused, %", lambda row: 100 * row.reused, "PSNR, dB: the mean of the clips", lambda row: row.psnr),
    (
        "times as fast as plain torch.compile",
        lambda row: row.speedup,
        "PSNR, dB: the mean of the clips",
        lambda row: row.psnr,
    ),
    ("steps reused, %", lambda row: 100 * row.reused, "PSNR, dB: the worst clip", lambda row: row.worst_psnr),
    ("steps reused, %", lambda row: 100 * row.reused, "SSIM", lambda row: row.ssim),
)


def plot(outcome: Outcome, path: Path) -> None:
    """Draw a curve a rule, and a ring around what was chosen; raises OutputError where the file can't be written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rules: dict[str, dict[Candidate, Row]] = {}
    for candidate, row in outcome.rows.items():
        rules.setdefault(candidate.rule, {})[candidate] = row
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 9), layout="constrained")
        for axes, (across_label, across, up_label, up) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            for name, rows in rules.items():
                points = _points(rows, across, up)
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name)
            if outcome.chosen is not None:
                for x, y in _points({outcome.chosen: outcome.rows[outcome.chosen]}, across, up):
                    axes.plot(x, y, marker="o", markersize=14, color="black", fillstyle="none")
            axes.set_xlabel(across_label)
            axes.set_ylabel(up_label)
            axes.grid(color="#e6e6e6", linewidth=0.8)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
        figure.suptitle("Settings of the first-block cache against plain torch.compile")
        with outputs.replacing(path) as part:
            figure.savefig(part, dpi=110)


def _points(
    rows: Mapping[Candidate, Row], across: Callable[[Row], float], up: Callable[[Row], float | None]
) -> list[tuple[float, float]]:
    """A rule's points from the least reuse to the most.

    Left out are settings that reuse nothing, which differ by rounding, and identical clips, which have no PSNR.
    """
    ordered = [
        rows[candidate] for candidate in sorted(rows, key=lambda item: (item.threshold, -len(item.computed_steps)))
    ]
    points = [(across(row), up(row)) for row in ordered if row.reused]
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]
