"""Models that a library has quantised: outlined, cached and sharded like any other, and never stale.

The oracle is the same quantised model, run eagerly.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import quantised_cases
import ranks
import sharded_cases
import torch
import zoo
from oracle import denoise, diffusers_cached, first, hvfast, relative_error
from quantised_cases import KINDS, rows_of, skip_where_torch_lacks
from slow import SLOW
from wide import Wide, wide_inputs

import hvcompile
from hvcompile.errors import RequestedPassError

pytest.importorskip("torchao")
GGUF = [kind for kind in KINDS if kind.startswith("GGUF")]
TORCHAO = [kind for kind in KINDS if kind not in GGUF]


def quantised(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    skip_where_torch_lacks(kind)
    model = Wide(seed=seed).to(dtype)
    KINDS[kind](model.blocks)
    return model


THROUGH_AOT = ("int8 dynamic", "float8 weights", "GGUF Q8_0")


@pytest.mark.parametrize(
    ("kind", "lower", "options"),
    [
        *((kind, "eager", {"first_block_cache": True}) for kind in KINDS),
        *((kind, "aot", {"first_block_cache": True}) for kind in THROUGH_AOT),
        ("int8 weights", "eager", {"mode": "exact"}),
    ],
)
def test_as_eagerly_and_outlined(kind: str, lower: str, options: dict[str, Any]) -> None:
    """One graph, one body, the cache, and what eager computes, at several shapes; the linear layers stay."""
    model = quantised(kind)
    fast = hvfast(model, fullgraph=True, options={"lower": lower, **options})
    for tokens in (24, 37):
        inputs = wide_inputs(tokens=tokens, seed=tokens)
        with torch.no_grad():
            assert relative_error(fast(**inputs), model(**inputs)) < 1e-4
    assert "3 blocks share 1 bodies" in rows_of(fast)["outline"]
    assert ("run on a miss" in rows_of(fast)["FirstBlockCache"]) == ("mode" not in options)


@pytest.mark.parametrize("kind", ["int8 dynamic", "GGUF Q8_0"])
def test_compiled_by_inductor(kind: str) -> None:
    """Within what a rounded activation or product may differ by: half a step of eight bits in one of a few elements."""
    model = quantised(kind)
    fast = hvfast(model, fullgraph=True)
    inputs = wide_inputs()
    with torch.no_grad():
        assert relative_error(fast(**inputs), model(**inputs)) < (1e-3 if "dynamic" in kind else 1e-4)


@pytest.mark.parametrize("kind", ["int8 weights", "float8 dynamic, a scale a row", "GGUF Q4_0"])
def test_decides_as_diffusers_own_cache(kind: str) -> None:
    """The same steps reused, and the same sample, over a schedule of HunyuanVideo's."""
    skip_where_torch_lacks(kind)
    family, threshold = zoo.FAMILIES["hunyuan_video"], 0.6

    def made() -> Any:  # twice: a copy of diffusers' weights in GGUF does not know their kind
        model = family.build(width=64)
        for name in family.blocks:
            KINDS[kind](model.get_submodule(name))
        return model

    inputs = family.inputs(3)
    fast = hvfast(made(), fullgraph=True, options={"lower": "eager", "first_block_cache": {"threshold": threshold}})
    actual = denoise(fast, inputs, was_reused=lambda: hvcompile.stats(fast).steps[-1].reused)
    torch._dynamo.reset()
    expected = diffusers_cached(made(), inputs, threshold, blocks=family.blocks)
    assert actual.reused == expected.reused
    assert 3 < sum(actual.reused) < 27
    assert relative_error(actual.sample, expected.sample) < 1e-4


def change_in_place(weight: Any, other: Any) -> None:
    with torch.no_grad():
        weight.copy_(other)


def change_a_part(weight: Any, other: Any) -> None:
    del other
    with torch.no_grad():
        weight.scale.mul_(1.5)


def change_behind(weight: Any, other: Any) -> None:
    """As peft merges: no version moves."""
    del other
    weight.scale.data.mul_(1.5)


def exchange_a_part(weight: Any, other: Any) -> None:
    weight.qdata, weight.scale = other.qdata, other.scale


@pytest.mark.parametrize("change", [change_in_place, change_a_part, change_behind, exchange_a_part])
@pytest.mark.parametrize("kind", ["int8 dynamic", "float8 weights"])
def test_follows_its_weights(kind: str, change: Any) -> None:
    """After any change of a quantised weight no step from before is reused, and the output is that of now."""
    model, other, inputs = quantised(kind), quantised(kind, seed=1), wide_inputs()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager", "first_block_cache": {"threshold": 10.0}})
    with torch.no_grad():
        before = fast(**inputs)
        fast(**inputs)
        assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True]
        change(model.blocks[2].up.weight, other.blocks[2].up.weight)
        now = fast(**inputs)
        assert not hvcompile.stats(fast).steps[-1].reused
        assert relative_error(now, model(**inputs)) < 1e-6
        assert relative_error(now, before) > 1e-3
    assert hvcompile.stats(fast).recompiles == 0


def test_follows_a_weight_that_is_another() -> None:
    model, other, inputs = quantised("int8 weights"), quantised("int8 weights", seed=1), wide_inputs()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager", "first_block_cache": {"threshold": 10.0}})
    with torch.no_grad():
        fast(**inputs)
        model.blocks[2].up.weight = other.blocks[2].up.weight
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-6
        model.blocks[1] = other.blocks[1]
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-6
        model.load_state_dict(other.state_dict(), assign=True)
        assert relative_error(fast(**inputs), other(**inputs)) < 1e-6
    assert not any(step.reused for step in hvcompile.stats(fast).steps)


def test_another_kind_of_weight_compiles_again() -> None:
    model, other, inputs = quantised("int8 weights"), quantised("int8 dynamic"), wide_inputs()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager", "first_block_cache": False})
    with torch.no_grad():
        fast(**inputs)
        model.blocks[2].up.weight = other.blocks[2].up.weight
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-6
    assert hvcompile.stats(fast).recompiles == 1


@pytest.mark.parametrize("guards", ["quick", "dynamo"])
def test_another_layout_within_a_weight_compiles_again(guards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvcompile.torch_private.guards.FEWEST_WEIGHTS", 5)
    model, inputs = quantised("float8 weights"), wide_inputs()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager", "guards": guards})
    with torch.no_grad():
        fast(**inputs)
        weight = model.blocks[0].up.weight
        weight.qdata = weight.qdata.float()
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-6
    assert hvcompile.stats(fast).recompiles == 1


@pytest.mark.parametrize("kind", ["int8 dynamic", "GGUF Q8_0"])
def test_float8_leaves_them_and_says_so(kind: str) -> None:
    """Asked for by name it is an error with the reason; layers beside them that are plain are done."""
    fast = hvfast(quantised(kind), fullgraph=True, options={"lower": "eager", "fp8": True})
    with torch.no_grad(), pytest.raises(Exception, match="is left as it is") as caught:
        fast(**wide_inputs())
    assert RequestedPassError.__name__ in repr(caught.value) or isinstance(caught.value.__cause__, RequestedPassError)
    model = Wide()
    for block in model.blocks:
        KINDS[kind](torch.nn.ModuleDict({"up": block.up}) if kind not in GGUF else block)
        if kind in GGUF:
            block.to_q = copy.deepcopy(Wide().blocks[0].to_q)
    torch._dynamo.reset()
    inputs = wide_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        fast = hvfast(model, fullgraph=True, options={"lower": "eager", "fp8": {"keep_last_blocks": 0}})
        actual = fast(**inputs)
    assert 1e-5 < relative_error(actual, expected) < 0.1
    said = rows_of(fast)["Float8Linears"]
    assert "as 3 float8 products" in said or "float8 products" in said
    assert "left as it is" in said


def on_two_ranks(kind: str, cache: bool) -> list[Any]:
    """On a rank: how far a sharded step is from a whole one, what was reused, and what sharding says."""

    def made() -> Any:
        model = zoo.FAMILIES["hunyuan_video"].build(**sharded_cases.DEPTH)
        for name in ("transformer_blocks", "single_transformer_blocks"):
            KINDS[kind](model.get_submodule(name))
        return model

    inputs = sharded_cases.inputs_of("hunyuan_video")
    options: dict[str, Any] = {"lower": "eager", "first_block_cache": {"threshold": 0.6} if cache else False}
    fast = hvfast(made(), fullgraph=True, options=options)
    if not cache:
        with torch.no_grad():
            actual = first(fast(**inputs, return_dict=False))
            expected = first(made()(**inputs, return_dict=False))
        return [relative_error(actual, expected), [], rows_of(fast)["ShardedAttention"]]
    alone = hvfast(made(), fullgraph=True, options={**options, "context_parallel": False})
    runs = [denoise(run, inputs, was_reused=functools.partial(was_reused, run)) for run in (fast, alone)]
    said = rows_of(fast)["ShardedAttention"]
    return [relative_error(runs[0].sample, runs[1].sample), [run.reused for run in runs], said]


def was_reused(model: Any) -> bool:
    return hvcompile.stats(model).steps[-1].reused


@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        ("int8 dynamic", True),
        pytest.param("float8 weights", False, marks=SLOW),
        pytest.param("GGUF Q8_0", False, marks=SLOW),
    ],
)
def test_sharded(kind: str, cache: bool) -> None:
    skip_where_torch_lacks(kind)
    for error, reused, said in ranks.results(ranks.launch(on_two_ranks, 2, kind, cache)):
        assert error < (1e-3 if "dynamic" in kind else 1e-4)
        assert "rank" in said
        if cache:
            assert reused[0] == reused[1]
            assert 3 < sum(reused[0]) < 27


def test_one_scale_for_the_whole_input_is_not_sharded() -> None:
    """Each rank would have a scale of its own: it is left whole, and the journal says what to do."""
    for error, _, said in ranks.results(ranks.launch(on_two_ranks, 2, "float8 dynamic, one scale", False)):
        assert error < 1e-6
        assert "granularity=PerRow()" in said


def test_diffusers_config(tmp_path: Any) -> None:
    """A checkpoint that diffusers quantises with torchao as it loads it."""
    from diffusers import HunyuanVideoTransformer3DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    plain: Any = zoo.FAMILIES["hunyuan_video"].build(width=64).to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model: Any = HunyuanVideoTransformer3DModel.from_pretrained(
        tmp_path,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        torch_dtype=torch.bfloat16,
    )
    inputs = {
        name: item.to(torch.bfloat16) if item.is_floating_point() and name != "timestep" else item
        for name, item in zoo.FAMILIES["hunyuan_video"].inputs(3).items()
    }
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    with torch.no_grad():
        assert (
            relative_error(first(fast(**inputs, return_dict=False)), first(model(**inputs, return_dict=False))) < 2e-2
        )
    assert "share" in rows_of(fast)["outline"]


def test_caches_know_what_a_weight_is_made_with() -> None:
    """The node that puts a weight together is called differently where it makes another one."""
    from hvcompile.torch_private.subclasses import Together, mixes_rows, parts_of

    skip_where_torch_lacks("float8 dynamic, a scale a row")
    weights = [quantised(kind).blocks[0].up.weight for kind in TORCHAO]
    made = [Together(parts_of(weight), mixes_rows(weight)) for weight in weights]
    assert len({item.__name__ for item in made}) == len(made) == len(set(made))
    assert [item.mixes_rows for item in made] == ["one scale" in kind for kind in TORCHAO]
    again = Together(parts_of(quantised(TORCHAO[0], seed=1).blocks[1].up.weight), False)
    assert again == made[0]
    assert again.__name__ == made[0].__name__
    assert quantised_cases.KINDS.keys() == KINDS.keys()
