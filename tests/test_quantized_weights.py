"""A model whose weights are in float8 alone: everything works exactly or says what to call, and nothing crashes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_float8_linears import ROUNDING, compiled, reference, relative
from torch import nn
from wide import Wide, wide_inputs

import hvcompile
from hvcompile import float8
from hvcompile.quantized_weights import Joined, QuantizedWeight

pytestmark = pytest.mark.skipif(not float8.is_available(), reason="torchao is not installed")


@pytest.fixture(scope="module")
def model() -> Wide:
    """Compiled and run; what it is asked for in these tests leaves it as it is."""
    made = Wide()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
    return made


ASKED: dict[str, Callable[[Wide], Any]] = {
    "uncompiled call": lambda model: model(**wide_inputs()),
    "state_dict": lambda model: model.state_dict(),
    "move": lambda model: model.blocks[0].to_q.to("meta"),
    "cast": lambda model: model.blocks[0].to_q.to(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "load": lambda model: model.load_state_dict(Wide().state_dict()),
    "share": lambda model: model.share_memory(),
    "fuse by +=": lambda model: model.blocks[0].to_q.weight.data.add_(1.0),
    "fuse in place": lambda model: model.blocks[0].to_q.weight.add_(1.0),
    "copy_": lambda model: model.blocks[0].to_q.weight.copy_(torch.zeros(64, 64)),
    "out": lambda model: torch.add(torch.ones(64, 64), 1, out=model.blocks[0].to_q.weight),
    "clone": lambda model: model.blocks[0].to_q.weight.clone(),
    "numpy": lambda model: model.blocks[0].to_q.weight.numpy(),
    "norm": lambda model: nn.utils.get_total_norm(list(model.parameters())),
    "index": lambda model: torch.ones(64, 64)[model.blocks[0].to_q.weight.long()],
    "new parameter": lambda model: nn.Parameter(model.blocks[0].to_q.weight),
    "transposed": lambda model: torch.ones(3, 64) @ model.blocks[0].to_q.weight.T,
    "type": lambda model: model.blocks[0].to_q.type(torch.float64),
    "plain": lambda model: model.blocks[0].to_q.weight.as_subclass(torch.Tensor),
    "address": lambda model: model.blocks[0].to_q.weight.data_ptr(),
    "other backend": lambda model: torch.compile(model, backend="aot_eager")(**wide_inputs()),
    "other backend, whole": lambda model: torch.compile(model, backend="inductor", fullgraph=True)(**wide_inputs()),
    "export and run": lambda model: torch.export.export(model, (), wide_inputs()).module()(**wide_inputs()),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_needs_the_values_says_what_to_call(model: Wide, name: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=r"hvcompile\.restore\(model\)"):
        ASKED[name](model)


def test_what_needs_no_values_works(model: Wide) -> None:
    weight = model.blocks[0].to_q.weight
    assert isinstance(weight, QuantizedWeight)
    assert isinstance(weight, nn.Parameter)
    assert weight.shape == (64, 64)
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert sum(item.numel() for item in model.parameters()) == sum(item.numel() for item in Wide().parameters())
    assert "float8" in repr(weight)
    assert "QuantizedWeight" in repr(dict(model.named_parameters()))
    assert weight in set(model.parameters())
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert model.cpu() is model
    assert model.float() is model
    model.blocks[0].to_q.weight.requires_grad = False  # as peft does to all of a model
    model.blocks[0].to_q.weight.grad = None
    assert "to_q" in f"{model.blocks[0].to_q.weight}"
    assert model.train().eval().requires_grad_(False) is model
    assert model.blocks[0].to_q.weight is weight


def test_compiled_calls_go_on(model: Wide) -> None:
    with torch.no_grad():
        expected = reference(Wide())(**wide_inputs(seed=5))
        assert relative(compiled(model)(**wide_inputs(seed=5)), expected) < ROUNDING


def test_restored_approximately(caplog: pytest.LogCaptureFixture) -> None:
    original, made = Wide(), Wide()
    run = compiled(made)
    with torch.no_grad():
        first = run(**wide_inputs())
        assert hvcompile.restore(run) == hvcompile.Restored(exact=0, dequantized=15)
        assert "15 of 15 weights came back from float8" in caplog.text
        for (name, weight), exact in zip(made.named_parameters(), original.parameters(), strict=True):
            assert type(weight) is nn.Parameter, name
            assert (weight - exact).abs().max() <= 2**-4 * exact.abs().max(), name
        assert relative(made(**wide_inputs()), original(**wide_inputs())) < 4e-2
        copy.deepcopy(made).load_state_dict(made.state_dict())
        assert relative(run(**wide_inputs()), first) < 1e-2  # compiled and quantised again
    assert isinstance(made.blocks[0].to_q.weight, QuantizedWeight)
    assert hvcompile.restore(made).dequantized == 15
    assert hvcompile.restore(made) == hvcompile.Restored(exact=0, dequantized=0)


def test_restored_exactly() -> None:
    original, made = Wide(), Wide()
    run = compiled(made, {"keep_original": "cpu"})
    with torch.no_grad():
        run(**wide_inputs())
        assert hvcompile.restore(made) == hvcompile.Restored(exact=15, dequantized=0)
        assert all(map(torch.equal, made.parameters(), original.parameters()))
        assert torch.equal(made(**wide_inputs()), original(**wide_inputs()))


def test_a_change_in_between_counts() -> None:
    """Restored, a LoRA fused, called again: the new weights are quantised."""
    made, changed = Wide(), Wide()
    run = compiled(made, {"keep_original": "cpu"})
    with torch.no_grad():
        run(**wide_inputs())
        hvcompile.restore(made)
        for item in (made, changed):
            item.blocks[1].up.weight += 0.1
        assert relative(run(**wide_inputs()), reference(changed)(**wide_inputs())) < ROUNDING


def test_a_change_in_between_counts_in_every_shape() -> None:
    made, changed = Wide(), Wide()
    run = compiled(made, {"keep_original": "cpu"})
    shapes = [wide_inputs(batch=batch) for batch in (1, 2)]
    with torch.no_grad():
        for inputs in shapes:
            run(**inputs)
        hvcompile.restore(made)
        for item in (made, changed):
            item.blocks[1].up.weight += 0.1
        reference(changed)
        for inputs in [*shapes, *shapes]:
            assert relative(run(**inputs), changed(**inputs)) < ROUNDING


def test_copies_are_let_go() -> None:
    """With the model, and where it is restored: each time anew."""

    def held() -> int:
        gc.collect()
        found = [item for item in gc.get_objects() if type(item) is Joined]
        return len({id(item) for item in found})

    before = held()
    made = Wide()
    run = compiled(made)
    with torch.no_grad():
        run(**wide_inputs())
        assert held() == before + 6
        for _ in range(2):
            hvcompile.restore(made)
            assert held() == before
            run(**wide_inputs())
            assert held() == before + 6
    del run, made
    assert held() == before


def test_restored_in_inference_mode() -> None:
    made = Wide()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
    with torch.inference_mode():
        hvcompile.restore(made)
    assert not any(weight.is_inference() for weight in made.parameters())


def test_another_granularity_wants_the_originals() -> None:
    made = Wide()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"a scale a row, and fp8\.granularity is 'tensor'.*hvcompile\.restore"):
            compiled(made, {"granularity": "tensor"})(**wide_inputs())


def test_originals_that_are_gone_are_not_kept_silently(caplog: pytest.LogCaptureFixture) -> None:
    made = Wide()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
        torch._dynamo.reset()
        compiled(made, {"keep_original": "cpu"})(**wide_inputs())
    assert "nothing exact is left to keep" in caplog.text


def test_assigned_weights_count() -> None:
    """``load_state_dict(assign=True)`` puts new parameters in place of those that have no values."""
    made, other = Wide(), Wide(seed=1)
    run = compiled(made)
    with torch.no_grad():
        run(**wide_inputs())
        made.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)
        assert relative(run(**wide_inputs()), reference(other)(**wide_inputs())) < ROUNDING


def test_an_adapter_beside_a_quantised_layer() -> None:
    """A LoRA that is loaded and not fused: its small layers stay as they are, the large one is not quantised anew."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.base, self.down, self.up = base, nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            changed: torch.Tensor = self.base(given) + self.up(self.down(given))
            return changed

    made, expected = Wide(), reference(Wide())
    run = compiled(made)
    with torch.no_grad():
        run(**wide_inputs())
        held = made.blocks[1].to_q.weight.joined
        for item in (made, expected):
            item.blocks[1].to_q = Adapted(item.blocks[1].to_q).requires_grad_(False)
        assert relative(run(**wide_inputs()), expected(**wide_inputs())) < ROUNDING
    assert made.blocks[1].to_k.weight.joined.data.shape[1] == held.data.shape[1]


@pytest.mark.parametrize("options", [{"fp8": False}, {"fp8": {"keep_blocks": 1}}, {"fp8": {"skip": ["up"]}}])
def test_compiled_again_with_other_options(options: dict[str, Any]) -> None:
    made = Wide()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"hvcompile\.restore\(model\)"):
            compiled(made, options["fp8"])(**wide_inputs())
        hvcompile.restore(made)
        compiled(made, options["fp8"])(**wide_inputs())


def test_memory_that_others_hold_stays_theirs() -> None:
    made = Wide()
    held = made.blocks[0].to_q.weight.detach()
    before = held.clone()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
    assert torch.equal(held, before)


def test_restore_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        hvcompile.restore(torch.zeros(3))  # type: ignore[arg-type]


def test_nothing_crashes(tmp_path: Path) -> None:
    """Operations of torch on such a weight, each of which would read its memory, all raise: in a process of its own."""
    script = """
        import torch, sys
        sys.path.insert(0, {tests!r})
        from test_float8_linears import compiled
        from wide import Wide, wide_inputs
        made = Wide()
        with torch.no_grad():
            compiled(made)(**wide_inputs())
            weight, other, count = made.blocks[0].to_q.weight, torch.ones(64, 64), 0
            for name in sorted(set(dir(torch)) | set(dir(torch.Tensor)) | set(dir(torch.nn.functional))):
                for owner in (torch, torch.Tensor, torch.nn.functional):
                    call = getattr(owner, name, None)
                    if not callable(call) or isinstance(call, type) or name.startswith("__") or "storage" in name:
                        continue
                    for arguments in ((weight,), (weight, other), (other, weight), (weight, 0), ([weight, weight],)):
                        try:
                            call(*arguments)
                        except Exception as error:
                            count += "restore" in str(error)
        print("raised", count)
    """
    file = tmp_path / "script.py"
    file.write_text("\n".join(line[8:] for line in script.format(tests=str(Path(__file__).parent)).splitlines()))
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 1000
