"""Decoding by several ranks: the bits of the VAE's own tiling, whatever the ranks, the tiles and the VAE."""

from __future__ import annotations

import collections
import itertools
import threading
import types
from collections.abc import Callable
from typing import Any

import accelerate
import decoding_cases
import pytest
import ranks
import torch
from torch import nn

import hvcompile
from hvcompile.app.cli.display import tiles
from hvcompile.ranks import decoding
from hvcompile.ranks.seat import Replay, Share, on_meta
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
    first, own = ranks.results(ranks.launch(decoding_cases.failing, 2, "stop"))
    assert own == "KeyboardInterrupt: "
    assert first == "RunError: rank 1 was stopped before it decoded its tiles"


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
    for message in ranks.results(ranks.launch(decoding_cases.differing, 2, "weights")):
        assert message.startswith("the decoder of rank 1 has other weights than rank 0's")


class _Slots:
    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = 0

    def count(self) -> None:
        self.seen += 1


class _Decoder(nn.Module):
    num_calls = 0

    def __init__(self, act: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.act, self.seen = act, 0
        self.weight, self.kept = nn.Parameter(torch.ones(3)), [0]
        self.space, self.queue = types.SimpleNamespace(seen=0), collections.deque([0], maxlen=1)
        self.slots = _Slots()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, z: torch.Tensor, *more: Any) -> Any:
        return self.act(self, z)


def _scaled(self: Any, z: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = z * self.weight
    return scaled


def _counts(self: Any, z: torch.Tensor) -> Any:
    self.seen += 1
    return z * self.weight


def _changes(change: Callable[[Any, torch.Tensor], object]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """A decoder that does something beside its work."""

    def act(self: Any, z: torch.Tensor) -> torch.Tensor:
        change(self, z)
        return _scaled(self, z)

    return act


def _counts_list(self: Any, z: torch.Tensor) -> None:
    self.kept[0] += 1


def _counts_field(self: Any, z: torch.Tensor) -> None:
    self.space.seen += 1


def _assigns(self: Any, z: torch.Tensor) -> None:
    self.total = self.total + z.sum(0)


def _assigns_data(self: Any, z: torch.Tensor) -> None:
    self.total.data = self.total.data + z.sum(0)


def _drops(self: Any, z: torch.Tensor) -> None:
    self.total = None


SEEN: list[torch.Tensor] = []
ELSEWHERE = torch.ones(3, device="meta")
BY_SHAPE: dict[Any, torch.Tensor] = {}
Pair = collections.namedtuple("Pair", "first second")
NUMBERS = itertools.count()


def _reads_global(self: Any, z: torch.Tensor) -> torch.Tensor:
    SEEN.append(z * 1)
    return z + SEEN[0]


def _counts_class(self: Any, z: torch.Tensor) -> None:
    type(self).num_calls += 1


def _twice(self: Any, z: torch.Tensor) -> Any:
    made = z + 1
    return made, made[:1]


def _looks_up(self: Any, z: torch.Tensor) -> torch.Tensor:
    if z.shape not in BY_SHAPE:
        BY_SHAPE[z.shape] = torch.ones_like(z) * 2
    return z * BY_SHAPE[z.shape]


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_counts, "keeps something of a call"),
        (_changes(_counts_list), "keeps something of a call"),
        (_changes(_counts_field), "keeps something of a call"),
        (_changes(lambda self, z: self.queue.append(z.shape[0])), "keeps something of a call"),
        (_changes(_assigns), "keeps something of a call"),
        (_changes(_assigns_data), "keeps something of a call"),
        (_changes(_drops), "keeps something of a call"),
        (_changes(lambda self, z: self.total.add_(z.sum(0))), "writes into what it is given"),
        (_changes(lambda self, z: self.total.data.add_(z.sum(0))), "writes into what it is given"),
        (_changes(lambda self, z: self.slots.count()), "keeps something of a call"),
        (_changes(_counts_class), "changes something in a global, a closure or a class"),
        (_reads_global, "changes something in a global, a closure or a class"),
        (lambda self, z: z + ELSEWHERE, "reads a tensor that it was not given"),
        (lambda self, z: nn.functional.batch_norm(z, self.total, None, training=True), "writes into what it is given"),
        (_twice, "returns a tensor twice"),
        (lambda self, z: Pair(z + 1, z + 2), "returns a Pair"),
        (lambda self, z: z * next(NUMBERS), "does other things when it is called once more"),
        (lambda self, z: z.mul_(2), "writes into what it is given"),
        (lambda self, z: z[:1], "returns what it was given"),
        (lambda self, z: z + torch.randn_like(z), r"draws random numbers \(aten.randn_like"),
        (lambda self, z: [z + 1], "returns a list"),
        (lambda self, z: torch.zeros(3), "made elsewhere"),
    ],
)
def test_calls_that_depend_on_each_other_unseen(act: Any, reason: str) -> None:
    plan = Plan(on_meta(_Decoder(act)))
    with torch.no_grad(), pytest.raises(UnshareableError, match=reason):
        [plan(torch.ones(rows, 3)) for rows in (2, 1)]


def test_what_a_call_is_given() -> None:
    """Generators, filled caches, and what is made from two results are refused; what is handed on makes a chain."""
    plan, z = Plan(on_meta(_Decoder(_scaled))), torch.ones(2, 3)
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
        caches: tuple[Any, ...] = ([first], collections.OrderedDict())
        for cache in caches:
            with pytest.raises(UnshareableError, match=r"into a list or dict|a OrderedDict, which may carry"):
                plan(z, cache)
        with pytest.raises(UnshareableError, match="an earlier call's result"):
            plan(z, [torch.ones(1, device="meta")])
        plan(second)
    assert [call.chain for call in plan.calls] == [0, 1, 1]
    assert sorted(plan.owners(3)) == [0, 0, 1]


def test_attention_draws_nothing() -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    plan = Plan(on_meta(_Decoder(lambda self, z: attend(z, z, z))))
    with torch.no_grad():
        plan(torch.ones(1, 2, 8, 16))
        plan = Plan(on_meta(_Decoder(lambda self, z: attend(z, z, z, dropout_p=0.5))))
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
        accelerate.cpu_offload_with_hook(vae, execution_device="cpu")
        with torch.no_grad():
            vae.decode(decoding_cases.latents(1, 4, 1, 4, 7))
        assert (state.reason, state.num_tiles) == (None, 6)
        vae.decoder.up_blocks[0]._hf_hook = object()
        with torch.no_grad():
            vae.decode(decoding_cases.latents(1, 4, 1, 4, 7))
        assert state.reason == "up_blocks.0 of its decoder carries a hook that moves weights while it runs"
    assert "decode" not in vars(vae)


class _Toy(nn.Module):
    """A VAE of two tiles; ``act`` decodes with it."""

    def __init__(self, act: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.decoder, self.act, self.num_decoded = _Decoder(_scaled), act, 0
        self.register_buffer("num_steps", torch.zeros(1))

    def decode(self, z: Any, *, deeply: bool = False) -> Any:
        if deeply:
            return self.decode(z)
        self.num_decoded += 1
        return self.act(self, z)


def _joined(self: Any, z: torch.Tensor) -> torch.Tensor:
    return torch.cat([self.decoder(row[None]) for row in z])


def _sets(self: Any, z: torch.Tensor) -> torch.Tensor:
    self.decoder.scale = 2
    return _joined(self, z)


def _sets_below(self: Any, z: torch.Tensor) -> torch.Tensor:
    self.decoder.space.seen = z.shape[0]
    return _joined(self, z)


def _hands_on(self: Any, z: torch.Tensor) -> torch.Tensor:
    first = self.decoder(z[:1])
    first[:] = first * 2.0
    return torch.cat([first, self.decoder(first), self.decoder(z[1:])])


def _feeds(self: Any, z: torch.Tensor) -> torch.Tensor:
    z, made = z.clone(), []
    for row in range(len(z)):
        made.append(self.decoder(z[row : row + 1]))
        z[-1] += made[-1][0]
    return torch.cat(made)


def _steps(self: Any, z: torch.Tensor) -> torch.Tensor:
    self.num_steps += 1
    return _joined(self, z)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_joined, None),
        (_feeds, "writes a result of its decoder into another tensor"),
        (_steps, "writes into a tensor that was there before"),
        (lambda self, z: _joined(self, z) * self.decoder.weight, "reads what its decoder keeps"),
        (_sets, "decode sets 'scale' of its decoder"),
        (_sets_below, "keeps something of a call"),
        (_hands_on, "writes into a result of its decoder"),
        (lambda self, z: _joined(self, z.add_(1)), "writes into what it is given"),
        (lambda self, z: _joined(self, z + torch.rand_like(z)), "draws random numbers"),
    ],
)
def test_a_decode_that_is_not_what_it_seems(act: Any, reason: str | None) -> None:
    """It runs as without; what planning does, no one sees."""
    vae, z, told = _Toy(act), torch.randn(2, 3), []
    torch.manual_seed(0)
    with torch.no_grad():
        own = _Toy(act).decode(z.clone())
        torch.manual_seed(0)
        with hvcompile.share_decoding(vae, tell=lambda *step: told.append(step)) as state:
            assert torch.equal(vae.decode(z.clone()), own)
    assert reason is None if state.reason is None else str(reason) in state.reason
    assert vae.num_decoded == 1
    assert vae.num_steps == (act is _steps)
    assert told == ([(1, 2), (2, 2)] if reason is None else [])
    assert getattr(vae.decoder, "scale", None) == (2 if act is _sets else None)


def _looks_into_a_cache(self: Any, z: torch.Tensor) -> torch.Tensor:
    made = []
    for row in range(0, len(z), 2):
        cache: dict[str, torch.Tensor] = {}
        made += [self.decoder(z[row : row + 1], cache), self.decoder(z[row + 1 : row + 2], cache) * len(cache)]
        cache.pop("last")
    return torch.cat(made)


@torch.no_grad()
def test_a_cache_of_another_rank() -> None:
    """A decode that looks into what its decoder's calls left finds it there, whichever rank made it."""

    class Caching(_Decoder):
        def forward(self, z: torch.Tensor, *more: Any) -> Any:
            last, more[0]["last"], more[0]["all"] = more[0].get("last", z), z * 2, [z * 3]
            return z + last

    vae, z, made = _Toy(_looks_into_a_cache), torch.randn(6, 3), dict[int, list[torch.Tensor]]()
    vae.decoder = Caching(_scaled)
    own, plan = vae.decode(z), Plan(on_meta(vae.decoder))
    decoding._run(vae, plan, (z,), {})
    for rank in range(2):
        share = Share(plan, vae.decoder, [0, 0, 1, 1, 0, 0], rank, None, made)
        with share.shapes:
            decoding._run(vae, share, (z,), {})
    assert torch.equal(decoding._run(vae, Replay(plan, made), (z,), {}), own)


@torch.no_grad()
def test_what_planning_leaves_elsewhere() -> None:
    """Nothing in a global, and nothing in a closure; what decode returns beside the video is not lost."""
    count, z = [0], torch.randn(2, 3)
    for act in (_looks_up, _changes(lambda self, z: count.append(len(count)))):
        vae = _Toy(_joined)
        vae.decoder.act = act
        own = vae.decode(z)
        BY_SHAPE.clear()
        count[:] = [0]
        with hvcompile.share_decoding(vae, tell=lambda *_: None) as state:
            assert torch.equal(vae.decode(z), own)
        assert str(state.reason).startswith(
            ("its decoder changes something in a global", "its decoder keeps something")
        )
    assert count == [0, 1, 2]
    assert not any(tensor.is_meta for tensor in BY_SHAPE.values())
    vae = _Toy(lambda self, z: (_joined(self, z), 5))
    with hvcompile.share_decoding(vae, tell=lambda *_: None) as state:
        assert vae.decode(z)[1] == 5
    assert state.reason == "decode returns a tuple of which more than the video is to be sent"


@torch.no_grad()
def test_calls_of_decode() -> None:
    """Of itself, in another form, and by two threads."""
    vae, z = _Toy(_joined), torch.randn(2, 3)
    with hvcompile.share_decoding(vae, tell=lambda *_: None) as state:
        assert torch.equal(vae.decode(z, deeply=True), z)
        assert (state.reason, state.num_tiles) == (None, 2)
        with pytest.raises(TypeError, match="string indices"):
            vae.decode({"latents": z})
        assert state.reason == "decode is given a dict, where tensors and numbers are foreseen"
        entered, leave = threading.Event(), threading.Event()

        def waits(self: Any, z: torch.Tensor) -> torch.Tensor:
            if not z.is_meta:
                entered.set()
                leave.wait(10)
            return z * 1

        vae.decoder.act = waits
        thread = threading.Thread(target=torch.no_grad()(lambda: vae.decode(z)))
        thread.start()
        assert entered.wait(10)
        with pytest.raises(hvcompile.InputError, match="another thread decodes"):
            vae.decode(z)
        leave.set()
        thread.join()


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
