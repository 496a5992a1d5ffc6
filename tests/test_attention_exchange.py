"""Attention whose keys travel: its parts, their merging, and what the ranks exchange, against attention to all keys.

The ranks are threads of this process, which hand each other tensors where the real ones would send them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hvcompile.graph.attention_kernels import merge, scaled_dot_product_attention_with_lse
from hvcompile.ranks.split import Layout, Segment, Split, localise
from hvcompile.rewriting.sharding.exchange import Heads, Mask, Ring
from hvcompile.torch_private import distributed, fakes

BATCH, HEADS, SIZE = 2, 4, 8
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def oracle(query: Any, key: Any, value: Any, mask: Any = None, scale: float | None = None) -> Any:
    """Attention in float64; 0 where a query may see no key."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num(0.0) @ value.double()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def mask_of(kind: str, queries: int, keys: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """A random mask; of the kinds that say so, one that keeps the first query, or the whole second sample, from all."""
    if kind == "none":
        return None
    shapes = {"keys": (BATCH, 1, 1, keys), "all": (BATCH, HEADS, queries, keys), "two": (queries, keys)}
    shapes |= {"heads": (1, HEADS, 1, keys), "rows": (BATCH, 1, queries, 1), "hidden": (BATCH, 1, 1, keys)}
    mask = torch.rand(shapes.get(kind, (BATCH, 1, 1, keys))) < 0.6
    mask[..., :1] |= kind in {"keys", "heads"}
    if kind == "all":
        mask[:, :, 0] = False
    if kind == "hidden":
        mask[1] = False
    if kind in {"additive", "infinite"}:
        return torch.where(mask, 0.0, -math.inf if kind == "infinite" else -1e4).to(dtype)
    return mask


KINDS = ["none", "keys", "heads", "all", "two", "rows", "hidden", "additive", "infinite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_merged_parts_are_the_whole(kind: str, dtype: torch.dtype) -> None:
    """Three parts of uneven length, one key in the last; a part all of whose keys are masked adds nothing, and no NaN.

    The scale is not the usual one. Values of another head size than the keys take the plain kernel.
    """
    torch.manual_seed(0)
    for size in (SIZE, 2 * SIZE):
        query, key = (draw(BATCH, HEADS, length, SIZE, dtype=dtype) for length in (5, 9))
        value = draw(BATCH, HEADS, 9, size, dtype=dtype)
        mask = mask_of(kind, 5, 9, dtype)
        if mask is not None and kind == "keys":
            mask[0, ..., 4:8] = False
        parts = []
        for start, stop in ((0, 4), (4, 8), (8, 9)):
            cut = mask if mask is None or mask.shape[-1] == 1 else mask[..., start:stop]
            parts.append(
                scaled_dot_product_attention_with_lse(
                    query, key[:, :, start:stop], value[:, :, start:stop], cut, scale=0.3
                )
            )
        assert all(lse.dtype == torch.promote_types(dtype, torch.float32) for _, lse in parts)
        merged = merge(parts, dtype)
        assert merged.dtype == dtype
        assert bool(merged.isfinite().all())
        expected = oracle(query, key, value, mask, 0.3)
        torch.testing.assert_close(merged.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("kernel", ["auto", "math"])
@pytest.mark.parametrize("has_mask", [False, True])
def test_traced_for_a_number_of_keys_that_is_not_known(kernel: str, has_mask: bool) -> None:
    """Also for values of another head size, which take the plain kernel."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        query, key, value, long = (torch.empty(BATCH, HEADS, 9, size) for size in (SIZE, SIZE, SIZE, 2 * SIZE))
        mask = torch.empty(BATCH, 1, 1, 9, dtype=torch.bool)
    length = fakes.unbacked_size(mode, 2, 9)
    for held in (value, long):
        given = (query, key.narrow(2, 0, length), held.narrow(2, 0, length))
        out, lse = scaled_dot_product_attention_with_lse(
            *given, mask.narrow(3, 0, length) if has_mask else None, kernel=kernel
        )
        assert (tuple(out.shape), tuple(lse.shape)) == ((BATCH, HEADS, 9, held.shape[3]), (BATCH, HEADS, 9))


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_a_mask_that_is_finite_until_it_is_cast(kernel: str) -> None:
    """fp32's least value is minus infinity in bf16, so the second part sees no key."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 16, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.zeros(1, 1, 1, 6)
    mask[..., 3:] = torch.finfo(torch.float32).min
    parts = [
        scaled_dot_product_attention_with_lse(
            query, key[:, :, place], value[:, :, place], mask[..., place], kernel=kernel
        )
        for place in (slice(0, 3), slice(3, 6))
    ]
    expected = oracle(query, key[:, :, :3], value[:, :, :3])
    tolerance = TOLERANCES[torch.bfloat16]
    torch.testing.assert_close(merge(parts, torch.bfloat16).double(), expected, rtol=tolerance, atol=tolerance)


def test_large_scores_and_what_is_not_a_number() -> None:
    """Log-sum-exps far apart do not overflow; a NaN is not taken for a masked key."""
    torch.manual_seed(0)
    query, key, value = (draw(1, 1, 6, SIZE) for _ in range(3))
    key[:, :, 3:] *= 300
    parts = [
        scaled_dot_product_attention_with_lse(query, key[:, :, at : at + 3], value[:, :, at : at + 3]) for at in (0, 3)
    ]
    torch.testing.assert_close(merge(parts, torch.float32).double(), oracle(query, key, value), rtol=1e-4, atol=1e-4)
    key[:, :, 4] = math.nan
    parts = [
        scaled_dot_product_attention_with_lse(query, key[:, :, at : at + 3], value[:, :, at : at + 3]) for at in (0, 3)
    ]
    assert bool(merge(parts, torch.float32).isnan().all())


class Threads:
    """Ranks of one group as threads, in place of those of ``torch_private.distributed``."""

    def __init__(self, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranks, self.here = ranks, threading.local()
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.board: dict[int, tuple[torch.Tensor, list[int]]] = {}
        self.sent = [0] * ranks
        monkeypatch.setattr(distributed, "process_group", lambda _: self)
        monkeypatch.setattr(distributed, "all_to_all", self.all_to_all)
        monkeypatch.setattr(distributed, "wait", lambda moving: moving)

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.here.rank  # type: ignore[no-any-return]

    def all_to_all(self, tensor: torch.Tensor, taken: Any, given: Any, group: str) -> torch.Tensor:
        rank = self.rank()
        assert tensor.is_contiguous()
        assert sum(given) == tensor.shape[0]
        self.sent[rank] += 1
        self.board[rank] = (tensor, list(given))
        self.barrier.wait()
        pieces = [torch.split(held, rows)[rank] for held, rows in (self.board[other] for other in range(self.ranks))]
        assert [len(piece) for piece in pieces] == list(taken)
        self.barrier.wait()
        return torch.cat(pieces)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def of(rank: int) -> Any:
            self.here.rank = rank
            try:
                return function(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with concurrent.futures.ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(of, range(self.ranks)))


@dataclasses.dataclass(frozen=True)
class Case:
    """So many ranks in so many rows, tokens, and how many tokens that all have lie before and after them."""

    ranks: int
    ring: int
    length: int
    around: tuple[int, int] = (0, 3)
    kind: str = "none"
    is_query_whole: bool = False
    value_size: int = SIZE
    dtype: torch.dtype = torch.float32


CASES = [
    Case(2, 2, 7),
    Case(2, 2, 2, kind="keys"),
    Case(4, 2, 13, kind="keys"),
    Case(4, 2, 13, kind="all"),
    Case(4, 4, 5, kind="hidden"),  # the last rank holds padding alone
    Case(4, 2, 5, kind="two"),
    Case(8, 4, 9, kind="heads"),
    Case(6, 3, 17, (2, 3), kind="all"),
    Case(6, 3, 17, (3, 0), kind="infinite"),
    Case(6, 3, 4, (0, 0), kind="rows"),
    Case(4, 2, 13, kind="all", is_query_whole=True),
    Case(3, 3, 7, kind="keys", is_query_whole=True),
    Case(4, 2, 13, kind="additive", value_size=16),
    Case(4, 2, 13, kind="keys", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_together_attend_as_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's queries get what they get from all keys; tokens that all ranks have get the same bits on each."""
    torch.manual_seed(0)
    before, after = case.around
    segments = [Segment(0, before, False), Segment(0, case.length, True), Segment(0, after, False)]
    layout = Layout(2, tuple(item for item in segments if item.stop))
    total, dtype = layout.total, case.dtype
    num_queries = 5 if case.is_query_whole else total
    query, key = (draw(BATCH, HEADS, length, SIZE, dtype=dtype) for length in (num_queries, total))
    value, mask = draw(BATCH, HEADS, total, case.value_size, dtype=dtype), mask_of(case.kind, num_queries, total, dtype)
    layouts = {"query": None if case.is_query_whole else layout, "key": layout, "value": layout}
    shapes = dict.fromkeys(("query", "key"), (HEADS, SIZE)) | {"value": (HEADS, case.value_size)}
    threads = Threads(case.ranks, monkeypatch)

    def one(rank: int) -> torch.Tensor:
        split = Split(group="threads", rank=rank, ranks=case.ranks, length=case.length, ring=case.ring)
        heads, held = Heads(split, layouts, shapes), {"query": query, "key": key, "value": value}
        for name, tokens in held.items():
            if layouts[name] is not None:
                held[name] = localise(tokens, split=split, layout=layout, ndim=4)
        cut = None
        if mask is not None:
            held["attn_mask"] = mask
            cut = Mask(split, layouts["query"], layout, tuple(mask.shape), heads.ours("query"))
        return Ring(heads, cut, 0.3, dtype).attend(**held)["attended"]  # type: ignore[no-any-return]

    found, expected = threads.run(one), oracle(query, key, value, mask, 0.3)
    is_one_message = case.value_size == SIZE
    exchanges = 0 if case.ranks == case.ring else 2 if is_one_message else 3
    assert threads.sent == [exchanges + (case.ring - 1) * (1 if is_one_message else 2)] * case.ranks
    local = Split(group="threads", rank=0, ranks=case.ranks, length=case.length).local
    joined = found[0]
    if not case.is_query_whole:
        own = torch.cat([part.narrow(2, before, local) for part in found], dim=2).narrow(2, 0, case.length)
        head, tail = (
            [part.narrow(2, at, size) for part in found] for at, size in ((0, before), (before + local, after))
        )
        assert all(torch.equal(part, parts[0]) for parts in (head, tail) for part in parts)
        joined = torch.cat([head[0], own, tail[0]], dim=2)
    assert all(torch.equal(part, found[0]) for part in found) or not case.is_query_whole
    torch.testing.assert_close(joined.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
