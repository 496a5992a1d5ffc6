"""The backend ``hvfast``: Dynamo's graph in, a callable out. The whole compiler, read from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile import agreement, inductor, pipeline, runtime
from hvcompile.dump import Dump
from hvcompile.errors import DisagreementError, HvcompileError, RequestedPassError
from hvcompile.graph_code import inline
from hvcompile.inputs import InputRoles, classify
from hvcompile.launch import of_this_rank
from hvcompile.nodes import is_parameter, is_tensor, is_weight
from hvcompile.options import Options, parse
from hvcompile.outline import recover
from hvcompile.passes import PASSES
from hvcompile.pipeline import JournalRow, PassReport
from hvcompile.trunk import NoTrunk, Trunk

log = logging.getLogger(__name__)


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
        mode: None or "default" for all passes that apply, "exact" for those that do not change numerics.
        options: sections of ``hvcompile.options``.

    Returns:
        A callable with the calling convention of ``graph_module``.

    Raises:
        OptionError: ``mode`` or ``options`` is invalid.
        RequestedPassError: a pass that options ask for by name can't apply.

    """
    settings = parse(PASSES, options, mode)
    dump = Dump(
        of_this_rank(settings.dump), inductor.compile_id(), lower=settings.lower, limit_gib=settings.dump_limit_gib
    )
    dump.graph("captured", graph_module)
    trunk = NoTrunk(needs_gradients(graph_module)) if needs_gradients(graph_module) else recover(graph_module)
    if isinstance(trunk, NoTrunk):
        return _plain(graph_module, example_inputs, settings, dump, trunk.reason)

    journal = [_outline_row(trunk), *pipeline.off_rows(settings.switched_off)]
    dump.graph("outlined", trunk.module)
    try:
        pipeline.run(trunk, settings.passes, lambda name, after: dump.graph(name, after.module), journal)
    except HvcompileError as error:
        with contextlib.suppress(DisagreementError):  # the others are told; what went wrong here is said below
            agreement.before_compiling(trunk, journal, graph_module, failure=str(error))
        raise
    finally:
        dump.journal(journal)
    agreement.before_compiling(trunk, journal, graph_module, failure="")
    calling = seal(trunk)
    dump.graph("sealed", trunk.module)
    inputs = [*example_inputs, *(inductor.value(state.placeholder) for state in trunk.states)]
    begin = time.monotonic()
    compiled = _lower(trunk.module, inputs, settings, dump, calling, journal)
    agreement.after_compiling(trunk, time.monotonic() - begin)
    return compiled


def needs_gradients(graph_module: fx.GraphModule) -> str:
    """Why this graph is compiled for training; empty if it is not. No rewrite here has a backward."""
    if not torch.is_grad_enabled():
        return ""
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if is_tensor(node) and inductor.value(node).requires_grad:
            return (
                f"gradients are enabled and {inductor.source_name(node) or node.name} requires them; "
                "call the model under torch.no_grad() or torch.inference_mode()"
            )
    return ""


def _plain(
    graph_module: fx.GraphModule, inputs: Sequence[Any], settings: Options, dump: Dump, reason: str
) -> Callable[..., Any]:
    """Compile without any rewrite, and say why."""
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
    calling = runtime.Calling(
        anchor=weights[0] if weights else None,
        weights=(),
        conditions=(),
        numbers=(),
        symbols={},
        num_outputs=0,
        states=(),
        has_record=False,
    )
    return _lower(graph_module, inputs, settings, dump, calling, journal)


def _lower(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    settings: Options,
    dump: Dump,
    calling: runtime.Calling,
    journal: list[JournalRow],
) -> Callable[..., Any]:
    """Hand a graph to the lowering that was chosen, and its result to the runtime."""
    with dump.lowering():
        compiled = inductor.LOWERINGS[settings.lower](module, inputs)
    return dump.recording(runtime.CompiledTrunk(compiled, calling, journal, inductor.compile_id()))


def _outline_row(trunk: Trunk) -> JournalRow:
    report = PassReport(matched=(f"{trunk.lists}: {len(trunk.blocks)} blocks share {len(trunk.bodies)} bodies",))
    row = JournalRow(name="outline", report=report, op_changes={"invoke_subgraph": len(trunk.blocks)})
    log.info("%s", row.line())
    return row


def seal(trunk: Trunk) -> runtime.Calling:
    """Add the next state and the decision to the graph's outputs, and say how the runtime must call it."""
    roles = classify(trunk)
    weights = set(roles.weights)
    placeholders = list(trunk.graph.find_nodes(op="placeholder"))
    results: Any = trunk.output.args[0]
    extra = [state.next_value for state in trunk.states]
    if trunk.observed:
        extra.append(inline(trunk.graph, _record, trunk.observed, before=trunk.output, tag="runtime")["record"])
    trunk.output.args = ((*results, *extra),)
    trunk.module.graph.lint()
    trunk.module.recompile()
    first = [node for node in trunk.blocks[0].operands if node in weights]
    # A parameter rather than a buffer, which a forward may replace.
    anchors = [*filter(is_parameter, first), *filter(is_parameter, roles.weights), *first, *roles.weights]
    return runtime.Calling(
        anchor=placeholders.index(anchors[0]) if anchors else None,
        weights=tuple(place for place, node in enumerate(placeholders) if node in weights),
        conditions=tuple(placeholders.index(node) for node in roles.conditions),
        numbers=tuple(place for place, node in enumerate(placeholders[: len(trunk.inputs)]) if not is_tensor(node)),
        symbols=inductor.symbols_of(trunk.graph),
        num_outputs=len(results),
        states=tuple(
            runtime.StateLayout(shape=state.shape, dtype=state.dtype, device=state.device) for state in trunk.states
        ),
        has_record=bool(trunk.observed),
        agreement=_agreement(trunk, roles, placeholders),
    )


def _agreement(trunk: Trunk, roles: InputRoles, placeholders: list[fx.Node]) -> agreement.Agreement | None:
    """What compares the inputs of the ranks that run this graph together."""
    if trunk.group is None or trunk.sharding is None:
        return None
    inputs = [node for node in (roles.sample, *roles.clocks, *roles.conditions) if node is not None]
    return agreement.Agreement(
        trunk.group,
        {placeholders.index(node): inductor.source_name(node) or node.name for node in inputs},
        placeholders.index(roles.sample) if roles.sample is not None else None,
        [placeholders.index(node) for node in roles.clocks],
    )


def _record(*, reused: fx.Proxy, difference: fx.Proxy) -> dict[str, Any]:
    """A decision as one float32 pair, so that reading it is one transfer."""
    return {"record": torch.stack([reused.to(torch.float32), difference.to(torch.float32)])}  # type: ignore[list-item]
