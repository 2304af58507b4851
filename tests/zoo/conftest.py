"""Makes the models and surroundings of ``tests/slothc`` importable, each test with one thread and no compiled code of the one before."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "slothc"))

from alone import alone  # noqa: F401
