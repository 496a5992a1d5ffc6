"""A look at the model before Dynamo's guards: every change is seen, and Dynamo compiles again where it would anyhow."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from slow import SLOW
from torch import nn
from torch._dynamo import config
from toy import WIDTH, toy_inputs

import hvcompile.backend
from hvcompile.runtime import structure
from hvcompile.torch_private import dynamo, guards
from hvcompile.torch_private.guards import Fact, Step, look_first

# fp32 within a run of the same kernels; half precision is compared at its own accuracy.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "FEWEST_WEIGHTS", 0)


@pytest.fixture(autouse=True)
def _without_dynamos_own_quick_way() -> Iterator[None]:
    """As torch 2.12 and 2.13 are; with 2.11's default there is no look."""
    with config.patch(use_recursive_dict_tags_for_guards=False):
        yield


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every look at a model: whether it said yes by itself."""
    taken: list[bool] = []

    class Watched(structure.Look):
        def check(self, variables: Any, closely: Any) -> bool:
            asked = []

            def ask(others: Any) -> bool:
                asked.append(True)
                return bool(closely(others))

            holds = super().check(variables, ask)
            taken.append(not asked)
            return holds

    monkeypatch.setattr(hvcompile.backend, "Look", Watched)
    return taken


class Mix:
    """What an attention processor is: a callable object that is an attribute of a module."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.gain


class Scaled(Mix):
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.gain * 0.5 + 0.1


class Block(nn.Module):
    """A block with what models guard on: an eps, a number of heads, a flag, a processor, a dropout, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(0.5)
        self.heads, self.is_residual, self.processor = 2, True, Mix()
        self.shift: Any
        self.register_buffer("shift", torch.full((WIDTH,), 0.1))

    def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> Any:
        query = self.query(self.norm(hidden + time[:, None])).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(query, query, query).transpose(1, 2).flatten(2)
        mixed = self.drop(self.out(self.processor(mixed) + self.shift))
        return hidden + mixed if self.is_residual else mixed


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.time, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.blocks: Any = nn.ModuleList(Block() for _ in range(3))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        sample = sample.to(self.embed.weight.dtype)
        time = self.time((timestep[:, None] / 1000).to(sample.dtype).expand(-1, WIDTH))
        hidden = self.embed(sample)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.head(hidden)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    given = toy_inputs(seed, tokens=7)
    return {"sample": given["sample"], "timestep": given["timestep"]}


def hvfast(model: nn.Module, lower: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend="hvfast", fullgraph=True, options={"lower": lower, "mode": "exact", **options})


def plain(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


class Twice(nn.Module):
    """A layer with another in it, as peft wraps one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, {"default": 0.5}
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.base_layer(hidden) + self.scaling["default"] * self.up(self.down(hidden))


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def set_weight(weight: torch.Tensor, requires_grad: bool = False) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.blocks[1].query.weight = nn.Parameter(weight, requires_grad=requires_grad)

    return change


def set_data(of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name in ("query", "out"):
            weight = getattr(model.blocks[1], name).weight
            weight.data = of(weight.data)

    return change


def put(path: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value() if callable(value) else value)

    return change


def put_directly(place: str, name: str, value: Callable[[], Any]) -> Callable[[Any], None]:
    """As torch and accelerate write: past ``__setattr__``."""

    def change(model: Any) -> None:
        getattr(model.blocks[1].query, place)[name] = value()

    return change


class Renamed(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def reclass(model: Any) -> None:
    model.blocks[1].query.__class__ = Renamed


def own_forward(model: Any) -> None:
    layer = model.blocks[1].query
    layer.forward = lambda hidden: nn.functional.linear(hidden, layer.weight) * 3


def transpose_in_place(model: Any) -> None:
    model.blocks[1].query.weight.t_()


def set_storage(model: Any) -> None:
    model.blocks[1].query.weight.set_(noise(WIDTH, 2 * WIDTH)[:, ::2])


def widen(model: Any) -> None:
    block = model.blocks[1]
    block.query, block.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
    block.shift = torch.zeros(2 * WIDTH)


def tie(model: Any) -> None:
    model.blocks[2].query.weight = model.blocks[1].query.weight


def shorten(model: Any) -> None:
    del model.blocks[2]


def lengthen(model: Any) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def reorder(model: Any) -> None:
    parts = model.blocks._modules
    parts["0"], parts["2"] = parts["2"], parts["0"]


def parametrise(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[1].query)


class Doubled(nn.Module):
    def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> Any:
        return hidden * 2 + time[:, None]


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight of the same kind": set_weight(noise(WIDTH, WIDTH)),
    "a weight that requires gradients": set_weight(noise(WIDTH, WIDTH), requires_grad=True),
    "a weight of other strides": set_weight(noise(WIDTH, WIDTH).T),
    "a weight of another class": put("blocks.1.shift", lambda: nn.Buffer(noise(WIDTH))),
    "requires_grad_": lambda model: model.requires_grad_(False),
    ".data of other strides": set_data(lambda data: data.T.contiguous().T),
    ".data of the same kind": set_data(lambda data: data * 2),
    "weights of another shape": widen,
    "double()": lambda model: model.double(),
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "to(dtype) and back": lambda model: model.double().float(),
    "t_()": transpose_in_place,
    "set_()": set_storage,
    "a write past __setattr__": put_directly("_parameters", "weight", lambda: nn.Parameter(noise(WIDTH, WIDTH))),
    "a bias that is None": put_directly("_parameters", "bias", lambda: None),
    "a buffer": put("blocks.1.shift", lambda: noise(WIDTH)),
    "tied weights": tie,
    "another block": put("blocks.1", lambda: Block().eval()),
    "a block of another class": put("blocks.1", Doubled),
    "norm = Identity()": put("blocks.1.norm", nn.Identity),
    "a block more": lengthen,
    "a block less": shorten,
    "blocks in another order": reorder,
    "an adapter": lambda model: setattr(model.blocks[1], "query", Twice(model.blocks[1].query)),
    "weight norm": parametrise,
    "another __class__": reclass,
    "a forward of its own": own_forward,
    "eps": put("blocks.1.norm.eps", 0.5),
    "normalized_shape": put("blocks.1.norm.normalized_shape", (WIDTH,)),
    "heads": put("blocks.1.heads", 4),
    "a flag": put("blocks.1.is_residual", False),
    "a flag by another type": put("blocks.1.is_residual", 0),
    "a processor": put("blocks.1.processor", Scaled),
    "a processor's gain": lambda model: setattr(model.blocks[1].processor, "gain", 2.5),
    "an attribute that nobody reads": put("blocks.1.note", "new"),
    "training of one module": put("blocks.1.drop.training", True),
    "training": lambda model: model.train(),
    "p of a dropout": put("blocks.1.drop.p", 0.25),
}


def num_compiled_by(change: Callable[[Any], object], compile_with: Callable[[nn.Module], Any]) -> int:
    """Change a compiled model, compare it with itself run eagerly, and count what Dynamo compiled for the change."""
    torch.compiler.reset()
    model = Model().eval()
    compiled = compile_with(model)
    for seed in (1, 2):
        torch.testing.assert_close(compiled(**inputs(seed)), model(**inputs(seed)))
    before = dynamo.num_captured()
    change(model)
    for seed in (3, 4):
        torch.manual_seed(seed)  # for dropout
        expected = model.forward(**inputs(seed))
        torch.manual_seed(seed)
        result = compiled(**inputs(seed))
        torch.testing.assert_close(result, expected, rtol=CLOSE[expected.dtype], atol=CLOSE[expected.dtype])
    return dynamo.num_captured() - before


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_is_seen_as_dynamo_sees_it(name: str, looks: list[bool]) -> None:
    made = num_compiled_by(CHANGES[name], hvfast)
    assert any(looks), "no look said yes: nothing was tried"
    assert made == num_compiled_by(CHANGES[name], plain)


@pytest.mark.parametrize("name", ["half()", "another block", "heads", "a buffer"])
@torch.no_grad()
def test_a_change_is_seen_by_inductor_too(name: str, looks: list[bool]) -> None:
    made = num_compiled_by(CHANGES[name], lambda model: hvfast(model, lower="inductor"))
    assert any(looks)
    assert made == num_compiled_by(CHANGES[name], plain)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("name", MODES)
@torch.no_grad()
def test_a_mode_is_seen_as_dynamo_sees_it(name: str, looks: list[bool]) -> None:
    made = []
    ways: tuple[Callable[[nn.Module], Any], ...] = (hvfast, plain)
    for compile_with in ways:
        torch.compiler.reset()
        model = Model().eval()
        compiled = compile_with(model)
        compiled(**inputs(1)), compiled(**inputs(2))
        before = dynamo.num_captured()
        for seed in (3, 4):
            with MODES[name]():
                expected, result = model(**inputs(seed)), compiled(**inputs(seed))
                assert result.requires_grad == expected.requires_grad
            tolerance = CLOSE[expected.dtype]
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(compiled(**inputs(seed)), model(**inputs(seed)))
        made.append(dynamo.num_captured() - before)
    assert any(looks)
    assert made[0] == made[1]


def hunyuan_video() -> Any:
    return zoo.build_hunyuan_video(num_layers=0, num_single_layers=2)


def another_processor(model: Any) -> None:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

    class Louder(HunyuanVideoAttnProcessor2_0):  # type: ignore[misc]
        def __call__(
            self,
            attn: Any,
            hidden_states: Any,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
            image_rotary_emb: Any = None,
        ) -> Any:
            first, second = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return 2 * first, second

    last = {name: Louder() for name in model.attn_processors if name.startswith("single")}
    model.set_attn_processor({**model.attn_processors, **last})


def add_adapter(model: Any, name: str = "first") -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False), name)
    model.requires_grad_(False)


ADAPTERS: tuple[tuple[str, Callable[[Any], object]], ...] = (
    ("processors", another_processor),
    ("added", add_adapter),
    ("scaled", lambda model: model.set_adapters("first", 0.3)),
    ("disabled", lambda model: model.disable_adapters()),
    ("enabled", lambda model: model.enable_adapters()),
    ("another", lambda model: add_adapter(model, "second")),
    ("switched", lambda model: model.set_adapters("first", 1.0)),
    ("fused", lambda model: model.fuse_lora(0.7)),
    ("unfused", lambda model: model.unfuse_lora()),
    ("deleted", lambda model: model.delete_adapters(["first", "second"])),
    ("unloaded", lambda model: model.unload_lora()),
)


@torch.no_grad()
def test_what_diffusers_and_peft_change(looks: list[bool]) -> None:
    """As often as by Dynamo's own guards, and no less often than a plain backend, for which a scale may be an input."""
    pytest.importorskip("peft")
    given = zoo.inputs_hunyuan_video()
    made: list[list[tuple[str, int]]] = []
    with config.patch(recompile_limit=64):
        for compile_with in (hvfast, lambda model: hvfast(model, guards="dynamo"), plain):
            torch.compiler.reset()
            model, counts = hunyuan_video(), []
            compiled = compile_with(model)
            compiled(**given)
            for name, change in ADAPTERS:
                change(model)
                before = dynamo.num_captured()
                result, expected = compiled(**given)[0], model(**given)[0]
                tolerance = CLOSE[expected.dtype]
                torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=name)
                compiled(**given)
                counts.append((name, dynamo.num_captured() - before))
            made.append(counts)
    assert any(looks)
    assert made[0] == made[1]
    assert all(ours >= theirs for (_, ours), (_, theirs) in zip(made[0], made[2], strict=True))


@torch.no_grad()
def test_hooks_are_seen_where_dynamo_is_told_to_see_them() -> None:
    def change(model: Any) -> None:
        model.blocks[1].query.register_forward_hook(lambda layer, given, result: result * 2)

    with config.patch(skip_nnmodule_hook_guards=False):
        assert num_compiled_by(change, hvfast) == num_compiled_by(change, plain) == 1


@torch.no_grad()
def test_models_of_one_class_share_a_graph_and_are_told_apart(looks: list[bool]) -> None:
    models = [Model(seed).eval() for seed in range(3)]
    models[2].blocks[1].heads = 4
    compiled = [hvfast(model) for model in models]
    for number in (0, 1, 2, 0, 1, 2):
        given = inputs(number + 5)
        torch.testing.assert_close(compiled[number](**given), models[number](**given), rtol=1e-4, atol=1e-5)
    assert looks[-1]


@torch.no_grad()
def test_a_model_that_went_is_not_taken_for_the_next_at_its_address(looks: list[bool]) -> None:
    for seed in range(6):
        model = Model(seed).eval()
        model.blocks[1].heads = 2 if seed % 2 else 4
        model.blocks[0].norm.eps = 1e-5 * (1 + seed % 3)
        compiled = hvfast(model)
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs(seed)), model(**inputs(seed)))
        gone: list[Any] = [weakref.ref(model), *map(weakref.ref, model.parameters())]
        del compiled
        del model
        gc.collect()
        assert not any(item() is not None for item in gone), "something holds the model or its weights"
    assert any(looks)


@torch.no_grad()
def test_threads_that_change_their_models(looks: list[bool]) -> None:
    models = [Model(seed).eval() for seed in range(3)]
    compiled = [hvfast(model) for model in models]
    for model, run in zip(models, compiled, strict=True):
        run(**inputs())
        model.blocks[1].heads = 4
        run(**inputs())
        model.blocks[1].heads = 2
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                for turn in range(20):
                    models[number].blocks[1].heads = 4 if turn % 3 == number else 2
                    given = inputs(turn)
                    torch.testing.assert_close(compiled[number](**given), models[number](**given))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert any(looks)


@torch.no_grad()
def test_a_users_filter_drops_what_it_drops_without_us() -> None:
    types: list[list[str]] = []
    skip_modules: Any = torch.compiler.skip_guard_on_all_nn_modules_unsafe

    def keep_no_modules(entries: Any) -> list[bool]:
        types.append(sorted(entry.guard_type for entry in entries))
        return list(skip_modules(entries))

    ways: tuple[Callable[[nn.Module], Any], ...] = (
        lambda model: hvfast(model, guard_filter_fn=keep_no_modules),
        lambda model: torch.compile(
            model, backend="aot_eager", fullgraph=True, options={"guard_filter_fn": keep_no_modules}
        ),
    )
    for compile_with in ways:
        torch.compiler.reset()
        model = Model().eval()
        compiled = compile_with(model)
        first = compiled(**inputs())
        model.blocks[1].heads = 4  # the user asked for this not to be seen
        before = dynamo.num_captured()
        torch.testing.assert_close(compiled(**inputs()), first)
        assert dynamo.num_captured() == before
    assert types[0] == types[1]


@torch.no_grad()
def test_the_reason_for_compiling_again_is_dynamos() -> None:
    model = Model().eval()
    compiled = hvfast(model)
    compiled(**inputs())
    model.blocks[1].heads = 4
    with config.patch(error_on_recompile=True), pytest.raises(Exception, match="heads"):
        compiled(**inputs())


@torch.no_grad()
def test_guards_stay_as_they_are_where_dynamo_is_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, looks: list[bool]
) -> None:
    def unforeseen(*_: Any) -> Any:
        raise AttributeError("no such thing any more")

    caplog.set_level(logging.DEBUG, logger=guards.__name__)
    absent: list[tuple[Any, str, Any]] = [
        (guards, "_second_tree", unforeseen),
        (guards._Reader, "facts", unforeseen),
        (guards, "TracingContext", None),
    ]
    for place, name, instead in absent:
        with monkeypatch.context() as patched:
            patched.setattr(place, name, instead)
            assert num_compiled_by(CHANGES["heads"], hvfast) == 1
        assert not looks
        assert "AttributeError" in caplog.text
        caplog.clear()
    look_first(structure.Look)  # nothing is being compiled


@torch.no_grad()
def test_a_look_that_never_says_yes_is_given_up() -> None:
    look, model = structure.Look(), nn.LayerNorm(3)
    own = look.place(look.place(-1, Step.LOCAL, "self"), Step.DICT)
    look.add(Fact.CONSTANT, look.place(own, Step.ITEM, "eps"))
    asked = []

    def closely(_: Any) -> bool:
        asked.append(True)
        return True

    for turn in range(3 * structure.MOST_MISSES):
        model.eps = float(f"1e-{turn % 5}")  # a new object each time, as one that a forward computes
        assert look.check({"self": model}, closely)
    before = len(asked)
    assert look.check({"self": model}, closely)
    assert len(asked) == before + 1, "it is given up, so that the facts are looked at closely"


def test_what_changes_while_it_is_looked_at_is_not_remembered() -> None:
    look, model = structure.Look(), nn.LayerNorm(3)
    own = look.place(look.place(-1, Step.LOCAL, "self"), Step.DICT)
    look.add(Fact.CONSTANT, look.place(own, Step.ITEM, "eps"))

    turn = iter(range(9))

    def change(_: Any) -> bool:
        model.eps = float(f"0.{next(turn)}5")  # another thread, after it has been looked at
        return True

    assert look.check({"self": model}, change)
    assert not look.check({"self": model}, lambda _: False)


@torch.no_grad()
def test_the_look_is_left_out_where_it_would_not_pay(monkeypatch: pytest.MonkeyPatch, looks: list[bool]) -> None:
    assert num_compiled_by(CHANGES["heads"], lambda model: hvfast(model, guards="dynamo")) == 1
    assert not looks
    with config.patch(use_recursive_dict_tags_for_guards=True):
        assert num_compiled_by(CHANGES["heads"], hvfast) == 1
    assert not looks
    monkeypatch.setattr(guards, "FEWEST_WEIGHTS", 1000)
    assert num_compiled_by(CHANGES["heads"], hvfast) == 1
    assert not looks


class Broken(Model):
    """Two graphs, the second of which starts in the middle of ``forward``."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        time = self.time((timestep[:, None] / 1000).expand(-1, WIDTH))
        hidden = self.blocks[0](self.embed(sample), time)
        torch._dynamo.graph_break()
        for block in self.blocks[1:]:
            hidden = block(hidden, time)
        return self.head(hidden)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((Model, name) for name in ("heads", "a write past __setattr__")),
        *((Broken, name) for name in ("eps", "norm = Identity()")),
        *(pytest.param(Model, name, marks=SLOW) for name in ("eps", "norm = Identity()")),
        *(pytest.param(Broken, name, marks=SLOW) for name in ("heads", "a write past __setattr__")),
    ],
)
@torch.no_grad()
def test_symbolic_sizes_and_graph_breaks(name: str, kind: type[Model], looks: list[bool]) -> None:
    made = []
    for setting in ("quick", "dynamo"):  # backends differ in what they ask of symbolic sizes
        torch.compiler.reset()
        model = kind().eval()
        options: Any = {"lower": "aot", "mode": "exact", "guards": setting}
        compiled = torch.compile(model, backend="hvfast", dynamic=True, options=options)
        compiled(**inputs(1)), compiled(**inputs(2))
        before = dynamo.num_captured()
        CHANGES[name](model)
        for tokens in (7, 5):
            given = {**inputs(3), "sample": inputs(3)["sample"][:, :tokens]}
            torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-4, atol=1e-5)
        made.append(dynamo.num_captured() - before)
    assert any(looks)
    assert made[0] == made[1]
