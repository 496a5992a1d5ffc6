"""First-block cache: skip blocks 2..N of a step whose first block changed little since the last computed step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile.errors import OptionError
from hvcompile.float8.linear import reason_unfit
from hvcompile.graph.inline import inline
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting.branching import Cached, add_branches, add_state, small_state
from hvcompile.rewriting.following import clock_of, contents_of, is_ours, marks_of
from hvcompile.rewriting.forecast import KEPT, NO_FORECAST, SMALL_STATE, Forecasting, along_clock, widened
from hvcompile.rewriting.guidance import APART, RECORD, Lead
from hvcompile.rewriting.reuse import counted, is_one_of, near_end, new_generation, on_all_ranks, relative_change
from hvcompile.rewriting.skipping import SkipPlan, plan_skip
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.trunk import Trunk

# Beyond it a number means nothing here, and would not fit the tensors that it is compared with.
MOST = 1e9
CHOICES: Mapping[str, tuple[object, ...]] = {
    **{"forecast": (0, 1, 2), "decide_by": ("change", "error"), "guidance": ("together", "apart")},
    **{"front_blocks": (0, 1), "keep": tuple(KEPT)},
}
SMALL_STATE_OF = ("last_steps_computed", "forecast", "front_blocks", "decide_by")


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
        front_blocks: how many blocks run in every step. With 1 it is looked at. With 0 a step that reuses runs no block
            at all, and nothing is compared: ``computed_steps`` and the other counts decide alone, so ``threshold`` must
            be 1e9. A forecast, at most 1, then goes straight on in the timestep.
        keep: in which dtype the differences of a forecast are kept: "full" is that of the streams, "bfloat16" and
            "float8" take less memory. Float8 has a scale for each tensor.

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
            isfinite: bool[] = where_4.isfinite()
            le: bool[] = le(where_4, 0.06)
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

    threshold: float = 0.06
    warmup_steps: int = 0
    max_consecutive_hits: int | None = None
    last_steps_computed: int = 0
    computed_steps: tuple[int, ...] = ()
    forecast: int = 0
    decide_by: str = "change"
    guidance: str = "together"
    front_blocks: int = 1
    keep: str = "full"

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
        for name, choices in CHOICES.items():
            choice = getattr(self, name)
            if choice not in choices:
                raise OptionError(
                    f"first_block_cache.{name} is {choice!r}; allowed is {' or '.join(map(repr, choices))}"
                )
            if name == "decide_by" and choice != "change" and not self.forecast:
                raise OptionError(
                    f"first_block_cache.{name} is {choice!r}, which has no meaning without a forecast; set "
                    "first_block_cache.forecast to 1 or 2"
                )
        if not self.front_blocks:
            self._check_fixed()

    def _check_fixed(self) -> None:
        """Raise OptionError where other options need block 1, or none says which steps to compute."""
        nothing = "first_block_cache.front_blocks is 0, so no block is looked at"
        if self.threshold < MOST:
            raise OptionError(
                f"{nothing}, and first_block_cache.threshold, {self.threshold!r}, has nothing to be compared with; set "
                f"it to {MOST:g} and list the steps to compute in first_block_cache.computed_steps"
            )
        for name, fits, allowed in (("decide_by", ("change",), "'change'"), ("forecast", (0, 1), "0 or 1")):
            setting = getattr(self, name)
            if setting not in fits:
                raise OptionError(
                    f"{nothing}, which first_block_cache.{name}={setting!r} goes by; allowed is {allowed}"
                )
        if not self.computed_steps and self.max_consecutive_hits is None:
            raise OptionError(
                f"{nothing}, and nothing says which steps are computed; give first_block_cache.computed_steps or "
                "first_block_cache.max_consecutive_hits"
            )

    @property
    def compares_first_block(self) -> bool:
        """Whether block 1 is looked at."""
        return self.front_blocks > 0

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the trunk's calls 2..N, or all, into one ``cond``; see the class."""
        del context
        plan = plan_skip(trunk, self.front_blocks)
        if isinstance(plan, Declined):
            return plan.report(trunk.lists or "graph")
        if trunk.earlier is not None:
            earlier = trunk.add_earlier(value(plan.stream_in).device)
            assert earlier.clock is not None
            assert earlier.mark is not None
            plan = dataclasses.replace(plan, clocks=(earlier.clock,), sample=earlier.mark)
        device = value(plan.stream_in).device
        reason = reason_unfit(device) if self.keep == "float8" and device.type == "cuda" else ""
        options = dataclasses.replace(self, keep="bfloat16") if reason else self
        _rewrite(trunk, plan, options)
        streams = ", ".join(f"{node.name} {tuple(value(node).shape)}" for node in plan.leaving)
        said = f"{trunk.blocks[self.front_blocks].path} .. {trunk.blocks[-1].path} run on a miss; cached: {streams}"
        return PassReport(matched=(said,), unmet=(("keep='float8'", reason),) if reason else ())

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
        is_new, steps, allowed, follow = self._may_reuse(
            steps, streak, lead, clock=clock, last_clock=last_clock, past_clocks=past_clocks, **generation
        )
        forecasting = forecasting.within(is_new)
        flags = lead.flags(allowed) if self.threshold < MOST else lead.flags_of_schedule(allowed)
        change, (may, follows), products, enough = relative_change(
            residual, first, flags, forecasting=forecasting, is_ours=is_ours, group=group
        )
        ahead = forecasting.ahead(products, enough)
        change = ahead.judged(change)
        difference = torch.where(is_new, torch.full_like(change, math.inf), change)
        reused = difference.isfinite() & ((difference <= self.threshold) | follows) & may
        follow |= {**ahead.follow(reused), **lead.follow(reused, steps), "counters": counted(steps, streak, reused)}
        return {"reused": reused, "difference": difference, **follow}

    def decide_by_number(
        self,
        *,
        counters: torch.Tensor,
        clock: torch.Tensor,
        is_number: torch.Tensor,
        num_computed: torch.Tensor | None = None,
        computed_clocks: torch.Tensor | None = None,
        group: str | None = None,
        lead: Lead = APART,
        **generation: Any,
    ) -> dict[str, Any]:
        """The decision of one step where no block is looked at, as graph code; for what isn't said here see ``decide``.

        Args:
            counters: as there, and so are ``clock``, ``group``, ``lead`` and ``generation``.
            clock: of this step.
            is_number: whether what the last computed step has kept is finite, bool scalar.
            num_computed: steps computed in this generation, int64 scalar; None where nothing is forecast.
            computed_clocks: timesteps of the last two computed ones, latest first, float64 ``[2, K]``; None likewise.
            group: of all ranks.
            lead: of the step.
            **generation: of the step.

        Returns:
            As there. The difference is 0, and infinite in a generation's first step.

        """
        steps, streak = counters[0], counters[1]
        is_new, steps, allowed, follow = self._may_reuse(steps, streak, lead, clock=clock, **generation)
        may, _ = lead.flags_of_schedule(allowed & is_number)
        if num_computed is not None and computed_clocks is not None:
            num_computed = torch.where(is_new, torch.zeros_like(num_computed), num_computed)
            reused, enough = on_all_ranks([may, num_computed > 1], group)
            follow["ahead_1"] = along_clock(clock, computed_clocks, enough)
            follow["num_computed"] = num_computed + reused.logical_not().to(torch.int64)
            follow["computed_clocks"] = torch.where(reused, computed_clocks, torch.stack([clock, computed_clocks[0]]))
        else:
            (reused,) = on_all_ranks([may], group)
        nothing = torch.zeros_like(clock[0], dtype=torch.float32)
        difference = torch.where(is_new, torch.full_like(nothing, math.inf), nothing)
        follow |= {**lead.follow(reused, steps), "counters": counted(steps, streak, reused)}
        return {"reused": reused, "difference": difference, **follow}

    def _may_reuse(
        self,
        steps: torch.Tensor,
        streak: torch.Tensor,
        lead: Lead,
        *,
        clock: torch.Tensor,
        last_clock: torch.Tensor,
        past_clocks: torch.Tensor | None = None,
        **generation: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Whether a step is new, its number, whether it may reuse by all that is no block's, and what is kept of it."""
        is_new, steps, follow = new_generation(steps, clock=clock, last_clock=last_clock, **generation)
        steps = lead.number(steps)
        allowed = is_new.logical_not() & self._is_left_out(steps, streak)
        if past_clocks is not None:
            is_known, is_near_end, kept_clocks = near_end(
                self.last_steps_computed, is_new, past_clocks=past_clocks, last_clock=last_clock, clock=clock
            )
            allowed = allowed & is_known & is_near_end.logical_not()
            follow["past_clocks"] = torch.stack(kept_clocks)
        return is_new, steps, allowed, follow

    def _is_left_out(self, steps: torch.Tensor, streak: torch.Tensor) -> torch.Tensor:
        """Whether a step may reuse by its number and by how many before it did, as graph code."""
        allowed = steps >= self.warmup_steps
        if self.max_consecutive_hits is not None:
            allowed = allowed & (streak < self.max_consecutive_hits)
        if self.computed_steps:
            allowed = allowed & is_one_of(steps, self.computed_steps).logical_not()
        return allowed


def _rewrite(trunk: Trunk, plan: SkipPlan, options: FirstBlockCache) -> None:
    """Decide whether to reuse, and put the blocks that are skipped then into one of two branches."""
    anchor = plan.moved[-1].next  # new work stands before it
    device, tag = value(plan.stream_in).device, FirstBlockCache.__name__
    given = {"clock": clock_of(trunk, plan.clocks, device, anchor, tag), "sample": plan.sample}
    given["contents"] = contents_of(trunk, device, anchor, tag)
    if options.guidance == "together":
        given["marks"] = marks_of(given["contents"], plan.sample, anchor, tag)
    small = small_state(**{name: getattr(options, name) for name in SMALL_STATE_OF})
    cached = add_state(trunk, plan, given, order=options.forecast, keep=options.keep, small=small)
    decided = _add_decision(trunk, plan, given, cached, options, anchor)
    ahead = [decided[f"ahead_{place}"] for place in range(1, options.forecast + 1)]
    add_branches(trunk, plan, cached, decided["reused"], ahead, anchor, tag)


def _add_decision(
    trunk: Trunk,
    plan: SkipPlan,
    given: Mapping[str, fx.Node],
    cached: Cached,
    options: FirstBlockCache,
    anchor: fx.Node,
) -> Mapping[str, fx.Node]:
    """Add the decision, which the runtime is told of, and the next values of the small state; gives its nodes."""
    operands = {**given, **{name: state.placeholder for name, state in cached.small.items()}}
    names: list[str] = []
    group = None
    if plan.stream_out is not None:
        first, *differences = [state.placeholder for state in cached.first]
        operands |= {"before": plan.stream_in, "after": plan.stream_out, "first": first}
        names = [f"difference_{place}" for place in range(1, len(differences) + 1)]
        operands |= dict(zip(names, differences, strict=True))
        scales = {f"scale_{place}": state.placeholder for place, state in enumerate(cached.scales[-1], 1)}
        operands |= scales
        if trunk.sharding is not None and plan.stream_out in trunk.sharding.streams:
            operands["is_ours"] = is_ours(trunk.sharding, plan.stream_out, anchor, FirstBlockCache.__name__)
            group = trunk.sharding.split.group
    if cached.is_number is not None:
        operands["is_number"] = cached.is_number.placeholder
        group = trunk.group.name if trunk.group is not None else None
    if trunk.shared is not None and trunk.group is not None and options.guidance == "together":
        group = trunk.group.name  # rows of ranks, too, that have a half of the guidance each

    def decide(**operands: Any) -> dict[str, Any]:
        lead = APART
        if options.guidance == "together":
            record = {name: operands.pop(name) for name in ("marks", "past_marks", *RECORD)}
            lead = Lead(clock=operands["clock"], last_clock=operands["last_clock"], **record)
        if not options.front_blocks:
            return options.decide_by_number(group=group, lead=lead, **operands)
        forecasting = Forecasting(
            differences=[
                widened(operands.pop(name), operands.pop(name.replace("difference", "scale"), None)) for name in names
            ],
            **{name: operands.pop(name) for name in SMALL_STATE if name in operands},
        )
        return options.decide(group=group, lead=lead, forecasting=forecasting, **operands)

    decided = inline(trunk.graph, decide, operands, before=anchor, tag=FirstBlockCache.__name__)
    for name, state in cached.small.items():
        state.next_value = decided[name]
    trunk.observed |= {"reused": decided["reused"], "difference": decided["difference"]}
    return decided
