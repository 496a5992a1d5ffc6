"""The pass that skips blocks of keys: against a dense computation under the same mask, written as loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import golden
import grids
import pytest
import torch
import zoo
from grids import WIDTH, GridToy, blocks_of, dense_under, grid_inputs, is_in_window, line_of, mask_by
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import nn
from trunks import recovered

import hvcompile
from hvcompile import journal, pipeline
from hvcompile.errors import OptionError
from hvcompile.graph import block_lists, tiles
from hvcompile.graph.block_sparse import attend_in_blocks
from hvcompile.graph.flops import ATTENTION, FlopCounter
from hvcompile.graph.nodes import op_name
from hvcompile.journal import JournalRow
from hvcompile.passes import sparse_attention
from hvcompile.passes.sparse_attention import SparseAttention
from hvcompile.passes.unmasked_attention import UnmaskedAttention
from hvcompile.pipeline import Context
from hvcompile.trunk.trunk import Trunk

NO_CACHE = {"first_block_cache": False}
ALL = {"rule": "window", "window": (99, 99, 99)}
GRIDS: list[tuple[tuple[int, int, int], tuple[int, int, int]]] = [
    ((4, 4, 4), (2, 2, 2)),  # tiles divide it
    ((5, 3, 7), (2, 2, 3)),  # along no axis
    ((1, 5, 6), (2, 2, 3)),  # a single frame
    ((7, 1, 5), (2, 1, 2)),
]


def compiled(model: nn.Module, options: Any, **others: Any) -> Any:
    return hvfast(model, fullgraph=True, options={"lower": "eager", **NO_CACHE, "sparse_attention": options, **others})


def row_of(fast: Any, graph: int = 0) -> JournalRow:
    return next(row for row in hvcompile.stats(fast).journal[graph] if row.name == "SparseAttention")


def applied(trunk: Trunk, **fields: Any) -> JournalRow:
    rows: list[journal.JournalRow] = []
    passes = [(UnmaskedAttention(hoist=False), False), (SparseAttention(**fields), False)]
    pipeline.run(trunk, passes, lambda *_: None, rows)
    return rows[-1]


def is_in_band(grid: tuple[int, ...], tile: tuple[int, ...], width: float) -> Any:
    """The radial rule, tile by tile: half the width at twice the distance, then one tile of fewer and fewer frames."""
    counts = [-(-size // step) for size, step in zip(grid, tile, strict=True)]

    def reads(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
        apart = abs(first[0] - second[0])
        halvings = int(math.log2(apart)) if apart else 0
        places = [at[1] * counts[2] + at[2] for at in (first, second)]
        band = width * counts[1] * counts[2] / 2**halvings
        every = math.ceil(1 / band) if band < 1 else 1
        return second[0] == 0 or (abs(places[0] - places[1]) < max(band, 1) and apart % every == 0)

    return reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [64, 61, 5])
def test_the_operator(tokens: int, dtype: torch.dtype) -> None:
    """Against a plain softmax in float64, lists that differ by sample and head, blocks of queries that read nothing."""
    torch.manual_seed(tokens)
    block, heads, batch = 16, 3, 2
    query, key, value = (torch.randn(batch, heads, tokens, 8, dtype=dtype) for _ in range(3))
    count = -(-tokens // block)
    mask = torch.rand(batch, heads, count, count) < 0.5
    mask[0, 0, 0] = False
    indices, counts = tiles.lists_of(mask)
    out, lse = attend_in_blocks(query, key, value, indices, counts, block, 0.3, 0)
    fine = mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :tokens, :tokens]
    scores = (query.double() @ key.double().mT * 0.3).masked_fill(~fine, -math.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ value.double()
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert out.dtype == dtype
    assert (out - expected).abs().max() < bound
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=bound, rtol=bound)
    assert lse.isinf().sum() == (~fine).all(-1).sum()


def test_the_operator_as_torch_checks_it() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 37, 8) for _ in range(3))
    indices, counts = tiles.lists_of(torch.rand(1, 1, 3, 3) < 0.7)
    torch.library.opcheck(attend_in_blocks, (query, key, value, indices, counts, 16, 0.3, 100))
    gathered = attend_in_blocks(query, key, value, indices, counts, 16, 0.3, 100)[0]
    turned: Any = [item.transpose(1, 2).contiguous().transpose(1, 2) for item in (query, key, value)]
    assert torch.equal(attend_in_blocks(*turned, indices, counts, 16, 0.3, 100)[0], gathered)


@pytest.mark.parametrize(("grid", "tile"), [*GRIDS, ((9, 4, 6), (1, 2, 2)), ((33, 2, 2), (1, 1, 1))])
def test_masks_of_the_rules(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    """Token by token what loops over tiles say; and the number of pairs."""
    order = tiles.tile_order(grid, tile)
    assert order.sort().values.equal(torch.arange(math.prod(grid)))
    block = math.prod(tile)
    for mask, reads in (
        (tiles.window_mask(grid, tile, (3, 1, 3)), is_in_window(grid, tile, (3, 1, 3))),
        (tiles.radial_mask(grid, tile, 1.0), is_in_band(grid, tile, 1.0)),
        (tiles.radial_mask(grid, tile, 0.3), is_in_band(grid, tile, 0.3)),
    ):
        fine = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)[: len(order), : len(order)]
        back = order.argsort()
        expected = mask_by(grid, tile, reads)
        assert fine[back][:, back].equal(expected)
        assert tiles.num_reads(mask, block, len(order)) == expected.sum()
        assert mask.diagonal().all()


@pytest.mark.parametrize(
    ("grid", "tile", "order"),
    [*((*sizes, "video|text") for sizes in GRIDS), (*GRIDS[1], "text|video"), (*GRIDS[2], "video")],
)
def test_against_the_same_mask(grid: Any, tile: Any, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any density, a batch of two: within 1e-5 of a plain softmax under the mask in float64."""
    model, inputs = GridToy(order), grid_inputs(grid, seed=3, batch=2)
    fast = compiled(model, {"rule": "window", "tile": tile, "window": (1, 3, 1)})
    mask = mask_by(grid, tile, is_in_window(grid, tile, (1, 3, 1)))
    expected = dense_under(model, inputs, mask, order, monkeypatch)
    with torch.no_grad():
        assert relative_error(fast(**inputs), expected) < 1e-5
        assert mask.all() or relative_error(model(**inputs), expected) > 1e-3
    assert f"{mask.float().mean():.1%} of the video's pairs" in row_of(fast).line()


@pytest.mark.parametrize("order", ["video|text", "text|video", "video"])
def test_density_one_is_dense(order: str) -> None:
    model = GridToy(order)
    grid, tile = GRIDS[1]
    fast = compiled(model, {**ALL, "tile": tile})
    for seed in range(2):
        inputs = grid_inputs(grid, seed)
        with torch.no_grad():
            assert relative_error(fast(**inputs), model(**inputs)) < 1e-5


def test_radial(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, tile = (9, 4, 6), (1, 2, 2)
    model, inputs = GridToy(), grid_inputs(grid, seed=5)
    fast = compiled(model, {"rule": "radial", "tile": tile, "width": 0.5})
    mask = mask_by(grid, tile, is_in_band(grid, tile, 0.5))
    assert mask.float().mean() < 0.6
    with torch.no_grad():
        found = fast(**inputs)
    assert relative_error(found, dense_under(model, inputs, mask, "video|text", monkeypatch)) < 1e-5


@pytest.mark.parametrize("valid", [2, 5])
def test_padding_that_became_shorter_keys(valid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, tile = (3, 3, 5), (2, 2, 2)
    model, inputs = GridToy(), grid_inputs(grid, seed=valid, batch=2)
    count = math.prod(grid)
    keep = torch.arange(count + 5) < torch.tensor([count + valid, count + 3])[:, None]
    fast = compiled(model, {"rule": "window", "tile": tile, "window": (1, 1, 1)})
    mask = mask_by(grid, tile, is_in_window(grid, tile, (1, 1, 1)))
    expected = dense_under(model, inputs | {"keep": keep}, mask, "video|text", monkeypatch)
    with torch.no_grad():
        assert relative_error(fast(**inputs, keep=keep), expected) < 1e-5
    assert len(hvcompile.stats(fast).journal) == 1


def masks_to_decline(count: int) -> dict[str, torch.Tensor]:
    hole = torch.ones(1, count + 5, dtype=torch.bool)
    hole[0, count + 1] = False
    hidden = torch.arange(count + 5)[None] < count - 4
    one = torch.arange(count + 5)[None] < count + 1
    return {"a hole": hole, "one valid text token": one, "tokens of the sample hidden": hidden}


@pytest.mark.parametrize("kind", ["a hole", "one valid text token", "tokens of the sample hidden"])
def test_masks_that_run_densely(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Such a call runs the graph with its mask, reads everything, and the journal says why."""
    grid = (3, 2, 4)
    model, inputs = GridToy(), grid_inputs(grid)
    keep = torch.ones(1, math.prod(grid) + 5, dtype=torch.bool)
    fast = compiled(model, {"rule": "window", "tile": (2, 2, 2), "window": (1, 1, 1)})
    with torch.no_grad():
        fast(**inputs, keep=keep)
        keep = masks_to_decline(math.prod(grid))[kind]
        assert relative_error(fast(**inputs, keep=keep), model(**inputs, keep=keep)) < 1e-5
    reasons = [why for row in hvcompile.stats(fast).journal[1] for _, why in row.report.declined]
    assert any("valid keys" in why for why in reasons)
    assert any("it has a mask" in why for why in reasons)


@pytest.mark.parametrize("place", ["sample", "text"])
def test_nan_goes_where_it_does_in_a_dense_computation(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, tile = (4, 4, 4), (2, 2, 2)
    model, inputs = GridToy(blocks=2), grid_inputs(grid, seed=1)
    inputs[place].view(-1)[3] = torch.nan
    fast = compiled(model, {"rule": "window", "tile": tile, "window": (1, 1, 1)})
    mask = mask_by(grid, tile, is_in_window(grid, tile, (1, 1, 1)))
    with torch.no_grad():
        found = fast(**inputs)
    expected = dense_under(model, inputs, mask, "video|text", monkeypatch)
    assert expected.isnan().any()
    assert found.isnan().equal(expected.isnan())


OTHERS = (
    *("wan_ti2v", "wan_i2v", "wan_vace", "wan_animate", "hunyuan_video_i2v_replace", "hunyuan_video_i2v_concat"),
    *("helios", "anyflow", "kandinsky5", "kandinsky6", "motif_video", "easyanimate", "consisid", "allegro"),
    *("cogvideox_i2v", "chronoedit"),
)


@pytest.mark.parametrize(
    "name", ["hunyuan_video", "wan_t2v", "cogvideox", *(pytest.param(name, marks=SLOW) for name in OTHERS)]
)
def test_models(name: str) -> None:
    """Density 1 is the model, token by token; the grid is that of its patches."""
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs(seed=2)
    fast = compiled(model, {**ALL, "tile": (2, 1, 2)})
    with torch.no_grad():
        error = relative_error(first(fast(**inputs, return_dict=False)), first(model(**inputs, return_dict=False)))
    assert error < 1e-5
    assert ("2x2x3" if name == "cogvideox_i2v" else "3x2x3") + " (frames x height x width)" in row_of(fast).line()


class Before(nn.Module):
    """A block that changes its stream before it computes."""

    def __init__(self, block: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.block, self.change = block, change

    def forward(self, hidden: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = self.block(self.change(hidden * 1, others[1]), *others)
        return result


def _scaled_first_frame(hidden: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    hidden[:, :24].mul_(2.0)
    return hidden


def _relu_of_some(hidden: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    nn.functional.relu(hidden[:, 24:], inplace=True)
    return hidden


def _table_that_changes(hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    table = torch.arange(hidden.shape[1])[:, None] * 0.01 * (1 + time[:, None])
    hidden = hidden + table
    table[:, 0] = 7.0
    return hidden + table


def _into_a_whole(hidden: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    total = torch.ones(1, hidden.shape[1], WIDTH)
    total.mul_(hidden)
    return hidden + total.mean(1, keepdim=True)


@pytest.mark.parametrize("change", [_scaled_first_frame, _relu_of_some, _table_that_changes, _into_a_whole])
def test_writes_that_a_copy_would_not_see_are_refused(change: Any) -> None:
    model = GridToy()
    model.blocks = nn.ModuleList(Before(block, change) for block in model.blocks)
    with torch.no_grad(), pytest.raises(Exception, match="it writes"):
        compiled(model, ALL)(**grid_inputs((4, 4, 6)))


def _flat(patches: torch.Tensor) -> torch.Tensor:
    return patches.flatten(2).transpose(1, 2)


MOVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shuffled": lambda patches: _flat(patches)[:, torch.arange(patches[0, 0].numel()).flip(0)],
    "frames by index": lambda patches: _flat(patches[:, :, [1, 0, 3, 2]]),
    "height first": lambda patches: _flat(patches.permute(0, 1, 3, 4, 2)),
    "width first": lambda patches: _flat(patches.permute(0, 1, 4, 3, 2)),
}


@pytest.mark.parametrize("how", MOVED)
def test_tokens_in_another_order_are_a_reason(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "in_tokens", MOVED[how])
    with torch.no_grad(), pytest.raises(Exception, match="the tokens' grid can't be found from the graph"):
        compiled(GridToy(), ALL)(**grid_inputs((4, 4, 6)))


class Controlled(GridToy):
    """Takes another video beside the sample, whose tokens come first."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, keep: Any = None) -> Any:
        control = keep
        hidden = torch.cat([grids.in_tokens(self.patch(item)) for item in (control, sample)], dim=1)
        table = torch.ones(hidden.shape[1], WIDTH // 2)
        for block in self.blocks:
            hidden, text = block(hidden, text, self.time(timestep[:, None].expand(-1, WIDTH)), table, None)
        return self.head(hidden)[:, sample[0, 0].numel() // 4 :].unflatten(1, (4, 4, 6))


def test_two_inputs_that_are_alike_are_a_reason() -> None:
    inputs = grid_inputs((4, 4, 6))
    with torch.no_grad(), pytest.raises(Exception, match="are alike: which is the sample is not known"):
        compiled(Controlled(), ALL)(**inputs, keep=torch.randn_like(inputs["sample"]))


@torch.no_grad()
def test_autocast_is_computed_densely() -> None:
    """Its operands differ in dtype."""
    model, inputs = GridToy(), grid_inputs((4, 4, 6))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="differ in dtype, as autocast"):
        compiled(model, ALL)(**inputs)


REASONS = {
    "flux": "the tokens' grid can't be found from the graph",
    "mochi": "a length, u0, depends on data",
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    """Where it declines the graph is untouched."""
    family = zoo.FAMILIES[name]
    trunk = recovered(family.build(), **family.inputs(), return_dict=False)
    UnmaskedAttention(hoist=False).apply(trunk, Context())
    before = golden.text_of(trunk)
    assert "sparse_attention.rule is None" in applied(trunk).line()
    row = applied(trunk, rule="window")
    assert REASONS[name] in row.line(), row.line()
    assert not row.report.applied
    assert golden.text_of(trunk) == before


def test_applied_twice() -> None:
    trunk = recovered(GridToy(), **grid_inputs((2, 2, 4)))
    assert applied(trunk, rule="window", tile=(2, 2, 2)).report.applied
    before = golden.text_of(trunk)
    assert not applied(trunk, rule="window", tile=(2, 2, 2)).report.applied
    assert golden.text_of(trunk) == before


def test_golden_text() -> None:
    """What the class's docstring shows."""
    trunk = recovered(GridToy(), **grid_inputs((2, 2, 4)))
    before = golden.text_of(trunk)
    SparseAttention(rule="window", tile=(2, 2, 2)).apply(trunk, Context())
    golden.check(SparseAttention, before, golden.text_of(trunk))


def test_some_blocks_read_everything() -> None:
    trunk = recovered(GridToy(blocks=4), **grid_inputs((2, 2, 4)))
    row = applied(trunk, rule="window", tile=(2, 2, 2), keep_blocks=1)
    assert [what for what, _ in row.report.declined] == ["blocks.0", "blocks.3"]
    sparse = [
        any(op_name(node) == "block_sparse_attention" for node in block.body.module.graph.nodes)
        for block in trunk.blocks
    ]
    assert sparse == [False, True, True, False]


@pytest.mark.parametrize(
    "fields",
    [
        {"rule": "windows"},
        {"tile": (2, 2)},
        {"tile": (2, 0, 2)},
        {"window": (3, 2, 3)},
        {"width": 0.0},
        {"width": math.nan},
        {"keep_blocks": -1},
        {"share": 0.0},
        {"share": 1.1},
        {"floor": -0.1},
        {"floor": math.nan},
        {"rows": 0},
        {"tile": (2, 2, True)},
    ],
)
def test_options_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"sparse_attention.{next(iter(fields))}"):
        SparseAttention(**fields)


def heaviest(grid: Any, tile: Any, window: Any, share: float, floor: float, seen: list[float]) -> Any:
    """The rule "mass" as loops: blocks by the softmax of their mean queries and keys, heaviest first."""
    block_of, _ = blocks_of(grid, tile)
    near = mask_by(grid, tile, is_in_window(grid, tile, window))
    members = [[at for at, block in enumerate(block_of) if block == place] for place in range(max(block_of) + 1)]

    def mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        result = near.repeat(*query.shape[:2], 1, 1)
        for sample, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
            means = [[held[sample, head, at].double().mean(0) for at in members] for held in (query, key)]
            for place, mean in enumerate(means[0]):
                scores = torch.stack([mean @ other * query.shape[-1] ** -0.5 for other in means[1]])
                weights = (scores.exp() * torch.tensor([len(at) for at in members])).tolist()
                taken, held = 0, 0.0
                for other in sorted(range(len(members)), key=lambda at: -weights[at]):
                    if held < share * sum(weights) or taken < floor * len(members):
                        for first, second in itertools.product(members[place], members[other]):
                            result[sample, head, first, second] = True
                    taken, held = taken + 1, held + weights[other]
        seen.append(float(result.float().mean()))
        return result

    return mask


@pytest.mark.parametrize(("share", "floor"), [(0.5, 0.0), (0.1, 0.4)])
def test_mass(share: float, floor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, tile, window = (5, 3, 7), (2, 2, 3), (1, 1, 1)
    model, inputs, seen = GridToy(), grid_inputs(grid, seed=4, batch=2), list[float]()
    options = {"rule": "mass", "tile": tile, "window": window, "share": share, "floor": floor}
    expected = dense_under(model, inputs, heaviest(grid, tile, window, share, floor, seen), "video|text", monkeypatch)
    with torch.no_grad():
        assert relative_error(compiled(model, options)(**inputs), expected) < 1e-5
    assert all(0.2 < density < 0.9 for density in seen), seen


def test_mass_of_all_is_dense() -> None:
    model, inputs = GridToy("video"), grid_inputs((5, 3, 7), seed=4)
    fast = compiled(model, {"rule": "mass", "tile": (2, 2, 3), "share": 1.0})
    with torch.no_grad():
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-5
        inputs["sample"][0, 0, 0, 0, 0] = torch.nan  # everything is read where a weight is not a number
        assert fast(**inputs).isnan().equal(model(**inputs).isnan())


def test_what_is_not_a_number_is_read() -> None:
    query = torch.randn(1, 2, 40, 8)
    query[0, 1, 3, 2] = torch.nan
    never = torch.zeros(5, 5, dtype=torch.bool)
    _, counts = block_lists.mass_lists(query, torch.randn(1, 2, 40, 8), never, 8, 0.3, 0.1, 0.0)
    assert counts[0, 1].tolist() == [5, 1, 1, 1, 1]
    _, counts = block_lists.mass_lists(torch.randn(1, 2, 40, 8), query, never, 8, 0.3, 0.1, 0.0)
    assert counts[0].tolist() == [[1] * 5, [5] * 5]


def test_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head takes the mask that keeps more of the sampled queries' weights, found by loops."""
    grid, tile, window, rows = (8, 4, 2), (2, 2, 1), (1, 1, 1), 7
    spatial = mask_by(grid, tile, lambda a, b: a[0] == b[0] or b[0] == 0)
    temporal = mask_by(grid, tile, lambda a, b: a[1:] == b[1:] or b[0] == 0)
    order = [at for _, at in sorted((line, at) for at, line in enumerate(line_of(grid, tile)))]
    chosen: list[bool] = []

    def mask(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(*query.shape[:2], *spatial.shape, dtype=torch.bool)
        for sample, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
            kept = [0.0, 0.0]
            for row in range(rows):
                at = order[row * len(order) // rows]
                weights = (query[sample, head, at] @ key[sample, head].T * query.shape[-1] ** -0.5).softmax(-1)
                both = zip(kept, (spatial, temporal), strict=True)
                kept = [before + float(weights[held[at]].sum()) for before, held in both]
            chosen.append(kept[0] > kept[1])
            result[sample, head] = spatial if chosen[-1] else temporal
        return result

    model, inputs = GridToy(blocks=4), grid_inputs(grid, seed=2, batch=2)
    expected = dense_under(model, inputs, mask, "video|text", monkeypatch)
    fast = compiled(model, {"rule": "profile", "tile": tile, "window": window, "rows": rows})
    with torch.no_grad():
        assert relative_error(fast(**inputs), expected) < 1e-5
    assert set(chosen) == {False, True}


CACHE = {"first_block_cache": {"threshold": 1e9}}


@pytest.mark.parametrize("order", ["video|text", pytest.param("video", marks=SLOW)])
def test_compiled_with_the_cache(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph by Inductor: a computed step is the dense one under the mask, and the next is reused."""
    grid, tile = (3, 3, 5), (2, 2, 2)
    model, inputs = GridToy(order), grid_inputs(grid, seed=7, batch=2)
    if order != "video":
        count = math.prod(grid)
        inputs["keep"] = torch.arange(count + 5) < torch.tensor([count + 2, count + 4])[:, None]
    options = {"rule": "window", "tile": tile, "window": (1, 1, 3)}
    fast = hvfast(model, fullgraph=True, options={"sparse_attention": options, **CACHE})
    mask = mask_by(grid, tile, is_in_window(grid, tile, (1, 1, 3)))
    expected = dense_under(model, inputs, mask, order, monkeypatch)
    with torch.no_grad():
        assert relative_error(fast(**inputs), expected) < 1e-5
        assert relative_error(fast(**inputs), expected) < 1e-5
    stats = hvcompile.stats(fast)
    assert [step.reused for step in stats.steps] == [False, True]
    assert stats.graphs == 1


def test_float8_linears_read_tokens_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scale a row the same, whatever the order of the rows."""
    monkeypatch.setattr(grids, "WIDTH", 64)
    model, inputs = GridToy(blocks=3), grid_inputs((3, 2, 4), seed=1)
    float8 = {"fp8": {"keep_last_blocks": 0, "keep_original": "cpu"}}
    with torch.no_grad():
        expected = hvfast(model, fullgraph=True, options={"lower": "eager", **NO_CACHE, **float8})(**inputs)
        torch._dynamo.reset()
        hvcompile.restore(model)
        fast = compiled(model, {**ALL, "tile": (2, 2, 2)}, **float8)
        assert relative_error(fast(**inputs), expected) < 1e-5
        other = fast(**grid_inputs((3, 3, 4)))  # another graph, for weights that are in float8 by now
        torch._dynamo.reset()
        hvcompile.restore(model)
        assert relative_error(other, model(**grid_inputs((3, 3, 4)))) < 0.1
        assert relative_error(expected, model(**inputs)) > 1e-4
    assert next(row for row in hvcompile.stats(fast).journal[0] if row.name == "Float8Linears").report.applied


def test_float8_attention_leaves_it_alone() -> None:
    """The text's own queries are in float8 then, and the journal says why the others are not."""
    model, inputs = GridToy(), grid_inputs((3, 2, 4))
    fast = compiled(model, {**ALL, "tile": (2, 2, 2)}, attention={"fp8": True})
    with torch.no_grad():
        assert relative_error(fast(**inputs), model(**inputs)) < 0.1
    (row,) = [row for row in hvcompile.stats(fast).journal[0] if row.name == "Float8Attention"]
    assert "block_sparse_attention of block_0: it reads listed blocks" in row.line()
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="the float8 kernel takes no lists"):
        compiled(GridToy("video"), {**ALL, "tile": (2, 2, 2)}, attention={"fp8": True})(**inputs)


def test_sizes_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each grid has a graph of its own, and lists of its own, also where sizes are symbols."""
    model, tile, window = GridToy(), (2, 2, 2), (1, 3, 1)
    fast = hvfast(
        model,
        fullgraph=True,
        dynamic=True,
        options={
            "lower": "eager",
            "sparse_attention": {"rule": "window", "tile": tile, "window": window},
            **NO_CACHE,
        },
    )
    for grid, text in (((3, 2, 4), 5), ((4, 3, 5), 8), ((3, 2, 4), 5)):
        inputs = grid_inputs(grid, text=text)
        mask = mask_by(grid, tile, is_in_window(grid, tile, window))
        with torch.no_grad():
            found = fast(**inputs)
        assert relative_error(found, dense_under(model, inputs, mask, "video|text", monkeypatch)) < 1e-5


@torch.no_grad()
def test_first_steps_that_read_everything() -> None:
    """Two generations of two prompts by turns, the cache around: each prompt's first two steps are dense."""
    grid, fields = (3, 4, 5), {"rule": "mass", "share": 0.3, "window": (1, 1, 1), "tile": (1, 2, 2)}
    model, other = GridToy(blocks=3), GridToy(blocks=3)
    exact = {"first_block_cache": {"threshold": 0.0}}
    fast, sparse = compiled(model, fields | {"dense_steps": 2, "audit": True}, **exact), compiled(other, fields)
    for generation, (step, timestep), prompt in itertools.product(range(2), enumerate((900.0, 800.0, 700.0)), range(2)):
        inputs = grid_inputs(grid, seed=10 * generation + step, timestep=timestep)
        inputs["text"] = grid_inputs(grid, seed=50 + prompt)["text"]
        expected = model(**inputs) if step < 2 else sparse(**inputs)
        assert relative_error(fast(**inputs), expected) < 1e-5
        assert relative_error(sparse(**inputs), model(**inputs)) > 1e-3
    noted = row_of(fast).report.noted
    assert noted[0] == "the first 2 steps of a generation read everything"
    assert "hold 100.0% of the mass" not in noted[1]  # the audit is of a later step
    assert hvcompile.stats(fast).graphs == 1


def test_steps_that_can_not_be_counted_are_a_reason() -> None:
    trunk = recovered(
        _WithoutTime(), **{key: held for key, held in grid_inputs((3, 2, 4)).items() if key != "timestep"}
    )
    row = applied(trunk, rule="window", tile=(2, 2, 2), dense_steps=2)
    assert not row.report.applied
    assert "sparse_attention.dense_steps is 2: no input is a timestep" in row.report.declined[0][1]


class _WithoutTime(GridToy):
    """The same at a fixed timestep."""

    def forward(self, sample: torch.Tensor, text: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(sample, torch.full((1,), 9.0), text)


def test_operations_are_counted() -> None:
    """Of the video's part by the pairs that are computed, of the text's part and queries by all of theirs."""
    grid, tile, heads, size = (4, 4, 4), (2, 2, 2), 2, 16
    trunk = recovered(GridToy(), **grid_inputs(grid))
    applied(trunk, rule="window", tile=tile, window=(1, 1, 1))
    counter = FlopCounter()
    (body,) = trunk.bodies
    counted = sum(counter.by_kind(node).get(ATTENTION, 0) for node in body.module.graph.nodes)
    pairs = 8 * 64 + 64 * grids.TEXT + grids.TEXT * (64 + grids.TEXT)
    assert counted == 4 * heads * size * pairs


def test_audit() -> None:
    """A row a layer and head; the first layer's are what a dense computation says."""
    grid, tile, window = (4, 4, 4), (2, 2, 2), (1, 1, 1)
    model, inputs = GridToy("video"), grid_inputs(grid, seed=6, batch=2)
    seen: list[tuple[torch.Tensor, ...]] = []
    attend = nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append((query, key, value))
        return attend(query, key, value, **how)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", spy)
        model(**inputs)
    fast = compiled(model, {"rule": "window", "tile": tile, "window": window, "audit": True})
    with torch.no_grad():
        fast(**inputs)
    report = row_of(fast).report
    assert [(row["block"], row["head"]) for row in report.table] == list(
        itertools.product(("blocks.0", "blocks.1"), range(grids.HEADS))
    )
    query, key, value = (item.double() for item in seen[0])
    mask = mask_by(grid, tile, is_in_window(grid, tile, window))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    dense, near = scores.softmax(-1), scores.masked_fill(~mask, -math.inf).softmax(-1)
    for head, row in enumerate(report.table[: grids.HEADS]):
        kept = (dense * mask).sum(-1)[:, head]
        exact, found = (dense @ value)[:, head], (near @ value)[:, head]
        assert row["mass"] == pytest.approx(float(kept.mean()), abs=1e-5)
        assert row["least_mass"] == pytest.approx(float(kept.min()), abs=1e-5)
        assert row["error"] == pytest.approx(float((found - exact).norm() / exact.norm()), abs=1e-5)
        assert row["blocks"] == pytest.approx(1 / 8)
    assert "12.5% of the blocks hold" in report.noted[0]


def test_audit_with_padding_and_lists_of_each_step() -> None:
    grid = (3, 3, 5)
    model, inputs = GridToy(), grid_inputs(grid, batch=2)
    keep = torch.arange(50) < torch.tensor([47, 49])[:, None]
    fast = compiled(model, {"rule": "mass", "tile": (2, 2, 2), "window": (1, 1, 1), "share": 0.5, "audit": True})
    with torch.no_grad():
        fast(**inputs, keep=keep)
    (row, *_) = table = row_of(fast).report.table
    assert len(table) == 8  # two blocks, an attention for each sample, two heads
    assert 0.3 < row["mass"] < 1


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = recovered(GridToy(), **grid_inputs((2, 2, 4)))
    with monkeypatch.context() as patched:
        patched.setattr(sparse_attention, "device_of", lambda _: torch.device("cuda", 0))
        row = applied(trunk, rule="window", tile=(2, 2, 2))
    assert "the blocks are on cuda:0, and what computes listed blocks is made for CPUs" in row.line()
    assert not row.report.applied
    with torch.device("meta"):
        model = GridToy()
        inputs: dict[str, Any] = {name: held.to("meta") for name, held in grid_inputs((2, 2, 4)).items()}
    options = {"sparse_attention": {"rule": "window", "tile": (2, 2, 2)}}
    (planned,) = [row for row in hvcompile.explain(model, **inputs, options=options).journal if "Sparse" in row.name]
    assert planned.report.applied
