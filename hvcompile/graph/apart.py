"""Weights that are tensors around others, such as torchao's, taken apart: a graph takes the plain tensors instead.

Everything that comes after sees plain tensors alone: blocks share bodies, and what is kept between calls is compared
with the data and the scales themselves. The weight is put together again right before it is read, inside the block.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from hvcompile.graph.inline import run_on
from hvcompile.graph.nodes import is_weight, mutated_operand
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.fakes import TAG, value
from hvcompile.torch_private.subclasses import Parts, Together, is_wrapper, mark_as_part, mixes_rows, parts_of

log = logging.getLogger(__name__)


class _Weight(NamedTuple):
    """An input that is taken apart, by its place, and what gives its plain tensors."""

    place: int
    tensors: Callable[[Any], tuple[Any, ...]]


class Apart:
    """Gives the inputs of a graph whose weights were taken apart.

    Dynamo guards on a weight's class and settings, and on the layout of the tensors within (2.11.0, 2.13.0).
    """

    def __init__(self, weights: Sequence[_Weight]) -> None:
        self._weights = weights

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """The inputs of a call, with each such weight's first tensor in its place, and the others at the end."""
        given = list(args)
        for place, tensors in self._weights:
            first, *others = tensors(args[place])
            given[place] = first
            given += others
        return given


def with_plain_tensors(
    handle: Callable[..., Callable[..., Any]], captured: fx.GraphModule, example_inputs: Sequence[Any], *others: Any
) -> Callable[..., Any]:
    """Have a captured graph handled as one that takes plain tensors alone, where its weights are made of others.

    Args:
        handle: takes the graph, its inputs, and ``others``; returns what runs it.
        captured: as Dynamo gives it; not changed.
        example_inputs: one for each placeholder, real or fake.
        others: for ``handle``.

    Returns:
        What runs it, with the inputs of ``captured``.

    """
    taken_apart = take_apart(captured, example_inputs)
    if taken_apart is None:
        return handle(captured, example_inputs, *others)
    module, apart = taken_apart
    run = handle(module, apart(example_inputs), *others)
    return lambda *args: run(*apart(args))


def take_apart(captured: fx.GraphModule, args: Sequence[Any]) -> tuple[fx.GraphModule, Apart] | None:
    """A copy of a captured graph that takes its weights' plain tensors; None where no weight is made of others.

    Args:
        captured: as Dynamo gives it; not changed.
        args: one for each placeholder, real or fake.

    """
    if not any(map(_may_come_apart, captured.graph.find_nodes(op="placeholder"))):
        return None
    module = dynamo.clone_graph_module(captured)
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    known: dict[Parts, Together | None] = {}
    weights: list[_Weight] = []
    added: list[fx.Node] = []
    for place, node in enumerate(placeholders):
        if not _may_come_apart(node):
            continue
        parts = parts_of(value(node))
        if parts not in known:
            known[parts] = Together(parts, mixes_rows(args[place])) if _is_traceable(node, parts) else None
        together = known[parts]
        if together is not None:
            weights.append(_Weight(place, _getter(list(parts.paths()))))
            added += _replace(node, together)
    if not weights:
        return None
    last = list(module.graph.find_nodes(op="placeholder"))[-1]
    for part in added:  # in the order in which ``Apart`` gives them
        last.append(part)
        last = part
    module.graph.lint()
    module.recompile()
    return module, Apart(weights)


def _may_come_apart(node: fx.Node) -> bool:
    """Whether a placeholder is a weight around others that is read alone, neither written to nor returned."""
    if not is_wrapper(value(node)) or not is_weight(node) or not node.users:
        return False
    return all(user.op.startswith("call_") and mutated_operand(user) is not node for user in node.users)


def _getter(paths: Sequence[tuple[str, ...]]) -> Callable[[Any], tuple[Any, ...]]:
    """What gives a weight's plain tensors; it runs in C, for hundreds of weights in every step."""
    names = [".".join(path) for path in paths]
    if len(names) > 1:
        return operator.attrgetter(*names)
    get = operator.attrgetter(names[0])
    return lambda weight: (get(weight),)


def _is_traceable(node: fx.Node, parts: Parts) -> bool:
    """Whether what reads a weight can do so of one that was put together while it is traced."""
    fake = value(node)
    plain = (operator.attrgetter(".".join(path))(fake) for path in parts.paths())
    try:
        with torch.no_grad():
            whole = parts.put_together(plain)
            for reader in node.users:
                run_on(reader, lambda item: whole if item is node else value(item))
    except Exception as error:  # whatever a library raises: its weights stay as they are, and the journal says so
        log.debug("%s stays in one piece: %s: %s", node.name, type(error).__name__, error)
        return False
    return True


def _replace(node: fx.Node, together: Together) -> list[fx.Node]:
    """Exchange a placeholder for those of its parts, of which each reader puts it together anew.

    Returns:
        The new placeholders but the first.

    """
    graph, fake = node.graph, value(node)
    made: list[fx.Node] = []
    for path in together.parts.paths():
        with graph.inserting_before(node):
            part = graph.placeholder("_".join((str(node.target), *path)))
        part.meta["example_value"] = operator.attrgetter(".".join(path))(fake)
        mark_as_part(part, node, path)
        made.append(part)
    for reader in list(node.users):
        with graph.inserting_before(reader):
            whole = graph.call_function(together, tuple(made))
        whole.meta = {key: reader.meta[key] for key in ("nn_module_stack", "stack_trace") if key in reader.meta}
        whole.meta |= {TAG: "quantised", "example_value": fake}
        reader.replace_input_with(node, whole)
    graph.erase_node(node)
    return made[1:]
