"""The tables of a call that was compiled for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from hvcompile.app.tables.explanation import passes_table
from hvcompile.explanation import figures

if TYPE_CHECKING:
    from hvcompile.lowered.lower import Lowered


def lowering_tables(results: Mapping[str, Lowered]) -> list[Table]:
    """Lay out what came of it: the passes, what a step does, what each block does, and the kernels."""
    main = next(iter(results.values()))
    tables = [passes_table(main.journal, "did", "left, and why"), _steps(results), _functions(main), _kernels(results)]
    if table := _quantisations(main):
        tables.append(table)
    return [*tables, _collectives(main)] if main.ranks > 1 else tables


def _steps(results: Mapping[str, Lowered]) -> Table:
    from hvcompile.lowered import walk
    from hvcompile.lowered.gpus import peaks

    gpu = next(iter(results.values())).gpu
    table = Table(title=f"a step of one rank on {gpu.name}", title_justify="left")
    table.add_column("")
    steps = []
    for name, item in results.items():
        for kind, step in (("computed", item.computed), ("reused", item.reused)):
            if step is not None:
                table.add_column(f"{name}, {kind}", justify="right")
                steps.append(step)
    for heading, kind in (
        ("Triton kernels", walk.TRITON),
        ("library calls", walk.LIBRARY),
        ("copies", walk.COPY),
        ("synchronisations", walk.SYNC),
        ("collectives", walk.COLLECTIVE),
    ):
        table.add_row(heading, *(str(step.count(kind)) for step in steps))
    table.add_row("GB read and written", *(figures.in_unit(step.num_bytes, "G") for step in steps))
    table.add_row("TFLOP of products", *(figures.in_unit(step.flops, "T") for step in steps))
    if device := peaks(gpu):
        table.add_row("seconds at least (a model)", *(f"{step.seconds(device):.3g}" for step in steps))
    table.add_row("GiB of inputs", *(f"{step.input_bytes / 2**30:.2f}" for step in steps))
    table.add_row("GiB of buffers, at most", *(f"{step.peak_bytes / 2**30:.2f}" for step in steps))
    memory = gpu.memory_bytes / 2**30
    table.caption = (
        f"the GPU has {memory:.0f} GiB; inputs are weights, state and what the call is given; a library call may "
        "launch more than one kernel; seconds are no measurement: a kernel takes what its bytes or its products take "
        "at the peaks that NVIDIA states, whichever is more; collectives and transfers from the host take none"
    )
    return table


def _functions(item: Lowered) -> Table:
    from hvcompile.lowered import walk

    table = Table("part", title="in one call of each part of the code, computed step", title_justify="left")
    kinds = (walk.TRITON, walk.LIBRARY, walk.COPY, walk.SYNC, walk.COLLECTIVE)
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name, counts in item.computed.by_function().items():
        table.add_row(name or "outside of all", *(f"{counts.get(kind, 0):g}" for kind in kinds))
    return table


def _kernels(results: Mapping[str, Lowered]) -> Table:
    table = Table(title="Triton kernels, as ptxas made them", title_justify="left")
    table.add_column("")
    for heading in ("compiled", "failed", "most registers", "spill", "most shared KiB", "s compiling"):
        table.add_column(heading, justify="right")
    for name, item in results.items():
        table.add_row(
            name,
            str(len(item.kernels)),
            str(len(item.failures)),
            str(max((kernel.registers for kernel in item.kernels), default=0)),
            str(len(item.spilling)),
            f"{max((kernel.shared_bytes for kernel in item.kernels), default=0) / 1024:.0f}",
            f"{item.seconds:.0f}",
        )
    wrong = [f"{kernel}: {why.splitlines()[0]}" for item in results.values() for kernel, why in item.failures]
    wrong += [
        f"{kernel.name}: spills {kernel.spill_bytes} bytes" for item in results.values() for kernel in item.spilling
    ]
    table.caption = "\n".join(wrong) or None
    return table


def _quantisations(item: Lowered) -> Table | None:
    from hvcompile.lowered.quantised import quantisations

    table = Table("part", "kernel that quantises", title="what quantisation is fused into", title_justify="left")
    table.add_column("kernels that could be one with it")
    for (function, kernel), apart in quantisations(item.computed).items():
        table.add_row(function or "outside of all", kernel, "\n".join(apart) or "none")
    table.caption = "Inductor names a kernel after the operators that it computes"
    return table if table.rows else None


def _collectives(item: Lowered) -> Table:
    table = Table("collective", title="collectives, and what runs while they are under way", title_justify="left")
    table.add_column("launches until its wait", justify="right")
    for name, launches in item.computed.overlaps():
        table.add_row(name.removesuffix(".default"), str(launches))
    return table
