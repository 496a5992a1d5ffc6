"""Tensors as a file of safetensors, each at an address that suits the processor once the file is mapped into memory.

Where a matrix begins decides which path a product takes on a CPU, and the paths differ in the last bit. Memory that
torch itself takes begins at a multiple of 64 bytes. So do these tensors: between them lie others that only fill the
gaps, since the format allows none. They are written one after the other, and the whole is never in memory.

Source: the format of https://github.com/huggingface/safetensors, version 0.8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hvcompile.errors import InputError

ALIGNMENT = 64
FILLER = "filler."
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write tensors by name.

    Raises:
        InputError: a tensor's dtype is none that the format has.
        OSError: the file can't be written.

    """
    header, places = _header(tensors)
    with file.open("wb") as stream:
        stream.write(header)
        begin = stream.tell()
        for name, tensor in tensors.items():
            stream.write(b"\0" * (begin + places[name] - stream.tell()))
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                stream.write(flat.view(torch.uint8).numpy().data)


def _header(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and where each tensor begins after it."""
    described: dict[str, Any] = {}
    places: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise InputError(f"{name} is of {tensor.dtype}, which safetensors has no name for")
        gap = -end % ALIGNMENT
        if gap:
            described[f"{FILLER}{len(places)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        places[name] = end + gap
        end = places[name] + tensor.numel() * tensor.element_size()
        described[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [places[name], end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places
