"""The backend ``hvfast``: Dynamo's graph in, a callable out. The whole compiler, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile import pipeline
from hvcompile.dump.write import Dump
from hvcompile.errors import DisagreementError, HvcompileError, QuantizedWeightError, RequestedPassError
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.inline import inline
from hvcompile.graph.nodes import is_parameter, is_tensor, is_weight
from hvcompile.graph.paths import parameter_path
from hvcompile.journal import JournalRow, PassReport
from hvcompile.options import Options, parse
from hvcompile.passes import PASSES
from hvcompile.ranks.launch import of_this_rank
from hvcompile.runtime import agreement
from hvcompile.runtime.call import Calling, CompiledTrunk, StateLayout
from hvcompile.runtime.derived import DerivedCall
from hvcompile.runtime.weights import WeightLayout
from hvcompile.torch_private import dynamo, fakes, lowering
from hvcompile.trunk.outline import recover
from hvcompile.trunk.roles import InputRoles, classify
from hvcompile.trunk.trunk import Derived, NoTrunk, Trunk

log = logging.getLogger(__name__)

# How far ranks' samples may be apart, relatively: what bf16's rounding makes of fifty steps, with other kernels on
# other ranks, stays below; another seed's noise is apart by more than 1.
ROUNDING = 0.02


def hvfast(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph captured by Dynamo: ``torch.compile(model, backend="hvfast")``.

    Args:
        graph_module: Dynamo's graph; not changed.
        example_inputs: one a placeholder.
        mode: None or "default" for all passes that apply, "exact" for those that do not change numerics, "max" for
            those too that are off by themselves.
        options: sections of ``hvcompile.options``.

    Returns:
        A callable with the calling convention of ``graph_module``.

    Raises:
        OptionError: ``mode`` or ``options`` is invalid.
        RequestedPassError: a pass that options ask for by name can't apply.

    """
    settings = parse(PASSES, options, mode)
    return _compile(graph_module, example_inputs, settings, dynamo.compile_id(), [])


def _compile(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Options,
    compile_id: tuple[int, int],
    journal: list[JournalRow],
    *,
    given: Sequence[Any] | None = None,
) -> Callable[..., Any]:
    """Run the passes and lower what they make.

    Args:
        graph_module: as captured.
        example_inputs: what it is compiled for.
        settings: the passes among them.
        compile_id: of the capture.
        journal: may hold rows already.
        given: the inputs of the call that is compiled, where ``example_inputs`` are not these.

    """
    given = example_inputs if given is None else given
    dump = Dump(of_this_rank(settings.dump), compile_id, lower=settings.lower, limit_gib=settings.dump_limit_gib)
    dump.graph("captured", graph_module)
    trunk = NoTrunk(needs_gradients(graph_module)) if needs_gradients(graph_module) else recover(graph_module)
    if isinstance(trunk, NoTrunk):
        return _plain(graph_module, example_inputs, settings, dump, trunk.reason)

    journal[:0] = [_outline_row(trunk), *pipeline.off_rows(settings.switched_off)]
    dump.graph("outlined", trunk.module)
    context = pipeline.Context(given=dict(zip(trunk.inputs, given, strict=True)))
    try:
        pipeline.run(
            trunk,
            settings.passes,
            lambda name, after: dump.graph(name, after.module, after.derived),
            journal,
            context,
        )
        require_values(trunk, context)
    except HvcompileError as error:
        with contextlib.suppress(DisagreementError):  # the others are told; what went wrong here is said below
            agreement.before_compiling(trunk, journal, graph_module, context.given, failure=str(error))
        raise
    finally:
        dump.journal(journal)
    agreement.before_compiling(trunk, journal, graph_module, context.given, failure="")
    calling = seal(trunk)
    dump.graph("sealed", trunk.module, trunk.derived)
    passed = example_inputs if calling.passed is None else [example_inputs[place] for place in calling.passed]
    inputs = [*passed, *map(fakes.value, trunk.added)]
    instead = None
    if any(item.read is not None for item in trunk.derived):
        # Dynamo's own graph may be gone or changed by the time that another is wanted.
        captured = dynamo.clone_graph_module(graph_module)
        instead = functools.partial(_compile_instead, captured, settings, compile_id)
    begin = time.monotonic()
    run = _lower(trunk.module, inputs, settings, dump, calling, journal, compile_id, instead)
    agreement.after_compiling(trunk, time.monotonic() - begin)
    # Now, not at the first call: Dynamo's guards are made next, and see the weights as they will be.
    dump.hold(given, [place for layout in calling.stored for place in layout.positions])
    for layout, stored in zip(calling.stored, trunk.stored, strict=True):
        joined = layout.join(given)
        dump.store(stored.data.name, joined.data)
        dump.store(stored.scale.name, joined.scale)
    return run


def _compile_instead(
    captured: fx.GraphModule,
    settings: Options,
    compile_id: tuple[int, int],
    inputs: Sequence[Any],
    made_by: str,
    reason: str,
) -> Callable[..., Any]:
    """Compile a graph for inputs that a pass's rewrite of it does not fit, without that rewrite."""
    log.warning("%s does not fit a call, which is compiled without it: %s", made_by, reason)
    passes = []
    for item, requested in settings.passes:
        if type(item).__name__ != made_by:
            passes.append((item, requested and made_by not in item.needs))
        elif (other := item.instead()) is not None:
            passes.append((other, False))
    settings = dataclasses.replace(settings, passes=tuple(passes))
    row = JournalRow(name=made_by, report=PassReport(declined=(("compiled again at run time", reason),)), op_changes={})
    with torch.no_grad():
        module, fakes = dynamo.specialise(captured, inputs)
        return _compile(module, fakes, settings, compile_id, [row], given=inputs)


def require_values(trunk: Trunk, context: pipeline.Context) -> None:
    """See that nothing in the graph reads a weight that is kept in float8 alone.

    Raises:
        QuantizedWeightError: something does, as where a model is compiled again without float8.

    """
    derived = {node for item in trunk.derived for node in item.sources}
    for node, given in context.given.items():
        if isinstance(given, QuantizedWeight) and (node.users or node in derived):
            reader = next(iter(node.users)).format_node() if node.users else "what is computed once a generation"
            raise QuantizedWeightError(
                f"{given.path} has been kept in float8 alone since this model was first compiled, and now "
                f"{reader} reads it. Compile it with the same options, or call "
                "hvcompile.restore(model) first"
            )


def needs_gradients(graph_module: fx.GraphModule) -> str:
    """Why this graph is compiled for training; empty if it is not. No rewrite here has a backward."""
    if not torch.is_grad_enabled():
        return ""
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if is_tensor(node) and fakes.value(node).requires_grad:
            return (
                f"gradients are enabled and {dynamo.source_name(node) or node.name} requires them; "
                "call the model under torch.no_grad() or torch.inference_mode()"
            )
    return ""


def _plain(
    graph_module: fx.GraphModule, inputs: Sequence[Any], settings: Options, dump: Dump, reason: str
) -> Callable[..., Any]:
    """Compile without any rewrite, and say why."""
    for given in inputs:
        if isinstance(given, QuantizedWeight):
            raise QuantizedWeightError(
                f"{given.path} has been kept in float8 alone since this model was first compiled, and this graph of it "
                f"can't be rewritten: {reason}. Call hvcompile.restore(model) first"
            )
    for item, requested in settings.passes:
        if requested:
            raise RequestedPassError(
                f"options ask for {item.section!r}, but this graph can't be rewritten: {reason}. "
                f"Drop {item.section!r} from options to compile it as it is."
            )
    log.warning("hvfast left a graph to plain %s: %s", settings.lower, reason)
    journal = [JournalRow(name="outline", report=PassReport(declined=(("graph", reason),)), op_changes={})]
    dump.journal(journal)
    placeholders = list(enumerate(graph_module.graph.find_nodes(op="placeholder")))
    weights = [place for place, node in placeholders if is_parameter(node)]
    weights += [place for place, node in placeholders if is_weight(node)]
    calling = Calling(
        anchor=weights[0] if weights else None,
        weights=(),
        conditions=(),
        numbers=(),
        symbols={},
        num_outputs=0,
        states=(),
        has_record=False,
    )
    return _lower(graph_module, inputs, settings, dump, calling, journal, dynamo.compile_id())


def _lower(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    settings: Options,
    dump: Dump,
    calling: Calling,
    journal: list[JournalRow],
    compile_id: tuple[int, int],
    instead: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Hand a graph to the lowering that was chosen, and its result to the runtime."""
    with dump.lowering():
        compiled = lowering.LOWERINGS[settings.lower](module, inputs)
    run = CompiledTrunk(compiled, calling, journal, compile_id, instead)
    return dump.recording(run, run.derived_inputs)


def _outline_row(trunk: Trunk) -> JournalRow:
    report = PassReport(matched=(f"{trunk.lists}: {len(trunk.blocks)} blocks share {len(trunk.bodies)} bodies",))
    row = JournalRow(name="outline", report=report, op_changes={"invoke_subgraph": len(trunk.blocks)})
    log.info("%s", row.line())
    return row


def seal(trunk: Trunk) -> Calling:
    """Give the graph its last inputs and outputs, and say how the runtime must call it.

    The next state, the decision, and how far ranks' inputs are apart are added to the outputs; weights that float8
    copies stand for leave the inputs.
    """
    roles = classify(trunk)
    weights = set(roles.weights)
    placeholders = list(trunk.graph.find_nodes(op="placeholder"))
    results: Any = trunk.output.args[0]
    extra = [state.next_value for state in trunk.states]
    if trunk.observed:
        extra.append(inline(trunk.graph, _record, trunk.observed, before=trunk.output, tag="runtime")["record"])
    if trunk.shared is not None:
        extra.append(trunk.shared.apart)
    trunk.output.args = ((*results, *extra),)
    symbols = fakes.symbols_of(trunk.graph)
    sources = {node for stored in trunk.stored for node in stored.sources}
    passed = [place for place, node in enumerate(trunk.inputs) if node not in sources]
    read = weights - sources
    first = [node for node in trunk.blocks[0].operands if node in weights]
    # A parameter rather than a buffer, which a forward may replace.
    anchors = [*filter(is_parameter, first), *filter(is_parameter, roles.weights), *first, *roles.weights]
    calling = Calling(
        anchor=placeholders.index(anchors[0]) if anchors else None,
        weights=tuple(place for place, node in enumerate(placeholders) if node in read),
        conditions=tuple(placeholders.index(node) for node in roles.conditions),
        numbers=tuple(place for place, node in enumerate(trunk.inputs) if not is_tensor(node)),
        symbols={place: symbol for place, symbol in symbols.items() if place < len(trunk.inputs)},
        num_outputs=len(results),
        states=tuple(StateLayout(shape=state.shape, dtype=state.dtype, device=state.device) for state in trunk.states),
        has_record=bool(trunk.observed),
        passed=tuple(passed) if sources else None,
        stored=tuple(
            WeightLayout(
                positions=tuple(map(placeholders.index, stored.sources)),
                paths=tuple(map(parameter_path, stored.sources)),
                granularity=stored.granularity,
                keep_original=stored.keep_original,
            )
            for stored in trunk.stored
        ),
        derived=tuple(_derived_call(item, placeholders) for item in trunk.derived),
        agreement=_agreement(trunk, roles, placeholders),
    )
    for node in sources:
        trunk.graph.erase_node(node)
    trunk.module.graph.lint()
    trunk.module.recompile()
    return calling


def _derived_call(item: Derived, placeholders: Sequence[fx.Node]) -> DerivedCall:
    item.module.recompile()
    return DerivedCall(
        made_by=item.made_by,
        names=tuple(node.name for node in item.placeholders),
        run=item.module.forward,
        sources=tuple(placeholders.index(node) for node in item.sources),
        read=item.read,
    )


def _agreement(trunk: Trunk, roles: InputRoles, placeholders: list[fx.Node]) -> agreement.Agreement | None:
    """What compares the inputs of the ranks that run this graph together."""
    if trunk.group is None or trunk.sharding is None:
        return None
    shared = list(trunk.shared.nodes) if trunk.shared is not None else []

    def named(nodes: Iterable[fx.Node]) -> dict[int, str]:
        return {placeholders.index(node): dynamo.source_name(node) or node.name for node in nodes}

    inputs = agreement.CallInputs(
        numbers=named(node for node in trunk.inputs if not is_tensor(node)),
        conditions=named(roles.conditions),
        shared=named(shared),
    )
    return agreement.Agreement(trunk.group, inputs, [ROUNDING * (node is roles.sample) for node in shared])


def _record(*, reused: fx.Proxy, difference: fx.Proxy) -> dict[str, Any]:
    """A decision as one float32 pair, so that reading it is one transfer."""
    return {"record": torch.stack([reused.to(torch.float32), difference.to(torch.float32)])}  # type: ignore[list-item]
