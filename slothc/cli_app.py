"""The commands of ``slothc``: explain, coverage, derive, check, demo."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import click

from . import cli_target
from .cli_coverage import coverage

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_CONTEXT)
def group() -> None:
    """What sloth recognises in a model, how it derives the backward formulas, and a training run that shows it."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@group.command()
@click.argument("target")
@click.option("--size", type=click.Choice(["tiny", "full"]), default="tiny", show_default=True,
              help="tiny: two small layers with random weights; full: the real shape, on the meta device.")
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Sequences in a step.")
@click.option("--seq", type=click.IntRange(min=2), help="Tokens in a sequence.  [default: 32 tiny, 2048 full]")
@click.option("--peft", type=click.Choice(["lora"]), help="Add adapters to every linear layer.")
@click.option("--dtype", type=click.Choice(list(cli_target.DTYPES)), default="bf16", show_default=True,
              help="Of the model's weights.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here too.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here too.")
def explain(target: str, size: str, batch: int, seq: int | None, peft: str | None, dtype: str,
            json_path: Path | None, html_path: Path | None) -> None:
    """Show what is matched in TARGET, where, and what is not and why. Nothing is trained and nothing is downloaded.

    TARGET is a directory with a config.json, or a model type of transformers such as llama or qwen3.
    """
    import slothc

    model, inputs = cli_target.build(target, size=size, batch=batch, seq=seq, peft=peft, dtype=dtype)
    report = slothc.explain(model, **inputs)
    click.echo(str(report))
    if json_path:
        report.to_json(json_path)
    if html_path:
        report.to_html(html_path)


group.add_command(coverage)


@group.command()
@click.argument("rule")
@click.option("--sample", help="Which of the rule's samples (default: the first).")
def derive(rule: str, sample: str | None) -> None:
    """Print RULE's formula, the backward derived from it, what is saved between them, and the generated Triton."""
    from .cli_derive import derivation

    click.echo(derivation(rule, sample))


@group.command()
@click.argument("rule")
def check(rule: str) -> None:
    """Hold RULE's derived gradients against both witnesses, for every sample. Exits with 1 if one disagrees."""
    from .cli_check import witnesses

    table, passed = witnesses(rule)
    click.echo(table)
    if not passed:
        raise SystemExit(1)


@group.command()
@click.option("--backend", type=click.Choice(["sloth", "eager"]), default="sloth", show_default=True,
              help="What the second run uses; eager shows that the two runs are set up alike.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Training steps in each run.")
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Sequences in a step.")
@click.option("--seq", type=click.IntRange(min=8), default=128, show_default=True, help="Tokens in a sequence.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-out"), show_default=True,
              help="Where the plot and the figures go.")
def demo(backend: str, steps: int, batch: int, seq: int, out: Path) -> None:
    """Fine-tune SmolLM2-135M with LoRA on the Python documentation: eager, then sloth, from the same start."""
    from .demo import Settings, run

    run(Settings(backend=backend, steps=steps, batch=batch, seq=seq, out=out))
