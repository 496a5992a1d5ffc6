"""The oracle: diffusers' own first-block cache, run eagerly, and the denoising loop that both are driven by."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig

STEPS = 30


def hvfast(model: Any, **how: Any) -> Any:
    """``torch.compile(model, backend="hvfast")``; its annotations know neither nested options nor what comes back."""
    return torch.compile(model, backend="hvfast", **how)


def first(output: Any) -> torch.Tensor:
    """The first tensor of a model's output."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output


@dataclasses.dataclass
class Denoised:
    """The sample after the loop, and for each step whether it was reused."""

    sample: torch.Tensor
    reused: list[bool]


def timesteps(steps: int = STEPS, shift: float = 7.0, inverted: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """A flow-matching schedule as video pipelines use it; ``inverted`` rises, as Mochi's does."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=inverted)
    sigmas = torch.linspace(1.0, 0.0, steps + 1)[:-1].tolist()
    scheduler.set_timesteps(sigmas=sigmas)
    return scheduler


def denoise(
    call: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    sample: str = "hidden_states",
    scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    was_reused: Callable[[], bool] = lambda: False,
) -> Denoised:
    """Run a schedule from pure noise; every step gets fresh tensors for the sample and the timestep."""
    scheduler = copy.deepcopy(scheduler) if scheduler is not None else timesteps()
    latents, reused = inputs[sample], []
    batch = latents.shape[0]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            now = {**inputs, sample: latents, "timestep": timestep.expand(batch).to(inputs["timestep"].dtype)}
            velocity = first(call(**now, return_dict=False))
            channels = velocity.shape[1]
            stepped = scheduler.step(velocity, timestep, latents[:, :channels], return_dict=False)[0]
            latents = torch.cat([stepped, latents[:, channels:]], dim=1)
            reused.append(was_reused())
    return Denoised(latents, reused)


def diffusers_cached(
    model: Any, inputs: dict[str, Any], threshold: float, *, blocks: Sequence[str], **loop: Any
) -> Denoised:
    """The loop under diffusers' FirstBlockCacheConfig, eagerly; a step was reused if the last block did not run.

    ``model`` is a copy that the caller gives up: the hooks stay on it.
    """
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    ran: list[bool] = []
    last = model.get_submodule(blocks[-1])[-1]
    probe = next(module for name, module in last.named_modules() if isinstance(module, torch.nn.Linear))
    probe.register_forward_hook(lambda *_: ran.append(True))

    def was_reused() -> bool:
        reused = not ran
        ran.clear()
        return reused

    def call(**now: Any) -> Any:
        with model.cache_context("cond"):
            return model(**now)

    return denoise(call, inputs, was_reused=was_reused, **loop)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
