"""State between calls of a compiled graph: whose it is, which generation's, and when it goes.

A compiled graph takes its state as extra inputs and returns the next state as extra outputs; ``CompiledTrunk`` owns
the exchange. State is kept in slots. A slot belongs to one model with its weights as they are, one thread, one compiled
graph, one set of shapes and one set of conditions (text embeddings, masks ...), so the two halves of classifier-free
guidance, two prompts, two pipelines and two threads each have their own. Nothing is read back from the device to find a
slot as long as a pipeline hands in the same, unmodified condition tensors step after step; for a new tensor, one number
is.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hvcompile import inductor
from hvcompile.agreement import Agreement
from hvcompile.derived import DerivedCall, Kept
from hvcompile.errors import UncompiledModelError
from hvcompile.fingerprints import fingerprint
from hvcompile.float8 import Granularity
from hvcompile.pipeline import JournalRow
from hvcompile.quantized_weights import Joined, Restored, join, restore_weights

log = logging.getLogger(__name__)

# A slot that was not used in this many calls of its model belongs to a generation that is over.
STALE_AFTER_CALLS = 32
# Generations (or guidance halves) that run at the same time in one model at most; each holds two or more activations.
MOST_SLOTS = 8
# Steps whose decision is kept for ``stats``; counts go on beyond it.
KEPT_STEPS = 10_000


class Step(NamedTuple):
    """One call's decision: its slot, whether blocks 2..N were reused, and block 1's relative difference.

    ``difference`` is infinite where there was nothing to compare with.
    """

    slot: int
    reused: bool
    difference: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """What a compiled model did so far.

    Attributes:
        graphs: distinct graphs that Dynamo captured for this model; more than one means graph breaks.
        recompiles: further captures of those graphs (a new shape, another dtype, other guards).
        hits: steps that reused the cached residuals.
        misses: steps that computed all blocks.
        slots: slots that hold state now.
        bytes: bytes that the slots and derived inputs hold.
        steps: the last decisions, oldest first, at most ``KEPT_STEPS`` of them.
        journal: for each captured graph, what every pass did.
        unfit: calls that ran a graph compiled for what the first one is not fit for, such as a mask with a hole in it;
            its journal says why.

    """

    graphs: int
    recompiles: int
    hits: int
    misses: int
    slots: int
    bytes: int
    steps: list[Step]
    journal: list[list[JournalRow]]
    unfit: int = 0


@dataclasses.dataclass(eq=False)
class Slot:
    """The state of one generation, and when it was last used."""

    number: int
    tensors: list[torch.Tensor]
    last_call: int


@dataclasses.dataclass(eq=False)
class ModelState:
    """Everything that is kept for one model; dies with the model."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    graphs: dict[int, tuple[tuple[int, int], list[JournalRow]]] = dataclasses.field(default_factory=dict)
    # Weakly: they go with the compiled graphs.
    agreements: weakref.WeakSet[Agreement] = dataclasses.field(default_factory=weakref.WeakSet)
    slots: dict[Any, Slot] = dataclasses.field(default_factory=dict)
    weights: dict[int, _Weights] = dataclasses.field(default_factory=lambda: collections.defaultdict(_Weights))
    stored: dict[int, _StoredWeights] = dataclasses.field(default_factory=dict)
    numbers: itertools.count[int] = dataclasses.field(default_factory=itertools.count)
    kept: dict[tuple[int, int], Kept] = dataclasses.field(default_factory=lambda: collections.defaultdict(Kept))
    unfit: int = 0
    calls: int = 0
    hits: int = 0
    misses: int = 0
    pending: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)
    steps: collections.deque[Step] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=KEPT_STEPS))

    def read_pending(self) -> None:
        """Fetch the decisions that still lie on the device."""
        with self.lock:
            pending, self.pending = self.pending, []
            for slot, record in pending:
                reused, difference = record.tolist()
                self.steps.append(Step(slot, bool(reused), difference))
                self.hits += int(reused)
                self.misses += int(not reused)


# There are over a thousand weights to look at in every step: what runs for each of them runs in C.
_VERSION = operator.attrgetter("_version")
_JOINED = operator.attrgetter("joined")


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the items at these places out of a sequence."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda items: tuple(items[place] for place in places)


# A call's numbers, and the fingerprints of its conditions: what tells its generation from others.
_Generation = tuple[tuple[Any, ...], tuple[int, ...]]

# Tells compiled graphs apart.
_NUMBERS = itertools.count()

# An index, not a store: it maps a parameter of a model to what is kept for it, and lets go when the model does.
_MODELS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_MODELS_LOCK = threading.Lock()


def model_state(anchor: torch.Tensor) -> ModelState:
    """What is kept for the model that this parameter belongs to."""
    with _MODELS_LOCK:
        if anchor not in _MODELS:
            _MODELS[anchor] = ModelState()
        state = _MODELS[anchor]
        return state  # type: ignore[no-any-return]


def _kept_of(module: torch.nn.Module) -> list[ModelState]:
    with _MODELS_LOCK:
        tensors = itertools.chain(module.parameters(), module.buffers())
        return [_MODELS[tensor] for tensor in tensors if tensor in _MODELS]


def _states_of(model: torch.nn.Module | Callable[..., Any]) -> list[ModelState]:
    module = getattr(model, "_orig_mod", model)  # torch.compile(model) wraps; model.compile() does not
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"expected the compiled torch.nn.Module, or what torch.compile made of it, got {type(model).__name__}: "
            "give the module, also where only its forward was compiled"
        )
    states = _kept_of(module)
    if not states:
        raise UncompiledModelError(
            f"this {type(module).__name__} has not run under hvfast yet: compile it with "
            f'model.compile(backend="hvfast") and call it once'
        )
    return states


def stats(model: torch.nn.Module | Callable[..., Any]) -> Stats:
    """What a compiled model did so far; waits for the device.

    Args:
        model: the module given to ``torch.compile``, or what that returned.

    Raises:
        UncompiledModelError: the model has not run under this backend.
        DisagreementError: ranks that share a sequence were given different inputs in one of the last steps.

    """
    states = _states_of(model)
    for state in states:
        state.read_pending()
        for agreement in list(state.agreements):
            agreement.look()
    captured, slots, steps, tensors = [], [], [], []
    for state in states:
        with state.lock:
            captured += list(state.graphs.values())
            slots += list(state.slots.values())
            steps += list(state.steps)
            tensors += [tensor for kept in list(state.kept.values()) for tensor in kept.tensors()]
    graphs = len({frame for (frame, _), _ in captured})
    return Stats(
        graphs=graphs,
        recompiles=len(captured) - graphs,
        hits=sum(state.hits for state in states),
        misses=sum(state.misses for state in states),
        slots=len(slots),
        bytes=sum(
            tensor.untyped_storage().nbytes() for tensor in [*(t for slot in slots for t in slot.tensors), *tensors]
        ),
        steps=steps,
        journal=[journal for _, journal in captured],
        unfit=sum(state.unfit for state in states),
    )


def reset(model: torch.nn.Module | Callable[..., Any]) -> None:
    """Forget all cached state and statistics of a model, so that its next step is computed.

    Not needed for a new prompt, shape or schedule: those are found from the inputs. It is needed where the inputs
    can't tell: before a generation with the same conditions as one that was broken off at a *later* timestep than the
    new one begins at, between generations with the same conditions that run step by step in turn in one thread, and
    after conditions or weights were written through ``.data`` or another view that PyTorch does not track.

    Raises:
        UncompiledModelError: the model has not run under this backend.

    """
    for state in _states_of(model):
        with state.lock:
            state.slots.clear()
            state.kept.clear()
            state.unfit = 0
            state.pending.clear()
            state.steps.clear()
            state.hits = state.misses = 0
            for agreement in state.agreements:
                agreement.forget()


def restore(model: torch.nn.Module | Callable[..., Any]) -> Restored:
    """Bring back the weights that hvfast keeps in float8, so that the model can be saved, moved, changed or run.

    Exactly where the model was compiled with ``options={"fp8": {"keep_original": "cpu"}}``; else to within float8's
    precision (half a step of three mantissa bits; what is far below the largest value of its row may become 0), which
    a warning says. The next call of the compiled model compiles again and quantises them anew, with what was changed
    in between.

    Args:
        model: the module, or what ``torch.compile`` made of it.

    Raises:
        TypeError: ``model`` is neither.

    """
    module = getattr(model, "_orig_mod", model)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, or what torch.compile made of it, got {type(model).__name__}")
    restored = restore_weights(module)
    for state in _kept_of(module):
        with state.lock:
            for stored in state.stored.values():
                stored.forget()
    return restored


class _Weights:
    """The weights of the last call of one compiled graph, and a number that changes when any of them does.

    That is where a weight is written to in place (a fused LoRA, ``load_state_dict``) or is another tensor, be it one
    that stood elsewhere before. Read on the host alone. A write through ``.data``, or into a tensor made under
    ``torch.inference_mode()``, leaves no trace and is not seen.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._versioned: list[weakref.ref[torch.Tensor]] = []
        self._versions = -1

    def look(self, weights: Sequence[torch.Tensor]) -> int:
        """The revision of these weights."""
        # Compared by identity, as id() would not do: a freed weight's id comes again.
        is_same = len(weights) == len(self._seen) and all(map(operator.is_, weights, map(operator.call, self._seen)))
        if not is_same:
            self._seen = [weakref.ref(weight) for weight in weights]
            self._versioned = [weakref.ref(weight) for weight in weights if not weight.is_inference()]
            if len(self._versioned) < len(self._seen):
                log.warning(
                    "%d weights were made under torch.inference_mode(): writes into them are not seen, so call "
                    "hvcompile.reset(model) after one",
                    len(self._seen) - len(self._versioned),
                )
        versions = sum(map(_VERSION, map(operator.call, self._versioned)))
        if not is_same or versions != self._versions:
            self._versions = versions
            self.revision += 1
        return self.revision


class _Fingerprints:
    """Fingerprints of condition tensors, remembered for tensors that come again unmodified."""

    def __init__(self) -> None:
        self._known: collections.deque[tuple[weakref.ref[torch.Tensor], int, int]] = collections.deque(maxlen=64)

    def of(self, tensor: torch.Tensor) -> int:
        """The tensor's fingerprint, computed where it is not known."""
        if tensor.is_inference():  # carries no version counter, so it may change unseen
            return fingerprint(tensor)
        for reference, version, known in self._known:
            if reference() is tensor and version == tensor._version:
                return known
        known = fingerprint(tensor)
        self._known.append((weakref.ref(tensor), tensor._version, known))
        return known


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateLayout:
    """How to make a fresh state tensor; ``shape`` may be symbolic."""

    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Weights that the graph takes as one float8 matrix: their positions among the inputs and paths in the model."""

    positions: tuple[int, ...]
    paths: tuple[str, ...]
    granularity: Granularity
    keep_original: bool

    def of(self, args: Sequence[Any]) -> Joined:
        """The matrix for a call with these inputs; made, and the weights freed, where it is not there yet."""
        weights = [args[place] for place in self.positions]
        return join(weights, self.paths, granularity=self.granularity, keep_original=self.keep_original)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calling:
    """Positions of the inputs that the runtime looks at, and what the graph takes and returns beyond its own.

    ``anchor`` is a parameter that stands for the model; None where the graph has no parameters. ``numbers`` are the
    inputs that are no tensors: sizes, and Python numbers given to the model. ``passed`` are the inputs that the
    compiled graph takes, None for all; then come ``derived`` ones, ``stored`` weights, and the state. ``agreement`` is
    there where several ranks run the graph together; the last output may be for it.
    """

    anchor: int | None
    weights: tuple[int, ...]
    conditions: tuple[int, ...]
    numbers: tuple[int, ...]
    symbols: Mapping[int, Any]
    num_outputs: int
    states: tuple[StateLayout, ...]
    has_record: bool
    passed: tuple[int, ...] | None = None
    stored: tuple[WeightLayout, ...] = ()
    derived: tuple[DerivedCall, ...] = ()
    agreement: Agreement | None = None


class _StoredWeights:
    """One model's float8 weights as they are passed to one compiled graph, and a number that changes when any does."""

    def __init__(self, layouts: Sequence[WeightLayout]) -> None:
        self._layouts = layouts
        self._sources = _picker([place for layout in layouts for place in layout.positions])
        self.revision = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._joined: list[Joined] = []
        self._tensors: list[torch.Tensor] = []

    def of(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """What to pass for a call with these inputs."""
        sources = self._sources(args)
        if not self._is_as_before(sources):
            joined = [(layout, layout.of(args)) for layout in self._layouts]
            self._tensors = [tensor for _, item in joined for tensor in (item.data, item.scale)]
            self._joined = [item for layout, item in joined for _ in layout.positions]
            self._seen = [weakref.ref(source) for source in sources]
            self.revision += 1
        return self._tensors

    def forget(self) -> None:
        """Let go of what is held; the next call looks anew."""
        self._seen, self._joined, self._tensors = [], [], []

    def _is_as_before(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the weights of the last call, neither restored since then nor quantised anew."""
        if len(sources) != len(self._seen) or not all(map(operator.is_, sources, map(operator.call, self._seen))):
            return False
        try:
            return all(map(operator.is_, map(_JOINED, sources), self._joined))
        except AttributeError:  # restored, which not every version of Dynamo guards against
            return False


class CompiledTrunk:
    """The callable that Dynamo gets: adds weights and a slot's state to the inputs, takes the next from the outputs."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        calling: Calling,
        journal: list[JournalRow],
        compile_id: tuple[int, int],
        compile_instead: Callable[[Sequence[Any], str, str], Callable[..., Any]] | None = None,
    ) -> None:
        self._compiled, self._calling, self._journal, self._compile_id = compiled, calling, journal, compile_id
        self._weights, self._numbers = _picker(calling.weights), _picker(calling.numbers)
        # Dynamo's own ids begin again at 0 after torch._dynamo.reset(), while the model's state lives on.
        self._number = next(_NUMBERS)
        self._fingerprints = _Fingerprints()
        self._passed = _picker(calling.passed) if calling.passed is not None else None
        self._lock = threading.Lock()
        self._has_warned = False
        # Takes the inputs of a call, the pass whose derived inputs refuse them, and why.
        self._compile_instead = compile_instead
        self._instead: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run one step: the captured graph's inputs in, its outputs out."""
        calling = self._calling
        if calling.agreement is None:
            return self._step(args)
        generation = self._generation(args)
        calling.agreement.before(*generation, args)
        try:
            return self._step(args, generation)
        except RuntimeError as error:
            error.add_note(
                "This step runs on several ranks. Where the error speaks of a connection, a peer or a timeout, another "
                "rank has ended or hangs: look at what that one printed."
            )
            raise

    def _step(self, args: Sequence[Any], generation: _Generation | None = None) -> Sequence[Any]:
        calling = self._calling
        if calling.anchor is None:
            return self._run(args)
        model = model_state(args[calling.anchor])
        if self._number not in model.graphs:
            with model.lock:
                model.graphs[self._number] = (self._compile_id, self._journal)
                if calling.agreement is not None:
                    model.agreements.add(calling.agreement)
        added: list[Any] = []
        for item, made in self._derive(model, args):
            if isinstance(made, str):
                with model.lock:
                    model.unfit += 1
                return self._run_instead(args, item.made_by, made)
            added += made
        stored, revision = self._stored_weights(model, args) if calling.stored else ([], 0)
        added += stored
        passed = self._passed(args) if self._passed is not None else args
        if not calling.states:
            return self._run([*passed, *added])
        slot = self._slot(model, args, revision, generation or self._generation(args))
        results = self._run([*passed, *added, *slot.tensors])
        end = calling.num_outputs + len(calling.states)
        slot.tensors = list(results[calling.num_outputs : end])
        if calling.has_record:
            with model.lock:
                model.pending.append((slot.number, results[end]))
            if len(model.pending) >= KEPT_STEPS:
                model.read_pending()
        return results[: calling.num_outputs]

    def _run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        results: Sequence[Any] = self._compiled(*inputs)
        agreement = self._calling.agreement
        if agreement is None or not agreement.is_in_graph:
            return results
        agreement.saw(results[-1])
        return results[:-1]

    def _derive(self, model: ModelState, args: Sequence[Any]) -> Iterator[tuple[DerivedCall, Sequence[Any] | str]]:
        for place, item in enumerate(self._calling.derived):
            yield item, model.kept[self._number, place].of(item, args)

    def derived_inputs(self, args: Sequence[Any]) -> dict[str, Any] | str:
        """What a call with these inputs adds to them, by the placeholder's name; or why another graph runs it."""
        anchor = self._calling.anchor
        found: dict[str, Any] = {}
        for item, made in self._derive(model_state(args[anchor]), args) if anchor is not None else ():
            if isinstance(made, str):
                return made
            found |= dict(zip(item.names, made, strict=True))
        return found

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
            stored = model.stored.setdefault(self._number, _StoredWeights(self._calling.stored))
            return stored.of(args), stored.revision

    def _generation(self, args: Sequence[Any]) -> _Generation:
        with self._lock:
            conditions = tuple(self._fingerprints.of(args[place]) for place in self._calling.conditions)
        return self._numbers(args), conditions

    def _slot(self, model: ModelState, args: Sequence[Any], stored_revision: int, generation: _Generation) -> Slot:
        with model.lock:
            weights = model.weights[self._number].look(self._weights(args))
            thread = weakref.ref(threading.current_thread())
            key = (thread, self._number, weights, stored_revision, *generation)
            model.calls += 1
            for other, slot in list(model.slots.items()):
                owner = other[0]()
                if owner is None or not owner.is_alive() or model.calls - slot.last_call > STALE_AFTER_CALLS:
                    del model.slots[other]
            found = model.slots.get(key)
            if found is None:
                if len(model.slots) >= MOST_SLOTS:
                    oldest = min(model.slots, key=lambda other: model.slots[other].last_call)
                    del model.slots[oldest]
                    self._warn_of_churn()
                found = model.slots[key] = Slot(next(model.numbers), self._fresh(args), 0)
            found.last_call = model.calls
            return found

    def _warn_of_churn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "hvfast keeps state for %d sets of conditions at most and has dropped the oldest: an input beside the "
                "sample and the timestep changes at every step, or more generations than that run at once. Steps whose "
                "state was dropped are computed",
                MOST_SLOTS,
            )

    def _fresh(self, args: Sequence[Any]) -> list[torch.Tensor]:
        symbols = {symbol: args[place] for place, symbol in self._calling.symbols.items()}
        return [
            torch.zeros(
                [inductor.evaluate_size(size, symbols) for size in layout.shape],
                dtype=layout.dtype,
                device=layout.device,
            )
            for layout in self._calling.states
        ]
