"""FP8 linears: the linear layers of the blocks as float8 products, their inputs quantised once."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import fx

from hvcompile.errors import OptionError
from hvcompile.float8 import format as float8_format
from hvcompile.float8 import linear as float8_linear
from hvcompile.float8.format import Granularity
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.inline import run_on_fakes
from hvcompile.graph.nodes import op_name
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting.float8_audit import measure_errors
from hvcompile.rewriting.float8_biases import biases_of, join_biases, may_join_biases
from hvcompile.rewriting.float8_device import check_device, device_of
from hvcompile.rewriting.float8_plan import Plan, groups_of, placeholder_names
from hvcompile.torch_private import fakes, torchao
from hvcompile.torch_private.fakes import TAG, value
from hvcompile.trunk.linears import Linear, linears_of
from hvcompile.trunk.trunk import BlockCall, Body, Trunk

log = logging.getLogger(__name__)

KEEPS = ("free", "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Linears(Pass):
    """Run the linear layers of the blocks as float8 products with a scale for each row.

    Inputs are quantised as they come, once however many layers read them. Inductor fuses that into what computes them.
    Layers of one input become one product, which is exact with a scale a row. Their biases are put together for all
    blocks at once, before the graph runs. Weights are quantised once, when the first graph is compiled, and the
    originals are freed: see ``hvcompile.restore``.

    The last two blocks are left alone. At 60 blocks that costs a thirtieth of the gain, and it helps most: on the
    trained tiny pipeline the mean PSNR against bf16 over 16 prompts rises from 37.9 to 41.6 dB, and the least from 25.2
    to 32.9 (benchmarks/float8_ablation.py). Rounding the weights does the harm, the same way in every step. Rounding
    the inputs does little.

    The first block is left alone if the cache decides by it. On the trained tiny pipeline, float8 there raises the
    differences by 8 % (median), which would shift the threshold; left alone, they don't change
    (benchmarks/float8_fidelity.py).

    By default it applies on NVIDIA GPUs of compute capability 8.9 or newer. Asked for by name, it also runs on CPUs,
    slowly.

    Args:
        granularity: "row" for one scale a row of input and weight. "tensor" for one scale in all, which joins no
            products.
        skip: patterns of layers to leave alone, as of ``fnmatch``. They match a layer's path in the model or the end of
            it: "proj_out", "transformer_blocks.0.*", "*.ff.*".
        keep_blocks: how many blocks at either end keep their linear layers as they are, 0 or more.
        keep_last_blocks: how many blocks at the end keep their linear layers as they are, 0 or more.
        keep_original: "free" lets the originals go. "cpu" keeps exact copies on the CPU for ``hvcompile.restore``.
        audit: whether each layer's relative error, on the inputs of the call that is compiled, is put into the journal.
            This runs one step uncompiled, with both kinds of weights in memory.

    Source: dynamic scaling as in torchao's ``Float8DynamicActivationFloat8WeightConfig(PerRow())``; Micikevicius et
    al., FP8 Formats for Deep Learning (arXiv:2209.05433).

    Given::

        block_0:
            ...
            up_weight: f32[128, 64]
            ...
            normed: f32[1, 41, 64] = add(mul, getitem_1)
            linear_1: f32[1, 41, 128] = linear(normed, up_weight, up_bias)
            mlp: f32[1, 41, 128] = gelu(linear_1)
            ...
            linear_2: f32[1, 41, 64] = linear(normed, to_q_weight, to_q_bias)
            ...
            linear_3: f32[1, 41, 64] = linear(normed, to_k_weight, to_k_bias)
            ...
            linear_4: f32[1, 41, 64] = linear(normed, to_v_weight, to_v_bias)

    Result::

        block_0:
            ...
            up_weight_and_3_float8: f8_e4m3fn[320, 64]
            up_weight_and_3_scale: f32[320, 1]
            up_weight_and_3_bias: f32[320]
            ...
            normed: f32[1, 41, 64] = add(mul, getitem_1)
            quantize = quantize(normed, 'row')
            getitem_2: f8_e4m3fn[41, 64] = quantize[0]
            getitem_3: f32[41, 1] = quantize[1]
            linear_1: f32[41, 320] = linear(..., up_weight_and_3_scale, up_weight_and_3_bias, float32)
            shape_like: f32[1, 41, 320] = shape_like(linear_1, normed)
            split = split(shape_like, [128, 64, 64, 64], -1)
            getitem_4: f32[1, 41, 128] = split[0]
            ...
            mlp: f32[1, 41, 128] = gelu(getitem_4)

    """

    section: ClassVar[str] = "fp8"
    is_exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.1

    granularity: str = "row"
    skip: tuple[str, ...] = ()
    keep_blocks: int = 0
    keep_last_blocks: int = 2
    keep_original: str = "free"
    audit: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("granularity", float8_format.GRANULARITIES), ("keep_original", KEEPS)):
            if getattr(self, name) not in allowed:
                raise OptionError(
                    f"fp8.{name} is {getattr(self, name)!r}; allowed is {' or '.join(map(repr, allowed))}"
                )
        for name in ("keep_blocks", "keep_last_blocks"):
            if getattr(self, name) < 0:
                raise OptionError(f"fp8.{name} is {getattr(self, name)}; allowed is a whole number, 0 or more")

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the bodies; see the class."""
        declined = _check_device(trunk, context)
        if declined is not None:
            return declined.report("graph")
        plan = self._match(trunk, context)
        if plan.is_empty:
            return PassReport(declined=plan.declined(), table=plan.table())
        return self._rewrite(trunk, plan, context)

    def _match(self, trunk: Trunk, context: Context) -> Plan:
        return Plan(
            trunk,
            context,
            granularity=cast("Granularity", self.granularity),
            skip=self.skip,
            keep_blocks=self.keep_blocks,
            keep_last_blocks=self.keep_last_blocks,
        )

    def _rewrite(self, trunk: Trunk, plan: Plan, context: Context) -> PassReport:
        if self.audit:
            plan.errors = measure_errors(trunk, plan.done(), plan.granularity, context)
        # What the report says is found before the graph is another.
        report = PassReport(matched=plan.matched(), declined=plan.declined(), noted=plan.noted(), table=plan.table())
        for (body, names), blocks in plan.variants().items():
            if names:
                keep_original = self.keep_original == "cpu"
                _rewrite_body(trunk, body, names, blocks, plan.granularity, keep_original=keep_original)
        return report


def _check_device(trunk: Trunk, context: Context) -> Declined | None:
    """Why this device or installation can't."""
    device = device_of(trunk)
    if isinstance(device, Declined):
        return device
    if any(isinstance(item, QuantizedWeight) for item in context.given.values()):
        return None  # it did apply, and there is no way back but to restore
    declined = check_device(device, context)
    if declined is not None or torchao.is_available():  # importing it takes a second, where it is of any use
        return declined
    missing = "torchao can't be imported: pip install 'hvcompile[fp8]'"
    log.warning("float8 products would run on %s, but %s", device, missing)
    return Declined(missing)


def _rewrite_body(
    trunk: Trunk,
    body: Body,
    names: frozenset[str],
    blocks: Sequence[BlockCall],
    granularity: Granularity,
    *,
    keep_original: bool,
) -> None:
    """Give these blocks of a body one in which the named linear layers are float8 products."""
    made = trunk.split_body(body, blocks, "float8", Float8Linears.__name__)
    graph = made.module.graph
    items = [item for item in linears_of(made) if item.weight.name in names]
    groups = groups_of(items, granularity)
    placeholders = placeholder_names(made)
    mode = fakes.fake_mode(trunk.graph)
    assert mode is not None  # the blocks take tensors
    quantized: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    with mode, torch.no_grad():
        calls = [dict(zip(placeholders, block.operands, strict=True)) for block in blocks]
        joined = [group for group in groups if may_join_biases(group, calls)]
        for group in groups:
            data, scale = _weight_placeholders(graph, group, granularity)
            bias = _bias_placeholder(graph, group) if group in joined else None
            _replace(graph, group, (data, scale, bias), quantized, granularity)
    biases = join_biases(trunk, joined, calls, Float8Linears.__name__)
    stored = {weights.sources: weights for weights in trunk.stored}
    for block, passed in zip(blocks, calls, strict=True):
        for group in groups:
            sources = tuple(passed[item.weight.name] for item in group)
            if sources not in stored:
                stored[sources] = trunk.store(
                    sources, _stem(sources), granularity=granularity, keep_original=keep_original
                )
            given = [stored[sources].data, stored[sources].scale, *([next(biases)] if group in joined else [])]
            block.call.args = (*block.call.args, *given)
    for item in items:
        trunk.drop_operand(made, item.weight)
    for bias in {item.bias for group in joined for item in group}:
        if bias is not None and not bias.users:
            trunk.drop_operand(made, bias)


def _stem(weights: Sequence[fx.Node]) -> str:
    """What weights that are one matrix are called, in a body and around it."""
    return weights[0].name if len(weights) == 1 else f"{weights[0].name}_and_{len(weights) - 1}"


def _weight_placeholders(graph: fx.Graph, group: Sequence[Linear], granularity: str) -> tuple[fx.Node, fx.Node]:
    first: torch.Tensor = value(group[0].weight)
    rows = sum(value(item.weight).shape[0] for item in group)
    stem = _stem([item.weight for item in group])
    with graph.inserting_after(_last_placeholder(graph)):
        data = graph.placeholder(f"{stem}_float8")
    with graph.inserting_after(data):
        scale = graph.placeholder(f"{stem}_scale")
    data.meta["example_value"] = torch.empty((rows, first.shape[1]), dtype=float8_format.DTYPE, device=first.device)
    shape = (rows, 1) if granularity == "row" else ()
    scale.meta["example_value"] = torch.empty(shape, dtype=torch.float32, device=first.device)
    return data, scale


def _bias_placeholder(graph: fx.Graph, group: Sequence[Linear]) -> fx.Node:
    biases = biases_of(group)
    first: torch.Tensor = value(biases[0])
    with graph.inserting_after(_last_placeholder(graph)):
        bias = graph.placeholder(f"{_stem([item.weight for item in group])}_bias")
    bias.meta["example_value"] = first.new_empty(sum(value(item).shape[0] for item in biases))
    return bias


def _replace(
    graph: fx.Graph,
    group: Sequence[Linear],
    weights: tuple[fx.Node, fx.Node, fx.Node | None],
    quantized: dict[fx.Node, tuple[fx.Node, fx.Node]],
    granularity: str,
) -> None:
    """Put one float8 product in the place of a group's linear layers; their input is quantised once for all groups.

    ``weights`` are data, scale and, where that is given as a whole, the bias.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    group = sorted(group, key=lambda item: places[item.node])
    first, source = group[0].node, group[0].source

    def call(function: Any, *args: Any) -> fx.Node:
        node = graph.call_function(function, args)
        node.meta = {key: first.meta[key] for key in ("nn_module_stack", "stack_trace") if key in first.meta}
        node.meta |= {TAG: Float8Linears.__name__, "example_value": run_on_fakes(node)}
        return node

    if source not in quantized:
        with graph.inserting_after(source if source.op != "placeholder" else _last_placeholder(graph)):
            pair = call(float8_format.quantize, source, granularity)
        with graph.inserting_after(pair):
            rows = call(operator.getitem, pair, 0)
        with graph.inserting_after(rows):
            quantized[source] = (rows, call(operator.getitem, pair, 1))
    with graph.inserting_before(first):
        data, scale, bias = weights
        biases = biases_of(group)
        if bias is None and biases:
            bias = call(torch.cat, biases) if len(biases) > 1 else biases[0]
        product = call(float8_linear.linear, *quantized[source], data, scale, bias, value(first).dtype)
        shaped = call(float8_linear.shape_like, product, source)
        pieces = [shaped]
        if len(group) > 1:
            sizes = [int(value(item.weight).shape[0]) for item in group]
            split = call(torch.split, shaped, sizes, -1)
            pieces = [call(operator.getitem, split, place) for place in range(len(group))]
    for item, piece in zip(group, pieces, strict=True):
        item.node.replace_all_uses_with(piece)
        read = item.node.all_input_nodes
        graph.erase_node(item.node)
        _drop_unread(read)


def _drop_unread(nodes: Sequence[fx.Node]) -> None:
    """Erase what only put pieces together that are read as a whole now."""
    for node in nodes:
        if not node.users and op_name(node) in {"cat", "concat", "getitem"}:
            read = node.all_input_nodes
            node.graph.erase_node(node)
            _drop_unread(read)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    found: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    return found[-1]
