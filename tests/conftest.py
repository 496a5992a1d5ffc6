"""Shared fixtures: every test starts with an empty Dynamo, and compiles on one thread.

An exception that nobody foresaw makes a pass decline in a user's run. Here, and in every process that a test starts, it
is raised, so that it fails the test.
"""

from __future__ import annotations

import gc
import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read when torch is first imported: two test processes on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ["HVCOMPILE_STRICT"] = "1"
# Where torch puts it by itself: else the commands would keep what tests compile in the user's own store.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")))
# Read when triton is first imported, which torch does at its own time.
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


def pytest_collection_finish() -> None:
    """Look for garbage in what tests make, not again and again in the libraries, which took a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    """Else extension modules say at the end that they are leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
