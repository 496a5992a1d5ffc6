"""A look at a model's structure: whether all that a compiled graph rests on is as it was when it was last checked.

Dynamo checks thousands of facts of a model before every call: that a module has the class it had, a flag the value it
had, a weight the shape and dtype it had. It checks them one by one, each through objects of its own, and what that
costs is memory that is not in the processor's cache. A ``Look`` checks the same facts in some dozens of passes over
lists, each of which runs in C. It starts at the call's local variables and reads everything anew on the way down, so it
rests on no address, holds no weight and no module, and a swapped module or dictionary is seen like any other change.

It is stricter than what it stands for: a value is as it was only if it is the *same object*, a dictionary only if it
has the same keys in the same order. Where it says no, the facts are looked at closely, by Dynamo's own code.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hvcompile.runtime.weights import picker
from hvcompile.torch_private.guards import Fact, Step, tensor_check

MOST_MODELS = 16
"""Models that run through one compiled graph and are remembered; one more makes all be forgotten."""
MOST_MISSES = 16
"""After so many misses in turn a look is given up: something in the model is a new object in every call."""

_Pick = Callable[[Sequence[Any]], tuple[Any, ...]]
_ATTRIBUTES = operator.attrgetter("__dict__")


class _Pass(NamedTuple):
    """Values that are reached from values before them by the same kind of step."""

    step: Step
    parents: _Pick
    keys: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Passes in an order in which each comes after those that it starts from, and what their values are asked."""

    passes: tuple[_Pass, ...]
    typed: tuple[int, ...]
    constants: _Pick
    keyed: _Pick
    lacking: _Pick
    absent: tuple[Any, ...]
    tensors: _Pick

    def values(self, variables: Mapping[str, Any]) -> list[Any]:
        """Everything that facts are about, and what lies on the way there."""
        values: list[Any] = []
        for step, parents, keys in self.passes:
            if step is Step.ITEM:
                values.extend(map(operator.getitem, parents(values), keys))
            elif step is Step.DICT:
                values.extend(map(_ATTRIBUTES, parents(values)))
            else:
                values.extend(map(variables.__getitem__, keys))
        return values


class _OfClass(NamedTuple):
    """Values of one class, which is held weakly: Dynamo lets a compiled graph go with a class that it rests on."""

    pick: _Pick
    kind: weakref.ref[type]
    number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """What a model was found to be. It holds constants, and neither tensors nor modules.

    ``again`` are tensors that are others again, as tied weights are; ``first`` are those others.
    """

    classes: tuple[_OfClass, ...]
    constants: tuple[Any, ...]
    keys: list[tuple[Any, ...]]
    own: _Pick
    check: Callable[[Sequence[Any]], bool]
    again: _Pick
    first: _Pick


def _count(items: Iterable[Any], item: Any) -> int:
    return list(items).count(item)


class Look:
    """Facts about what can be reached from a call's local variables, and how they were found last."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, Step, Hashable], int] = {}
        self._facts: dict[Fact, dict[tuple[int, Any], None]] = {fact: {} for fact in Fact}
        self._plan: _Plan | None = None
        self._found: dict[int, _Found] = {}
        self._misses = 0

    def place(self, parent: int, step: Step, key: Hashable = None) -> int:
        """Number of the place that a step leads to from another; ``parent`` is -1 for a local variable."""
        return self._places.setdefault((parent, step, key), len(self._places))

    def add(self, fact: Fact, place: int, key: Hashable = None) -> None:
        """Add a fact about a place; ``key`` is the one that is absent."""
        self._facts[fact][place, key] = None

    def check(self, variables: Mapping[str, Any], closely: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Whether all facts hold.

        Args:
            variables: the call's local variables.
            closely: looks at every fact itself; asked where not all is as it was found last.

        """
        if self._misses >= MOST_MISSES:
            return closely(variables)
        if self._plan is None:
            self._plan = self._make_plan()
        plan = self._plan
        values = self._values(plan, variables)
        if values and self._is_as_found(plan, values, self._found.get(id(values[0]))):
            self._misses = 0
            return True
        if not closely(variables):
            return False
        self._misses += 1
        # Another thread may change the model meanwhile. What is there before and after a close look was looked at.
        values = self._values(plan, variables)
        found = self._find(plan, values) if values else None
        if found is not None and closely(variables):
            values = self._values(plan, variables)
            if self._is_as_found(plan, values, found):
                others = self._found if len(self._found) < MOST_MODELS else {}
                self._found = {**others, id(values[0]): found}
        return True

    def _values(self, plan: _Plan, variables: Mapping[str, Any]) -> list[Any]:
        """Everything that the facts are about; empty where a part of the way is gone, or is something else."""
        try:
            return plan.values(variables)
        except (AttributeError, KeyError, TypeError):
            return []

    def _is_as_found(self, plan: _Plan, values: Sequence[Any], found: _Found | None) -> bool:
        if not values or found is None:
            return False
        try:
            tensors = plan.tensors(values)
            return (
                all(_count(map(type, pick(values)), kind()) == number for pick, kind, number in found.classes)
                and all(map(operator.is_, plan.constants(values), found.constants))
                and list(map(tuple, plan.keyed(values))) == found.keys
                and not any(map(operator.contains, plan.lacking(values), plan.absent))
                and all(map(operator.is_, found.again(tensors), found.first(tensors)))
                and found.check(found.own(tensors))
            )
        except TypeError:  # a value that is no dictionary, or no tensor, any more
            return False

    def _find(self, plan: _Plan, values: Sequence[Any]) -> _Found | None:
        tensors = plan.tensors(values)
        first: dict[int, int] = {}
        for number, tensor in enumerate(tensors):
            first.setdefault(id(tensor), number)
        own = picker(list(first.values()))
        again = [number for number, tensor in enumerate(tensors) if first[id(tensor)] != number]
        by_class: dict[type, list[int]] = {}
        for place in plan.typed:
            by_class.setdefault(type(values[place]), []).append(place)
        try:
            return _Found(
                classes=tuple(
                    _OfClass(picker(places), weakref.ref(kind), len(places)) for kind, places in by_class.items()
                ),
                constants=plan.constants(values),
                keys=list(map(tuple, plan.keyed(values))),
                own=own,
                check=tensor_check(own(tensors)),
                again=picker(again),
                first=picker([first[id(tensors[number])] for number in again]),
            )
        except TypeError:  # no tensor where one was
            return None

    def _make_plan(self) -> _Plan:
        depths = {-1: 0}
        for (parent, _, _), place in self._places.items():
            depths[place] = depths[parent] + 1

        def rank(item: tuple[tuple[int, Step, Hashable], int]) -> tuple[int, str]:
            (_, step, _), place = item
            return depths[place], step.value

        order: dict[int, int] = {}
        passes = []
        for _, group in itertools.groupby(sorted(self._places.items(), key=rank), key=rank):
            ways = list(group)
            parents = [order.get(parent, -1) for (parent, _, _), _ in ways]
            passes.append(_Pass(ways[0][0][1], picker(parents), tuple(key for (_, _, key), _ in ways)))
            for _, place in ways:
                order[place] = len(order)

        def places(fact: Fact) -> tuple[int, ...]:
            return tuple(order[place] for place, _ in self._facts[fact])

        return _Plan(
            passes=tuple(passes),
            typed=places(Fact.TYPE),
            constants=picker(places(Fact.CONSTANT)),
            keyed=picker(places(Fact.KEYS)),
            lacking=picker(places(Fact.ABSENT)),
            absent=tuple(key for _, key in self._facts[Fact.ABSENT]),
            tensors=picker(places(Fact.TENSOR)),
        )
