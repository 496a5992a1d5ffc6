"""The public API: what ``import hvcompile`` gives."""

from __future__ import annotations

import inspect

import hvcompile
from hvcompile import errors


def test_every_error_is_exported() -> None:
    """An error that reaches a user can be caught by a name of the package."""
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert kinds <= set(hvcompile.__all__)
    for name in kinds:
        assert issubclass(getattr(hvcompile, name), hvcompile.HvcompileError)


def test_all_that_is_exported_is_there_and_documented() -> None:
    for name in hvcompile.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(hvcompile, name)), name
