"""State between calls of a compiled graph: which model and which generation it belongs to, and when it goes.

A compiled graph takes its state as extra inputs and returns the next state as extra outputs; ``CompiledGraph`` passes
it on. State is kept in slots. A slot belongs to one model with its weights as they are, one thread, one compiled graph,
one set of shapes and one set of conditions (text embeddings, masks ...). So the two halves of classifier-free guidance,
two prompts, two pipelines and two threads each have their own. A slot goes with the conditions that it is known by.

As long as a pipeline passes the same, unmodified condition tensors in every step, finding a slot reads nothing from the
device. For each new tensor it reads one number.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hvcompile.errors import UncompiledModelError
from hvcompile.float8.saved import refuse_to_restore
from hvcompile.float8.weights import Restored, restore_weights
from hvcompile.journal import JournalRow
from hvcompile.runtime.agreement import Agreement
from hvcompile.runtime.derived import Kept
from hvcompile.runtime.slots import Slots
from hvcompile.runtime.weights import StoredFloat8, WeightRevisions
from hvcompile.torch_private.dynamo import compiled_module
from hvcompile.torch_private.frames import called_module

# Steps whose decision is kept for ``stats``; hits and misses are counted beyond it.
KEPT_STEPS = 10_000


class Step(NamedTuple):
    """One call's decision.

    Attributes:
        slot: number of the slot, unique in the model.
        reused: whether the cached residuals of blocks 2..N were reused.
        difference: relative difference of block 1's residual; infinite where there was nothing to compare with.

    """

    slot: int
    reused: bool
    difference: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """What a compiled model has done so far.

    Attributes:
        graphs: distinct graphs that Dynamo captured for this model; more than one means graph breaks.
        recompiles: further captures of those graphs (a new shape, another dtype, other guards).
        hits: steps that reused the cached residuals.
        misses: steps that computed all blocks.
        slots: slots that hold state now.
        bytes: of the slots' and derived inputs' tensors.
        steps: the last decisions, oldest first, at most ``KEPT_STEPS`` of them.
        journal: for each captured graph, what every pass did.
        unfit: calls that another graph had to compute, since the first does not fit their inputs, such as a mask with
            a hole in it; the other graph's journal says why.
        eager_calls: calls of the model, or of a piece of it, that ran as they were written, since Dynamo's limit on
            compiling again was reached. They are in no other figure.

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
    eager_calls: int = 0


@dataclasses.dataclass(eq=False)
class ModelState:
    """Everything that is kept for one model; it goes when the model does."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    graphs: dict[int, tuple[tuple[int, int], list[JournalRow]]] = dataclasses.field(default_factory=dict)
    # Held weakly: they go with the compiled graphs.
    agreements: weakref.WeakSet[Agreement] = dataclasses.field(default_factory=weakref.WeakSet)
    slots: Slots = dataclasses.field(default_factory=Slots)
    weights: dict[int, WeightRevisions] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(WeightRevisions)
    )
    stored: dict[int, StoredFloat8] = dataclasses.field(default_factory=dict)
    kept: dict[tuple[int, int], Kept] = dataclasses.field(default_factory=lambda: collections.defaultdict(Kept))
    unfit: int = 0
    eager_calls: int = 0
    hits: int = 0
    misses: int = 0
    pending: list[tuple[int, torch.Tensor]] = dataclasses.field(default_factory=list)
    steps: collections.deque[Step] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=KEPT_STEPS))
    told: set[str] = dataclasses.field(default_factory=set)

    def add_pending(self, slot: int, record: torch.Tensor) -> None:
        """Add a decision, float32 ``[2]``, that is still on the device; ``KEPT_STEPS`` of them are fetched at once."""
        with self.lock:
            self.pending.append((slot, record))
        if len(self.pending) >= KEPT_STEPS:
            self.read_pending()

    def is_news(self, text: str) -> bool:
        """Whether this was not said of the model before; from now on it was."""
        with self.lock:
            is_new = text not in self.told
            self.told.add(text)
            return is_new

    def read_pending(self) -> None:
        """Fetch the decisions that are still on the device; waits for it."""
        with self.lock:
            pending, self.pending = self.pending, []
            for slot, record in pending:
                reused, difference = record.tolist()
                self.steps.append(Step(slot, bool(reused), difference))
                self.hits += int(reused)
                self.misses += int(not reused)


# Indices, not stores. The first maps a parameter of a model to the model's state, and is asked at every call.
# Offloading makes new parameters at every call, so the second maps the module that was compiled, which stays. Both hold
# weakly.
_MODELS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_ROOTS: weakref.WeakKeyDictionary[torch.nn.Module, ModelState] = weakref.WeakKeyDictionary()
_MODELS_LOCK = threading.Lock()


def model_state(anchor: torch.Tensor) -> ModelState:
    """The state of the model that this parameter belongs to; made where there is none."""
    with _MODELS_LOCK:
        if anchor in _MODELS:
            known: ModelState = _MODELS[anchor]
            return known
        root = called_module()
        state = ModelState() if root is None else _ROOTS.setdefault(root, ModelState())
        _MODELS[anchor] = state
        return state


def state_while_compiling() -> tuple[torch.nn.Module, ModelState] | None:
    """The compiled module that this thread is in, and its state; None where a function was compiled."""
    root = called_module()
    if root is None:
        return None
    with _MODELS_LOCK:
        return root, _ROOTS.setdefault(root, ModelState())


def states_called(model: torch.nn.Module | None, frame: int) -> list[ModelState]:
    """The states of the models that a call is of, given Dynamo's number of the function that was called.

    Args:
        model: the outermost module that was called; None where a function was compiled whole. Of that is known for
            which models graphs of it have run.
        frame: the number.

    """
    with _MODELS_LOCK:
        if model is not None:
            return [_ROOTS.setdefault(model, ModelState())]
        states: list[ModelState] = list(dict.fromkeys(_MODELS[tensor] for tensor in list(_MODELS)))
    return [state for state in states if any(number == frame for (number, _), _ in list(state.graphs.values()))]


def _states_in(module: torch.nn.Module) -> list[ModelState]:
    """The states of the models that a module is, has, or belongs to, each once."""
    inner = set(module.modules())
    with _MODELS_LOCK:
        tensors = itertools.chain(module.parameters(), module.buffers())
        found = [_MODELS[tensor] for tensor in tensors if tensor in _MODELS]
        roots = list(_ROOTS.items())
    found += [state for root, state in roots if root in inner]
    found = found or [state for root, state in roots if any(part is module for part in root.modules())]
    return [state for state in dict.fromkeys(found) if state.graphs or state.eager_calls]


def _states_of(model: torch.nn.Module | Callable[..., Any]) -> list[ModelState]:
    module = compiled_module(model)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"expected the compiled torch.nn.Module, or what torch.compile made of it, got {type(model).__name__}: "
            "give the module, also where only its forward was compiled"
        )
    states = _states_in(module)
    if not states:
        if next(module.parameters(), next(module.buffers(), None)) is None:
            raise UncompiledModelError(
                f"this {type(module).__name__} has no weights, by which hvfast knows a model: nothing is kept of it"
            )
        raise UncompiledModelError(
            f"this {type(module).__name__} has not run under hvfast yet: compile it with "
            f'model.compile(backend="hvfast") and call it once'
        )
    return states


def stats(model: torch.nn.Module | Callable[..., Any]) -> Stats:
    """What a compiled model has done so far; waits for the device.

    Args:
        model: the module given to ``torch.compile``, or what that returned.

    Raises:
        UncompiledModelError: the model has not run under this backend.
        DisagreementError: in one of the last steps, ranks that share a sequence got different inputs.

    """
    states = _states_of(model)
    for state in states:
        state.read_pending()
        for agreement in list(state.agreements):
            agreement.check_recorded()
    num_slots, steps = 0, []
    tensors: list[torch.Tensor] = []
    graphs_by_number: dict[int, tuple[tuple[int, int], list[JournalRow]]] = {}
    for state in states:
        with state.lock:
            graphs_by_number |= state.graphs  # a graph may serve several
            steps += list(state.steps)
            num_slots += len(state.slots)
            tensors += state.slots.tensors()
            tensors += [tensor for kept in list(state.kept.values()) for tensor in kept.tensors()]
    captured = list(graphs_by_number.values())
    graphs = len({frame for (frame, _), _ in captured})
    return Stats(
        graphs=graphs,
        recompiles=len(captured) - graphs,
        hits=sum(state.hits for state in states),
        misses=sum(state.misses for state in states),
        slots=num_slots,
        bytes=sum(tensor.untyped_storage().nbytes() for tensor in tensors),
        steps=steps,
        journal=[journal for _, journal in captured],
        unfit=sum(state.unfit for state in states),
        eager_calls=sum(state.eager_calls for state in states),
    )


def reset(model: torch.nn.Module | Callable[..., Any]) -> None:
    """Forget all cached state and statistics of a model, so that its next step is computed.

    A new prompt, shape or schedule needs no call, nor does writing to weights or conditions, in whatever way: both are
    seen. Call ``reset`` in three cases, which are not:

    - a generation has the same conditions as one that was broken off, and begins where that one came or further along
      the schedule (at a lower timestep, where timesteps fall), or anywhere else if that one made a single step;
    - generations with the same conditions run step by step in turn, in one thread;
    - one-step generations differ in seed and embedded guidance alone.

    A mask on a GPU that is written to through ``.data`` ends the next step with an error that asks for a ``reset``. Of
    weights that are written to in such a way, 32 elements each are compared: a write to a single row of a large weight,
    and to no other weight, needs a ``reset`` too.

    Args:
        model: the module given to ``torch.compile``, or what that returned.

    Raises:
        UncompiledModelError: the model has not run under this backend.

    """
    for state in _states_of(model):
        with state.lock:
            state.slots.clear()
            state.kept.clear()
            state.unfit = state.eager_calls = 0
            state.pending.clear()
            state.steps.clear()
            state.hits = state.misses = 0
            for agreement in state.agreements:
                agreement.forget()


def restore(model: torch.nn.Module | Callable[..., Any]) -> Restored:
    """Bring back the weights that are kept in float8 or on the host, so that the model can be changed or run.

    They are exact if the model was compiled with ``options={"fp8": {"keep_original": "cpu"}}``. Else they are within
    float8's precision, and a warning says so: half a step of three mantissa bits, and values far below the largest of
    their row may become 0. The next call of the compiled model compiles again and quantises the weights anew, with
    what was changed in between.

    Of a model that ``hvcompile.offload`` keeps on the host, the blocks' matrices become ordinary parameters there, on
    the CPU: move the model, or offload it again, before you call it.

    Args:
        model: the module, or what ``torch.compile`` made of it.

    Returns:
        How many weights came back exactly, and how many did not; see ``Restored``.

    Raises:
        TypeError: ``model`` is neither.
        QuantizedWeightError: its weights were loaded by ``load_float8``: what they were made from was never here.

    """
    module = compiled_module(model)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, or what torch.compile made of it, got {type(model).__name__}")
    refuse_to_restore(module)
    restored = restore_weights(module)
    for state in _states_in(module):
        with state.lock:
            for stored in state.stored.values():
                stored.forget()
    return restored
