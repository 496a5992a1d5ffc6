"""The tables of an explanation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hvcompile.explanation import figures
from hvcompile.explanation.condensed import condensed

if TYPE_CHECKING:
    from hvcompile.explanation.explain import Explanation
    from hvcompile.journal import JournalRow


def explanation_tables(explanation: Explanation, gpu: str, memory_gib: float | None = None) -> list[Table]:
    """Lay out an explanation: the trunk, the passes, what they do to each layer, and what a step costs.

    Args:
        explanation: what to show.
        gpu: whose peaks bound the seconds.
        memory_gib: of the device; adds which ways to run the model fit.

    """
    layers = [table for row in explanation.journal if (table := _layers(row)) is not None]
    return [
        _trunk(explanation),
        passes_table(explanation.journal, "would do", "would leave, and why"),
        *layers,
        _costs(explanation, gpu),
        _memory(explanation),
        *([] if memory_gib is None else [_needs(explanation, memory_gib)]),
    ]


def _needs(explanation: Explanation, memory_gib: float) -> Table:
    """Which ways to run the model fit into so much memory."""
    table = Table(title=f"the transformer in {memory_gib:g} GiB", title_justify="left")
    table.add_column("how", overflow="fold", min_width=24)
    for heading in ("weights, GiB", "activations", "cache", "peak", "on the host", "brought a step"):
        table.add_column(heading, justify="right")
    table.add_column("fits")
    for need in explanation.needs:
        sizes = (need.weight_bytes, need.activation_bytes, need.state_bytes)
        row = [f"{size / 2**30:.3g}" for size in (*sizes, need.peak_bytes, need.host_bytes, need.brought_bytes)]
        table.add_row(Text(need.how or "as it is"), *row, "yes" if need.peak_bytes <= memory_gib * 2**30 else "no")
    table.caption = (
        "activations are counted operation by operation, fused code takes less; text encoders and the VAE are not in it"
        if explanation.needs
        else "nothing is known without blocks"
    )
    return table


def _trunk(explanation: Explanation) -> Table:
    table = Table(title="trunk", title_justify="left")
    for heading in ("blocks", "of them first .. last", "operations", "streams"):
        table.add_column(heading, overflow="fold")
    for kind in explanation.kinds:
        streams = "\n".join(f"{stream.name} {list(stream.shape)}" for stream in kind.streams)
        table.add_row(str(kind.count), Text(f"{kind.first} .. {kind.last}"), str(kind.num_operations), Text(streams))
    table.caption = (
        f"{explanation.num_prologue} operations before the blocks, {explanation.num_epilogue} after them"
        if explanation.kinds
        else f"none: {explanation.reason}"
    )
    return table


def passes_table(journal: Sequence[JournalRow], did: str, left: str) -> Table:
    """What each pass did, and what it left; the headings say in which tense."""
    table = Table(title="passes", title_justify="left")
    for heading in ("pass", did, left):
        table.add_column(heading, overflow="fold")  # names of layers are long words
    for row in journal:
        reasons = "\n".join(f"{what}: {why}" for what, why in row.report.declined)
        table.add_row(row.name, Text("\n".join(row.report.matched) or "nothing"), Text(reasons))
    return table


def _layers(row: JournalRow) -> Table | None:
    """What a pass does to each layer; None where it does not tell."""
    rows = condensed(row.report.table)
    if not rows:
        return None
    table = Table(title=row.name, title_justify="left")
    for place, column in enumerate(rows[0]):  # names in full; reasons stand in full in the table of passes
        name, is_reason = column.replace("_", " "), column == "why"
        if is_reason:
            table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=14)
        else:
            table.add_column(name, overflow="fold", min_width=22 if place == 0 else None)
    for item in rows:
        table.add_row(*(Text(str(value)) for value in item.values()))
    return table


def _costs(explanation: Explanation, gpu: str) -> Table:
    table = Table(
        title=f"a step that computes everything, in {explanation.dtype}, before the passes", title_justify="left"
    )
    table.add_column("")
    for heading in ("TFLOP", "share", "GB moved", f"seconds at least, {gpu}"):
        table.add_column(heading, justify="right")
    for part in explanation.costs:
        share = part.flops / explanation.flops if explanation.flops else 0.0
        table.add_row(part.part, *_cost_row(part.flops, share, part.bytes, part.seconds))
    num_bytes = sum(part.bytes for part in explanation.costs)
    table.add_section()
    table.add_row("all", *_cost_row(explanation.flops, 1.0, num_bytes, explanation.seconds))
    reused = explanation.reused_flops
    if explanation.passed_seconds is not None:
        table.add_row("the same after the passes", "", "", "", f"{explanation.passed_seconds:.3g}")
    if reused != explanation.flops:
        share, moved, seconds = reused / explanation.flops, explanation.reused_bytes, explanation.reused_seconds
        table.add_row("a step that reuses, after the passes", *_cost_row(reused, share, moved, seconds))
    if explanation.depends_on_data:
        table.caption = (
            "a length is known only when the model runs: it counts as the most that it can be, or as 1 where nothing "
            "bounds it"
        )
    return table


def _cost_row(flops: int, share: float, moved: int | None, seconds: float | None) -> tuple[str, ...]:
    seconds_at_least = "" if seconds is None else f"{seconds:.3g}"
    return figures.in_unit(flops, "T", ".4g"), f"{share:.1%}", figures.in_unit(moved, "G"), seconds_at_least


def _memory(explanation: Explanation) -> Table:
    table = Table("", "GB", title="memory", title_justify="left")
    table.add_row("weights", figures.in_unit(explanation.weight_bytes, "G"))
    table.add_row("kept from step to step, a generation", figures.in_unit(explanation.state_bytes, "G"))
    table.add_row("computed once and kept, a set of conditions", figures.in_unit(explanation.derived_bytes, "G"))
    table.add_row(
        "sent and received at a time, a rank", figures.in_unit(explanation.staging_bytes or None, "G", unknown="none")
    )
    return table
