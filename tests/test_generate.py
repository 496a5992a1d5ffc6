"""One generation: what is checked before it, what it measures, the file it leaves. The backends here are eager."""

from __future__ import annotations

import copy
import errno
import json
import math
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from PIL import Image
from rich.console import Console
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

import hvcompile
from hvcompile import outputs
from hvcompile.app import batch, cli, generate, metrics, pipelines, reference, runner, sheet, tiny, video
from hvcompile.app.arguments import call_arguments
from hvcompile.app.generate import Request
from hvcompile.app.grid import Grid
from hvcompile.app.tables import generation as tables
from hvcompile.errors import HvcompileError, InputError, OptionError, OutputError, UncompiledModelError

SMALL: dict[str, Any] = {"prompt": "a red ball", "steps": 4, "frames": 5, "height": 32, "width": 48}


def shallow_pipeline(*, is_offloaded: bool = False) -> pipelines.Loaded:
    """The tiny pipeline with a shallow transformer, which is traced in each test."""
    whole = pipelines.load(is_offloaded=is_offloaded)
    model = whole.pipe.transformer
    torch.manual_seed(0)
    shallow = type(model).from_config(
        {**model.config, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    )
    whole.pipe.transformer = shallow.eval()
    return whole


@pytest.fixture(scope="module")
def loaded() -> pipelines.Loaded:
    return shallow_pipeline()


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Eager backends in place of ours and the plain one; the list holds the decisions to report, a transformer call."""
    calls: list[int] = []

    def eager(graph_module: torch.fx.GraphModule, _inputs: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(len(calls))
            return graph_module.forward(*arguments)

        return call

    def stats(_: torch.nn.Module) -> SimpleNamespace:
        if not calls:
            raise UncompiledModelError("not yet")
        steps = [SimpleNamespace(slot=0, reused=i % 3 == 1, difference=0.01 * i or math.inf) for i in calls]
        hits = sum(step.reused for step in steps)
        return SimpleNamespace(graphs=1, recompiles=0, hits=hits, misses=len(steps) - hits, steps=steps)

    for module in (generate, batch):
        monkeypatch.setattr(module, "BACKEND", eager)
    monkeypatch.setattr(reference, "PLAIN", "eager")
    monkeypatch.setattr(hvcompile, "stats", stats)
    return calls


def decode(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_generation_writes_its_video_and_reports_every_step(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    events: list[Any] = []
    result = generate.generate(Request(**SMALL, output=tmp_path / "a.mp4"), events.append, loaded)

    assert [step.reused for step in result.run.steps] == [False, True, False, False]
    assert [step.difference for step in result.run.steps] == [math.inf, 0.01, 0.02, 0.03]
    assert [event for event in events if isinstance(event, metrics.Step)] == list(result.run.steps)
    assert [event for event in events if isinstance(event, str)][-2:] == ["decoding", "writing"]
    assert result.comparison is None
    assert 0 < sum(step.seconds for step in result.run.steps) < result.run.seconds
    frames = decode(tmp_path / "a.mp4")
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"], "nothing else is left behind"


def test_tiles_are_told_one_by_one(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ``compile_vae`` compiles what decodes them, a graph a shape."""
    for name, size in {"min_height": 32, "min_width": 32, "stride_height": 24, "stride_width": 24}.items():
        monkeypatch.setattr(loaded.pipe.vae, f"tile_sample_{name}", size)
    events: list[Any] = []
    plain = generate.generate(Request(**SMALL, output=tmp_path / "a.mp4"), events.append, loaded)
    assert [event for event in events if isinstance(event, str)][-6:] == [
        "decoding",
        *(f"decoding {done} of 4 tiles" for done in (1, 2, 3, 4)),
        "writing",
    ]
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(loaded.pipe.vae.decoder, "compile", lambda **given: compiled.append(given))
    again = generate.generate(Request(**SMALL, output=tmp_path / "b.mp4", compile_vae=True), loaded=loaded)
    assert compiled == [{"dynamic": False}]
    assert (again.run.frames == plain.run.frames).all()
    monkeypatch.delattr(loaded.pipe.vae, "decoder")
    with pytest.raises(InputError, match="compile-vae has nothing to compile"):
        pipelines.compile_decoder(loaded)


def test_a_comparison_runs_the_plain_model_first_from_the_same_noise(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    result = generate.generate(Request(**SMALL, compare=True, output=tmp_path / "a.mp4"), loaded=loaded)
    assert result.comparison is not None
    assert result.comparison.plain.num_reused == 0
    assert len(backends) == 4, "the plain model ran elsewhere"
    # both are eager here, so the clips are the same to the last bit
    assert result.comparison.quality.psnr == (math.inf,) * 5
    assert result.comparison.quality.mean_ssim == pytest.approx(1.0, abs=1e-6)
    assert result.comparison.total_speedup > 0
    assert result.comparison.step_speedup is not None
    assert result.comparison.quality.mean_temporal_psnr == math.inf
    assert result.sheet == tmp_path / "a.sheet.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.sheet.png"]


def test_a_comparison_leaves_its_sheet_and_its_figures_where_they_were_asked_for(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    places: dict[str, Any] = {
        "output": tmp_path / "a.mp4",
        "sheet_file": tmp_path / "b.png",
        "json_file": tmp_path / "c.json",
    }
    generate.generate(Request(**SMALL, **places, compare=True), loaded=loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.png", "c.json"]
    record = json.loads((tmp_path / "c.json").read_text())
    assert (record["prompt"], record["seed"], record["steps"], record["steps_reused"]) == ("a red ball", 0, 4, 1)
    assert (record["frames"], record["height"], record["width"]) == (5, 32, 48)
    assert record["psnr_db"] == {"mean": None, "worst": None, "each": [None] * 5}
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.format == "PNG"


def test_where_plain_torch_compile_does_not_fit_hvfast_makes_the_reference(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    clip = np.random.default_rng(0).random((5, 32, 48, 3), np.float32)

    def run(self: Any, *_: Any) -> metrics.Run:
        asked.append((self._name, self._compile_arguments))
        if self._name == reference.PLAIN:
            raise InputError("there is not enough memory") from torch.OutOfMemoryError("CUDA out of memory")
        steps = [metrics.Step(backend=str(self._name), index=place, num_steps=4, seconds=1.0) for place in range(4)]
        return metrics.Run(frames=clip, seconds=9.0, steps=tuple(steps))

    monkeypatch.setattr(runner.Runner, "run", run)
    request = Request(**SMALL, compare=True, output=tmp_path / "a.mp4", json_file=tmp_path / "a.json", mode="max")
    result = generate.generate(request, loaded=loaded)
    assert [arguments for _, arguments in asked] == [{}, {"mode": "exact"}, {"mode": "max"}]
    assert any("plain torch.compile does not fit in the memory" in note for note in result.notes)
    assert json.loads((tmp_path / "a.json").read_text())["reference"]["backend"] == reference.EXACT

    def fails(self: Any, *_: Any) -> metrics.Run:
        raise InputError("another reason") from ValueError("no")

    monkeypatch.setattr(runner.Runner, "run", fails)
    with pytest.raises(InputError, match="another reason"):
        generate.generate(request, loaded=loaded)


def test_a_plain_run_that_is_not_finite_is_told_before_the_fast_one_is_made(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> metrics.Run:
        return metrics.Run(frames=np.full((1, 16, 16, 3), np.nan, np.float32), seconds=1.0, steps=())

    monkeypatch.setattr(runner.Runner, "run", broken)
    request = Request(**SMALL, compare=True, output=tmp_path / "a.mp4", json_file=tmp_path / "a.json")
    with pytest.raises(InputError, match="the pixels of the plain compiled model are not all finite: give dtype"):
        generate.generate(request, loaded=loaded)
    (file,) = tmp_path.iterdir()
    assert (
        "the plain compiled model are not all finite"
        in json.loads(file.read_text(), parse_constant=pytest.fail)["error"]
    )


def test_a_run_that_is_not_finite_has_a_record_that_says_so(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = runner.Runner.run

    def broken(self: Any, job: Any, arguments: Any) -> Any:
        made = run(self, job, arguments)
        steps = tuple(replace(step, difference=math.nan) for step in made.steps)
        return replace(made, frames=made.frames * np.float32(np.nan), steps=steps)

    monkeypatch.setattr(runner.Runner, "run", broken)
    with pytest.raises(InputError, match=r"a\.mp4 are not all finite"):
        generate.generate(Request(**SMALL, output=tmp_path / "a.mp4", json_file=tmp_path / "a.json"), loaded=loaded)
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert "the pixels of a.mp4 are not all finite" in record["error"]
    assert (record["steps"], [step["difference"] for step in record["each_step"]]) == (4, [None] * 4)


def test_with_true_guidance_a_step_is_reused_only_when_both_its_calls_are(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    request = Request(**SMALL, true_cfg=2.0, negative_prompt="a dog", output=tmp_path / "a.mp4")
    result = generate.generate(request, loaded=loaded)
    assert len(backends) == 8
    assert [step.reused for step in result.run.steps] == [False] * 4
    assert [step.difference for step in result.run.steps] == [math.inf, 0.03, 0.05, 0.07]


def test_a_second_generation_does_not_count_the_first_ones_steps(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    for _ in range(2):
        result = generate.generate(Request(**SMALL, output=tmp_path / "a.mp4"), loaded=loaded)
    assert [step.difference for step in result.run.steps] == [0.04, 0.05, 0.06, 0.07]


def test_the_seed_and_the_prompt_make_the_clip(loaded: pipelines.Loaded, backends: list[int], tmp_path: Path) -> None:
    def clip(**changes: Any) -> metrics.Frames:
        request = Request(**{**SMALL, **changes}, output=tmp_path / "a.mp4")
        return generate.generate(request, loaded=loaded).run.frames

    assert np.array_equal(clip(), clip())
    assert not np.array_equal(clip(), clip(seed=1))
    assert not np.array_equal(clip(), clip(prompt="a blue box"))


@pytest.mark.parametrize("how", ["model", "blocks", "group"])
def test_an_offloaded_pipeline_makes_the_same_clip(how: str, loaded: pipelines.Loaded, tmp_path: Path) -> None:
    """From memory to memory: no GPU is needed, and all moves are made."""
    request = Request(**SMALL, mode="exact", backend_settings=("lower=eager",), output=tmp_path / "a.mp4")
    offloaded = shallow_pipeline(is_offloaded=True)
    pipelines.offload(offloaded, how)
    assert offloaded.device == torch.device("cpu")
    expected = generate.generate(request, loaded=loaded)
    made = generate.generate(request, loaded=offloaded)
    assert np.allclose(made.run.frames, expected.run.frames, atol=1e-4)
    assert not any("compiled in pieces" in note for note in expected.notes)
    assert any("compiled in pieces" in note for note in made.notes)


def test_options_and_mode_reach_the_backend_as_torch_compile_takes_them(tmp_path: Path) -> None:
    def arguments(**given: Any) -> dict[str, Any]:
        return Request(prompt="x", output=tmp_path / "a.mp4", **given).compile_arguments()

    assert arguments() == {}
    assert arguments(mode="exact") == {"mode": "exact"}
    assert arguments(threshold=0.0) == {"options": {"first_block_cache": {"threshold": 0.0}}}
    assert arguments(dump=Path("graphs")) == {"options": {"dump": "graphs"}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"frames": -3}, "frames is -3: give 1 or more"),
        ({"offload": "disk"}, "offload 'disk' is unknown: give model or blocks or group or none"),
        ({"offload": "model"}, "offload 'model' has nothing to offload from: the device is the CPU"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": 3_000_000_000}, "fps is 3000000000: give 1000 or less"),
        (
            {"compare": True, "sheet_file": Path("out.png"), "json_file": Path("out.json"), "html_file": Path("no.x")},
            "html",
        ),
        (
            {"output": Path("a.png"), "compare": True, "sheet_file": Path("a.png")},
            "sheet 'a.png' is the file of output too",
        ),
        ({"lora": ("none.safetensors",)}, "lora 'none.safetensors' is not there"),
        ({"lora": ("a:nan",)}, "the scale is nan: give a finite number"),
        ({"seed": 2**64}, "fits in 64 bits"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"mode": "fastest"}, "mode 'fastest' is unknown.*exact"),
        ({"mode": "exact", "threshold": 0.1}, "options ask for 'first_block_cache', which mode='exact' rules out"),
        ({"mode": "exact", "fp8": True}, "options ask for 'fp8', which mode='exact' rules out"),
        ({"true_cfg": 3.0}, "without negative-prompt"),
        ({"output": Path("/")}, "is a directory"),
        ({"output": Path("no/such/out.mp4")}, "no directory 'no/such'"),
        ({"output": Path("out.txt")}, "no video or picture file.*.mp4"),
        ({"device": "toaster"}, "device 'toaster' can't be used.*cpu"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown.*bfloat16"),
        ({"model": "/no/such/model"}, "neither a directory nor a hub id"),
        ({"dump": Path(__file__)}, "is a file: give a directory"),
        ({"sheet_file": Path("s.png")}, "sheet 's.png' is of a comparison or of several clips: give compare too"),
        ({"compare": True, "sheet_file": Path("s.gif")}, "sheet 's.gif' is no PNG picture.*.png"),
        ({"compare": True, "json_file": Path("no/f.json")}, "json 'no/f.json': there is no directory 'no'"),
    ],
)
def test_what_is_wrong_whatever_the_model_is_refused_before_loading(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "load", lambda *_, **__: pytest.fail("nothing may be loaded"))
    with pytest.raises((InputError, OptionError), match=message) as caught:
        generate.generate(Request(**{"prompt": "x", "output": Path("out.mp4"), **given}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 100}, "height is 100, .* multiples of 16: give 96 or 112"),
        ({"width": 8}, "width is 8, .*: give 16$"),
        ({"frames": 16}, "multiple of 4, plus 1: give 13 or 17"),
        ({"frames": 2}, "give 1 or 5"),
        ({"negative_prompt": "a dog"}, "negative-prompt does nothing .* true-cfg"),
    ],
)
def test_what_the_pipeline_does_not_take_is_refused_before_compiling(
    given: dict[str, Any], message: str, loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        generate.generate(Request(**{**SMALL, **given}, output=tmp_path / "a.mp4"), loaded=loaded)
    assert not backends


@pytest.mark.parametrize("shape", [(5, 32, 48), (1, 16, 16), (3, 66, 98), (2, 33, 47)])
def test_the_file_has_the_frames_in_full_size(shape: tuple[int, int, int], tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, shape[2], dtype=np.float32)[None, None, :, None]
    frames = np.broadcast_to(ramp, (*shape, 3)).copy()
    video.write(frames, tmp_path / "a.mp4", fps=12)
    decoded = decode(tmp_path / "a.mp4")
    assert [frame.shape for frame in decoded] == [(*shape[1:], 3)] * shape[0]
    assert np.abs(decoded[0] / 255 - frames[0]).mean() < 0.03  # H.264 is lossy
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12


def test_pixels_that_are_not_finite_leave_the_old_file(tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    output.write_bytes(b"old")
    with pytest.raises(InputError, match="not all finite: give dtype"):
        video.write(np.full((1, 16, 16, 3), np.nan, np.float32), output, fps=24)
    assert output.read_bytes() == b"old"


@pytest.mark.parametrize("error", [av.error.EOFError(1, "End of file"), OSError(28, "No space left on device")])
def test_frames_that_no_file_takes_are_kept(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says where, and the file that was there is as it was."""
    output = tmp_path / "a.mp4"
    output.write_bytes(b"old")
    frames = np.random.default_rng(0).random((3, 16, 24, 3), np.float32)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(av, "open", fails)
    with pytest.raises(
        OutputError, match=r"a\.mp4' can't be written \(.*\): the frames are kept in '.*\.npz'"
    ) as raised:
        video.write(frames, output, fps=12)
    assert "\n" not in str(raised.value)
    (kept,) = tmp_path.glob("*.npz")
    assert str(kept) in str(raised.value)
    with np.load(kept) as held:
        assert np.array_equal(held["frames"], (frames * 255).round().astype(np.uint8))
        assert held["fps"] == 12
    assert output.read_bytes() == b"old"


def test_frames_go_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next place is taken where a directory takes nothing, and nothing half written is left in it."""
    full, free = tmp_path / "full", tmp_path / "free"
    full.mkdir()
    free.mkdir()
    monkeypatch.chdir(free)

    def write(file: Any) -> None:
        if Path(file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.name}").resolve().parent == full:
            raise OSError(28, "No space left on device")
        file.write(b"all")

    kept = outputs.keep_elsewhere("a-frames.npz", write, instead_of=full / "a.mp4")
    assert kept is not None
    assert (kept.parent, kept.read_bytes()) == (free, b"all")
    assert not list(full.iterdir())


def test_a_missing_compiler_is_told_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "load", None)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(InputError, match=r"no C\+\+ compiler.*apt install g\+\+.*CXX"),
    ):
        generate.generate(Request(**SMALL, output=tmp_path / "a.mp4"))


def test_a_cache_that_can_t_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"can't write its code to .*cache.*TORCHINDUCTOR_CACHE_DIR"):
        generate.generate(Request(**SMALL, output=tmp_path / "a.mp4"))


def test_a_run_without_a_compiler_writes_its_video(loaded: pipelines.Loaded, tmp_path: Path) -> None:
    """As with TORCHDYNAMO_DISABLE=1: nothing is known of graphs, and all that was computed is there."""
    fresh = replace(loaded, pipe=copy.copy(loaded.pipe))
    fresh.pipe.transformer = copy.deepcopy(loaded.pipe.transformer)
    with torch.compiler.set_stance("force_eager"):
        result = generate.generate(Request(**SMALL, output=tmp_path / "a.mp4"), loaded=fresh)
    assert result.stats is None
    assert len(decode(tmp_path / "a.mp4")) == 5
    table = Console(width=100)
    with table.capture() as captured:
        table.print(tables.summary(result))
    assert "none: the model ran without a compiler" in captured.get()


def test_a_directory_is_loaded_by_the_same_code_with_the_pipelines_own_defaults(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    loaded = pipelines.load(str(tmp_path), dtype="bfloat16")
    assert loaded.pipe.transformer.dtype == torch.bfloat16
    assert loaded.default("num_inference_steps") == 50
    request = Request(prompt="x", output=tmp_path / "a.mp4", steps=3)
    assert call_arguments(request, loaded) == {"num_inference_steps": 3}
    assert Grid.of(loaded.pipe) == Grid(spatial=16, temporal=4)


def test_what_is_no_pipeline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"without model_index\.json"):
        pipelines.load(str(tmp_path))
    index = tmp_path / "model_index.json"
    index.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        pipelines.load(str(tmp_path))
    index.write_text('{"_class_name": "HunyuanVideoPipeline", "vae": ["diffusers", "AutoencoderKLHunyuanVideo"]}')
    with pytest.raises(InputError, match="can't be loaded"):
        pipelines.load(str(tmp_path))
    with pytest.raises(InputError, match="is a file"):
        pipelines.load(str(index))

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no\nnetwork " + "x" * 500)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", unreachable)
    with pytest.raises(
        InputError, match=r"'owner/name' is no directory here and can't be fetched .* no network"
    ) as caught:
        pipelines.load("owner/name")
    assert len(str(caught.value)) < 400


def test_another_pipeline_is_followed_by_the_same_code(backends: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny.llama_tokenizer()
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_heads=2))
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1).eval(),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            text_embed_dim=16,
            sample_width=8,
            sample_height=8,
        ).eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    loaded = pipelines._loaded(pipe, "m", torch.device("cpu"), {})
    assert Grid.of(pipe) == Grid(spatial=16, temporal=4)
    request = Request(**{**SMALL, "frames": 9}, negative_prompt="a dog", guidance=2.0, output=tmp_path / "a.mp4")
    result = generate.generate(request, loaded=loaded)
    assert [step.reused for step in result.run.steps] == [False, True, False, False]
    assert [frame.shape for frame in decode(tmp_path / "a.mp4")] == [(32, 48, 3)] * 9
    with pytest.raises(InputError, match="true-cfg can't be used: CogVideoXPipeline has no true_cfg_scale"):
        generate.generate(replace(request, true_cfg=2.0), loaded=loaded)


def test_a_pipeline_that_can_t_be_followed_is_refused() -> None:
    class Plain:
        def __call__(self, prompt: str) -> None: ...

    def message(**components: torch.nn.Module) -> str:
        pipe: Any = Plain()
        pipe.components = components
        with pytest.raises(InputError) as caught:
            pipelines._loaded(pipe, "m", torch.device("cpu"), {})
        return str(caught.value)

    assert "is a Plain, which has no transformer to compile" in message(unet=torch.nn.Linear(1, 1))
    assert "lacks num_inference_steps, generator, output_type" in message(transformer=torch.nn.Linear(1, 1))


def test_memory_that_runs_out_and_other_failures_of_a_pipeline_are_one_line(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cause is named, and what could be done; the frames of an earlier run stay."""
    request = Request(**SMALL, output=tmp_path / "a.mp4")

    def fail(error: Exception) -> str:
        monkeypatch.setattr(type(loaded.pipe), "encode_prompt", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(HvcompileError) as caught:
            generate.generate(request, loaded=loaded)
        assert "\n" not in str(caught.value)
        return f"{type(caught.value).__name__}: {caught.value}"

    memory = fail(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate"))
    assert memory.startswith("InputError: there is not enough memory (HunyuanVideoPipeline, before its first step")
    assert "give a smaller height, width or frames" in memory
    other = fail(KeyError("no such key"))
    assert other.startswith("RunError: HunyuanVideoPipeline failed before its first step ended: KeyError: ")
    assert "shows the traceback" in other


def test_a_model_that_is_no_whole_graph_is_compiled_in_pieces(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh = replace(loaded, pipe=copy.copy(loaded.pipe))
    model = fresh.pipe.transformer = copy.deepcopy(loaded.pipe.transformer)
    forward = type(model).forward

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", broken)
    result = generate.generate(Request(**{**SMALL, "prompt": "a red circle"}, output=tmp_path / "a.mp4"), loaded=fresh)
    assert len(result.run.steps) == 4
    (told,) = result.notes
    assert "compiled in pieces, since Dynamo can't keep the model in one graph: " in told
    assert len(decode(tmp_path / "a.mp4")) == 5


def test_words_that_the_tiny_model_does_not_know_are_told(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    given = {**SMALL, "prompt": "A red circle, moves left over a zebra. zebra"}
    (note,) = generate.generate(Request(**given, output=tmp_path / "a.mp4"), loaded=loaded).notes
    assert note.startswith("the tiny model was not trained on zebra, and draws something else")
    assert tiny.unknown_words(["a small red circle moves to the left over a blue background", "RED, red"]) == []


def test_several_prompts_and_seeds_are_one_compilation_and_a_file_each(
    loaded: pipelines.Loaded, backends: list[int], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two of them\na red circle\n\na blue square\n")
    given = {**SMALL, "prompt": None, "prompts_file": prompts, "seeds": "0-1", "json_file": tmp_path / "a.json"}
    made = batch.generate_all(Request(**given, output=tmp_path / "a.mp4"), loaded=loaded)
    names = [f"a-{number}-seed{seed}" for number in (1, 2) for seed in (0, 1)]
    assert [clip.job.output.stem for clip in made.clips] == names
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.json",
        "a.sheet.png",
        "prompts.txt",
        *(f"{name}.mp4" for name in names),
    }
    record = json.loads((tmp_path / "a.json").read_text())
    assert [(clip["prompt"], clip["seed"], clip["frames"], clip["error"]) for clip in record["clips"]] == [
        ("a red circle", 0, 5, None),
        ("a red circle", 1, 5, None),
        ("a blue square", 0, 5, None),
        ("a blue square", 1, 5, None),
    ]
    alone = generate.generate(
        Request(**{**SMALL, "prompt": "a blue square"}, seed=1, output=tmp_path / "b.mp4"), loaded=loaded
    )
    assert alone.output.read_bytes() == (tmp_path / "a-2-seed1.mp4").read_bytes()


def test_of_several_clips_one_that_fails_is_named_and_the_others_are_made(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = runner.Runner.run

    def sometimes(self: Any, job: Any, arguments: Any) -> Any:
        made = run(self, job, arguments)
        return replace(made, frames=made.frames * np.float32(np.nan)) if job.seed == 1 else made

    monkeypatch.setattr(runner.Runner, "run", sometimes)
    made = batch.generate_all(Request(**SMALL, seeds="0-2", output=tmp_path / "a.mp4"), loaded=loaded)
    assert [clip.error is None for clip in made.clips] == [True, False, True]
    assert "not all finite" in str(made.clips[1].error)
    assert {path.name for path in tmp_path.iterdir()} == {"a-seed0.mp4", "a-seed2.mp4", "a.sheet.png"}


def test_of_an_interrupted_run_what_was_made_stays(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = runner.Runner.run

    def until(self: Any, job: Any, arguments: Any) -> Any:
        if job.seed == 1:
            raise KeyboardInterrupt
        return run(self, job, arguments)

    monkeypatch.setattr(runner.Runner, "run", until)
    request = Request(**SMALL, seeds="0-2", json_file=tmp_path / "a.json", output=tmp_path / "a.mp4")
    with pytest.raises(KeyboardInterrupt):
        batch.generate_all(request, loaded=loaded)
    assert {path.name for path in tmp_path.iterdir()} == {"a-seed0.mp4", "a.sheet.png", "a.json"}
    assert [clip["seed"] for clip in json.loads((tmp_path / "a.json").read_text())["clips"]] == [0]


def test_files_that_are_read_may_go_once_the_run_has_begun(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts, options = tmp_path / "prompts.txt", tmp_path / "options.json"
    prompts.write_text("a red circle\na blue square\n")
    options.write_text("{}")
    run = runner.Runner.run

    def remove(self: Any, job: Any, arguments: Any) -> Any:
        prompts.unlink(missing_ok=True)
        options.unlink(missing_ok=True)
        return run(self, job, arguments)

    monkeypatch.setattr(runner.Runner, "run", remove)
    given = {**SMALL, "prompt": None, "prompts_file": prompts, "options_file": options}
    request = Request(**given, json_file=tmp_path / "a.json", output=tmp_path / "a.mp4")
    assert [clip.error for clip in batch.generate_all(request, loaded=loaded).clips] == [None, None]
    assert len(json.loads((tmp_path / "a.json").read_text())["clips"]) == 2


def test_a_sheet_that_can_t_be_written_loses_nothing_else(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise OutputError("the sheet can't be written (No space left on device)")

    monkeypatch.setattr(sheet, "write", fail)
    request = Request(**SMALL, compare=True, json_file=tmp_path / "a.json", output=tmp_path / "a.mp4")
    result = generate.generate(request, loaded=loaded)
    assert result.problems == ("the sheet can't be written (No space left on device)",)
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json"}


def test_a_step_that_compiles_on_the_way_is_no_step_after(tmp_path: Path) -> None:
    """As the first one of a second denoiser."""
    seconds, compiled = (5.0, 1.0, 3.0, 1.0), (True, False, True, False)
    steps = tuple(
        metrics.Step(backend="x", index=index, num_steps=4, seconds=took, compiled=did)
        for index, (took, did) in enumerate(zip(seconds, compiled, strict=True))
    )
    run = metrics.Run(frames=np.zeros((1, 8, 8, 3), np.float32), seconds=10.0, steps=steps)
    assert (run.step_seconds, run.compile_seconds) == (1.0, 6.0)


# From the command line: how a run ends that is stopped, or that the system refuses a file.

COMMAND = ("generate", "a red circle", "--quiet", "--steps", "4", "--frames", "5", "--height", "32", "--width", "48")


@pytest.mark.parametrize("seeds", ["0", "0-2"])
def test_an_interrupt_among_the_steps_is_one_line_and_loses_nothing_that_was_finished(
    seeds: str, loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = loaded.pipe.scheduler.step
    num_calls = 4 * (seeds == "0-2") + 2

    def stepped(*arguments: Any, **more: Any) -> Any:
        if len(backends) == num_calls:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments, **more)

    monkeypatch.setattr(pipelines, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(loaded.pipe.scheduler, "step", stepped, raising=False)
    before = tmp_path / "a.mp4"
    before.write_bytes(b"old")
    files = ("-o", str(before), "--json", str(tmp_path / "a.json"))
    done = CliRunner().invoke(cli.app, [*COMMAND, "--seeds", seeds, *files])
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "stopped\n")
    assert len(backends) == num_calls
    assert before.read_bytes() == b"old"
    finished = {"a-seed0.mp4", "a.sheet.png", "a.json"} if seeds == "0-2" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", *finished}
    if finished:
        assert len(decode(tmp_path / "a-seed0.mp4")) == 5


def test_a_full_disk_is_one_line_and_the_frames_and_the_record_are_kept(
    loaded: pipelines.Loaded, backends: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pipelines, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(Path, "write_bytes", full)
    output = tmp_path / "a.mp4"
    done = CliRunner().invoke(cli.app, [*COMMAND, "-o", str(output), "--json", str(tmp_path / "a.json")])
    (line,) = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (2, "")
    assert line.startswith(f"error: {str(output)!r} can't be written (No space left on device): the frames are kept in")
    (kept,) = tmp_path.glob("*.npz")
    with np.load(kept) as held:
        assert held["frames"].shape == (5, 32, 48, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", kept.name}
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["steps"] == 4
    assert f"error: {record['error']}" == line


def test_two_runs_that_write_one_file_at_once_leave_one_of_both_whole(tmp_path: Path) -> None:
    clips = [np.random.default_rng(seed).random((4, 16, 24, 3), np.float32) for seed in range(2)]
    for number, clip in enumerate(clips):
        video.write(clip, tmp_path / f"{number}.mp4", fps=12)
    whole = {(tmp_path / f"{number}.mp4").read_bytes() for number in range(2)}
    assert len(whole) == 2
    together, output = threading.Barrier(2), tmp_path / "a.mp4"

    def write(clip: metrics.Frames) -> None:
        for _ in range(2):
            together.wait(60)
            video.write(clip, output, fps=12)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, clips))
    assert output.read_bytes() in whole
    assert {path.name for path in tmp_path.iterdir()} == {"0.mp4", "1.mp4", "a.mp4"}
