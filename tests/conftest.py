"""Shared fixtures: every test starts with an empty Dynamo, and compiles on one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when torch is first imported: two test processes on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
