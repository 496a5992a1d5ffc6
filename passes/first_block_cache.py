"""First-block cache: skip blocks 2..N of a step whose first block changed little since the last computed step."""

from __future__ import annotations

import dataclasses
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
from hvcompile.rewriting.following import clock_of, contents_of, is_ours, marks_of
from hvcompile.rewriting.forecast import NO_FORECAST, SMALL_STATE, Forecasting, restored
from hvcompile.rewriting.guidance import APART, RECORD, Lead
from hvcompile.rewriting.reuse import is_one_of, near_end, new_generation, relative_change
from hvcompile.rewriting.skipping import SkipPlan, counterparts_of, operands_of_branches, plan_skip
from hvcompile.runtime.left_state import LEAVE
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.branch import Branch, add_cond, is_submodule
from hvcompile.trunk.trunk import State, Trunk

# Beyond it a number means nothing here, and would not fit the tensors that it is compared with.
MOST = 1e9
ORDERS = (0, 1, 2)
DECISIONS = ("change", "error")
GUIDANCE = ("together", "apart")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Pass):
    """Put blocks 2..N into the miss branch of a ``torch.cond``; the hit branch adds their cached residuals.

    A step reuses the last computed one if block 1's residual has changed little since. Compared is the stream that
    carries the sample: the mean absolute difference from the last *computed* step, relative to the mean absolute value
    there, may be at most ``threshold``. Cached is the change over blocks 2..N, for every stream that leaves the trunk.
    A step that reuses it copies none of it. Predicate and state live in the graph:

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
        computed_steps: further steps of a generation that are always computed, each a number from 0; they are counted
            in calls, less those that repeat the first one. With a large threshold they are the only ones: a fixed
            schedule, as cache-dit's masks of steps.
        forecast: along how many differences between the last computed steps a reused step goes on, in the combination
            that comes closest to block 1's own change. 0 repeats what was computed last; 1 or 2 extrapolate it. Each
            keeps one more tensor of every stream, and of block 1.
        decide_by: what is compared with the threshold. "change" is as above. "error" is how far block 1's own forecast
            is off, summed since the last computed step, plus half of the change; it needs a forecast.
        guidance: where guidance calls the model several times a step, "together" has the later calls reuse or compute
            as the first one did, if they hold the same step; see ``rewriting.guidance``. Halves that ranks share out
            (``context_parallel.cfg``) decide by both. "apart" has each decide by its own change.

    The end of a generation is where the clock will reach 0 (or 1 or 1000, where it rises). It is extrapolated by the
    projective map that is exact for evenly spaced and for shifted flow-matching schedules. Timesteps rounded to whole
    numbers or bf16 blur the map, so some steps in the middle are computed as well.

    Source: First Block Cache of ParaAttention (github.com/chengzeyi/ParaAttention), after TeaCache (arXiv:2411.19108);
    of forecasts, see ``rewriting.forecast``.
    Decisions are those of diffusers' ``FirstBlockCacheConfig``, with three exceptions: guidance's calls decide apart
    there, a NaN reuses there, and means are taken there in the model's dtype.

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
            isfinite: bool[] = where_3.isfinite()
            le: bool[] = le(where_3, 0.06)
            or__8: bool[] = or_(le, and__11)
            and__12: bool[] = and_(isfinite, or__8)
            and__13: bool[] = and_(and__12, and__10)
            ...
            cond = cond(and__13, cache_hit, cache_miss, (..., 12 weights of blocks.1, blocks.2))
            getitem_15: f32[1, 12, 16] = cond[0]
            ...
            linear: f32[1, 12, 16] = linear(getitem_15, head.weight, head.bias)
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
    computed_steps: tuple[int, ...] = ()
    forecast: int = 0
    decide_by: str = "change"
    guidance: str = "together"

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
        for number in self.computed_steps:
            if isinstance(number, bool) or not 0 <= number <= MOST:
                allowed = f"a list of whole numbers, 0 or more, up to {MOST:g}"
                raise OptionError(f"first_block_cache.computed_steps has {number!r}; allowed is {allowed}")
        for name, choices in (("forecast", ORDERS), ("decide_by", DECISIONS), ("guidance", GUIDANCE)):
            choice = getattr(self, name)
            if choice not in choices:
                raise OptionError(
                    f"first_block_cache.{name} is {choice!r}; allowed is {' or '.join(map(repr, choices))}"
                )
            if name == "decide_by" and choice != choices[0] and not self.forecast:
                raise OptionError(
                    f"first_block_cache.{name} is {choice!r}, which has no meaning without a forecast; set "
                    "first_block_cache.forecast to 1 or 2"
                )

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
        lead: Lead = APART,
        forecasting: Forecasting = NO_FORECAST,
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
            past_clocks: two values of each clock before its last, float64 ``[2, K]``; for ``last_steps_computed``.
            is_ours: of one rank's part of the sequence, which tokens are no padding; bool, broadcasts to ``before``.
            group: name of the process group over which the decision is then made, all ranks deciding alike.
            lead: what guidance's first call of a step did.
            forecasting: what is forecast, and the state that it is made of.
            **generation: what else tells generations apart, see ``reuse.new_generation``.

        Returns:
            ``reused`` (bool scalar), ``difference`` (float32 scalar), the next values of the small state, and the
            coefficients of the forecast.

        """
        steps, streak = counters[0], counters[1]
        residual = after - before
        is_new, steps, follow = new_generation(steps, clock=clock, last_clock=last_clock, **generation)
        allowed = is_new.logical_not() & self._may_reuse(steps, streak)
        if past_clocks is not None:
            is_known, is_near_end, kept_clocks = near_end(
                self.last_steps_computed, is_new, past_clocks=past_clocks, last_clock=last_clock, clock=clock
            )
            allowed = allowed & is_known & is_near_end.logical_not()
            follow["past_clocks"] = torch.stack(kept_clocks)
        forecasting = forecasting.within(is_new)
        change, (may, follows), products, enough = relative_change(
            residual, first, lead.flags(allowed), forecasting=forecasting, is_ours=is_ours, group=group
        )
        ahead = forecasting.ahead(products, enough)
        change = ahead.judged(change)
        difference = torch.where(is_new, torch.full_like(change, math.inf), change)
        reused = difference.isfinite() & ((difference <= self.threshold) | follows) & may
        follow |= {**ahead.follow(reused), **lead.follow(reused)}
        follow["counters"] = torch.stack([steps + 1, torch.where(reused, streak + 1, torch.zeros_like(streak))])
        return {"reused": reused, "difference": difference, **follow}

    def _may_reuse(self, steps: torch.Tensor, streak: torch.Tensor) -> torch.Tensor:
        """Whether a step may reuse by its number and by how many before it did, as graph code."""
        allowed = steps >= self.warmup_steps
        if self.max_consecutive_hits is not None:
            allowed = allowed & (streak < self.max_consecutive_hits)
        if self.computed_steps:
            allowed = allowed & is_one_of(steps, self.computed_steps).logical_not()
        return allowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cached:
    """The state of the cache.

    ``residuals`` are those of each stream that leaves, then block 1's, each with the differences between the last
    computed ones, latest first. ``small`` is what decisions follow.
    """

    residuals: list[list[State]]
    small: dict[str, State]

    @property
    def first(self) -> list[State]:
        """Block 1's residual and its differences."""
        return self.residuals[-1]


def _rewrite(trunk: Trunk, plan: SkipPlan, options: FirstBlockCache) -> None:
    """Decide after block 1, and put blocks 2..N into one of two branches."""
    anchor = plan.moved[-1].next  # new work stands before it
    device, tag = value(plan.stream_out).device, FirstBlockCache.__name__
    given = {"clock": clock_of(trunk, plan.clocks, device, anchor, tag), "sample": plan.sample}
    given["contents"] = contents_of(trunk, device, anchor, tag)
    if options.guidance == "together":
        given["marks"] = marks_of(given["contents"], plan.sample, anchor, tag)
    cached = _add_state(trunk, plan, given, options)
    decided = _add_decision(trunk, plan, given, cached, options, anchor)
    outputs = _add_branches(trunk, plan, cached, decided, anchor)
    _take_results(trunk, plan, cached, outputs)


def _add_state(trunk: Trunk, plan: SkipPlan, given: Mapping[str, fx.Node], options: FirstBlockCache) -> _Cached:
    main, sample, clock_shape = value(plan.stream_out), value(plan.sample), value(given["clock"]).shape

    def kept(name: str, like: torch.Tensor, order: int) -> list[State]:
        names = [name, *(f"{name}_difference_{place}" for place in range(1, order + 1))]
        return [trunk.add_state(item, like.shape, like.dtype, like.device) for item in names]

    first = kept("first_residual", main, options.forecast)
    residuals = [kept(f"residual_{place}", value(node), options.forecast) for place, node in enumerate(plan.leaving)]
    small = {
        "counters": trunk.add_state("counters", (2,), torch.int64, main.device),
        "direction": trunk.add_state("direction", clock_shape, torch.float64, main.device),
        "last_clock": trunk.add_state("last_clock", clock_shape, torch.float64, main.device),
        "last_contents": trunk.add_state("last_contents", value(given["contents"]).shape, torch.int64, main.device),
        "last_sample": trunk.add_state("last_sample", sample.shape, sample.dtype, sample.device),
    }
    if options.last_steps_computed:
        small["past_clocks"] = trunk.add_state("past_clocks", (2, *clock_shape), torch.float64, main.device)
    if options.forecast:
        small["num_computed"] = trunk.add_state("num_computed", (), torch.int64, main.device)
    if options.decide_by == "error":
        small["summed_error"] = trunk.add_state("summed_error", (), torch.float32, main.device)
    if options.guidance == "together":
        small["past_marks"] = trunk.add_state("past_marks", (2,), torch.int64, main.device)
        kinds = (clock_shape, torch.float64), ((value(given["marks"]).shape[0] + 1,), torch.int64), ((), torch.bool)
        for name, (shape, dtype) in zip(RECORD, kinds, strict=True):
            small[name] = trunk.add_state(name, shape, dtype, main.device)
            small[name].is_shared = True
    return _Cached(residuals=[*residuals, first], small=small)


def _add_decision(
    trunk: Trunk,
    plan: SkipPlan,
    given: Mapping[str, fx.Node],
    cached: _Cached,
    options: FirstBlockCache,
    anchor: fx.Node,
) -> list[fx.Node]:
    """Add the decision, which the runtime is told of, and the next values of the small state.

    Returns the predicate, and the forecast's coefficients.
    """
    first, *differences = [state.placeholder for state in cached.first]
    operands = {"before": plan.stream_in, "after": plan.stream_out, "first": first}
    operands |= given
    operands |= {name: state.placeholder for name, state in cached.small.items()}
    names = [f"difference_{place}" for place in range(1, len(differences) + 1)]
    operands |= dict(zip(names, differences, strict=True))
    group = None
    if trunk.sharding is not None and plan.stream_out in trunk.sharding.streams:
        operands["is_ours"] = is_ours(trunk.sharding, plan.stream_out, anchor, FirstBlockCache.__name__)
        group = trunk.sharding.split.group
    if trunk.shared is not None and trunk.group is not None and options.guidance == "together":
        group = trunk.group.name  # rows of ranks, too, that have a half of the guidance each

    def decide(**operands: Any) -> dict[str, Any]:
        forecasting = Forecasting(
            differences=[operands.pop(name) for name in names],
            **{name: operands.pop(name) for name in SMALL_STATE if name in operands},
        )
        lead = APART
        if options.guidance == "together":
            record = {name: operands.pop(name) for name in ("marks", "past_marks", *RECORD)}
            lead = Lead(clock=operands["clock"], last_clock=operands["last_clock"], **record)
        return options.decide(group=group, lead=lead, forecasting=forecasting, **operands)

    decided = inline(trunk.graph, decide, operands, before=anchor, tag=FirstBlockCache.__name__)
    for name, state in cached.small.items():
        state.next_value = decided[name]
    trunk.observed |= {"reused": decided["reused"], "difference": decided["difference"]}
    return [decided["reused"], *(decided[f"ahead_{place}"] for place in range(1, options.forecast + 1))]


def _add_branches(
    trunk: Trunk, plan: SkipPlan, cached: _Cached, decided: Sequence[fx.Node], anchor: fx.Node
) -> list[fx.Node]:
    """Add the ``cond``; its results are what leaves the blocks, then the next state that it caches."""
    tag = FirstBlockCache.__name__
    counterparts = counterparts_of(trunk, plan, anchor, tag)
    states = [state.placeholder for residual in cached.residuals for state in residual]
    reused, *ahead = decided
    read = [*counterparts, plan.stream_in, plan.stream_out, *ahead, *states]
    passed = operands_of_branches(trunk, plan, read, anchor, tag)
    miss, hit = Branch(trunk.module, passed, tag), Branch(trunk.module, passed, tag)

    miss.copy(plan.moved)
    for block in trunk.blocks[1:]:
        block.call = miss.env[block.call]
    computed = [miss.env[node] for node in plan.leaving]
    changes = [miss.call(torch.sub, now, miss.env[base]) for now, base in zip(computed, counterparts, strict=True)]
    # Taken anew where it is kept: a step that reuses need not write it.
    changes.append(miss.call(torch.sub, miss.env[plan.stream_out], miss.env[plan.stream_in]))
    kept = []
    for now, (last, *differences) in zip(changes, cached.residuals, strict=True):
        kept.append(now)
        if differences:
            # What is no number must not outlive the step: nothing is a difference that leads nowhere.
            kept.append(
                miss.call(torch.nan_to_num, miss.call(torch.sub, now, miss.env[last.placeholder]), 0.0, 0.0, 0.0)
            )
        kept += [miss.env[state.placeholder] for state in differences[:-1]]

    handed_on = [
        hit.call(torch.add, hit.env[base], restored(hit, [state.placeholder for state in residual], ahead))
        for base, residual in zip(counterparts, cached.residuals, strict=False)
    ]
    left = [hit.make(LEAVE, hit.env[state]) for state in states]
    branches = {"cache_hit": (hit, [*handed_on, *left]), "cache_miss": (miss, [*computed, *kept])}
    return add_cond(trunk.module, reused, branches, passed.values(), before=anchor)


def _take_results(trunk: Trunk, plan: SkipPlan, cached: _Cached, outputs: Sequence[fx.Node]) -> None:
    """Have what follows the blocks read the ``cond``, and erase what has moved into it."""
    core = set(plan.moved)
    bodies = {item for node in plan.moved for item in node.all_input_nodes if item not in core and is_submodule(item)}
    for node, replacement in zip(plan.leaving, outputs, strict=False):
        for user in list(node.users):
            if user not in core:
                user.replace_input_with(node, replacement)
    states = [state for residual in cached.residuals for state in residual]
    for state, output in zip(states, outputs[len(plan.leaving) :], strict=True):
        state.next_value, state.may_be_left = output, True
    for node in reversed(plan.moved):
        trunk.graph.erase_node(node)
    for node in bodies:
        if not node.users:
            trunk.graph.erase_node(node)
    settle(trunk.graph)
    refresh(trunk.graph, set(outputs))
