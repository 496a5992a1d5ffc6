"""Unmasked attention: a mask that hides padding at the end of the keys becomes shorter keys."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile import inductor
from hvcompile.graph_code import inline
from hvcompile.inductor import value
from hvcompile.invariants import drop_dead
from hvcompile.key_padding import Masked, Match, arguments, made_of, match, num_keys, read_lengths
from hvcompile.nodes import is_tensor, is_weight
from hvcompile.pipeline import Pass, PassReport
from hvcompile.trunk import Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnmaskedAttention(Pass):
    """Replace a key-padding mask of the blocks' attention by keys and values that end where the padding begins.

    Fast kernels take no mask. One that hides the same keys from all queries and heads, and that is made of conditions
    alone, is read by the runtime, once for as long as those conditions stay the same tensors, unmodified; how many keys
    each sample keeps then goes into the graph as a number, so that prompts of any length run the same code. Where the
    keys that are kept are not the first ones (or there are none), the call is computed by the graph with its mask,
    which is compiled when that happens first; the log and the journal say so.

    An additive mask counts as hiding a key where it adds -9000 or less. Queries that are padding are computed as
    before. A batch is unrolled, a sample at a time.

    Args:
        unmask: whether masks are replaced.

    Before::

        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)

    After::

        out = scaled_dot_product_attention(query, key.narrow(2, 0, valid_keys), value.narrow(2, 0, valid_keys))

    """

    section: ClassVar[str] = "attention"
    is_exact: ClassVar[bool] = True

    unmask: bool = True

    def apply(self, trunk: Trunk) -> PassReport:
        """Rewrite the attention of every body; see the class."""
        if any(block.call.graph is not trunk.graph for block in trunk.blocks):
            return PassReport(declined=((trunk.lists, "the blocks already stand in a branch"),))
        if not any(is_weight(node) for node in trunk.inputs):
            return PassReport(
                declined=(("graph", "it takes no parameters as inputs, so what is kept can't be tied to a model"),)
            )
        matched: list[str] = []
        declined: list[tuple[str, str]] = []
        if self.unmask:
            found = match(trunk)
            declined += found.declined
            if found.masked:
                _unmask(trunk, found)
                matched.append(_say(found))
            elif not declined:
                declined.append((trunk.lists, "no attention in the blocks has a mask"))
        else:
            declined.append(("masks", "options['attention']['unmask'] is False"))
        return PassReport(matched=tuple(matched), declined=tuple(declined))

    def instead(self) -> Pass:
        """Attention with its masks."""
        return dataclasses.replace(self, unmask=False)


def _say(found: Match) -> str:
    places = ", ".join(f"{item.node.name} of {item.body.name}" for item in found.masked)
    return f"{places}: keys end where the padding begins, found from the mask by the runtime"


def _unmask(trunk: Trunk, found: Match) -> None:
    tag = UnmaskedAttention.__name__
    mode: Any = inductor.fake_mode(trunk.graph)
    assert found.masks is not None
    names: list[str] = []
    sizes: list[torch.SymInt] = []
    for place, masked in enumerate(found.lengths.values()):
        for sample in range(masked.samples):
            names.append(f"valid_keys_{place}_{sample}")
            sizes.append(inductor.unbacked_size(mode, 1, num_keys(masked)))
    derived = trunk.add_derived(names, sizes, made_by=tag, module=found.masks, sources=found.sources, read=read_lengths)
    placeholders = iter(derived.placeholders)
    lengths = {source: [next(placeholders) for _ in range(item.samples)] for source, item in found.lengths.items()}
    inside: dict[tuple[Any, fx.Node], fx.Node] = {}
    unread: list[fx.Node] = []
    for masked in found.masked:
        operands = []
        for length in lengths[masked.source]:
            if (masked.body, length) not in inside:
                inside[masked.body, length] = trunk.add_operand(masked.body, length)
            operands.append(inside[masked.body, length])
        mask = _rewrite(masked, operands, tag)
        leaves = made_of(mask)[1]
        drop_dead(masked.body.module.graph, [mask])
        for leaf in leaves:
            if is_tensor(leaf) and not leaf.users:
                position = list(masked.body.module.graph.find_nodes(op="placeholder")).index(leaf)
                unread += [block.operands[position] for block in trunk.blocks if block.body is masked.body]
                trunk.drop_operand(masked.body, leaf)
    drop_dead(trunk.graph, unread)


def _rewrite(masked: Masked, lengths: list[fx.Node], tag: str) -> fx.Node:
    """Replace one attention; returns its mask."""
    node, given = masked.node, arguments(masked.node)
    mask: fx.Node = given.pop("attn_mask")
    attend: Any = node.target
    query, key, held = (given.pop(name) for name in ("query", "key", "value"))
    names = {"query": query, "key": key, "value": held}
    names |= {f"length_{place}": length for place, length in enumerate(lengths)}

    def shortened(query: Any, key: Any, value: Any, **lengths: Any) -> dict[str, Any]:
        parts = []
        for sample, length in enumerate(lengths.values()):
            mine = [query, key, value]
            if len(lengths) > 1:
                mine = [item.narrow(0, sample, 1) for item in mine]
            q, k, v = mine
            parts.append(attend(q, k.narrow(2, 0, length), v.narrow(2, 0, length), **given))
        return {"out": torch.cat(parts) if len(parts) > 1 else parts[0]}

    out = inline(node.graph, shortened, names, before=node, tag=tag)["out"]
    out.meta = {**{key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}, **out.meta}
    assert inductor.shape_key(value(out)) == inductor.shape_key(value(node))
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    return mask
