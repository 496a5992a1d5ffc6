"""The door to the frames that Dynamo compiles: whose they are, and when what it compiled for one no longer holds.

All names were checked on torch 2.11.0 and 2.13.0, where they are the same.

- ``torch._dynamo.eval_frame.OptimizeContext``: its frames are where a compiled region begins; nothing public says
  whether a call runs in one, or which module was called there.
- ``torch._dynamo.symbolic_convert.InstructionTranslator``: the only way to the local variables of the frame that Dynamo
  is compiling, which is not on Python's stack yet.
- ``torch._dynamo.utils.orig_code_map``, ``_debug_get_cache_entry_list`` and a guard manager's ``add_lambda_guard``: the
  only way to add a condition to what Dynamo compiled for a frame. ``torch.compile``'s own ``guard_filter_fn`` only
  takes conditions away, and a frame without an operation never comes to a backend.
- ``torch._C._dynamo.eval_frame.set_code_exec_strategy``: Dynamo gives a function up for good where it breaks in a loop;
  nothing public takes that back for one function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import (
    _debug_get_cache_entry_list,
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch._dynamo.eval_frame import OptimizeContext
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import orig_code_map
from torch.utils.weak import WeakIdKeyDictionary

SELF = "self"
"""What a method calls its object, by which a frame's module is known."""

Holds = Callable[[nn.Module], bool]
"""Whether a condition holds for a module."""

# What Dynamo made of a frame and already has our condition; weak, and by identity, since code compares by content.
_GUARDED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def traced_module() -> nn.Module | None:
    """The module whose method Dynamo is compiling in this thread; None where it compiles none, or a function."""
    try:
        # Private: see the module's docstring (2.11.0, 2.13.0).
        owner = InstructionTranslator.current_tx().output.local_scope.get(SELF)
    except AttributeError:
        return None
    return owner if isinstance(owner, nn.Module) else None


def _owner(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(SELF) if SELF in code.co_varnames or SELF in code.co_freevars else None


def _callers() -> list[tuple[FrameType, nn.Module]] | None:
    """The methods of modules that this thread is in, up to where the compiled region begins; None outside one."""
    found: list[tuple[FrameType, nn.Module]] = []
    frame = inspect.currentframe()
    while frame is not None:
        owner = _owner(frame)
        if isinstance(owner, OptimizeContext):
            return found
        if isinstance(owner, nn.Module):
            found.append((frame, owner))
        frame = frame.f_back
    return None


def called_module() -> nn.Module | None:
    """The outermost module that was called in the compiled region which this thread is in.

    Where ``torch.compile`` got a module, that is this one, however many pieces Dynamo made of it, and whatever hooks
    stand around its modules. None outside a compiled region, and where a function was compiled whole.
    """
    callers = _callers()
    if callers is None:
        return None
    return callers[-1][1] if callers else traced_module()


def guard_callers(condition: Callable[[nn.Module], Holds | None]) -> None:
    """Have what Dynamo compiled for the methods that this thread is in hold only under a condition on their modules.

    Dynamo guards what it traced. Where it gave up at a call, it saw nothing of what is called there, and what it made
    of the frame is used for good, also when the reason is gone.

    Args:
        condition: asked once for each; gives what is asked at every later call, or None for no condition. What it gives
            must keep nothing alive.

    """
    for frame, module in _callers() or ():
        code = frame.f_code
        original = orig_code_map.get(code)
        if original is None or code in _GUARDED:
            continue
        _GUARDED[code] = True
        holds = condition(module)
        if holds is not None:
            for entry in _debug_get_cache_entry_list(original):
                if entry.code is code:
                    _add(entry, holds)


def _add(entry: Any, holds: Holds) -> None:
    def check(scope: Any) -> bool:
        owner = scope.get(SELF)
        return isinstance(owner, nn.Module) and holds(owner)

    # Private: see the module's docstring (2.11.0, 2.13.0).
    entry.guard_manager.root.add_lambda_guard(check, ["hooks that broke this graph are on the module"], None)


def _own_callers() -> Iterator[FrameType]:
    for frame, _ in _callers() or ():
        if str(frame.f_globals.get("__name__", "")).split(".")[0] != "torch":
            yield frame


def is_in_a_piece() -> bool:
    """Whether what is compiled or called now is a part of a module that was called around it, and not the whole."""
    return any(True for _ in _own_callers())


def uncompiled_callers() -> list[CodeType]:
    """The methods of modules that this thread is in and that run as they were written; torch's own are left out."""
    return [frame.f_code for frame in _own_callers() if orig_code_map.get(frame.f_code) is None]


def compile_again(code: CodeType) -> None:
    """Let Dynamo compile a function again, at its next call, that it has given up."""
    # Private: see the module's docstring (2.11.0, 2.13.0).
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT))
