"""The door to how Dynamo treats Python floats: as constants at first, and as inputs once they have changed.

For some floats that costs a compilation for nothing, since it is known that they will change: an adapter's scale. These
are marked as having changed, and Dynamo is asked to capture once more.

All names were checked on torch 2.13.0 and 2.11.0.

- ``torch._dynamo.pgo.get_code_state``: for each function, what Dynamo has seen of each float, by the name of its
  source; and ``auto_dynamic``, which stands there for one that has had several values. Dynamo writes it itself when it
  compiles a function again; nothing public does.
- ``torch._dynamo.exc.TensorifyScalarRestartAnalysis``: what AOTAutograd raises from within a backend where floats are
  to be treated otherwise. Dynamo captures the function once more, and every other exception it takes for a failure.
- ``ShapeEnv.backed_var_to_val`` (``var_to_val`` before 2.11), ``replacements`` and ``symbol_is_type``: the symbols of
  the floats that are inputs, and those that are fixed. AOTAutograd makes Dynamo fix every float in the former that it
  finds no use of.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.pgo import auto_dynamic, get_code_state
from torch.utils._sympy.symbol import SymT, symbol_is_type

from hvcompile.torch_private.dynamo import compile_id
from hvcompile.torch_private.fakes import fake_mode, value

log = logging.getLogger(__name__)


class _CapturedAgain(threading.local):
    """What this thread has had Dynamo capture once more: a compilation's id, and what Dynamo had seen by then.

    Ids begin anew after ``torch._dynamo.reset()``, and so does what it has seen, as another object.
    """

    at: tuple[int, int] | None = None
    seen: Any = None


_captured_again = _CapturedAgain()


def capture_again_with_inputs(is_wanted: Callable[[str, float], bool]) -> None:
    """Have Dynamo pass some floats as inputs that are constants of the graph which a backend was just given.

    Called from within a backend. It returns where there are none, where Dynamo treats them so already, and where it has
    captured again for them and they are constants still, as under ``dynamic=False``: once is all that is asked.

    Args:
        is_wanted: asked with the name of a float's source and its value.

    Raises:
        TensorifyScalarRestartAnalysis: for Dynamo, which captures the function once more.

    """
    config, place, seen = torch._dynamo.config, compile_id(), get_code_state()
    is_again = place == _captured_again.at and seen is _captured_again.seen
    if is_again or not config.automatic_dynamic_shapes or config.specialize_float:
        return
    marked = 0
    for state in list(seen.values()):
        for name, entry in state.automatic_dynamic.items():
            if isinstance(entry.scalar, float) and is_wanted(name, entry.scalar):
                entry.scalar = auto_dynamic
                marked += 1
    if marked:
        _captured_again.at, _captured_again.seen = place, seen
        log.debug("captured again, with %d floats as inputs", marked)
        raise TensorifyScalarRestartAnalysis(restart_reason="hvcompile: scales of adapters are inputs")


@contextlib.contextmanager
def unread_floats_stay_inputs(module: fx.GraphModule) -> Iterator[None]:
    """Within, AOTAutograd lets those floats be that Dynamo has made inputs of and that a graph does not read as such.

    They are handed to it in another way, and nothing was assumed of them.
    """
    mode: Any = fake_mode(module.graph)
    env: Any = getattr(mode, "shape_env", None)
    known = getattr(env, "backed_var_to_val", None)
    known = getattr(env, "var_to_val", None) if known is None else known
    if not isinstance(known, dict):
        yield
        return
    numbers = [value(node) for node in module.graph.nodes if isinstance(value(node), torch.SymFloat)]
    read = {symbol for number in numbers for symbol in number.node.expr.free_symbols}
    unread = {
        symbol: number
        for symbol, number in known.items()
        if symbol_is_type(symbol, SymT.FLOAT) and symbol not in read and symbol not in env.replacements
    }
    for symbol in unread:
        del known[symbol]
    try:
        yield
    finally:
        known.update(unread)
