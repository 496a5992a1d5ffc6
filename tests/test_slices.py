"""Slices with a data-dependent bound, counted from the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from torch import fx, nn

import hvcompile
from hvcompile.graph.nodes import is_tensor
from hvcompile.graph.slices import count_from_start
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.fakes import value


class Cut(nn.Module):
    """Keeps a data-dependent number of text tokens, joins them to the video, and parts them again twice."""

    def forward(self, video: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        text = text[:, : mask.sum().item()]
        for _ in range(2):
            length = text.shape[1]
            joint = torch.cat([video, text], dim=1) * 2
            video, text = joint[:, :-length], joint[:, -length:]
        return video + text.mean(dim=1, keepdim=True)


def test_invented_symbols_disappear() -> None:
    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: object) -> Any:
        graphs.append(dynamo.clone_graph_module(module))
        counts.append(count_from_start(graphs[-1].graph))
        graphs[-1].graph.lint()
        graphs[-1].recompile()
        return graphs[-1].forward

    counts: list[int] = []
    model = torch.compile(Cut(), backend=backend, fullgraph=True)
    with torch.no_grad():
        for valid in (2, 5):
            inputs = torch.randn(1, 6, 4), torch.randn(1, 5, 4), torch.tensor([[1] * valid + [0] * (5 - valid)])
            assert torch.equal(model(*inputs), Cut()(*inputs))
    assert counts == [4]
    symbols = {str(size) for node in graphs[0].graph.nodes if is_tensor(node) for size in value(node).shape}
    assert len([symbol for symbol in symbols if symbol.startswith("u")]) == 2  # the text's length, and the joint's


@pytest.mark.parametrize("lower", ["eager", "aot"])
def test_framepack_with_any_text_length(lower: str) -> None:
    family = zoo.FAMILIES["hunyuan_video_framepack"]
    model = family.build()
    fast = hvfast(model, fullgraph=True, options={"lower": lower})
    with torch.no_grad():
        for seed, valid in enumerate((1, 4, 12)):
            inputs = family.inputs(seed)
            length = inputs["encoder_attention_mask"].shape[1]
            inputs["encoder_attention_mask"] = zoo.partial_mask(length, min(valid, length))
            expected = first(model(**inputs, return_dict=False))
            assert relative_error(first(fast(**inputs, return_dict=False)), expected) < 1e-5
    stats = hvcompile.stats(fast)
    assert (stats.graphs, stats.recompiles, stats.misses) == (1, 0, 3)
