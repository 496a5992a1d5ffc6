"""Offloading and quantised checkpoints in each mode: one graph that computes what eager does, or an error."""

from __future__ import annotations

import people_cases
import pytest
import ranks
from quantised_cases import skip_where_torch_lacks

pytest.importorskip("torchao")


@pytest.mark.parametrize("mode", ["exact", "cache", "float8"])
@pytest.mark.parametrize("name", people_cases.CALLS)
def test_a_row(name: str, mode: str) -> None:
    skip_where_torch_lacks(name)
    row = people_cases.measure(name, mode)
    assert people_cases.is_right(row), row


def test_two_ranks_load_float8_weights_from_directories_of_their_own() -> None:
    names = ["`hvcompile.load_float8`", "`hvcompile.offload`"]
    for rows in ranks.results(ranks.launch(people_cases.measure_all, 2, names, "two ranks")):
        assert all(map(people_cases.is_right, rows)), rows


def test_what_is_held() -> None:
    """An offloaded model: the first block, two more at most, and what is no block; with hooks, a layer at a time."""
    whole = people_cases.device_bytes(people_cases.model())
    offloaded = people_cases.measure("`hvcompile.offload`", "exact")["peak_bytes"]
    assert 0.5 * whole < offloaded < 0.65 * whole
    assert people_cases.measure("`enable_sequential_cpu_offload`", "exact")["peak_bytes"] < 0.06 * whole
    assert people_cases.measure("`enable_layerwise_casting`", "exact")["peak_bytes"] < 0.56 * whole
