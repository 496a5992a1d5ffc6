"""Everything that touches private torch: copying Dynamo's graph, symbolic sizes, and lowering.

Private names used, each checked on torch 2.11.0 and 2.13.0:

- ``Node._dynamo_source`` and ``GraphModule._param_name_to_source``: AOTAutograd reads both to tell parameters from
  inputs and to deduplicate them; a copy of the graph that lacks them fails in ``process_inputs``.
- ``torch._inductor.compile_fx.compile_fx``: what ``backend="inductor"`` itself calls; there is no public entry that
  takes a Dynamo graph with extra placeholders. ``torch._inductor.exc.InductorError`` is what it raises. Before 2.13 it
  asks of operands of 4 or 5 dimensions of a ``cat`` whether they are channels-last, also where a size depends on data.
- ``torch._inductor.decomposition.select_decomp_table`` and
  ``torch._higher_order_ops.invoke_subgraph.NestedCompileRegionOptions``: an ``invoke_subgraph`` inside a ``cond``
  branch is retraced without Inductor's decompositions and then fails with "both a fallback and a decomp for same op";
  handing the table to the body cures it.
- ``torch._guards.CompileContext``: the only place that says whether Dynamo captures a frame anew or again.
- ``torch._subclasses.fake_tensor.FakeTensor``: to find the fake mode of the captured graph, and to make another.
- ``ShapeEnv.create_unbacked_symint``: a size that no code may be specialised to, and on which no guard can be put that
  Dynamo, which knows nothing of the input, would have to check.
- ``torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode``: what an operator that needs to know such a size
  raises while it is traced. In 2.11 and 2.12 attention by torch's math kernel is one.
- ``SymInt.node.hint``, ``SymInt.node.expr`` and ``ShapeEnv.bound_sympy``: reading a symbolic size without installing a
  guard on it.
- ``Module._compiled_call_impl``: what ``Module.compile`` sets and a call runs; seen to there, a call leaves no trace in
  the graph.
- ``torch._dynamo.exc``: what Dynamo raises where it can't keep a call in one graph.
- ``torch._dynamo.convert_frame.register_bytecode_hook``: the only way to the code that Dynamo generated for a frame.
- ``GraphLowering.save_output_code``: told of Inductor's generated code, also where that comes from a cache.
- ``torch._logging.trace_structured`` and its ``trace_log``: artifacts for tlparse.
- ``torch._scaled_mm``: the public ``torch.nn.functional.scaled_mm`` has no CPU kernel in 2.11, and no Inductor lowering
  before 2.13. On CPUs 2.11 and 2.12 take one scale a tensor only.
- ``torch._C._set_throw_on_mutable_data_ptr`` and ``torch._C._set_storage_data_ptr_access_error_msg``: make a tensor
  without memory raise, rather than crash, where native code asks for its address to write, and to read. The second is
  in builds with CUDA alone; without, the flag that it sets (``StorageImpl::throw_on_immutable_data_ptr_``) is set where
  it lies, beside the one that the first sets, after it was seen to work on a tensor made for that.
- ``torch._dynamo.symbolic_convert.InstructionTranslator``: the only way for code that Dynamo traces to know for which
  backend.
- the logger ``torch.utils._pytree``: from 2.12 or 2.13 on it warns of types that torchao registers as it is imported.
- ``torch._dynamo.utils.counters``: how many graphs Dynamo captured in this process, whatever compiled them.
- ``torch._functorch.aot_autograd.aot_module_simplified``: what ``functorch.compile`` re-exports; imported from there.
- ``torch.distributed.distributed_c10d._resolve_process_group`` and ``_get_process_group_store``: from a group's name to
  the group, and to the store through which its ranks met; functional collectives do the first themselves.
- ``torch.ops._c10d_functional.all_to_all_single``, ``broadcast`` and ``wait_tensor``: what functional collectives
  trace into. The functions around them wait at once while a graph is traced, so that nothing could be computed in the
  meantime.
- ``torch.ops.aten._scaled_dot_product_*_attention``: the kernels that give the log-sum-exp by which parts of an
  attention are merged; ``scaled_dot_product_attention`` keeps it to itself. Schemas are the same in both.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import sympy
import torch
import torch.distributed as dist
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from torch._guards import CompileContext
from torch._higher_order_ops.invoke_subgraph import NestedCompileRegionOptions
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from hvcompile.errors import LoweringError

Compiled = Callable[..., Any]

TAG = "hvcompile"  # node.meta key: the name of the pass that made the node
STORED = "hvcompile_stored"  # node.meta key: a placeholder for a weight that the runtime keeps
UNTRACEABLE: tuple[type[Exception], ...] = (TorchDynamoException,)
FAKES: tuple[type, ...] = (FakeTensor,)
PYTREE_LOG = logging.getLogger("torch.utils._pytree")
COND = torch.ops.higher_order.cond
INVOKE_SUBGRAPH = torch.ops.higher_order.invoke_subgraph


def carry_over(old: fx.GraphModule, new: fx.GraphModule) -> fx.GraphModule:
    """Copy onto ``new`` what the stages below Dynamo read from ``old``; returns ``new``."""
    new.meta = dict(old.meta)
    for name in ("_param_name_to_source",):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    return new


def copy_placeholder(graph: fx.Graph, old: fx.Node) -> fx.Node:
    """Copy a placeholder of Dynamo's graph with the source that AOTAutograd looks for."""
    new: Any = graph.node_copy(old)
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source
    return new  # type: ignore[no-any-return]


def source_name(placeholder: fx.Node) -> str:
    """Dynamo's expression for a placeholder, such as ``L['kwargs']['timestep']``; empty where it has none."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name  # a property from torch 2.12 on, a method before
    return str(name() if callable(name) else name)


def value(node: fx.Node) -> Any:
    """The fake value that Dynamo recorded for a node: a tensor, a symbolic or plain number, or a tuple of these."""
    return node.meta.get("example_value")


def provenance(node: fx.Node, tag: str, fake: Any) -> dict[str, Any]:
    """Meta for a node that stands for another: where that was traced, who made this one, and its fake value.

    Nothing else is taken along: ``unbacked_bindings``, say, would bind a data-dependent size twice.
    """
    kept: dict[str, Any] = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    return {**kept, TAG: tag, "example_value": fake}


def size_hint(size: int | torch.SymInt) -> int:
    """A symbolic size's value in the run that was captured, read without installing a guard.

    Of one that depends on data, the most that it can be, or 1 where nothing bounds it.
    """
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        if hint is None:
            most = size.node.shape_env.bound_sympy(size.node.expr).upper
            return int(most) if most.is_Integer and most < sys.maxsize else 1
        return int(hint)
    return int(size)


def number_hint(number: Any) -> float | None:
    """A symbolic number's value in the run that was captured; None where it depends on data."""
    hint = number.node.hint
    return None if hint is None else float(hint)


def is_data_dependent(tensor: torch.Tensor) -> bool:
    """Whether a size of a fake tensor is known only when the graph runs."""
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in tensor.shape)


def numel_hint(tensor: torch.Tensor) -> int:
    """Number of elements of a fake tensor, with symbolic sizes replaced by their hints."""
    total = 1
    for size in tensor.shape:
        total *= size_hint(size)
    return total


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; a symbolic size counts as in the run that was captured."""
    return numel_hint(tensor) * tensor.element_size()


def shape_key(tensor: torch.Tensor) -> tuple[str, ...]:
    """A shape as text: comparing symbolic sizes with ``==`` would install a guard."""
    return tuple(str(size) for size in tensor.shape)


def layout_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Everything of a fake tensor that the code compiled for it depends on."""
    strides = tuple(str(stride) for stride in tensor.stride()) if tensor.layout is torch.strided else ()
    return (type(tensor).__name__ == "FakeTensor", shape_key(tensor), strides, str(tensor.dtype), str(tensor.device))


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode in which Dynamo captured this graph."""
    for node in graph.nodes:
        if isinstance(value(node), FakeTensor):
            return value(node).fake_mode  # type: ignore[no-any-return]
    return None


def fake_mode_of(tensor: torch.Tensor) -> Any:
    """The fake mode of a fake tensor, as a context; nothing for a real one."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else contextlib.nullcontext()


def fake_like(
    mode: FakeTensorMode, shape: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device
) -> Any:
    """A fake contiguous tensor of this shape (symbolic sizes allowed) in the graph's own fake mode."""
    with mode:
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def unbacked_size(mode: FakeTensorMode, least: int, most: int | torch.SymInt) -> torch.SymInt:
    """A new size from ``least`` to ``most`` that is known only when the graph runs."""
    env: Any = mode.shape_env
    with env.ignore_fresh_unbacked_symbols():  # it is an input: no operation of the graph makes it
        size: torch.SymInt = env.create_unbacked_symint()
    for bound in (size >= least, size <= most):
        torch._check(bound)  # type: ignore[no-untyped-call]
    return size


def is_traceable(operation: Callable[..., Any], *fakes: Any, **kwargs: Any) -> bool:
    """Whether an operation can be traced on fake tensors of which some sizes are known only when the graph runs."""
    mode = next(item.fake_mode for item in fakes if isinstance(item, FakeTensor))
    try:
        with mode, torch.no_grad():
            operation(*fakes, **kwargs)
    except GuardOnDataDependentSymNode:
        return False
    return True


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``scaled_dot_product_attention``; on meta, where nothing will run, also where that can't be traced.

    There torch takes the math kernel, whatever it takes on the device that is planned for.
    """
    try:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    except GuardOnDataDependentSymNode:
        if query.device.type != "meta":
            raise
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def symbol_of(node: fx.Node) -> Any:
    """The symbol that a node's value is, backed or not; None where it is no number or an expression of symbols."""
    held = value(node)
    return held.node.expr if isinstance(held, torch.SymInt) and held.node.expr.is_symbol else None


def expression_of(number: Any) -> Any:
    """A number as a sympy expression; None where it is not an integer."""
    if isinstance(number, torch.SymInt):
        return number.node.expr
    return sympy.Integer(number) if isinstance(number, int) and not isinstance(number, bool) else None


def symbols_of(graph: fx.Graph) -> dict[int, Any]:
    """Map the position of each symbolic-size placeholder to its symbol."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {
        index: value(node).node.expr for index, node in enumerate(placeholders) if isinstance(value(node), torch.SymInt)
    }


def evaluate_size(size: int | torch.SymInt, symbols: Mapping[Any, int]) -> int:
    """The concrete value of a symbolic size, given the value of each symbol."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr.subs(dict(symbols)))
    return int(size)


def fix_size(size: int | torch.SymInt, graph: fx.Graph) -> int:
    """The concrete value of a size, on which the compiled graph then depends: Dynamo guards on each of its symbols.

    Raises:
        ValueError: the size depends on data.

    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if size.node.hint is None:
        raise ValueError(f"a length, {size}, depends on data")
    symbols = size.node.expr.free_symbols
    for node in graph.find_nodes(op="placeholder"):
        if symbol_of(node) in symbols:
            int(value(node))
    return int(size)


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of this process that goes by a name."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)  # type: ignore[no-any-return]


def store_of(group: dist.ProcessGroup) -> Any:
    """The key-value store through which a group's ranks met."""
    return dist.distributed_c10d._get_process_group_store(group)


def all_to_all(tensor: torch.Tensor, taken: Sequence[int], given: Sequence[int], group: str) -> torch.Tensor:
    """Send so many rows to each rank and take so many from each; still on its way when it returns (see ``wait``).

    Args:
        tensor: contiguous; its rows lie in the order of the ranks that they go to.
        taken: rows from each rank.
        given: rows for each rank.
        group: name of the process group.

    """
    return torch.ops._c10d_functional.all_to_all_single(tensor, list(taken), list(given), group)  # type: ignore[no-any-return]


def broadcast(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """The first rank's tensor; still on its way when it returns (see ``wait``).

    Args:
        tensor: contiguous, of the same shape and dtype on all ranks.
        group: name of the process group.

    """
    return torch.ops._c10d_functional.broadcast(tensor, 0, group)  # type: ignore[no-any-return]


def wait(moving: torch.Tensor) -> torch.Tensor:
    """What ``all_to_all`` or ``broadcast`` gave, once it is there."""
    return torch.ops._c10d_functional.wait_tensor(moving)  # type: ignore[no-any-return]


def attention_with_lse(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by one of torch's kernels, with its log-sum-exp.

    Args:
        kernel: "flash", "cudnn" or "efficient"; on a CPU "flash". "flash" takes a bias on a CPU only, "cudnn" none.
        query: ``[B, H, Q, E]``; key and value ``[B, H, K, E]``.
        key: see ``query``.
        value: see ``query``.
        bias: is added to the scores; in the query's dtype, broadcasts to ``[B, H, Q, K]``.
        scale: of the scores.

    Returns:
        ``[B, H, Q, E]`` in the query's dtype, and the natural logarithm of the sum of exponentials, ``[B, H, Q]`` in
        fp32 (fp64 for fp64). What they are for a query that a bias keeps from all keys, kernels don't agree on.

    """
    aten, given = torch.ops.aten, (query, key, value)
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            *given, 0.0, False, attn_mask=bias, scale=scale
        )
    elif kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention.default(*given, 0.0, False, False, scale=scale)[:2]
    elif kernel == "cudnn":
        found = aten._scaled_dot_product_cudnn_attention.default(*given, None, True, 0.0, False, False, scale=scale)
        out, lse = found[:2]
    else:
        if bias is not None:
            # The kernel reads rows of the bias that begin at multiples of 16 bytes.
            length = key.shape[2]
            bias = torch.nn.functional.pad(bias, (0, -length % 16))[..., :length]
            bias = bias.expand(*query.shape[:3], length)
        out, lse = aten._scaled_dot_product_efficient_attention.default(*given, bias, True, 0.0, False, scale=scale)[:2]
        lse = lse[..., : query.shape[2]]  # the kernel pads it to a multiple of 32
    return out, lse.squeeze(-1) if lse.ndim == 4 else lse


def autocast_of(region: fx.Node) -> torch.autocast:
    """The context of an autocast region, given the node that enters it."""
    device_type, dtype, enabled, cache_enabled = region.args
    return torch.autocast(device_type, dtype, enabled, cache_enabled)  # type: ignore[arg-type]


def compile_id() -> tuple[int, int]:
    """The frame that Dynamo is compiling, and how many times it was compiled before."""
    current = CompileContext.current_compile_id()
    if current is None:
        return (-1, 0)
    return (int(current.frame_id or 0), int(current.frame_compile_id or 0))


def num_captured() -> int:
    """How many graphs Dynamo has captured in this process so far, by whatever backend they were compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _outlined_bodies(module: torch.nn.Module) -> Iterator[fx.GraphModule]:
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            for node in child.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH):
                body = getattr(child, node.args[0].target)
                if isinstance(body, fx.GraphModule):
                    yield body


def to_inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Compile with Inductor; the result takes the graph's placeholders in order and returns its outputs as a tuple.

    Raises:
        LoweringError: Inductor asks for a size that depends on data.

    """
    table = select_decomp_table()
    for body in _outlined_bodies(module):
        body.meta["nested_region_config"] = NestedCompileRegionOptions(decompositions=table)
    # Dynamo's guards hold every input's strides already. To check them again, one by one in Python, takes a tenth of a
    # small step on a CPU and nothing where the host runs ahead of its device; so there, what kernels return is checked.
    is_ahead = any(isinstance(given, torch.Tensor) and given.device.type != "cpu" for given in inputs)
    try:
        compiled: Any = compile_fx(module, list(inputs), config_patches={"size_asserts": is_ahead})
    except InductorError as error:
        _, found, asked = str(error).partition(f"{GuardOnDataDependentSymNode.__name__}: ")
        if not found:
            raise
        raise LoweringError(
            f"Inductor of torch {torch.__version__} asks for a length that depends on data, which is known when the "
            f"graph runs alone ({asked.splitlines()[0]}). Torch 2.13 asks for fewer than 2.11 and 2.12 do, with any "
            "backend that lowers by Inductor. options={'lower': 'aot'} runs the graph without it"
        ) from error
    return compiled  # type: ignore[no-any-return]


def to_aot(module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Trace with AOTAutograd (functionalised ATen) and run the traced graph eagerly."""
    from functorch.compile import aot_module_simplified, nop

    return aot_module_simplified(module, list(inputs), fw_compiler=nop)  # type: ignore[no-any-return]


def to_eager(module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Run the rewritten graph as it is."""
    del inputs  # nothing is specialised
    return module.forward


LOWERINGS: Mapping[str, Callable[[fx.GraphModule, Sequence[Any]], Compiled]] = {
    "inductor": to_inductor,
    "aot": to_aot,
    "eager": to_eager,
}


# What waits for the frame that Dynamo is compiling, by compile id. Dynamo runs through its hooks while one runs, so
# that none may take itself out: one stays and hands out.
_AWAITING: dict[tuple[int, int], Callable[[CodeType, CodeType], None]] = {}


@functools.cache
def _watch_bytecode() -> None:
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


@contextlib.contextmanager
def output_code(tell: Callable[[str], object]) -> Iterator[None]:
    """Have ``tell`` called with the code that Inductor generates, or finds in its cache, in this thread."""
    from torch._inductor.graph import GraphLowering

    before, thread = getattr(GraphLowering, "save_output_code", None), threading.get_ident()

    def hand_out(code: str) -> None:
        if threading.get_ident() == thread:
            tell(code)
        if before is not None:
            before(code)

    GraphLowering.save_output_code = staticmethod(hand_out)
    try:
        yield
    finally:
        GraphLowering.save_output_code = before


def is_tracing() -> bool:
    """Whether torch writes a structured trace (``TORCH_TRACE``)."""
    try:
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


def _number_or_node(node: fx.Node) -> Any:
    return value(node) if isinstance(value(node), int | float) else node


def specialise(captured: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a captured graph for inputs of these sizes alone, with fake inputs for it; computes nothing.

    Dynamo checks the assumptions that are made while it compiles. What is compiled later may make none about a symbolic
    size, so it is given none.
    """
    module = clone_graph_module(captured)
    placeholders = module.graph.find_nodes(op="placeholder")
    sizes = [size for node in placeholders for size in (getattr(value(node), "shape", None) or [value(node)])]
    if not any(isinstance(size, torch.SymInt | torch.SymFloat) for size in sizes):
        return module, [value(node) for node in placeholders]
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(item, static_shapes=True) if isinstance(item, torch.Tensor) else item for item in inputs]
    with mode, torch.no_grad():
        _Propagate(module).run(*fakes)
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), _number_or_node)
        node.args, node.kwargs = args, kwargs
    module.graph.lint()
    module.recompile()
    return module, fakes


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def keep_first_call(module: torch.nn.Module, calls: list[Call]) -> None:
    """Put the arguments of the next call of a module that was compiled in place into ``calls``.

    A hook would do so too, but Dynamo traces hooks, and the graph would be another one.
    """
    compiled: Any = module._compiled_call_impl

    def keep(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        module._compiled_call_impl = compiled
        return compiled(*args, **kwargs)

    module._compiled_call_impl = keep


def has_row_scales(device: torch.device) -> bool:
    """Whether ``scaled_mm`` takes a scale a row on this device."""
    return device.type != "cpu" or torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


def scaled_mm(
    first: torch.Tensor,
    second: torch.Tensor,
    first_scale: torch.Tensor,
    second_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(first * first_scale) @ (second * second_scale) + bias`` of float8 matrices; ``second`` is column-major."""
    # On Hopper the fast accumulation sums in 14 bits between additions to float32, as torchao and vLLM have it.
    return torch._scaled_mm(first, second, first_scale, second_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def forbid_address(tensor: torch.Tensor, message: str) -> None:
    """Make whoever asks for a tensor's address, to read or to write, get an error; also through its aliases and views.

    Args:
        tensor: its storage is its own; what the storage holds is lost to all.
        message: of the error; torch's own says so too, without the reason, where it was built without CUDA.

    """
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    address = tensor.untyped_storage()._cdata
    set_message = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)
    if set_message is not None:
        set_message(address, message)
    elif (offset := _offset_of_read_flag()) is not None:
        ctypes.memset(address + offset, 1, 1)


@functools.cache
def _offset_of_read_flag() -> int | None:
    """Where in a storage lies the flag that forbids to read its address; None where it does not lie as in 2.11 to 2.13.

    Found by what another flag, the one before it, changes in a storage made for this, and tried out on that.
    """
    length = 80  # bytes; the least that a storage takes in these versions is more
    tensor = torch.zeros(1)
    address = tensor.untyped_storage()._cdata
    before = ctypes.string_at(address, length)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    after = ctypes.string_at(address, length)
    changed = [place for place in range(length) if before[place] != after[place]]
    if len(changed) != 2 or changed[1] != changed[0] + 1 or changed[1] + 1 >= length or after[changed[1] + 1]:
        return None
    ctypes.memset(address + changed[1] + 1, 1, 1)
    try:
        tensor.clone()
    except RuntimeError:
        return changed[1] + 1
    return None


def tracing_backend() -> Callable[..., Any] | None:
    """The backend that Dynamo is capturing a graph for, in this thread; None where it captures none."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return None
    for wrapping in ("_torchdynamo_orig_backend", "compiler_fn", "func"):  # debugging aids, then options, then partial
        backend = getattr(backend, wrapping, backend)
    return backend  # type: ignore[no-any-return]
