"""The mark of tests that repeat at length what others show in short; ``HVCOMPILE_SLOW=1`` runs them too."""

from __future__ import annotations

import os

import pytest

SLOW = pytest.mark.skipif("HVCOMPILE_SLOW" not in os.environ, reason="takes minutes; asked for by HVCOMPILE_SLOW=1")
