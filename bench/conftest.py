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
    """A ``kernels.Row`` for each operation, system and pass, and two for what the machine reaches at best."""
    return request.config.stash[_ROWS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[_ROWS]
    if found:
        terminalreporter.write_line("")
        terminalreporter.write_line(summary(found))


def summary(found: list[Any]) -> str:
    """One line for each operation and pass: microseconds of each system, sloth's rate, and its share of the limit."""
    limits = {r.unit: r.work / r.seconds for r in found if r.system == "limit"}
    systems = list(dict.fromkeys(r.system for r in found if r.system != "limit"))
    times = {(r.operation, r.direction, r.system): r for r in found if r.system != "limit"}
    lines = []
    for operation, direction in dict.fromkeys((o, d) for o, d, _ in times):
        those = [times.get((operation, direction, s)) for s in systems]
        line = [operation, direction, *("" if r is None else f"{r.seconds * 1e6:.1f}" for r in those)]
        ours = times.get((operation, direction, "sloth"))
        rate = ours.work / ours.seconds if ours else 0.0
        lines.append([*line, f"{rate / 1e12:.2f} {ours.unit}", f"{rate / limits[ours.unit]:.0%}"] if ours else [*line, "", ""])
    best = ", ".join(f"{r.operation} {r.work / r.seconds / 1e12:.2f} {r.unit}" for r in found if r.system == "limit")
    return f"limits: {best}\n\n" + tables.markdown(["operation", "pass", *systems, "sloth's rate", "of the limit"], lines)
