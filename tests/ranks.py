"""Running a function on several ranks at once: processes that share a gloo group, ended by force where one hangs."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Imported once, in the process that all ranks are forked from: diffusers takes seconds.
PRELOAD = ["torch", "torch.distributed.tensor", "hvcompile.backend", "toy", "zoo", "oracle"]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: what its function returned, or the text of what it raised; both None where it was killed.

    ``fault`` is where it was when a signal of the processor's ended it, as Python's faulthandler tells it.
    """

    result: Any
    error: str | None
    seconds: float
    exit_code: int | None
    fault: str


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _rank(
    function: Callable[..., Any], rank: int, ranks: int, port: int, timeout: float, pipe: Any, fault: Path, args: Any
) -> None:
    faulthandler.enable(fault.open("w"))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["HVCOMPILE_STRICT"] = "1"  # as in conftest.py, whatever the test that started the server had set
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout),
        )
        pipe.send((function(*args), None))
        with contextlib.suppress(Exception):  # another rank may have ended in an error
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def launch(
    function: Callable[..., Any], ranks: int, *args: Any, group_timeout: float = 120.0, limit: float = 500.0
) -> list[Ended]:
    """Call ``function(*args)`` on every rank, in a process of its own with the group initialised.

    Args:
        function: a module's function, since processes find it by its name.
        ranks: how many.
        args: picklable.
        group_timeout: of the process group, seconds.
        limit: seconds after which what still runs is killed, and the test fails.

    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, begin = free_port(), time.monotonic()
    processes, pipes, answers = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        faults = [Path(folder) / str(rank) for rank in range(ranks)]
        try:
            for rank, fault in enumerate(faults):
                ours, theirs = context.Pipe(duplex=False)
                told = (function, rank, ranks, port, group_timeout, theirs, fault, args)
                processes.append(context.Process(target=_rank, args=told))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(max(0.0, begin + limit - time.monotonic())):
                    raise TimeoutError(f"rank {rank} of {ranks} hung for {limit:g} s in {function.__name__}")
                try:
                    result, error = pipe.recv()
                except EOFError:
                    result = error = None
                answers.append((result, error, time.monotonic() - begin))
            for process in processes:
                process.join(max(0.0, begin + limit - time.monotonic()))
                if process.is_alive():
                    raise TimeoutError(f"a rank hung for {limit:g} s at the end of {function.__name__}")
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            Ended(*answer, process.exitcode, fault.read_text() if fault.exists() else "")
            for answer, process, fault in zip(answers, processes, faults, strict=True)
        ]


def results(ended: list[Ended]) -> list[Any]:
    """What the ranks returned; fails where one raised, or was ended by a signal, which is told first."""
    for rank, one in enumerate(ended):
        was_killed = bool(one.fault) or (one.exit_code or 0) < 0
        assert not was_killed, f"rank {rank}: exit code {one.exit_code}\n{one.fault}"
    for rank, one in enumerate(ended):
        assert one.error is None, f"rank {rank}: {one.error}"
    return [one.result for one in ended]


def die() -> None:
    """End this process at once, as a machine that fails would."""
    os._exit(9)
