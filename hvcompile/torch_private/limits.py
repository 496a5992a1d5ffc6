"""The door to Dynamo's limit on how often it compiles a function: for hvfast, each model counts for itself.

Dynamo counts what it compiled for a function, whichever models of its class that was for. At the limit it gives the
function up, for all of them and for good. Here the models are counted one by one, by a limit that is higher unless the
user has set Dynamo's. A call that is refused runs as it was written, and the next one is asked about anew. So nothing
is given up for another model, and every refused call is told of.

Nothing is set in Dynamo's configuration. For other backends, Dynamo's own check is called as it was.

All names were checked on torch 2.11.0 and 2.13.0; where they differ, that is said beside the name. Where one is gone,
Dynamo's limit stays as it is.

- ``torch._dynamo.convert_frame.exceeds_recompile_limit``: the check. Nothing public comes between, and the arguments
  ``recompile_limit`` and ``isolate_recompiles`` of ``torch.compile``, which 2.13 has, are not a backend's to give.
- The local variables of ``torch._dynamo.convert_frame._compile``, which asks it: the backend, the frame, what was
  compiled for it before, and which guards refused that.
- ``torch._dynamo.config``: ``recompile_limit``, ``fail_on_recompile_limit_hit``, and their defaults.
- ``torch._dynamo.exc.Unsupported.frame_exec_strategy``: how the frame and those that it calls run instead.
- The local variable ``cleanups`` of the function that ``torch.compile`` made: what is called when its call ends.
- ``FRAME_COMPILE_COUNTER``: how often a function was compiled, by which Dynamo's other limit goes too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, _FrameAction, _FrameExecStrategy
from torch._dynamo import config, convert_frame, eval_frame
from torch._dynamo.exc import Unsupported

from hvcompile.torch_private.dynamo import is_own
from hvcompile.torch_private.frames import SELF, called_module, compile_again

log = logging.getLogger(__name__)

GRAPHS_OF_A_MODEL = 64
"""How often a function is compiled for one model, where ``torch._dynamo.config.recompile_limit`` is torch's own 8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A call for which Dynamo compiles a function no more.

    Attributes:
        model: the outermost module that was called; None where a function was compiled whole.
        function: as "name (file:line)".
        frame: Dynamo's number of the function.
        limit: which of Dynamo's limits was reached.
        value: of that limit.
        reasons: the guards that refused the call, one for each graph there is.
        is_error: whether Dynamo raises now, where ``fullgraph=True`` or its configuration asks for that.

    """

    model: nn.Module | None
    function: str
    frame: int
    limit: str
    value: int
    reasons: tuple[str, ...]
    is_error: bool


_CHECK = "exceeds_recompile_limit"

# Whom Dynamo compiled for, by its number of the function and of the time. It numbers anew after a reset; each number is
# written here before what it stands for is there.
_OWNERS: dict[tuple[int, int], weakref.ref[nn.Module]] = {}


@functools.cache
def count_each_model(tell: Callable[[Refusal], None]) -> None:
    """From now on, count what Dynamo compiles for hvfast model by model; ``tell`` hears of every call it refuses."""
    check: Any = getattr(convert_frame, _CHECK, None)
    if check is None:
        log.debug("Dynamo's recompile limit stays as it is: its check is not where it was")
        return

    @functools.wraps(check)
    def exceeds(cache_size: Any, compile_id: Any) -> tuple[bool, str]:
        compiling = _compiling()
        if compiling is None or not is_own(compiling["compiler_fn"]):
            return check(cache_size, compile_id)  # type: ignore[no-any-return]
        return _exceeds(check, tell, compiling, cache_size, compile_id)

    setattr(convert_frame, _CHECK, exceeds)
    if (compiling := _compiling()) is not None:  # the frame for which hvfast was asked first has been let through
        _own(compiling)


def _exceeds(
    check: Any, tell: Callable[[Refusal], None], compiling: dict[str, Any], cache_size: Any, compile_id: Any
) -> tuple[bool, str]:
    limit = int(config.recompile_limit)
    # Whether it was set can't be asked: after ``config.patch`` a value counts as set that was only put back.
    known: Any = config
    if limit == known._config["recompile_limit"].default:
        limit = max(limit, GRAPHS_OF_A_MODEL)
    same = "num_cache_entries_with_same_id_matched_objs"
    num_own = min(getattr(cache_size, same), sum(_is_of(entry, compiling) for entry in _entries(compiling)))
    # Dynamo's other limit, on all that was ever compiled for a function, stays.
    exceeded, name = check(dataclasses.replace(cache_size, **{same: 0}), compile_id)
    if not exceeded and num_own < limit:
        _own(compiling)
        return False, ""
    name = name or "recompile_limit"
    ends = _ends_of_call()
    is_error = bool(config.fail_on_recompile_limit_hit or compiling["one_graph"])
    code = compiling["code"]
    tell(
        Refusal(
            model=called_module() or _owner(compiling),
            function=f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})",
            frame=int(compile_id.frame_id),
            limit=name,
            value=limit if name == "recompile_limit" else int(getattr(config, name)),
            reasons=tuple(compiling.get("reasons") or ()),
            is_error=is_error,
        )
    )
    if is_error or ends is None:
        return True, name
    ends.append(functools.partial(compile_again, code))
    convert_frame.FRAME_COMPILE_COUNTER[compile_id.frame_id] -= 1  # it is not compiled
    refused = Unsupported(f"hvfast compiles {code.co_name} no more: {name} ({limit})", gb_type="recompile limit")
    # What it calls is not compiled piece by piece either.
    refused.frame_exec_strategy = _FrameExecStrategy(_FrameAction.RUN_ONLY, _FrameAction.RUN_ONLY)
    raise refused


_NEEDED = {"code", "compiler_fn", "one_graph", "frame", "cache_size", "compile_id"}


def _locals_of(function: str, module: ModuleType) -> dict[str, Any] | None:
    """The local variables of the latest call of a function of a module that is under way in this thread."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module.__name__:
            return frame.f_locals
        frame = frame.f_back
    return None


def _compiling() -> dict[str, Any] | None:
    """The local variables of Dynamo where it compiles a frame in this thread; None where some are not there."""
    found = _locals_of("_compile", convert_frame)
    return found if found is not None and found.keys() >= _NEEDED and found["frame"] is not None else None


def _entries(compiling: dict[str, Any]) -> Sequence[Any]:
    """What was compiled for the frame before."""
    # In 2.13 each torch.compile may have entries of its own, which Dynamo then hands on.
    entries: Sequence[Any] | None = compiling.get("cache_entries")
    return _debug_get_cache_entry_list(compiling["code"]) if entries is None else entries


def _is_of(entry: Any, compiling: dict[str, Any]) -> bool:
    """Whether an entry counts for the model of a frame: it is its own, or hvfast's and nobody's."""
    if not is_own(entry.backend):
        return False
    owner = _OWNERS.get((entry.compile_id.frame_id, entry.compile_id.frame_compile_id))
    return owner is None or owner() is _owner(compiling)


def _owner(compiling: dict[str, Any]) -> nn.Module | None:
    """The module whose method the frame is, else the outermost that was called."""
    own = compiling["frame"].f_locals.get(SELF)
    return own if isinstance(own, nn.Module) else called_module()


def _own(compiling: dict[str, Any]) -> None:
    number = compiling["compile_id"]
    key = (int(number.frame_id), int(number.frame_compile_id))
    owner = _owner(compiling)
    if owner is None:
        _OWNERS.pop(key, None)
    else:
        _OWNERS[key] = weakref.ref(owner, lambda gone: _forget(key, gone))


def _forget(key: tuple[int, int], gone: weakref.ref[nn.Module]) -> None:
    if _OWNERS.get(key) is gone:
        del _OWNERS[key]


def _ends_of_call() -> list[Callable[[], Any]] | None:
    """What will be called when the call of what ``torch.compile`` made ends; None where that can't be told."""
    found = (_locals_of("compile_wrapper", eval_frame) or {}).get("cleanups")
    return found if isinstance(found, list) else None
