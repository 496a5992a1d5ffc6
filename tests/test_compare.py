"""Two video files against each other: the figures, the files that are left, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from hvcompile.app import compare, metrics, video
from hvcompile.errors import InputError


def ramp(frames: int = 3, height: int = 32, width: int = 48, brightness: float = 0.0) -> metrics.Frames:
    row = np.linspace(0, 0.8, width, dtype=np.float32) + np.float32(brightness)
    return np.broadcast_to(row[None, None, :, None], (frames, height, width, 3)).copy()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    shapes: dict[str, dict[str, Any]] = {
        "reference": {},
        "brighter": {"brightness": 0.1},
        "longer": {"frames": 4},
        "wider": {"width": 64},
        "one": {"frames": 1},
        "odd": {"height": 33, "width": 47},
        "flat": {"height": 2},
    }
    for name, shape in shapes.items():
        video.write(ramp(**shape), folder / f"{name}.mp4", fps=12)
    return {name: folder / f"{name}.mp4" for name in shapes}


def test_the_figures_the_sheet_and_the_json(files: dict[str, Path], tmp_path: Path) -> None:
    result = compare.compare_files(
        files["reference"], files["brighter"], sheet_file=tmp_path / "s.png", json_file=tmp_path / "f.json"
    )
    assert (result.frames, result.height, result.width) == (3, 32, 48)
    assert result.quality.mean_psnr == pytest.approx(20, abs=0.5)  # 10 log10(1 / 0.1^2), less what H.264 changed
    assert (result.quality.mean_temporal_psnr or 0) > 40  # brighter by the same in every frame
    record = json.loads((tmp_path / "f.json").read_text())
    assert record == json.loads(json.dumps(result.record()))
    assert record["psnr_db"]["each"] == list(result.quality.psnr)
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 3 * 48


@pytest.mark.parametrize("name", ["reference", "one", "odd"])
def test_a_file_is_identical_to_itself(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    result = compare.compare_files(files[name], files[name], sheet_file=tmp_path / "s.png")
    assert result.quality.mean_psnr == np.inf
    assert result.quality.mean_ssim == pytest.approx(1)
    assert (result.quality.mean_temporal_psnr is None) == (name == "one")


@pytest.mark.parametrize(
    ("reference", "clip", "message"),
    [
        ("none.mp4", "reference.mp4", "reference '.*none.mp4' is not there: give a video file"),
        ("reference.mp4", "none.mp4", "clip '.*none.mp4' is not there: give a video file"),
        ("reference.mp4", ".", "clip '.*' is a directory: give a video file in it"),
        ("text.mp4", "reference.mp4", "reference '.*text.mp4' can't be read as a video .*: give a whole video file"),
        ("cut.mp4", "reference.mp4", "reference '.*cut.mp4' can't be read as a video .*: give a whole video file"),
        ("reference.mp4", "sound.wav", "clip '.*sound.wav' holds no video frames: give a video file"),
        (
            "reference.mp4",
            "longer.mp4",
            "clip '.*longer.mp4' has a length of 4 frames, .* of 3: give two videos of one",
        ),
        ("reference.mp4", "one.mp4", "clip '.*one.mp4' has a length of 1 frames, .* of 3: give two videos of one"),
        (
            "reference.mp4",
            "wider.mp4",
            "clip '.*wider.mp4' is 64x32, but reference .* is 48x32: give two videos of one",
        ),
        ("flat.mp4", "flat.mp4", "clip '.*flat.mp4' is 48x2: give videos of 3 pixels or more"),
    ],
)
def test_what_can_t_be_compared_is_one_line(
    reference: str, clip: str, message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    folder = files["reference"].parent
    (folder / "text.mp4").write_text("no video\n" * 100)
    (folder / "cut.mp4").write_bytes(files["reference"].read_bytes()[:400])
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    with pytest.raises(InputError, match=message) as caught:
        compare.compare_files(folder / reference, folder / clip, sheet_file=tmp_path / "s.png")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"sheet_file": "s.jpg"}, "sheet '.*s.jpg' is no PNG picture: give a name that ends in .png"),
        ({"json_file": "no/f.json"}, "json '.*f.json': there is no directory '.*no': make it first"),
        ({"json_file": "f.txt"}, "json '.*f.txt' is no JSON file: give a name that ends in .json"),
        ({"sheet_file": "."}, "sheet '.*' is a directory: give a file name, such as .*out.png"),
    ],
)
def test_outputs_are_checked_before_anything_is_read(outputs: dict[str, str], message: str, tmp_path: Path) -> None:
    given: Any = {name: tmp_path / value for name, value in outputs.items()}
    with pytest.raises(InputError, match=message):
        compare.compare_files(tmp_path / "none.mp4", tmp_path / "none.mp4", **given)
