"""What a GPU's float8 product refuses: each rule by a planted fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvcompile.float8.rules import refusals

F8 = torch.float8_e4m3fn
ROWS, INNER, COLUMNS = 24, 64, 48


def product(**changed: Any) -> dict[str, Any]:
    """The arguments of a product as hvfast makes it, in bfloat16 with scales a row."""
    return {
        "first": torch.empty(ROWS, INNER, dtype=F8),
        "second": torch.empty(COLUMNS, INNER, dtype=F8).t(),
        "first_scale": torch.empty(ROWS, 1),
        "second_scale": torch.empty(COLUMNS, 1).t(),
        "bias": torch.empty(COLUMNS, dtype=torch.bfloat16),
        "dtype": torch.bfloat16,
        "capability": (9, 0),
    } | changed


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_what_hvfast_makes_is_taken(capability: tuple[int, int]) -> None:
    assert refusals(**product(capability=capability)) == []
    one = {"first_scale": torch.empty([]), "second_scale": torch.empty([])}
    for dtype in (torch.bfloat16, torch.float16):
        assert (
            refusals(**product(capability=capability, dtype=dtype, bias=torch.empty(COLUMNS, dtype=dtype), **one)) == []
        )
    assert refusals(**product(capability=capability, dtype=torch.float32, bias=None, **one)) == []
    assert (
        refusals(**product(capability=capability, first=torch.empty(0, INNER, dtype=F8), first_scale=torch.empty(0, 1)))
        == []
    )


FAULTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "an old GPU": (lambda: {"capability": (8, 6)}, "has no float8 products"),
    "sizes that don't meet": (lambda: {"first": torch.empty(ROWS, 80, dtype=F8)}, "no matrices that can be multiplied"),
    "K": (
        lambda: {"first": torch.empty(ROWS, 72, dtype=F8), "second": torch.empty(COLUMNS, 72, dtype=F8).t()},
        "multiples of 16",
    ),
    "N": (
        lambda: {
            "second": torch.empty(40, INNER, dtype=F8).t(),
            "second_scale": torch.empty(1, 40),
            "bias": torch.empty(40, dtype=torch.bfloat16),
        },
        "multiples of 16",
    ),
    "dtype": (lambda: {"first": torch.empty(ROWS, INNER, dtype=torch.bfloat16)}, "both must be float8"),
    "e5m2 twice": (
        lambda: {
            "first": torch.empty(ROWS, INNER, dtype=torch.float8_e5m2),
            "second": torch.empty(COLUMNS, INNER, dtype=torch.float8_e5m2).t(),
        },
        "one of them e4m3",
    ),
    "the first column-major": (lambda: {"first": torch.empty(INNER, ROWS, dtype=F8).t()}, "must be row-major"),
    "the second row-major": (lambda: {"second": torch.empty(INNER, COLUMNS, dtype=F8)}, "must be column-major"),
    "an odd offset": (
        lambda: {"first": torch.empty(ROWS * INNER + 8, dtype=F8)[8:].view(ROWS, INNER)},
        "the first matrix is not aligned",
    ),
    "an odd stride": (
        lambda: {"second": torch.empty(COLUMNS, INNER + 8, dtype=F8)[:, :INNER].t()},
        "the second matrix is not aligned",
    ),
    "scales in bfloat16": (lambda: {"first_scale": torch.empty(ROWS, 1, dtype=torch.bfloat16)}, "must be float32"),
    "one scale a row and one in all": (lambda: {"first_scale": torch.empty([])}, "or one number each"),
    "scales of one dimension": (lambda: {"first_scale": torch.empty(ROWS)}, "or one number each"),
    "scales with gaps": (lambda: {"first_scale": torch.empty(ROWS, 2)[:, :1]}, "must be contiguous"),
    "float16 of CUTLASS": (
        lambda: {"capability": (8, 9), "dtype": torch.float16, "bias": None},
        "compute capability 8.9 writes bfloat16 alone",
    ),
    "float32 of CUTLASS": (
        lambda: {"capability": (10, 0), "dtype": torch.float32, "bias": None},
        "compute capability 10.0 writes bfloat16 alone",
    ),
    "a short bias": (lambda: {"bias": torch.empty(16, dtype=torch.bfloat16)}, "the bias has 16 elements"),
    "a bias to float32": (lambda: {"dtype": torch.float32}, "takes no bias"),
    "a bias in float32": (lambda: {"bias": torch.empty(COLUMNS)}, "it must be that too"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    make, words = FAULTS[name]
    (reason,) = refusals(**product(**make()))
    assert words in reason
