"""What people do to a model that is larger than the device, or quantised already, each compiled and beside eager."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import hooks
from lora_cases import BOUNDS, MODES
from oracle import first, hvfast, relative_error
from quantised_cases import KINDS
from torch import nn
from wide import Wide, wide_inputs

import hvcompile
from hvcompile.float8.saved import load_float8, save_float8
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.hollow import fetch
from hvcompile.hollow.host import HostWeight, num_bytes
from hvcompile.torch_private.storages import storage_id

CPU = torch.device("cpu")
BLOCKS = 5
"""Enough for an offload to show. Float8's own error grows with the depth: with 8, it is 1.1e-2 in all rows."""
Prepared = tuple[Any, Any]
"""The model to compile, and the one that eager runs."""


def model() -> Wide:
    """The same weights every time."""
    return Wide(blocks=BLOCKS)


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors that have memory, of which one of a subclass is made."""
    if isinstance(tensor, HostWeight):
        return
    if isinstance(tensor, QuantizedWeight):
        yield tensor.joined.scale
        if tensor.joined.memory is None:
            yield tensor.joined.data
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif not tensor.is_meta:
        yield tensor


def device_bytes(module: nn.Module) -> int:
    """The memory that a module's weights and buffers take on the device; what is kept on the host has none there."""
    held = {}
    for tensor in (*module.parameters(), *module.buffers()):
        for part in _parts(tensor):
            plain = part.as_subclass(torch.Tensor)
            held[storage_id(plain)] = plain.untyped_storage().nbytes()
    return sum(held.values())


class Meter:
    """Bytes that come to the device while a model runs, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, amount: int) -> None:
        self.now += amount
        self.most = max(self.most, self.now)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, around(own))
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextlib.contextmanager
def hooks_counted(meter: Meter) -> Iterator[None]:
    """Within, what the hooks of accelerate and diffusers bring for a module counts until they take it back."""
    from accelerate.hooks import AlignDevicesHook
    from diffusers.hooks.group_offloading import ModuleGroup
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    def weights(module: nn.Module) -> int:
        return sum(num_bytes(item) for item in module.parameters(recurse=False))

    def brings(own: Any) -> Any:
        def call(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            done = own(self, module, *args, **kwargs)
            meter.add(weights(module))
            return done

        return call

    def takes(own: Any) -> Any:
        def call(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            meter.add(-weights(module))
            return own(self, module, *args, **kwargs)

        return call

    def group(sign: int) -> Callable[[Any], Any]:
        def around(own: Any) -> Any:
            def call(self: Any) -> Any:
                done = own(self)
                meter.add(sign * sum(num_bytes(item) for module in self.modules for item in module.parameters()))
                return done

            return call

        return around

    with contextlib.ExitStack() as stack:
        for kind in (AlignDevicesHook, LayerwiseCastingHook):
            stack.enter_context(_replaced(kind, "pre_forward", brings))
            stack.enter_context(_replaced(kind, "post_forward", takes))
        stack.enter_context(_replaced(ModuleGroup, "onload_", group(1)))
        stack.enter_context(_replaced(ModuleGroup, "offload_", group(-1)))
        yield


@contextlib.contextmanager
def fetches_counted(meter: Meter) -> Iterator[None]:
    """Within, what a compiled graph brings from the host counts as long as it lives."""
    import weakref

    def around(own: Any) -> Any:
        def targets(hosts: Any, device: Any) -> Any:
            made = own(hosts, device)
            for item in made:
                if type(item) is torch.Tensor and not item.is_meta:
                    meter.add(num_bytes(item))
                    weakref.finalize(item.untyped_storage(), meter.add, -num_bytes(item))
            return made

        return targets

    with _replaced(fetch, "_targets", around):
        yield


def _both(change: Callable[[Any], object]) -> Callable[[str, Any], Prepared]:
    def prepare(_: str, __: Any) -> Prepared:
        made, eager = model(), model()
        change(made)
        change(eager)
        return made, eager

    return prepare


def _model_offload(made: Any) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(made, CPU)


def _sequential(made: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(made, execution_device=CPU)


def _group(made: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(made, CPU, CPU, offload_type="leaf_level")


def _layerwise(made: Any) -> None:
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(made, torch.bfloat16, torch.float32)


def _offloaded(_: str, __: Any) -> Prepared:
    made = model()
    hvcompile.offload(made, CPU)
    return made, model()


def _loaded(mode: str, options: Any) -> Prepared:
    """Saved by a model of the same options, with float8 where the mode has none."""
    given = {**options, "fp8": {"keep_last_blocks": 0}, "context_parallel": False}
    saved = model()
    with torch.no_grad():
        hvfast(saved, options=given)(**wide_inputs())
    with tempfile.TemporaryDirectory() as folder:
        save_float8(saved, folder)
        with torch.device("meta"):
            empty = model()
        made = load_float8(folder, empty)
    torch._dynamo.reset()
    if mode in {"cache", "two ranks"}:  # float8 too: the weights are there in no other form
        options["fp8"] = {"keep_last_blocks": 0}
    return made, model()


def _quantised(kind: str) -> Callable[[str, Any], Prepared]:
    return _both(lambda made: KINDS[kind](made.blocks))


CALLS: dict[str, Callable[[str, Any], Prepared]] = {
    "`enable_model_cpu_offload`": _both(_model_offload),
    "`enable_group_offload`": _both(_group),
    "`enable_sequential_cpu_offload`": _both(_sequential),
    "`enable_layerwise_casting`": _both(_layerwise),
    "`hvcompile.offload`": _offloaded,
    "torchao int8, weights": _quantised("int8 weights"),
    "torchao int8, dynamic": _quantised("int8 dynamic"),
    "torchao float8, weights": _quantised("float8 weights"),
    "GGUF Q8_0": _quantised("GGUF Q8_0"),
    "`hvcompile.load_float8`": _loaded,
}
HOOKED = ("`enable_group_offload`", "`enable_sequential_cpu_offload`", "`enable_layerwise_casting`")
"""Of these, hooks move the weights, and do so for eager as well, where they are counted."""
REFUSED = {
    *((name, mode) for name in HOOKED for mode in ("cache", "float8", "two ranks")),
    *((name, "float8") for name in CALLS if name.startswith(("torchao", "GGUF"))),
    ("`hvcompile.load_float8`", "exact"),
}
"""What can't be, and is an error before anything is compiled."""


def _settle_hooks() -> None:
    """Make accelerate keep its uncompiled hooks now.

    It does so at their first call. Where Dynamo traces that one and a backend raises, as some do here, all later calls
    of the process fail (accelerate 1.15: "'function' object has no attribute '_compiled_fn'").
    """
    for kind in vars(hooks).values():
        for hook in vars(kind).values() if isinstance(kind, type) else ():
            own = getattr(hook, "__wrapped__", None)
            if own is not None and not hasattr(hook, "_compiled_fn"):
                hook._compiled_fn = torch.compiler.disable(own)  # type: ignore[no-untyped-call]


_settle_hooks()


def bound(name: str, mode: str) -> float:
    """How far from eager a row may be."""
    return BOUNDS["float8"] if "load_float8" in name else BOUNDS[mode]


def measure(name: str, mode: str, lower: str = "eager") -> dict[str, Any]:
    """A row: three calls. The second repeats the first one's inputs, and is reused where there is a cache."""
    torch._dynamo.reset()
    row: dict[str, Any] = {"call": name, "mode": mode, "refused": None}
    options = {"lower": lower, "context_parallel": False, **MODES[mode]}
    try:
        made, eager = CALLS[name](mode, options)
        fast, brought = hvfast(made, options=options), Meter()
        errors, compiled = [], 0
        with torch.no_grad(), fetches_counted(brought):
            for seed in (1, 1, 2):
                actual = first(fast(**wide_inputs(seed=seed)))
                errors.append(relative_error(actual, first(eager(**wide_inputs(seed=seed)))))
                compiled = hvcompile.stats(fast).recompiles if len(errors) == 1 else compiled
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        told = next((line for line in lines if "raised:" not in line), type(error).__name__)
        return {**row, "refused": told.strip()}
    stats = hvcompile.stats(fast)
    return {
        **row,
        "graphs": stats.graphs + compiled,  # of a model in pieces, each counts
        "recompiles": stats.recompiles - compiled,
        "error": max(errors),
        "reused": sum(step.reused for step in stats.steps),
        "applied": sorted({item.name for journal in stats.journal for item in journal if item.report.matched}),
        "peak_bytes": _peak(name, made, eager, brought),
    }


def _peak(name: str, made: Any, eager: Any, brought: Meter) -> int:
    if name not in HOOKED:
        return device_bytes(made) + brought.most
    resting = device_bytes(eager) if "layerwise" in name else 0
    moved = Meter()
    with torch.no_grad(), hooks_counted(moved):
        eager(**wide_inputs())
    return resting + moved.most


def measure_all(names: Sequence[str], mode: str, lower: str = "eager") -> list[dict[str, Any]]:
    """Rows of several calls, as ranks give them."""
    return [measure(name, mode, lower) for name in names]


def is_right(row: dict[str, Any]) -> bool:
    """Whether a row is refused where it can't be, and elsewhere compiles once and computes what eager does."""
    if (row["call"], row["mode"]) in REFUSED:
        return row["refused"] is not None
    if row["refused"] is not None or row["recompiles"] > 0 or PASS_OF.get(row["mode"], "outline") not in row["applied"]:
        return (
            row["mode"] == "exact" and row["call"] in HOOKED and _is_close(row)
        )  # in pieces, of which none is outlined
    return _is_close(row)


def _is_close(row: dict[str, Any]) -> bool:
    return row["refused"] is None and bool(row["error"] <= bound(row["call"], row["mode"]))


PASS_OF = {"cache": "FirstBlockCache", "float8": "Float8Linears", "two ranks": "ShardedAttention"}
"""What must have been done in a mode."""
