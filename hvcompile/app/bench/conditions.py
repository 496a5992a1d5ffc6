"""The conditions of a bench: what is written beside its figures, so that they can be repeated."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from hvcompile.app import pipelines
from hvcompile.app.bench.process import Protocol
from hvcompile.app.request.bench import GRID, Request


def record(request: Request, protocol: Protocol, restart: bool) -> dict[str, Any]:
    """The protocol as JSON."""
    config = pipelines.transformer_config(protocol.model) if protocol.model else protocol.config
    shape = protocol.shape
    heads, head_dim = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
    rows, columns = shape.height // GRID.spatial, shape.width // GRID.spatial
    return {
        "model": protocol.model or "random weights",
        "blocks": f"{config.get('num_layers', 20)}+{config.get('num_single_layers', 40)}",
        "hidden": heads * head_dim,
        "frames": shape.num_frames,
        "height": shape.height,
        "width": shape.width,
        "tokens": ((shape.num_frames - 1) // GRID.temporal + 1) * rows * columns,
        "text_tokens": shape.text_tokens,
        "prompt_tokens": shape.prompt_tokens,
        "steps": protocol.steps,
        "threshold": protocol.threshold,
        "seed": protocol.seed,
        "repeats": request.repeats,
        "device": protocol.device,
        "dtype": protocol.dtype,
        "lower": protocol.lower,
        "restart": restart,
        "timeout_s": request.timeout_s,
    }


def versions() -> dict[str, str | None]:
    """The version of each package that is measured; None where it is not installed."""
    numbers: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "cache-dit", "hvcompile"):
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            numbers[package] = None
    return numbers


def machine(protocol: Protocol) -> dict[str, Any]:
    """What it is measured on."""
    device = torch.device(protocol.device)
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "threads": protocol.threads or torch.get_num_threads(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def load() -> float | None:
    """The system's load average over a minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
