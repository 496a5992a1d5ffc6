"""Key-padding masks: which attention of the trunk takes one, and how many keys it leaves, read from the mask itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.attention import arguments, attentions
from hvcompile.graph.inline import inline
from hvcompile.graph.nodes import is_tensor, mutated_operand, op_name
from hvcompile.journal import Declined
from hvcompile.torch_private import fakes
from hvcompile.torch_private.assertions import assert_on_device
from hvcompile.torch_private.fakes import TAG, is_data_dependent, shape_key, size_hint, value
from hvcompile.trunk.invariants import copied_out, invariants
from hvcompile.trunk.trunk import Body, Trunk

# An additive mask drops a key where it adds this or less: beside it the softmax underflows to 0 in fp32, in which every
# kernel takes it. What models write is -10000 (-9984 in bf16), the dtype's least number or minus infinity.
DROPPED = -9000.0
# Of a size that is only known at run time Inductor asks whether it is 1, and gets no answer unless it can't be.
LEAST_KEYS = 2
# Samples of a batch that are unrolled at most: each has an attention of its own in every block.
MOST_SAMPLES = 8
STALE = (
    "hvfast: a mask is not what it was when its keys were counted, though it is the same, unmodified tensor: it was "
    "written to through .data or another alias that PyTorch does not track. Pass a new tensor, or call "
    "hvcompile.reset(model) after such a write"
)
"""What the assertion in the graph says."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Masked:
    """An attention of a body with a mask that may be shorter keys.

    ``source`` tells masks apart: equal for calls that take the same mask. ``samples`` is how many rows the mask has for
    the batch, each with a number of valid keys of its own.
    """

    body: Body
    node: fx.Node
    source: tuple[str, ...]
    samples: int


@dataclasses.dataclass(eq=False, kw_only=True)
class Match:
    """What was found: attention to rewrite, what is left alone and why, and a graph that gives the distinct masks."""

    masked: list[Masked] = dataclasses.field(default_factory=list)
    declined: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    masks: fx.GraphModule | None = None
    sources: list[fx.Node] = dataclasses.field(default_factory=list)
    lengths: dict[tuple[str, ...], Masked] = dataclasses.field(default_factory=dict)


def match(trunk: Trunk) -> Match:
    """Find the attention of all bodies whose mask may be shorter keys; changes nothing."""
    found = Match()
    same = invariants(trunk)
    chains: dict[tuple[str, ...], tuple[Masked, list[fx.Node], dict[fx.Node, fx.Node]]] = {}
    for body in trunk.bodies:
        for node in attentions(body.module.graph):
            if not isinstance(arguments(node).get("attn_mask"), fx.Node):
                continue
            outcome = _match_one(trunk, body, node, same)
            if isinstance(outcome, Declined):
                found.declined.append((f"{node.name} of {body.name}", outcome.reason))
                continue
            masked, chain, operands = outcome
            found.masked.append(masked)
            chains.setdefault(masked.source, outcome)
            found.lengths.setdefault(masked.source, masked)
    if not found.masked:
        return found
    wanted = [outer for _, _, operands in chains.values() for outer in operands.values()]
    graph, env, found.sources = copied_out(trunk, wanted)
    results = []
    for masked, chain, operands in chains.values():
        inner = {placeholder: env[outer] for placeholder, outer in operands.items()}
        for node in chain:
            inner[node] = graph.node_copy(node, inner.__getitem__)
            inner[node].meta = copy.copy(node.meta)
        results.append(inner[arguments(masked.node)["attn_mask"]])
    graph.output(tuple(results))
    found.masks = fx.GraphModule(trunk.module, graph)
    return found


def _match_one(
    trunk: Trunk, body: Body, node: fx.Node, same: set[fx.Node]
) -> tuple[Masked, list[fx.Node], dict[fx.Node, fx.Node]] | Declined:
    """The attention, the nodes of its body that make the mask and the value that each of their inputs has outside."""
    given = arguments(node)
    query, key, mask = (value(given[name]) for name in ("query", "key", "attn_mask"))
    if given.get("is_causal"):
        return Declined("it is causal as well")
    if query.ndim != 4 or key.ndim != 4:
        return Declined(f"its query and key have {query.ndim} and {key.ndim} dimensions; looked for are 4")
    if not 2 <= mask.ndim <= 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return Declined(f"its mask is a {mask.dtype} of {mask.ndim} dimensions")
    batch, _, num_queries, num_keys = [1] * (4 - mask.ndim) + list(mask.shape)
    if isinstance(num_queries, torch.SymInt) or num_queries != 1:
        return Declined("its mask differs from query to query")
    if str(num_keys) != shape_key(key)[2]:
        return Declined(f"its mask is for {num_keys} keys, and there are {key.shape[2]}")
    if size_hint(key.shape[2]) < LEAST_KEYS:
        return Declined("it has one key")
    if is_data_dependent(key) or is_data_dependent(query):
        return Declined("it has a length that depends on data")
    if isinstance(batch, torch.SymInt) or isinstance(query.shape[0], torch.SymInt):
        return Declined("the batch size is symbolic, so its samples can't be unrolled; compile with dynamic=False")
    if batch > MOST_SAMPLES:
        return Declined(f"its mask has {batch} rows, and samples are unrolled up to {MOST_SAMPLES}")

    chain, leaves = made_of(given["attn_mask"])
    if trunk.sharding is not None and any(_has_heads(item) for item in [*chain, *leaves]):
        return Declined(
            "its mask may differ from head to head, so ranks that hold different heads could not agree on its keys"
        )
    if any(item.op == "get_attr" or mutated_operand(item) is not None for item in chain):
        return Declined("the block makes the mask of a constant, or writes into it")
    placeholders = list(body.module.graph.find_nodes(op="placeholder"))
    operands: dict[fx.Node, fx.Node] = {}
    for leaf in leaves:
        given_to = {b.operands[placeholders.index(leaf)] for b in trunk.blocks if b.body is body}
        if trunk.sharding is not None and any(node.meta.get(TAG) not in {None, "outline"} for node in given_to):
            return Declined(
                f"{leaf.name}, of which the mask is made, is this rank's part, and ranks could not agree on its keys"
            )
        outer = set(map(_before_outlining, given_to))
        if len(outer) > 1:
            return Declined(f"{leaf.name}, of which the mask is made, differs from block to block")
        operands[leaf] = outer.pop()
        if operands[leaf] not in same:
            return Declined(f"{operands[leaf].name}, of which the mask is made, may change from step to step")
    names = {leaf: f"%{outer.name}" for leaf, outer in operands.items()}
    source = []
    for place, item in enumerate(chain):
        names[item] = f"%{place}"
        read = fx.map_arg((item.args, item.kwargs), names.__getitem__)
        source.append(repr((str(item.target), read)))
    source.append(names[given["attn_mask"]])
    return Masked(body=body, node=node, source=tuple(source), samples=batch), chain, operands


def _has_heads(node: fx.Node) -> bool:
    """Whether a value may be a mask of its own for each head."""
    held = value(node)
    return isinstance(held, torch.Tensor) and held.ndim == 4 and shape_key(held)[1] != "1"


def made_of(mask: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes of a body that a mask is made by, in order, and the body's placeholders that they read."""
    chain: list[fx.Node] = []
    leaves: list[fx.Node] = []
    stack, seen = [mask], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            (leaves if node.op == "placeholder" else chain).append(node)
            stack.extend(node.all_input_nodes)
    order = {node: place for place, node in enumerate(mask.graph.nodes)}
    return sorted(chain, key=order.__getitem__), sorted(leaves, key=order.__getitem__)


def _before_outlining(node: fx.Node) -> fx.Node:
    """The value of which outlining has made an operand."""
    while node.meta.get(TAG) == "outline" and op_name(node) in {"contiguous", "clone"} and is_tensor(node):
        node = node.all_input_nodes[0]
    return node


def is_read_in_every_call(sources: Sequence[fx.Node]) -> bool:
    """Whether masks made of these inputs are in the host's memory, where reading them costs no waiting."""
    return all(value(node).device.type == "cpu" for node in sources if is_tensor(node))


def assert_lengths(
    trunk: Trunk, masks: fx.GraphModule, sources: Sequence[fx.Node], lengths: Sequence[fx.Node], tag: str
) -> None:
    """Have every step check that the numbers of keys that it is given are those of the masks that it is given.

    The numbers are remembered for masks that are the same, unmodified tensors, and a write through ``.data`` is no
    modification that can be seen. What is checked is small (a row a sample), and the host does not wait for it.

    Args:
        trunk: gains the check, before its first block.
        masks: gives the masks, of ``sources``.
        sources: placeholders of the trunk's graph.
        lengths: placeholders of the numbers, for each mask as many as it has samples.
        tag: name of the pass.

    """
    before = trunk.blocks[0].call
    env: dict[fx.Node, fx.Node] = {}
    placeholders = masks.graph.find_nodes(op="placeholder")
    env.update(zip(placeholders, sources, strict=True))
    with trunk.graph.inserting_before(before):
        for node in masks.graph.nodes:
            if node.op not in {"placeholder", "output"}:
                env[node] = trunk.graph.node_copy(node, env.__getitem__)
                env[node].meta = fakes.provenance(node, tag, value(node))
    results: Any = masks.graph.output_node().args[0]
    given = {f"mask_{place}": env[node] for place, node in enumerate(results)}
    given |= {f"length_{place}": node for place, node in enumerate(lengths)}
    shapes = [value(node).shape for node in results]

    def check(**given: Any) -> dict[str, Any]:
        held = [given[f"mask_{place}"] for place in range(len(shapes))]
        rest = iter([given[f"length_{place}"] for place in range(len(lengths))])
        fits = []
        for mask, shape, node in zip(held, shapes, results, strict=True):
            keep, checks = _kept(mask[(None,) * (4 - len(shape))], value(node).dtype)
            places = torch.arange(keep[0, 0, 0].numel(), device=value(node).device)
            samples = shape[0] if len(shape) == 4 else 1
            leading = [(keep[sample, 0, 0] == (places < next(rest))).all() for sample in range(samples)]
            fits += [*checks, *leading]
        assert_on_device(torch.stack(fits).all(), STALE)
        return {}

    inline(trunk.graph, check, given, before=before, tag=tag)


def _kept(mask: Any, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """Which keys a mask of 4 dimensions keeps; and whether it keeps the same for all heads, and adds to none."""
    keep = mask if dtype == torch.bool else mask == 0
    is_clear = torch.ones_like(keep) if dtype == torch.bool else keep | (mask <= DROPPED)
    return keep, [(keep == keep[:, :1]).all(), is_clear.all()]


def read_lengths(masks: Sequence[torch.Tensor]) -> list[int] | Declined:
    """How many keys each sample of each mask keeps, where those are the first ones; else why they are not.

    One transfer from the device, whatever the number of masks.

    Args:
        masks: bool (True keeps) or additive, ``[batch or 1, heads or 1, 1, keys]`` or of fewer dimensions.

    """
    rows = []
    for mask in (held.reshape([1] * (4 - held.ndim) + list(held.shape)) for held in masks):
        keep, checks = _kept(mask, mask.dtype)
        count = keep[:, 0, 0].sum(-1)
        places = torch.arange(mask.shape[-1], device=mask.device)
        checks.append((keep[:, 0, 0] == (places < count[:, None])).all())
        rows.append(torch.cat([torch.stack(checks).to(count.dtype), count]))
    read: list[int] = torch.cat(rows).tolist()
    lengths: list[int] = []
    for given in masks:
        samples = given.shape[0] if given.ndim == 4 else 1
        (same, clear, leading), counts = read[:3], read[3 : 3 + samples]
        del read[: 3 + samples]
        if not same:
            return Declined("the mask differs from head to head")
        if not clear:
            return Declined(
                f"the mask adds something to keys that it does not drop (it is neither 0 nor {DROPPED:g} or less)"
            )
        if not leading:
            return Declined(
                f"the valid keys ({', '.join(map(str, counts))} of {given.shape[-1]}) are not the first ones"
            )
        if min(counts) < LEAST_KEYS:
            return Declined(f"a sample has {min(counts)} valid keys, and the code is for {LEAST_KEYS} or more")
        lengths += counts
    return lengths


def num_keys(masked: Masked) -> int | torch.SymInt:
    """The keys that an attention has, padding among them."""
    return value(arguments(masked.node)["key"]).shape[2]  # type: ignore[no-any-return]
