"""Attention in a graph: which nodes compute it, and their arguments by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from hvcompile.graph.attention_kernels import scaled_dot_product_attention_with_lse
from hvcompile.graph.nodes import op_name
from hvcompile.ranks.split import Segment

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

TOKENS = "hvcompile_tokens"
"""Key of an attention's meta: its ``Tokens``, where that is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What lies along the queries and the keys of an attention that has all of the blocks' sequence in both.

    ``Segment.is_split`` marks the sequence. Other tokens (text) may stand before and after it.
    """

    queries: tuple[Segment, ...]
    keys: tuple[Segment, ...]


def marked(graph: fx.Graph) -> dict[str, Tokens]:
    """The attentions of a graph of which it is known, by name, in order."""
    return {node.name: node.meta[TOKENS] for node in graph.nodes if TOKENS in node.meta}


def unmark(graphs: Sequence[fx.Graph]) -> None:
    """Take the marks away."""
    for graph in graphs:
        for node in graph.nodes:
            node.meta.pop(TOKENS, None)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an attention (see ``is_attention``) by name, without those that were left out."""
    return dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs


def is_attention(node: fx.Node) -> bool:
    """Whether a node is a call of ``scaled_dot_product_attention``, or of a part of one (``is_part``)."""
    return node.op == "call_function" and (op_name(node) == "scaled_dot_product_attention" or is_part(node))


def is_part(node: fx.Node) -> bool:
    """Whether a node is attention to a part of the keys, which also returns its log-sum-exp."""
    return node.target is scaled_dot_product_attention_with_lse


def attentions(graph: fx.Graph) -> list[fx.Node]:
    """The attentions of a graph, sorted by name: the order of one's parts in the graph differs from rank to rank."""
    return sorted(filter(is_attention, graph.nodes), key=lambda node: node.name)
