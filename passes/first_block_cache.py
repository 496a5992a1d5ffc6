"""First-block cache: skip blocks 2..N of a step whose first block changed little since the last computed step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile.errors import OptionError
from hvcompile.graph.aliasing import refresh
from hvcompile.graph.inline import inline
from hvcompile.graph.nodes import settle
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting.reuse import contents, near_end, new_generation, relative_change
from hvcompile.rewriting.skipping import SkipPlan, counterpart, plan_skip
from hvcompile.runtime.left_state import LEAVE
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.branch import Branch, add_cond, is_submodule
from hvcompile.trunk.operands import as_operands, symbolic_sizes
from hvcompile.trunk.roles import classify
from hvcompile.trunk.trunk import Sharding, State, Trunk

# Beyond it a number means nothing here, and would not fit the tensors that it is compared with.
MOST = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Pass):
    """Put blocks 2..N into the miss branch of a ``torch.cond``; the hit branch adds their cached residuals.

    A step reuses the last computed one if block 1's residual has changed little since. What is compared is the stream
    that carries the sample: the mean absolute difference from the last *computed* step, relative to the mean absolute
    value there. It may be at most ``threshold``. What is cached is the change over blocks 2..N, for every stream that
    leaves the trunk. A step that reuses it copies none of it. Predicate and state live in the graph:

    - A difference that is not finite never reuses.
    - Where weights or conditions were written to since the last step, also in ways that PyTorch does not track, the
      step is computed. All of the conditions is looked at, and 32 elements of each weight.
    - A clock (timestep) that turns back begins a new generation, whose first step is computed. So does one that stands
      still at the start with another sample, and so does one of several clocks (guidance) that moves while the sample
      stays.

    Args:
        threshold: the largest relative difference at which a step is reused, taken in fp32; 0 or more. 0 reuses only if
            block 1 repeats itself exactly.
        warmup_steps: how many steps at the start of a generation are always computed, 0 or more.
        max_consecutive_hits: how many steps in a row may be reused, 1 or more. None for no limit.
        last_steps_computed: how many timesteps at the end of a generation are always computed, 0 or more. Several calls
            at one timestep (second-order schedulers) count as one. The end is extrapolated from the last three
            timesteps, so a generation's first two are computed too.

    The end of a generation is where the clock will reach 0 (or 1 or 1000, where it rises). It is extrapolated by the
    projective map that is exact for evenly spaced and for shifted flow-matching schedules. Timesteps rounded to whole
    numbers or bf16 blur the map, so some steps in the middle are computed as well.

    Source: First Block Cache of ParaAttention (github.com/chengzeyi/ParaAttention), after TeaCache (arXiv:2411.19108).
    Decisions are those of diffusers' ``FirstBlockCacheConfig``, with two exceptions: a NaN reuses there, and means are
    taken there in the model's dtype.

    Given::

        root:
            ...
            invoke_subgraph = block_0(contiguous, ..., 6 weights of blocks.0)
            getitem_2: f32[1, 12, 16] = invoke_subgraph[0]
            ...
            invoke_subgraph_1 = block_0(getitem_2, ..., 6 weights of blocks.1)
            getitem_3: f32[1, 12, 16] = invoke_subgraph_1[0]
            invoke_subgraph_2 = block_0(getitem_3, ..., 6 weights of blocks.2)
            getitem_4: f32[1, 12, 16] = invoke_subgraph_2[0]
            linear: f32[1, 12, 16] = linear(getitem_4, head.weight, head.bias)

    Result::

        root:
            ...
            state_first_residual: f32[1, 12, 16]
            state_residual: f32[1, 12, 16]
            ...
            invoke_subgraph = block_0(contiguous, ..., 6 weights of blocks.0)
            getitem_2: f32[1, 12, 16] = invoke_subgraph[0]
            ...
            sub: f32[1, 12, 16] = sub(getitem_2, contiguous)
            ...
            truediv_1: f32[] = truediv(mean, mean_1)
            ...
            le: bool[] = le(where_3, 0.06)
            and__5: bool[] = and_(isfinite, le)
            and__6: bool[] = and_(and__5, and__4)
            ...
            cond = cond(and__6, cache_hit, cache_miss, (..., 12 weights of blocks.1, blocks.2))
            getitem_5: f32[1, 12, 16] = cond[0]
            ...
            linear: f32[1, 12, 16] = linear(getitem_5, head.weight, head.bias)
        ...
        cache_hit:
            ...
            add: f32[1, 12, 16] = add(getitem, contiguous_3)
            ...
        cache_miss:
            ...
            invoke_subgraph = block_0(getitem, ..., 6 weights of blocks.1)
            getitem_1: f32[1, 12, 16] = invoke_subgraph[0]
            invoke_subgraph_1 = block_0(getitem_1, ..., 6 weights of blocks.2)
            getitem_2: f32[1, 12, 16] = invoke_subgraph_1[0]
            sub: f32[1, 12, 16] = sub(getitem_2, getitem)
            sub_1: f32[1, 12, 16] = sub(getitem, contiguous_2)

    """

    section: ClassVar[str] = "first_block_cache"
    is_exact: ClassVar[bool] = False
    compares_first_block: ClassVar[bool] = True

    threshold: float = 0.06
    warmup_steps: int = 0
    max_consecutive_hits: int | None = None
    last_steps_computed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= MOST:
            raise OptionError(
                f"first_block_cache.threshold is {self.threshold}; allowed is a number from 0 to {MOST:g}"
            )
        for name, least in (("warmup_steps", 0), ("last_steps_computed", 0), ("max_consecutive_hits", 1)):
            number = getattr(self, name)
            if number is not None and not least <= number <= MOST:
                allowed = f"a whole number, {least} or more, up to {MOST:g}"
                raise OptionError(f"first_block_cache.{name} is {number}; allowed is {allowed}")

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the trunk's calls 2..N into one ``cond``; see the class."""
        del context
        plan = plan_skip(trunk)
        if isinstance(plan, Declined):
            return plan.report(trunk.lists or "graph")
        if trunk.earlier is not None:
            earlier = trunk.add_earlier(value(plan.stream_out).device)
            assert earlier.clock is not None
            assert earlier.mark is not None
            plan = dataclasses.replace(plan, clocks=(earlier.clock,), sample=earlier.mark)
        _rewrite(trunk, plan, self)
        streams = ", ".join(f"{node.name} {tuple(value(node).shape)}" for node in plan.leaving)
        return PassReport(
            matched=(f"{trunk.blocks[1].path} .. {trunk.blocks[-1].path} run on a miss; cached: {streams}",),
        )

    def decide(
        self,
        *,
        before: torch.Tensor,
        after: torch.Tensor,
        first: torch.Tensor,
        counters: torch.Tensor,
        clock: torch.Tensor,
        last_clock: torch.Tensor,
        past_clocks: torch.Tensor | None = None,
        is_ours: torch.Tensor | None = None,
        group: str | None = None,
        **generation: torch.Tensor,
    ) -> dict[str, Any]:
        """The decision of one step, as graph code.

        Args:
            before: block 1's input stream, any shape.
            after: block 1's output stream, same shape.
            first: block 1's residual in the last computed step, same shape.
            counters: int64 ``[steps done in this generation, hits in a row]``.
            clock: this step's timesteps, float64 ``[K]``.
            last_clock: those of the step before, same shape.
            past_clocks: the two values that each clock had before its last, float64 ``[2, K]``, oldest first; given
                where ``last_steps_computed`` is.
            is_ours: where the streams are one rank's part of the sequence, which of its tokens are no padding; bool,
                broadcasts to ``before``.
            group: name of the process group over which the decision is then made, all ranks deciding alike.
            **generation: what else tells generations apart, see ``reuse.new_generation``.

        Returns:
            ``reused`` (bool scalar), ``difference`` (float32 scalar), and the next values of the small state.

        """
        steps, streak = counters[0], counters[1]
        residual = after - before
        is_new, follow = new_generation(steps, clock=clock, last_clock=last_clock, **generation)
        steps = torch.where(is_new, torch.zeros_like(steps), steps)
        allowed = is_new.logical_not() & (steps >= self.warmup_steps)
        if self.max_consecutive_hits is not None:
            allowed = allowed & (streak < self.max_consecutive_hits)
        if past_clocks is not None:
            is_known, is_near_end, kept_clocks = near_end(
                self.last_steps_computed, is_new, past_clocks=past_clocks, last_clock=last_clock, clock=clock
            )
            allowed = allowed & is_known & is_near_end.logical_not()
            follow["past_clocks"] = torch.stack(kept_clocks)
        change, allowed = relative_change(residual, first, allowed, is_ours=is_ours, group=group)
        difference = torch.where(is_new, torch.full_like(change, math.inf), change)
        reused = difference.isfinite() & (difference <= self.threshold) & allowed
        follow["counters"] = torch.stack([steps + 1, torch.where(reused, streak + 1, torch.zeros_like(streak))])
        return {"reused": reused, "difference": difference, **follow}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cached:
    """The state of the cache: the residuals of block 1 and of each stream that leaves, and what decisions follow."""

    first: State
    residuals: list[State]
    small: dict[str, State]


def _rewrite(trunk: Trunk, plan: SkipPlan, options: FirstBlockCache) -> None:
    """Decide after block 1, and put blocks 2..N into one of two branches."""
    anchor = plan.moved[-1].next  # new work stands before it
    given = {"clock": _clock(trunk, plan.clocks, value(plan.stream_out).device, anchor), "sample": plan.sample}
    given["contents"] = _contents(trunk, value(plan.stream_out).device, anchor)
    cached = _add_state(trunk, plan, given, options)
    reused = _add_decision(trunk, plan, given, cached, options, anchor)
    outputs = _add_branches(trunk, plan, cached, reused, anchor)
    _take_results(trunk, plan, cached, outputs)


def _add_state(trunk: Trunk, plan: SkipPlan, given: Mapping[str, fx.Node], options: FirstBlockCache) -> _Cached:
    main, sample, clock_shape = value(plan.stream_out), value(plan.sample), value(given["clock"]).shape
    first = trunk.add_state("first_residual", main.shape, main.dtype, main.device)
    residuals = [
        trunk.add_state(f"residual_{place}", value(node).shape, value(node).dtype, value(node).device)
        for place, node in enumerate(plan.leaving)
    ]
    small = {
        "counters": trunk.add_state("counters", (2,), torch.int64, main.device),
        "direction": trunk.add_state("direction", clock_shape, torch.float64, main.device),
        "last_clock": trunk.add_state("last_clock", clock_shape, torch.float64, main.device),
        "last_contents": trunk.add_state("last_contents", value(given["contents"]).shape, torch.int64, main.device),
        "last_sample": trunk.add_state("last_sample", sample.shape, sample.dtype, sample.device),
    }
    if options.last_steps_computed:
        small["past_clocks"] = trunk.add_state("past_clocks", (2, *clock_shape), torch.float64, main.device)
    return _Cached(first=first, residuals=residuals, small=small)


def _contents(trunk: Trunk, device: torch.device, anchor: fx.Node) -> fx.Node:
    """Add what tells whether weights and conditions hold what they did in the step before."""
    conditions = {f"condition_{place}": node for place, node in enumerate(classify(trunk).conditions)}
    if trunk.earlier is not None and trunk.earlier.content is not None:
        conditions["earlier"] = trunk.earlier.content
    operands = {"weights": trunk.add_weights_content(device), **conditions}
    function = functools.partial(contents, fakes={name: value(node) for name, node in operands.items()})
    return inline(trunk.graph, function, operands, before=anchor, tag=FirstBlockCache.__name__)["contents"]


def _add_decision(
    trunk: Trunk,
    plan: SkipPlan,
    given: Mapping[str, fx.Node],
    cached: _Cached,
    options: FirstBlockCache,
    anchor: fx.Node,
) -> fx.Node:
    """Add the decision, which the runtime is told of, and the next values of the small state; returns the predicate."""
    operands = {"before": plan.stream_in, "after": plan.stream_out, "first": cached.first.placeholder}
    operands |= given
    operands |= {name: state.placeholder for name, state in cached.small.items()}
    decide = options.decide
    if trunk.sharding is not None and plan.stream_out in trunk.sharding.streams:
        operands["is_ours"] = _is_ours(trunk.sharding, plan.stream_out, anchor)
        decide = functools.partial(options.decide, group=trunk.sharding.split.group)
    decided = inline(trunk.graph, decide, operands, before=anchor, tag=FirstBlockCache.__name__)
    for name, state in cached.small.items():
        state.next_value = decided[name]
    trunk.observed |= {"reused": decided["reused"], "difference": decided["difference"]}
    return decided["reused"]


def _add_branches(trunk: Trunk, plan: SkipPlan, cached: _Cached, reused: fx.Node, anchor: fx.Node) -> list[fx.Node]:
    """Add the ``cond``; its results are what leaves the blocks, then the next residuals, block 1's last."""
    tag = FirstBlockCache.__name__
    counterparts = _counterparts(trunk, plan, anchor)
    passed = _operands(trunk, plan, [*counterparts, plan.stream_in, plan.stream_out], cached, anchor)
    miss, hit = Branch(trunk.module, passed, tag), Branch(trunk.module, passed, tag)

    miss.copy(plan.moved)
    for block in trunk.blocks[1:]:
        block.call = miss.env[block.call]
    computed = [miss.env[node] for node in plan.leaving]
    changes = [miss.call(torch.sub, now, miss.env[base]) for now, base in zip(computed, counterparts, strict=True)]
    # Taken anew where it is kept: a step that reuses need not write it.
    residual = miss.call(torch.sub, miss.env[plan.stream_out], miss.env[plan.stream_in])

    kept = [hit.env[state.placeholder] for state in cached.residuals]
    restored = [hit.call(torch.add, hit.env[base], change) for base, change in zip(counterparts, kept, strict=True)]
    left = [hit.make(LEAVE, state) for state in (*kept, hit.env[cached.first.placeholder])]
    branches = {
        "cache_hit": (hit, [*restored, *left]),
        "cache_miss": (miss, [*computed, *changes, residual]),
    }
    return add_cond(trunk.module, reused, branches, passed.values(), before=anchor)


def _counterparts(trunk: Trunk, plan: SkipPlan, anchor: fx.Node) -> list[fx.Node]:
    """For each value that leaves, what it would be if blocks 2..N handed their streams on unchanged."""
    copies: dict[fx.Node, fx.Node] = {}
    core, tag = set(plan.moved), FirstBlockCache.__name__
    return [counterpart(trunk, node, core, anchor, copies, tag) for node in plan.leaving]


def _operands(
    trunk: Trunk, plan: SkipPlan, streams: Sequence[fx.Node], cached: _Cached, anchor: fx.Node
) -> dict[fx.Node, fx.Node]:
    """What to pass to both branches for each node of the outer graph that one of them reads."""
    core = set(plan.moved)
    external = [item for node in plan.moved for item in node.all_input_nodes if item not in core]
    states = [state.placeholder for state in (*cached.residuals, cached.first)]
    wanted = [*symbolic_sizes(trunk.graph, before=plan.first.call)]
    wanted += [node for node in external if not is_submodule(node)]
    wanted += [*streams, *states]
    with trunk.graph.inserting_before(anchor):
        results = [output for block in trunk.blocks for output in block.outputs.values()]
        return as_operands(trunk.graph, wanted, FirstBlockCache.__name__, ready=results)


def _take_results(trunk: Trunk, plan: SkipPlan, cached: _Cached, outputs: Sequence[fx.Node]) -> None:
    """Have what follows the blocks read the ``cond``, and erase what has moved into it."""
    core = set(plan.moved)
    bodies = {item for node in plan.moved for item in node.all_input_nodes if item not in core and is_submodule(item)}
    for node, replacement in zip(plan.leaving, outputs, strict=False):
        for user in list(node.users):
            if user not in core:
                user.replace_input_with(node, replacement)
    for state, output in zip([*cached.residuals, cached.first], outputs[len(plan.leaving) :], strict=True):
        state.next_value, state.may_be_left = output, True
    for node in reversed(plan.moved):
        trunk.graph.erase_node(node)
    for node in bodies:
        if not node.users:
            trunk.graph.erase_node(node)
    settle(trunk.graph)
    refresh(trunk.graph, set(outputs))


def _is_ours(sharding: Sharding, stream: fx.Node, before: fx.Node) -> fx.Node:
    """Add a mask of a stream's tokens on this rank: no padding, and of what all ranks have only the first one's."""
    split, layout, ndim = sharding.split, sharding.streams[stream], value(stream).ndim

    def mask(stream: Any) -> dict[str, Any]:
        parts = []
        for place, _, item in layout.offsets(split):
            size = split.local if item.is_split else item.stop - item.start
            count = min(max(split.length - split.start, 0), size) if item.is_split else size * (split.rank == 0)
            part = torch.ones_like(stream.narrow(layout.dim, place, size), dtype=torch.bool)
            if count < size:
                part = torch.nn.functional.pad(
                    part.narrow(layout.dim, 0, count), (0, 0) * (ndim - 1 - layout.dim) + (0, size - count)
                )
            parts.append(part)
        return {"is_ours": parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.dim)}

    graph = stream.graph
    return inline(graph, mask, {"stream": stream}, before=before, tag=FirstBlockCache.__name__)["is_ours"]


def _clock(trunk: Trunk, inputs: Sequence[fx.Node], device: torch.device, before: fx.Node) -> fx.Node:
    """Add the timesteps of all inputs that carry one, as one float64 vector."""

    def gather(**clocks: torch.Tensor) -> dict[str, Any]:
        return {"clock": torch.cat([clock.to(device, torch.float64).flatten() for clock in clocks.values()])}

    operands = {f"clock_{place}": node for place, node in enumerate(inputs)}
    return inline(trunk.graph, gather, operands, before=before, tag=FirstBlockCache.__name__)["clock"]
