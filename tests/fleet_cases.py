"""What the tests of workers, batches and servers share: a model, what is asked of it, and what ``generate`` makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from hvcompile.app import generate
from hvcompile.app.fleet.worker import at_work
from hvcompile.app.request.ask import Ask, settled
from hvcompile.app.request.clips import Clips

SIZE: dict[str, Any] = {"steps": 4, "frames": 5, "height": 32, "width": 48}
OPTIONS = ("lower=eager", "first_block_cache.threshold=0.3")


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
