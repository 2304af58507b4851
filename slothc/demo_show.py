"""What the demo prints and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .demo import Run


def tables(console: Console, eager: Run, other: Run, before: float, matched: dict[str, int] | None) -> None:
    """Losses step by step, then the summary: difference, time, memory, held-out loss and what was matched."""
    console.print(_losses(eager, other), _summary(eager, other, before, matched))


def largest_difference(eager: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(eager.losses, other.losses))


def _losses(eager: Run, other: Run) -> Table:
    table = Table("step", eager.name, other.name, "difference", title="loss")
    for column in table.columns:
        column.justify = "right"
    for step, (a, b) in enumerate(zip(eager.losses, other.losses), start=1):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}")
    return table


def _summary(eager: Run, other: Run, before: float, matched: dict[str, int] | None) -> Table:
    table = Table("", eager.name, other.name, title="summary")
    table.add_row("ms per step (median)", f"{eager.step_ms:.0f}", f"{other.step_ms:.0f}")
    table.add_row("first step, s (with compilation)", f"{eager.seconds[0]:.1f}", f"{other.seconds[0]:.1f}")
    table.add_row("peak memory, MiB", f"{eager.peak_bytes / 2**20:.0f}", f"{other.peak_bytes / 2**20:.0f}")
    table.add_row(f"held-out loss (before: {before:.4f})", f"{eager.held_out:.4f}", f"{other.held_out:.4f}")
    table.add_row("largest difference of a loss", "", f"{largest_difference(eager, other):.1e}")
    table.add_row("time against eager", "", f"{other.step_ms / eager.step_ms:.2f}x")
    if matched is not None:
        table.add_row("matched", "", "\n".join(f"{count} {rule}" for rule, count in sorted(matched.items())))
    return table


def plot(path: Path, eager: Run, other: Run) -> None:
    """Both loss curves, and their difference below on its own scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = range(1, len(eager.losses) + 1)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=[3, 1], layout="constrained")
    top.plot(steps, eager.losses, "o-", color="0.6", linewidth=4, markersize=7, label="eager")
    top.plot(steps, other.losses, ".-", color="tab:green", label=other.name)
    top.set_ylabel("loss")
    top.legend()
    bottom.axhline(0, color="0.8", linewidth=1)
    bottom.plot(steps, [b - a for a, b in zip(eager.losses, other.losses)], ".-", color="tab:red")
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    top.set_title("SmolLM2-135M, LoRA on the Python documentation")
    figure.savefig(path, dpi=120)
    plt.close(figure)
