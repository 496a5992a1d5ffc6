"""Adapters of peft that are loaded and not fused: found, left alone by float8, never stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_cases as cases
import pytest
import ranks
import torch
from lora_cases import CALLS, MODES, Pair
from oracle import first, hvfast, relative_error

import hvcompile
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.journal import JournalRow

pytest.importorskip("peft")

EXACT = {"lower": "eager", **MODES["exact"]}


def row_of(pair: Pair, name: str) -> JournalRow:
    """The last graph's row of a pass."""
    (row,) = [item for item in hvcompile.stats(pair.fast).journal[-1] if item.name == name]
    return row


def recompiles(pair: Pair) -> int:
    return hvcompile.stats(pair.fast).recompiles


RESTORED = "`hvcompile.restore`, `fuse_lora`, `unfuse_lora`"


@pytest.mark.parametrize("mode", ["exact", "cache", "float8"])
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, mode: str) -> None:
    """Each costs what the table says, every step after it is eager's, and none is taken from before it."""
    row = cases.measure(name, mode, build=cases.small)
    expected = CALLS[name].expected(mode)
    if torch.__version__ < "2.12" and (name, mode) == (RESTORED, "float8"):
        expected -= 1  # there a graph of before serves again
    assert row["recompiles"] == expected
    assert row["error"] < cases.BOUNDS[mode]
    assert row["effect"] > 2 * cases.BOUNDS["float8"]
    assert row["reused_after_a_change"] == 0
    assert row["reused_later"] == (row["changes"] if mode == "cache" else 0)
    assert {"exact": "outline", "cache": "FirstBlockCache", "float8": "Float8Linears"}[mode] in row["applied"]


TWO_RANKS = ("`set_adapters`: other scales", "`hotswap=True`, equal rank", "another file, another rank, and back")


@pytest.mark.ranks
def test_calls_on_two_ranks() -> None:
    for rows in ranks.results(ranks.launch(cases.measure_all, 2, TWO_RANKS, "two ranks", "eager", cases.small)):
        for row in rows:
            assert row["recompiles"] == CALLS[row["call"]].recompiles, row["call"]
            assert row["error"] < cases.BOUNDS["two ranks"], row["call"]
            assert "ShardedAttention" in row["applied"]


@pytest.mark.parametrize("name", ["`set_adapters`: other scales", "`hotswap=True`, equal rank"])
def test_calls_compiled_by_inductor(name: str) -> None:
    row = cases.measure(name, "cache", "inductor", cases.small)
    assert (row["recompiles"], row["reused_after_a_change"], row["reused_later"]) == (0, 0, row["changes"])
    assert row["error"] < cases.BOUNDS["cache"]


TARGETS = {
    "attention": (cases.ATTENTION, 2),
    "single blocks alone": (r"single_transformer_blocks\..*(to_q|to_k|to_v|proj_mlp|proj_out)", 2),
    "some blocks alone": (r"(transformer_blocks\.0|single_transformer_blocks\.1)\.attn\.(to_q|to_v)", 3),
    "all linear layers": ("all-linear", 2),
}


@pytest.mark.parametrize("where", TARGETS)
def test_the_trunk_is_found_and_blocks_without_an_adapter_have_a_body_of_their_own(where: str) -> None:
    """Of a HunyuanVideo, with float8: equal layers of one input are one product, the branches beside them stay."""
    targets, bodies = TARGETS[where]
    options = {"lower": "eager", **MODES["float8"]}
    pair = Pair(lambda made: cases.add(made, 1, targets=targets, size=0.3), options)
    assert pair.step() < cases.BOUNDS["float8"]
    assert f"3 blocks share {bodies} bodies" in row_of(pair, "outline").report.matched[0]
    table = {row["linear"]: row for row in row_of(pair, "Float8Linears").report.table}
    branches = {path: row for path, row in table.items() if "lora_" in path}
    assert branches
    assert all("low-rank branch" in row["why"] for row in branches.values())
    assert table["single_transformer_blocks.1.attn.to_q"]["done"] == "float8"  # by the path that it had before
    weights = dict(pair.made.named_parameters())
    assert all(not isinstance(weight, QuantizedWeight) for path, weight in weights.items() if "lora_" in path)
    assert row_of(pair, "UnmaskedAttention").report.matched


def test_a_branch_as_large_as_a_layer_is_left_alone() -> None:
    """A rank that float8 would take for a layer's size."""
    pair = Pair(lambda made: cases.add(made, 1, rank=64), {"lower": "eager", **MODES["float8"]}, cases.small)
    assert pair.step() < cases.BOUNDS["float8"]
    branches = [weight for path, weight in pair.made.named_parameters() if "lora" in path]
    assert not any(isinstance(weight, QuantizedWeight) for weight in branches)
    assert isinstance(pair.made.blocks[0].to_q.base_layer.weight, QuantizedWeight)


def test_skip_names_a_layer_as_it_was_called_before_the_adapter() -> None:
    options = {"lower": "eager", "first_block_cache": False, "fp8": {"keep_last_blocks": 0, "skip": ["to_q"]}}
    pair = Pair(cases.load, options, cases.small)
    for change in (lambda made: made.disable_lora(), lambda made: made.unload_lora()):
        pair.step()
        assert type(pair.made.get_parameter("blocks.0.to_k.base_layer.weight")) is QuantizedWeight
        assert type(pair.made.get_parameter("blocks.0.to_q.base_layer.weight")) is torch.nn.Parameter
        pair.change(change)
    assert pair.step() < cases.BOUNDS["float8"]
    assert type(pair.made.get_parameter("blocks.0.to_q.weight")) is torch.nn.Parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_scales_are_as_precise_as_python_floats(dtype: torch.dtype, lower: str) -> None:
    """In bfloat16 a scale of 0.3 would be off by 1 in 500; in float32 a float64's by 1 in 10 million."""
    branch = ScaledBranches().to(dtype)
    fast = hvfast(branch, fullgraph=True, options={"lower": lower, "first_block_cache": False, "fp8": False})
    with torch.no_grad():
        for scale in (1.0, 0.3, -1.7):
            for block in branch.blocks:
                block.scale = scale
            given = torch.randn(1, 5, 16, dtype=dtype)
            bound = 1e-13 if dtype is torch.float64 else 2e-2 if lower == "inductor" else 1e-8
            assert relative_error(fast(given), branch(given)) < bound
    assert hvcompile.stats(fast).recompiles == 0


class ScaledBranch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = (torch.nn.Linear(*size, bias=False) for size in ((16, 16), (16, 2), (2, 16)))
        self.scale = 1.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = hidden + (self.base(hidden) + self.up(self.down(hidden)) * self.scale)
        return changed


class ScaledBranches(torch.nn.Module):
    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(ScaledBranch() for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("dynamic", [True, False])
def test_other_ways_to_treat_sizes(dynamic: bool) -> None:
    """Under ``dynamic=False`` Dynamo passes no float as an input, so each scale is a graph of its own."""
    pair = Pair(cases.load, EXACT, cases.small, dynamic=dynamic)
    assert pair.step() < 1e-5
    for number, scale in enumerate((0.3, -1.0), start=1):
        pair.change(cases.scale(scale))
        assert pair.step() < 1e-5
        assert recompiles(pair) == (0 if dynamic else number)


def test_a_scale_that_the_call_gives() -> None:
    """``attention_kwargs={"scale": ...}`` scales in the forward; each value is a graph."""
    pair = Pair(cases.load, EXACT)
    inputs = pair.inputs
    for scale in (1.0, 0.5, 0.25):
        pair.inputs = lambda step, scale=scale: {**inputs(step), "attention_kwargs": {"scale": scale}}  # type: ignore[misc]
        assert pair.step() < 1e-5


def test_gradients_switched_off_and_on_again() -> None:
    """peft asks for gradients of what ``set_adapters`` makes active, on which Dynamo guards: once more."""

    def prepare(made: Any) -> None:
        cases.load(made)
        made.requires_grad_(False)

    pair = Pair(prepare, EXACT, cases.small)
    pair.step()
    for scale in (0.5, 0.6, 0.7):
        pair.change(cases.scale(scale))
        assert pair.step() < 1e-5
    assert recompiles(pair) == (0 if torch.__version__ < "2.12" else 1)  # before, Dynamo guards on it in no such case


def test_what_float8_refuses_and_the_way(tmp_path: Path) -> None:
    """Fusing and saving want the weights; ``restore`` brings them back, exactly where copies were kept."""
    pair = Pair(cases.load, {"lower": "eager", **MODES["float8"]}, cases.small)
    pair.step()
    before = first(pair.eager(**pair.inputs(50)))
    for call in (pair.made.fuse_lora, lambda: pair.made.save_lora_adapter(tmp_path, "a"), pair.made.state_dict):
        with pytest.raises(hvcompile.QuantizedWeightError, match=r"hvcompile\.restore\(model\)"):
            call()
    assert hvcompile.restore(pair.fast).dequantized == 0
    pair.made.unfuse_lora()  # what was fused before the first weight that refused
    with torch.no_grad():
        assert relative_error(first(pair.made(**pair.inputs(50))), before) < 1e-5
    pair.made.save_lora_adapter(tmp_path, "a")
    pair.change(lambda made: made.fuse_lora(lora_scale=0.5))
    pair.change(lambda made: made.unload_lora())
    assert pair.step() < cases.BOUNDS["float8"]
    assert isinstance(pair.made.blocks[0].to_q.weight, QuantizedWeight)


def test_weight_decomposed_adapters_on_float8() -> None:
    """DoRA reads the layer's own weight, which is gone: adding it says what to do."""
    from peft import LoraConfig

    pair = Pair(lambda _: None, {"lower": "eager", **MODES["float8"]}, cases.small)
    pair.step()
    config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False, use_dora=True)
    with pytest.raises(hvcompile.QuantizedWeightError, match=r"hvcompile\.restore\(model\)"):
        pair.made.add_adapter(config, "d")


class Patched(cases.Adapted):
    """With a convolution before the blocks, as video models embed patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = torch.nn.Conv1d(64, 64, 1)
        self.patch.requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(self.patch(sample.transpose(1, 2)).transpose(1, 2), timestep, text)


@pytest.mark.parametrize("mode", ["exact", "float8"])
def test_scales_of_convolutions_compile_nothing(mode: str) -> None:
    from peft import LoraConfig

    def add(made: Any) -> None:
        torch.manual_seed(4)
        made.add_adapter(LoraConfig(r=4, target_modules=["patch", "to_q"], init_lora_weights=False), "a")
        made.eval()

    pair = Pair(add, {"lower": "eager", **MODES[mode]}, Patched)
    pair.step()
    for scale in (0.9, 0.5, -0.3):
        pair.change(cases.scale(scale))
        assert pair.step() < cases.BOUNDS[mode]
    assert recompiles(pair) == 0
