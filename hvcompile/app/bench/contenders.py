"""The systems that are measured beside each other, and how each is put on a pipeline as its users would.

Peers come with ``pip install ".[bench]"``; none is imported before it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

EAGER, INDUCTOR, EXACT, HVFAST = "eager", "Inductor", "hvfast, exact", "hvfast"
DIFFUSERS, CACHE_DIT = "diffusers", "cache-dit"
TAYLOR_SEER, MAG_CACHE, CACHE_DIT_TAYLOR = "diffusers' TaylorSeer", "diffusers' MagCache", "cache-dit's TaylorSeer"
PEERS = (DIFFUSERS, CACHE_DIT, CACHE_DIT_TAYLOR, TAYLOR_SEER, MAG_CACHE)
"""Other projects' caches: one that is missing or fails is reported, and ends nothing."""
CACHED = (DIFFUSERS, CACHE_DIT, HVFAST)
"""Those that reuse steps, at a threshold."""


@contextlib.contextmanager
def applied(
    system: str,
    pipe: Any,
    *,
    threshold: float | None = None,
    options: Mapping[str, Any] | None = None,
    lower: str = "inductor",
    compile_peers: bool = False,
) -> Iterator[str]:
    """Put a system on a pipeline; gives in words how it runs, and takes it off again where it reaches beyond the model.

    Args:
        system: one of this module's names.
        pipe: a diffusers pipeline with a ``transformer`` that nothing was done to.
        threshold: of a cache; None where the system has none.
        options: further fields of hvfast's cache, or of a peer's.
        lower: "inductor", or "aot" or "eager" to try all out without the time that Inductor takes.
        compile_peers: compile the blocks of a peer's model too, as far as they compile; else a peer runs eagerly.

    Raises:
        ImportError: a peer is not installed.

    """
    transformer = pipe.transformer
    if system == INDUCTOR:
        transformer.compile(backend=_torch_backend(lower))
        yield f"torch.compile(backend={_torch_backend(lower)!r}), the whole model"
    elif system == EXACT:
        if lower == "inductor":
            transformer.compile(backend="hvfast", mode="exact")
        else:  # torch.compile takes a mode or options, never both
            from hvcompile.backend import hvfast

            transformer.compile(backend=functools.partial(hvfast, mode="exact", options={"lower": lower}))
        yield "torch.compile(backend='hvfast', mode='exact'), the whole model"
    elif system == HVFAST:
        given: dict[str, Any] = {} if lower == "inductor" else {"lower": lower}
        given["first_block_cache"] = {"threshold": threshold, **(options or {})}
        transformer.compile(backend="hvfast", options=given)
        yield "torch.compile(backend='hvfast'), the whole model"
    elif system == DIFFUSERS:
        from diffusers.hooks import FirstBlockCacheConfig

        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        # Its hooks break the graph of a block, so one graph a block can't be asked for.
        yield "FirstBlockCacheConfig, " + _block_by_block(transformer, compile_peers, lower)
    elif system in {TAYLOR_SEER, MAG_CACHE}:
        transformer.enable_cache(_forecasting(system, pipe, threshold, options or {}))
        yield f"{system}, " + _block_by_block(transformer, compile_peers, lower)
    elif system in {CACHE_DIT, CACHE_DIT_TAYLOR}:
        with _cache_dit(pipe, threshold, forecasts=system == CACHE_DIT_TAYLOR):
            yield "DBCacheConfig(F1B0), " + _block_by_block(transformer, compile_peers, lower)
    else:
        yield "no compiler"


@contextlib.contextmanager
def _cache_dit(pipe: Any, threshold: float | None, *, forecasts: bool) -> Iterator[None]:
    """cache-dit's cache, with one block in front and no warm-up, alone or with TaylorSeer."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, residual_diff_threshold=threshold
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig() if forecasts else None
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)  # it changes the pipeline's class, which the next model has too


def _forecasting(system: str, pipe: Any, threshold: float | None, options: Mapping[str, Any]) -> Any:
    """The configuration of one of diffusers' caches that go by more than the last computed step.

    ``options`` are the configuration's fields. TaylorSeer runs in its light form, which skips whole steps. MagCache
    needs ``mag_ratios``, which a run of its own measures.
    """
    from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig

    if system == TAYLOR_SEER:
        return TaylorSeerCacheConfig(use_lite_mode=True, taylor_factors_dtype=pipe.transformer.dtype, **options)
    return MagCacheConfig(threshold=threshold, **options)


def _torch_backend(lower: str) -> str:
    """The backend of torch's own that stops where ``lower`` does."""
    return {"inductor": "inductor", "aot": "aot_eager", "eager": "eager"}[lower]


def _block_by_block(transformer: Any, compiled: bool, lower: str) -> str:
    if not compiled:
        return "eager"
    transformer.compile_repeated_blocks(backend=_torch_backend(lower))
    suffix = "" if lower == "inductor" else f"backend={_torch_backend(lower)!r}"
    return f"compile_repeated_blocks({suffix})"


def blocks_of(transformer: Any) -> list[Any]:
    """The transformer's blocks: what its own module lists hold, not those of its embedders."""
    import torch

    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    return [block for part in lists for block in part]
