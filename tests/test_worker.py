"""A worker: what it makes is what ``generate`` makes, whatever went before; and it is stopped between steps."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleet_cases
import numpy as np
import pytest
import ranks
import tiny_pipelines
import torch

from hvcompile.app.fleet import worker as worker_module
from hvcompile.app.fleet.thread import BROKEN, BUSY, FAILED, IDLE, MADE, STOPPED, Report, WorkerThread
from hvcompile.app.fleet.worker import CANCELLED, StoppedError, Worker, at_work
from hvcompile.app.request.ask import Ask, identity, parsed, settled
from hvcompile.app.request.clips import Clips
from hvcompile.errors import InputError, RunError

FIRST = Ask(prompt="a red ball", seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write("hunyuan_video", tmp_path_factory.mktemp("model"))


@pytest.fixture
def worker(model: Path) -> Iterator[Worker]:
    with at_work(fleet_cases.base(model), lambda event: None) as worker:
        yield worker


def make(worker: Worker, ask: Ask) -> bytes:
    return worker.make(ask, lambda event: None, lambda: None).content


def test_it_makes_what_generate_makes_whatever_went_before(model: Path, tmp_path: Path) -> None:
    """Another seed, another size and other options in between, and the same again."""
    smaller = dataclasses.replace(FIRST, frames=9, width=32)
    first, small = (fleet_cases.generated(model, ask, tmp_path) for ask in (FIRST, smaller))
    torch._dynamo.reset()
    with at_work(fleet_cases.base(model), lambda event: None) as worker:
        assert make(worker, FIRST) == first
        assert make(worker, dataclasses.replace(FIRST, seed=4)) != first
        assert make(worker, FIRST) == first
        assert make(worker, smaller) == small
        reusing = dataclasses.replace(FIRST, options={"first_block_cache": {"threshold": 10.0}})
        made = worker.make(reusing, lambda event: None, lambda: None)
        assert made.reused == 3
        assert make(worker, FIRST) == first


def test_what_is_stopped_leaves_nothing_to_the_next(worker: Worker) -> None:
    """Stopped after every step in turn: the next of the same prompt and seed is as if nothing had been."""
    expected = make(worker, FIRST)
    for last in range(1, fleet_cases.SIZE["steps"] + 1):
        steps: list[Any] = []

        def observe(event: Any, steps: list[Any] = steps) -> None:
            if not isinstance(event, str):
                steps.append(event)

        def should_stop(steps: list[Any] = steps, last: int = last) -> str | None:
            return CANCELLED if len(steps) == last else None

        with pytest.raises(StoppedError, match="cancelled between two steps"):
            worker.make(FIRST, observe, should_stop)
        assert len(steps) == last
        made = worker.make(FIRST, lambda event: None, lambda: None)
        assert made.content == expected
        assert made.captured == 0
    assert not hasattr(worker._loaded.pipe.scheduler.step, "__wrapped__")


def test_a_pipeline_that_fails_and_one_that_makes_nan_leave_nothing_either(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(worker, FIRST)
    pipe = worker._loaded.pipe

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("the decoder is out of order")

    with monkeypatch.context() as patched:
        patched.setattr(pipe.vae, "decode", failing)
        with pytest.raises(RunError, match=r"failed after 4 steps.*out of order"):
            make(worker, FIRST)
    assert make(worker, FIRST) == expected
    post = pipe.video_processor.postprocess_video
    with monkeypatch.context() as patched:
        patched.setattr(pipe.video_processor, "postprocess_video", lambda *a, **k: post(*a, **k) * np.float32("nan"))
        with pytest.raises(InputError, match="not all finite"):
            make(worker, FIRST)
    assert make(worker, FIRST) == expected


def test_sizes_that_are_held_are_compiled_once_each(model: Path) -> None:
    smaller = dataclasses.replace(FIRST, frames=9, width=32)
    with at_work(fleet_cases.base(model), lambda event: None, holds_all_sizes=True) as worker:
        made = [worker.make(ask, lambda event: None, lambda: None) for ask in (FIRST, smaller, FIRST, smaller, FIRST)]
    assert [item.captured for item in made] == [1, 1, 0, 0, 0]
    assert made[0].content == made[2].content == made[4].content
    assert made[1].content == made[3].content


def test_memory_stays(worker: Worker) -> None:
    """Twelve videos after the first eight: nothing that grows with them."""
    quick = dataclasses.replace(FIRST, steps=2)
    for number in range(8):
        make(worker, dataclasses.replace(quick, seed=number))
    before, graphs = resident(), num_tensors()
    for number in range(12):
        make(worker, dataclasses.replace(quick, seed=number, prompt=f"a red ball, number {number}"))
    assert num_tensors() <= graphs + 2
    assert resident() - before < 40e6


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def num_tensors() -> int:
    import gc

    gc.collect()
    return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())


@pytest.mark.ranks
def test_two_ranks_make_one_video_and_stop_together(model: Path) -> None:
    """The first rank alone says stop; both stop after the same step, and go on together."""
    asks = [FIRST, dataclasses.replace(FIRST, seed=4), FIRST]
    (files, stopped), (others, stopped_too) = ranks.results(
        ranks.launch(fleet_cases.stopped_between, 2, str(model), asks)
    )
    assert stopped == stopped_too == [("cancelled", 2)]
    assert others == [b"", b"", b""]
    assert files[0] == files[2] != files[1]


def wait(thread: WorkerThread, number: int | None = None, seconds: float = 120.0) -> Report:
    """Until it is idle or broken, and a video has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        report = thread.report()
        has_ended = number is None or (report.outcome is not None and report.outcome.number == number)
        if report.state in (IDLE, BROKEN) and has_ended:
            return report
        time.sleep(0.01)
    raise TimeoutError(str(thread.report()))


def test_a_worker_in_a_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = WorkerThread(fleet_cases.base(model))
    try:
        assert wait(thread).state == IDLE
        wrong = dataclasses.replace(FIRST, height=33)
        good, bad, other = thread.check([FIRST, wrong, dataclasses.replace(FIRST, image="/of/another/machine.png")])
        assert good is None
        assert "image can't be used" in str(other)
        assert "height is 33, but this pipeline takes multiples of 16" in str(bad)
        thread.begin(1, FIRST)
        outcome = wait(thread, 1).outcome
        assert outcome is not None
        assert (outcome.kind, outcome.reason) == (MADE, "")
        content = thread.take()
        assert content[4:8] == b"ftyp"
        assert thread.take() == b""

        thread.begin(2, FIRST, seconds=0.0)
        late = wait(thread, 2).outcome
        assert late is not None
        assert (late.kind, late.reason) == (STOPPED, "late")
        thread.cancel(3)
        thread.begin(3, FIRST)
        cancelled = wait(thread, 3).outcome
        assert cancelled is not None
        assert (cancelled.kind, cancelled.reason) == (STOPPED, "cancelled")
        thread.begin(4, wrong)
        failed = wait(thread, 4).outcome
        assert failed is not None
        assert failed.kind == FAILED
        thread.begin(5, dataclasses.replace(FIRST, steps=40))
        seen = []
        while (report := thread.report()).state == BUSY or report.outcome is None or report.outcome.number != 5:
            seen.append((report.step, report.num_steps))
            if report.step >= 3:
                thread.cancel(5)
            time.sleep(0.005)
        assert (3, 40) in seen or (4, 40) in seen
        assert max(step for step, _ in seen) < 40
        thread.begin(6, FIRST)
        assert wait(thread, 6).state == IDLE
        assert thread.take() == content
        monkeypatch.setattr(Worker, "make", lambda *args: 1 // 0)
        thread.begin(7, FIRST)
        report = wait(thread, 7)
        assert (report.state, report.reason) == (BROKEN, "ZeroDivisionError: integer division or modulo by zero")
    finally:
        thread.close()


def test_a_worker_that_can_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    report = wait(WorkerThread(fleet_cases.base(tmp_path)))
    assert report.state == BROKEN
    assert "its model_index.json is damaged" in report.reason


# What is asked for.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "it holds a list"),
        ({}, "it has no prompt"),
        ({"prompt": 3}, "prompt is 3: give a text"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "a", "promt": "b"}, "it has 'promt', which is unknown: allowed are prompt, seed"),
        ({"prompt": "a", "steps": True}, "steps is true: give a whole number"),
        ({"prompt": "a", "steps": 0}, "steps is 0: give a whole number from 1"),
        ({"prompt": "a", "steps": 4.0}, "steps is 4.0: give a whole number"),
        ({"prompt": "a", "seed": 2**64}, "seed is 18446744073709551616: give a whole number from"),
        ({"prompt": "a", "guidance": -1}, "guidance is -1: give a number from 0 to 1000"),
        ({"prompt": "a", "fps": 5000}, "fps is 5000: give a whole number from 1 to 1000"),
        ({"prompt": "a", "options": {"fp8": {}}}, "options has 'fp8', which all videos of a worker share"),
        ({"prompt": "a", "options": {"attention": 3}}, "give an object of sections"),
        ({"prompt": "a", "true_cfg": 3}, "does nothing without negative_prompt"),
        ({"prompt": "a", "set": {"a=b": 1}}, "set has 'a=b', which is no argument's name: give names such as max_"),
        ({"prompt": "a", "set": {" sigmas": 1}}, "set has ' sigmas', which is no argument's name"),
        ({"prompt": "a", "options": {"attention": {"a.b=3": 1}}}, "options.attention has 'a.b=3', which is no"),
        ({"prompt": "\ud800"}, "prompt is no valid text"),
        ({"prompt": "a" * 20_001}, "prompt has 20001 characters"),
    ],
)
def test_what_can_not_be_asked_for(line: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        parsed(line)
    assert message in str(raised.value)


def test_what_is_asked_for_as_the_commands_know_it(tmp_path: Path) -> None:
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"first_block_cache": {"threshold": 0.2, "warmup_steps": 1}}))
    base = settled(
        Clips(
            prompt="-",
            steps=30,
            fp8=False,
            options_file=options,
            backend_settings=("lower=eager", "sparse_attention={}"),
            call_settings=("max_sequence_length=64", "sigmas=[1.0]"),
        )
    )
    options.unlink()  # read once
    given = {"prompt": "a", "seed": 7, "frames": 9, "set": {"sigmas": [1, 0.5]}, "name": "x"}
    ask, name = parsed(given | {"options": {"first_block_cache": {"threshold": 0.5}}})
    request = ask.of(base)
    assert name == "x"
    assert (request.prompt, request.seed, request.steps, request.frames) == ("a", 7, 30, 9)
    assert request.call_settings == ("max_sequence_length=64", "sigmas=[1, 0.5]")
    assert request.backend_options() == {
        "first_block_cache": {"threshold": 0.5, "warmup_steps": 1},
        "fp8": False,
        "lower": "eager",
        "sparse_attention": {},
    }
    assert Ask(prompt="a").of(base).backend_options()["first_block_cache"] == {"threshold": 0.2, "warmup_steps": 1}


def test_shapes_and_identities() -> None:
    base = Clips(prompt="-", backend_settings=("lower=eager",))
    same = [Ask(prompt="a", guidance=3.0), Ask(prompt="b", seed=2, steps=9, guidance=2.0)]
    assert len({ask.shape for ask in same}) == 1
    others = [
        Ask(prompt="a"),
        Ask(prompt="a", frames=9),
        Ask(prompt="a", options={"first_block_cache": {"threshold": 0.5}}),
        Ask(prompt="a", guidance=1.0),  # these call the model otherwise, or may
        Ask(prompt="a", true_cfg=2.0, negative_prompt="b"),
        Ask(prompt="a", true_cfg=1.0),
        Ask(prompt="a", negative_prompt="b"),
    ]
    assert len({ask.shape for ask in (*same, *others)}) == 1 + len(others)
    asks = [*same, *others, Ask(prompt="a", settings={"max_sequence_length": 9}), Ask(prompt="a", fps=3)]
    digests = {identity(ask, base, 1) for ask in asks}
    assert len(digests) == len(asks)
    assert identity(Ask(prompt="a"), base, 2) not in digests
    assert identity(Ask(prompt="a"), dataclasses.replace(base, model="other/model"), 1) not in digests
    assert identity(Ask(prompt="a"), base, 1) in digests


def test_no_engine_is_imported() -> None:
    for module in ("worker", "thread"):
        source = (Path(worker_module.__file__).parent / f"{module}.py").read_text("utf-8")
        assert "import ray" not in source
        assert "from ray" not in source
