"""Tiny configurations of diffusers' transformers that the tests' zoo lacks."""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, Any] = {}
