"""Hooks of other libraries: one warning that names them, the model's state all the same, and as before without them."""

from __future__ import annotations

import copy
import gc
import logging
import re
import threading
import weakref
from typing import Any

import pytest
import torch
import zoo
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    apply_group_offloading,
    apply_layerwise_casting,
)
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import nn
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.runtime import hooks, state
from hvcompile.torch_private import frames

CPU = torch.device("cpu")


class BreaksHook(ModelHook):  # type: ignore[misc]  # diffusers has no types
    """A hook that Dynamo can't trace, as most caches and offloaders are."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return self.fn_ref.original_forward(*args, **kwargs)


def put_on(model: Any) -> None:
    for block in model.blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(BreaksHook(), "breaks")


def take_off(model: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("breaks", recurse=True)


def compiled(model: Any, lower: str = "eager") -> Any:
    model.compile(backend="hvfast", options={"lower": lower})
    return model


def run(model: Any, times: int = 2) -> list[float]:
    """Errors against a model of its own, call after call."""
    with torch.no_grad():
        wanted = Toy()(**toy_inputs())
        return [relative_error(model(**toy_inputs()), wanted) for _ in range(times)]


def trunks(model: Any) -> int:
    rows = [row for journal in hvcompile.stats(model).journal for row in journal if row.name == "outline"]
    return sum("blocks x 4" in row.report.matched[0] for row in rows if row.report.matched)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# Hooks that come and go.


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_the_trunk_comes_back_when_hooks_go(lower: str) -> None:
    """One more graph of the whole, whatever the number of times; the model is right all the while."""
    model = compiled(Toy(), lower)
    errors = run(model)
    for _ in range(3):
        put_on(model)
        errors += run(model)
        take_off(model)
        errors += run(model, 3)
    assert max(errors) < 1e-6
    stats = hvcompile.stats(model)
    assert trunks(model) == 2  # diffusers leaves a `forward` in each block, which Dynamo guards against
    assert (stats.misses, stats.hits) == (2, 1 + 1 + 2 + 2)
    grown = len(stats.journal)
    put_on(model)
    run(model)
    take_off(model)
    run(model)
    assert len(hvcompile.stats(model).journal) == grown


def test_hooks_that_were_there_first() -> None:
    model = Toy()
    put_on(model)
    run(compiled(model))
    assert trunks(model) == 0
    take_off(model)
    assert max(run(model, 3)) < 1e-6
    assert (trunks(model), hvcompile.stats(model).hits) == (1, 1)


def test_another_model_of_the_class_is_not_given_up_with_the_one_with_hooks() -> None:
    """Dynamo gives up a function for all objects of a class."""
    hooked, other = compiled(Toy()), compiled(Toy())
    put_on(hooked)
    run(hooked)
    assert max(run(other, 3)) < 1e-6
    assert (trunks(other), hvcompile.stats(other).hits) == (1, 1)
    # In turn, each is right, and Dynamo is not asked for ever.
    before = len(hvcompile.stats(hooked).journal), len(hvcompile.stats(other).journal)
    for _ in range(3):
        assert max(run(hooked, 1) + run(other, 1)) < 1e-6
    assert before == (len(hvcompile.stats(hooked).journal), len(hvcompile.stats(other).journal))
    take_off(hooked)
    run(hooked, 3)
    assert trunks(hooked) == 1
    assert max(run(other, 1)) < 1e-6


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("flux", FirstBlockCacheConfig(threshold=0.1)),
        pytest.param("cogvideox", FirstBlockCacheConfig(threshold=0.1), marks=SLOW),
        (
            "wan_t2v",
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            ),
        ),
    ],
    ids=["first block, flux", "first block, cogvideox", "pyramid, wan"],
)
def test_diffusers_own_caches_on_and_off(family: str, config: Any) -> None:
    build, inputs = zoo.FAMILIES[family].build, zoo.FAMILIES[family].inputs(seed=3)
    model: Any = compiled(build())

    def error() -> float:
        with torch.no_grad(), model.cache_context("cond"):
            return relative_error(first(model(**inputs, return_dict=False)), wanted)

    with torch.no_grad():
        wanted = first(build()(**inputs, return_dict=False))
    errors = [error(), error()]
    for _ in range(2):
        model.enable_cache(copy.deepcopy(config))
        errors += [error(), error()]
        hits = hvcompile.stats(model).hits
        model.disable_cache()
        errors += [error(), error(), error()]
        assert hvcompile.stats(model).hits > hits
    assert max(errors) < 1e-5


# State of a model whose parameters come and go.


def test_state_of_a_model_under_sequential_offload(caplog: pytest.LogCaptureFixture) -> None:
    """Every call makes new parameters; stats, reset and restore find the model's state all the same."""
    models = [compiled(Toy()), compiled(Toy())]
    for model in models:
        cpu_offload(model, execution_device=CPU)
    with caplog.at_level(logging.WARNING, logger="hvcompile"):
        assert max(run(models[0])) < 1e-6
    stats = hvcompile.stats(models[0])
    assert len(stats.journal) == stats.graphs + stats.recompiles > 1
    hvcompile.reset(models[0])
    hvcompile.restore(models[0])
    with pytest.raises(hvcompile.UncompiledModelError, match="has not run under hvfast yet"):
        hvcompile.stats(models[1])
    assert len(warnings_of(caplog)) == 1
    assert "AlignDevicesHook on" in warnings_of(caplog)[0]
    assert "enable_model_cpu_offload" in warnings_of(caplog)[0]
    remove_hook_from_submodules(models[0])
    assert max(run(models[0], 4)) < 1e-6
    assert hvcompile.stats(models[0]).hits >= 1


def test_state_of_one_whole_graph_whose_parameters_are_replaced() -> None:
    """Loading by assignment makes new parameters too; what the model did before still counts, and nothing is stale."""
    model = hvfast(Toy(), fullgraph=True, options={"lower": "eager"})
    module = model._orig_mod
    run(model)
    other = Toy()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    module.load_state_dict(other.state_dict(), assign=True)
    gc.collect()
    with torch.no_grad():
        assert relative_error(model(**toy_inputs()), other(**toy_inputs())) < 1e-6
    stats = hvcompile.stats(module)
    assert [step.reused for step in stats.steps] == [False, True, False]


def test_two_models_and_a_copy_share_a_graph_but_no_state() -> None:
    one, two = compiled(Toy()), compiled(Toy())
    run(one)
    run(two, 1)
    copied = compiled(copy.deepcopy(one))
    run(copied, 3)
    assert [(hvcompile.stats(item).hits, hvcompile.stats(item).misses) for item in (one, two, copied)] == [
        *[(1, 1), (0, 1), (2, 1)]
    ]


def test_a_module_around_the_model_and_parts_of_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Toy()

        def forward(self, **inputs: torch.Tensor) -> Any:
            return self.inner(**inputs)

    model = compiled(Around())
    run(model)
    assert hvcompile.stats(model).hits == hvcompile.stats(model.inner).hits == 1
    assert hvcompile.stats(model.inner.blocks[0]).hits == 1


def test_state_goes_with_the_model() -> None:
    model = compiled(Toy())
    cpu_offload(model, execution_device=CPU)
    run(model)
    kept = weakref.ref(state._ROOTS[model])
    module = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert module() is None
    assert kept() is None


def test_threads_share_the_state_of_a_model() -> None:
    model = compiled(Toy())
    put_on(model)
    threads = [threading.Thread(target=run, args=(model,)) for _ in range(3)]
    run(model)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = hvcompile.stats(model)
    assert len(stats.journal) == stats.graphs + stats.recompiles


# Warnings.


@pytest.mark.parametrize(
    ("put", "named"),
    [
        (
            lambda model: apply_group_offloading(model, CPU, CPU, offload_type="leaf_level"),
            r"GroupOffloadingHook on \d+ modules \(group offload\).*enable_model_cpu_offload",
        ),
        (
            lambda model: apply_layerwise_casting(model, torch.bfloat16, torch.float32),
            r"LayerwiseCastingHook on \d+ modules \(layerwise casting\).*options=\{'fp8': True\}",
        ),
        (put_on, r"BreaksHook on 4 modules\. Instead, use the model without it"),
    ],
    ids=["group offload", "layerwise casting", "unknown"],
)
def test_one_warning_that_names_the_hooks(put: Any, named: str, caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(Toy())
    put(model)
    with caplog.at_level(logging.WARNING, logger="hvcompile"), torch.no_grad():
        for _ in range(2):
            model(**toy_inputs())
    (warning,) = warnings_of(caplog)
    assert "hooks break this Toy into several graphs" in warning
    assert re.search(named, warning), warning
    assert hvcompile.stats(model).journal


def test_one_warning_a_reason_without_hooks(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Toy):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden = self.embed(kwargs["sample"])
            for block in self.blocks:
                torch._dynamo.graph_break()
                hidden = block(hidden, kwargs["text"], hidden[:, 0])
            return hidden

    models = [compiled(Broken()), compiled(Broken())]
    with caplog.at_level(logging.WARNING, logger="hvcompile"), torch.no_grad():
        for model in models:
            model(**toy_inputs())
            model(**toy_inputs(tokens=9))
    assert len(set(warnings_of(caplog))) == 1
    assert 1 <= len(warnings_of(caplog)) <= len(models)


# The questions themselves.


def test_hooks_are_recognised_by_what_they_are() -> None:
    model = Toy()
    assert hooks.foreign_hooks(model) == []
    assert hooks.still_hooked(model) is None
    put_on(model)
    holds = hooks.still_hooked(model)
    assert holds is not None
    assert holds(model)
    assert not holds(Toy())
    assert not holds(nn.Linear(2, 2))
    assert [(hook.name, hook.count) for hook in hooks.foreign_hooks(model)] == [("BreaksHook", 4)]
    block: Any = model.blocks[0]
    below = hooks.still_hooked(block, below=True)
    assert below is None
    take_off(model)
    assert not holds(model)
    assert hooks.foreign_hooks(model) == []


def test_outside_a_compiled_region_no_module_is_called() -> None:
    assert frames.called_module() is None
    assert frames.traced_module() is None
    assert not frames.is_in_a_piece()
    hooks.look_after(is_compiling=False)
