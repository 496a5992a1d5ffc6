"""What each input of a captured graph is for: weights, the sample that is denoised, clocks, and conditions.

A step of a generation changes the sample and the clocks (the timestep). It leaves the conditions (text embeddings,
masks, rotary tables) alone. So the runtime tells generations apart by their conditions, and the graph sees by a clock
that turns back that a new one has begun. All roles are read from data flow, never from names.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from hvcompile.graph.nodes import is_scalar, is_tensor, is_weight, op_name
from hvcompile.torch_private.dynamo import is_float_of_module, source_name
from hvcompile.torch_private.fakes import numel_hint, size_hint, value
from hvcompile.trunk.trunk import Trunk

# Operations that mix channels or tokens, or take a number as a size: after one of these a value is no longer a time.
_MIXING = {
    *("arange", "linspace", "full", "ones", "zeros", "linear", "matmul", "bmm", "addmm", "layer_norm", "embedding"),
    *("scaled_dot_product_attention", "einsum"),
}
SINUSOIDS = {"sin", "cos", "polar"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputRoles:
    """Placeholders of a captured graph by role.

    Attributes:
        weights: parameters and buffers.
        sample: what is denoised; None where no input has as many dimensions as the output.
        clocks: the timesteps.
        held: Python floats that modules hold, which Dynamo passes as tensors.
        conditions: all other tensors.
        python_time: name of a timestep that is a Python number, which the graph can't keep state of; None if there is
            none.
        made: what earlier pieces of the model have made, beside ``sample``, which is one of these then.

    """

    weights: tuple[fx.Node, ...]
    sample: fx.Node | None
    clocks: tuple[fx.Node, ...]
    conditions: tuple[fx.Node, ...]
    python_time: str | None
    held: tuple[fx.Node, ...] = ()
    made: tuple[fx.Node, ...] = ()

    @property
    def changing(self) -> tuple[fx.Node, ...]:
        """The inputs that are new in every step: the sample, if there is one, the clocks, and what was made of them."""
        return (*([] if self.sample is None else [self.sample]), *self.clocks, *self.made)


def is_time_like(placeholder: fx.Node) -> bool:
    """Whether an input becomes a sinusoidal embedding: it reaches ``sin`` or ``cos`` before anything mixes it."""
    seen: set[fx.Node] = set()
    stack = [placeholder]
    while stack:
        node = stack.pop()
        if node in seen or op_name(node) in _MIXING or op_name(node).startswith("conv"):
            continue
        if op_name(node) in SINUSOIDS:
            return True
        seen.add(node)
        stack.extend(node.users)
    return False


def likeness(tensor: torch.Tensor, output: torch.Tensor) -> tuple[int, int]:
    """How much an input looks like the model's output, of equal rank: dimensions of equal size, then size."""
    equal = sum(size_hint(a) == size_hint(b) for a, b in zip(tensor.shape, output.shape, strict=True))
    return equal, numel_hint(tensor)


def classify(trunk: Trunk) -> InputRoles:
    """Give every tensor placeholder of the trunk's graph its role.

    A piece of a model takes what earlier pieces have made of the sample and the clocks; see ``Trunk.earlier``.
    """
    weights = [node for node in trunk.inputs if is_tensor(node) and is_weight(node)]
    # Of a Python float that has become a literal its input is left, which nothing reads.
    derived = {node for item in trunk.derived for node in item.sources}
    read = [node for node in trunk.inputs if is_tensor(node) and (node.users or node in derived)]
    held = tuple(filter(is_float_of_module, read))
    inputs = [node for node in read if not is_weight(node) and node not in held]
    if trunk.earlier is not None:
        carrier = trunk.inputs[trunk.earlier.sample]
        made = {trunk.inputs[place] for place in (*trunk.earlier.inputs, *trunk.earlier.known)}
        return InputRoles(
            weights=tuple(weights),
            sample=carrier,
            clocks=(),
            made=tuple(node for node in inputs if node in made and node is not carrier),
            conditions=tuple(node for node in inputs if node not in made),
            python_time=None,
            held=held,
        )
    results = trunk.output.args[0]
    outputs = [value(node) for node in results if isinstance(node, fx.Node) and is_tensor(node)]  # type: ignore[union-attr]
    sample = None
    if outputs:
        output = outputs[0]
        alike = [node for node in inputs if value(node).ndim == output.ndim and value(node).is_floating_point()]
        alike = [node for node in alike if output.ndim > 1 and not is_time_like(node)]
        sample = max(alike, key=lambda node: likeness(value(node), output), default=None)
    batch = size_hint(value(sample).shape[0]) if sample is not None else 1

    def is_small(node: fx.Node) -> bool:
        tensor: torch.Tensor = value(node)
        if "_modules" in source_name(node):  # a tensor that is an attribute of the model
            return False
        return tensor.is_floating_point() and tensor.ndim <= 1 and numel_hint(tensor) <= max(1, batch)

    others = [node for node in inputs if node is not sample and value(node).dtype != torch.bool]
    others = [node for node in others if not value(node).is_complex()]
    # A timestep that is not embedded by sines is at least one number for each sample.
    clocks = [node for node in others if is_time_like(node)] or [node for node in others if is_small(node)]
    numbers = [node for node in trunk.inputs if is_scalar(node) and ".size()" not in source_name(node)]
    python_time = next((source_name(node) or node.name for node in numbers if is_time_like(node)), None)
    conditions = [node for node in inputs if node is not sample and node not in clocks]
    return InputRoles(
        weights=tuple(weights),
        sample=sample,
        clocks=tuple(clocks),
        python_time=python_time,
        conditions=tuple(conditions),
        held=held,
    )
