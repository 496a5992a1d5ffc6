"""What tells one pipeline's weights from another's."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

MOST = 256
"""Elements of each tensor that are looked at."""


def of_weights(pipe: Any) -> str:
    """A digest of all weights of a pipeline, by the beginning of each: a model trained again has another."""
    digest = hashlib.blake2b(digest_size=8)
    for name, part in sorted(pipe.components.items()):
        for key, tensor in sorted(part.state_dict().items()) if isinstance(part, torch.nn.Module) else []:
            digest.update(f"{name}.{key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:MOST].cpu().float().numpy().tobytes())
    return digest.hexdigest()
