"""Biases of linear layers that become one product: put together once a step for all blocks, outside of the graph.

Not once for all: a bias that is written to through ``.data`` (a merged or swapped adapter) leaves no trace that the
host could see, and to compare them would read as much as to put them together does.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import is_parameter
from hvcompile.torch_private import fakes, kernels
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.linears import Linear
from hvcompile.trunk.trunk import Trunk


def biases_of(group: Sequence[Linear]) -> list[fx.Node]:
    """The biases of layers that are one product; of several layers all have one, or none."""
    return [item.bias for item in group if item.bias is not None]


def may_join_biases(group: Sequence[Linear], calls: Sequence[Mapping[str, fx.Node]]) -> bool:
    """Whether the layers' biases can be put together outside: there are several, and every block passes parameters.

    Args:
        group: layers of a body that become one product.
        calls: for each block of the body, what it passes for each placeholder.

    """
    biases = biases_of(group)
    return (
        len(biases) > 1
        and len(set(map(_kind, biases))) == 1
        and all(value(bias).ndim == 1 and isinstance(value(bias).shape[0], int) for bias in biases)
        and all(bias.op == "placeholder" and is_parameter(passed[bias.name]) for passed in calls for bias in biases)
    )


def join_biases(
    trunk: Trunk, groups: Sequence[Sequence[Linear]], calls: Sequence[Mapping[str, fx.Node]], tag: str
) -> Iterator[fx.Node]:
    """Add the joined biases of a body's groups as derived inputs; gives them by block, and in each by group."""
    wanted = [[passed[bias.name] for bias in biases_of(group)] for passed in calls for group in groups]
    if not wanted:
        return iter(())
    sources = list(dict.fromkeys(node for biases in wanted for node in biases))
    derived = trunk.add_derived(
        [f"{biases[0].name}_and_{len(biases) - 1}" for biases in wanted],
        [_joined_like(trunk, biases) for biases in wanted],
        made_by=tag,
        module=fx.GraphModule(trunk.module, _joining(sources, wanted)),
        sources=sources,
        is_kept=False,
    )
    return iter(derived.placeholders)


def _kind(bias: fx.Node) -> tuple[torch.dtype, torch.device]:
    return value(bias).dtype, value(bias).device


def _num_elements(biases: Sequence[fx.Node]) -> int:
    return sum(int(value(bias).shape[0]) for bias in biases)


def _joined_like(trunk: Trunk, biases: Sequence[fx.Node]) -> Any:
    mode = fakes.fake_mode(trunk.graph)
    assert mode is not None  # the blocks take tensors
    return fakes.fake_like(mode, (_num_elements(biases),), *_kind(biases[0]))


def _joining(sources: Sequence[fx.Node], wanted: Sequence[Sequence[fx.Node]]) -> fx.Graph:
    graph = fx.Graph()
    inside = {node: graph.placeholder(node.name) for node in sources}
    joined = graph.call_function(kernels.join_each, ([[inside[bias] for bias in biases] for biases in wanted],))
    graph.output(tuple(graph.call_function(operator.getitem, (joined, place)) for place in range(len(wanted))))
    return graph
