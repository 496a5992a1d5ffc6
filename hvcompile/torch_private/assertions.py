"""The door to torch's assertion on a device: a check in the graph that nothing has to wait for.

- ``torch._assert_async``: raises a RuntimeError with its message on the CPU; on a GPU it is a device-side assertion,
  which ends the process's use of that GPU, and its message is printed. AOTAutograd and Inductor keep it. The public
  ``torch._check`` asks a Python bool, for which the host would wait (2.11.0, 2.13.0).
"""

from __future__ import annotations

from typing import Any

import torch


def assert_on_device(condition: Any, message: str) -> None:
    """Have a device raise where a bool scalar, which may be a proxy, is False; the host does not wait."""
    torch._assert_async(condition, message)  # private: see above
