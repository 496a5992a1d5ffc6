"""Weights on the host: how many are on the device at once, what a step brings, that nothing else changes, refusals."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
import ranks
import torch
from oracle import hvfast
from rich.console import Console
from slow import SLOW
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.torch_version import TorchVersion
from toy import Toy, toy_inputs
from wide import Wide, wide_inputs

import hvcompile
from hvcompile import pipeline
from hvcompile.app.tables import explanation_tables
from hvcompile.backend import instead_of_compiling
from hvcompile.dump import bisect
from hvcompile.explanation.memory import Need, peak_of
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.hollow import fetch, host
from hvcompile.hollow.host import HostWeight
from hvcompile.hollow.memory import HostMemory
from hvcompile.journal import JournalRow
from hvcompile.passes.host_weights import HostWeights
from hvcompile.torch_private import torchao
from hvcompile.trunk.outline import recover
from hvcompile.trunk.trunk import Trunk

needs_torchao = pytest.mark.skipif(not torchao.is_available(), reason="torchao is not installed")
CPU = torch.device("cpu")
MATRIX, VECTOR = 16 * 16 * 4, 16 * 4
BLOCK = 3 * MATRIX
"""Bytes of the matrices of a toy's block."""


class Meter:
    """What is brought: bytes, and how many bytes of it live at once."""

    def __init__(self) -> None:
        self.total, self.most, self.calls = 0, 0, 0
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def add(self, targets: list[torch.Tensor]) -> None:
        self._alive = [item for item in self._alive if item() is not None]
        self._alive += map(weakref.ref, targets)
        self.calls += bool(targets)
        self.total += sum(map(host.num_bytes, targets))
        alive = [tensor for item in self._alive if (tensor := item()) is not None]
        self.most = max(self.most, sum(map(host.num_bytes, alive)))

    def take(self) -> tuple[int, int]:
        """The bytes that were brought since the last time, and the most that lived at once; begins anew."""
        gc.collect()
        found = self.total, self.most
        self.total = self.most = self.calls = 0
        return found


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Counts the tensors that the operator makes, by their storages, until they are gone."""
    found, make = Meter(), fetch._targets

    def targets(hosts: Any, device: Any) -> list[torch.Tensor]:
        made = make(hosts, device)
        if made and not isinstance(made[0], torch._subclasses.FakeTensor) and made[0].device.type != "meta":
            found.add(made)
        return made

    monkeypatch.setattr(fetch, "_targets", targets)
    return found


def toy(blocks: int = 4, resident: int | None = 1) -> Any:
    """A toy, offloaded unless ``resident`` is None."""
    model = Toy(blocks).eval().requires_grad_(False)
    if resident is not None:
        hvcompile.offload(model, CPU, resident_blocks=resident)
    return model


def run(model: Any, cache: Any = False, lower: str = "eager", dynamic: bool | None = None, **options: Any) -> Any:
    given = {"lower": lower, "first_block_cache": cache, "fp8": False, **options}
    return hvfast(model, fullgraph=True, dynamic=dynamic, options=given)


# What is brought, and how much of it is there.


@pytest.mark.parametrize(("blocks", "resident"), [(60, 0), (60, 1), (7, 3)])
@torch.no_grad()
def test_two_blocks_at_most_in_the_graphs_own_order(meter: Meter, blocks: int, resident: int) -> None:
    model = toy(blocks, resident)
    wanted = toy(blocks, None)(**toy_inputs())
    made = run(model)(**toy_inputs())
    assert meter.take() == ((blocks - resident) * BLOCK, 2 * BLOCK)
    assert torch.allclose(made, wanted, atol=1e-5)
    row = row_of(model)
    tokens = 1 + bool(resident)  # of the last block, and of the first one, which shares its body with the others
    assert row.op_changes == {"fetch.default": blocks - resident + tokens, "getitem": 4 * (blocks - resident) + tokens}
    assert len(row.report.table) == blocks - resident
    assert sum(item["bytes"] for item in row.report.table) == (blocks - resident) * BLOCK


@pytest.mark.parametrize("resident", [0, 1, 2])
@torch.no_grad()
def test_a_reused_step_brings_nothing_of_what_it_skips(meter: Meter, resident: int) -> None:
    model, plain = toy(6, resident), toy(6, None)
    call, other = run(model, {"threshold": 0.5}), run(plain, {"threshold": 0.5})
    brought = []
    for timestep in (900.0, 890.0, 880.0):
        inputs = toy_inputs(timestep=timestep)
        assert torch.equal(call(**inputs), other(**inputs))
        brought.append(meter.take())
    reused = (BLOCK, BLOCK) if not resident else (0, 0)  # the first block runs in every step
    assert brought == [((6 - resident) * BLOCK, 2 * BLOCK), reused, reused]
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, True, True]


@pytest.mark.parametrize("blocks", [6, pytest.param(60, marks=SLOW)])
@torch.no_grad()
def test_two_blocks_at_most_in_the_order_of_inductor(meter: Meter, blocks: int) -> None:
    model, plain = toy(blocks, 1), toy(blocks, None)
    call, other = (run(item, {"threshold": 0.5}, "inductor") for item in (model, plain))
    inputs = toy_inputs()
    assert torch.equal(call(**inputs), other(**inputs))
    assert meter.take() == ((blocks - 1) * BLOCK, 2 * BLOCK)
    inputs = toy_inputs(timestep=890.0)
    assert torch.equal(call(**inputs), other(**inputs))
    assert meter.take() == (0, 0)
    assert hvcompile.stats(model).hits == 1


@needs_torchao
@torch.no_grad()
def test_float8_weights_stay_on_the_host_and_half_the_bytes_are_brought(meter: Meter) -> None:
    fields: Any = {"keep_last_blocks": 0}
    model, plain = (Wide(4).to(torch.bfloat16) for _ in range(2))
    hvcompile.offload(model, CPU, resident_blocks=0)
    inputs = wide_inputs(dtype=torch.bfloat16)
    call = run(model, fp8=fields)
    made = call(**inputs)
    assert torch.equal(made, run(plain, fp8=fields)(**inputs))
    total, most = meter.take()
    weights = [weight for weight in model.blocks.parameters() if isinstance(weight, QuantizedWeight)]
    rest = [weight for weight in model.blocks.parameters() if isinstance(weight, HostWeight)]
    assert weights
    assert all(weight.joined.memory is not None for weight in weights)
    assert total == sum(weight.numel() for weight in weights) + sum(map(host.num_bytes, rest))
    assert total < 0.7 * sum(map(host.num_bytes, (*weights, *rest))), "some of so small a block are not float8"
    assert most == total // 2
    assert torch.equal(call(**inputs), made), "the next call takes what was quantised"
    restored = hvcompile.restore(model)
    assert restored == (len(rest), len(weights))
    assert {type(weight) for weight in model.parameters()} == {nn.Parameter}
    hvcompile.offload(model, CPU)
    assert isinstance(model.blocks[1].up.weight, HostWeight)


@needs_torchao
@torch.no_grad()
def test_float8_of_exact_copies_comes_back_exactly() -> None:
    model, plain = Wide(3), Wide(3)
    hvcompile.offload(model, CPU)
    run(model, fp8={"keep_last_blocks": 0, "keep_original": "cpu"})(**wide_inputs())
    move(model)
    assert hvcompile.restore(model).dequantized == 0
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


# What changes, and what does not.


@torch.no_grad()
def test_weights_that_are_loaded_are_used_and_a_cached_step_is_not_reused() -> None:
    model, plain = toy(), toy(resident=None)
    call, other = run(model, {"threshold": 0.5}), run(plain, {"threshold": 0.5})
    for number, timestep in enumerate((900.0, 890.0, 880.0, 870.0)):
        if number == 2:
            changed = {name: item * 1.01 for name, item in plain.state_dict().items()}
            assert model.load_state_dict(changed)
            plain.load_state_dict(changed)
        if number == 3:  # unseen by any version
            for item in (model, plain):
                item.state_dict()["blocks.2.out.weight"].data.mul_(1.5)
        assert torch.equal(call(**toy_inputs(timestep=timestep)), other(**toy_inputs(timestep=timestep)))
    for item in (model, plain):
        assert [step.reused for step in hvcompile.stats(item).steps] == [False, True, False, False]
    assert hvcompile.stats(model).recompiles == 0


@torch.no_grad()
def test_another_size_and_another_model() -> None:
    model, other, plain = toy(), toy(), toy(resident=None)
    other.blocks[1].out.weight.copy_(torch.zeros(16, 16))
    calls = [run(item, dynamic=True) for item in (model, other)]
    for tokens in (12, 9, 15):
        inputs = toy_inputs(tokens=tokens, seed=tokens)
        made = [call(**inputs) for call in calls]
        assert torch.allclose(made[0], plain(**inputs), atol=1e-5)
        assert not torch.allclose(made[1], made[0])
    assert hvcompile.stats(model).recompiles == 0


@torch.no_grad()
def test_a_graph_without_a_trunk_and_one_without_the_pass(meter: Meter) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.blocks[2](self.blocks[0](hidden).relu()).add(1)  # type: ignore[no-any-return]

    model, hidden = Odd().requires_grad_(False), torch.randn(3, 16)
    wanted = model(hidden)
    hvcompile.offload(model, CPU, resident_blocks=0)
    call = hvfast(model, options={"lower": "eager", "fp8": False})
    assert torch.allclose(call(hidden), wanted)
    assert torch.allclose(call(hidden), wanted)
    assert meter.take()[0] == 4 * MATRIX, "twice the two that are read"
    model = toy()
    assert torch.allclose(run(model, host_weights=False)(**toy_inputs()), toy(resident=None)(**toy_inputs()))
    assert meter.take() == (3 * BLOCK, BLOCK)


@torch.no_grad()
def test_moves_keep_the_weights_where_they_are() -> None:
    model = toy()
    call, inputs = run(model), toy_inputs()
    before = call(**inputs)
    weight = model.blocks[1].out.weight
    assert isinstance(weight, HostWeight)
    place = weight.host
    move(model)
    assert model.blocks[1].out.weight is weight
    assert weight.host is place
    assert torch.equal(call(**inputs), before)
    assert hvcompile.stats(model).recompiles == 0


def move(model: Any) -> None:
    model._apply(lambda tensor: tensor.to("cpu", copy=True))


@torch.no_grad()
def test_restored_and_offloaded_again() -> None:
    model = toy()
    call, inputs = run(model, {"threshold": 0.5}), toy_inputs()
    before, wanted = call(**inputs), toy(resident=None)(**inputs)
    assert hvcompile.restore(model) == (9, 0)
    assert torch.equal(model(**inputs), wanted)
    model.blocks[1].out.weight.data += 0.1
    hvcompile.offload(model, CPU, resident_blocks=2)
    changed = toy(resident=None)
    changed.blocks[1].out.weight += 0.1
    made = call(**inputs)
    assert torch.allclose(made, changed(**inputs), atol=1e-5)
    assert not torch.allclose(made, before)


@torch.no_grad()
def test_adapters_on_top() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["attend", "out"], init_lora_weights=False)
    model, plain = toy(), toy(resident=None)
    for item in (model, plain):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, item)
    wanted = plain(**toy_inputs())
    assert torch.allclose(run(model)(**toy_inputs()), wanted, atol=1e-5)
    assert "3 of 4 blocks" in row_of(model).line()
    with pytest.raises(hvcompile.OffloadedWeightError, match=r"hvcompile\.restore"):
        model.blocks[1].out.merge()


def test_adapters_that_are_there_before() -> None:
    """They stay on the device, as do those that come later: swapping files writes into them."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["attend", "out"], init_lora_weights=False)
    model: Any = Toy().requires_grad_(False).eval()
    torch.manual_seed(1)
    peft.inject_adapter_in_model(config, model)
    with torch.no_grad():
        wanted = model(**toy_inputs())
    assert hvcompile.offload(model, CPU).host_weights == 9
    hosted = {name for name, weight in model.named_parameters() if isinstance(weight, HostWeight)}
    assert not any("lora" in name for name in hosted)
    assert torch.allclose(run(model)(**toy_inputs()), wanted, atol=1e-5)


def test_a_weight_that_was_expanded_stays() -> None:
    model: Any = Toy().requires_grad_(False).eval()
    model.blocks[1].out.weight = nn.Parameter(torch.randn(16, 1).expand(16, 16), requires_grad=False)
    model.blocks[2].out.weight = nn.Parameter(torch.randn(16, 16).T, requires_grad=False)
    with torch.no_grad():
        wanted = model(**toy_inputs())
    assert hvcompile.offload(model, CPU).host_weights == 8
    assert isinstance(model.blocks[2].out.weight, HostWeight)
    assert torch.allclose(run(model)(**toy_inputs()), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizers_step_changes_nothing(kind: Any) -> None:
    """It is refused before the first weight changes, whichever comes first."""
    model: Any = Toy()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    hvcompile.offload(model, CPU)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    optimizer = kind(model.parameters(), lr=0.1, foreach=False)
    with pytest.raises(hvcompile.OffloadedWeightError, match=rf"'{kind.__name__}\.step' asks for its values"):
        optimizer.step()
    assert all(torch.equal(before[name], item) for name, item in model.state_dict().items())
    other = nn.Linear(2, 2)
    other.weight.grad = torch.ones(2, 2)
    kind(other.parameters(), lr=0.1).step()


def test_what_needs_the_values_is_refused() -> None:
    model = toy()
    weight: Any = model.blocks[1].attend.weight
    elsewhere: Any = torch.compile(model, backend="aot_eager")
    asked: list[Callable[[], Any]] = [
        lambda: model(**toy_inputs()),
        lambda: weight + 1,
        lambda: weight.data,
        lambda: weight.add_(1),
        lambda: torch.tensor(weight),
        weight.data_ptr,
        lambda: model.blocks[1].to(torch.float16),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
        lambda: setattr(weight, "data", torch.zeros(16, 16)),
        lambda: elsewhere(**toy_inputs()),
        lambda: model.to("meta"),  # last: it has moved some of the model by then
    ]
    assert model.to("cpu") is model
    for ask in asked:
        with torch.no_grad(), pytest.raises(Exception, match=r"hvcompile\.restore\(model\)"):
            ask()
    assert weight.shape == (16, 16)
    assert "on the host" in repr(weight)


def test_saved_and_loaded_as_it_was() -> None:
    model, plain, file = toy(), toy(resident=None), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded[name], item) for name, item in plain.state_dict().items())


def test_what_can_not_be_offloaded() -> None:
    with pytest.raises(hvcompile.InputError, match="no list of equal blocks"):
        hvcompile.offload(nn.Linear(4, 4), CPU)
    with pytest.raises(hvcompile.InputError, match="resident_blocks is -1"):
        hvcompile.offload(Toy(), CPU, resident_blocks=-1)
    unknown: Any = object()
    for wrong, device, message in ((Toy(), "gpu", "'gpu' is not there"), (unknown, CPU, r"pipe\.transformer")):
        with pytest.raises(hvcompile.InputError, match=message):
            hvcompile.offload(wrong, device)
    trained: Any = Toy()
    hvcompile.offload(trained, CPU)
    with torch.enable_grad(), pytest.raises(Exception, match="can't be trained there"):
        run(trained)(**toy_inputs())
    model = toy(resident=None)
    with torch.no_grad(), pytest.raises(Exception, match=r"hvcompile\.offload\(model\)"):
        run(model, host_weights=True)(**toy_inputs())


@needs_torchao
@torch.no_grad()
def test_a_quantised_model_is_not_offloaded() -> None:
    model = Wide()
    run(model, fp8={"keep_last_blocks": 0})(**wide_inputs())
    with pytest.raises(hvcompile.QuantizedWeightError, match=r"hvcompile\.restore\(model\) before hvcompile\.offload"):
        hvcompile.offload(model, CPU)


def test_what_offload_says() -> None:
    model: Any = Toy(6).requires_grad_(False)
    done = hvcompile.offload(model, CPU, resident_blocks=2)
    assert (done.host_blocks, done.resident_blocks, done.largest_block_bytes) == (4, 2, BLOCK)
    assert (done.host_weights, done.host_bytes) == (12, 4 * BLOCK)
    everything = sum(map(host.num_bytes, model.parameters()))
    assert done.device_bytes == everything - 4 * BLOCK
    kept = [number for number, block in enumerate(model.blocks) if type(block.out.weight) is nn.Parameter]
    assert kept == [0, 3]


def test_memory_is_cut_from_chunks() -> None:
    memory = HostMemory(is_pinned=False, is_cut=True, chunk_bytes=4096)
    given = [torch.randn(10, 7), torch.randn(30, 30).half(), torch.randn(8, 40).t(), torch.randn(60, 60)]
    copies = [memory.copy_of(item) for item in given]
    assert all(map(torch.equal, copies, given))
    assert [item.stride() for item in copies] == [item.stride() for item in given]
    assert all(item.data_ptr() % 16 == 0 for item in copies)
    assert copies[0].untyped_storage().data_ptr() == copies[1].untyped_storage().data_ptr()
    assert copies[3].untyped_storage().nbytes() == 4 * 60 * 60


@torch.no_grad()
def test_dumped_and_run_again(tmp_path: Path) -> None:
    model = toy()
    run(model, {"threshold": 0.5}, dump=str(tmp_path))(**toy_inputs())
    (folder,) = tmp_path.glob("run_1/graph_*")
    found = bisect.bisect(folder)
    assert found.finding is None, found.verdict()
    assert "HostWeights" in [stage.name for stage in found.stages]
    assert not any("random" in note for note in found.notes)


@torch.no_grad()
def on_two_ranks() -> tuple[list[float], int]:
    """How far a sharded, cached HunyuanVideo is from an eager one, relatively, in two steps; and the steps reused."""
    import sharded_cases
    import zoo

    model = zoo.FAMILIES["hunyuan_video"].build().eval().requires_grad_(False)
    inputs: Any = sharded_cases.inputs_of("hunyuan_video") | {"return_dict": False}
    (wanted,) = model(**inputs)
    hvcompile.offload(model, CPU)
    call = run(model, {"threshold": 0.5}, context_parallel=True)
    apart = [float((call(**inputs)[0] - wanted).abs().max() / wanted.abs().max()) for _ in range(2)]
    return apart, hvcompile.stats(model).hits


def test_on_two_ranks() -> None:
    for apart, hits in ranks.results(ranks.launch(on_two_ranks, 2)):
        assert max(apart) < 1e-5
        assert hits == 1


# What explain says.


@torch.no_grad()
def test_what_is_explained_is_what_is_held() -> None:
    def explained(model: nn.Module, inputs: Any) -> dict[str, Need]:
        return {need.how: need for need in hvcompile.explain(model, **inputs).needs}

    needs = explained(toy(5, None), toy_inputs())
    model = Toy(5).requires_grad_(False)
    done = hvcompile.offload(model, CPU)
    assert list(needs) == ["", "hvcompile.offload(model)"], "so small a model has nothing for float8"
    plain, offloaded = needs.values()
    assert plain.weight_bytes == done.device_bytes + done.host_bytes
    assert offloaded.host_bytes == offloaded.brought_bytes == done.host_bytes
    assert offloaded.weight_bytes == done.device_bytes + 2 * done.largest_block_bytes
    assert plain.peak_bytes == plain.weight_bytes + plain.activation_bytes + plain.state_bytes
    wide = explained(Wide(6), wide_inputs())
    made = Wide(6)
    run(made, {"threshold": 0.5}, fp8=True)(**wide_inputs())
    joined = {id(item.joined): item.joined for item in made.parameters() if isinstance(item, QuantizedWeight)}
    rest = sum(host.num_bytes(item) for item in made.parameters() if not isinstance(item, QuantizedWeight))
    assert wide["options={'fp8': True}"].weight_bytes == rest + sum(item.num_bytes for item in joined.values())
    assert "hvcompile.offload(model), options={'fp8': True}" in wide
    inputs: Any = toy_inputs()
    explanation = hvcompile.explain(toy(5, None), **inputs)
    assert "yes" in table_text(explanation_tables(explanation, "h100", 1.0)[-1])
    assert "yes" not in table_text(explanation_tables(explanation, "h100", 1e-6)[-1])


def table_text(table: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@torch.no_grad()
def test_the_most_that_a_graph_holds_at_once() -> None:
    def held(call: Callable[..., Any], *args: torch.Tensor) -> int:
        found: list[int] = []

        def look(module: fx.GraphModule, _: Any) -> Any:
            found.append(peak_of(module.graph))
            return module.forward

        compiled: Any = torch.compile(call, backend=look, fullgraph=True)
        compiled(*args)
        return found[0]

    hidden = torch.randn(10, 10)  # 400 bytes
    assert held(lambda x: x + 1, hidden) == 800
    assert held(lambda x: (x + 1).view(100).view(20, 5), hidden) == 800
    assert held(lambda x: ((x + 1) + 2) + 3, hidden) == 800
    assert held(lambda x: torch.cat([x + 1, x]) @ x, hidden) == 400 + 800 + 800, "x, what is joined, the product"


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="the absent GPU was made with torch 2.13")
def test_lowered_for_a_gpu_that_is_not_there() -> None:
    """Tensors on the host beside those of the GPU, in a branch; and what the code holds at once."""
    pytest.importorskip("triton")
    model, inputs = Wide(5).to(torch.bfloat16), wide_inputs(dtype=torch.bfloat16)
    options: Any = {"fp8": False, "first_block_cache": {"threshold": 0.5}}
    how: Any = {"device": "h100", "options": options, "compile_kernels": False, **inputs}
    plain = hvcompile.lower(model, **how)
    done = hvcompile.offload(model, CPU)
    made = hvcompile.lower(model, **how)
    assert made.reused is not None
    assert plain.reused is not None
    assert (made.computed.transferred_bytes, made.reused.transferred_bytes) == (done.host_bytes, 0)
    activations = plain.computed.peak_bytes
    assert made.computed.peak_bytes <= activations + 2 * done.largest_block_bytes
    assert made.computed.input_bytes < plain.computed.input_bytes - done.host_bytes + 2**10
    assert made.computed.num_launches == plain.computed.num_launches
    assert made.reused.num_launches == plain.reused.num_launches


# The pass on a graph.


def row_of(model: nn.Module) -> JournalRow:
    (journal,) = hvcompile.stats(model).journal
    return next(row for row in journal if row.name == HostWeights.__name__)


def rewritten(model: nn.Module) -> tuple[list[str], list[str], Trunk, pipeline.Context]:
    found: list[Any] = []

    def look(graph: fx.GraphModule, inputs: Any, _: Any) -> Any:
        trunk = recover(graph)
        assert isinstance(trunk, Trunk)
        context = pipeline.Context(given=dict(zip(trunk.inputs, inputs, strict=True)))
        before = golden.text_of(trunk)
        pipeline.run(trunk, [(HostWeights(), True)], lambda *_: None, [], context)
        found.append((before, golden.text_of(trunk), trunk, context))
        return lambda *_: (torch.zeros(1),)

    with torch.no_grad(), instead_of_compiling(look):
        hvfast(model)(**toy_inputs())
    return found[0]  # type: ignore[no-any-return]


def test_golden_and_a_second_time() -> None:
    before, after, trunk, context = rewritten(toy(3, 0))
    golden.check(HostWeights, before, after)
    report = HostWeights().apply(trunk, context)
    assert not report.applied
    assert "already" in report.declined[0][1]
    assert golden.text_of(trunk) == after


class Normed(nn.Linear):
    """Writes its own weight as it runs."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.weight.copy_(nn.functional.normalize(self.weight, dim=1))
        return nn.functional.linear(given, self.weight, self.bias)


def test_a_model_that_writes_its_weights_is_refused() -> None:
    model: Any = Toy()
    for block in model.blocks:
        block.out.__class__ = Normed
    hvcompile.offload(model, "cpu")
    fast = hvfast(model, options={"lower": "eager", "first_block_cache": False})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="writes into blocks"):
        fast(**toy_inputs())


def test_what_is_done_to_an_entry_of_a_state_dict_is_not_done_to_the_model() -> None:
    """But for its values, which are the model's, as ever."""
    model: Any = Toy()
    plain: Any = Toy()
    inputs = toy_inputs()
    hvcompile.offload(model, "cpu")
    changes: list[Callable[[torch.Tensor], Any]] = [
        torch.Tensor.t_,
        torch.Tensor.requires_grad_,
        lambda item: setattr(item, "data", torch.zeros(16, 16)),
        lambda item: item.unsqueeze_(0),
    ]
    for change in changes:
        change(model.state_dict()["blocks.1.out.weight"])
    fast = hvfast(model, options={"lower": "eager", "first_block_cache": False})
    with torch.no_grad():
        assert torch.equal(fast(**inputs), plain(**inputs))
        assert not model.state_dict()["blocks.1.out.weight"].requires_grad
        model.state_dict()["blocks.1.out.weight"].zero_()
        plain.blocks[1].out.weight.zero_()
        assert torch.equal(fast(**inputs), plain(**inputs))


def test_a_device_without_room_costs_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvcompile.hollow import parameter

    model, plain, calls, real = Toy(), Toy(), [0], parameter.hollow_like

    def full(*given: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("no room")
        return real(*given)

    monkeypatch.setattr(parameter, "hollow_like", full)
    with pytest.raises(torch.OutOfMemoryError):
        hvcompile.offload(model, "cpu")
    hvcompile.restore(model)
    assert all(torch.equal(item, plain.state_dict()[name]) for name, item in model.state_dict().items())
    with pytest.raises(hvcompile.errors.InputError, match="'meta'"):
        hvcompile.offload(model, "meta")


def test_who_makes_another_of_its_class_gets_an_ordinary_parameter() -> None:
    """As accelerate's ``set_module_tensor_to_device`` does."""
    model: Any = Toy()
    hvcompile.offload(model, "cpu")
    made = type(model.blocks[1].out.weight)(torch.zeros(16, 16), requires_grad=False)
    assert type(made) is nn.Parameter
    model.blocks[1].out.weight = made
    assert not model.state_dict()["blocks.1.out.weight"].any()
    hvcompile.restore(model)


def test_weights_of_kinds_that_can_not_stay_are_said() -> None:
    class Special(nn.Parameter):
        pass

    model: Any = Toy()
    for weight in model.blocks.parameters():
        weight.__class__ = Special
    with pytest.raises(hvcompile.errors.InputError, match="Special"):
        hvcompile.offload(model, "cpu")


def test_inference_mode_makes_no_difference() -> None:
    model, plain = Toy(), Toy()
    with torch.inference_mode():
        hvcompile.offload(model, "cpu")
        fast = hvfast(model, options={"lower": "eager", "first_block_cache": False})
        assert torch.equal(fast(**toy_inputs()), plain(**toy_inputs()))
