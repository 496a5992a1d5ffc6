"""The door to torch's caches of compiled code: what they ask of a graph of ours before they take it.

AOTAutograd's cache and Inductor's keep what they made of a graph, for other processes too. Their keys hold the graph's
code, the inputs' layout, the settings and torch's own source, but of what the graph calls they know the names alone.
So they refuse a graph with a ``cond``, and one that calls functions of ours. Here both are marked as known, under a
key of all the source code of hvcompile: what such a name stands for changes with that alone.

All names were checked on torch 2.11.0 and 2.13.0.

- ``torch._inductor.config.unsafe_marked_cacheable_functions``: names that both caches let through, and what the key
  gains for each. It is the documented way for functions from outside torch; ``cond`` is in it too, since its operator
  is not marked as cacheable. Nothing but the branches, which the key holds, and its operands say what it does.
- ``torch._functorch.config.enable_autograd_cache``: AOTAutograd's cache knows of a tensor that is an attribute of the
  graph its layout alone, and not what it holds. Inductor's cache knows both.
- ``torch._dynamo.utils.counters``: how often each cache had a graph, had none, or refused it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor.decomposition import select_decomp_table



class InductorsDecompositions(dict[Any, Any]):
    """Inductor's own decompositions, which a graph's body holds; a key of its caches names them and no function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return inductors_decompositions, ()


def inductors_decompositions() -> InductorsDecompositions:
    """Inductor's own decompositions, under its settings of now, which are part of each key too."""
    return InductorsDecompositions(select_decomp_table())


PACKAGE = Path(__file__).resolve().parent.parent
COND_NAME = f"{torch.ops.higher_order.cond.__module__}.{torch.ops.higher_order.cond.__name__}"


@functools.cache
def source_digest() -> str:
    """What differs where any line of hvcompile's source code does."""
    digest = hashlib.sha256()
    for directory, folders, files in os.walk(PACKAGE, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                place = Path(directory, name)
                digest.update(f"{place.relative_to(PACKAGE)}\0".encode())
                digest.update(place.read_bytes())
    return digest.hexdigest()


def _graphs(module: torch.nn.Module) -> Iterator[fx.GraphModule]:
    return (child for child in module.modules() if isinstance(child, fx.GraphModule))


def _own_functions(module: fx.GraphModule) -> Iterator[Callable[..., Any]]:
    for child in _graphs(module):
        for node in child.graph.find_nodes(op="call_function", sort=False) if False else child.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "__module__", "").startswith("hvcompile."):
                yield node.target


def marked(module: fx.GraphModule) -> dict[str, str]:
    """The names that torch's caches are to let through for a graph, each with what their key gains for it."""
    names = {f"{function.__module__}.{function.__name__}" for function in _own_functions(module)}
    return dict.fromkeys(sorted({COND_NAME, *names}), source_digest())


@contextlib.contextmanager
def of_known_tensors_only(module: fx.GraphModule) -> Iterator[None]:
    """Within, AOTAutograd's cache is not asked where the graph holds tensors whose content its key would leave out."""
    held = any(
        isinstance(getattr(child, str(node.target), None), torch.Tensor)
        for child in _graphs(module)
        for node in child.graph.find_nodes(op="get_attr")
    )
    with functorch_config.patch(enable_autograd_cache=False) if held else contextlib.nullcontext():
        yield
