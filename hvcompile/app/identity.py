"""What tells one pipeline's weights from another's, and one picture from another."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

MOST = 256
"""Elements of each tensor that are looked at, evenly over it."""


def of_weights(pipe: Any) -> str:
    """A digest of all weights of a pipeline, by a sample of each: a model trained again has another."""
    digest = hashlib.blake2b(digest_size=8)
    for name, part in sorted(pipe.components.items()):
        for key, tensor in sorted(part.state_dict().items()) if isinstance(part, torch.nn.Module) else []:
            digest.update(f"{name}.{key} {tuple(tensor.shape)}".encode())
            flat = tensor.flatten()
            digest.update(flat[:: max(1, flat.numel() // MOST)].cpu().float().numpy().tobytes())
    return digest.hexdigest()


def of_picture(picture: Any) -> str:
    """A digest of a PIL image: its size, mode and pixels."""
    digest = hashlib.blake2b(f"{picture.size} {picture.mode}".encode(), digest_size=8)
    digest.update(picture.tobytes())
    return digest.hexdigest()
