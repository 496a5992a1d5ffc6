"""What the tests of workers, batches and servers share: a model, what is asked of it, and what ``generate`` makes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hvcompile.app import generate
from hvcompile.app.fleet.worker import at_work
from hvcompile.app.request.ask import Ask, settled
from hvcompile.app.request.clips import Clips

SIZE: dict[str, Any] = {"steps": 4, "frames": 5, "height": 32, "width": 48}
OPTIONS = ("lower=eager", "first_block_cache.threshold=0.3")


@pytest.fixture
def rays_place() -> Iterator[Path]:
    """A directory for a test's own Ray clusters; every process of them has ended soon after the test.

    Others' clusters on this machine have theirs elsewhere.
    """
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for the names of sockets
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_TMPDIR", str(place))
        yield place
    end = time.monotonic() + 30
    while (left := ray_processes(place)) and time.monotonic() < end:
        time.sleep(0.2)
    told = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            told.append((process.cmdline()[:3], process.ppid()))
    assert not told
    shutil.rmtree(place, ignore_errors=True)


def ray_processes(place: Path, title: str = "") -> list[psutil.Process]:
    """Processes of the clusters of a directory: those that name it, or whose output goes there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = " ".join(process.cmdline())
            outputs = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)]
            is_ray = process.pid != os.getpid() and ("ray" in words)
            if is_ray and words.startswith(title) and any(str(place) in text for text in (words, *outputs)):
                found.append(process)
    return found


def base(model: Path | str, **more: Any) -> Clips:
    return settled(Clips(prompt="-", model=str(model), device="cpu", backend_settings=OPTIONS, **(SIZE | more)))


def generated(model: Path | str, ask: Ask, folder: Path, **more: Any) -> bytes:
    """What ``hvcompile generate`` writes for the same request, compiled anew."""
    torch._dynamo.reset()
    given = {key: value for key, value in dataclasses.asdict(ask).items() if value is not None and key in SIZE}
    output = folder / "expected.mp4"
    request = generate.Request(
        prompt=ask.prompt,
        seed=ask.seed,
        fps=ask.fps,
        model=str(model),
        device="cpu",
        backend_settings=OPTIONS,
        output=output,
        **(SIZE | given | more),
    )
    generate.generate(request)
    return output.read_bytes()


def stopped_between(model: str, asks: list[Ask]) -> tuple[list[bytes], list[tuple[str, int]]]:
    """On each rank: videos made, the second one's first try stopped after two steps by what the first rank alone says.

    Returns:
        The files, empty on other ranks than the first, and what was stopped: why, and after how many steps.

    """
    import torch.distributed as dist

    from hvcompile.app.fleet.worker import StoppedError

    files, stopped = [], []
    with at_work(base(model), lambda event: None) as worker:
        for number, ask in enumerate(asks):
            steps: list[Any] = []
            observe = lambda event, steps=steps: steps.append(event) if not isinstance(event, str) else None  # noqa: E731
            if number == 1:
                try:
                    worker.make(ask, observe, lambda: "cancelled" if len(steps) == 2 and not dist.get_rank() else None)  # noqa: B023
                except StoppedError as error:
                    stopped.append((error.reason, len(steps)))
            files.append(worker.make(ask, lambda event: None, lambda: None).content)
    return files, stopped
