"""The closing table of kernels.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
import tables

_ROWS = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture(scope="session")
def kernel_table(request: pytest.FixtureRequest) -> list[Any]:
    """Rows of (operation, system, pass, seconds, rate, unit)."""
    return request.config.stash[_ROWS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [(o, s, p, f"{t * 1e6:.1f}", f"{rate:.2f} {unit}") for o, s, p, t, rate, unit in config.stash[_ROWS]]
    if rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(tables.markdown(["operation", "system", "pass", "device us", "rate"], rows))
