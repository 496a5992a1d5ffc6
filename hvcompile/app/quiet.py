"""Quiet: what other libraries complain of while they are imported, and their progress bars."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Collection, Iterator
from typing import TextIO

log = logging.getLogger(__name__)


@contextlib.contextmanager
def importing(*libraries: str) -> Iterator[None]:
    """Within, warnings that an import gives go to the log of this module, for debugging; errors stay errors.

    They are about what a library could not load of yet another one (diffusers of torchao), or will call by another
    name in a later version: nothing that a user of the command line can act on.

    Args:
        libraries: names of those, about to be imported, that log to handlers of their own.

    """
    from hvcompile.torch_private.torchao import quiet_import

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_import())
        stack.enter_context(_lowered_warnings())
        for library in libraries:
            stack.enter_context(_lowered_log(library))
        yield


HARMLESS = (
    "requires torchvision",
    "bos_token_id must be",
    "eos_token_id must be",
    "An error occurred while trying to fetch",
    "Defaulting to unsafe serialization",
    "No LoRA keys associated",
)
"""Parts of warnings that loading a pipeline gives, and that nobody can act on: nothing unsafe is read in any case."""


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Within, harmless warnings of diffusers and transformers go to the log of this module; others stay."""
    with contextlib.ExitStack() as stack:
        for library in ("diffusers", "transformers"):
            stack.enter_context(_lowered_log(library, HARMLESS))
        yield


@contextlib.contextmanager
def hearing(library: str, *parts: str) -> Iterator[list[str]]:
    """Within, what a library logs in any of these words is listed, and goes to the log of this module alone.

    It is heard also where the user has told the library to keep warnings to itself; nothing else is printed then.

    Args:
        library: that logs.
        parts: texts.

    """
    messages: list[str] = []
    with _lowered_log(library, parts, messages), _lowered_warnings():
        logger = logging.getLogger(library)
        level, is_quiet = logger.level, logger.getEffectiveLevel() > logging.WARNING
        others = _Others(logger.getEffectiveLevel())
        if is_quiet:
            logger.setLevel(logging.WARNING)
            for handler in logger.handlers:
                handler.addFilter(others)
        try:
            yield messages
        finally:
            if is_quiet:
                logger.setLevel(level)
            for handler in logger.handlers:
                handler.removeFilter(others)


class _Others(logging.Filter):
    """Keeps from a handler what a logger of an earlier level would not have handed to it."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level


@contextlib.contextmanager
def _lowered_warnings() -> Iterator[None]:
    """Within, what Python's warnings would print goes to this module's log; those that are errors stay errors.

    ``warnings.catch_warnings`` would also undo the filters that libraries set as they are imported.
    """
    before = warnings.showwarning
    warnings.showwarning = _log_warning
    try:
        yield
    finally:
        if warnings.showwarning is _log_warning:
            warnings.showwarning = before


@contextlib.contextmanager
def _lowered_log(library: str, parts: Collection[str] = (), messages: list[str] | None = None) -> Iterator[None]:
    """Within, warnings on a library's logger go to this module's, for debugging.

    Args:
        library: that logs.
        parts: texts; where some are given, only what holds one of them, errors too.
        messages: what was lowered is put there.

    """
    with contextlib.suppress(ImportError):  # what can't be imported says so where it is needed
        importlib.import_module(f"{library}.utils.logging")  # puts its handler in place
    logger = logging.getLogger(library)
    lowering, handlers = _Lowering(library, parts, messages), tuple(logger.handlers)
    for handler in handlers:
        handler.addFilter(lowering)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(lowering)


class _Lowering(logging.Filter):
    """Keeps a library's warnings from its handlers, which others may share, and logs each for debugging instead."""

    def __init__(self, library: str, parts: Collection[str], messages: list[str] | None) -> None:
        super().__init__(library)
        self._parts, self._messages = parts, messages
        self._latest: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record) or not self._is_harmless(record):
            return True
        if record is not self._latest:  # each handler asks
            self._latest = record
            log.debug("%s: %s", record.name, record.getMessage())
            if self._messages is not None:
                self._messages.append(record.getMessage())
        return False

    def _is_harmless(self, record: logging.LogRecord) -> bool:
        if self._parts:
            return any(part in record.getMessage() for part in self._parts)
        return record.levelno <= logging.WARNING


def _log_warning(  # as warnings.showwarning
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    log.debug("%s:%d: %s: %s", filename, lineno, category.__name__, message)


def hide_cache_notice() -> None:
    """Ignore torch's warning that its caches are off, which compiling for an absent GPU switches off on purpose."""
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")


def hide_progress_bars() -> None:
    """Turn off the loading bars of the libraries, which would break into ours."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
