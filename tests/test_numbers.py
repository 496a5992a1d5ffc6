"""Sizes and floats that Dynamo makes symbolic: one graph for all sizes, and no float is ever ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import nn
from toy import TEXT, WIDTH, Toy, toy_inputs

import hvcompile
from hvcompile.graph.subgraphs import is_call
from hvcompile.journal import Declined
from hvcompile.torch_private import fakes
from hvcompile.trunk.outline import recover

SIZES = [(3, 6, 10), (5, 10, 8), (2, 8, 12)]
"""Frames, height, width: no two are equal, nor equal to a number of channels, or Dynamo takes them for one size."""


def at_size(family: zoo.Family, seed: int, size: tuple[int, int, int]) -> dict[str, Any]:
    """A family's inputs at a number of frames, a height and a width."""
    inputs = family.inputs(seed=seed)
    frames, height, width = size
    draw, tokens = zoo.Draw(seed + 100), frames * height * width // 4
    channels = inputs["hidden_states"].shape[1]
    if family.name == "ltx":
        inputs["hidden_states"] = draw.normal(1, tokens, inputs["hidden_states"].shape[2])
        return inputs | {"num_frames": frames, "height": height // 2, "width": width // 2}
    if family.name == "cogvideox":
        inputs["image_rotary_emb"] = draw.angles(tokens, zoo.HEAD_DIM)
        return inputs | {"hidden_states": draw.normal(1, frames, inputs["hidden_states"].shape[2], height, width)}
    if family.name.startswith("flux"):
        ids = zoo.grid_ids(height, width)
        return inputs | {"hidden_states": draw.normal(1, height * width, 8), "img_ids": ids}
    return inputs | {"hidden_states": draw.normal(1, channels, frames, height, width)}


FAMILIES = ["hunyuan_video", "wan_t2v", "wan_i2v", "ltx", "cogvideox", "mochi", "flux_guided"]


def recompiles_of_torch(family: zoo.Family) -> int:
    """How often Dynamo compiles a model again at ``SIZES`` with a backend that does nothing."""
    compiled: list[int] = []

    def backend(module: Any, _: object) -> Any:
        compiled.append(1)
        return module.forward

    torch.compiler.reset()
    run = torch.compile(family.build(), backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for seed, size in enumerate(SIZES):
            run(**at_size(family, seed, size), return_dict=False)
    return len(compiled) - 1


def check_sizes(family: zoo.Family, dynamic: bool | None, tolerance: float = 1e-5, **options: Any) -> hvcompile.Stats:
    """Run a family at several sizes, each twice, against eager."""
    model = family.build()
    fast = hvfast(model, fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        for seed, size in enumerate(SIZES):
            inputs = at_size(family, seed, size)
            expected = first(family.build()(**inputs, return_dict=False))
            for _ in range(2):  # the second is reused where there is a cache
                assert relative_error(first(fast(**inputs, return_dict=False)), expected) < tolerance
    return hvcompile.stats(fast)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("hunyuan_video", True),
        ("ltx", True),
        ("wan_t2v", False),
        *(pytest.param(name, True, marks=SLOW) for name in FAMILIES if name not in {"hunyuan_video", "ltx"}),
        pytest.param("ltx", False, marks=SLOW),
    ],
)
def test_one_graph_for_several_sizes(name: str, cache: bool) -> None:
    """``dynamic=True``: as many graphs as torch itself needs, which is one but where the model fixes a size."""
    family = zoo.FAMILIES[name]
    stats = check_sizes(family, True, lower="eager", first_block_cache=cache)
    assert stats.hits == (len(SIZES) if cache else 0)
    assert (stats.graphs, stats.recompiles) == (1, recompiles_of_torch(family))
    assert stats.recompiles == 0 or name == "mochi"  # it gives a symbolic size to torch.linspace, which takes none


@pytest.mark.parametrize("name", ["wan_t2v", *(pytest.param(name, marks=SLOW) for name in ("hunyuan_video", "ltx"))])
def test_sizes_that_become_dynamic_by_themselves(name: str) -> None:
    family = zoo.FAMILIES[name]
    stats = check_sizes(family, None, lower="eager")
    assert (stats.graphs, stats.recompiles, stats.hits) == (1, 1, len(SIZES))  # the second size is compiled for all


@pytest.mark.parametrize(("name", "dims"), [("wan_t2v", (2, 3, 4)), ("flux_guided", (1,))])
def test_sizes_that_are_marked(name: str, dims: tuple[int, ...]) -> None:
    family = zoo.FAMILIES[name]
    fast = hvfast(family.build(), fullgraph=True, options={"lower": "aot"})
    with torch.no_grad():
        for seed, size in enumerate(SIZES):
            inputs = at_size(family, seed, size)
            for dim in dims:
                torch._dynamo.mark_dynamic(inputs["hidden_states"], dim)
            if "img_ids" in inputs:
                torch._dynamo.mark_dynamic(inputs["img_ids"], 0)
            expected = first(family.build()(**inputs, return_dict=False))
            for _ in range(2):
                assert relative_error(first(fast(**inputs, return_dict=False)), expected) < 1e-5
    assert (hvcompile.stats(fast).recompiles, hvcompile.stats(fast).hits) == (0, len(SIZES))


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        pytest.param("hunyuan_video", {"width": 64}, marks=SLOW),
        pytest.param("wan_t2v", {"num_attention_heads": 4, "ffn_dim": 128}, marks=SLOW),
        pytest.param("ltx", {"num_attention_heads": 4, "cross_attention_dim": 64}, marks=SLOW),
        pytest.param("flux_guided", {"num_attention_heads": 4}, marks=SLOW),
    ],
)
def test_float8_at_several_sizes(name: str, wide: dict[str, int]) -> None:
    """As far from eager as float8 is with fixed sizes."""
    family = zoo.FAMILIES[name]
    options = {"fp8": {"keep_last_blocks": 0}, "first_block_cache": False, "lower": "aot"}
    run = hvfast(family.build(**wide), fullgraph=True, dynamic=True, options=options)
    with torch.no_grad():
        for seed, size in enumerate(SIZES):
            inputs = at_size(family, seed, size)
            expected = first(family.build(**wide)(**inputs, return_dict=False))
            fixed = hvfast(family.build(**wide), fullgraph=True, dynamic=False, options=options | {"lower": "eager"})
            at_fixed_sizes = first(fixed(**inputs, return_dict=False))
            assert 0 < relative_error(at_fixed_sizes, expected) < 0.2
            assert relative_error(first(run(**inputs, return_dict=False)), at_fixed_sizes) < 2e-2
    stats = hvcompile.stats(run)
    assert stats.recompiles == 0
    assert next(row for row in stats.journal[0] if row.name == "Float8Linears").report.applied


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param("wan_t2v", True, marks=SLOW),
        pytest.param("hunyuan_video", True, marks=SLOW),
        pytest.param("ltx", False, marks=SLOW),
    ],
)
def test_through_inductor(name: str, cache: bool) -> None:
    stats = check_sizes(zoo.FAMILIES[name], True, tolerance=1e-4, first_block_cache=cache)
    assert (stats.graphs, stats.recompiles, stats.hits) == (1, 0, len(SIZES) if cache else 0)


class Normed(nn.Module):
    """A block that reads floats of three kinds: of its own, of a layer's, and one that the call gives."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, hidden: torch.Tensor, time: torch.Tensor, strength: float) -> torch.Tensor:
        change: torch.Tensor = self.out(self.norm(hidden) + time[:, None]) * self.scale * strength
        return hidden + change


class Floats(Toy):
    """``Toy`` with floats in its blocks, between them, and around them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = 1.25
        self.blocks = nn.ModuleList(Normed(0.2) for _ in range(3))

    blocks: Any  # to mypy every member of a module list is a module without attributes

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        text: torch.Tensor,
        *,
        strength: float = 1.0,
        between: float = 0.5,
        guidance: float = 3.5,
    ) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(WIDTH // 2) * 0.7)
        angles = (timestep * torch.ones(1))[:, None] / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + text.mean(dim=1)
        hidden = self.embed(sample) * guidance
        for block in self.blocks:
            hidden = block(hidden, time, strength) + between
        output: torch.Tensor = self.head(hidden) * self.gain * guidance
        return output


@pytest.mark.parametrize("lower", ["eager", "aot", pytest.param("inductor", marks=SLOW)])
def test_no_changed_float_is_ignored(lower: str) -> None:
    """Whatever is changed, the result is eager's; a float that no block reads compiles nothing anew."""
    model = Floats().eval()
    fast = hvfast(model, fullgraph=True, dynamic=True, options={"lower": lower, "first_block_cache": False})

    def recompiles(floats: dict[str, float] | None = None, tokens: int = 12) -> int:
        inputs: dict[str, Any] = {**toy_inputs(seed=tokens, tokens=tokens), **(floats or {})}
        with torch.no_grad():
            assert relative_error(fast(**inputs), model(**inputs)) < 1e-5
        return hvcompile.stats(fast).recompiles

    assert [recompiles(tokens=tokens) for tokens in (12, 9, 30)] == [0, 0, 0]
    before = recompiles({"guidance": 2.0})
    assert [recompiles({"guidance": guidance}) for guidance in (2.5, 7.25)] == [before, before]
    for floats in ({"strength": 0.75}, {"strength": 0.5}, {"between": 0.125}):
        recompiles(floats)
    assert recompiles({"strength": 1.0}) == recompiles({"strength": 0.75})
    before = recompiles()
    model.blocks[1].scale = 0.4
    assert recompiles() == before + 1
    assert len(hvcompile.stats(fast).journal[-1][0].report.matched) == 1
    assert "share 2 bodies" in hvcompile.stats(fast).journal[-1][0].report.matched[0]
    model.blocks[2].norm.eps = 0.5
    assert recompiles() == before + 2
    model.gain = 2.0
    assert recompiles() == before + 3


def test_a_timestep_that_is_a_python_float() -> None:
    """It stays an input, so that it costs no graph of its own a step, and the cache follows it."""
    model = Floats().eval()
    fast = hvfast(model, fullgraph=True, dynamic=True, options={"lower": "aot"})
    with torch.no_grad():
        for time in (900.0, 900.5, 870.25, 850.0):
            inputs: dict[str, Any] = toy_inputs() | {"timestep": time}
            expected = model(**inputs)
            if time < 900:
                hvcompile.reset(fast)
            assert relative_error(fast(**inputs), expected) < 1e-5
    assert hvcompile.stats(fast).recompiles == 0
    assert any(row.report.applied for row in hvcompile.stats(fast).journal[0] if row.name == "FirstBlockCache")


def test_a_generation_is_known_by_its_floats() -> None:
    """Another guidance as a Python float, read by no block, has a cache of its own."""
    model = Floats().eval()
    fast = hvfast(model, fullgraph=True, dynamic=True, options={"lower": "eager"})
    inputs = toy_inputs()
    with torch.no_grad():
        for guidance in (2.5, 4.5, 2.5):
            inputs["timestep"] = inputs["timestep"] - 1
            fast(**inputs, guidance=guidance)
    steps = hvcompile.stats(fast).steps
    assert [step.reused for step in steps][:2] == [False, False]
    assert steps[0].slot == steps[2].slot != steps[1].slot


class Masked(nn.Module):
    """A mask that may have a hole, floats in the blocks, and one that is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(3))

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        hidden = sample * guidance + (timestep / 1000).sin()[:, None, None]
        ones = torch.ones(sample.shape[:2], dtype=torch.bool)
        joint = torch.cat([ones, mask], dim=1)[:, None, None, :]
        for block in self.blocks:
            hidden, text = block(hidden, text, joint)
        return hidden * guidance


class MaskedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = 0.3

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joint = self.norm(torch.cat([hidden, text], dim=1))
        heads = joint.unflatten(2, (2, -1)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        changed = self.out(mixed.transpose(1, 2).flatten(2)) * self.scale
        return hidden + changed[:, : hidden.shape[1]], text + changed[:, hidden.shape[1] :]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_the_graph_for_inputs_that_do_not_fit_assumes_nothing_of_floats(dynamic: bool | None) -> None:
    """It is compiled at run time, when Dynamo can put no guards any more."""
    model = Masked().eval()
    fast = hvfast(model, fullgraph=True, dynamic=dynamic, options={"lower": "aot"})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for guidance, tokens in ((2.0, 12), (2.5, 12), (3.5, 12), (3.0, 9)):
            for hole in (False, True):
                mask = torch.ones(1, TEXT, dtype=torch.bool)
                mask[0, 1 if hole else -1] = False
                sample = torch.randn(1, tokens, WIDTH, generator=generator)
                text = torch.randn(1, TEXT, WIDTH, generator=generator)
                feed = (sample, torch.tensor([500.0]), text, mask, guidance)
                assert relative_error(fast(*feed), model(*feed)) < 1e-5
    assert hvcompile.stats(fast).unfit == 4


class Tiled(nn.Module):
    """A block that reads a size of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, height: int) -> torch.Tensor:
        rows = hidden.reshape(1, height, -1, WIDTH).mean(dim=2, keepdim=True)
        change: torch.Tensor = self.out(hidden).reshape(1, height, -1, WIDTH) * rows
        return hidden + change.flatten(1, 2)


class Tiles(nn.Module):
    """A model that takes one height alone, which its blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 4, 1, WIDTH))
        self.blocks = nn.ModuleList(Tiled() for _ in range(3))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        height = sample.shape[1]
        hidden = (sample + self.places).flatten(1, 2)
        for block in self.blocks:
            hidden = block(hidden, height)
        return hidden


def test_a_size_that_can_be_but_one_is_no_operand_of_a_body() -> None:
    """Inductor takes no number as an operand, and AOTAutograd would make one of such a symbol."""
    seen: list[Any] = []

    def keep(graph_module: torch.fx.GraphModule, _inputs: Any) -> Any:
        trunk = recover(graph_module)
        assert not isinstance(trunk, Declined)
        calls = [node for node in trunk.graph.nodes if is_call(node)]
        seen.extend(fakes.value(operand) for call in calls for operand in call.args[2:])
        return trunk.module.forward

    model, sample = Tiles(), torch.randn(1, 4, 6, WIDTH)
    compiled = torch.compile(model, backend=keep, dynamic=True, fullgraph=True)
    with torch.no_grad():
        (found, *_), expected = (compiled(sample),), model(sample)
    assert torch.allclose(found, expected, atol=1e-6)
    assert any(isinstance(value, torch.SymInt) for value in seen), "no size is symbolic: the test is void"
    assert not any(fakes.is_fixed(value) for value in seen)
