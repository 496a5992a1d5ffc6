"""Ranks that run one graph together compare what they are about to do, and stop where they differ.

If one rank enters a collective and another does not, or does with another shape, the collective hangs or corrupts. So
before a graph is compiled, and before every call, every rank puts the facts that matter into the key-value store
through which the ranks met, and reads those of the others. That needs no collective and no device. It says who is
missing, and it returns on every rank within a stated time. Inputs that are new in every step are compared in the graph
(``rewriting.sharding.shared_inputs``); the result is read here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from hvcompile.errors import DisagreementError, HvcompileError
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.nodes import is_tensor, is_weight, op_name
from hvcompile.hollow.host import values_on_host
from hvcompile.journal import Declined, JournalRow
from hvcompile.ranks import collectives
from hvcompile.ranks.fingerprints import fingerprint, sketch
from hvcompile.ranks.store import take_turn, turns_taken
from hvcompile.torch_private import fakes
from hvcompile.torch_private.dynamo import source_name
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.observer import Observer
from hvcompile.trunk.together import Group
from hvcompile.trunk.trunk import Trunk

log = logging.getLogger(__name__)

DOING = "what it does now"
SHOWN = 4
"""The most differences that a message names."""
ADVICE = (
    'Give all of them the same model, options, inputs and seed; options={"context_parallel": False} lets each run alone'
)


def compare(group: Group, doing: str, facts: Mapping[str, str]) -> None:
    """Wait for all ranks of a group, and return if their facts are equal.

    Args:
        group: the ranks, and how long to wait for them.
        doing: what comes next, in a few words; it must be equal too.
        facts: what must be equal, the most telling first.

    Raises:
        DisagreementError: a rank differs (the message names the rank, the fact and both values), or did not come in
            time.

    """
    process_group = collectives.process_group(group.name)
    if dist.get_backend(process_group) == "fake":
        return  # ranks that don't exist agree
    rank, names = process_group.rank(), _ranks_of(process_group)
    try:
        theirs = take_turn(process_group, _series(group), {DOING: doing, **facts}, group.timeout_seconds)
    except RuntimeError as error:
        raise DisagreementError(
            f"rank {names[rank]} was {doing}, and {_missing(process_group, group, names)} did not come within "
            f"{group.timeout_seconds:g} s (context_parallel.timeout_seconds): it has ended, is late, or runs something "
            "else (another model, or context_parallel switched off). All ranks that share a sequence make the same "
            'calls; options={"context_parallel": False} lets each run alone'
        ) from error
    if any(other != theirs[0] for other in theirs):
        differences = _differences(dict(zip(names, theirs, strict=True)))
        raise DisagreementError(f"ranks that share a sequence differ: {differences}. {ADVICE}")


def _series(group: Group) -> str:
    return f"hvcompile/{group.name}"


def _ranks_of(process_group: dist.ProcessGroup) -> tuple[int, ...]:
    """The global rank of each of a group's ranks."""
    return tuple(dist.get_global_rank(process_group, rank) for rank in range(process_group.size()))


def _missing(process_group: dist.ProcessGroup, group: Group, names: Sequence[int]) -> str:
    """The ranks that have not come as often as this one."""
    try:
        turns = turns_taken(process_group, _series(group))
    except RuntimeError:
        return "the rank that keeps the store of the process group"
    mine = turns[process_group.rank()]
    late = [str(name) for name, turn in zip(names, turns, strict=True) if turn < mine]
    return f"rank {', '.join(late)}" if late else "some rank"


def _differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """What differs from the first rank, given each rank's facts."""
    (reference, first), *others = facts.items()
    messages = []
    for rank, other in others:
        keys = [key for key in dict.fromkeys([*first, *other]) if first.get(key) != other.get(key)]
        keys = [DOING] if DOING in keys else keys  # the rest can't be compared
        for key in keys:
            actual, expected = (item.get(key, "absent") for item in (other, first))
            messages.append(f"{key} is {actual} on rank {rank}, {expected} on rank {reference}")
    return _some(messages)


def _some(messages: Sequence[str]) -> str:
    rest = f" (and {len(messages) - SHOWN} more)" if len(messages) > SHOWN else ""
    return "; ".join(messages[:SHOWN]) + rest


class RanksInStep(Observer):
    """Has the ranks of a trunk's group compare what they are about to compile, and wait for each other's compiler.

    They compare all that shapes a graph: versions, options, inputs, blocks, operations, and what the passes did.
    Weights are compared by a few elements each: another seed, checkpoint or fused LoRA is seen, a single changed number
    need not be.

    Args:
        captured: the graph before the passes.
        args: its inputs.

    """

    def __init__(self, captured: fx.GraphModule, args: Sequence[Any]) -> None:
        self._captured, self._args = captured, args

    def on_rewritten(self, trunk: Trunk | None, journal: Sequence[JournalRow], error: BaseException | None) -> None:
        """Compare the rewritten graphs.

        Raises:
            DisagreementError: a rank differs, or did not come in time. Not where this rank ends in an error of its own
                anyway: the others are told of it.

        """
        if trunk is None or trunk.group is None or not (error is None or isinstance(error, HvcompileError)):
            return
        args = dict(zip(trunk.inputs, self._args, strict=False))  # a pass that failed may have left others behind them
        failure = "none" if error is None else str(error) or "none"
        facts = {**_graph_facts(trunk, journal, self._captured), **_weight_facts(args), "failure": failure}
        with contextlib.suppress(*([] if error is None else [DisagreementError])):
            compare(trunk.group, "compiling", facts)

    def on_sealed(self, trunk: Trunk, fault: Declined | None) -> None:
        """Compare whether the ranks could seal the graph: one that could not would run alone, and the others wait."""
        if trunk.group is not None:
            compare(trunk.group, "sealing the graph", {"why it can't be": "nothing" if fault is None else fault.reason})

    @contextlib.contextmanager
    def lowering(self, trunk: Trunk | None) -> Iterator[None]:
        """Wait, once the graph is lowered, until all ranks have, which takes one longer than the other.

        A step's first collective would else be late, and its time-out is the process group's. A rank waits for the
        others as long as it took itself, and ``timeout_seconds`` beyond.
        """
        begin = time.monotonic()
        yield
        if trunk is not None and trunk.group is not None:
            patience = trunk.group.timeout_seconds + time.monotonic() - begin
            compare(dataclasses.replace(trunk.group, timeout_seconds=patience), "done compiling", {})


def _weight_facts(inputs: Mapping[fx.Node, Any]) -> dict[str, str]:
    """A hash of some elements of each weight; weights in float8 are left out."""
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for node, given in inputs.items():
        tensor = values_on_host(given)
        is_plain = isinstance(tensor, torch.Tensor) and not isinstance(tensor, QuantizedWeight)
        if is_weight(node) and is_plain and tensor.layout is torch.strided and not tensor.is_meta:
            name = source_name(node) or node.name
            by_device.setdefault(tensor.device, {})[f"the content of {name}"] = sketch(tensor)
    facts: dict[str, str] = {}
    for sketches in by_device.values():  # one transfer each
        contents = torch.stack(list(sketches.values())).tolist()
        facts |= dict(zip(sketches, map(_hexadecimal, contents), strict=True))
    return facts


def _graph_facts(trunk: Trunk, journal: Sequence[JournalRow], captured: fx.GraphModule) -> dict[str, str]:
    facts = {"torch": torch.__version__, "the trunk": trunk.lists}
    for row in journal:
        facts |= {f"{row.section}.{name}": repr(option) for name, option in row.options.items() if row.section}
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
    # Notes are for readers: a directory that weights were loaded from may be another on each machine.
    done = [dataclasses.replace(row, report=dataclasses.replace(row.report, noted=())) for row in journal]
    facts |= {f"what {row.name} did": row.line() for row in done}
    facts["the operations"] = _digest(_without_addresses(operations))
    return facts


def _without_addresses(operations: list[tuple[str, str, str]]) -> list[str]:
    return [re.sub(r"0x[0-9a-f]+|(cuda|xpu|hpu)(:|', index=)\d+", "", " ".join(item)) for item in operations]


def _describe(node: fx.Node) -> str:
    item = value(node)
    if is_tensor(node):
        return f"{item.dtype} {[fakes.size_hint(size) for size in item.shape]} on {item.device.type}"
    return str(fakes.size_hint(item) if isinstance(item, torch.SymInt) else item)


def _hexadecimal(content: int) -> str:
    return f"{content % 2**64:016x}"


def _digest(items: Sequence[Any]) -> str:
    return hashlib.sha256(repr(list(items)).encode()).hexdigest()[:12]


class _Reading:
    """A small tensor on its way to the host; only ``read`` waits for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=True)
        # An event by itself records on the current device, which may be another.
        is_on_host = tensor.device.type == "cpu"
        self._done = None if is_on_host else torch.accelerator.current_stream(tensor.device).record_event()

    def read(self) -> list[list[float]]:
        if self._done is not None:
            self._done.synchronize()
        return self._host.tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallInputs:
    """A compiled graph's inputs except weights: the name of each, by its position.

    Attributes:
        numbers: inputs that are no tensors; at -1 all that the model's layers hold, as one.
        conditions: tensors that stay the same for a generation.
        shared: the sample and the timesteps, which are also compared in the graph.

    """

    numbers: Mapping[int, str]
    conditions: Mapping[int, str]
    shared: Mapping[int, str]


class Agreement:
    """Whether the ranks that run a graph together get the same inputs.

    Before every call the ranks compare numbers, shapes and conditions through the store, on the host. If these differ,
    the ranks may be about to run collectives that don't fit each other. In the first call under some conditions they
    also compare the content of the sample and the timesteps.

    In later calls that would wait for the device. Instead, every step broadcasts rank 0's sample and timestep, and the
    graph measures how far each rank's own are from them, and whether each condition holds what it holds on rank 0. If
    they are further apart than ``limits`` allow, every rank raises ``DisagreementError`` ``LAG`` calls later, when the
    figures have long arrived.

    Args:
        group: the ranks.
        inputs: of the graph.
        limits: for each input that the graph compares, its name, and how far a rank's own may be from rank 0's, as a
            share of it; for conditions 0.

    """

    LAG = 2

    def __init__(self, group: Group, inputs: CallInputs, limits: Sequence[tuple[str, float]]) -> None:
        self._group, self._inputs = group, inputs
        self._limits = list(limits)
        self._conditions = set(inputs.conditions.values())
        self._standing = self._stand()
        self._known: collections.OrderedDict[Any, None] = collections.OrderedDict()
        self._readings: collections.deque[_Reading] = collections.deque()
        self._has_warned = False

    @property
    def is_in_graph(self) -> bool:
        """Whether the graph compares inputs; its last output is then for ``record``."""
        return bool(self._limits)

    def before(self, numbers: Sequence[Any], conditions: Sequence[int], args: Sequence[Any]) -> None:
        """Compare a call's inputs before it runs, and the shared inputs of the call ``LAG`` calls ago.

        Args:
            numbers: of the call, in the order of ``CallInputs.numbers``.
            conditions: their fingerprints, in the order of ``CallInputs.conditions``.
            args: the compiled graph's inputs.

        Raises:
            DisagreementError: see ``compare``; or the inputs of an earlier call differed.
            RuntimeError: the process group is not the one that the graph was compiled for.

        """
        standing = self._stand()
        if standing != self._standing:
            raise RuntimeError(
                "this graph was compiled for rank {} of {}, and this process is rank {} of {} now: call "
                "torch.compiler.reset(), and compile again".format(*self._standing[:2], *standing[:2])
            )
        inputs, key = self._inputs, (tuple(numbers), tuple(conditions))
        is_new = key not in self._known
        try:
            while len(self._readings) >= (1 if is_new else self.LAG):
                self._judge(self._readings[0], len(self._readings))
                self._readings.popleft()
        except DisagreementError:
            self._readings.clear()  # as all ranks do now
            raise
        facts = {
            f"the shape of {name}": str(list(args[place].shape))
            for place, name in {**inputs.shared, **inputs.conditions}.items()
        }
        facts |= {name: repr(number) for name, number in zip(inputs.numbers.values(), numbers, strict=True)}
        for name, content in zip(inputs.conditions.values(), conditions, strict=True):
            facts[f"the content of {name}"] = _hexadecimal(content)
        if is_new:
            for place, name in inputs.shared.items():
                facts[f"the content of {name}"] = _hexadecimal(fingerprint(args[place]))
        compare(self._group, "calling the model", facts)
        self._known[key] = None
        self._known.move_to_end(key)
        while len(self._known) > 64:
            self._known.popitem(last=False)

    def _stand(self) -> tuple[int, int, tuple[int, ...]]:
        """The rank of this process in the group, the number of its ranks, and the global rank of each."""
        process_group = collectives.process_group(self._group.name)
        is_fake = dist.get_backend(process_group) == "fake"
        return process_group.rank(), process_group.size(), () if is_fake else _ranks_of(process_group)

    def forget(self) -> None:
        """Drop the figures that have not been read yet."""
        self._readings.clear()

    def record(self, apart: torch.Tensor) -> None:
        """Keep how far the inputs of a call were apart, ``[ranks, inputs]``; see ``trunk.SharedInputs``."""
        self._readings.append(_Reading(apart))

    def check_recorded(self) -> None:
        """Check the figures that have not been read yet; waits for the device. The next call checks them again.

        Raises:
            DisagreementError: inputs of one of the last calls differed.

        """
        for index, reading in enumerate(self._readings):
            self._judge(reading, len(self._readings) - index)

    def _judge(self, reading: _Reading, calls_ago: int) -> None:
        _, _, names = self._standing
        if not names:
            return  # ranks that don't exist have no inputs
        beyond, within, written = [], [], []
        for rank, row in zip(names, reading.read(), strict=True):
            for (name, limit), relative in zip(self._limits, row, strict=True):
                message = f"{name} on rank {rank} is off by {relative:.3g} (relative)"
                if name in self._conditions and relative:
                    written.append(f"{name} on rank {rank}")
                elif not relative <= limit:  # a NaN is beyond
                    beyond.append(f"{message}, allowed is {limit:g}")
                elif relative:
                    within.append(message)
        when = f"{calls_ago} call{'s' if calls_ago > 1 else ''} ago"
        if written:
            raise DisagreementError(
                f"ranks that share a sequence differ from rank {names[0]}, {when}: {_some(written)} had other content "
                "than when the ranks compared it, though it is the same, unmodified tensor: it was written to through "
                ".data or another alias that PyTorch does not track. The results since then are wrong. Write to it on "
                "all ranks alike, or pass new tensors"
            )
        if beyond:
            raise DisagreementError(
                f"ranks that share a sequence differ from rank {names[0]}, {when}: {_some(beyond)}. "
                f"All have computed with what rank {names[0]} was given. {ADVICE}"
            )
        if within and not self._has_warned:
            self._has_warned = True
            log.warning(
                "ranks that share a sequence differ from rank %d no more than rounding does, and compute with its "
                "inputs: %s",
                names[0],
                _some(within),
            )
