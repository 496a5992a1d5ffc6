"""The callable that Dynamo gets: what a call's graph takes beside its inputs, and what is taken from its outputs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hvcompile.hollow.host import values_on_host
from hvcompile.journal import Declined, JournalRow
from hvcompile.ranks.fingerprints import Fingerprints
from hvcompile.runtime import probing
from hvcompile.runtime.agreement import Agreement
from hvcompile.runtime.derived import DerivedCall
from hvcompile.runtime.left_state import Left, watching
from hvcompile.runtime.lineage import Origins, Traced, record
from hvcompile.runtime.slots import Slot
from hvcompile.runtime.state import ModelState, model_state
from hvcompile.runtime.weights import StoredFloat8, WeightLayout, picker
from hvcompile.torch_private import fakes
from hvcompile.trunk.lineage import Flow, Made

log = logging.getLogger(__name__)

# A call's numbers, and the fingerprints of its conditions: what tells its generation from others.
_Generation = tuple[tuple[Any, ...], tuple[int, ...]]

# Tells compiled graphs apart.
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateLayout:
    """How to make a fresh state tensor, whose ``shape`` may be symbolic, and how it is kept; see ``trunk.State``."""

    name: str
    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    may_be_left: bool = False
    is_shared: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallPlan:
    """Positions of the inputs that the runtime looks at, and what the graph takes and returns beyond its own.

    ``anchor`` is a parameter that stands for the model; None where the graph has no parameters. ``numbers`` are the
    inputs that are no tensors: sizes, and Python numbers given to the model. ``held`` are Python floats of the model's
    own, which Dynamo passes as tensors. ``passed`` are the inputs that the compiled graph takes, None for all; then
    come ``derived`` ones, ``stored`` weights, those that are ``hosted`` (as the tensors on the host), what ``origins``
    tells of earlier graphs, the weights' content on ``content_device``, unless that is None, and the state.
    ``agreement`` is there where several ranks run the graph
    together; the last output may be for it.
    """

    anchor: int | None
    weights: tuple[int, ...]
    conditions: tuple[int, ...]
    numbers: tuple[int, ...]
    symbols: Mapping[int, Any]
    num_outputs: int
    states: tuple[StateLayout, ...]
    has_record: bool
    content_device: torch.device | None = None
    passed: tuple[int, ...] | None = None
    stored: tuple[WeightLayout, ...] = ()
    hosted: tuple[int, ...] = ()
    derived: tuple[DerivedCall, ...] = ()
    held: tuple[int, ...] = ()
    agreement: Agreement | None = None
    origins: Origins | None = None


def _content(floats: Sequence[torch.Tensor]) -> str:
    """What differs where one of these floats, tensors of no dimensions on the CPU, does."""
    return hashlib.sha256(torch.stack(list(floats)).numpy().tobytes()).hexdigest()[:16]


def _sizes(layout: StateLayout, symbols: Mapping[Any, Any]) -> list[int]:
    return [fakes.evaluate_size(size, symbols) for size in layout.shape]


class CompiledGraph:
    """The callable that Dynamo gets: adds weights and a slot's state to the inputs, takes the next from the outputs."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        plan: CallPlan,
        journal: list[JournalRow],
        compile_id: tuple[int, int],
        compile_instead: Callable[[Sequence[Any], str, str], Callable[..., Any]] | None = None,
        flow: Flow | None = None,
    ) -> None:
        # Of a piece of a model, whose outputs other pieces take; None where the graph is whole.
        self._flow = flow
        self._compiled, self._plan, self._journal, self._compile_id = compiled, plan, journal, compile_id
        self._weights, self._numbers = picker(plan.weights), picker(plan.numbers)
        self._held, self._hosted = picker(plan.held), picker(plan.hosted)
        # Dynamo's own ids begin again at 0 after torch._dynamo.reset(), while the model's state lives on.
        self._number = next(_NUMBERS)
        self._fingerprints = Fingerprints()
        self._passed = picker(plan.passed) if plan.passed is not None else None
        self._lock = threading.Lock()
        self._has_warned = self._has_lost_trace = False
        # Takes the inputs of a call, the pass whose derived inputs refuse them, and why.
        self._compile_instead = compile_instead
        self._instead: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run one step: the captured graph's inputs in, its outputs out."""
        results = self._run_call(args)
        if self._flow is not None:
            record(self._number, functools.partial(self._made, args, self._flow), self._flow, args, results)
        return results

    def _run_call(self, args: Sequence[Any]) -> Sequence[Any]:
        plan = self._plan
        if plan.agreement is None:
            return self._step(args)
        generation = self._generation(args)
        plan.agreement.before(*generation, args)
        try:
            return self._step(args, generation)
        except RuntimeError as error:
            error.add_note(
                "This step runs on several ranks. Where the error speaks of a connection, a peer or a timeout, another "
                "rank has ended or hangs: look at what that one printed."
            )
            raise

    def _step(self, args: Sequence[Any], generation: _Generation | None = None) -> Sequence[Any]:
        plan = self._plan
        if plan.anchor is None:  # nor does it take any weight
            return self._run(args)
        model = model_state(args[plan.anchor])
        if self._number not in model.graphs:
            with model.lock:
                model.graphs[self._number] = (self._compile_id, self._journal)
                if plan.agreement is not None:
                    model.agreements.add(plan.agreement)
        added: list[Any] = []
        for item, values in self._derive(model, args):
            if isinstance(values, Declined):
                with model.lock:
                    model.unfit += 1
                return self._run_instead(args, item.made_by, values.reason)
            added += values
        stored, revision = self._stored_weights(model, args) if plan.stored else ([], 0)
        added += stored
        added += map(values_on_host, self._hosted(args))
        passed = self._passed(args) if self._passed is not None else args
        if not plan.states:
            return self._run([*passed, *added])
        traced, told = self._trace(args)
        slot, shared, content = self._slot(model, args, revision, generation or self._generation(args), traced)
        own, common = iter(slot.tensors), iter(shared)
        state = [next(common if layout.is_shared else own) for layout in plan.states]
        with watching() as left:
            results = self._run([*passed, *added, *told, *content, *state])
        end = plan.num_outputs + len(plan.states)
        state = self._next_state(state, results[plan.num_outputs : end], left)
        slot.tensors, shared[:] = (
            [tensor for tensor, layout in zip(state, plan.states, strict=True) if layout.is_shared == is_shared]
            for is_shared in (False, True)
        )
        probe = probing.current()
        if probe is not None:
            names = [layout.name for layout in plan.states]
            probe(self._number, slot.number, dict(zip(names, state, strict=True)))
        if plan.has_record:
            model.add_pending(slot.number, results[end])
        return results[: plan.num_outputs]

    def _next_state(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], left: Left) -> list[Any]:
        """The state of the next step: of what the step left the tensors that it was given, else those that it gave."""
        layouts = self._plan.states
        if left.count not in {0, sum(layout.may_be_left for layout in layouts)}:
            raise RuntimeError(
                f"hvcompile: a step left {left.count} of the tensors of its state, which it leaves together"
            )
        return [
            old if left.count and layout.may_be_left else new
            for old, new, layout in zip(before, after, layouts, strict=True)
        ]

    def _made(self, args: Sequence[Any], flow: Flow) -> Made:
        """The weights that a call was given."""
        plan = self._plan
        if plan.anchor is None:
            return Made(0, None)
        model = model_state(args[plan.anchor])
        weights = self._weights(args) if plan.states else [args[place] for place in flow.weights]
        weights = list(map(values_on_host, weights)) if plan.hosted else weights
        with model.lock:
            known = model.weights[self._number]
            return Made(known.revision_of(weights), known.content_of(weights, args[plan.anchor].device))

    def _trace(self, args: Sequence[Any]) -> tuple[Traced | None, list[torch.Tensor]]:
        """What earlier graphs tell of a call, and what the graph is given of it."""
        origins = self._plan.origins
        if origins is None:
            return None, []
        traced = origins.trace(args)
        if traced is not None:
            return traced, list(traced.given)
        if not self._has_lost_trace:
            self._has_lost_trace = True
            log.warning(
                "hvfast can't tell what an input of this graph was made of in a call, since something between the "
                "pieces of the model made another tensor of it or wrote into it. Such steps are computed"
            )
        return None, origins.untold()

    def _run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        results: Sequence[Any] = self._compiled(*inputs)
        agreement = self._plan.agreement
        if agreement is None or not agreement.is_in_graph:
            return results
        agreement.record(results[-1])
        return results[:-1]

    def _derive(self, model: ModelState, args: Sequence[Any]) -> Iterator[tuple[DerivedCall, Sequence[Any] | Declined]]:
        for place, item in enumerate(self._plan.derived):
            yield item, model.kept[self._number, place].values_for(item, args)

    def derived_inputs(self, args: Sequence[Any]) -> dict[str, Any] | Declined:
        """What a call with these inputs adds to them, by the placeholder's name; or why another graph runs it."""
        anchor = self._plan.anchor
        named: dict[str, Any] = {}
        for item, values in self._derive(model_state(args[anchor]), args) if anchor is not None else ():
            if isinstance(values, Declined):
                return values
            named |= dict(zip(item.names, values, strict=True))
        return named

    def _run_instead(self, args: Sequence[Any], made_by: str, reason: str) -> Sequence[Any]:
        """Run the graph that computes what this one can't; compiled once for each set of sizes."""
        key = (made_by, *self._numbers(args))
        with self._lock:
            if key not in self._instead:
                assert self._compile_instead is not None
                self._instead[key] = self._compile_instead(args, made_by, reason)
        return self._instead[key](*args)  # type: ignore[no-any-return]

    def _stored_weights(self, model: ModelState, args: Sequence[Any]) -> tuple[list[torch.Tensor], int]:
        """The float8 weights to pass, and their revision."""
        with model.lock:
            stored = model.stored.setdefault(self._number, StoredFloat8(self._plan.stored))
            return stored.tensors_for(args), stored.revision

    def _generation(self, args: Sequence[Any]) -> _Generation:
        with self._lock:
            conditions = tuple(self._fingerprints.fingerprint_of(args[place]) for place in self._plan.conditions)
        numbers = self._numbers(args)
        return (*numbers, _content(self._held(args))) if self._plan.held else numbers, conditions

    def _slot(
        self,
        model: ModelState,
        args: Sequence[Any],
        stored_revision: int,
        generation: _Generation,
        traced: Traced | None,
    ) -> tuple[Slot, list[torch.Tensor], list[torch.Tensor]]:
        """The slot of a call, what it shares with others, and its weights' content, where the graph takes that."""
        device, given = self._plan.content_device, self._weights(args)
        if self._plan.hosted:
            given = tuple(map(values_on_host, given))
        earlier: Hashable = None
        if self._plan.origins is not None and traced is not None:
            with self._lock:
                earlier = traced.generation(self._fingerprints.fingerprint_of)
        fresh = functools.partial(self._fresh, args)
        fresh_shared = functools.partial(fresh, is_shared=True)
        with model.lock:
            known = model.weights[self._number]
            weights = known.revision_of(given)
            content = [] if device is None else [known.content_of(given, device)]
            if self._plan.origins is not None and traced is None:
                return model.slots.of_one_call(fresh), fresh_shared(), content
            key = (self._number, weights, stored_revision, *generation, earlier)
            found, churn = model.slots.find(key, [args[place] for place in self._plan.conditions], fresh)
            # Calls of one step may need graphs of their own (texts of other lengths), but not the model's other pieces.
            symbols = self._symbols(args)
            sizes = [tuple(_sizes(layout, symbols)) for layout in self._plan.states if layout.is_shared]
            common = model.slots.shared((self._compile_id[0], *sizes), fresh_shared)
        if churn and not self._has_warned:
            self._has_warned = True
            log.warning(
                "hvfast has dropped state of a generation unused: %s. Steps whose state was dropped are computed", churn
            )
        return found, common, content

    def _fresh(self, args: Sequence[Any], *, is_shared: bool = False) -> list[torch.Tensor]:
        symbols = self._symbols(args)
        return [
            torch.zeros(_sizes(layout, symbols), dtype=layout.dtype, device=layout.device)
            for layout in self._plan.states
            if layout.is_shared == is_shared
        ]

    def _symbols(self, args: Sequence[Any]) -> dict[Any, Any]:
        return {symbol: args[place] for place, symbol in self._plan.symbols.items()}
