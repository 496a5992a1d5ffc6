"""What enters and leaves branches and bodies shares no memory, be streams views of each other or of one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import fx, nn
from toy import WIDTH, Toy, toy_inputs
from trunks import recovered

import hvcompile
from hvcompile.errors import InvalidRewriteError
from hvcompile.graph.aliasing import refresh, shared_memory
from hvcompile.graph.nodes import is_tensor, is_weight, mutated_operand, storage
from hvcompile.journal import PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.pipeline import run as run_passes
from hvcompile.torch_private.fakes import value
from hvcompile.torch_private.lowering import COND
from hvcompile.trunk.trunk import Trunk

ALWAYS = {"first_block_cache": {"threshold": 1e9}}
Streams = tuple[torch.Tensor, ...]


class StreamBlock(nn.Module):
    """Changes its streams as ``how`` says; the first is the main one."""

    def __init__(self, how: str, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.mix, self.how = nn.Linear(WIDTH, WIDTH), how
        if weight is not None:
            self.mix.weight = weight

    def forward(self, streams: Streams, time: torch.Tensor) -> Streams:
        hidden, *others = streams
        changed = hidden + 0.2 * torch.tanh(self.mix(hidden) + time[:, None])
        if self.how == "untouched":  # the second stream comes out as it went in
            return changed, *others
        if self.how == "twice":
            return changed, changed
        if self.how == "expanded":  # every token alike
            return changed, (others[0] + 0.1 * changed.mean(1, keepdim=True))[:, :1].expand_as(others[0])
        if self.how == "views of one":
            joint = torch.cat([changed, others[0] + 0.1 * changed[:, :1]], dim=1)
            return joint[:, : changed.shape[1]], joint[:, changed.shape[1] :]
        if self.how == "transposed":
            return (changed.transpose(1, 2).contiguous().transpose(1, 2),)
        return changed, *others


class Streaming(Toy):
    """A model whose blocks hand on one stream or two, with views between them as ``how`` says."""

    def __init__(self, how: str, blocks: int = 4) -> None:
        super().__init__(0)
        self.how = how
        weights: list[Any] = [None] * blocks
        if how == "weights of one":  # parameters that are parts of one tensor, as fused checkpoints are loaded
            weights = list(map(nn.Parameter, torch.randn(blocks, WIDTH, WIDTH).mul(0.2).unbind()))
        self.blocks = nn.ModuleList(StreamBlock(how, weight) for weight in weights)

    def between(self, streams: Streams) -> Streams:
        hidden, *others = streams
        batch, tokens, width = hidden.shape
        if self.how == "frames":  # of which there is one: moved to the batch and back, which moves nothing
            hidden = hidden.reshape(batch, 1, tokens, width).permute(0, 2, 1, 3).reshape(batch * tokens, 1, width)
            hidden = hidden.reshape(batch, tokens, 1, width).permute(0, 2, 1, 3).reshape(batch, tokens, width)
        if self.how == "joined":
            joint = torch.cat([hidden, *others], dim=1)
            return torch.split(joint, [tokens, joint.shape[1] - tokens], dim=1)
        return hidden, *others

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=timestep.device) * 0.7)
        angles = timestep[:, None].float() / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        streams: Streams = (self.embed(sample), text) if self.how in TWO else (self.embed(sample),)
        if self.how == "views of one":
            joint = torch.cat(streams, dim=1)
            streams = joint[:, : sample.shape[1]], joint[:, sample.shape[1] :]
        for block in self.blocks:
            streams = self.between(block(streams, time))
        result: torch.Tensor = self.head(streams[0])
        for other in streams[1:]:
            result = result + other.mean()
        return result


TWO = {"untouched", "twice", "views of one", "joined", "expanded"}
ONE = {"frames", "transposed", "plain"}


def steps(model: Callable[..., torch.Tensor], tokens: int, batch: int) -> list[torch.Tensor]:
    """A step that is computed, the same again, and one with another sample."""
    given = toy_inputs(tokens=tokens, batch=batch)
    other = given | {"sample": given["sample"] * 1.1, "timestep": given["timestep"] - 50}
    with torch.no_grad():
        return [model(**inputs) for inputs in (given, given, other)]


@pytest.mark.parametrize(("tokens", "batch"), [(12, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("how", sorted(ONE | TWO))
def test_streams_that_are_views(how: str, tokens: int, batch: int) -> None:
    """A computed step is eager's, the same step reused gives the same, and lowering changes no reused step."""
    model = Streaming(how).eval()
    found = {}
    for lower in ("eager", "aot"):
        torch._dynamo.reset()
        fast = hvfast(model, fullgraph=True, options={"lower": lower, **ALWAYS})
        found[lower] = steps(fast, tokens, batch)
        assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True, True]
        hvcompile.reset(fast)
    expected = steps(model, tokens, batch)[0]
    for eager, lowered in zip(found["eager"], found["aot"], strict=True):
        assert relative_error(lowered, eager) < 1e-5
    assert relative_error(found["aot"][0], expected) < 1e-5
    assert relative_error(found["aot"][1], expected) < 1e-5


@pytest.mark.parametrize("how", ["frames", "joined"])
def test_streams_that_are_views_of_symbolic_sizes(how: str) -> None:
    """A view for some sizes only may be a copy for others; what holds for all is taken."""
    model = Streaming(how).eval()
    fast = hvfast(model, fullgraph=True, dynamic=True, options={"lower": "aot", **ALWAYS})
    for tokens, batch in ((12, 2), (7, 3), (1, 1)):
        expected = steps(model, tokens, batch)[0]
        assert relative_error(steps(fast, tokens, batch)[1], expected) < 1e-5
        hvcompile.reset(fast)


def test_weights_that_are_parts_of_one_tensor() -> None:
    """torch.cond takes no two operands that share memory; the cache says so, and the rest goes on."""
    model = Streaming("weights of one").eval()
    fast = hvfast(model, fullgraph=True, options={"lower": "aot"})
    expected = steps(model, 12, 1)
    for found, wanted in zip(steps(fast, 12, 1), expected, strict=True):
        assert relative_error(found, wanted) < 1e-5
    (row,) = [row for row in hvcompile.stats(fast).journal[0] if row.name == "FirstBlockCache"]
    assert "are parts of one tensor" in row.report.declined[0][1]


def one_frame(name: str) -> dict[str, Any]:
    """A model's inputs with the first frame alone."""
    inputs = zoo.FAMILIES[name].inputs(seed=3)
    return inputs | {"hidden_states": inputs["hidden_states"][:, :, :1].contiguous()}


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        ("latte", "aot"),
        ("wan_t2v", "aot"),
        pytest.param("wan_t2v", "inductor", marks=SLOW),
        pytest.param("latte", "inductor", marks=SLOW),
    ],
)
def test_one_frame(name: str, lower: str) -> None:
    """Where frames are a dimension of one, changing dimensions about moves nothing."""
    model, inputs = zoo.FAMILIES[name].build(), one_frame(name)
    fast = hvfast(model, fullgraph=True, options={"lower": lower, **ALWAYS})
    with torch.no_grad():
        expected = first(model(**inputs, return_dict=False))
        for _ in range(2):
            assert relative_error(first(fast(**inputs, return_dict=False)), expected) < 1e-5
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True]


class ModulatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        scale, shift = modulation.unbind(2)
        return hidden + 0.2 * torch.tanh(self.mix(hidden * (1 + scale) + shift))


class Modulated(Toy):
    """Every token has its own modulation, joined along the tokens and then turned, as Helios' has."""

    def __init__(self) -> None:
        super().__init__(0)
        self.modulate = nn.Linear(WIDTH, 2 * WIDTH)
        self.blocks = nn.ModuleList(ModulatedBlock() for _ in range(3))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = sample.shape
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=timestep.device) * 0.7)
        angles = timestep[:, None].float() / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        parts = [self.modulate(item).view(batch, 2, 1, width) for item in (time * 0, time)]
        split = [part.expand(batch, 2, count, width) for part, count in zip(parts, (5, tokens - 5), strict=True)]
        modulation = torch.cat(split, dim=2).permute(0, 2, 1, 3)
        hidden = self.embed(sample)
        for block in self.blocks:
            hidden = block(hidden, modulation)
        result: torch.Tensor = self.head(hidden)
        return result


@pytest.mark.parametrize("dynamic", [None, True])
def test_branches_read_their_operands_as_they_lie(dynamic: bool | None) -> None:
    """Inductor chooses how what it computes lies in memory, and compiles branches for what was traced."""
    model = Modulated().eval()
    fresh = torch._inductor.config.patch({"force_disable_caches": True})
    fast = hvfast(model, fullgraph=True, dynamic=dynamic, options=ALWAYS)
    with fresh:
        found = steps(fast, 12, 1)
    expected = steps(model, 12, 1)[0]
    assert relative_error(found[0], expected) < 1e-5
    assert relative_error(found[1], expected) < 1e-5
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True, True]


# What the pass runner finds.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careless(Pass):
    """Spoils the first block's call, or its body, as ``how`` says."""

    section: ClassVar[str] = "careless"
    is_exact: ClassVar[bool] = True

    how: str

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        del context
        block = trunk.blocks[0]
        graph = block.body.module.graph
        output: Any = graph.output_node()
        taken = next(node for node in graph.find_nodes(op="placeholder") if value(node).ndim == 3)
        if self.how == "view":
            output.args = ((viewed(taken, output), *output.args[0][1:]),)
        elif self.how == "write":
            with graph.inserting_before(output):
                graph.call_method("mul_", (taken, 2)).meta["example_value"] = value(taken)
        elif self.how == "twice":
            output.args = ((*output.args[0], output.args[0][0]),)
        else:
            stream, other = [node for node in block.operands if is_tensor(node) and not is_weight(node)][:2]
            twin = viewed(stream, block.call)
            block.call.args = tuple(twin if node is other else node for node in block.call.args)
        return PassReport(matched=("spoiled",))


def viewed(node: fx.Node, before: fx.Node) -> fx.Node:
    with node.graph.inserting_before(before):
        view = node.graph.call_method("view_as", (node, node))
    view.meta["example_value"] = value(node).view_as(value(node))
    return view


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("view", "block_0, which .* runs, returns view_as, which shares memory with what it takes as"),
        ("twice", "block_0, which .* runs, returns clone and clone, which share memory"),
        ("write", "block_0, which .* runs, writes into .*mul_"),
        ("operand", "takes .* and view_as, which share memory"),
    ],
)
def test_a_pass_that_leaves_memory_shared_is_named(how: str, words: str) -> None:
    trunk = recovered(Toy().eval(), **toy_inputs())
    with pytest.raises(InvalidRewriteError, match=f"Careless left calls that share memory: .*{words}"):
        run_passes(trunk, [(Careless(how=how), False)], lambda *_: None, [])


def test_an_outlining_that_leaves_memory_shared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the first pass after it."""
    monkeypatch.setattr("hvcompile.backend.shared_memory", lambda module: "one takes another")
    monkeypatch.delenv("HVCOMPILE_STRICT")
    fast = hvfast(Toy().eval(), fullgraph=True, options={"lower": "eager"})
    with torch.no_grad():
        assert relative_error(fast(**toy_inputs()), Toy().eval()(**toy_inputs())) < 1e-6
    (row,) = hvcompile.stats(fast).journal[0]
    ((_, why),) = row.report.declined
    assert "outlining the blocks" in why
    assert "it left calls that share memory: one takes another" in why


def test_branches_are_looked_at_as_bodies_are() -> None:
    def graph_of(function: Callable[..., Any]) -> fx.GraphModule:
        module = fx.symbolic_trace(function)
        for node in module.graph.nodes:
            node.meta["example_value"] = torch.zeros(2)
        return module

    root = graph_of(lambda flag, tensor: tensor)
    root.right, root.wrong = graph_of(lambda tensor: (tensor + 1,)), graph_of(lambda tensor: (tensor.view(2),))
    inner: Any = root.wrong
    taken, view = list(inner.graph.nodes)[:2]
    view.meta["example_value"] = taken.meta["example_value"].view(2)
    flag, tensor, output = root.graph.nodes
    with root.graph.inserting_before(output):
        targets = [root.graph.get_attr(name) for name in ("right", "wrong")]
        call = root.graph.call_function(COND, (flag, *targets, (tensor,)))
    call.meta["example_value"] = (torch.zeros(2),)
    assert (
        shared_memory(root) == "wrong, which cond runs, returns view, which shares memory with what it takes as tensor"
    )


def test_views_of_what_has_been_replaced_are_made_anew() -> None:
    """A view follows the tensor that it is of; what is computed of it keeps its own memory, and its own value."""
    trunk = recovered(Streaming("frames").eval(), **toy_inputs(tokens=1))
    output = next(iter(trunk.blocks[0].outputs.values()))
    views = [node for node in trunk.graph.nodes if node.target in {"reshape", "permute"} and node.prev is not None]
    assert any(storage(node) == storage(output) for node in views)
    output.meta["example_value"] = output.meta["example_value"].clone()
    before = {node: node.meta["example_value"] for node in trunk.graph.nodes if "example_value" in node.meta}
    refresh(trunk.graph, {output})
    readers = [user for user in output.users if user.target == "reshape"]
    assert readers
    assert all(storage(user) == storage(output) for user in readers)
    head = next(node for node in reversed(trunk.graph.nodes) if node.op == "call_function")
    assert before[head] is head.meta["example_value"]


def test_and_and_or_write_nothing() -> None:
    """Their names end in an underscore for another reason than those of what writes in place."""
    graph = fx.symbolic_trace(lambda one, other: (one & other) | ~one).graph
    for node in graph.nodes:
        node.meta["example_value"] = torch.ones(2, dtype=torch.bool)
    assert not [node for node in graph.nodes if mutated_operand(node) is not None]
