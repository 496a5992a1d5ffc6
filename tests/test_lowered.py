"""Compiling for a GPU that is not there: what is seen in the code, and faults that must be seen there."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import re
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from rich.console import Console
from torch._inductor import config
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.app import lower as lowered
from hvcompile.app.lower import lower_request
from hvcompile.app.request.lower import Request
from hvcompile.app.tables.lowering import lowering_tables
from hvcompile.lowered import walk
from hvcompile.lowered.gpus import GPUS, peaks
from hvcompile.lowered.lower import Lowered, lower_call, on_absent
from hvcompile.lowered.quantised import quantisations
from hvcompile.ranks import collectives
from hvcompile.torch_private import lowering
from hvcompile.torch_private.distributed import is_exchange

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < "2.13", reason="made with torch 2.13"),
    pytest.mark.xdist_group("lowered"),  # each graph is lowered once
]

MEASURABLE = 32385
"""Tokens of a clip that is long enough for shards to be aligned."""


def hunyuan(blocks: tuple[int, int] = (1, 3), tokens: int = 1020) -> tuple[torch.nn.Module, dict[str, Any]]:
    """HunyuanVideo at its own head size, two heads wide, in bfloat16 on the meta device."""
    frames, size = tokens // 255, (2 * 15, 2 * 17)
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=128,
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=64,
            pooled_projection_dim=64,
            rope_axes_dim=(16, 56, 56),
        ).to(torch.bfloat16)
        inputs = {
            "hidden_states": torch.empty(1, 16, frames, *size, dtype=torch.bfloat16),
            "timestep": torch.empty(1, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(1, 32, 64, dtype=torch.bfloat16),
            "encoder_attention_mask": torch.empty(1, 32, dtype=torch.int64),
            "pooled_projections": torch.empty(1, 64, dtype=torch.bfloat16),
            "guidance": torch.empty(1, dtype=torch.bfloat16),
            "return_dict": False,
        }
    return model.eval().requires_grad_(False), inputs


def lower_whole() -> Lowered:
    model, inputs = hunyuan()
    before = {name: id(item) for name, item in model.named_parameters()}
    result = hvcompile.lower(model, **inputs, options={"fp8": {"keep_last_blocks": 0}})
    assert {name: id(item) for name, item in model.named_parameters()} == before
    return result


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Pool]:
    """A process where kernels compile: here Triton may interpret them, which is settled when it is first imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with multiprocessing.get_context("spawn").Pool(1) as processes:
            yield processes


@pytest.fixture(scope="module")
def whole(elsewhere: Pool) -> Lowered:
    return elsewhere.apply(lower_whole)


@pytest.fixture(scope="module")
def ring() -> Lowered:
    return lower_ring()


def lower_ring() -> Lowered:
    model, inputs = hunyuan((1, 1), MEASURABLE)
    options = {"context_parallel": {"ring": 2}, "first_block_cache": False, "fp8": False}
    return hvcompile.lower(model, **inputs, options=options, ranks=4, compile_kernels=False)


def names(step: walk.Walk, where: str = "") -> list[str]:
    return [event.name for event in step.events if not where or where in event.where]


def test_every_kernel_compiles_and_none_spills(whole: Lowered) -> None:
    assert len(whole.kernels) > 20
    assert not whole.failures
    assert not whole.spilling
    assert all(0 < kernel.registers <= 255 for kernel in whole.kernels)


class Softmax(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().softmax(-1)


class Sine(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().sin()


def lower_scarcely() -> list[Lowered]:
    """A kernel given 24 registers, and one whose stack holds an array, by which a large angle is reduced."""
    options = CachingAutotuner._create_compile_options
    results = []
    for model, scarce in ((Softmax(), {"maxnreg": 24}), (Sine(), {})):

        def with_few(self: Any, *args: Any, scarce: dict[str, int] = scarce) -> Any:
            return {**options(self, *args), **scarce}

        with mock.patch.object(CachingAutotuner, "_create_compile_options", with_few):
            inputs = torch.empty(4096, 4096, device="meta", dtype=torch.bfloat16)
            results.append(hvcompile.lower(model, inputs, plain=True))
    return results


def test_a_kernel_that_spills_is_named(elsewhere: Pool) -> None:
    spilling, filling = elsewhere.apply(lower_scarcely)
    (kernel,) = spilling.spilling
    assert "softmax" in kernel.name
    assert kernel.spill_bytes > 0
    told = io.StringIO()
    for table in lowering_tables({"Inductor": spilling}):
        Console(file=told, width=200).print(table)
    assert f"{kernel.name}: spills {kernel.spill_bytes} bytes" in told.getvalue()
    assert [kernel.stack_bytes > 0 for kernel in filling.kernels] == [True]
    assert not filling.spilling


def test_what_a_step_does(whole: Lowered) -> None:
    computed, reused = whole.computed, whole.reused
    assert reused is not None
    assert computed.count(walk.SYNC) == reused.count(walk.SYNC) == 1  # the decision
    assert computed.count(walk.COPY) == reused.count(walk.COPY) == 0
    assert "aten._scaled_mm.default" in names(computed)
    assert "aten._scaled_mm.default" not in names(reused)
    attention = "aten._scaled_dot_product_cudnn_attention.default"
    assert names(computed).count(attention) == 4
    assert names(reused).count(attention) == 1
    assert reused.num_launches < computed.num_launches
    assert reused.num_bytes < computed.num_bytes
    assert 0 < computed.peak_bytes < whole.gpu.memory_bytes
    assert 0 < reused.flops < computed.flops
    products = [event for event in computed.events if event.name == "aten._scaled_mm.default"]
    assert {event.dtype for event in products} == {torch.float8_e4m3fn}


def test_a_step_that_reuses_copies_no_state(whole: Lowered) -> None:
    """Its branch reads a stream and what is cached of it, and writes the sum: nothing else of that size."""
    assert whole.reused is not None
    stream = 1020 * 256 * 2  # tokens, width, bytes
    moved = [event.num_bytes for event in whole.reused.events if event.where[:1] == ("true_graph_0",)]
    assert sum(moved) == 3 * stream


def test_no_step_puts_biases_together(whole: Lowered) -> None:
    """Layers that are one float8 product take one bias, which is there before the step."""
    joined = 2 * (3 * 256 + 4 * 256)  # bytes: of q, k, v and the MLP of a single block
    blocks = [event for event in whole.computed.events if event.kind == walk.TRITON and event.where]
    assert blocks
    assert not [event.name for event in blocks if event.num_bytes == 2 * joined]  # read and written


def test_no_rotation_goes_through_memory_in_float32(whole: Lowered) -> None:
    """With Inductor's own settings a single block moves 34 streams, some of them queries and keys half rotated."""
    stream = 1052 * 256 * 2  # tokens, width, bytes
    moved = [event.num_bytes for event in whole.computed.events if event.kind == walk.TRITON and is_single(event.where)]
    calls = sum(event.kind == "enter" and is_single((event.name,)) for event in whole.computed.events)
    assert calls == 3
    assert 20 * stream < sum(moved) / calls < 26 * stream


def is_single(where: tuple[str, ...]) -> bool:
    return where[-1:] == ("false_graph_0_repeated_subgraph0",)


def test_quantisation_is_fused(whole: Lowered) -> None:
    found = quantisations(whole.computed)
    assert len(found) == 2  # of a single block: before its two products
    assert not {kernel: apart for kernel, apart in found.items() if apart}


def test_quantisation_that_is_not_fused_is_named() -> None:
    model, inputs = hunyuan((1, 1))
    with config.patch(max_fusion_size=1):
        result = hvcompile.lower(
            model,
            **inputs,
            options={"first_block_cache": False, "fp8": {"keep_last_blocks": 0}},
            compile_kernels=False,
        )
    found = quantisations(result.computed)
    assert len(found) > 5
    assert all(found.values())
    assert {name for apart in found.values() for name in apart} <= set(names(result.computed))


def test_a_call_of_a_block_costs_what_its_body_does(whole: Lowered) -> None:
    """The counts by function add up to those of the step."""
    step = whole.computed
    calls = [event.name for event in step.events if event.kind == "enter"]
    for kind in (walk.TRITON, walk.LIBRARY):
        total = sum(counts.get(kind, 0) * max(1, calls.count(name)) for name, counts in step.by_function().items())
        assert round(total) == step.count(kind)


def test_peak_of_a_plan_that_is_known() -> None:
    """``(x @ x).relu() @ x`` of 1024 x 1024 fp32: three buffers are made, two are alive at a time."""

    class Products(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x).relu() @ x

    result = hvcompile.lower(Products(), torch.empty(1024, 1024, device="meta"), plain=True, compile_kernels=False)
    assert result.computed.input_bytes == 4 * 2**20
    assert result.computed.peak_bytes == 8 * 2**20
    assert result.computed.count(walk.LIBRARY) == 2
    assert result.computed.count(walk.TRITON) == 1
    assert result.computed.num_bytes == 2 * 3 * 4 * 2**20 + 2 * 4 * 2**20 - 4 * 2**20  # x @ x reads x once
    assert result.computed.flops == 2 * 2 * 1024**3
    device = peaks(result.gpu)
    assert device is not None
    seconds = [2 * 1024**3 / 67e12, 2 * 4 * 2**20 / 3.35e12, 2 * 1024**3 / 67e12]  # products compute, relu moves
    assert result.computed.seconds(device) == pytest.approx(sum(seconds))


def test_sizes_that_may_change_have_names() -> None:
    result = hvcompile.lower(
        Toy(3), *toy_inputs().values(), options={"fp8": False}, dynamic=True, compile_kernels=False
    )
    assert re.search(r"empty_strided_cuda\(\((s\d+), 16\)", result.code[-1])
    assert result.computed.count(walk.TRITON)
    assert result.reused is not None


def test_two_halves_of_guidance_are_one_to_each_rank() -> None:
    """Without sharded attention the blocks speak to nobody; afterwards the halves are gathered."""
    options = {"context_parallel": {"cfg": 2}, "first_block_cache": False, "fp8": False}
    result = hvcompile.lower(Toy(3), *toy_inputs(batch=2).values(), options=options, ranks=2, compile_kernels=False)
    sample = 4 * toy_inputs()["sample"].numel()  # bytes
    collectives = [event for event in result.computed.events if event.kind == walk.COLLECTIVE]
    assert (collectives[-1].name, collectives[-1].where) == ("_c10d_functional.all_gather_into_tensor.default", ())
    assert collectives[-1].num_bytes == 3 * sample
    assert not [event.name for event in collectives if event.where]
    attentions = {event.num_bytes for event in result.computed.events if "attention.default" in event.name}
    assert max(attentions) < 2 * 4 * sample  # of q, k, v and the result for one sample, the text's tokens among keys


def test_keys_travel_while_attention_runs(ring: Lowered) -> None:
    moving = False
    hidden = []
    for event in ring.computed.events:
        if event.kind == walk.COLLECTIVE and event.where:
            moving = True
        elif event.kind == walk.WAIT:
            moving = False
        elif "attention" in event.name and event.kind == walk.LIBRARY and event.where:
            hidden.append(moving)
    assert hidden == [True, False] * 2  # of each block: the keys at hand while others come, then those
    assert not any(name.startswith("_dtensor.") for name in names(ring.computed))


def test_shards_are_aligned(ring: Lowered) -> None:
    """Inductor measures no product for padding where all sizes are multiples of 8."""
    assert -(-MEASURABLE // 4) % 16
    assert all(str(MEASURABLE) in product for product in ring.measured)  # the head, of the whole sequence


def test_collectives_are_known_by_their_targets() -> None:
    """Graphs that hold one are lowered with Inductor's own settings of what is computed again."""
    exchanges = (collectives.reshard, collectives.pass_on, torch.ops._c10d_functional.all_to_all_single.default)
    assert all(map(is_exchange, exchanges))
    assert not any(map(is_exchange, (torch.cat, "reshape", torch.ops.aten.mm.default)))


def test_a_collective_that_is_waited_for_at_once_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "is_left_running", lambda _: False)
    late = lower_ring()
    with pytest.raises(AssertionError):
        test_keys_travel_while_attention_runs(late)


PRODUCT = re.compile(r"^( *)extern_kernels\._scaled_mm\((\w+), reinterpret_tensor\((\w+), \((\d+), (\d+)\), .*$", re.M)


@pytest.mark.parametrize(
    ("kind", "fault", "name"),
    [
        (walk.SYNC, r"\1\2.sum().item()", "a number, torch."),
        (walk.COPY, r"\1\2.clone()", "aten.clone.default"),
    ],
)
def test_a_planted_fault_is_counted(whole: Lowered, kind: str, fault: str, name: str) -> None:
    """One synchronisation, or one copy, before every float8 product."""
    code, numbers = whole.code[-1], [1052]
    products = len(PRODUCT.findall(code))
    assert products
    with on_absent(whole.gpu, compile_kernels=False):
        assert walk.walk(code, numbers, reuse=False) == whole.computed
        worse = walk.walk(PRODUCT.sub(rf"{fault}\n\g<0>", code), numbers, reuse=False)
    calls = names(whole.computed).count("aten._scaled_mm.default")
    assert worse.count(kind) == whole.computed.count(kind) + calls
    found = [event for event in worse.events if event.kind == kind and event.name != "a decision"]
    assert all(event.name.startswith(name) for event in found)
    assert all("subgraph" in event.where[-1] for event in found)  # in which body of blocks


def test_float8_weights_in_rows_are_refused(whole: Lowered) -> None:
    """The second operand of a float8 product must lie in columns: the GPU's library takes no other."""
    code = whole.code[-1]
    wrong = PRODUCT.sub(
        lambda m: m[0].replace(f"({m[4]}, {m[5]}), (1, {m[4]})", f"({m[4]}, {m[5]}), ({m[5]}, 1)"), code
    )
    assert wrong != code
    with on_absent(whole.gpu, compile_kernels=False), pytest.raises(RuntimeError, match=r"column|stride|transpose"):
        walk.walk(wrong, [1052], reuse=False)


NONZERO = """
import torch
from torch._C._dynamo.guards import assert_size_stride

def call(args):
    places = torch.ops.aten.nonzero.default(*args)
    assert_size_stride(places, (6, 2), (1, 6))  # in C++, where a length without a number would end the process
    return (places,)

def get_args():
    return [torch.empty(2, 3, dtype=torch.bool, device="cuda:0")]
"""


def test_places_that_are_not_zero_are_as_many_as_there_can_be() -> None:
    with on_absent(GPUS["h100"], compile_kernels=False):
        found = walk.walk(NONZERO, reuse=False)
    assert [(event.kind, event.num_bytes) for event in found.events] == [(walk.SYNC, 0), (walk.LIBRARY, 6 + 6 * 2 * 8)]


def test_triton_that_interprets_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(hvcompile.InputError, match="TRITON_INTERPRET"):
        hvcompile.lower(torch.nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "v100"}, "v100.*give one of"),
        ({"ranks": 2, "rank": 2}, "rank is 2.*0 to 1"),
        ({"options": {"no_such": True}}, "no_such"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(hvcompile.OptionError, match=message):
        hvcompile.lower(torch.nn.Linear(2, 2), torch.ones(1, 2), **wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpu": "v100"}, "gpu 'v100' is unknown: give one of h100"),
        ({"options": "{"}, "no JSON"),
        ({"options": "[]"}, "no JSON object"),
        ({"ranks": 0}, "ranks is 0"),
        ({"model": "nowhere.py"}, "no such script"),
    ],
)
def test_a_request_that_can_not_be_met(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hvcompile.InputError, match=message):
        Request(**fields).check()


def test_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own model, options and arguments; the code and the figures are written."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from toy import Toy, toy_inputs
model = Toy(3)
model.compile(backend="hvfast", options={"fp8": False})
with torch.no_grad():
    model(**toy_inputs())
raise SystemExit("too far")
"""
    )
    request = Request(
        model=str(script),
        arguments=(str(Path(__file__).parent),),
        output=tmp_path / "code",
        json_file=tmp_path / "figures.json",
        gpu="l40s",
    )
    monkeypatch.setattr(lowered, "lower_call", functools.partial(lower_call, compile_kernels=False))
    results = lower_request(request)
    assert set(results) == {"hvfast"}
    assert results["hvfast"].gpu == GPUS["l40s"]
    assert results["hvfast"].reused is not None
    assert "def call(" in (tmp_path / "code" / "hvfast_0.py").read_text()
    figures = json.loads((tmp_path / "figures.json").read_text())["hvfast"]
    assert figures["steps"]["computed"]["launches"] == results["hvfast"].computed.num_launches


def test_every_float8_product_of_a_step_is_held_against_the_gpus_rules(whole: Lowered) -> None:
    """One that has no float8 refuses the first; bfloat16 is what all others write."""
    code, numbers = whole.code[-1], [1052]
    with on_absent(whole.gpu, compile_kernels=False):
        with pytest.raises(RuntimeError, match=r"_scaled_mm.default would be refused: compute capability 8\.6"):
            walk.walk(code, numbers, reuse=False, capability=(8, 6))
        assert walk.walk(code, numbers, reuse=False, capability=(10, 0)) == whole.computed
