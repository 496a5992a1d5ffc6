"""The door to private torchao: its float8 primitives, and its import, quietly.

All names were checked on torchao 0.18.0 with torch 2.11.0 and 2.13.0.

- ``_choose_scale_float8``, ``_quantize_affine_float8`` and ``_dequantize_affine_float8``: torchao's public float8
  tensor refuses CPUs; the primitives that it is made of run and compile on them.
- the logger ``torch.utils._pytree``: from torch 2.12 or 2.13 on it warns of types that torchao registers as it is
  imported.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

log = logging.getLogger(__name__)

# Private: a module's logger has its name (2.11.0, 2.13.0).
PYTREE_LOG = logging.getLogger("torch.utils._pytree")


def is_available() -> bool:
    """Whether torchao, whose primitives are used, can be imported; imports it, quietly."""
    try:
        with quiet_import():
            import torchao.quantization.quant_primitives  # noqa: F401
    except ImportError:
        return False
    return True


def quantize(rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 matrix over its scale, rounded to a float8 dtype."""
    # Private: torchao's public float8 tensor refuses CPUs (torchao 0.18.0).
    from torchao.quantization.quant_primitives import _quantize_affine_float8

    return _quantize_affine_float8(rows, scale, dtype)  # type: ignore[no-any-return]


def dequantize(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Data times scale, in ``dtype``."""
    # Private: as in ``quantize``.
    from torchao.quantization.quant_primitives import _dequantize_affine_float8

    return _dequantize_affine_float8(data, scale, dtype)  # type: ignore[no-any-return]


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
    PYTREE_LOG.addFilter(_is_not_about_torchao)
    try:
        yield
    finally:
        PYTREE_LOG.removeFilter(_is_not_about_torchao)
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
