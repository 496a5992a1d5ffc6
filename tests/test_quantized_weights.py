"""A model whose weights are in float8 alone: everything works exactly or says what to call, and nothing crashes."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_float8_linears import ROUNDING, compiled, reference, relative
from torch import nn
from wide import Wide, wide_inputs

import hvcompile
from hvcompile.float8.weights import Joined, QuantizedWeight
from hvcompile.torch_private import storages, torchao

pytestmark = pytest.mark.skipif(not torchao.is_available(), reason="torchao is not installed")


@pytest.fixture(scope="module")
def model() -> Wide:
    """Compiled and run; what it is asked for in these tests leaves it as it is."""
    made = Wide()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
    return made


def ema(parameters: Any) -> Any:
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters)


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
    "data =": lambda model: setattr(model.blocks[0].to_q.weight, "data", torch.zeros(64, 64)),
    "data.copy_": lambda model: model.blocks[0].to_q.weight.data.copy_(torch.zeros(64, 64)),
    "set_": lambda model: model.blocks[0].to_q.weight.set_(torch.zeros(64, 64)),
    "resize_": lambda model: model.blocks[0].to_q.weight.resize_(64, 64),
    "detach": lambda model: model.blocks[0].to_q.weight.detach().zero_(),
    "foreach": lambda model: torch._foreach_add_([model.blocks[0].to_q.weight], 1.0),
    "EMA, averaging": lambda model: ema(model.parameters()),
    "EMA, copied": lambda model: ema(Wide().parameters()).copy_to(model.parameters()),
    "EMA, stored": lambda model: ema(Wide().parameters()).store(model.parameters()),
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


def test_a_lora_is_saved_after_restoring(tmp_path: Path) -> None:
    """diffusers saves an adapter by way of the whole state dict, and fusing one reads the weights: both say so."""
    peft: Any = pytest.importorskip("peft")
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12), "text_embed_dim": 64}
    layers = {"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0}
    made = HunyuanVideoTransformer3DModel(**sizes, **layers)
    made.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "a")
    made.eval().requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 6, 8),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, 8, 64),
        "encoder_attention_mask": torch.ones(1, 8),
        "pooled_projections": torch.randn(1, made.config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0),
    }
    run = compiled(made)
    with torch.no_grad():
        run(**inputs, return_dict=False)
    for call in (lambda: made.save_lora_adapter(tmp_path, "a"), made.fuse_lora):
        with pytest.raises(hvcompile.QuantizedWeightError, match=r"hvcompile\.restore\(model\)"):
            call()
    hvcompile.restore(made)
    made.save_lora_adapter(tmp_path, "a")
    assert list(tmp_path.glob("*.safetensors"))


def test_a_whole_model_is_changed_up_to_the_first_such_weight() -> None:
    """What is said in the README: torch moves and loads layer by layer, and no hook of it comes before the first."""
    made, other = Wide(), Wide(seed=1)
    with torch.no_grad():
        compiled(made)(**wide_inputs())
    weight = made.blocks[0].to_q.weight
    with pytest.raises(hvcompile.QuantizedWeightError):
        made.to(torch.float64)
    with pytest.raises(RuntimeError, match=r"hvcompile\.restore\(model\)"):
        made.load_state_dict(other.state_dict())
    assert made.blocks[0].to_q.weight is weight
    hvcompile.restore(made)
    made.to(torch.float32).load_state_dict(other.state_dict())  # done again, it is as it should be
    assert all(map(torch.equal, made.parameters(), other.parameters()))


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


def in_own_process(script: str, file: Path) -> str:
    """What a script prints that is given a compiled model, one weight of it, an equal tensor, and a way to count."""
    head = """
        import sys, warnings
        import torch
        warnings.simplefilter("ignore")
        sys.path[:0] = {paths!r}
        from test_float8_linears import compiled
        from wide import Wide, wide_inputs
        made, count = Wide(), 0
        with torch.no_grad():
            compiled(made)(**wide_inputs())
        torch.set_grad_enabled(False)
        weight, other = made.blocks[0].to_q.weight, torch.ones(64, 64)
        weights = [weight]
        try:
            weights.append(torch.Tensor(weight))  # an alias that torch makes without asking it
        except Exception as error:
            assert "hvcompile.restore(model)" in str(error)
        # Made alone where a storage can refuse to be read: where torch was built with CUDA.
        assert (len(weights) == 2) == hasattr(torch._C, "_set_storage_data_ptr_access_error_msg")
        print("weights", len(weights))
        def attempt(call, *arguments):
            global count
            try:
                call(*arguments)
            except Exception as error:
                # An alias of the weight, which torch 2.11 puts in there, has no text.
                told = repr([held for held in error.args if not isinstance(held, torch.Tensor)])
                count += any(part in told for part in ("restore", "Cannot access data pointer"))
    """
    text = head.format(paths=[str(Path(__file__).parent), str(Path(hvcompile.__file__).parents[1])]) + script
    file.write_text("\n".join(line[8:] for line in text.splitlines()))
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_nothing_crashes(tmp_path: Path) -> None:
    """Operations of torch on such a weight, or on an alias that torch made without asking it: all raise.

    So does making that alias, where to read it would end the process.
    """
    script = """
        for given in weights:
            for name in sorted(set(dir(torch)) | set(dir(torch.Tensor)) | set(dir(torch.nn.functional))):
                for owner in (torch, torch.Tensor, torch.nn.functional):
                    call = getattr(owner, name, None)
                    if not callable(call) or isinstance(call, type) or name.startswith(("__", "set_")):
                        continue
                    for arguments in ((given,), (given, other), (other, given), (given, 0), ([given, given],)):
                        attempt(call, *arguments)
            print("raised", count)
    """
    num, *raised = (int(line.split()[1]) for line in in_own_process(script, tmp_path / "script.py").splitlines())
    assert len(raised) == num
    assert all(after > before + 1000 for before, after in itertools.pairwise([0, *raised]))


def test_native_code_that_asks_no_subclass_raises(tmp_path: Path) -> None:
    """Constructors and internals reach the storage past ``__torch_function__``; it has no address to give."""
    script = """
        calls = [
            lambda: torch.tensor(weight),
            lambda: torch.Tensor(weight) + 1,
            lambda: torch.FloatTensor(weight) + 1,
            lambda: torch.Tensor._make_subclass(torch.Tensor, weight) + 1,
            lambda: torch.nn.Parameter._make_subclass(torch.nn.Parameter, weight).clone(),
            lambda: torch.Tensor.__new__(torch.Tensor, weight).sum(),
            lambda: other.new_tensor(weight),
            lambda: other.new(weight) + 1,
            lambda: torch._C._to_dlpack(weight),
            lambda: torch.func.vmap(lambda row: row + 1)(weight),
            lambda: torch.Tensor(weight).numpy(),
            lambda: torch.Tensor(weight).is_shared(),
            lambda: torch.Tensor(weight).share_memory_(),
            lambda: torch.Tensor(weight).copy_(other),
            lambda: torch.Tensor(weight).tolist(),
            lambda: other.copy_(torch.Tensor(weight)),
            lambda: torch.mm(torch.Tensor(weight), other),
        ]
        for call in calls:
            attempt(call)
        print("of natives", len(calls), "raised", count)
        for storage in [item.untyped_storage() for item in weights]:
            for name in dir(storage):
                if not name.startswith("_"):
                    for arguments in ((), (storage,), (0,), (4,), (other.untyped_storage(),)):
                        attempt(lambda *given: getattr(storage, name)(*given), *arguments)
        print("still there", weights[-1].untyped_storage().nbytes())
    """
    _, natives, still = in_own_process(script, tmp_path / "script.py").splitlines()
    assert natives == "of natives 17 raised 17"
    assert still == "still there 0"


@pytest.fixture
def _builds_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any build, what keeps a weight from being read where a storage can't refuse."""
    monkeypatch.setattr(storages, "forbid_address", lambda *_: False)


@pytest.mark.usefixtures("_builds_without_cuda")
def test_every_operator_is_refused_and_the_parameter_comes_back() -> None:
    made, original = Wide(), Wide()
    weight = made.blocks[0].to_q.weight
    weight.requires_grad_(True).grad = torch.ones(64, 64)
    seen: list[torch.Tensor] = []
    weight.register_hook(seen.append)
    reference_to, version = weakref.ref(weight), weight._version
    run = compiled(made, {"keep_original": "cpu"})
    with torch.no_grad():
        for batch in (1, 2):  # captured anew with weights that are in float8 already
            inputs = wide_inputs(batch=batch)
            assert relative(run(**inputs), reference(Wide())(**inputs)) < ROUNDING
        natives = (torch.tensor, torch.Tensor, torch.FloatTensor, torch.ones(1).new_tensor, torch.ones(1).new)
        for call in natives:
            with pytest.raises(hvcompile.QuantizedWeightError, match=r"to_q\.weight .*hvcompile\.restore\(model\)"):
                call(weight)
        assert weight.grad.sum() == 64 * 64
        assert weight.own.numel() == 0
        made.requires_grad_(False)
        hvcompile.restore(made)
    assert reference_to() is made.blocks[0].to_q.weight
    assert type(weight) is nn.Parameter
    assert (weight.requires_grad, weight._version) == (False, version)
    assert torch.as_tensor(weight.grad).sum() == 64 * 64
    assert all(map(torch.equal, made.parameters(), original.parameters()))
    weight.grad = None
    torch.autograd.backward((weight.requires_grad_(True) * 3).sum())
    assert (torch.as_tensor(weight.grad) == 3).all()
    assert len(seen) == 1


def test_moved_by_swapping() -> None:
    """Refused, and nothing has moved."""
    made = Wide()
    with torch.no_grad():
        compiled(made)(**wide_inputs())
    held = dict(made.named_parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError):
            made.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(weight is held[name] for name, weight in made.named_parameters())
    assert all(weight.dtype == torch.float32 for weight in made.parameters())
    assert hvcompile.restore(made).dequantized == 15


def test_freed_weights_are_no_aliases_of_one_another(model: Wide) -> None:
    weights = [weight for weight in model.parameters() if isinstance(weight, QuantizedWeight)]
    assert len({weight.untyped_storage()._cdata for weight in weights}) == len(weights) == 15
