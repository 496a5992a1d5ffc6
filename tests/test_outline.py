"""Outlining: which blocks share a body, what the graph looks like then, and when it declines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import hvfast, relative_error
from torch import nn
from toy import TOKENS, WIDTH, Toy, toy_inputs

from hvcompile.graph.nodes import op_name
from hvcompile.journal import Declined
from hvcompile.torch_private.lowering import INVOKE_SUBGRAPH
from hvcompile.trunk.outline import recover
from hvcompile.trunk.trunk import Trunk


def outlined(model: nn.Module, *inputs: Any, **named: Any) -> tuple[Trunk | Declined, str]:
    """What recovery makes of a model, and the captured graph's text after it."""
    found: list[tuple[Trunk | Declined, str]] = []

    def backend(module: Any, _: object) -> Callable[..., Any]:
        before = str(module.graph)
        found.append((recover(module), str(module.graph)))
        assert found[0][1] == before, "Dynamo still reads the captured graph; it must not change"
        result = found[0][0]
        return (result.module if isinstance(result, Trunk) else module).forward

    with torch.no_grad():
        actual = torch.compile(model, backend=backend, fullgraph=True)(*inputs, **named)
        expected = model(*inputs, **named)
    assert relative_error(actual, expected) < 1e-6
    return found[0]


def test_golden_graph() -> None:
    trunk, _ = outlined(Toy(blocks=3), **toy_inputs())
    assert isinstance(trunk, Trunk)
    (body,) = trunk.bodies
    calls = trunk.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)
    assert [block.path for block in trunk.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [block.call for block in trunk.blocks] == list(calls)
    assert {block.body for block in trunk.blocks} == {body}
    assert body.streams == {0: 0}
    # Dynamo numbers its names by what it traced before; the golden text numbers the body's own nodes.
    calls_of_body = [node for node in body.module.graph.nodes if node.op.startswith("call")]
    names = {node: node.name for node in body.module.graph.find_nodes(op="placeholder")}
    names |= {node: f"%{place}" for place, node in enumerate(calls_of_body)}
    lines = [
        f"{op_name(node)}({', '.join(names[operand] for operand in node.all_input_nodes)})" for node in calls_of_body
    ]
    assert lines == [
        "linear(hidden, attend_weight, attend_bias)",
        "linear(l_text_, text_weight, text_bias)",
        "cat(%0, %1)",
        "getitem(hidden)",
        "getitem(%2)",
        "getitem(%2)",
        "scaled_dot_product_attention(%3, %4, %5)",
        "getitem(%6)",
        "getitem(time)",
        "add(%7, %8)",
        "linear(%9, out_weight, out_bias)",
        "mul(%10)",
        "add(hidden, %11)",
        "clone(%12)",
    ]


class Varied(nn.Module):
    """Blocks of one class that differ in a literal, in a shape, in wiring, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.scales = [1.0, 1.0, 2.0, 1.0, 1.0, 1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = x + block(x)
            x = x * scale
        return x


def test_blocks_alike_share_and_others_do_not() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float, late: bool) -> None:
            super().__init__()
            self.linear, self.scale, self.late = nn.Linear(8, 8), scale, late

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale + self.linear(x) if self.late else x + self.linear(x) * self.scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kinds = [(1.0, False), (1.0, False), (2.0, False), (1.0, True), (1.0, False)]
            self.blocks = nn.ModuleList(Scaled(*kind) for kind in kinds)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    trunk, _ = outlined(Model(), torch.randn(2, 3, 8))
    assert isinstance(trunk, Trunk)
    assert [block.body.name for block in trunk.blocks] == ["block_0", "block_0", "block_1", "block_2", "block_0"]
    assert all(body.streams == {0: 0} for body in trunk.bodies)


def test_work_between_blocks_stays_where_it_was() -> None:
    trunk, _ = outlined(Varied(), torch.randn(2, 3, 8))
    assert isinstance(trunk, Trunk)
    assert len(trunk.bodies) == 1
    assert len([node for node in trunk.graph.nodes if getattr(node.target, "__name__", "") == "mul"]) == 6


class Twins(nn.Module):
    """Two streams of one shape that each block updates; the last block's second output is not read."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            joint = torch.cat([a, b], dim=1)
            joint = joint + self.one(joint)
            return joint[:, :3], joint[:, 3:] + self.two(b)

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(blocks))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            a, b = block(a, b)
        return a * 2


def test_last_block_with_dead_work_shares_its_siblings_body() -> None:
    trunk, _ = outlined(Twins(3), torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert isinstance(trunk, Trunk)
    assert len(trunk.bodies) == 1
    assert sorted(trunk.bodies[0].streams.values()) == [0, 1] or len(trunk.bodies[0].streams) == 2


def test_a_block_without_a_write_does_not_share_with_one_that_writes() -> None:
    class Block(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.linear, self.writes = nn.Linear(8, 8), writes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            if self.writes:
                y[:, :2] = 0
            return x + y

    trunk, _ = outlined(nn.Sequential(Block(True), Block(False), Block(True)), torch.randn(2, 8))
    assert isinstance(trunk, Trunk)
    assert [block.body.name for block in trunk.blocks] == ["block_0", "block_1", "block_0"]


@pytest.mark.parametrize("strided", [True, False])
def test_operands_of_any_layout(strided: bool) -> None:
    class Model(Varied):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.transpose(1, 2) if strided else x.expand(2, 8, 8))

    outlined(Model(), torch.randn(2, 8, 3) if strided else torch.randn(1, 8, 8))


def test_views_that_rely_on_a_transposed_layout() -> None:
    """Inside a block, between blocks and in the caller, and the caller sees the strides that eager gives."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            x = h.transpose(1, 2)
            batch, tokens, channels = x.shape
            x = x + self.linear(x.view(batch * tokens, channels)).view(batch, tokens, channels)
            return x.transpose(1, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = (x * 2).transpose(1, 2)
            for block in self.blocks:
                h = block(h)
            return h.transpose(1, 2).view(-1, 8), h

    model, x = Model(), torch.randn(2, 5, 8)
    fast = hvfast(model, options={"lower": "eager"}, fullgraph=True)
    with torch.no_grad():
        for actual, expected in zip(fast(x), model(x), strict=True):
            assert relative_error(actual, expected) < 1e-6
            assert actual.stride() == expected.stride()


def refused(forward: Callable[..., Any]) -> str:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, *args: torch.Tensor) -> Any:
            return forward(self, *args)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, y = x * 1, x * 2
            for block in self.blocks:
                x = block(x, y)
            return x + y

    result, _ = outlined(Model(), torch.randn(2, 8))
    assert isinstance(result, Declined)
    return result.reason


def test_a_block_that_writes_into_its_input_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y.add_(1)
        return x + self.linear(y)

    def through_a_view(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y[:, :4] = x[:, 4:]
        return x + self.linear(y)

    assert "blocks.0 writes into a tensor from outside it" in refused(forward)
    assert "blocks.0 writes into a tensor from outside it" in refused(through_a_view)


def test_writing_into_a_tensor_of_its_own_is_fine() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            y += 1
            y[:, :4] = x[:, 4:]
            return x + y

    trunk, _ = outlined(nn.Sequential(Block(), Block()), torch.randn(2, 8))
    assert isinstance(trunk, Trunk)
    assert len(trunk.bodies) == 1


def test_dropout_in_training_mode_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.drop(self.linear(x)) * 0

    result, _ = outlined(nn.Sequential(Block(), Block()).train(), torch.randn(2, 8))
    assert isinstance(result, Declined)
    assert "training mode, call .eval()" in result.reason
    assert isinstance(outlined(nn.Sequential(Block(), Block()).eval(), torch.randn(2, 8))[0], Trunk)


def test_autocast_inside_a_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.linear(x)
            return x + y.float()

    trunk, _ = outlined(nn.Sequential(Block(), Block()), torch.randn(2, 8))
    assert isinstance(trunk, Trunk)


class Casting(nn.Module):
    """Writes in place into what a cast of its input hands back, which is the input itself where nothing is cast."""

    def __init__(self, alias: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.alias = nn.Linear(WIDTH, WIDTH), alias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result = self.alias(hidden)
        result += self.linear(hidden)
        return result


ALIASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float": lambda x: x.float(),
    "type": lambda x: x.type(torch.float32),
    "mT": lambda x: x.mT.mT,
    "swapaxes": lambda x: x.swapaxes(0, 1).swapaxes(0, 1),
    "expand_as": lambda x: x.expand_as(x),
    "tensor_split": lambda x: x.tensor_split(1)[0],
    "movedim": lambda x: x.movedim(0, 1).movedim(0, 1),
    "as_strided": lambda x: x.as_strided(x.shape, x.stride()),
}


@pytest.mark.parametrize("name", ALIASES)
def test_a_write_through_any_alias_of_an_input_is_seen(name: str) -> None:
    """The block is left alone, for what it wrote into would be a copy of its own."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Casting(ALIASES[name]) for _ in range(3))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            kept = hidden = hidden * 2
            for block in self.blocks:
                hidden = block(hidden)
            return hidden + kept

    result, _ = outlined(Keeps(), torch.randn(1, TOKENS, WIDTH))
    assert isinstance(result, Declined)
    assert "writes into a tensor from outside it" in result.reason


class UnderAutocast(Toy):
    """Every block but the first under autocast, entered outside the blocks."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden, time = self.embed(sample), timestep[:, None] / 1000
        for place, block in enumerate(self.blocks):
            with torch.autocast("cpu", torch.bfloat16, enabled=place > 0):
                hidden = block(hidden, text, time.expand(-1, WIDTH)) + 0.0
        return self.head(hidden)


@pytest.mark.parametrize("lower", ["eager", "aot", "inductor"])
def test_autocast_around_a_block_is_part_of_what_it_computes(lower: str) -> None:
    model, inputs = UnderAutocast(blocks=4, scale=1.0), toy_inputs()
    fast = hvfast(model, options={"lower": lower, "first_block_cache": False})
    with torch.no_grad():
        expected, actual = model(**inputs), fast(**inputs)
        for block in model.blocks:  # what is computed where autocast is lost
            block.forward = torch.autocast("cpu", enabled=False)(block.forward)
        without = model(**inputs)
    assert relative_error(without, expected) > 5e-4
    assert relative_error(actual, expected) < 1e-5
