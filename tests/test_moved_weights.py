"""Float8 weights move with their model: the same parameters, the same graphs, and no memory left where they were.

There is no second device here. A move is asked for by ``to("cpu", copy=True)``, which takes the same way: other memory,
and the parameter's data replaced, as ``Module.to`` does it.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from test_float8_linears import ROUNDING, compiled, reference, relative
from wide import Wide, wide_inputs

import hvcompile
from hvcompile.float8.weights import Joined, QuantizedWeight
from hvcompile.torch_private import storages, torchao

pytestmark = pytest.mark.skipif(not torchao.is_available(), reason="torchao is not installed")

CPU = torch.device("cpu")
FLOAT8 = 1e-2
"""How far float8 may be from the weights as they were, relatively."""


@pytest.fixture(params=["operators refuse", "storages refuse"], autouse=True)
def _build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of torch without CUDA, and with: see ``storages.forbid_address``."""
    if request.param == "storages refuse":
        monkeypatch.setattr(storages, "forbid_address", lambda *_: True)
    else:
        monkeypatch.setattr(storages, "forbid_address", lambda *_: False)


@pytest.fixture(scope="module", autouse=True)
def _accelerate_is_ready() -> None:
    """accelerate keeps its uncompiled hooks in an attribute of a function, made at the first call.

    Where Dynamo traces that call and a backend raises, by plain torch too, the attribute is lost for all later calls of
    the process. Here backends raise on purpose.
    """
    with torch.no_grad():
        cpu_offload(torch.nn.Linear(1, 1), execution_device=CPU)(torch.ones(1))


def move(model: Any) -> None:
    model._apply(lambda tensor: tensor.to("cpu", copy=True))


def quantised(model: torch.nn.Module) -> dict[str, QuantizedWeight]:
    return {name: item for name, item in model.named_parameters() if isinstance(item, QuantizedWeight)}


def matrices(model: torch.nn.Module) -> list[Joined]:
    return list(dict.fromkeys(item.joined for item in quantised(model).values()))


@torch.no_grad()
def test_moved_there_and_back() -> None:
    model, wanted = Wide(), reference(Wide())(**wide_inputs())
    run = compiled(model)
    before = run(**wide_inputs())
    assert relative(before, wanted) < ROUNDING
    stats = hvcompile.stats(model)
    graphs, held, joined = (stats.graphs, stats.recompiles), dict(model.named_parameters()), matrices(model)
    old = [weakref.ref(item.data) for item in joined] + [weakref.ref(item.scale) for item in joined]
    for _ in range(2):
        move(model)
        gc.collect()
        assert [item() for item in old] == [None] * len(old), "nothing holds the memory that was left"
        assert all(item is held[name] for name, item in model.named_parameters())
        assert len(quantised(model)) == 15
        assert torch.equal(run(**wide_inputs()), before)
    assert matrices(model) == joined
    stats = hvcompile.stats(model)
    assert (stats.graphs, stats.recompiles) == graphs, "compiled once"


@torch.no_grad()
def test_what_was_moved_still_refuses_to_be_read() -> None:
    model = Wide()
    compiled(model)(**wide_inputs())
    move(model)
    weight: Any = model.blocks[0].to_q.weight
    for ask in (lambda: weight + 1, model.state_dict, lambda: model.to(torch.float16), lambda: weight.data):
        with pytest.raises(
            hvcompile.QuantizedWeightError, match=r"to_q\.weight .*hvcompile\.restore\(model\)|q.weight"
        ):
            ask()
    with pytest.raises(hvcompile.QuantizedWeightError):
        model.to("meta")
    assert weight.device == CPU


@pytest.mark.parametrize("keep", ["free", "cpu"])
@torch.no_grad()
def test_restored_after_a_move(keep: str) -> None:
    model, still, original = Wide(), Wide(), Wide()
    for item in (model, still):
        compiled(item, {"keep_original": keep})(**wide_inputs())
    model.blocks[1].up.weight.requires_grad_(True)
    move(model)
    assert model.blocks[1].up.weight.requires_grad
    assert hvcompile.restore(model) == hvcompile.restore(still)
    pairs = zip(model.parameters(), (original if keep == "cpu" else still).parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert all(type(item) is torch.nn.Parameter for item in model.parameters())
    assert relative(model(**wide_inputs()), original(**wide_inputs())) < FLOAT8


@torch.no_grad()
def test_a_copy_alone_moves_nothing() -> None:
    model = Wide()
    compiled(model)(**wide_inputs())
    weights = [model.blocks[0].to_q.weight, model.blocks[0].to_k.weight]
    before = [item.joined.data.data_ptr() for item in weights]
    copies = [item.to("cpu", copy=True) for item in weights]
    assert copies[0].joined is copies[1].joined, "what is multiplied at once is copied at once"
    assert [item.joined.data.data_ptr() for item in weights] == before
    for weight, copied in zip(weights, copies, strict=True):
        assert isinstance(copied, QuantizedWeight)
        assert copied.joined is not weight.joined
        assert all(map(torch.equal, copied.rows, weight.rows))
        assert copied.shape == weight.shape
    other = Wide(seed=1)
    compiled(other)(**wide_inputs())
    with pytest.raises(hvcompile.QuantizedWeightError):  # another's values
        weights[0].data = other.blocks[0].to_q.weight.to("cpu", copy=True)
    assert weights[0].to("cpu") is weights[0]


@torch.no_grad()
def test_model_offload_between_calls() -> None:
    """As ``enable_model_cpu_offload`` does: a hook around the whole model moves it in, and another call out."""
    model, wanted = Wide(4), Wide(4)(**wide_inputs())
    _, hook = cpu_offload_with_hook(model, CPU)
    fields: Any = {"fp8": {"keep_last_blocks": 0}, "first_block_cache": {"threshold": 0.5}, "lower": "eager"}
    model.compile(backend="hvfast", options=fields)
    made = []
    for _ in range(3):
        made += [model(**wide_inputs()) for _ in range(2)]
        hook.offload()
        move(model)
    assert max(relative(item, wanted) for item in made) < FLOAT8
    stats = hvcompile.stats(model)
    assert (stats.graphs, stats.recompiles) == (1, 0)
    assert (stats.misses, stats.hits) == (3, 3), (
        "no step is reused after weights have moved, which may be others by then"
    )
    assert any("float8 products" in line for row in stats.journal[0] for line in row.report.matched)


BY_LAYER = pytest.mark.parametrize(
    "put",
    [
        lambda model: cpu_offload(model, execution_device=CPU),
        lambda model: apply_group_offloading(model, CPU, CPU, offload_type="leaf_level"),
        lambda model: apply_layerwise_casting(model, torch.bfloat16, torch.float32),
    ],
    ids=["sequential", "group", "layerwise casting"],
)


@BY_LAYER
@pytest.mark.parametrize("asked", ["fp8", "first_block_cache"])
@torch.no_grad()
def test_what_moves_layer_by_layer_is_an_error_where_a_pass_is_asked_for(put: Any, asked: str) -> None:
    model = Wide()
    put(model)
    model.compile(backend="hvfast", options={"lower": "eager", asked: True})
    with pytest.raises(Exception, match=rf"options ask for '{asked}', but hooks cut this Wide.*Instead, use") as raised:
        model(**wide_inputs())
    assert isinstance(raised.value.__cause__, hvcompile.RequestedPassError) or "RequestedPassError" in str(raised.value)


@BY_LAYER
@torch.no_grad()
def test_what_moves_layer_by_layer_is_an_error_on_float8_weights(put: Any) -> None:
    model = Wide()
    compiled(model)(**wide_inputs())

    def offload_and_run() -> None:
        put(model)
        model(**wide_inputs())

    with pytest.raises(hvcompile.QuantizedWeightError, match=r"hvcompile\.restore\(model\)"):
        offload_and_run()
