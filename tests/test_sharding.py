"""The rules by which a sequence is split: each rank's part is computed, and together they are the whole.

No processes and no collectives: the graphs of all ranks run one after the other, on the parts of one input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from hvcompile.explanation.explain import capture
from hvcompile.ranks.split import Layout, Segment, Split, localise
from hvcompile.rewriting.sharding.resharder import CannotShard, Resharder, WantsSplit
from hvcompile.rewriting.sharding.rules import RULES

BATCH, TEXT, WIDTH = 2, 3, 8


class Function(nn.Module):
    """A function of video tokens ``[B, V, C]``, a table ``[V, C]`` and text ``[B, T, C]`` as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(WIDTH, WIDTH)

    def forward(self, video: Any, table: Any, text: Any) -> Any:
        return self.function(self.linear, video, table, text)


def no_attention(resharder: Resharder, node: fx.Node) -> Layout:
    raise resharder.refuse(node, "not here")


def resharded(graph: fx.Graph, split: Split, wanted: dict[int, Layout]) -> tuple[Resharder, dict[int, Layout]]:
    """Copy a graph for one rank; ``wanted`` says which of its inputs come split, and gains those that turn out to."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    while True:
        resharder = Resharder(graph, split, "test", "the function", no_attention, RULES, frozenset(placeholders))
        try:
            for place, node in enumerate(placeholders):
                resharder.placeholder(node, wanted.get(place))
            for node in graph.nodes:
                if node.op not in {"placeholder", "output"}:
                    resharder.visit(node)
        except WantsSplit as wants:
            wanted = wanted | {placeholders.index(wants.placeholder): wants.layout}
            continue
        results: Any = graph.output_node().args[0]
        resharder.end.args = (resharder.env[results[0]],)
        return resharder, wanted


def whole_of(parts: list[Any], layout: Layout | None, split: Split) -> Any:
    """What the ranks' parts are together."""
    if layout is None:
        return parts[0]
    assert layout.is_complete(split)
    pieces = []
    for place, _, item in layout.offsets(split):
        size = split.local if item.is_split else item.stop - item.start
        stretch = [part.narrow(layout.dim, place, size) for part in parts]
        pieces.append(
            torch.cat(stretch, dim=layout.dim).narrow(layout.dim, 0, split.length) if item.is_split else stretch[0]
        )
    return torch.cat(pieces, dim=layout.dim)


def check(function: Callable[..., Any], length: int, ranks: int) -> None:
    torch.manual_seed(0)
    model = Function(function).eval()
    inputs = {"video": torch.randn(BATCH, length, WIDTH), "table": torch.randn(length, WIDTH)}
    inputs["text"] = torch.randn(BATCH, TEXT, WIDTH)
    captured = capture(model, **inputs)
    named = {"linear_parameters_weight": model.linear.weight, "linear_parameters_bias": model.linear.bias, **inputs}
    targets = [str(node.target) for node in captured.graph.find_nodes(op="placeholder")]
    given = [next(held for name, held in named.items() if name in target) for target in targets]
    video = next(place for place, held in enumerate(given) if held is inputs["video"])
    entry = {video: Layout(1, (Segment(0, length, True),))}
    parts = []
    for rank in range(ranks):
        split = Split(group="none", rank=rank, ranks=ranks, length=length)
        resharder, wanted = resharded(captured.graph, split, entry)
        local = [
            localise(held, split=split, layout=wanted[place], ndim=held.ndim) if place in wanted else held
            for place, held in enumerate(given)
        ]
        with torch.no_grad():
            parts.append(fx.GraphModule(captured, resharder.graph)(*local))
    results: Any = captured.graph.output_node().args[0]
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(whole_of(parts, resharder.layout(results[0]), split), expected)


def first_frame(linear: Any, video: Any, table: Any, text: Any) -> Any:
    """As token replacement does: the first four tokens are modulated otherwise."""
    head, tail = video[:, :4] * 3 + 1, video[:, 4:] - text.mean()
    return linear(torch.cat([head, tail], dim=1)) * table


def joint_first_frame(linear: Any, video: Any, table: Any, text: Any) -> Any:
    joint = torch.cat([video, text], dim=1)
    joint = torch.cat([joint[:, :4] * 3, linear(joint[:, 4:])], dim=1)
    return joint[:, :-TEXT] + table, joint[:, -TEXT:]


def text_first(linear: Any, video: Any, table: Any, text: Any) -> Any:
    joint = linear(torch.cat([text, video], dim=1))
    return torch.cat([joint[:, TEXT:] * table, joint[:, :TEXT]], dim=1)


def rotary(linear: Any, video: Any, table: Any, text: Any) -> Any:
    heads = linear(video).unflatten(2, (2, -1))
    real, imaginary = heads.reshape(BATCH, video.shape[1], 2, -1, 2).unbind(-1)
    rotated = torch.stack([-imaginary, real], dim=-1).flatten(3)
    angles = table[None, :, None, :4]
    return (heads * angles.cos() + rotated * angles.sin()).flatten(2)


def three_pieces(linear: Any, video: Any, table: Any, text: Any) -> Any:
    return torch.cat([video[:, :1] * 2, linear(video[:, 1:5]), video[:, 5:] * table[5:]], dim=1)


def rotary_in_place(linear: Any, video: Any, table: Any, text: Any) -> Any:
    out = torch.empty_like(video)
    out[..., 0::2] = linear(video)[..., 0::2] * table[:, 1::2]
    out[..., 1::2] = table[None, :, 0::2]
    return out + table


def rotary_of_video_alone(linear: Any, video: Any, table: Any, text: Any) -> Any:
    joint = linear(torch.cat([text, video], dim=1))
    joint[:, TEXT:] = joint[:, TEXT:] * table
    joint[:, :TEXT] = text
    return joint * 2


FUNCTIONS: list[Callable[..., Any]] = [
    first_frame,
    lambda *args: joint_first_frame(*args)[0],
    text_first,
    rotary,
    rotary_in_place,
    rotary_of_video_alone,
    three_pieces,
    lambda linear, video, table, text: linear(video).transpose(1, 2) * table.t(),
    lambda linear, video, table, text: linear(video).permute(2, 0, 1).mean(0) + table.sum(-1),
    lambda linear, video, table, text: torch.nn.functional.layer_norm(video + table, (WIDTH,)).softmax(-1),
    lambda linear, video, table, text: sum(video.chunk(2, dim=-1)) * table.split([4, 4], dim=1)[1],
    lambda linear, video, table, text: video.unsqueeze(0).expand(3, -1, video.shape[1], -1).sum(0) - table,
    lambda linear, video, table, text: torch.split(torch.cat([video, text], 1), [video.shape[1], TEXT], 1)[0] * table,
    lambda linear, video, table, text: torch.where(table > 0, video, -video).view(BATCH, video.shape[1], 2, 4).amax(-1),
    lambda linear, video, table, text: video.narrow(2, 1, 4).to(torch.float64).type_as(table) @ text[0, :, :4].t(),
]


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
@pytest.mark.parametrize(("length", "ranks"), [(12, 2), (13, 4), (7, 8)])
def test_parts_make_the_whole(number: int, length: int, ranks: int) -> None:
    check(FUNCTIONS[number], length, ranks)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda linear, video, table, text: video.mean(1), "mean .* it sums over the dimension"),
        (lambda linear, video, table, text: video.transpose(1, 2) @ table, "matmul .* it sums over the dimension"),
        (lambda linear, video, table, text: video.softmax(1), "softmax .* it mixes along the dimension"),
        (lambda linear, video, table, text: video.flatten(1), "flatten .* it merges or cuts the sequence"),
        (lambda linear, video, table, text: video[:, 0], "getitem .* it takes single tokens"),
        (lambda linear, video, table, text: video[:, ::2], "getitem .* it takes single tokens"),
        (lambda linear, video, table, text: video.flip(1), "flip .* it mixes along the dimension"),
        (lambda linear, video, table, text: video.flip(2, 1), "flip .* it mixes along the dimension"),
        (lambda linear, video, table, text: video - video[:, :1], "sub .* split in different ways"),
        (
            lambda linear, video, table, text: torch.cat([video[:, 6:], video[:, :6]], 1) + video,
            "add .* different ways",
        ),
        (lambda linear, video, table, text: video[:, [0, 2]], "getitem .* by a tensor or list"),
        (lambda linear, video, table, text: video.cumprod(1), "cumprod .* is not known to work on a part"),
        (lambda linear, video, table, text: video.chunk(2, 1)[0], "chunk .* it cuts the sequence elsewhere"),
        (lambda linear, video, table, text: torch.nn.functional.layer_norm(video, video.shape[1:]), "layer_norm .* it"),
        (lambda linear, video, table, text: video.scatter_add(2, (table > 0).long()[None], table[None]), "scatter_add"),
    ],
)
def test_what_mixes_tokens_is_refused(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(CannotShard, match=reason):
        check(function, 12, 2)
