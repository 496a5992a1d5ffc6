"""The door to torch's caches of compiled code: what they ask of a graph of ours before they keep what came of it.

AOTAutograd's cache and Inductor's keep what they made of a graph, for other processes too. Their keys hold the graph's
code, the layout of its inputs, the settings and torch's own source; of a function that the graph calls they hold the
name alone. So they refuse functions from outside torch, and ``cond``, which nobody has marked as fit yet. Here both are
marked, under a digest of all of hvcompile's source: what such a name stands for changes with that alone. The settings
that choose a kernel of attention go with it. torch's keys lack them, though the choice is made as a graph is traced.

All names were checked on torch 2.11.0 and 2.13.0.

- ``torch._inductor.config.unsafe_marked_cacheable_functions``: names that both caches let through, and what their keys
  gain for each. Of ``cond``, its operands and its branches, which the key holds, say all that it does.
- ``torch._functorch.config.enable_autograd_cache``: of a tensor that is an attribute of the graph, AOTAutograd's cache
  knows the layout and not what it holds. Inductor's knows both.
- ``torch._functorch._aot_autograd.autograd_cache.check_node_safe``: whether AOTAutograd's key says all of a node. torch
  asks it of the outermost graph alone, and of none that it holds.
- ``torch._inductor.decomposition.select_decomp_table``: see ``lowering``.
- ``torch._C._get_sdp_priority_order``: which kernel of attention comes first, which ``sdpa_kernel`` sets.
- ``torch._dynamo.utils.counters``: how often a cache had a graph, had none, or refused it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_node_safe
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table

PACKAGE = Path(__file__).resolve().parent.parent
_COND = f"{torch.ops.higher_order.cond.__module__}.{torch.ops.higher_order.cond.__name__}"


@dataclasses.dataclass(frozen=True)
class Lookups:
    """How many graphs this process found compiled in AOTAutograd's cache, put there, and could do neither with."""

    found: int = 0
    compiled: int = 0
    refused: int = 0

    def since(self, before: Lookups) -> Lookups:
        """What came after ``before``."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(before), strict=True)
        return Lookups(*(max(0, now - then) for now, then in pairs))


NO_LOOKUPS = Lookups()


def lookups() -> Lookups:
    """What this process has looked up so far."""
    count = counters["aot_autograd"]
    return Lookups(*(count[f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")))


@functools.cache
def source_digest() -> str:
    """What differs where any line of hvcompile's source does, or a version of what its functions call."""
    digest = hashlib.sha256()
    for directory, folders, files in os.walk(PACKAGE, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                place = Path(directory, name)
                content = place.read_bytes()
                digest.update(f"{place.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    for package in ("torchao", "triton"):  # of which functions of ours are made
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


def settings_around() -> str:
    """What tracing a graph depends on that no key of torch's holds, or not of every version: see ``sdpa_kernel``."""
    cuda = torch.backends.cuda
    kernels: Any = (
        cuda.flash_sdp_enabled,
        cuda.mem_efficient_sdp_enabled,
        cuda.math_sdp_enabled,
        cuda.cudnn_sdp_enabled,
    )
    order: Any = getattr(torch._C, "_get_sdp_priority_order", list)
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return repr(([is_enabled() for is_enabled in kernels], list(order()), casts))


def marked_for_caches(module: fx.GraphModule) -> dict[str, str]:
    """The names in a graph that torch's caches are to let through, each with what their keys gain for it."""
    own = {
        f"{node.target.__module__}.{node.target.__name__}"
        for child in _graphs(module)
        for node in child.graph.nodes
        if node.op == "call_function" and str(getattr(node.target, "__module__", "")).startswith("hvcompile.")
    }
    users: dict[str, str] = inductor_config.unsafe_marked_cacheable_functions
    return {**users, **dict.fromkeys(sorted({_COND, *own}), f"{source_digest()} {settings_around()}")}


@contextlib.contextmanager
def no_unseen_content(module: fx.GraphModule) -> Iterator[None]:
    """Within, AOTAutograd's cache is not asked where the graph holds something whose content its key leaves out.

    That is a tensor, or in a body a function of somebody else's, of which the key has the name alone.
    """
    holds_tensors = any(
        not isinstance(getattr(child, str(node.target), None), torch.nn.Module)
        for child in _graphs(module)
        for node in child.graph.find_nodes(op="get_attr")
    )
    if holds_tensors or _calls_unknown_functions(module):
        with functorch_config.patch(enable_autograd_cache=False):
            yield
    else:
        yield


def _calls_unknown_functions(module: fx.GraphModule) -> bool:
    """Whether a graph that this one holds calls a function that torch would refuse in the outermost."""
    inner = (child for child in _graphs(module) if child is not module)
    with inductor_config.patch(unsafe_marked_cacheable_functions=marked_for_caches(module)):
        for child in inner:
            for node in child.graph.nodes:
                try:
                    if node.op == "call_function":
                        check_node_safe(node)
                except BypassAOTAutogradCache:
                    return True
    return False


def _graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (child for child in module.modules() if isinstance(child, fx.GraphModule))


class InductorsDecompositions(dict[Any, Any]):
    """Inductor's own decompositions, held by a body: pickled by name, since keys can't hold functions of C++."""

    def __reduce__(self) -> tuple[Any, ...]:
        return inductors_decompositions, ()


def inductors_decompositions() -> InductorsDecompositions:
    """Inductor's decompositions under its settings of now, which are part of every key too."""
    return InductorsDecompositions(select_decomp_table())
