"""Sealing: a rewritten trunk gets its last inputs and outputs, and the runtime the plan by which to call it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import inline
from hvcompile.graph.nodes import is_parameter, is_tensor, is_weight
from hvcompile.graph.paths import parameter_path
from hvcompile.runtime.agreement import Agreement, CallInputs
from hvcompile.runtime.call import CallPlan, StateLayout
from hvcompile.runtime.derived import DerivedCall
from hvcompile.runtime.lineage import Origins
from hvcompile.runtime.weights import WeightLayout
from hvcompile.torch_private import dynamo, fakes
from hvcompile.trunk.roles import InputRoles, classify
from hvcompile.trunk.trunk import Derived, State, StoredWeights, Trunk

# How far ranks' samples may be apart, relatively: what bf16's rounding makes of fifty steps, with other kernels on
# other ranks, stays below; another seed's noise is apart by more than 1.
ROUNDING = 0.02


def seal(trunk: Trunk) -> CallPlan:
    """Give the graph its last inputs and outputs, and say how the runtime must call it.

    The outputs gain the next state, the decision, and how far the ranks' inputs are apart. The inputs lose the weights
    that float8 copies, or tensors on the host, stand for.
    """
    roles = classify(trunk)
    num_outputs = _add_outputs(trunk)
    placeholders = list(trunk.graph.find_nodes(op="placeholder"))
    place = {node: number for number, node in enumerate(placeholders)}
    stored_sources = {node for stored in trunk.stored for node in stored.sources}
    read_weights = set(roles.weights) - stored_sources
    hosted = [node for node, host in trunk.hosted.items() if node is not host]
    gone = {*stored_sources, *hosted}
    anchor = _anchor(trunk, roles)
    symbols = fakes.symbols_of(trunk.graph)
    plan = CallPlan(
        anchor=None if anchor is None else place[anchor],
        weights=tuple(place[node] for node in placeholders if node in read_weights),
        conditions=tuple(place[node] for node in roles.conditions),
        numbers=tuple(number for number, node in enumerate(trunk.inputs) if not is_tensor(node)),
        symbols={number: symbol for number, symbol in symbols.items() if number < len(trunk.inputs)},
        num_outputs=num_outputs,
        states=tuple(map(_state_layout, trunk.states)),
        has_record=bool(trunk.observed),
        content_device=None if trunk.weights_content is None else fakes.value(trunk.weights_content).device,
        passed=_passed(trunk, gone),
        hosted=tuple(place[node] for node in hosted),
        stored=tuple(_weight_layout(stored, place) for stored in trunk.stored),
        derived=tuple(_derived_call(item, place) for item in trunk.derived),
        held=tuple(place[node] for node in roles.held),
        agreement=_agreement(trunk, roles, place),
        origins=_origins(trunk),
    )
    for node in gone:
        trunk.graph.erase_node(node)
    trunk.module.graph.lint()
    trunk.module.recompile()
    return plan


def seal_as_captured(module: fx.GraphModule, hosted: Sequence[int] = ()) -> CallPlan:
    """Say how the runtime must call a graph without a trunk: as Dynamo would, but for weights on the host.

    Args:
        module: as captured.
        hosted: places of its inputs that are on the host, whose tensors there come last.

    """
    placeholders = list(enumerate(module.graph.find_nodes(op="placeholder")))
    weights = [place for place, node in placeholders if is_parameter(node)]
    weights += [place for place, node in placeholders if is_weight(node)]
    return CallPlan(
        anchor=weights[0] if weights else None,
        weights=(),
        conditions=(),
        numbers=(),
        symbols={},
        num_outputs=0,
        states=(),
        has_record=False,
        passed=tuple(place for place, _ in placeholders if place not in hosted) if hosted else None,
        hosted=tuple(hosted),
    )


def _add_outputs(trunk: Trunk) -> int:
    """Append the next state, the decision and the ranks' differences to the outputs; returns how many there were."""
    results: Any = trunk.output.args[0]
    extra = [state.next_value for state in trunk.states]
    if trunk.observed:
        extra.append(inline(trunk.graph, _record, trunk.observed, before=trunk.output, tag="runtime")["record"])
    if trunk.shared is not None:
        extra.append(trunk.shared.apart)
    trunk.output.args = ((*results, *extra),)
    return len(results)


def _record(*, reused: fx.Proxy, difference: fx.Proxy) -> dict[str, Any]:
    """A decision as one float32 pair, so that reading it is one transfer."""
    return {"record": torch.stack([reused.to(torch.float32), difference.to(torch.float32)])}  # type: ignore[list-item]


def _anchor(trunk: Trunk, roles: InputRoles) -> fx.Node | None:
    """The weight that stands for the model, a parameter rather than a buffer, which a forward may replace."""
    weights = set(roles.weights)
    first = [node for node in trunk.blocks[0].operands if node in weights]
    candidates = [*filter(is_parameter, first), *filter(is_parameter, roles.weights), *first, *roles.weights]
    return candidates[0] if candidates else None


def _passed(trunk: Trunk, gone: set[fx.Node]) -> tuple[int, ...] | None:
    """The captured graph's inputs that the sealed one takes; None for all."""
    return tuple(place for place, node in enumerate(trunk.inputs) if node not in gone) if gone else None


def _state_layout(state: State) -> StateLayout:
    return StateLayout(
        name=state.name,
        shape=state.shape,
        dtype=state.dtype,
        device=state.device,
        may_be_left=state.may_be_left,
        is_shared=state.is_shared,
    )


def _weight_layout(stored: StoredWeights, place: dict[fx.Node, int]) -> WeightLayout:
    return WeightLayout(
        positions=tuple(place[node] for node in stored.sources),
        paths=tuple(map(parameter_path, stored.sources)),
        granularity=stored.granularity,
        keep_original=stored.keep_original,
    )


def _derived_call(item: Derived, place: dict[fx.Node, int]) -> DerivedCall:
    item.module.recompile()
    return DerivedCall(
        made_by=item.made_by,
        names=tuple(node.name for node in item.placeholders),
        run=item.module.forward,
        sources=tuple(place[node] for node in item.sources),
        is_kept=item.is_kept,
        read=item.read,
    )


def _origins(trunk: Trunk) -> Origins | None:
    """How the graph learns what earlier graphs tell; None where no pass has asked for it."""
    earlier = trunk.earlier
    if earlier is None or earlier.clock is None:
        return None
    return Origins(
        places=earlier.inputs,
        known=earlier.known,
        kinds=earlier.kinds,
        sample=earlier.sample_root,
        clocks=earlier.clock_roots,
        num_clocks=earlier.num_clocks,
        device=fakes.value(earlier.clock).device,
    )


def _agreement(trunk: Trunk, roles: InputRoles, place: dict[fx.Node, int]) -> Agreement | None:
    """What compares the inputs of the ranks that run this graph together."""
    if trunk.group is None or trunk.sharding is None:
        return None
    shared: Sequence[fx.Node] = list(trunk.shared.nodes) if trunk.shared is not None else []
    equal: Sequence[fx.Node] = trunk.shared.conditions if trunk.shared is not None else []

    def names_of(nodes: Iterable[fx.Node]) -> dict[int, str]:
        return {place[node]: dynamo.source_name(node) or node.name for node in nodes}

    numbers = names_of(node for node in trunk.inputs if not is_tensor(node))
    inputs = CallInputs(
        numbers=numbers | ({-1: "the content of the floats that its layers hold"} if roles.held else {}),
        conditions=names_of(roles.conditions),
        shared=names_of(shared),
    )
    limits = {
        name: ROUNDING * (node is roles.sample) for node, name in zip(shared, names_of(shared).values(), strict=True)
    }
    return Agreement(trunk.group, inputs, [*limits.items(), *((name, 0.0) for name in names_of(equal).values())])
