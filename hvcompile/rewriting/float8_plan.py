"""Which linear layers of a trunk become float8 products, and why the others do not."""

from __future__ import annotations

import collections
import fnmatch
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.errors import QuantizedWeightError
from hvcompile.float8.format import Granularity
from hvcompile.float8.saved import source_of
from hvcompile.float8.weights import LoadedWeight, QuantizedWeight
from hvcompile.graph.nodes import is_parameter
from hvcompile.graph.paths import parameter_path
from hvcompile.hollow.host import HostWeight
from hvcompile.pipeline import Context
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import num_bytes, numel_hint, size_hint, value
from hvcompile.trunk.linears import Linear, linears_of, may_join, special_linears
from hvcompile.trunk.low_rank import branches_of
from hvcompile.trunk.trunk import BlockCall, Body, Trunk

log = logging.getLogger(__name__)

MULTIPLE = 16  # of N and K, by the matrix product's demand
SMALLEST = 64  # N or K; below it the product is no longer what takes the time
WRAPPED = ".base_layer"  # what peft calls the layer that an adapter wraps
FEWEST_ROWS = 16  # of the input: fewer, as in the modulation by the timestep, is bound by reading the weight


class Plan:
    """Which linear layer of which block is quantised, and why the others are not."""

    def __init__(
        self,
        trunk: Trunk,
        context: Context,
        *,
        granularity: Granularity,
        skip: Sequence[str],
        keep_blocks: int,
        keep_last_blocks: int,
    ) -> None:
        self.trunk, self.context = trunk, context
        self.granularity, self.skip = granularity, skip
        self.keep_blocks, self.keep_last_blocks = keep_blocks, keep_last_blocks
        branches = [branch for body in trunk.bodies for branch in branches_of(body.module.graph.nodes)]
        self._low_rank = {node for branch in branches for node in (branch.down, branch.up)}
        self.linears = {body: {item.weight.name: item for item in linears_of(body)} for body in trunk.bodies}
        names = {body: placeholder_names(body) for body in trunk.bodies}
        self._operands = {block: dict(zip(names[block.body], block.operands, strict=True)) for block in trunk.blocks}
        self.unused = set(skip)
        self.errors: Mapping[tuple[BlockCall, str], float] = {}
        self.reasons: dict[tuple[BlockCall, str], str] = {}
        for place, block in enumerate(trunk.blocks):
            for name, item in self.linears[block.body].items():
                self.reasons[block, name] = self._reason(place, block, item)
        self._settle_shared()
        for (block, name), reason in self.reasons.items():
            given = context.given.get(self.operand(block, name))
            if isinstance(given, QuantizedWeight) and not reason and given.joined.granularity != granularity:
                raise QuantizedWeightError(
                    f"{given.path} is kept in float8 with a scale a {given.joined.granularity}, and fp8.granularity is "
                    f"{granularity!r} now. {_way_back(given)}"
                )
            if reason and isinstance(given, QuantizedWeight):
                raise QuantizedWeightError(
                    f"{given.path} has been kept in float8 alone since {given.since}, and is not to be "
                    f"quantised now: {reason}. {_way_back(given)}"
                )

    def operand(self, block: BlockCall, name: str) -> fx.Node:
        """The node that a block passes for a placeholder of its body."""
        return self._operands[block][name]

    def path(self, block: BlockCall, name: str) -> str:
        """A linear layer's path in the model; of one that an adapter wraps, the path that it had before."""
        return parameter_path(self.operand(block, name)).removesuffix(".weight").removesuffix(WRAPPED)

    @property
    def is_empty(self) -> bool:
        """Whether no layer is quantised."""
        return all(self.reasons.values())

    def done(self) -> dict[tuple[BlockCall, str], Linear]:
        """The layers that are quantised."""
        return {key: self.linears[key[0].body][key[1]] for key, reason in self.reasons.items() if not reason}

    def _reason(self, place: int, block: BlockCall, item: Linear) -> str:
        operand = self.operand(block, item.weight.name)
        given = self.context.given.get(operand, value(operand))
        kind = type(given)
        if not is_parameter(operand):
            return "its weight is no parameter of the model, so it may change from call to call"
        if kind not in {torch.Tensor, torch.nn.Parameter, QuantizedWeight, LoadedWeight, HostWeight, *fakes.FAKES}:
            return f"its weight is a {kind.__name__}, quantised already or otherwise special"
        weight: torch.Tensor = value(operand)
        if weight.ndim != 2 or not weight.is_floating_point():
            return f"its weight is {weight.ndim}-dimensional, {weight.dtype}"
        if item.node in self._low_rank:
            return "it is of a low-rank branch beside a layer, an adapter, which is small and may be swapped"
        if item.is_written_to:
            return "its input is written to in place"
        path = self.path(block, item.weight.name)
        for pattern in self.skip:
            if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}"):
                self.unused.discard(pattern)
                return f"fp8.skip names it ({pattern!r})"
        if min(place, len(self.trunk.blocks) - 1 - place) < self.keep_blocks:
            return f"fp8.keep_blocks is {self.keep_blocks}"
        if len(self.trunk.blocks) - 1 - place < self.keep_last_blocks:
            return f"fp8.keep_last_blocks is {self.keep_last_blocks}"
        if place == 0 and self.context.is_first_block_compared:
            return "the first block is compared from step to step, and float8's noise would count as change"
        rows, columns = map(size_hint, weight.shape)
        if rows % MULTIPLE or columns % MULTIPLE:
            return f"its weight is {rows} x {columns}, and float8 products take multiples of {MULTIPLE}"
        if isinstance(given, QuantizedWeight):
            return ""
        if min(rows, columns) < SMALLEST:
            return f"its weight is {rows} x {columns}: too small to gain (less than {SMALLEST})"
        if fakes.is_data_dependent(value(item.source)):
            return "its input's length depends on data, which the float8 operations can't be traced for"
        num_rows = numel_hint(value(item.source)) // columns
        if num_rows < FEWEST_ROWS:
            return (
                f"its input has {num_rows} rows: reading the weight is what takes the time (fewer than {FEWEST_ROWS})"
            )
        dtype = value(item.node).dtype
        if weight.device.type == "cuda" and dtype != torch.bfloat16 and self.granularity == "row":
            return f"it computes in {dtype}, and row-wise float8 products on GPUs give bfloat16"
        is_real = operand in self.context.given and not isinstance(given, HostWeight)
        if is_real and given.untyped_storage().nbytes() != given.numel() * given.element_size():
            return "its weight is part of a larger tensor, which it would not free"
        return ""

    def _settle_shared(self) -> None:
        """Leave alone the weights that something else reads too."""
        calls = {block.call for block in self.trunk.blocks}
        derived = {node for item in self.trunk.derived for node in item.sources}
        readers = [(block, *item) for block, operands in self._operands.items() for item in operands.items()]
        changed = True
        while changed:
            changed = False
            kept = {
                operand
                for block, name, operand in readers
                if is_parameter(operand) and self.reasons.get((block, name), "it is no linear layer's weight alone")
            }
            for key, reason in self.reasons.items():
                operand = self.operand(*key)
                if not reason and (operand in kept | derived or not calls.issuperset(operand.users)):
                    self.reasons[key] = "its weight is read elsewhere too"
                    changed = True

    def variants(self) -> dict[tuple[Body, frozenset[str]], list[BlockCall]]:
        """The blocks by body and by what is quantised of it."""
        found: dict[tuple[Body, frozenset[str]], list[BlockCall]] = {}
        for block in self.trunk.blocks:
            names = frozenset(name for name in self.linears[block.body] if not self.reasons[block, name])
            found.setdefault((block.body, names), []).append(block)
        return found

    def matched(self) -> tuple[str, ...]:
        """What the log line says."""
        done = [key for key, reason in self.reasons.items() if not reason]
        rows = [self._row(block, name) for block, name in done]
        before, after = (sum(row[key] for row in rows) for key in ("bytes_before", "bytes_after"))
        products = sum(
            len(blocks)
            * len(
                groups_of([self.linears[body][name] for name in self.linears[body] if name in names], self.granularity)
            )
            for (body, names), blocks in self.variants().items()
        )
        return (
            f"{len(done)} of {len(self.reasons)} linear layers as {products} float8 products, "
            f"scaled by {self.granularity}; their weights take {after / 2**20:.4g} MiB instead of "
            f"{before / 2**20:.4g}",
        )

    def noted(self) -> tuple[str, ...]:
        """Where weights were loaded from; each rank may have a directory of its own."""
        return tuple(f"weights loaded in float8 from {source}" for source in sorted(self._sources()))

    def _sources(self) -> set[str]:
        """The directories that weights were loaded from in float8."""
        given = [item for item in self.context.given.values() if isinstance(item, QuantizedWeight)]
        return {source for item in given if (source := source_of(item))}

    def declined(self) -> tuple[tuple[str, str], ...]:
        """Each reason once, with the layers it holds for."""
        found: dict[str, list[str]] = {}
        for key, reason in self.reasons.items():
            if reason:
                found.setdefault(reason, []).append(self.path(*key))
        rows = [(_span(paths), reason) for reason, paths in found.items()]
        special = collections.Counter[str]()
        for body in self.trunk.bodies:
            num_blocks = sum(block.body is body for block in self.trunk.blocks)
            for reason in special_linears(body):
                special[reason] += num_blocks
        rows += [(f"{count} linear layers", reason) for reason, count in special.items()]
        for pattern in sorted(self.unused):
            log.warning("fp8.skip: %r matches no linear layer of the blocks", pattern)
            rows.append((repr(pattern), "fp8.skip names it, and no linear layer of the blocks is called so"))
        return tuple(rows)

    def table(self) -> tuple[Mapping[str, Any], ...]:
        """A row a linear layer."""
        return tuple(self._row(*key) for key in self.reasons)

    def _row(self, block: BlockCall, name: str) -> dict[str, Any]:
        weight: torch.Tensor = value(self.operand(block, name))
        before = num_bytes(weight)
        scales = size_hint(weight.shape[0]) if self.granularity == "row" and weight.ndim else 1
        reason = self.reasons[block, name]
        audited = {"relative_error": self.errors.get((block, name))} if self.errors else {}
        return {
            "linear": self.path(block, name),
            "shape": " x ".join(str(size_hint(size)) for size in weight.shape),
            "done": "float8" if not reason else "left alone",
            "why": reason,
            "bytes_before": before,
            "bytes_after": before if reason else numel_hint(weight) + 4 * scales,
            **audited,
        }


def _way_back(weight: QuantizedWeight) -> str:
    """What to do where a weight is in float8 otherwise than options want it."""
    source = source_of(weight)
    if source:
        return f"It was loaded from {source}: compile it with the options that it was saved with"
    return "Call hvcompile.restore(model) before compiling it with other options"


def _span(paths: Sequence[str]) -> str:
    """Some paths in few words."""
    first = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
    return first if len(paths) <= 2 else f"{len(paths)} layers ({first})"


def placeholder_names(body: Body) -> list[str]:
    """What a body calls its operands, in order."""
    return [node.name for node in body.module.graph.find_nodes(op="placeholder")]


def groups_of(linears: Sequence[Linear], granularity: Granularity) -> list[list[Linear]]:
    """Linear layers that become one product: of one input, of one dtype, with a bias or without."""
    if granularity == "tensor":
        return [[item] for item in linears]  # one scale in all would be another one for each
    found: dict[Any, list[Linear]] = {}
    for item in linears:
        weight: torch.Tensor = value(item.weight)
        # Joined, biases are needed before the first layer.
        bias = item.bias if item.bias is None or item.bias.op != "placeholder" else "placeholder"
        key = (item.source, value(item.node).dtype, weight.dtype, bias)
        found.setdefault(key, []).append(item)
    groups: list[list[Linear]] = []
    for group in found.values():
        groups += [group] if len(group) == 1 or may_join(group) else [[item] for item in group]
    return groups
