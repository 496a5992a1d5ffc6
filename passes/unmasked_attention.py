"""Unmasked attention: a mask that hides padding at the end of the keys becomes shorter keys."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile.errors import OptionError
from hvcompile.graph.attention import TOKENS, arguments, attentions, is_attention, is_part
from hvcompile.graph.attention_kernels import AUTO, KERNELS, Attention, describe, expected, pinned, refusal, written_out
from hvcompile.graph.inline import inline
from hvcompile.graph.nodes import is_tensor, is_weight
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting.hoisting import hoist
from hvcompile.rewriting.key_padding import (
    LEAST_KEYS,
    Masked,
    Match,
    assert_lengths,
    is_read_in_every_call,
    made_of,
    match,
    num_keys,
    read_lengths,
)
from hvcompile.rewriting.shared_work import share_activations
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import numel_hint, size_hint, value
from hvcompile.trunk.invariants import drop_dead
from hvcompile.trunk.trunk import Body, Trunk

MOST_SCORES = 2**30
"""Bytes of an attention's scores beyond which they are never all in memory at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnmaskedAttention(Pass):
    """Replace a key-padding mask of the blocks' attention by keys and values that end where the padding begins.

    Fast kernels take no mask. A mask qualifies if it hides the same keys from all queries and heads, and is made of
    conditions alone. How many keys each sample keeps goes into the graph as a number, so prompts of any length run the
    same code. On the CPU the runtime reads that in every call. Elsewhere it reads it once, for as long as the
    conditions stay the same, unmodified tensors, and the graph asserts in every step that it still holds.

    If the kept keys are not the first ones, or are fewer than two, the call runs the graph with its mask. That graph is
    compiled when this first happens, and the log and the journal say so. An additive mask hides a key if it adds -9000
    or less. Queries that are padding are computed as before. A batch is unrolled, a sample at a time.

    Args:
        unmask: whether masks are replaced.
        kernel: which kernel computes the blocks' attention. "auto" leaves the choice to torch. "cudnn", "flash",
            "efficient" or "math" takes that one in all blocks, and raises where it can't compute one of them.
        hoist: whether what follows from sizes alone (rotary tables, positions) is computed once for each set of sizes,
            and not in every step.

    Given::

        root:
            ...
            keep: bool[1, 1, 1, 17]
            ...
            invoke_subgraph = block_0(..., contiguous_3, 8 weights of masked_blocks.0)
            ...
        block_0:
            ...
            mixed: f32[1, 2, 17, 8] = scaled_dot_product_attention(query, key, held, attn_mask=keep)

    Result::

        root:
            ...
            valid_keys
            ...
            invoke_subgraph = block_0(..., valid_keys, 8 weights of masked_blocks.0)
            ...
        block_0:
            ...
            narrow: f32[1, 2, u0, 8] = key.narrow(2, 0, valid_keys)
            narrow_1: f32[1, 2, u0, 8] = held.narrow(2, 0, valid_keys)
            scaled_dot_product_attention: f32[1, 2, 17, 8] = scaled_dot_product_attention(query, narrow, narrow_1)

    """

    section: ClassVar[str] = "attention"
    is_exact: ClassVar[bool] = True

    unmask: bool = True
    kernel: str = AUTO
    hoist: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel not in KERNELS:
            allowed = ", ".join(map(repr, KERNELS))
            raise OptionError(f"attention.kernel is {self.kernel!r}; allowed is one of {allowed}")

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the attention of every body; see the class."""
        del context
        declined = self._check(trunk)
        if declined is not None:
            return declined.report(trunk.lists)
        plan = self._match(trunk)
        unmet = self._check_kernel(plan)
        return self._rewrite(trunk, plan, unmet)

    def _check(self, trunk: Trunk) -> Declined | None:
        if trunk.is_branched:
            return Declined("the blocks already stand in a branch")
        if not any(is_weight(node) for node in trunk.inputs):
            return Declined("it takes no parameters as inputs, so what is kept can't be tied to a model", "graph")
        return None

    def _match(self, trunk: Trunk) -> _Plan:
        """Find the masks that may be shorter keys, and describe every attention as it will be without them."""
        masks = match(trunk) if self.unmask else Match()
        declined = list(masks.declined)
        if not self.unmask:
            declined.append(("masks", "options['attention']['unmask'] is False"))
        elif not masks.masked and not declined:
            declined.append((trunk.lists, "no attention in the blocks has a mask"))
        shortened = {masked.node for masked in masks.masked}
        kinds = {
            (body, node): _describe(node, node in shortened)
            for body in trunk.bodies
            for node in attentions(body.module.graph)
        }
        return _Plan(masks=masks, shortened=shortened, kinds=kinds, declined=tuple(declined))

    def _check_kernel(self, plan: _Plan) -> tuple[tuple[str, str], ...]:
        """Which attentions the kernel that options name can't compute, with the reason for each."""
        if self.kernel == AUTO:
            return ()
        name = f"kernel {self.kernel!r}"
        if not plan.kinds:
            return ((name, "the blocks hold no attention"),)
        reasons = {key: refusal(self.kernel, kind) for key, kind in plan.kinds.items()}
        return tuple((f"{name} for {node.name} of {body.name}", why) for (body, node), why in reasons.items() if why)

    def _rewrite(self, trunk: Trunk, plan: _Plan, unmet: tuple[tuple[str, str], ...]) -> PassReport:
        """Shorten keys, pin the kernel, and hoist; where the kernel is unmet, only shorten keys."""
        matched: list[str] = []
        noted: list[str] = []
        declined = list(plan.declined)
        kernel = AUTO if unmet else self.kernel
        if plan.masks.masked:
            # With its kernel at once: what torch takes by itself may not be traceable with keys of unknown number.
            lengths = _lengths(trunk, plan.masks)
            ways = _ways(plan.masks, kernel, lengths)
            if isinstance(ways, Declined):
                declined.append((ways.what, ways.reason))
            else:
                _unmask(trunk, plan.masks, ways, lengths)
                matched.append(_say(plan.masks))
                noted += _say_instead(plan.masks, ways)
        if self.kernel == AUTO:
            remaining = [node for body in trunk.bodies for node in attentions(body.module.graph)]
            for kind in dict.fromkeys(map(_describe, remaining)):
                noted.append(f"kernel left to torch, which takes {expected(kind)} by itself for {kind}")
        elif not unmet:
            for _, node in plan.kinds:
                if node not in plan.shortened:
                    _pin(node, kernel)
            kinds = "; ".join(dict.fromkeys(map(str, plan.kinds.values())))
            matched.append(f"{len(plan.kinds)} attentions run kernel {kernel!r}, asked for by options: {kinds}")
        if self.hoist and not unmet:
            matched += hoist(trunk, UnmaskedAttention.__name__)
            matched += share_activations(trunk, UnmaskedAttention.__name__)
        return PassReport(matched=tuple(matched), declined=tuple(declined), unmet=unmet, noted=tuple(noted))

    def instead(self) -> Pass:
        """Attention with its masks, which not every kernel takes."""
        return dataclasses.replace(self, unmask=False, kernel=AUTO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be rewritten: masks that may be shorter keys, and all attentions of the bodies with their kinds."""

    masks: Match
    shortened: set[fx.Node]
    kinds: dict[tuple[Body, fx.Node], Attention]
    declined: tuple[tuple[str, str], ...]


def _say(found: Match) -> str:
    places = ", ".join(f"{item.node.name} of {item.body.name}" for item in found.masked)
    return f"{places}: keys end where the padding begins, found from the mask by the runtime"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """How an attention runs with shorter keys; ``instead`` says by what, where torch's own choice can't be traced."""

    attend: Callable[..., Any]
    instead: str = ""


_Lengths = dict[tuple[str, ...], list[torch.SymInt]]
"""For each source of masks, how many keys each sample keeps."""


def _lengths(trunk: Trunk, found: Match) -> _Lengths:
    mode: Any = fakes.fake_mode(trunk.graph)
    return {
        source: [fakes.unbacked_size(mode, LEAST_KEYS, num_keys(masked)) for _ in range(masked.samples)]
        for source, masked in found.lengths.items()
    }


def _ways(found: Match, kernel: str, lengths: _Lengths) -> list[_Way] | Declined:
    """How each attention runs with shorter keys, or why one can't."""
    ways: list[_Way] = []
    for masked in found.masked:
        attend = _attend(masked.node, kernel, lengths[masked.source][0])
        way = _instead(masked.node) if attend is None else _Way(attend=attend)
        if isinstance(way, Declined):
            return Declined(way.reason, f"{masked.node.name} of {masked.body.name}")
        ways.append(way)
    return ways


def _instead(node: fx.Node) -> _Way | Declined:
    """What computes an attention of which torch must not ask the number of keys; large scores stay in a kernel."""
    query, key, _ = _operands(node)
    scores = numel_hint(query) // size_hint(query.shape[-1]) * size_hint(key.shape[2]) * 4
    if scores <= MOST_SCORES:
        return _Way(attend=_written_out(node), instead="written out")
    kind = _describe(node, is_unmasked=True)
    refused = {kernel: refusal(kernel, kind) for kernel in KERNELS if kernel not in {AUTO, "math"}}
    for kernel, reason in refused.items():
        if not reason:
            return _Way(attend=_pinned(node, kernel), instead=f"kernel {kernel!r}")
    return Declined(
        f"torch {torch.__version__} can't trace its math kernel with a number of keys that is known at run time alone; "
        f"written out it would hold {scores / 2**30:.1f} GiB of scores; and no other kernel takes it ("
        + "; ".join(f"{kernel}: {reason}" for kernel, reason in refused.items())
        + ")"
    )


def _say_instead(found: Match, ways: Sequence[_Way]) -> list[str]:
    by_way: dict[str, list[str]] = {}
    for masked, way in zip(found.masked, ways, strict=True):
        if way.instead:
            by_way.setdefault(way.instead, []).append(f"{masked.node.name} of {masked.body.name}")
    return [
        f"{', '.join(names)}: {instead}, for torch takes its math kernel, and torch {torch.__version__} can't trace "
        "that with a number of keys that is known at run time alone"
        for instead, names in by_way.items()
    ]


def _unmask(trunk: Trunk, found: Match, ways: Sequence[_Way], numbers: _Lengths) -> None:
    """Replace what was found."""
    tag = UnmaskedAttention.__name__
    assert found.masks is not None
    names = [f"valid_keys_{place}_{item}" for place, held in enumerate(numbers.values()) for item in range(len(held))]
    sizes = [size for held in numbers.values() for size in held]
    is_kept = not is_read_in_every_call(found.sources)
    derived = trunk.add_derived(
        names, sizes, made_by=tag, module=found.masks, sources=found.sources, is_kept=is_kept, read=read_lengths
    )
    if is_kept:
        assert_lengths(trunk, found.masks, found.sources, derived.placeholders, tag)
    placeholders = iter(derived.placeholders)
    lengths = {source: [next(placeholders) for _ in range(item.samples)] for source, item in found.lengths.items()}
    inside: dict[tuple[Any, fx.Node], fx.Node] = {}
    unread: list[fx.Node] = []
    for masked, way in zip(found.masked, ways, strict=True):
        operands = []
        for length in lengths[masked.source]:
            if (masked.body, length) not in inside:
                inside[masked.body, length] = trunk.add_operand(masked.body, length)
            operands.append(inside[masked.body, length])
        mask = _rewrite(masked, operands, way.attend, tag)
        leaves = made_of(mask)[1]
        drop_dead(masked.body.module.graph, [mask])
        for leaf in leaves:
            if is_tensor(leaf) and not leaf.users:
                position = list(masked.body.module.graph.find_nodes(op="placeholder")).index(leaf)
                unread += [block.operands[position] for block in trunk.blocks if block.body is masked.body]
                trunk.drop_operand(masked.body, leaf)
    drop_dead(trunk.graph, unread)


def _rewrite(masked: Masked, lengths: list[fx.Node], attend: Callable[..., Any], tag: str) -> fx.Node:
    """Replace one attention by ``attend``; returns its mask."""
    node, given = masked.node, arguments(masked.node)
    mask: fx.Node = given["attn_mask"]
    query, key, held = (given[name] for name in ("query", "key", "value"))
    names = {"query": query, "key": key, "value": held}
    names |= {f"length_{place}": length for place, length in enumerate(lengths)}

    def shortened(query: Any, key: Any, value: Any, **lengths: Any) -> dict[str, Any]:
        parts = []
        for sample, length in enumerate(lengths.values()):
            mine = [query, key, value]
            if len(lengths) > 1:
                mine = [item.narrow(0, sample, 1) for item in mine]
            q, k, v = mine
            parts.append(attend(q, k.narrow(2, 0, length), v.narrow(2, 0, length)))
        if not is_part(node):
            return {"out": torch.cat(parts) if len(parts) > 1 else parts[0]}
        both = [[part[place] for part in parts] for place in range(2)]
        return {str(place): torch.cat(held) if len(held) > 1 else held[0] for place, held in enumerate(both)}

    last, after = node.prev, node.next
    made = inline(node.graph, shortened, names, before=node, tag=tag)
    if is_part(node):
        for user in list(node.users):  # each takes one of the two results
            _replace(user, made[str(user.args[1])])
        node.graph.erase_node(node)
    else:
        _replace(node, made["out"])
    while TOKENS in node.meta and (last := last.next) is not after:
        if is_attention(last):
            last.meta[TOKENS] = node.meta[TOKENS]
    return mask


def _attend(node: fx.Node, kernel: str, length: torch.SymInt) -> Callable[..., Any] | None:
    """What gives an attention of query, key and value with so many keys, unmasked; None if torch can't trace it."""
    given = {name: held for name, held in arguments(node).items() if name not in {"query", "key", "value", "attn_mask"}}
    target: Any = node.target
    if is_part(node):
        return functools.partial(target, **given, **({} if kernel == AUTO else {"kernel": kernel}))
    if kernel != AUTO:
        return _pinned(node, kernel)
    query, key, held = _operands(node)
    scale = given.get("scale")
    known = given | ({"scale": value(scale)} if isinstance(scale, fx.Node) else {})
    parts = [query, *(item.narrow(2, 0, length) for item in (key, held))]
    # On meta nothing will run: what is taken there says nothing of the device that is planned for.
    if query.device.type != "meta" and not fakes.is_traceable(target, *parts, **known):
        return None
    return functools.partial(target, **given)


def _written_out(node: fx.Node) -> Callable[..., Any]:
    """An attention of query, key and value by torch's math kernel, in plain operations."""
    query, key, _ = _operands(node)
    return functools.partial(
        written_out,
        dtype=query.dtype,
        scale=_scale(node),
        repeats=query.shape[1] // key.shape[1] if arguments(node).get("enable_gqa") else 1,
    )


def _operands(node: fx.Node) -> list[torch.Tensor]:
    """The fake query, key and value of an attention."""
    given = arguments(node)
    return [value(given[name]) for name in ("query", "key", "value")]


def _scale(node: fx.Node) -> Any:
    scale = arguments(node).get("scale")
    return int(_operands(node)[0].shape[-1]) ** -0.5 if scale is None else scale


def _describe(node: fx.Node, is_unmasked: bool = False) -> Attention:
    has_mask = isinstance(arguments(node).get("attn_mask"), fx.Node) and not is_unmasked
    return describe(*_operands(node), has_mask=has_mask)


def _pinned(node: fx.Node, kernel: str) -> Callable[..., Any]:
    """A kernel's own operator for an attention, of query, key, value and what it adds to the scores."""
    query, is_causal, scale = _operands(node)[0], arguments(node).get("is_causal", False), _scale(node)
    attend = pinned(kernel, query.device.type, query.dtype)
    return lambda query, key, value, attn_mask=None: attend(query, key, value, attn_mask, is_causal, scale)


def _pin(node: fx.Node, kernel: str) -> None:
    """Put a kernel's own operator in place of an attention."""
    if is_part(node):
        node.kwargs = {**node.kwargs, "kernel": kernel}
        return
    given = arguments(node)
    names = {name: given[name] for name in ("query", "key", "value", "attn_mask") if given.get(name) is not None}
    dtype = value(given["query"]).dtype
    is_bool = "attn_mask" in names and value(names["attn_mask"]).dtype == torch.bool
    attend = _pinned(node, kernel)

    def run(query: Any, key: Any, value: Any, attn_mask: Any = None) -> dict[str, Any]:
        if is_bool:  # the operators themselves would add it
            attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(attn_mask.logical_not(), -math.inf)
        return {"out": attend(query, key, value, attn_mask)}

    _replace(node, inline(node.graph, run, names, before=node, tag=UnmaskedAttention.__name__)["out"])


def _replace(node: fx.Node, other: fx.Node) -> None:
    """Put a node in place of another, traced where that was."""
    other.meta = fakes.provenance(node, other.meta[fakes.TAG], value(other))
    assert fakes.shape_key(value(other)) == fakes.shape_key(value(node))
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
