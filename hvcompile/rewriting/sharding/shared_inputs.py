"""The first rank's sample and timestep on every rank, and how far each rank's own are from them.

Ranks that share a sequence compute one video, each from inputs that its own script made. Conditions are compared on the
host before every call (``runtime.agreement``), which knows them by what they held when it first saw them. One rank may
have written to one since, unseen, so the graph compares them too, by hashes.

The sample and the timestep are new in every step, so the graph compares them. All ranks take the first one's: parts of
one sequence never come from different samples, and rounding that differs from device to device does not add up. The
differences are an output, which is read when that costs no waiting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import inline
from hvcompile.graph.nodes import storage, writers
from hvcompile.journal import Declined
from hvcompile.ranks import collectives
from hvcompile.ranks.fingerprints import hash_of
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.operands import restore_order
from hvcompile.trunk.roles import InputRoles, classify
from hvcompile.trunk.together import Group, SharedInputs
from hvcompile.trunk.trunk import Trunk

PARTS = 3
"""Numbers of 22 bits, which float32 holds exactly, that a hash travels as."""


def refusal(trunk: Trunk) -> Declined | None:
    """Why the ranks can't be given one sample."""
    written = writers(trunk.graph)
    for place in classify(trunk).changing:
        if (node := written.get(storage(place))) is not None:
            name = dynamo.source_name(place) or place.name
            return Declined(
                f"{node.format_node()} writes into {name}, of which the ranks get copies of the first one's"
            )
    return None


def share(trunk: Trunk, group: Group, tag: str) -> None:
    """Put the first rank's sample and timestep in place of each rank's own.

    Args:
        trunk: gains ``shared``.
        group: the ranks.
        tag: the pass's name, put into the new nodes' meta.

    Before::

        hidden = embed(sample) ...

    After::

        sample_0 = broadcast(sample)
        rows = gather(|sample - sample_0|.sum() / |sample_0|.sum(), hash(text))
        apart = rows, where a hash is 0 if it is rank 0's, else infinite   [ranks, 2]
        hidden = embed(sample_0) ...

    """
    roles = classify(trunk)
    places = roles.changing
    if not places:
        return
    graph, device = trunk.graph, next(value(node).device for node in trunk.blocks[0].outputs.values())
    collectives.mesh_of(group.name, device.type)  # it can't be made while the graph is traced
    before = next(node for node in graph.nodes if node.op != "placeholder")

    def of_first(**own: Any) -> dict[str, Any]:
        made = {}
        for (name, given), place in zip(own.items(), places, strict=True):
            here = value(place).device  # the host, maybe, from which the ranks' devices can't send
            sent = collectives.broadcast(_moved(given, here, device), group.name)
            made[name] = _moved(sent, device, here)
        return made

    operands = {f"own_{place}": node for place, node in enumerate(places)}
    made = list(inline(graph, of_first, operands, before=before, tag=tag).values())
    operands |= {f"first_{place}": node for place, node in enumerate(made)}
    differences = _differences(graph, operands, roles, device, group, before, tag)
    nodes = {place: restore_order(graph, first, value(place)) for place, first in zip(places, made, strict=True)}
    own = set(itertools.takewhile(lambda node: node is not before, graph.nodes))
    for place, first in nodes.items():
        for user in list(place.users):
            if user not in own:
                user.replace_input_with(place, first)
    trunk.shared = SharedInputs(nodes=nodes, conditions=roles.conditions, apart=differences)


def _differences(
    graph: fx.Graph,
    shared: Mapping[str, fx.Node],
    roles: InputRoles,
    device: torch.device,
    group: Group,
    before: fx.Node,
    tag: str,
) -> fx.Node:
    """Add how far each rank's inputs are from the first one's; see ``SharedInputs.apart``.

    Args:
        graph: gains the nodes.
        shared: for each changing input, in order, its own node "own_<place>" and that of the first rank's value,
            "first_<place>".
        roles: of the inputs.
        device: that the ranks send from.
        group: the ranks.
        before: the node before which the new ones stand.
        tag: the pass's name.

    """
    conditions, num_shared = roles.conditions, len(roles.changing)

    def rows(**given: Any) -> dict[str, Any]:
        found = []
        for place, node in enumerate(roles.changing):
            own, first = given[f"own_{place}"], given[f"first_{place}"]
            change = torch.where(_is_same(own, first), torch.zeros_like(first), (own - first).abs())
            change, extent = (item.to(torch.float32).sum() for item in (change, first.abs()))
            relative = torch.where(change == 0, torch.zeros_like(change), change / extent)
            found.append(_moved(relative, value(node).device, device))
        for place, node in enumerate(conditions):
            content = _moved(hash_of(given[f"condition_{place}"], value(node)), value(node).device, device)
            found += [(content >> 22 * part & 0x3FFFFF).to(torch.float32) for part in range(PARTS)]
        return {"rows": collectives.gather(torch.stack(found)[None], group.name, 0)}

    def apart(rows: Any) -> dict[str, Any]:
        relative, contents = rows.narrow(1, 0, num_shared), rows.narrow(1, num_shared, PARTS * len(conditions))
        is_other = (contents != contents.narrow(0, 0, 1)).unflatten(1, (len(conditions), PARTS)).any(2)
        return {"apart": torch.cat([relative, torch.where(is_other, math.inf, 0.0)], dim=1)}

    operands = {**shared, **{f"condition_{place}": node for place, node in enumerate(conditions)}}
    gathered = inline(graph, rows, operands, before=before, tag=tag)
    return inline(graph, apart, gathered, before=before, tag=tag)["apart"] if conditions else gathered["rows"]


def _moved(tensor: Any, here: torch.device, there: torch.device) -> Any:
    return tensor if here == there else tensor.to(there)


def _is_same(own: Any, first: Any) -> Any:
    """Element by element; what is not a number is the same as what is not a number."""
    return (own == first) | ((own != own) & (first != first))  # noqa: PLR0124
