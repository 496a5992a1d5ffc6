"""The trunk is found in families that the engine has never heard of, and rewriting it changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import fx, nn
from torch._dynamo.exc import Unsupported

import hvcompile
from hvcompile.graph.paths import module_path
from hvcompile.journal import Declined
from hvcompile.trunk.find import describe_lists, find_trunk

# Dynamo itself breaks these into several graphs (a branch or a size that depends on data).
SEVERAL_GRAPHS = {"hunyuan_video15", "hunyuan_image_glyphs", "hidream", "lumina2", "omnigen"}
# Only a part of what the zoo calls the trunk runs as one chain of blocks on the same tokens; the part that is taken.
PARTIAL = {"bria_fibo": 3, "flux3": 3, "wan_vace": 4}
FAMILIES = [name for name in zoo.FAMILIES if name not in SEVERAL_GRAPHS]


def num_blocks(stats: hvcompile.Stats) -> int:
    lists = stats.journal[0][0].report.matched[0].split(": ")[0]
    return sum(int(part.rsplit(" x ", 1)[1]) for part in lists.split(", "))


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_recovered_and_unchanged(name: str) -> None:
    """All blocks found; a computed step equals eager to the last bit or nearly; an identical step is reused."""
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs(seed=3)
    if name == "ace_step" and torch.torch_version.TorchVersion(torch.__version__) < "2.12":
        # Dynamo of 2.11 does not trace the making of an Enum's member from a str, whatever the backend.
        with torch.no_grad(), pytest.raises(Unsupported, match="sourceless builder"):
            torch.compile(model, backend="eager", fullgraph=True)(**inputs, return_dict=False)
        pytest.skip("Dynamo of torch 2.11 can't trace it whole")
    compiled = hvfast(model, fullgraph=True, options={"lower": "eager"})
    with torch.no_grad():
        expected = first(model(**inputs, return_dict=False))
        computed = first(compiled(**inputs, return_dict=False))
        reused = first(compiled(**inputs, return_dict=False))
    stats = hvcompile.stats(compiled)
    assert num_blocks(stats) == PARTIAL.get(name, family.num_blocks)
    assert [step.reused for step in stats.steps] == [False, True]
    # Where padding stands before the sample's tokens, the mask stays, in a graph of its own.
    assert (stats.graphs, stats.recompiles) == (1, 1 if stats.unfit else 0)
    assert relative_error(computed, expected) < 1e-5
    assert relative_error(reused, expected) < 1e-5


def test_paths_of_both_torch_versions() -> None:
    newer = "L['self'].__dict__['_modules']['blocks'].0.attn"
    older = "L['self'].blocks.0.attn"
    assert module_path(newer) == module_path(older) == ("blocks", "0", "attn")
    assert module_path("L['self']._modules['towers']._modules['a-b'].3") == ("towers", "a-b", "3")


def captured(model: nn.Module, *inputs: torch.Tensor) -> fx.Graph:
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, _: object) -> object:
        graphs.append(module.graph)
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    return graphs[0]


class Stack(nn.Module):
    """A small refiner of the text in front of the trunk, and a head made of a list behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 4)])

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for layer in self.refiner:
            text = text + layer(text)
        for layer in self.layers:
            video = video + layer(video) + text.mean(dim=1, keepdim=True)
        for layer in self.head:
            video = layer(video)
        return video


def test_refiners_and_heads_are_not_the_trunk() -> None:
    found = find_trunk(captured(Stack(), torch.randn(1, 20, 8), torch.randn(1, 3, 8)))
    assert not isinstance(found, Declined), found
    assert describe_lists(found) == "layers x 3"


def test_a_block_called_twice_is_two_blocks() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = x + self.layers[0](x).relu()
            return x

    found = find_trunk(captured(Loop(), torch.randn(2, 8)))
    assert not isinstance(found, Declined), found
    assert describe_lists(found) == "layers x 3"


def test_a_model_inside_a_list_is_looked_into() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleList([Stack()])

        def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.models[0](video, text)  # type: ignore[no-any-return]

    found = find_trunk(captured(Wrapper(), torch.randn(1, 20, 8), torch.randn(1, 3, 8)))
    assert not isinstance(found, Declined), found
    assert describe_lists(found) == "models.0.layers x 3"


def test_no_blocks_is_a_reason() -> None:
    found = find_trunk(captured(nn.Linear(4, 4), torch.randn(2, 4)))
    assert isinstance(found, Declined)
    assert "no module list" in found.reason


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(self.up(x).relu())
        return result


class Embedded(nn.Module):
    """Lists of an embedder, of several kinds, and so many blocks on few tokens."""

    def __init__(self, blocks: int, embedder: nn.Module, each: bool) -> None:
        super().__init__()
        self.embedder, self.each = embedder, each
        self.layers = nn.ModuleList(Residual(8) for _ in range(blocks))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        once = self.embedder(time)[:, :8]
        for layer in self.layers:
            x = layer(x) + (self.embedder(time)[:, :8] if self.each else once)
        return x


EMBEDDERS: dict[str, Callable[[], nn.Module]] = {
    "modulation": lambda: nn.Sequential(nn.SiLU(), nn.Linear(8, 400)),
    "embedder": lambda: nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)),
    "wide": lambda: nn.Sequential(nn.Linear(8, 90), nn.SiLU(), nn.Linear(90, 8)),
    "one width": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
    "inside": lambda: nn.ModuleDict({"inner": nn.Sequential(nn.SiLU(), nn.Linear(8, 400))})["inner"],
}


@pytest.mark.parametrize("name", EMBEDDERS)
@pytest.mark.parametrize("each", [False, True], ids=["once", "for each block"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_members_of_an_embedder_are_not_the_trunk(name: str, blocks: int, each: bool) -> None:
    """Even where these do more arithmetic than the blocks; with one block there is no trunk."""
    found = find_trunk(captured(Embedded(blocks, EMBEDDERS[name](), each), torch.randn(1, 2, 8), torch.randn(1, 8)))
    if blocks == 1:
        assert isinstance(found, Declined), describe_lists(found)
    else:
        assert not isinstance(found, Declined), found
        assert describe_lists(found) == f"layers x {blocks}"


def test_different_models_in_one_list_are_no_blocks() -> None:
    """An embedder and a transformer, in one list: the trunk is inside the second."""

    class Models(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleList([nn.Sequential(nn.Linear(6, 30), nn.SiLU(), nn.Linear(30, 8)), Stack()])

        def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.models[1](self.models[0](video), text)  # type: ignore[no-any-return]

    found = find_trunk(captured(Models(), torch.randn(1, 20, 6), torch.randn(1, 3, 8)))
    assert not isinstance(found, Declined), found
    assert describe_lists(found) == "models.1.layers x 3"


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=SLOW)])
def test_few_layers_beside_a_modulation(blocks: int, lower: str) -> None:
    """Two layers are the trunk; one is none, and the log and the journal say so."""
    model, inputs = zoo.FAMILIES["ernie_image"].build(num_layers=blocks), zoo.FAMILIES["ernie_image"].inputs(3)
    compiled = hvfast(model, fullgraph=True, options={"lower": lower})
    with torch.no_grad():
        error = relative_error(first(compiled(**inputs, return_dict=False)), first(model(**inputs, return_dict=False)))
    assert error < 1e-5
    (row, *_) = hvcompile.stats(compiled).journal[0]
    if blocks == 2:
        assert row.line().startswith("outline: layers x 2: ")
    else:
        assert "the largest, adaLN_modulation x 2, which does 3% of the graph's arithmetic" in row.line()
