"""Operations are counted as torch counts them, whatever they are called and however they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hvcompile.explanation.explain import explain
from hvcompile.graph.flops import UNKNOWN_TO_TORCH

attend = functional.scaled_dot_product_attention
OPERATIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "linear": (functional.linear, [(2, 7, 4), (5, 4), (5,)]),
    "method": (lambda a, b: a.matmul(b), [(2, 3, 7, 4), (4, 5)]),
    "operator": (lambda a, b: a @ b, [(7, 4), (2, 4, 5)]),
    "einsum": (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), [(2, 3, 7, 4), (2, 3, 5, 4)]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=2), [(3, 4, 5), (4, 5, 6)]),
    "addmm": (torch.addmm, [(5,), (7, 4), (4, 5)]),
    "baddbmm": (torch.baddbmm, [(2, 7, 5), (2, 7, 4), (2, 4, 5)]),
    "conv": (lambda a, b: functional.conv2d(a, b, stride=2, groups=2), [(2, 4, 8, 8), (6, 2, 3, 3)]),
    "transposed conv": (lambda a, b: functional.conv_transpose2d(a, b, stride=2), [(2, 4, 8, 8), (4, 3, 3, 3)]),
    "wide values": (attend, [(2, 3, 7, 4), (2, 3, 6, 4), (2, 3, 6, 8)]),
    "self-attention": (lambda a: attend(a, a, a), [(2, 3, 7, 4)]),
    "grouped heads": (lambda a, b: attend(a, b, b, enable_gqa=True), [(2, 4, 7, 4), (2, 2, 6, 4)]),
}
ATTENTION = {"wide values", "self-attention", "grouped heads"}


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: torch.Tensor) -> Any:
        return self.function(*operands)


def as_torch_counts(model: nn.Module, *inputs: torch.Tensor, **more: Any) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, **more) as counter:
        model(*inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    function, shapes = OPERATIONS[name]
    inputs = [torch.randn(shape) for shape in shapes]
    counted = explain(Call(function), *inputs)
    assert counted.flops == as_torch_counts(Call(function), *inputs) > 0
    part = "convolution" if "conv" in name else "attention" if name in ATTENTION else "linear"
    assert {item.part for item in counted.costs if item.flops} == {part}


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.mv, [(7, 4), (4,)], 2 * 7 * 4),
        (torch.matmul, [(7, 4), (4,)], 2 * 7 * 4),
        (torch.dot, [(4,), (4,)], 2 * 4),
        (torch.addmv, [(7,), (7, 4), (4,)], 2 * 7 * 4),
        (torch.addbmm, [(7, 5), (2, 7, 4), (2, 4, 5)], 2 * 2 * 7 * 4 * 5),
    ],
    ids=["mv", "matmul", "dot", "addmv", "addbmm"],
)
def test_products_that_torch_leaves_out(function: Any, shapes: list[tuple[int, ...]], expected: int) -> None:
    """Should torch learn to count one, it need not be told of it any more."""
    inputs = [torch.randn(shape) for shape in shapes]
    assert as_torch_counts(Call(function), *inputs) == 0
    assert as_torch_counts(Call(function), *inputs, custom_mapping=dict(UNKNOWN_TO_TORCH)) == expected
    assert explain(Call(function), *inputs).flops == expected


class Attending(nn.Module):
    """Blocks of torch's own attention, which Dynamo keeps as one call each, beside a stack that does less."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.blocks = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        condition = x[:, :12]
        for layer in self.small:
            condition = condition + layer(condition)
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False)[0] + condition.mean(1, keepdim=True)
        return x


def test_attention_of_torch_itself_is_counted_and_found() -> None:
    model, x = Attending().eval(), torch.randn(2, 24, 16)
    counted = explain(model, x)
    assert counted.flops == as_torch_counts(model.train(), x)  # in eval mode it is one kernel, unknown to the counter
    assert counted.lists == "blocks x 3"
    flops = {part.part: part.flops for part in counted.costs}
    assert flops["attention"] == 3 * 4 * 2 * 24 * 24 * 16


def test_of_a_table_what_is_gathered_is_moved() -> None:
    table, rows = nn.Embedding(1000, 8), torch.arange(5)
    rest = next(part for part in explain(table, rows).costs if part.part == "rest")
    assert rest.bytes == 5 * 8 + 2 * (4 * 5 * 8)  # indices; rows in, rows out
