"""The door to Dynamo's guards: those on a model's structure and weights move behind a look that is quicker.

A guard that moves is not lost. It is built into a second tree of guards, by Dynamo's own code. In the tree that Dynamo
checks before a call, one guard stands for all that moved. It asks a look, which may say yes only where everything that
those guards read is as it was when they last held. Else it checks the second tree, and where that holds, the look
takes what is there for right. So a call is let through if and only if Dynamo would let it through. Where it isn't,
Dynamo compiles again, and gives the reason that it would give.

One thing is left out: whether a *weight's* dimension has been marked as dynamic since. Dynamo takes the shapes of
weights as static whatever they are marked as.

All names were checked on torch 2.11.0 and 2.13.0, where they are the same.

- ``torch._guards.TracingContext`` and ``Guard``: the guards that Dynamo has collected when it calls a backend, before
  it builds a check of them. A guard's own method ``create`` builds its part of the check; nothing public comes between.
- ``CheckFunctionManager.build_guards`` and ``GuardBuilder``, reached from the builder that ``create`` is given: a
  second tree, in which guards are built as in the first.
- ``RootGuardManager.check``, ``check_verbose`` and ``add_epilogue_lambda_guard``: to ask the second tree, and to be
  asked. Epilogue guards run last, when the cheaper ones on a call's own inputs have held.
- ``torch._C._dynamo.guards.TensorGuards``: compares a thousand tensors with what they were in one call, by the code
  that each tensor's own guard has (``TensorCheck`` in ``guards.cpp``).
- ``torch._dynamo.source``: how a guard reaches the value that it is about.
- ``torch._dynamo.config``: ``caching_precompile`` (guards are stored, and built in another process),
  ``use_recursive_dict_tags_for_guards`` (Dynamo has a quick way of its own; on in 2.11, off in 2.12 and 2.13),
  ``skip_no_tensor_aliasing_guards_on_parameters`` and ``force_parameter_static_shapes`` (on by default; without them a
  guard on a weight says more).
"""

from __future__ import annotations

import collections
import enum
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch._C._dynamo.guards import TensorGuards
from torch._dynamo import config, source
from torch._guards import Guard, TracingContext

log = logging.getLogger(__name__)

FEWEST_WEIGHTS = 500
"""With fewer weights Dynamo's guards stay as they are: they are in the processor's cache, and quicker than a look."""


class Step(enum.Enum):
    """How a value is reached from the one before it."""

    LOCAL = "a local variable of the call"
    DICT = "an object's own attributes"
    ITEM = "an item of a dictionary"


class Fact(enum.Enum):
    """What a guard says of a value."""

    THERE = "it can be reached"
    TYPE = "its class"
    CONSTANT = "the value itself, which never changes: a number, a string, a tuple of such"
    KEYS = "a dictionary's keys"
    ABSENT = "a key that a dictionary does not have"
    TENSOR = "a tensor's class, dtype, shape, strides, device, and whether it requires gradients"


class Look(Protocol):
    """What is asked before the guards are; see ``hvcompile.runtime.structure.Look``."""

    def place(self, parent: int, step: Step, key: Hashable = None) -> int:
        """Number of the place that a step leads to from another; ``parent`` is -1 for a local variable."""

    def add(self, fact: Fact, place: int, key: Hashable = None) -> None:
        """Add a fact about a place; ``key`` is the one that is absent."""

    def check(self, variables: Mapping[str, Any], closely: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Whether all facts hold; where that is not plain, ``closely`` tells."""


def tensor_check(tensors: Sequence[torch.Tensor]) -> Callable[[Sequence[Any]], bool]:
    """A check whether other tensors have these tensors' class, dtype, shape, strides, device and ``requires_grad``.

    It holds none of them. No tensor may be there twice.
    """
    # Private: the code of Dynamo's own guards on tensors, for all at once (2.11.0, 2.13.0).
    guards: Any = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return lambda others: bool(guards.check(*others))


def look_first(make_look: Callable[[], Look]) -> None:
    """Put a look before the guards of the graph that Dynamo has captured and is compiling.

    Where that would be no quicker, or Dynamo is not as it is known here, its guards stay as they are.

    Args:
        make_look: is called for each check that Dynamo builds.

    """
    try:
        context = TracingContext.try_get()
        if context is None or config.caching_precompile or config.use_recursive_dict_tags_for_guards:
            return
        guards = list(context.guards_context.dynamo_guards)
        if sum(guard.create_fn_name() == "TENSOR_MATCH" for guard in guards) < FEWEST_WEIGHTS:
            return
        moved = _moved_class(_Moved(make_look))
        for guard in guards:
            if type(guard) is Guard and guard.create_fn_name() in _FACTS:
                # It stays the object that Dynamo knows, also for a user's guard_filter_fn; only where it is built
                # changes.
                guard.__class__ = moved
    except Exception as error:
        log.debug("Dynamo's guards stay as they are: %s: %s", type(error).__name__, error)


def _moved_class(moved: _Moved) -> type[Guard]:
    class MovedGuard(Guard):
        """A guard that is built into the second tree where the look knows all that it reads."""

        __slots__ = ()

        def create(self, builder: Any) -> Any:
            return super().create(moved.builder_for(self, builder))

    return MovedGuard


class _Moved:
    """Where the guards of one captured graph move to: a second builder beside each of Dynamo's."""

    def __init__(self, make_look: Callable[[], Look]) -> None:
        self._make_look = make_look
        self._seconds: weakref.WeakKeyDictionary[Any, tuple[Any, Look]] = weakref.WeakKeyDictionary()

    def builder_for(self, guard: Guard, builder: Any) -> Any:
        """The second builder where the look stands for the guard, else the one given."""
        if builder.save_guards:
            return builder
        try:
            facts = list(_Reader(guard, builder).facts())
            if builder not in self._seconds:
                self._seconds[builder] = _second_tree(builder, self._make_look())
        except _UnknownError as reason:
            log.debug("guard %s of %s stays: %s", guard.create_fn_name(), guard.name, reason)
            return builder
        except Exception as error:
            log.debug("guard %s of %s stays: %r", guard.create_fn_name(), guard.name, error)
            return builder
        second, look = self._seconds[builder]
        for way, fact, key in facts:
            place = -1
            for step, item in way:
                place = look.place(place, step, item)
            look.add(fact, place, key)
        return second


def _second_tree(builder: Any, look: Look) -> tuple[Any, Look]:
    """A second builder, whose tree is checked by one guard in the first, unless the look holds."""
    manager = builder.check_fn_manager
    no_sources = type(builder.guard_manager.diff_guard_sources)()
    second, tree = manager.build_guards([], no_sources, builder.f_code, manager.output_graph, False)
    second.code = builder.code  # for Dynamo's log of guards
    root, reasons = tree.root, ["hvcompile: the model is as it was"]

    def holds(variables: Mapping[str, Any]) -> bool:
        if look.check(variables, root.check):
            return True
        # Dynamo gives the text of the guard that failed, which is this list, as the reason for compiling again.
        reasons[:] = list(root.check_verbose(variables).verbose_code_parts)[:1] or reasons
        return False

    builder.guard_manager.root.add_epilogue_lambda_guard(holds, reasons, None)
    return second, look


class _UnknownError(Exception):
    """Why the look can't stand for a guard."""


Way = tuple[tuple[Step, Hashable], ...]

_CONSTANTS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_PLACES = ("_parameters", "_buffers", "_modules")


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, torch.Size):
        return all(map(_is_constant, value))
    return type(value) in _CONSTANTS


class _Reader:
    """Reads what a guard says, and of which value."""

    def __init__(self, guard: Guard, builder: Any) -> None:
        self._guard, self._builder = guard, builder

    def facts(self) -> list[tuple[Way, Fact, Hashable]]:
        """The facts that together say all that the guard says; raises ``_UnknownError`` where it says more."""
        way, value = self._reach(self._guard.originating_source)
        if not isinstance(value, torch.nn.Module) and all(step is not Step.DICT for step, _ in way):
            raise _UnknownError("it is no part of a model")  # an argument, which is a new object in each call
        return _FACTS[self._guard.create_fn_name()](self, way, value)

    def keyword(self, name: str) -> Any:
        """An argument that the guard was made with."""
        create = self._guard.create_fn
        if not isinstance(create, functools.partial) or set(create.keywords) != {name}:
            raise _UnknownError("its arguments are others")
        return create.keywords[name]

    def _reach(self, origin: Any) -> tuple[Way, Any]:
        kind = type(origin)
        if kind is source.LocalSource and not origin.is_derefed_cell_contents:
            name = origin.local_name
            return ((Step.LOCAL, name),), self._builder.scope["L"][name]
        if kind in _THE_SAME:
            return self._reach(origin.base)
        if kind in _ATTRIBUTES:
            way, base = self._reach(origin.base)
            return self.attribute(way, base, origin.member)
        if kind is source.DictGetItemSource and type(origin.index) in (str, int):
            way, base = self._reach(origin.base)
            if type(base) not in (dict, collections.OrderedDict):
                raise _UnknownError(f"{type(base).__name__} is no plain dictionary")
            return (*way, (Step.ITEM, origin.index)), base[origin.index]
        raise _UnknownError(f"{kind.__name__} is not known")

    def attribute(self, way: Way, base: Any, name: str) -> tuple[Way, Any]:
        """As Dynamo reaches a module's attribute: in its own dictionary, else among its parts."""
        if not isinstance(base, torch.nn.Module):
            raise _UnknownError(f"{type(base).__name__} is no module")
        own, way = base.__dict__, (*way, (Step.DICT, None))
        if name == "__dict__":
            return way, own
        if name in own:
            return (*way, (Step.ITEM, name)), own[name]
        for place in _PLACES[: 2 if hasattr(type(base), name) else 3]:
            if name in own.get(place, ()):
                return (*way, (Step.ITEM, place), (Step.ITEM, name)), own[place][name]
        raise _UnknownError(f"{name} is not the module's own")

    def type_match(self, way: Way, value: Any) -> list[tuple[Way, Fact, Hashable]]:
        del value
        return [(way, Fact.TYPE, None)]

    def constant_match(self, way: Way, value: Any) -> list[tuple[Way, Fact, Hashable]]:
        if not _is_constant(value):
            raise _UnknownError(f"a {type(value).__name__} may change")
        return [(way, Fact.CONSTANT, None)]

    def length(self, way: Way, value: Any) -> list[tuple[Way, Fact, Hashable]]:
        return self.keys(way, value) if isinstance(value, dict) else self.constant_match(way, value)

    def keys(self, way: Way, value: Any) -> list[tuple[Way, Fact, Hashable]]:
        if type(value) not in (dict, collections.OrderedDict) or not all(type(key) in (str, int) for key in value):
            raise _UnknownError("no plain dictionary of names or numbers")
        return [(way, Fact.TYPE, None), (way, Fact.KEYS, None)]

    def not_in_attributes(self, way: Way, value: Any) -> list[tuple[Way, Fact, Hashable]]:
        del value
        return [((*way, (Step.DICT, None)), Fact.ABSENT, self.keyword("attr"))]

    def has_attribute(self, way: Way, value: Any) -> list[tuple[Way, Fact, Hashable]]:
        found, _ = self.attribute(way, value, self.keyword("attr"))
        return [(found, Fact.THERE, None)]

    def tensor_match(self, way: Way, value: Any) -> list[tuple[Way, Fact, Hashable]]:
        origin = self._guard.originating_source
        is_own = type(value) is torch.nn.Parameter or source.is_from_unspecialized_builtin_nn_module_source(origin)
        if not (
            config.skip_no_tensor_aliasing_guards_on_parameters and config.force_parameter_static_shapes and is_own
        ):
            raise _UnknownError("it must not be another input too, or its size may vary")
        sizes = self._builder.check_fn_manager.output_graph.input_source_to_sizes_strides[origin]
        if tuple(sizes["size"]) != tuple(value.shape) or tuple(sizes["stride"]) != tuple(value.stride()):
            raise _UnknownError("its size may vary")
        return [(way, Fact.TENSOR, None)]


_THE_SAME = (source.NNModuleSource, source.UnspecializedNNModuleSource, source.UnspecializedBuiltinNNModuleSource)
_ATTRIBUTES = (source.AttrSource, source.ParamBufferSource, source.UnspecializedParamBufferSource)
_FACTS: dict[str, Callable[[_Reader, Way, Any], list[tuple[Way, Fact, Hashable]]]] = {
    "TYPE_MATCH": _Reader.type_match,
    "CONSTANT_MATCH": _Reader.constant_match,
    "EQUALS_MATCH": _Reader.constant_match,
    "BOOL_MATCH": _Reader.constant_match,
    "NONE_MATCH": _Reader.constant_match,
    "SEQUENCE_LENGTH": _Reader.length,
    "DICT_KEYS_MATCH": _Reader.keys,
    "DICT_CONTAINS": _Reader.keys,
    "DICT_NOT_CONTAINS": _Reader.keys,
    "NOT_PRESENT_IN_GENERIC_DICT": _Reader.not_in_attributes,
    "HASATTR": _Reader.has_attribute,
    "TENSOR_MATCH": _Reader.tensor_match,
}
