"""Results as a markdown table, and as files beside each other: NAME.md, NAME.json, NAME.png."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "out"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def write(
    folder: Path, name: str, text: str, record: dict[str, Any], draw: Callable[[Any], None] | None = None
) -> None:
    """Print ``text`` and leave it with its record in ``folder``; ``draw`` gets a matplotlib figure to fill."""
    folder.mkdir(parents=True, exist_ok=True)
    print(text, flush=True)
    (folder / f"{name}.md").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1))
    if draw is not None:
        _plot(folder / f"{name}.png", draw)


def _plot(path: Path, draw: Callable[[Any], None]) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"(no {path.name}: matplotlib is not installed)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 4), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=120)
    plt.close(figure)
