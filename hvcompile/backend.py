"""The backend ``hvfast``: Dynamo's graph in, a callable out. The whole compiler, read from top to bottom.

``compile_graph`` is the way. *Rewrite* finds the trunk (the model's repeated blocks, outlined as calls of shared
bodies) and runs the passes on it. *Seal* gives the graph its last inputs and outputs, and plans how the runtime calls
it. *Lower* hands it to Inductor. *Store weights* puts float8 copies in the place of weights. A graph without a trunk is
lowered as it was captured, and so is one that can't be recovered or sealed for a reason that nobody foresaw. Dumps and
ranks listen as observers. Last, a look is put before Dynamo's guards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile import pipeline
from hvcompile.as_captured import OUTLINE, fetched_as_captured, leave_as_captured, refuse_hooks
from hvcompile.dump.runs import own_run
from hvcompile.dump.write import Dump
from hvcompile.errors import InvalidRewriteError, QuantizedWeightError
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.aliasing import shared_memory
from hvcompile.graph.apart import with_plain_tensors
from hvcompile.graph.breaks import ends_early, is_minor, piece_note
from hvcompile.graph.costs import Device
from hvcompile.graph.nodes import is_tensor
from hvcompile.journal import Declined, JournalRow, PassReport
from hvcompile.options import Options, parse
from hvcompile.passes import PASSES
from hvcompile.ranks.launch import of_this_rank
from hvcompile.rewriting.fetching import WHERE_READ, fetch_where_read
from hvcompile.runtime.agreement import RanksInStep
from hvcompile.runtime.call import CallPlan, CompiledGraph
from hvcompile.runtime.hooks import look_after
from hvcompile.runtime.lineage import lineage_of
from hvcompile.runtime.structure import Look
from hvcompile.runtime.uncompiled import count
from hvcompile.sealing import seal, seal_as_captured
from hvcompile.torch_private import dynamo, fakes
from hvcompile.torch_private.floats import capture_again_with_inputs
from hvcompile.torch_private.frames import is_in_a_piece
from hvcompile.torch_private.guards import look_first
from hvcompile.torch_private.limits import count_each_model
from hvcompile.torch_private.lowering import LOWERINGS
from hvcompile.trunk.lineage import Earlier, Flow
from hvcompile.trunk.numbers import fix_numbers
from hvcompile.trunk.observer import CAPTURED, OUTLINED, SEALED, Observer, Observers
from hvcompile.trunk.outline import recover
from hvcompile.trunk.pieces import earlier_of, flow_of
from hvcompile.trunk.scales import constant_scales
from hvcompile.trunk.trunk import Trunk

log = logging.getLogger(__name__)

Handler = Callable[[fx.GraphModule, Sequence[Any], Options], Callable[..., Any]]
"""Takes a captured graph, its example inputs and the options, and returns what Dynamo is to call."""


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
        example_inputs: one per placeholder.
        mode: None or "default" for all passes that apply; "exact" for those that do not change numerics; "max" also
            turns on those that are off by default. It may stand in ``options`` instead.
        options: sections of ``hvcompile.options``.

    Returns:
        A callable with the calling convention of ``graph_module``.

    Raises:
        OptionError: ``mode`` or ``options`` is invalid.
        RequestedPassError: a pass that options ask for by name can't apply.

    """
    settings = parse(PASSES, options, mode)
    count_each_model(count)
    look_after(is_compiling=True)
    capture_again_for_scales(graph_module.graph)
    handle = next(reversed(_HANDLERS.values()), compile_graph)
    run = with_plain_tensors(handle, graph_module, example_inputs, settings)
    if settings.guards == "quick":  # Dynamo makes its guards next
        look_first(Look)
    return looked_after(run) if is_in_a_piece() else run


def capture_again_for_scales(graph: fx.Graph) -> None:
    """Have Dynamo pass the scales of adapters as inputs from the beginning; see ``trunk.scales``.

    Raises:
        Exception: for Dynamo, which captures the function once more.

    """
    try:
        is_scale = constant_scales(graph)
    except Exception as error:
        pipeline.unforeseen("looking for scales of adapters", error)
        return
    if is_scale is not None:
        capture_again_with_inputs(is_scale)


def looked_after(run: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo is to call for a piece of a model: see ``runtime.hooks.look_after``."""

    def call(*args: Any) -> Any:
        look_after(is_compiling=False)
        return run(*args)

    return call


def compile_graph(
    captured: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Options,
    *,
    args: Sequence[Any] | None = None,
    journal: Sequence[JournalRow] = (),
    compile_id: tuple[int, int] | None = None,
) -> Callable[..., Any]:
    """Compile a captured graph, which is not changed: rewrite, seal, lower, store the weights.

    Args:
        captured: as Dynamo gives it.
        example_inputs: one per placeholder; real tensors, or fake ones.
        settings: the passes among them.
        args: the real inputs of the call that is being compiled; None where ``example_inputs`` are these.
        journal: rows that the journal has beside those of the outlining and of the passes.
        compile_id: of the capture; None for the one that Dynamo is at.

    """
    args = example_inputs if args is None else args
    asked = {item.section for item, requested in settings.passes if requested}
    if asked and ends_early(captured):  # what comes after may have what this piece has not, but for hooks
        refuse_hooks(asked)
        settings = dataclasses.replace(settings, passes=tuple((item, False) for item, _ in settings.passes))
    compile_id = dynamo.compile_id() if compile_id is None else compile_id
    rows = list(journal)
    dump = Dump(
        own_run(of_this_rank(settings.dump)), compile_id, lower=settings.lower, limit_gib=settings.dump_limit_gib
    )
    observer = Observers(dump, RanksInStep(captured, args))

    flow = flowing(captured, observer) if dynamo.is_a_piece(captured) else None
    trunk = rewrite(captured, settings, rows, observer, known_args=dict(enumerate(args)))
    plan = trunk if isinstance(trunk, Declined) else sealed(trunk, observer)
    if isinstance(plan, Declined):
        rows[:] = journal
        leave_as_captured(plan, settings, rows, observer, args, piece_note(captured))
        whole, example_inputs, hosted = fetched_as_captured(captured, example_inputs, args)
        compiled = lower(whole, example_inputs, settings, observer)
        run = CompiledGraph(compiled, seal_as_captured(captured, hosted), rows, compile_id, flow=flow)
        return observer.around_calls(run, run.derived_inputs)
    assert isinstance(trunk, Trunk)  # which has a plan

    compile_misfit = misfit_compiler(trunk, captured, settings, compile_id)
    compiled = lower(trunk.module, sealed_inputs(trunk, plan, example_inputs), settings, observer, trunk)
    store_weights(trunk, plan, args, observer)
    run = CompiledGraph(compiled, plan, rows, compile_id, compile_misfit, flow)
    return observer.around_calls(run, run.derived_inputs)


def rewrite(
    captured: fx.GraphModule,
    settings: Options,
    journal: list[JournalRow],
    observer: Observer,
    *,
    known_args: Mapping[int, Any],
    planned_for: Device | None = None,
) -> Trunk | Declined:
    """Find the trunk of a captured graph and run the passes on it. ``hvcompile.explain`` goes no further than this.

    Args:
        captured: as Dynamo gives it; not changed.
        settings: the passes to run, among others.
        journal: gains a row for the outlining, and one for each pass, also where a pass raises.
        observer: hears of every stage.
        known_args: by place, the inputs of the call that is being compiled; those that passes may look at.
        planned_for: a device that is planned for, where nothing will run.

    Returns:
        The rewritten trunk, or why there is none.

    Raises:
        RequestedPassError: a pass that options ask for by name can't apply.
        QuantizedWeightError: what is left reads a weight that is kept in float8 alone.

    """
    observer.on_stage(CAPTURED, captured, None)
    given_rows, group = list(journal), None
    faults: dict[str, Declined] = {}
    while True:
        trunk = needs_gradients(captured) or recovered(captured, observer)
        if isinstance(trunk, Declined):
            return trunk
        trunk.group = group
        trunk.earlier, trunk.untold = earlier_graphs(trunk, captured, known_args, observer)
        journal[:] = [_outline_row(trunk), *pipeline.off_rows(settings.switched_off), *given_rows]
        observer.on_stage(OUTLINED, trunk.module, trunk)
        placeholders = trunk.inputs
        by_node = {node: known_args[place] for place, node in enumerate(placeholders) if place in known_args}
        context = pipeline.Context(given=by_node, planned_for=planned_for)
        try:
            pipeline.run(trunk, settings.passes, _tell(observer), journal, context, faults)
            context = context.moved(placeholders, trunk.inputs)
            require_values(trunk, context)
            if fetch_where_read(trunk, context.given):
                observer.on_stage(WHERE_READ, trunk.module, trunk)
        except pipeline.PassFault as fault:
            # What it left half done is thrown away. The ranks that it found still compare what they did.
            faults[fault.name], group = fault.declined, fault.trunk.group
            observer.on_fault(fault.declined)
        except BaseException as error:
            observer.on_rewritten(trunk, journal, error)
            raise
        else:
            observer.on_rewritten(trunk, journal, None)
            return trunk


def flowing(captured: fx.GraphModule, observer: Observer) -> Flow | None:
    """What flows through a piece of a model; None where that can't be told, for a reason that nobody foresaw."""
    try:
        return flow_of(captured)
    except Exception as error:
        observer.on_fault(pipeline.unforeseen("following the model's inputs through a graph", error))
        return None


def earlier_graphs(
    trunk: Trunk, captured: fx.GraphModule, known_args: Mapping[int, Any], observer: Observer
) -> tuple[Earlier | None, Declined | None]:
    """What earlier graphs of a broken model tell of a trunk's inputs, or why the sample can't be told from others."""
    refused = ends_early(captured)
    if refused is not None:
        return None, refused
    lineages = {place: found for place, item in known_args.items() if (found := lineage_of(item)) is not None}
    earlier: Earlier | Declined | None
    try:
        earlier = earlier_of(trunk, known_args, lineages)
    except Exception as error:
        earlier = pipeline.unforeseen("following the model's inputs through its graphs", error)
        observer.on_fault(earlier)
    if earlier is None:
        return None, is_minor(captured)
    return (None, earlier) if isinstance(earlier, Declined) else (earlier, None)


def _tell(observer: Observer) -> Callable[[str, Trunk], None]:
    return lambda name, after: observer.on_stage(name, after.module, after)


def recovered(captured: fx.GraphModule, observer: Observer) -> Trunk | Declined:
    """The trunk of a captured graph, or why there is none, be it for a reason that nobody foresaw."""
    try:
        trunk = recover(captured)
        shared = shared_memory(trunk.module) if isinstance(trunk, Trunk) else ""
        if shared:
            raise InvalidRewriteError(f"it left calls that share memory: {shared}")
        return trunk
    except Exception as error:
        declined = pipeline.unforeseen("outlining the blocks", error)
        observer.on_fault(declined)
        return declined


def sealed(trunk: Trunk, observer: Observer) -> CallPlan | Declined:
    """Seal a graph; or say why it can't be, for a reason that nobody foresaw, and the same one on all ranks."""
    try:
        plan: CallPlan | Declined = seal(trunk)
    except Exception as error:
        plan = pipeline.unforeseen("sealing the graph", error)
    if isinstance(plan, Declined):
        observer.on_sealed(trunk, plan)
        observer.on_fault(plan)
    else:
        observer.on_sealed(trunk, None)
        observer.on_stage(SEALED, trunk.module, trunk)
    return plan


def lower(
    module: fx.GraphModule, inputs: Sequence[Any], settings: Options, observer: Observer, trunk: Trunk | None = None
) -> Callable[..., Any]:
    """Hand a graph to the lowering that was chosen."""
    with observer.lowering(trunk):
        return LOWERINGS[settings.lower](module, inputs)


def sealed_inputs(trunk: Trunk, plan: CallPlan, example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs that the sealed graph is compiled for: the captured graph's, and fake ones for what passes added."""
    passed = example_inputs if plan.passed is None else [example_inputs[place] for place in plan.passed]
    return [*passed, *map(fakes.value, trunk.added)]


def store_weights(trunk: Trunk, plan: CallPlan, args: Sequence[Any], observer: Observer) -> None:
    """Quantise the weights that the graph takes in float8, and free the originals, one layer's after the other.

    Now, not at the first call: Dynamo makes its guards next, and they see the weights as they will be.
    """
    observer.before_weights_go(args, [place for layout in plan.stored for place in layout.positions])
    for layout, stored in zip(plan.stored, trunk.stored, strict=True):
        joined = layout.quantise_and_free(args)
        observer.on_stored(stored, joined.data, joined.scale)


def misfit_compiler(
    trunk: Trunk, captured: fx.GraphModule, settings: Options, compile_id: tuple[int, int]
) -> Callable[[Sequence[Any], str, str], Callable[..., Any]] | None:
    """What compiles the graph again for inputs that a pass's rewrite turns out not to fit; None where all fit.

    A pass that reads its derived inputs when they are known (``Derived.read``) may refuse them, such as a mask with a
    hole in it.
    """
    if all(item.read is None for item in trunk.derived):
        return None
    # Dynamo's own graph may be gone or changed by the time that another is wanted.
    own = dynamo.clone_graph_module(captured)
    fix_numbers(own.graph, lambda _: False)  # those on which Dynamo guards by now
    return functools.partial(_compile_without, own, settings, compile_id)


def _compile_without(
    captured: fx.GraphModule,
    settings: Options,
    compile_id: tuple[int, int],
    args: Sequence[Any],
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
        module, example_inputs = dynamo.specialise(captured, args)
        return compile_graph(module, example_inputs, settings, args=args, journal=[row], compile_id=compile_id)


def needs_gradients(captured: fx.GraphModule) -> Declined | None:
    """Why this graph is compiled for training; None if it is not. No rewrite here has a backward."""
    if not torch.is_grad_enabled():
        return None
    for node in captured.graph.find_nodes(op="placeholder"):
        if is_tensor(node) and fakes.value(node).requires_grad:
            return Declined(
                f"gradients are enabled and {dynamo.source_name(node) or node.name} requires them; "
                "call the model under torch.no_grad() or torch.inference_mode()"
            )
    return None


def _outline_row(trunk: Trunk) -> JournalRow:
    report = PassReport(matched=(f"{trunk.lists}: {len(trunk.blocks)} blocks share {len(trunk.bodies)} bodies",))
    row = JournalRow(name=OUTLINE, report=report, op_changes={"invoke_subgraph": len(trunk.blocks)})
    log.info("%s", row.line())
    return row


def require_values(trunk: Trunk, context: pipeline.Context) -> None:
    """Raise where something in the graph still reads a weight that is kept in float8 alone.

    Raises:
        QuantizedWeightError: something does, as where a model is compiled again without float8.

    """
    derived = {node for item in trunk.derived for node in item.sources}
    for node, weight in context.given.items():
        if isinstance(weight, QuantizedWeight) and (node.users or node in derived):
            reader = f"%{next(iter(node.users)).name}" if node.users else "what a mask is made of"
            raise QuantizedWeightError(
                f"{weight.path} has been kept in float8 alone since {weight.since}, and now {reader} reads it: "
                f"compile the model with the options that this was done with, or {weight.way_back}"
            )


_HANDLERS: dict[object, Handler] = {}  # of the whole process, as Dynamo's table of backends is; the last one counts


@contextlib.contextmanager
def instead_of_compiling(handler: Handler) -> Iterator[None]:
    """Within, hvfast hands what Dynamo captures to ``handler``, and Dynamo captures everything anew.

    The handler may raise to end the call that is being compiled.
    """
    torch.compiler.reset()  # a model that was compiled before would run, and not be handed over
    key = object()
    _HANDLERS[key] = handler
    try:
        yield
    finally:
        del _HANDLERS[key]
        torch.compiler.reset()  # graphs that were only looked at must not run as compiled ones
