"""Values by name on the command line, jobs of several prompts and seeds, and what fits a pipeline's argument."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hvcompile.app import adapters, arguments, pictures
from hvcompile.app.request import assignments, jobs
from hvcompile.app.request.generate import Request
from hvcompile.errors import InputError


def test_assignments_are_json_where_they_read_as_such() -> None:
    texts = ["a=3", "b=0.5", "c=true", "d=null", "e=some text", 'f="3"', "g=[1, 2]", "h=", "i=x=y"]
    assert assignments.assignments(texts, "--set", "a=1") == {
        "a": 3,
        "b": 0.5,
        "c": True,
        "d": None,
        "e": "some text",
        "f": "3",
        "g": [1, 2],
        "h": "",
        "i": "x=y",
    }
    for text in ("a=NaN", "a=[1, Infinity]", "a=1e999", "a=" + "[" * 100_000):
        assert assignments.assignments([text], "--set", "a=1") == {"a": text[2:]}, "it is no JSON, so it is text"
    for wrong, message in ((["a"], "is no assignment: give name=value"), (["a=1", "a=2"], "gives a twice")):
        with pytest.raises(InputError, match=message):
            assignments.assignments(wrong, "--set", "a=1")


def test_dotted_names_are_fields_of_sections() -> None:
    flat = {"cache.threshold": 0.1, "cache.hits": 3, "fp8": True}
    assert assignments.nested(flat, "--option") == {"cache": {"threshold": 0.1, "hits": 3}, "fp8": True}
    for wrong in ({"a": True, "a.b": 1}, {"a.b": 1, "a": True}):
        with pytest.raises(InputError, match="both as a whole and by its fields"):
            assignments.nested(wrong, "--option")
    for name in ("a.b.c", "a.", ".b"):
        with pytest.raises(InputError, match=r"give a section, or section\.field"):
            assignments.nested({name: 1}, "--option")


def test_options_of_several_places_are_one_dict_unless_two_set_one_field(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"first_block_cache": {"max_consecutive_hits": 3}, "lower": "eager"}')
    request = Request(
        prompt="x",
        options_file=file,
        threshold=0.1,
        mode="max",
        dynamic=True,
        backend_settings=("attention.hoist=false",),
        output=tmp_path / "a.mp4",
    )
    assert request.compile_arguments() == {
        "dynamic": True,
        "options": {
            "first_block_cache": {"max_consecutive_hits": 3, "threshold": 0.1},
            "lower": "eager",
            "attention": {"hoist": False},
            "mode": "max",
        },
    }
    with pytest.raises(InputError, match="sets first_block_cache, which another option of the command sets"):
        Request(prompt="x", threshold=0.1, backend_settings=("first_block_cache.threshold=0.2",)).backend_options()
    for content, message in (("[1]", "holds a list"), ("{", "is no JSON")):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            Request(prompt="x", options_file=file).backend_options()
    with pytest.raises(InputError, match="can't be read"):
        Request(prompt="x", options_file=tmp_path / "none.json").backend_options()


@pytest.mark.parametrize(("text", "seeds"), [("3", (3,)), ("0-3", (0, 1, 2, 3)), ("7, 1-2", (7, 1, 2)), ("5-5", (5,))])
def test_seeds_are_numbers_and_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert jobs.read_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no number and no range"),
        ("a-b", "is no number and no range"),
        ("-3", "is no number and no range"),
        ("3-", "is no number and no range"),
        ("4-2", "runs backwards: give 2-4"),
        ("1,0-2", "gives a seed twice"),
        ("0-10000000000", "has over 100000 seeds"),
        ("9" * 5000, "is no number and no range"),
    ],
)
def test_seeds_that_are_none_are_told(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        jobs.read_seeds(text)


def test_files_of_jobs_are_named_after_what_differs() -> None:
    output = Path("o/a.mp4")
    assert [job.output for job in jobs.jobs(["x"], [7], output)] == [output]
    assert [job.output.name for job in jobs.jobs(["x"], [7, 8], output)] == ["a-seed7.mp4", "a-seed8.mp4"]
    many = jobs.jobs([str(number) for number in range(12)], [7], output)
    assert [job.output.name for job in many][::11] == ["a-01.mp4", "a-12.mp4"]


def test_a_file_without_prompts_is_told(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf# a comment\na red ball\n")
    assert jobs.read_prompts(file) == ("a red ball",)
    for content, message in ((b"\n# none\n", "holds no prompt"), (b"\xff\xfe", "is no text in UTF-8")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            jobs.read_prompts(file)
    with pytest.raises(InputError, match="can't be read"):
        jobs.read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None}, "there is no prompt: give PROMPT, or --prompts FILE"),
        ({"prompts_file": Path("p.txt")}, "PROMPT and --prompts are both given"),
        ({"seed": 1, "seeds": "2"}, "seed and seeds are both given"),
        ({"seeds": "0-1", "compare": True}, "compare can't be given with several prompts or seeds"),
        ({"seeds": "0-1", "html_file": Path("r.html")}, "html can't be given with several"),
        ({"image": Path("none.png")}, "image 'none.png' can't be read .No such file"),
        ({"last_image": Path(__file__)}, "last-image .* is no picture"),
        ({"call_settings": ("a",)}, "--set 'a' is no assignment"),
    ],
)
def test_what_does_not_go_together_is_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(**{"prompt": "x", **given}).check()


class Kind(enum.Enum):
    ONE = "one"


@pytest.mark.parametrize(
    ("value", "hint", "does"),
    [
        (3, int, True),
        (3, float, True),
        (3.5, int, False),
        (True, int, False),
        (True, bool, True),
        ("x", str, True),
        (None, int | None, True),
        (None, int, False),
        ([1, 2], list[int], True),
        ([1, "a"], list[int], False),
        ([0.5], tuple[float, ...], True),
        ({"a": 1}, dict[str, Any] | None, True),
        (3, torch.Tensor | None, False),
        ("x", Any, True),
    ],
)
def test_values_fit_types(value: Any, hint: Any, does: bool) -> None:
    assert arguments.fits(value, hint) is does


def test_a_member_of_an_enumeration_is_given_by_its_value() -> None:
    assert arguments._member("kind", "one", Kind) is Kind.ONE
    with pytest.raises(InputError, match="allowed is one of one"):
        arguments._member("kind", "two", Kind)


@pytest.mark.parametrize(
    ("text", "place", "scale"),
    [("a", "a", 1.0), ("a:0.8", "a", 0.8), ("owner/name:-1", "owner/name", -1.0), ("https://x/y", "https://x/y", 1.0)],
)
def test_an_adapter_has_a_scale(text: str, place: str, scale: float) -> None:
    assert adapters.parse(text) == (place, scale)


def test_an_adapters_scale_is_a_number() -> None:
    with pytest.raises(InputError, match=r"'big' is no scale: give PATH, or PATH:0.8"):
        adapters.parse("a:big")


def read(picture: Image.Image, file: Path, **how: Any) -> Any:
    picture.save(file, **how)
    return np.asarray(pictures.read(file, "image"))


def test_pictures_are_read_as_they_are_seen(tmp_path: Path) -> None:
    """Turned as a camera says, deep ones scaled and not clamped, and white behind what is transparent."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read(Image.new("RGB", (64, 32)), tmp_path / "a.jpg", exif=exif).shape == (64, 32, 3)
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(4, 0)
    assert np.abs(read(Image.fromarray(ramp), tmp_path / "b.png")[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert (read(Image.new("RGBA", (4, 4), (255, 0, 255, 0)), tmp_path / "c.png") == 255).all()
    with pytest.raises(InputError, match="has 32 bits a channel"):
        read(Image.fromarray(np.zeros((4, 4), np.float32)), tmp_path / "d.tiff")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_is_written_in_full_size(suffix: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 48, dtype=np.float32)[None, None, :, None]
    frames = np.broadcast_to(ramp, (1, 33, 48, 3))
    pictures.write(frames, tmp_path / f"a{suffix}")
    read = np.asarray(pictures.read(tmp_path / f"a{suffix}", "image"), np.float32) / 255
    assert np.abs(read - frames[0]).max() < (0.02 if suffix == ".jpg" else 0.003)


def test_a_picture_that_is_too_large_or_damaged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="is too large"):
        pictures.read(file, "image")
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"image .* can't be read"):
        pictures.read(file, "image")
