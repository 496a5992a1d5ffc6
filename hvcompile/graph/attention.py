"""Attention in a graph: which nodes compute it, and their arguments by name."""

from __future__ import annotations

from typing import Any

from torch import fx

from hvcompile.graph.attention_kernels import scaled_dot_product_attention_with_lse
from hvcompile.graph.nodes import op_name

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


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
