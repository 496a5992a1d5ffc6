"""The package as others get it: what is in the wheel and the sdist, and that the wheel works away from the checkout."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import hvcompile

pytestmark = pytest.mark.xdist_group("package")  # one wheel, built and installed once

ROOT = Path(hvcompile.__file__).parents[1]
LEFT_OUT = (
    *("typer", "rich", "jinja2", "av", "imageio", "skimage", "PIL", "numpy"),
    *("diffusers", "transformers", "accelerate", "sentencepiece", "torchao", "depyf", "matplotlib", "cache_dit", "ray"),
)
"""What the package's own extras bring, by the names that are imported."""

# Three blocks that are alike, compiled by the backend's name alone.
COMPILES = """
import torch
from torch import nn
blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)]
model = nn.Sequential(*blocks)
given = torch.ones(2, 8)
with torch.no_grad():
    run = torch.compile(model, backend="hvfast", options={"lower": "eager"})
    assert torch.equal(run(given), model(given))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; in no way does it hear of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, made by the build backend itself: nothing is fetched."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


def tracked(*folders: str) -> Iterator[str]:
    """The files below some folders of the checkout, as they should be packed."""
    for folder in folders:
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file.relative_to(ROOT).as_posix()


def test_the_wheel_holds_the_package_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {item.filename: item for item in archive.infolist()}
        wanted = {*tracked("hvcompile"), *(f"hvcompile/{name}" for name in tracked("passes"))}
        assert {name for name in packed if ".dist-info/" not in name} == wanted
        for name in tracked("passes"):
            assert archive.read(f"hvcompile/{name}") == (ROOT / name).read_bytes()  # the file, and not a link to it
        assert "hvcompile/py.typed" in packed
        assert any(name.startswith("hvcompile/explanation/templates/") for name in packed)
        assert any(name.startswith("hvcompile/app/tiny_hunyuan_video/transformer/") for name in packed)
        (licence,) = (name for name in packed if name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    needs = [item for item in told.get_all("Requires-Dist", []) if "extra ==" not in item]
    assert len(needs) == 1
    assert needs[0].startswith("torch")
    assert set(told.get_all("Provides-Extra", [])) == {
        "bench",
        "cli",
        "debug",
        "dev",
        "diffusers",
        "docs",
        "fp8",
        "ray",
    }
    assert told["Version"] == hvcompile.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert told["License-File"] == "LICENSE"
    assert not any(item.startswith("License ::") for item in told.get_all("Classifier", []))


def test_the_sdist_holds_what_a_contributor_needs(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        packed = {item.name.partition("/")[2] for item in archive.getmembers() if item.isfile()}
    folders = ("hvcompile", "passes", "tests", "docs", "benchmarks", "examples")
    assert set(tracked(*folders)) <= packed
    names = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
    assert names <= packed


def test_a_wheel_from_the_sdist_is_the_same(built: Path, wheel: Path, tmp_path: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source)
    (other,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(other) as second:
        assert set(first.namelist()) == set(second.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel, which sees this one's dependencies and not its checkout.

    A line of a ``.pth`` file goes on the path; ``.pth`` files that lie there, an editable install's say, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    scripts = folder / "bin"
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    pip: Sequence[str | Path] = (sys.executable, "-m", "pip", "--python", scripts / "python", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=folder)
    return scripts


def test_the_wheel_compiles_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import hvcompile, importlib.metadata\nprint(hvcompile.__file__, importlib.metadata.version('hvcompile'))\n"
    file, version = run(installed / "python", "-c", COMPILES + where, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent)
    assert not Path(file).is_relative_to(ROOT)
    assert version == hvcompile.__version__


def test_the_command_line_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "hvcompile", "--help", cwd=tmp_path)
    assert all(command in shown for command in ("generate", "compare", "explain", "bisect", "bench"))


def test_torch_is_all_that_the_backend_needs(installed: Path, tmp_path: Path) -> None:
    """Imported and run where none of the extras' packages can be imported."""
    hide = f"import sys\nfor name in {LEFT_OUT!r}:\n    sys.modules[name] = None\n"
    uses = "import hvcompile, hvcompile.backend\nassert hvcompile.stats(model).graphs == 1\n"
    run(installed / "python", "-c", hide + COMPILES + uses, cwd=tmp_path)


def test_torch_is_a_version_that_is_supported() -> None:
    """The bound of pyproject.toml and this environment fit: else every other test speaks of another torch."""
    assert "2.11" <= torch.__version__ < "2.14"
