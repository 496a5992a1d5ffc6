"""The tables that the command line prints."""

from hvcompile.app.tables.bench import bench_tables
from hvcompile.app.tables.bisection import bisection_table
from hvcompile.app.tables.diagnosis import diagnosis_table
from hvcompile.app.tables.explanation import explanation_tables
from hvcompile.app.tables.fleet import fleet_line, fleet_tables
from hvcompile.app.tables.generation import batch_tables, comparison_summary, each_frame, summary
from hvcompile.app.tables.lowering import lowering_tables
from hvcompile.app.tables.tuning import tuning_tables
from hvcompile.app.tables.warm import warm_tables

__all__ = [
    "batch_tables",
    "bench_tables",
    "bisection_table",
    "comparison_summary",
    "diagnosis_table",
    "each_frame",
    "explanation_tables",
    "fleet_line",
    "fleet_tables",
    "lowering_tables",
    "summary",
    "tuning_tables",
    "warm_tables",
]
