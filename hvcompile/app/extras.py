"""The packages that commands need besides torch, by the extra that installs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

from hvcompile.errors import InputError

EXTRAS = {
    "cli": {
        "typer": "typer",
        "rich": "rich",
        "av": "av",
        "imageio": "imageio",
        "skimage": "scikit-image",
        "PIL": "pillow",
        "jinja2": "jinja2",
    },
    "diffusers": {
        "diffusers": "diffusers",
        "transformers": "transformers",
        "accelerate": "accelerate",
        "ftfy": "ftfy",
        "sentencepiece": "sentencepiece",
    },
    "fp8": {"torchao": "torchao"},
    "debug": {"depyf": "depyf"},
    "ray": {
        "ray": "ray",
        "starlette": "starlette",
        "prometheus_client": "prometheus-client",
        "python_multipart": "python-multipart",
    },
    "bench": {"cache_dit": "cache-dit", "matplotlib": "matplotlib"},
}
"""Extra -> name of a module -> name of the package that holds it."""


def is_there(module: str) -> bool:
    """Whether a module is installed; it is not imported."""
    return importlib.util.find_spec(module) is not None


def missing(command: str, *extras: str, modules: Collection[str] | None = None) -> str | None:
    """What a command lacks and how it is installed, in one line; None where its extras are there.

    Nothing is imported to find out.

    Args:
        command: as the user types it, such as "hvcompile generate".
        extras: keys of ``EXTRAS``.
        modules: those that count; None for all of these extras.

    """
    packages = [
        package
        for extra in extras
        for module, package in EXTRAS[extra].items()
        if (modules is None or module in modules) and not is_there(module)
    ]
    if not packages:
        return None
    *others, last = packages
    names, are = (f"{', '.join(others)} and {last}", "are") if others else (last, "is")
    return f"{command} needs {names}, which {are} not installed: pip install 'hvcompile[{','.join(extras)}]'"


def require(command: str, *extras: str, modules: Collection[str] | None = None) -> None:
    """Raise InputError where a package of these extras is not installed; arguments are those of ``missing``."""
    if (message := missing(command, *extras, modules=modules)) is not None:
        raise InputError(message)
