"""Calls that change a model's adapters, each on a model compiled by hvfast and on an eager one."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders import PeftAdapterMixin
from oracle import first, hvfast, relative_error
from wide import Wide, wide_inputs

import hvcompile
from hvcompile.float8.weights import Joined, QuantizedWeight

MODES: dict[str, dict[str, Any]] = {
    "exact": {"fp8": False, "first_block_cache": False},
    "cache": {"fp8": False, "first_block_cache": {"threshold": 1e9}},
    "float8": {"fp8": {"keep_last_blocks": 0, "keep_original": "cpu"}, "first_block_cache": False},
    "two ranks": {"fp8": False, "first_block_cache": False, "context_parallel": True},
}
"""Options by name. In "cache" every step is reused that may be."""
BOUNDS = {"exact": 1e-4, "cache": 1e-4, "float8": 1e-2, "two ranks": 1e-4}
"""The largest difference from eager with the same adapters, relative to the largest value."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Adapted(PeftAdapterMixin, Wide):  # type: ignore[misc]
    """A model of a few lines that takes adapters as those of diffusers do."""


def model() -> Any:
    """A HunyuanVideo wide enough for float8; the same weights every time."""
    torch.manual_seed(0)
    made = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=64,
        pooled_projection_dim=16,
        rope_axes_dim=(8, 12, 12),
    )
    return made.eval()


def inputs(step: int) -> dict[str, Any]:
    """A step's: the same text, another sample, a lower timestep."""
    text, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + step)
    return {
        "hidden_states": torch.randn(1, 4, 3, 6, 10, generator=noise),
        "timestep": torch.full((1,), 900.0 - 10 * step),
        "encoder_hidden_states": torch.randn(1, 9, 64, generator=text),
        "encoder_attention_mask": (torch.arange(9) < 6).float()[None],
        "pooled_projections": torch.randn(1, 16, generator=text),
        "guidance": torch.full((1,), 6000.0),
        "return_dict": False,
    }


def small_inputs(step: int) -> dict[str, Any]:
    """The same of ``Adapted``."""
    given = wide_inputs(seed=7) | {"timestep": torch.full((1,), 900.0 - 10 * step)}
    return given | {"sample": wide_inputs(seed=100 + step)["sample"]}


def small() -> Any:
    """An ``Adapted``."""
    return Adapted()


def add(
    made: Any,
    seed: int,
    *,
    name: str = "a",
    rank: int = 4,
    alpha: int | None = None,
    targets: Sequence[str] | str = ATTENTION,
    size: float = 0.7,
) -> None:
    """Add an adapter whose effect is plain to see and no larger than the model's own."""
    from peft import LoraConfig

    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets, init_lora_weights=False)
    made.add_adapter(config, name)
    generator = torch.Generator().manual_seed(seed)
    for path, weight in made.named_parameters():
        if f"lora_A.{name}." in path or f"lora_B.{name}." in path:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5 * size)
    made.eval()


@functools.cache
def file(
    build: Callable[[], Any], seed: int, *, rank: int = 4, alpha: int | None = None
) -> tuple[tuple[str, Any], ...]:
    """The arguments by which ``load_lora_adapter`` takes a file."""
    made, folder = build(), tempfile.mkdtemp(prefix="hvcompile-lora-")
    add(made, seed, rank=rank, alpha=alpha)
    made.save_lora_adapter(folder, adapter_name="a")
    arguments = {
        "pretrained_model_name_or_path_or_dict": folder,
        "weight_name": "pytorch_lora_weights.safetensors",
        "prefix": None,
        "use_safetensors": True,
        "adapter_name": "a",
    }
    return tuple(arguments.items())


def load(made: Any, seed: int = 1, *, hotswap: bool = False, **how: Any) -> None:
    """Load a file as "a", or swap its weights for those that are there."""
    build = small if isinstance(made, Adapted) else model
    made.load_lora_adapter(**dict(file(build, seed, **how)), hotswap=hotswap)


def swap(seed: int, **how: Any) -> Callable[[Any], None]:
    """A hot swap."""
    return lambda made: load(made, seed, hotswap=True, **how)


def reload(seed: int, **how: Any) -> Callable[[Any], None]:
    """The adapter deleted, and another file loaded by its name."""

    def change(made: Any) -> None:
        made.delete_adapters("a")
        load(made, seed, **how)

    return change


def ready_to_swap(made: Any) -> None:
    """As diffusers wants it where ranks or scales will differ."""
    made.enable_lora_hotswap(target_rank=8)
    load(made)


def two(made: Any) -> None:
    """Two adapters of other ranks and targets at once."""
    load(made)
    add(made, 5, name="b", rank=2, targets=r".*blocks\.1\..*(to_q|to_v|proj_mlp|up)")
    made.set_adapters(["a", "b"], [1.0, 0.5])


def enable(made: Any) -> None:
    """On again, by another scale: what comes back as it was may rightly reuse what it computed then."""
    made.enable_lora()
    made.set_adapters("a", 0.7)


def fuse(made: Any) -> None:
    """The way to fuse on a model in float8; elsewhere ``restore`` does nothing."""
    hvcompile.restore(made)
    made.fuse_lora(lora_scale=0.5)


def unfuse(made: Any) -> None:
    """Taken out again, and on by another scale."""
    hvcompile.restore(made)
    made.unfuse_lora()
    made.set_adapters("a", -1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is done to a model between two steps.

    Attributes:
        prepare: what was done to it before it is compiled.
        changes: one after the other, a step after each; none leads back to what was there before.
        recompiles: how many they cause together.
        on_float8: the same where the layers are in float8; None for as many.

    """

    prepare: Callable[[Any], None]
    changes: tuple[Callable[[Any], object], ...]
    recompiles: int
    on_float8: int | None = None

    def expected(self, mode: str) -> int:
        """How many compilations the changes cause in a mode."""
        return self.recompiles if mode != "float8" or self.on_float8 is None else self.on_float8


def scale(*weights: float) -> Callable[[Any], None]:
    """Other weights for the adapters "a" and "b"."""
    return lambda made: made.set_adapters(["a", "b"][: len(weights)], list(weights))


CALLS: dict[str, Call] = {
    "`set_adapters`: other scales": Call(prepare=load, changes=(scale(0.3), scale(-1.0), scale(0.0)), recompiles=0),
    "`set_adapters`: other scales of two adapters": Call(
        prepare=two, changes=(scale(0.3, 0.6), scale(-1.0, 1.2)), recompiles=0
    ),
    "`set_adapters`: one of two adapters": Call(prepare=two, changes=(scale(0.3), scale(0.9, 0.4)), recompiles=1),
    "`disable_lora`, `enable_lora`": Call(
        prepare=load, changes=(lambda made: made.disable_lora(), enable), recompiles=1
    ),
    "`hotswap=True`, equal rank": Call(prepare=load, changes=(swap(2), swap(3)), recompiles=0),
    "`hotswap=True`, another scale": Call(prepare=load, changes=(swap(2, alpha=7), swap(3)), recompiles=0),
    "`hotswap=True` after `enable_lora_hotswap(target_rank=8)`: ranks 4, 8 and 2, other scales": Call(
        prepare=ready_to_swap, changes=(swap(2, rank=8), swap(3, alpha=7), swap(4, rank=2)), recompiles=0
    ),
    "`set_adapters` after `enable_lora_hotswap`": Call(
        prepare=ready_to_swap, changes=(scale(0.5), scale(1.4), swap(2, rank=8), scale(-0.6)), recompiles=1
    ),
    "`hotswap=True`, ten in a row": Call(prepare=load, changes=tuple(swap(seed) for seed in (2, 3) * 5), recompiles=0),
    "another file, equal rank, ten in a row": Call(
        prepare=load, changes=tuple(reload(seed) for seed in (2, 3) * 5), recompiles=0
    ),
    "another file, another rank, and back": Call(
        prepare=load, changes=(reload(2, rank=8), reload(3), reload(4, rank=8)), recompiles=1
    ),
    "`load_lora_adapter` on a model compiled without": Call(prepare=lambda _: None, changes=(load,), recompiles=1),
    "`unload_lora`": Call(prepare=load, changes=(lambda made: made.unload_lora(),), recompiles=1),
    "`hvcompile.restore`, `fuse_lora`, `unfuse_lora`": Call(
        prepare=load,
        changes=(fuse, unfuse),
        recompiles=1,
        on_float8=2,  # what is restored is another kind of parameter
    ),
}


def held_bytes(made: Any) -> int:
    """The memory of a model's weights and adapters, and of the float8 copies in the place of weights."""
    tensors = {*made.parameters(), *made.buffers()}
    for weight in made.parameters():
        joined: Joined | None = weight.joined if isinstance(weight, QuantizedWeight) else None
        tensors |= {joined.data, joined.scale} if joined is not None else set()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Pair:
    """A model that is compiled and one that is not, which get the same adapters and the same inputs."""

    def __init__(
        self, prepare: Callable[[Any], object], options: Mapping[str, Any], build: Callable[[], Any] = model, **how: Any
    ) -> None:
        torch._dynamo.reset()
        self.inputs = inputs if build is model else small_inputs
        self.made, self.eager = build(), build()
        for one in (self.made, self.eager):
            prepare(one)
        self.fast = hvfast(self.made, fullgraph=True, options={"context_parallel": False, **options}, **how)
        self.steps = 0
        self.most_bytes = 0

    def step(self) -> float:
        """Take a step with fresh noise; returns how far the compiled model is from the eager one."""
        self.steps += 1
        with torch.no_grad():
            actual, expected = (first(one(**self.inputs(self.steps))) for one in (self.fast, self.eager))
        self.most_bytes = max(self.most_bytes, held_bytes(self.made))
        assert bool(expected.isfinite().all())
        return relative_error(actual, expected)

    def change(self, change: Callable[[Any], object]) -> float:
        """Change both; returns how far that moves what the eager one computes."""
        with torch.no_grad():
            before = first(self.eager(**self.inputs(0)))
            for one in (self.made, self.eager):
                change(one)
            effect = relative_error(before, first(self.eager(**self.inputs(0))))
        self.most_bytes = max(self.most_bytes, held_bytes(self.made))
        return effect

    def was_reused(self) -> bool:
        """Whether the last step was taken from the cache."""
        steps = hvcompile.stats(self.fast).steps
        return bool(steps) and steps[-1].reused


def measure(name: str, mode: str, lower: str = "eager", build: Callable[[], Any] = model) -> dict[str, Any]:
    """A row of the table: what a call costs and whether what follows is right."""
    call = CALLS[name]
    pair = Pair(call.prepare, {"lower": lower, **MODES[mode]}, build)
    errors, effects, stale, reused = [pair.step()], [], 0, 0
    before = hvcompile.stats(pair.fast).recompiles
    for change in call.changes:
        effects.append(pair.change(change))
        errors.append(pair.step())
        stale += pair.was_reused()
        if mode == "cache":
            pair.step()
            reused += pair.was_reused()
    stats = hvcompile.stats(pair.fast)
    applied = [row.name for row in stats.journal[-1] if row.report.matched]
    return {
        "call": name,
        "mode": mode,
        "changes": len(call.changes),
        "graphs": stats.graphs,
        "recompiles": stats.recompiles - before,
        "error": max(errors),
        "effect": min(effects),
        "reused_after_a_change": stale,
        "reused_later": reused,
        "most_bytes": pair.most_bytes,
        "applied": applied,
    }


def measure_all(
    names: Sequence[str], mode: str, lower: str = "eager", build: Callable[[], Any] = model
) -> list[dict[str, Any]]:
    """Rows of several calls, as ranks give them."""
    return [measure(name, mode, lower, build) for name in names]
