"""The transformers of a pipeline with float8 weights, in a directory with a folder for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hvcompile.app.denoisers import denoisers
from hvcompile.errors import InputError
from hvcompile.float8.saved import MANIFEST, load_float8, save_float8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save(pipe: Any, directory: Path) -> None:
    """Write the transformers of a pipeline that has run; raises as ``save_float8`` does."""
    for name, model in denoisers(pipe).items():
        save_float8(model, directory / name)


def check_place(directory: Path) -> None:
    """Raise InputError where a directory can't be written to, as far as that can be told."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"save-fp8 {str(directory)!r} is a file: give a directory")
    if directory.is_dir() and any(directory.iterdir()) and not _folders(directory):
        raise InputError(
            f"save-fp8 {str(directory)!r} holds something else: give a new directory, or one of such a save"
        )


def check(directory: Path) -> None:
    """Raise InputError where a directory holds no saved transformer."""
    if not _folders(directory):
        raise InputError(
            f"load-fp8 {str(directory)!r} holds no transformer with float8 weights: give a directory that "
            "hvcompile generate --save-fp8 wrote"
        )


def load(directory: Path, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The transformers, by their names in the pipeline; raises InputError as ``load_float8`` does, or for the dtype."""
    models = {folder.name: load_float8(folder) for folder in _folders(directory)}
    for name, model in models.items():
        found = {
            item.dtype for item in model.parameters() if item.dtype in {torch.float32, torch.bfloat16, torch.float16}
        }
        if dtype not in found:
            saved = " and ".join(sorted(str(item).removeprefix("torch.") for item in found))
            raise InputError(f"load-fp8: {name} computes in {saved}: give dtype {saved}")
    return models


def _folders(directory: Path) -> list[Path]:
    return sorted(file.parent for file in directory.glob(f"*/{MANIFEST}"))
