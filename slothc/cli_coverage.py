"""``slothc coverage``: checks the names, shows progress, prints the table, writes the files."""

from __future__ import annotations

import difflib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .survey import Row, document, failed, measured, median_coverage, survey

FIGURES = ("graphs", "coverage", "eager error", "sloth error", "of allowed", "compile s")
INTERRUPTED = 130    # as a shell says it
COLOURS = {"ok": "green", "off": "red", "crash": "red", "timeout": "red"}


@click.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every model type that transformers has a causal LM for.")
@click.option("--peft", type=click.Choice(["lora"]), help="Add adapters to every linear layer.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Of the models' weights.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="That the models run on.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Side processes at a time.")
@click.option("--timeout", type=click.FloatRange(min=1), default=300, show_default=True, help="Seconds for one model.")
@click.option("--resume", is_flag=True, help="Keep the models that the --json file has, if settings and versions are the same.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write everything measured here.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as one page here.")
def coverage(names: tuple[str, ...], everything: bool, peft: str | None, dtype: str, device: str, jobs: int,
             timeout: float, resume: bool, json_path: Path | None, html_path: Path | None) -> None:
    """Measure many models: what is found, what is missed and why, errors against float64, compile time.

    NAMES are model types of transformers such as llama or qwen3; each is built tiny, with random weights, in a side process. Exits
    with 1 if a model that runs in eager crashes under sloth or breaks the numerical contract. Ctrl-C ends it with what was measured until
    then, files included, and exit code 130.
    """
    chosen = _chosen(names, everything)
    for path in (json_path, html_path):
        if path and not path.absolute().parent.is_dir():
            raise click.BadParameter(f"the directory of {str(path)!r} does not exist")
    if device == "cuda" and not _has_cuda():
        raise click.BadParameter("PyTorch sees no CUDA device here", param_hint="--device")
    if resume and json_path is None:
        raise click.UsageError("--resume needs --json, the file that it goes on with")
    settings = {"peft": peft, "dtype": dtype, "device": device}
    old = {r["name"]: r for r in measured(json_path, settings)} if resume and json_path else {}
    found = _watched([n for n in chosen if n not in old], jobs, timeout, settings)
    rows = [r for n in chosen if (r := found.get(n) or old.get(n))]
    console = Console(width=None if sys.stdout.isatty() else 180)
    if rows:
        console.print(table(rows, console.width))
    click.echo(summary(rows))
    _write(document(rows, settings, len(chosen)), json_path, html_path)
    if len(rows) < len(chosen):
        click.echo(f"stopped after {len(rows)} of {len(chosen)} models", err=True)
        raise SystemExit(INTERRUPTED)
    if failed(rows):
        raise SystemExit(1)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _write(whole: dict[str, Any], json_path: Path | None, html_path: Path | None) -> None:
    if json_path:
        json_path.write_text(json.dumps(whole, indent=2) + "\n")
    if html_path:
        from .survey_page import page

        html_path.write_text(page(whole), encoding="utf-8")


def _chosen(names: Sequence[str], everything: bool) -> list[str]:
    """The model types asked for, each once. Raises a usage error for unknown ones, with what they resemble."""
    from .tiny import config_names

    known = config_names()
    if everything == bool(names):
        raise click.UsageError("name model types of transformers, or give --all" + " alone" * bool(names))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
            raise click.BadParameter(f"unknown model type {name!r}; {hint}", param_hint="NAMES")
    return known if everything else list(dict.fromkeys(names))


def _watched(names: Sequence[str], jobs: int, timeout: float, settings: dict[str, Any]) -> dict[str, Row]:
    """Name -> row, under a progress bar (lines where there is no terminal); fewer than ``names`` after Ctrl-C or a SIGTERM."""
    console = Console(stderr=True)
    text = (TextColumn("{task.description:<24}"), TextColumn("{task.fields[bad]}"))
    columns = (text[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text[1])
    found: dict[str, Row] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=len(names), bad="")

        def advance(row: Row) -> None:
            found[row["name"]] = row
            bad = [r["name"] for r in failed(list(found.values()))]
            bar.update(task, advance=1, description=row["name"], bad=f"failed: {', '.join(bad)}" if bad else "")
            if not console.is_terminal:
                click.echo(f"{len(found)}/{len(names)} {row['name']}: {row['status']}", err=True)

        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            survey(names, jobs=jobs, timeout=timeout, progress=advance, **settings)
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
    return found


def table(rows: Sequence[Row], width: int) -> Table:
    """One line of at most ``width`` characters for each model."""
    lines = [(r["name"], r["status"], *_figures(r)) for r in rows]
    made = Table(box=None)
    for k, head in enumerate(("model", "status", *FIGURES)):
        made.add_column(head, justify="left" if k < 2 else "right", no_wrap=True)
        width -= max(len(head), *(len(line[k]) for line in lines)) + 2
    made.add_column("found, or why not", no_wrap=True)
    for line, row in zip(lines, rows):
        colour = COLOURS.get(row["status"], "yellow")
        made.add_row(line[0], f"[{colour}]{line[1]}[/]", *line[2:], escape(_cut(_said(row), max(width - 2, 17))))
    return made


def _figures(row: Row) -> tuple[str, ...]:
    errors = row.get("errors", {}).get("gradients")
    truth = "*" * (row.get("truth") != "float64")
    return (
        str(row.get("graphs", "")),
        f"{row['coverage']:.1%}" if "coverage" in row else "",
        f"{errors['eager']:.1e}" if errors else "",
        f"{errors['sloth']:.1e}{truth}" if errors else "",
        f"{row['share']:.2f}" if "share" in row else "",
        f"{row['compile_s']:.1f}" if "compile_s" in row else "",
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _said(row: Row) -> str:
    return str(row["reason"]) or ", ".join(f"{n} {c}" for n, c in row.get("counts", {}).items())


def summary(rows: Sequence[Row]) -> str:
    """The last lines: how many are as they should be, and the median coverage."""
    middle, good = median_coverage(rows), sum(r["status"] == "ok" for r in rows)
    text = f"\n{good} of {len(rows)} run and hold the contract"
    if middle is not None:
        text += f"; median coverage {middle:.1%}"
    wrong: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            wrong.setdefault(row["status"], []).append(row["name"])
    text += "".join(f"\n  {status}: {', '.join(names)}" for status, names in sorted(wrong.items()))
    if any(r.get("truth") == "eager fp32" for r in rows):
        text += "\n  * no float64 truth: distance from eager in fp32"
    if chosen := [r["name"] for r in rows if r["status"] == "ok" and "turned" in r]:
        text += f"\n  not counting draws in which a choice, of experts say, is not float64's: {', '.join(chosen)}"
    return text
