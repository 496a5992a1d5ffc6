"""Decoding by several ranks: the bits of the VAE's own tiling, whatever the ranks, the tiles and the VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import decoding_cases
import pytest
import ranks
import torch
from torch import nn

import hvcompile
from hvcompile.app.cli.display import tiles
from hvcompile.ranks.tile_calls import Plan, UnshareableError


@pytest.mark.parametrize(("num_ranks", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "float32")])
def test_the_bits_of_tiling(num_ranks: int, dtype: str) -> None:
    """Nine tiles, six in each of three stretches of frames, two tiles, and one, which nobody shares."""
    shapes = [(1, 4, 1, 7, 7), (2, 4, 3, 4, 7), (1, 4, 1, 5, 3), (1, 4, 1, 4, 4)]
    found = ranks.results(ranks.launch(decoding_cases.decoded, num_ranks, "hunyuan", shapes, dtype))
    for rank, one in enumerate(found):
        assert all(item["equal"] and not item["left"] and not item["nan"] for item in one), (rank, one)
        for item in one:
            assert item["told"] == [(done + 1, item["own"]) for done in range(item["own"])]
    for number, item in enumerate(found[0]):
        total = sum(one[number]["own"] for one in found)
        is_shared = num_ranks > 1 and item["tiles"] > 1
        assert total == (item["tiles"] if is_shared else item["tiles"] * num_ranks)
        assert (item["reason"] is None) == (item["tiles"] > 1)
    assert [item["tiles"] for item in found[0]] == [9, 3 * 6, 2, 1]


@pytest.mark.parametrize(("name", "chains"), [("wan", 9), ("cogvideox", 9)])
def test_a_cache_stays_with_its_tile(name: str, chains: int) -> None:
    """Frames of a tile follow each other on one rank, with the cache that the VAE hands on."""
    shape = (1, 4, 3, 7, 7) if name == "wan" else (1, 4, 5, 7, 7)
    found = ranks.results(ranks.launch(decoding_cases.decoded, 2, name, [shape]))
    assert all(one[0]["equal"] and one[0]["reason"] is None for one in found)
    calls = found[0][0]["tiles"] // chains
    assert [one[0]["own"] for one in found] == [5 * calls, 4 * calls]


def test_generate_shares_its_decoding() -> None:
    """Two ranks that each compute every step: the clip is the one that either would decode alone."""
    first, second = ranks.results(ranks.launch(decoding_cases.generated, 2))
    assert first == second
    assert first == {"equal": True, "notes": (), "last": "decoding 2 of 2 tiles"}


def test_a_rank_that_fails() -> None:
    """The others are told which, at once; the failing one keeps its own error."""
    first, own, third = ranks.results(ranks.launch(decoding_cases.failing, 3, "raise"))
    assert own == "MemoryError: no memory is left"
    assert first == third == "RunError: rank 1 failed while it decoded its tiles: MemoryError: no memory is left"


def test_a_rank_that_is_gone() -> None:
    ended = ranks.launch(decoding_cases.failing, 2, "die", group_timeout=20)
    assert ended[0].result.startswith("DisagreementError: the ranks could not share the decoding, one of them is gone")


def test_latents_that_differ() -> None:
    """Of another size they are refused; in other values, the first rank's count."""
    for message in ranks.results(ranks.launch(decoding_cases.differing, 2, "size")):
        assert "rank 1: [((1, 4, 1, 8, 7), 'torch.float32')]" in message
    assert ranks.results(ranks.launch(decoding_cases.differing, 2, "values")) == [True, True]
    for message in ranks.results(ranks.launch(decoding_cases.differing, 2, "tiles")):
        assert message.startswith("the ranks decode other tiles")


class _Decoder(nn.Module):
    def __init__(self, act: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.act, self.seen = act, 0
        self.weight, self.kept = nn.Parameter(torch.ones(3)), [0]
        self.register_buffer("total", torch.zeros(3))

    def forward(self, z: torch.Tensor, *more: Any) -> Any:
        return self.act(self, z)


def _scaled(self: Any, z: torch.Tensor) -> Any:
    return z * self.weight


def _counts(self: Any, z: torch.Tensor) -> Any:
    self.seen += 1
    return z * self.weight


def _lists(self: Any, z: torch.Tensor) -> Any:
    self.kept[0] += 1
    return z * self.weight


def _sums(self: Any, z: torch.Tensor) -> Any:
    self.total.add_(z.sum(0))
    return z * self.weight


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_counts, "keeps something of a call"),
        (_lists, "keeps something of a call"),
        (_sums, "writes into what it is given"),
        (lambda self, z: z.mul_(2), "writes into what it is given"),
        (lambda self, z: z[:1], "returns what it was given"),
        (lambda self, z: z + torch.randn_like(z), r"draws random numbers \(aten.randn_like"),
        (lambda self, z: [z + 1], "returns a list"),
        (lambda self, z: torch.zeros(3), "made elsewhere"),
    ],
)
def test_calls_that_depend_on_each_other_unseen(act: Any, reason: str) -> None:
    with torch.no_grad(), pytest.raises(UnshareableError, match=reason):
        Plan(_Decoder(act))(torch.ones(2, 3))


def test_what_a_call_is_given() -> None:
    """Generators, filled caches, and what is made from two results are refused; what is handed on makes a chain."""
    plan, z = Plan(_Decoder(_scaled)), torch.ones(2, 3)
    with torch.no_grad():
        first, second = plan(z), plan(z, None, 1, "text")
        for given, reason in {
            torch.Generator(): "a Generator, which may carry",
            (first + second,): "made from an earlier call's result",
        }.items():
            with pytest.raises(UnshareableError, match=reason):
                plan(z, given)
        with pytest.raises(UnshareableError, match="filled before"):
            plan(z, {"cache": z})
        with pytest.raises(UnshareableError, match="several others"):
            plan(first, second)
        with pytest.raises(UnshareableError, match="an earlier call's result"):
            plan(z, [torch.ones(1, device="meta")])
        plan(second)
    assert [call.chain for call in plan.calls] == [0, 1, 1]
    assert sorted(plan.owners(3)) == [0, 0, 1]


def test_attention_draws_nothing() -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    plan = Plan(_Decoder(lambda self, z: attend(z, z, z)))
    with torch.no_grad():
        plan(torch.ones(1, 2, 8, 16))
        plan = Plan(_Decoder(lambda self, z: attend(z, z, z, dropout_p=0.5)))
        with pytest.raises(UnshareableError, match="draws random numbers"):
            plan(torch.ones(1, 2, 9, 16))


def test_a_vae_that_can_not_be_shared() -> None:
    with (
        pytest.raises(hvcompile.InputError, match="no decode with a decoder"),
        hvcompile.share_decoding(nn.Linear(1, 1)),
    ):
        pass
    vae = decoding_cases.hunyuan()
    with hvcompile.share_decoding(vae, tell=lambda *_: None) as state:
        with pytest.raises(hvcompile.InputError, match="replaced already"), hvcompile.share_decoding(vae):
            pass
        vae.decode(decoding_cases.latents(1, 4, 1, 4, 7))
        assert "gradients" in str(state.reason)
        with torch.inference_mode():
            vae.decode(decoding_cases.latents(1, 4, 1, 4, 7))
        assert state.reason is None
        assert state.num_tiles == 6
        vae.decoder.up_blocks[0]._hf_hook = object()
        with torch.no_grad():
            vae.decode(decoding_cases.latents(1, 4, 1, 4, 7))
        assert state.reason == "up_blocks.0 of its decoder carries a hook that moves weights while it runs"
    assert "decode" not in vars(vae)


def test_nan_stays_in_its_place() -> None:
    """A pixel that is not a number spreads no further than the VAE itself spreads it."""
    vae, z = decoding_cases.hunyuan(), decoding_cases.latents(1, 4, 1, 7, 7)
    z[..., 0, 0] = torch.nan
    with torch.no_grad():
        own = vae.decode(z).sample
        with hvcompile.share_decoding(vae, tell=lambda *_: None):
            shared = vae.decode(z).sample
    assert own.isnan().any()
    assert not own.isnan().all()
    assert torch.equal(own.isnan(), shared.isnan())


def test_a_compiled_decoder() -> None:
    """Compiled, it is shared as it is: planning compiles nothing, and each shape of tiles has one graph."""
    vae, z = decoding_cases.hunyuan(), decoding_cases.latents(1, 4, 1, 7, 7)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([item.shape for item in inputs])
        return graph.forward

    with torch.no_grad():
        own = vae.decode(z).sample
        vae.decoder.compile(backend=backend, dynamic=False)
        with hvcompile.share_decoding(vae, tell=lambda *_: None) as state:
            shared = vae.decode(z).sample
    assert torch.equal(own, shared)
    assert (len(graphs), state.num_tiles) == (4, 9)  # whole tiles, those of the right, of the lower edge, the corner


def test_the_bar() -> None:
    assert tiles("decoding 1 of 4 tiles") == "decoding █··· 1/4 tiles"
    assert tiles("decoding 64 of 64 tiles") == f"decoding {'█' * 32} 64/64 tiles"
    assert tiles("decoding") == "decoding"
