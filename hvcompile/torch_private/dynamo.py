"""The door to private Dynamo and FX: what a graph records, which frame is compiled and for whom, copies of graphs.

All names were checked on torch 2.11.0 and 2.13.0; where they differ, that is said beside the name.

- ``torch._dynamo.exc.TorchDynamoException`` and ``FailOnRecompileLimitHit``: what Dynamo raises where it can't keep a
  call in one graph. ``BackendCompilerFailed`` is one of them, and is what a backend raised.
- ``torch._guards.CompileContext``: the only place that says whether Dynamo captures a frame anew or again.
- ``torch._subclasses.fake_tensor.FakeTensorMode`` and ``torch.fx.experimental.symbolic_shapes.ShapeEnv``: to make fake
  inputs for a graph that is specialised to their sizes.
- ``Node._dynamo_source`` and ``GraphModule._param_name_to_source``: AOTAutograd reads both to tell parameters from
  inputs and to deduplicate them; a copy of the graph that lacks them fails in ``process_inputs``.
- ``Node._rename``: the only way to name a node that is there; assigning ``Node.name`` leaves the graph's names as
  they were.
- ``GraphModule.compile_subgraph_reason``: why Dynamo ended a graph, and where in the model; nothing public tells. Nor
  whether a function runs as Dynamo's code, but the names that this calls.
- ``torch._dynamo.utils.counters``: how many graphs Dynamo captured in this process, whatever compiled them.
- ``torch._dynamo.convert_frame.register_bytecode_hook``: the only way to the code that Dynamo generated for a frame.
- ``torch._logging._internal.trace_structured`` and its ``trace_log``: artifacts for tlparse.
- ``Module._compiled_call_impl``: what ``Module.compile`` sets and a call runs; seen to there, a call leaves no trace in
  the graph.
- ``OptimizedModule._orig_mod``: the module that ``torch.compile`` wrapped; nothing public gives it back.
- ``torch._dynamo.symbolic_convert.InstructionTranslator``: the only way for code that Dynamo traces to know for which
  backend.
- ``torch._dynamo.variables.ctx_manager.AutocastModeVariable``: what Dynamo makes of a region of autocast; on the meta
  device, which has none, it raises.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.variables.ctx_manager import AutocastModeVariable
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hvcompile.torch_private.fakes import value


@dataclasses.dataclass(frozen=True)
class Break:
    """Where Dynamo broke a model: its reason, "file:line" of the model's code, and what stands there."""

    reason: str
    place: str
    line: str


UNTRACEABLE: tuple[type[Exception], ...] = (TorchDynamoException,)


def is_graph_break(error: BaseException) -> bool:
    """Whether an error says that Dynamo can't keep a call in one graph, as ``fullgraph=True`` wants it."""
    return isinstance(error, (*UNTRACEABLE, FailOnRecompileLimitHit)) and not isinstance(error, BackendCompilerFailed)


def carry_over(old: fx.GraphModule, new: fx.GraphModule) -> fx.GraphModule:
    """Copy onto ``new`` what the stages below Dynamo read from ``old``; returns ``new``."""
    new.meta = dict(old.meta)
    for name in ("_param_name_to_source",):  # private: AOTAutograd looks parameters up in it (2.11.0, 2.13.0)
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    return new


def copy_placeholder(graph: fx.Graph, old: fx.Node) -> fx.Node:
    """Copy a placeholder of Dynamo's graph with the source that AOTAutograd looks for."""
    new: Any = graph.node_copy(old)
    if hasattr(old, "_dynamo_source"):  # private: AOTAutograd deduplicates inputs by it (2.11.0, 2.13.0)
        new._dynamo_source = old._dynamo_source
    return new  # type: ignore[no-any-return]


def mark_as_added(placeholder: Any) -> None:
    """Say of a placeholder that Dynamo has no source for it: a pass added it."""
    placeholder._dynamo_source = None  # private: AOTAutograd reads it of every placeholder (2.11.0, 2.13.0)


def rename(node: fx.Node, name: str) -> None:
    """Give a node that is in a graph another name, or, where that is another's, one like it."""
    node._rename(name)  # private: nothing public keeps the graph's names in step (2.11.0, 2.13.0)


def source_name(placeholder: fx.Node) -> str:
    """Dynamo's expression for a placeholder, such as ``L['kwargs']['timestep']``; empty where it has none."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name  # a property from torch 2.12 on, a method before
    return str(name() if callable(name) else name)


def is_of_module(placeholder: fx.Node) -> bool:
    """Whether Dynamo took a placeholder from an attribute of a module, rather than from the call's arguments."""
    # Private: nothing public says where an input comes from, and its name leads to the root module alone by what the
    # user's function calls it (2.11.0, 2.13.0).
    source: Any = getattr(placeholder, "_dynamo_source", None)
    return source is not None and bool(source.guard_source.is_unspecialized_nn_module())


def is_float_of_module(placeholder: fx.Node) -> bool:
    """Whether a placeholder is a Python float that a module holds, which Dynamo passes as a tensor."""
    # Private: its source is the float's own, so that only this tells one from a tensor (2.11.0, 2.13.0).
    argument: Any = placeholder.meta.get("grapharg")
    return bool(getattr(argument, "pass_arg_as_tensor", False)) and is_of_module(placeholder)


def autocast_of(region: fx.Node) -> torch.autocast:
    """The context of an autocast region, given the node that enters it."""
    device_type, dtype, enabled, cache_enabled = region.args
    return torch.autocast(device_type, dtype, enabled, cache_enabled)  # type: ignore[arg-type]


def autocast_on_meta() -> contextlib.AbstractContextManager[Any]:
    """Within, Dynamo traces regions of the meta device in which autocast lowers no precision, as if it had autocast.

    Those are regions without autocast, and those in float32, which the CPU knows and does nothing about. One in a
    smaller type would cast on a GPU, so it raises as before.
    """
    create = AutocastModeVariable.create

    def create_on_cpu(func: Any, args: Any, kwargs: Any) -> AutocastModeVariable:
        region = create(func, args, kwargs)
        device_type, dtype, enabled, cache_enabled = region.target_values
        if device_type == "meta" and (not enabled or dtype is torch.float32):
            region.target_values = ["cpu", torch.bfloat16, False, cache_enabled]
        return region

    return mock.patch.object(AutocastModeVariable, "create", staticmethod(create_on_cpu))


def compile_id() -> tuple[int, int]:
    """The frame that Dynamo is compiling, and how many times it was compiled before."""
    # Private: nothing public says which frame Dynamo is at, and how often it was there (2.11.0, 2.13.0).
    current = CompileContext.current_compile_id()
    if current is None:
        return (-1, 0)
    return (int(current.frame_id or 0), int(current.frame_compile_id or 0))


def break_of(module: fx.GraphModule) -> Break | None:
    """Where and why Dynamo ended a graph before its function did; None where it did not."""
    reason: Any = getattr(module, "compile_subgraph_reason", None)  # private: see the module's docstring
    if reason is None or not reason.graph_break:
        return None
    where = next((frame for frame in reversed(reason.user_stack or ()) if not _is_torch(frame.filename)), None)
    place = f"{where.filename}:{where.lineno}" if where is not None else ""
    return Break(reason=str(reason.reason), place=place, line=(where.line or "") if where is not None else "")


def is_a_piece(module: fx.GraphModule) -> bool:
    """Whether a graph may be a piece of a model: it ends at a break, or a module runs around it as it was written."""
    return break_of(module) is not None or caller() is not None


def caller() -> tuple[str, bool] | None:
    """The place in a module's method from which what Dynamo is compiling was called, and whether that is captured.

    Returns:
        "file:line", and whether Dynamo captured the method and broke it there, or left it as it was written; None where
        no module's method is around.

    """
    for frame, _ in _module_frames():
        is_captured = any(name.startswith(_GENERATED) for name in frame.f_code.co_names)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}", is_captured
    return None


def outermost_caller() -> torch.nn.Module | None:
    """The outermost module whose method is around what Dynamo is compiling; None if none is."""
    modules = [module for _, module in _module_frames()]
    return modules[-1] if modules else None


def _module_frames() -> Iterator[tuple[FrameType, torch.nn.Module]]:
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(owner, torch.nn.Module) and not _is_torch(frame.f_code.co_filename):
            yield frame, owner
        frame = frame.f_back


# What the code that Dynamo generates for a function calls: its graph, and what comes after a break.
_GENERATED = ("__compiled_fn", "__resume_at")
_TORCH = os.path.dirname(torch.__file__) + os.sep


def _is_torch(file: str) -> bool:
    return file.startswith(_TORCH)


def num_captured() -> int:
    """How many graphs Dynamo has captured in this process so far, by whatever backend they were compiled."""
    # Private: the public torch.compiler counts nothing (2.11.0, 2.13.0).
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


# What waits for the frame that Dynamo is compiling, by compile id. Dynamo iterates its hook list, so a hook cannot
# remove itself; we install one and dispatch.
_AWAITING: dict[tuple[int, int], Callable[[CodeType, CodeType], None]] = {}


@functools.cache
def _watch_bytecode() -> None:
    # Private: the only way to the code that Dynamo generated (2.11.0, 2.13.0).
    from torch._dynamo.convert_frame import register_bytecode_hook

    def hand_out(code: CodeType, new_code: CodeType) -> None:
        tell = _AWAITING.pop(compile_id(), None)
        if tell is not None:
            tell(code, new_code)

    register_bytecode_hook(hand_out)


def on_bytecode(tell: Callable[[CodeType, CodeType], None]) -> None:
    """Have ``tell`` called once with the frame that Dynamo is compiling and what it makes of it."""
    if compile_id()[0] >= 0:
        _watch_bytecode()
        _AWAITING[compile_id()] = tell


def is_tracing() -> bool:
    """Whether torch writes a structured trace (``TORCH_TRACE``)."""
    try:
        # Private: no public name says whether there is a trace (2.11.0, 2.13.0); where it is gone, there is none.
        from torch._logging._internal import trace_log
    except ImportError:
        return False
    # That there is a handler says nothing: without TORCH_TRACE one waits, without a directory, for the first record.
    return any(getattr(handler, "root_dir", None) is not None for handler in trace_log.handlers)


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Add a text to torch's structured trace, which tlparse shows; nothing is asked of ``payload`` where there is none.

    Args:
        name: of the file that tlparse makes.
        encoding: "string" or "json".
        payload: gives the text.

    """
    if is_tracing():
        # Private: nothing public adds an artifact (2.11.0, 2.13.0).
        from torch._logging._internal import trace_structured

        trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def clone_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be edited without touching the original, which Dynamo still reads."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        env[node] = (
            copy_placeholder(graph, node) if node.op == "placeholder" else graph.node_copy(node, env.__getitem__)
        )
        env[node].meta = copy.copy(node.meta)
    return carry_over(module, fx.GraphModule(module, graph))


class _Propagate(fx.Interpreter):
    """Runs a graph and records each node's value."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta.pop("unbacked_bindings", None)
        n.meta["example_value"] = result = super().run_node(n)
        return result


def _is_number(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.ndim == 0 and item.dtype == torch.float64


def _number_or_node(node: fx.Node) -> Any:
    return value(node) if isinstance(value(node), int | float) else node


def specialise(captured: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a captured graph for inputs of these sizes alone, with fake inputs for it; computes nothing.

    Dynamo checks the assumptions that are made while it compiles. What is compiled later may make none about a symbolic
    size, so it is given none. Floats that are inputs stay inputs, and nothing is assumed of them.
    """
    module = clone_graph_module(captured)
    placeholders = module.graph.find_nodes(op="placeholder")
    sizes = [size for node in placeholders for size in (getattr(value(node), "shape", None) or [value(node)])]
    sizes += [value(node) for node in module.graph.nodes]
    if not any(isinstance(size, torch.SymInt | torch.SymFloat) for size in sizes):
        return module, [value(node) for node in placeholders]
    # Private: a fake mode with symbols of its own, as Dynamo makes one (2.11.0, 2.13.0).
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(item, static_shapes=True) if isinstance(item, torch.Tensor) else item for item in inputs]
    # The floats that it reads are made again where the graph is traced: so they are ignored here, and the inputs, which
    # remember what was read from them, are exchanged (2.11.0, 2.13.0).
    env: Any = mode.shape_env
    with mode, torch.no_grad(), env.ignore_fresh_unbacked_symbols():
        _Propagate(module).run(*fakes)
        fakes = [torch.empty_like(item) if _is_number(item) else item for item in fakes]
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), _number_or_node)
        node.args, node.kwargs = args, kwargs
    module.graph.lint()
    module.recompile()
    return module, fakes


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def compiled_module(model: Any) -> Any:
    """The module that ``torch.compile(model)`` wrapped; what was compiled in place, or is no module, as it is."""
    return getattr(model, "_orig_mod", model)  # private: see the module's docstring (2.11.0, 2.13.0)


def keep_first_call(module: torch.nn.Module, calls: list[Call]) -> None:
    """Put the arguments of the next call of a module that was compiled in place into ``calls``.

    A hook would do so too, but Dynamo traces hooks, and the graph would be another one.
    """
    # Private: what ``Module.compile`` sets and a call runs; nothing public comes between (2.11.0, 2.13.0).
    compiled: Any = module._compiled_call_impl

    def keep(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        module._compiled_call_impl = compiled
        return compiled(*args, **kwargs)

    module._compiled_call_impl = keep


def frame_call() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The module whose ``forward`` Dynamo is capturing in this thread, and what it was called with; None for no module.

    Asked from within a backend.
    """
    # Private: nothing public tells a backend what was called (2.11.0, 2.13.0).
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracer: Any = InstructionTranslator.current_tx()
    except AttributeError:
        return None
    code, known = tracer.f_code, dict(tracer.f_locals)
    names = code.co_varnames
    num_args, num_named = code.co_argcount, code.co_kwonlyargcount
    if not num_args or not isinstance(known.get(names[0]), torch.nn.Module):
        return None
    rest = names[num_args + num_named :]
    args = [known[name] for name in names[1:num_args]]
    kwargs = {name: known[name] for name in names[num_args : num_args + num_named]}
    if code.co_flags & inspect.CO_VARARGS:
        args, rest = [*args, *known[rest[0]]], rest[1:]
    if code.co_flags & inspect.CO_VARKEYWORDS:
        kwargs |= known[rest[0]]
    return known[names[0]], tuple(args), kwargs


def tracing_backend() -> Callable[..., Any] | None:
    """The backend that Dynamo is capturing a graph for, in this thread; None where it captures none."""
    # Private: nothing public tells traced code who compiles it. ``compiler_fn`` and what wraps a backend are attributes
    # of Dynamo's own objects (2.11.0, 2.13.0).
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return None
    return innermost_backend(backend)


def innermost_backend(backend: Any) -> Callable[..., Any]:
    """The backend itself, without what torch or the user has wrapped around it."""
    for wrapping in ("_torchdynamo_orig_backend", "compiler_fn", "func"):  # debugging aids, then options, then partial
        backend = getattr(backend, wrapping, backend)
    return backend  # type: ignore[no-any-return]


def is_own(backend: Any) -> bool:
    """Whether a backend is this package's, whatever is wrapped around it."""
    module = getattr(innermost_backend(backend), "__module__", None)
    return str(module).split(".", maxsplit=1)[0] == __name__.split(".", maxsplit=1)[0]
