"""The mark of tests that repeat at length what others show in short; ``HVCOMPILE_SLOW=1`` runs them too."""

from __future__ import annotations

import os

import pytest

IS_SLOW = "HVCOMPILE_SLOW" in os.environ
SLOW = pytest.mark.skipif(not IS_SLOW, reason="takes minutes; asked for by HVCOMPILE_SLOW=1")
