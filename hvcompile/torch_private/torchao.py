"""torchao: whether it can be imported, quietly."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from hvcompile.torch_private import kernels

log = logging.getLogger(__name__)


def is_available() -> bool:
    """Whether torchao, whose primitives are used, can be imported; imports it, quietly."""
    try:
        with quiet_import():
            import torchao.quantization.quant_primitives  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Within, warnings that torchao's import logs go to the log of this module, for debugging; errors stay errors.

    They are about kernels of its own that it could not load, of which none is used here, and, from torch, about how it
    registers its types. diffusers imports torchao too, wherever that is installed.
    """
    torchao, propagates = logging.getLogger("torchao"), logging.getLogger("torchao").propagate
    lowered = _Lowered()
    torchao.addHandler(lowered)
    torchao.propagate = False
    kernels.PYTREE_LOG.addFilter(_is_not_about_torchao)
    try:
        yield
    finally:
        kernels.PYTREE_LOG.removeFilter(_is_not_about_torchao)
        torchao.propagate = propagates
        torchao.removeHandler(lowered)


class _Lowered(logging.Handler):
    """Says again, and warnings for debugging alone, what another logger was told."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelno if record.levelno > logging.WARNING else logging.DEBUG
        log.log(level, "%s: %s", record.name, record.getMessage())


def _is_not_about_torchao(record: logging.LogRecord) -> bool:
    named = record.args if isinstance(record.args, tuple) else ()
    if not any(str(getattr(item, "__module__", "")).startswith("torchao.") for item in named):
        return True
    log.debug("%s: %s", record.name, record.getMessage())
    return False
