"""Hooks that other libraries put around a model's modules, and what to use instead of each.

diffusers keeps them in a registry on the module, accelerate one on it; both put a ``forward`` of their own into the
instance. What such a hook does between two modules Dynamo mostly can't trace, so that it breaks the model into pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from hvcompile.torch_private import frames

LESS_MEMORY = (
    "pipe.enable_model_cpu_offload(), which moves whole models between calls, or hvcompile.offload(model), which "
    "brings blocks' weights inside the graph, or options={'fp8': True}, which stores weights in half"
)
OWN_CACHE = "hvfast's own first-block cache, which is on by default (model.disable_cache() takes the other off)"
OWN_FLOAT8 = "options={'fp8': True}, which keeps and multiplies weights in float8 inside the graph"
GROUP_OFFLOAD, LAYERWISE_CASTING = "group offload", "layerwise casting"
SEQUENTIAL_OFFLOAD = "sequential offload or a device map"

KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("group_offload", "GroupOffload", "LayerExecutionTracker"), GROUP_OFFLOAD, LESS_MEMORY),
    (("LayerwiseCasting", "PeftInputAutocastDisable"), LAYERWISE_CASTING, OWN_FLOAT8),
    (("_cache", "Cache", "pyramid_attention_broadcast"), "another cache", OWN_CACHE),
    (("AlignDevices",), SEQUENTIAL_OFFLOAD, LESS_MEMORY),
    (("context_parallel",), "context parallelism", "hvfast's own, which an initialised process group turns on"),
)
"""Parts of the name of a hook's class or file, what it is for, and what to use instead."""
UNKNOWN = "the model without it"


@dataclasses.dataclass(frozen=True)
class ForeignHook:
    """One kind of hook on a model: its class, what it is for, how many modules carry it, and what to use instead."""

    name: str
    purpose: str
    count: int
    instead: str


def hooks_on(module: nn.Module) -> list[Any]:
    """The hooks that diffusers and accelerate keep on one module, not on those below it."""
    own = vars(module)
    found = list(getattr(own.get("_diffusers_hook"), "hooks", {}).values())  # its registry stays when they go
    single = own.get("_hf_hook")
    # accelerate chains several in one.
    found += getattr(single, "hooks", [single]) if single is not None else []
    return found


def _kind(hook: Any) -> tuple[str, str]:
    name = f"{type(hook).__module__.rsplit('.', 1)[-1]}.{type(hook).__name__}"
    for parts, purpose, instead in KINDS:
        if any(part in name for part in parts):
            return purpose, instead
    return "", UNKNOWN


def foreign_hooks(model: nn.Module) -> list[ForeignHook]:
    """The kinds of hooks on a model and on all its modules, the most frequent first."""
    found: dict[str, tuple[Any, int]] = {}
    for module in model.modules():
        for hook in hooks_on(module):
            _, count = found.get(type(hook).__name__, (hook, 0))
            found[type(hook).__name__] = (hook, count + 1)
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return [ForeignHook(name, _kind(hook)[0], count, _kind(hook)[1]) for name, (hook, count) in ordered]


def hooks_between_layers(model: nn.Module) -> list[ForeignHook]:
    """The kinds of hooks that move or cast each layer by itself, so that no graph holds two blocks."""
    below = [hook for child in model.children() for hook in foreign_hooks(child)]
    names = {hook.name for hook in below if hook.purpose in {GROUP_OFFLOAD, SEQUENTIAL_OFFLOAD, LAYERWISE_CASTING}}
    return [hook for hook in foreign_hooks(model) if hook.name in names]


def describe(hooks: Sequence[ForeignHook]) -> str:
    """The hooks in words, and what to use instead of them."""
    named = ", ".join(
        f"{hook.name} on {hook.count} modules" + (f" ({hook.purpose})" if hook.purpose else "") for hook in hooks
    )
    instead = dict.fromkeys(hook.instead for hook in hooks)
    return f"{named}. Instead, use {'; or '.join(instead)}"


def _hooked(model: nn.Module) -> Iterator[tuple[str, frozenset[str]]]:
    """The path of the first and of the last module that carries each kind of hook, and the kinds on it."""
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for path, module in model.named_modules():
        for hook in hooks_on(module):
            if path:
                first.setdefault(type(hook).__name__, path)
                last[type(hook).__name__] = path
    own = [""] if hooks_on(model) else []
    for path in dict.fromkeys([*own, *first.values(), *last.values()]):
        yield path, frozenset(type(hook).__name__ for hook in hooks_on(model.get_submodule(path)))


def still_hooked(model: nn.Module, *, below: bool = False) -> Callable[[nn.Module], bool] | None:
    """What tells whether a module still carries the hooks that ``model`` carries now; None where it carries none.

    Libraries put on and take off all hooks of a kind together, so it looks at two modules a kind.

    Args:
        model: the module and those below it.
        below: leave the module itself out. What Dynamo made of its ``forward`` runs inside its own hooks.

    """
    known = tuple((path, names) for path, names in _hooked(model) if path or not below)
    if not known:
        return None

    def holds(module: nn.Module) -> bool:
        try:
            return all(
                frozenset(type(hook).__name__ for hook in hooks_on(module.get_submodule(path))) == names
                for path, names in known
            )
        except AttributeError:  # another module, without such a part
            return False

    return holds


# Three indices of the whole process, as Dynamo's verdicts are; they keep nothing alive. What tells whether a model
# still carries the hooks that it carried when last compiled; functions that Dynamo gave up in a model with hooks; and
# those that a model without hooks was given back, once, lest two models in turn have Dynamo try for ever.
_HOLDS: weakref.WeakKeyDictionary[nn.Module, Callable[[nn.Module], bool] | None] = weakref.WeakKeyDictionary()
_GIVEN_UP: WeakIdKeyDictionary = WeakIdKeyDictionary()
_GIVEN_BACK: weakref.WeakKeyDictionary[nn.Module, WeakIdKeyDictionary] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def had_hooks(model: nn.Module) -> bool:
    """Whether a model carried hooks when a piece of it was compiled."""
    return _HOLDS.get(model) is not None


def look_after(*, is_compiling: bool) -> None:
    """Keep what hooks did to a model from outliving them.

    Called where a graph is compiled, and at every call of one that is a piece of a model. What Dynamo made of the
    methods around it holds while the hooks are on. When they are off, methods that Dynamo gave up because of them are
    compiled again.
    """
    root = frames.called_module()
    if root is None:
        return
    with _LOCK:
        if is_compiling or root not in _HOLDS:
            # What told of hooks that are off now will tell of them when they come again.
            _HOLDS[root] = still_hooked(root) or _HOLDS.get(root)
        holds = _HOLDS[root]
        if holds is not None and holds(root):
            _GIVEN_BACK.pop(root, None)
            _GIVEN_UP.update(dict.fromkeys(frames.uncompiled_callers(), True))
            frames.guard_callers(functools.partial(still_hooked, below=True))
            return
        given_back = _GIVEN_BACK.setdefault(root, WeakIdKeyDictionary())
        for code in frames.uncompiled_callers():
            if code in _GIVEN_UP and code not in given_back:
                given_back[code] = True
                del _GIVEN_UP[code]
                frames.compile_again(code)
