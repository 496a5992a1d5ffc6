"""The door to private Inductor and AOTAutograd: a rewritten graph lowered by one of them, or run as it is.

All names were checked on torch 2.11.0 and 2.13.0; where they differ, that is said here.

- ``torch._inductor.compile_fx.compile_fx``: what ``backend="inductor"`` itself calls; there is no public entry that
  takes a Dynamo graph with extra placeholders. Before 2.13 it asks of operands of 4 or 5 dimensions of a ``cat``
  whether they are channels-last, also where a size depends on data.
- ``torch._inductor.exc.InductorError``: what it raises, and
  ``torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode``: the cause that its text names in such a case.
- ``torch._higher_order_ops.invoke_subgraph.NestedCompileRegionOptions``: an ``invoke_subgraph`` inside a ``cond``
  branch is retraced without Inductor's decompositions and then fails with "both a fallback and a decomp for same op";
  handing the table to the body cures it.
- ``GraphLowering.save_output_code``: told of Inductor's generated code, also where that comes from a cache.
- ``functorch.compile.aot_module_simplified``: re-exports ``torch._functorch.aot_autograd.aot_module_simplified``, and
  is imported from there.
- ``torch.ops.higher_order.cond`` and ``invoke_subgraph``: the operators that the public ``torch.cond`` and
  ``torch.compiler.nested_compile_region`` trace into, and so the targets of their nodes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import NestedCompileRegionOptions
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from hvcompile.errors import LoweringError
from hvcompile.torch_private.branches import operands_as_traced
from hvcompile.torch_private.caching import inductors_decompositions, marked_for_caches, no_unseen_content
from hvcompile.torch_private.compilers import why_no_compiling
from hvcompile.torch_private.distributed import is_exchange, is_left_running
from hvcompile.torch_private.floats import unread_floats_stay_inputs
from hvcompile.torch_private.subclasses import without_class

Compiled = Callable[..., Any]
CPU = torch.device("cpu")
COND = torch.ops.higher_order.cond
INVOKE_SUBGRAPH = torch.ops.higher_order.invoke_subgraph


def _graphs(module: torch.nn.Module) -> Iterator[fx.GraphModule]:
    return (child for child in module.modules() if isinstance(child, fx.GraphModule))


def _outlined_bodies(module: torch.nn.Module) -> Iterator[fx.GraphModule]:
    for child in _graphs(module):
        for node in child.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH):
            body = getattr(child, node.args[0].target)
            if isinstance(body, fx.GraphModule):
                yield body


# From how many operations on Inductor writes to memory what several kernels need, where to compute it in each takes
# fewer bytes on a GPU. Its own number is 30, with which the rotations of a block's queries and keys go through memory
# in float32. With 60 a block of HunyuanVideo, Mochi or Flux moves 5 to 20 % fewer bytes, and one of LTX 3 % more. To
# read more than Inductor's own 4 tensors again saves HunyuanVideo's float8 another 3 %, and costs CogVideoX 18 %.
# What ranks exchange is in memory anyway: there Inductor's own takes a launch less a block, and 2 % fewer bytes in
# float8.
# Private: no public setting has it (2.11.0, 2.13.0).
RECOMPUTING: Mapping[str, int] = {"realize_opcount_threshold": 60}


def to_inductor(
    module: fx.GraphModule, inputs: Sequence[Any], *, recomputing: Mapping[str, int] = RECOMPUTING
) -> Compiled:
    """Compile with Inductor; the result takes the graph's placeholders in order and returns its outputs as a tuple.

    Args:
        module: the graph.
        inputs: fake or real.
        recomputing: Inductor's settings of what kernels compute again, for devices other than the CPU and graphs
            without collectives; none are Inductor's own.

    Raises:
        LoweringError: Inductor asks for a size that depends on data, or lacks what it compiles with.

    """
    # Private: without them an outlined body inside a branch fails to lower (2.11.0, 2.13.0).
    table = inductors_decompositions()
    for body in _outlined_bodies(module):
        body.meta["nested_region_config"] = NestedCompileRegionOptions(decompositions=table)
    # Dynamo's guards hold every input's strides already. To check them again, one by one in Python, takes a tenth of a
    # small step on a CPU and nothing where the host runs ahead of its device; so there, what kernels return is checked.
    is_ahead = any(isinstance(item, torch.Tensor) and item.device.type != "cpu" for item in inputs)
    config: dict[str, Any] = {
        "size_asserts": is_ahead,
        "unsafe_marked_cacheable_functions": marked_for_caches(module),
    }
    targets = [node.target for child in _graphs(module) for node in child.graph.nodes]
    if is_ahead and not any(map(is_exchange, targets)):
        config |= recomputing
    if any(map(is_left_running, targets)):
        # To lower the peak of memory, Inductor would move the start of a transfer to its wait (2.13.0: on by default).
        config["reorder_for_peak_memory"] = False
    try:
        # Private: no public entry takes a Dynamo graph with added placeholders (2.11.0, 2.13.0).
        with operands_as_traced(), unread_floats_stay_inputs(module), no_unseen_content(module):
            compiled: Any = compile_fx(module, list(inputs), config_patches=config)
    except InductorError as error:
        _, separator, question = str(error).partition(f"{GuardOnDataDependentSymNode.__name__}: ")
        if not separator:
            lacking = why_no_compiling(next((item.device for item in inputs if isinstance(item, torch.Tensor)), CPU))
            if lacking:
                raise LoweringError(f"{lacking}. options={{'lower': 'aot'}} runs the graph without it") from error
            raise
        raise LoweringError(
            f"Inductor of torch {torch.__version__} asks for a length that depends on data, which is known when the "
            f"graph runs alone ({question.splitlines()[0]}). Torch 2.13 asks for fewer than 2.11 and 2.12 do, with any "
            "backend that lowers by Inductor. options={'lower': 'aot'} runs the graph without it"
        ) from error
    return compiled  # type: ignore[no-any-return]


def to_aot(module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Trace with AOTAutograd (functionalised ATen) and run the traced graph eagerly."""
    # A module that torch re-exports its private one by (2.11.0, 2.13.0).
    from functorch.compile import aot_module_simplified, nop

    with unread_floats_stay_inputs(module):
        return _as_captured(aot_module_simplified(module, list(inputs), fw_compiler=nop))


def to_eager(module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Run the rewritten graph as it is."""
    del inputs  # nothing is specialised
    return _as_captured(module.forward)


def _as_captured(run: Compiled) -> Compiled:
    """Have a graph's operations run as they are written, whatever the class of a weight would make of them.

    Dynamo has seen to that: what is in the graph is what such a class, as diffusers' of weights in GGUF, made of them.
    """
    return lambda *args: run(*map(without_class, args))


LOWERINGS: Mapping[str, Callable[[fx.GraphModule, Sequence[Any]], Compiled]] = {
    "inductor": to_inductor,
    "aot": to_aot,
    "eager": to_eager,
}


@contextlib.contextmanager
def output_code(tell: Callable[[str], object]) -> Iterator[None]:
    """Have ``tell`` called with the code that Inductor generates, or finds in its cache, in this thread."""
    # Private: the public TORCH_COMPILE_DEBUG writes the code to files, and none where a cache has it (2.11.0, 2.13.0).
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
