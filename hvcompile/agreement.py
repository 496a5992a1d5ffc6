"""Ranks that run one graph together compare what they are about to do, and stop where they differ.

A collective that one rank enters and another does not, or enters with another shape, hangs or corrupts. So before a
graph is compiled, and when a generation begins, every rank puts the facts that matter into the key-value store through
which the ranks met, and reads those of the others. That needs no collective and no device, says who is missing, and
comes back on every rank within a stated time.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from hvcompile import inductor
from hvcompile.errors import DisagreementError
from hvcompile.fingerprints import fingerprint, hash_of
from hvcompile.inductor import source_name, value
from hvcompile.nodes import is_tensor, is_weight, op_name
from hvcompile.pipeline import JournalRow
from hvcompile.trunk import Group, Trunk

log = logging.getLogger(__name__)

DOING = "what it does now"
SHOWN = 4
"""Differences named in a message at most."""


def compare(group: Group, doing: str, facts: Mapping[str, str]) -> None:
    """Wait for all ranks of a group and return where their facts are equal.

    Args:
        group: the ranks, and how long to wait for them.
        doing: what comes next, in a few words; ranks about to do different things differ.
        facts: what must be equal, the most telling first.

    Raises:
        DisagreementError: a rank differs (the message names it, what differs and how), or did not come in time.

    """
    process_group = inductor.process_group(group.name)
    if dist.get_backend(process_group) == "fake":
        return  # ranks that don't exist agree
    store, rank, size = inductor.store_of(process_group), process_group.rank(), process_group.size()
    names = [dist.get_global_rank(process_group, place) for place in range(size)]
    mine = {DOING: doing, **facts}
    try:
        turn = store.add(f"hvcompile/{group.name}/turn/{rank}", 1)
        store.set(_key(group, turn, rank), json.dumps(mine))
        keys = [_key(group, turn, other) for other in range(size)]
        store.wait(keys, datetime.timedelta(seconds=group.timeout_seconds))
        theirs = [json.loads(store.get(key)) for key in keys]
        if turn > 1:  # all have come here, so none reads the turn before any more
            store.delete_key(_key(group, turn - 1, rank))
    except dist.DistError as error:
        missing = _missing(store, group, rank, names)
        raise DisagreementError(
            f"rank {names[rank]} was {doing}, and {missing} did not come within {group.timeout_seconds:g} s: it has "
            "ended, or it runs something else (another model or prompt, or context_parallel switched off). All ranks "
            'that share a sequence make the same calls; options={"context_parallel": False} lets each run alone'
        ) from error
    if any(held != theirs[0] for held in theirs):
        differences = _differences(dict(zip(names, theirs, strict=True)))
        raise DisagreementError(
            f"ranks that share a sequence differ: {differences}. Give all of them the same "
            'model, options, inputs and seed; options={"context_parallel": False} lets each run alone'
        )


def _key(group: Group, turn: int, rank: int) -> str:
    return f"hvcompile/{group.name}/{turn}/{rank}"


def _missing(store: Any, group: Group, rank: int, names: Sequence[int]) -> str:
    """The ranks that have not come as often as this one."""
    try:
        turns = [store.add(f"hvcompile/{group.name}/turn/{other}", 0) for other in range(len(names))]
    except dist.DistError:
        return "the rank that keeps the store of the process group"
    late = [str(name) for name, turn in zip(names, turns, strict=True) if turn < turns[rank]]
    return f"rank {', '.join(late)}" if late else "some rank"


def _differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """What differs from the first rank, given each rank's facts."""
    (reference, first), *others = facts.items()
    said = []
    for rank, held in others:
        keys = [key for key in dict.fromkeys([*first, *held]) if first.get(key) != held.get(key)]
        keys = [DOING] if DOING in keys else keys  # the rest can't be compared
        for key in keys:
            found, wanted = (item.get(key, "absent") for item in (held, first))
            said.append(f"{key} is {found} on rank {rank}, {wanted} on rank {reference}")
    rest = f" (and {len(said) - SHOWN} more)" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + rest


def before_compiling(trunk: Trunk, journal: Sequence[JournalRow], captured: fx.GraphModule, failure: str) -> None:
    """Compare all that shapes a graph: versions, options, inputs, blocks, operations, and what the passes did."""
    if trunk.group is not None:
        compare(trunk.group, "compiling", {**_graph_facts(trunk, journal, captured), "failure": failure or "none"})


def after_compiling(trunk: Trunk, seconds: float) -> None:
    """Wait until all ranks have compiled, which takes one longer than the other.

    A step's first collective would else be late, and its time-out is the process group's. A rank waits for the others
    as long as it took itself, and ``timeout_seconds`` beyond.
    """
    if trunk.group is not None:
        patient = dataclasses.replace(trunk.group, timeout_seconds=trunk.group.timeout_seconds + seconds)
        compare(patient, "done compiling", {})


def _graph_facts(trunk: Trunk, journal: Sequence[JournalRow], captured: fx.GraphModule) -> dict[str, str]:
    facts = {"torch": torch.__version__, "the trunk": trunk.lists}
    for row in journal:
        facts |= {f"{row.section}.{name}": repr(held) for name, held in row.options.items() if row.section}
    described = {}
    for node in captured.graph.find_nodes(op="placeholder"):
        described[source_name(node) or node.name] = (is_weight(node), _describe(node))
    facts |= {f"the input {name}": text for name, (of_model, text) in described.items() if not of_model}
    facts["the weights' shapes"] = _digest(
        sorted((name, text) for name, (of_model, text) in described.items() if of_model)
    )
    operations = [
        (op_name(node), repr(node.args), repr(node.kwargs)) for node in captured.graph.nodes if node.op != "placeholder"
    ]
    facts |= {f"what {row.name} did": row.line() for row in journal}
    facts["the operations"] = _digest(_without_addresses(operations))
    return facts


def _without_addresses(operations: list[tuple[str, str, str]]) -> list[str]:
    return [re.sub(r"0x[0-9a-f]+|(cuda|xpu|hpu)(:|', index=)\d+", "", " ".join(item)) for item in operations]


def _describe(node: fx.Node) -> str:
    held = value(node)
    if is_tensor(node):
        return f"{held.dtype} {[inductor.size_hint(size) for size in held.shape]} on {held.device.type}"
    return str(inductor.size_hint(held) if isinstance(held, torch.SymInt) else held)


def _digest(items: Sequence[Any]) -> str:
    return hashlib.sha256(repr(list(items)).encode()).hexdigest()[:12]


@dataclasses.dataclass(eq=False)
class _Generation:
    """What is known of the generation that runs under one set of conditions."""

    clock: list[float] = dataclasses.field(default_factory=list)
    direction: list[float] = dataclasses.field(default_factory=list)
    # Of the last call, still on the device: read at the next one, when it is long done.
    pending: tuple[torch.Tensor, torch.Tensor] | None = None


class Agreement:
    """Compares inputs whenever a generation begins: under new conditions at once, else where the clock turned back.

    The latter is seen one step late, so that no step waits for the device.

    Args:
        group: the ranks.
        names: of the inputs to compare, by place.
        sample: place of the sample; None where there is none.
        clocks: places of the timesteps.

    """

    def __init__(self, group: Group, names: Mapping[int, str], sample: int | None, clocks: Sequence[int]) -> None:
        self._group, self._names, self._sample, self._clocks = group, names, sample, tuple(clocks)
        self._generations: collections.OrderedDict[Any, _Generation] = collections.OrderedDict()

    def look(self, conditions: Any, args: Sequence[Any]) -> None:
        """Look at the inputs of one call.

        Args:
            conditions: equal for calls under the same conditions.
            args: the compiled graph's inputs.

        Raises:
            DisagreementError: see ``compare``.

        """
        known = self._generations.get(conditions)
        if known is None:
            facts = {
                f"the content of {name}": f"{fingerprint(args[place]) % 2**64:016x}"
                for place, name in self._names.items()
            }
            compare(self._group, "beginning a generation", facts)
            known = self._generations[conditions] = _Generation()
            while len(self._generations) > 64:
                self._generations.popitem(last=False)
        elif known.pending is not None:
            clock, sample = known.pending[0].tolist(), known.pending[1]
            moved = [(now > last) - (now < last) for now, last in zip(clock, known.clock, strict=False)]
            turned = any(step * before < 0 for step, before in zip(moved, known.direction, strict=False))
            if turned:
                name = self._names[self._sample] if self._sample is not None else ""
                facts = {f"the content of {name} at the first step": f"{int(sample.item()) % 2**64:016x}"}
                compare(self._group, "beginning a generation of the same prompt", facts)
            known.direction = (
                [0.0] * len(moved)
                if turned
                else [s or d for s, d in zip(moved, known.direction or moved, strict=False)]
            )
            known.clock = clock
        self._generations.move_to_end(conditions)
        if self._clocks and self._sample is not None:
            known.pending = self._remember(args)

    def _remember(self, args: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        clocks = torch.cat([args[place].detach().flatten().to(torch.float64) for place in self._clocks])
        return clocks, hash_of(args[self._sample])  # type: ignore[index]
