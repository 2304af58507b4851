"""The closing table of kernels.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
import tables

_ROWS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--head-chunk-mib", type=int, help="a frozen head's logits that are held at once, MiB")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    size = config.getoption("--head-chunk-mib")
    if size is not None:
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from slothc.kernels import vocab_blocks

        vocab_blocks.BLOCK_BYTES = size << 20


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
    """A line for each operation and pass: microseconds of each system, sloth's rate, its share of the limits; then the memory of losses."""
    limits = {r.unit: r.work / r.seconds for r in found if r.system == "limit"}
    copies = {r.work: r.seconds for r in found if r.system == "limit of its size"}
    rows = [r for r in found if not r.system.startswith("limit")]
    systems = list(dict.fromkeys(r.system for r in rows))
    times = {(r.operation, r.direction, r.system): r for r in rows}
    lines = []
    for operation, direction in dict.fromkeys((o, d) for o, d, _ in times):
        those = [times.get((operation, direction, s)) for s in systems]
        line = [operation, direction, *("" if r is None else f"{r.seconds * 1e6:.1f}" for r in those)]
        lines.append([*line, *_shares(times.get((operation, direction, "sloth")), limits, copies)])
    best = ", ".join(f"{r.operation} {r.work / r.seconds / 1e12:.2f} {r.unit}" for r in found if r.system == "limit")
    head = ["operation", "pass", *systems, "sloth's rate", "of the limit", "of a copy"]
    text = f"limits: {best}\n\n" + tables.markdown(head, lines)
    peaks = {(r.operation, r.system): r.peak for r in rows if r.peak}
    if peaks:
        names = dict.fromkeys(o for o, _ in peaks)
        text += "\n\n" + tables.markdown(
            ["peak GiB", *systems], [[o, *(f"{peaks[o, s] / 2**30:.2f}" if (o, s) in peaks else "" for s in systems)] for o in names]
        )
    return text


def _shares(ours: Any, limits: dict[str, float], copies: dict[float, float]) -> list[str]:
    if ours is None:
        return ["", "", ""]
    rate = ours.work / ours.seconds
    copy = f"{copies[ours.work] / ours.seconds:.0%}" if ours.work in copies else ""
    return [f"{rate / 1e12:.2f} {ours.unit}", f"{rate / limits[ours.unit]:.0%}", copy]
