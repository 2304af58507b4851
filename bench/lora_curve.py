"""Does LoRA learn as in fp32? The same adapters, batches and optimizer; only where the arithmetic rounds differs.

    python bench/lora_curve.py                                   # Llama-3.2-1B shape, on a GPU
    python bench/lora_curve.py --tiny                            # the same shown small, on the CPU

Base weights are random bf16 values; ``fp32`` trains on exactly those values in fp32 and is the truth. Early in training
an adapter's contribution is smaller than half a bf16 step of the base linear's output, so a sum that is rounded a
second time loses it, whatever dtype the adapters have. The table ends with each system's largest distance to fp32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import isolate
import systems
import tables

# name -> (system, is the base widened to fp32, are the adapters fp32)
RUNS = {
    "fp32": ("eager", True, True),
    "eager": ("eager", False, False),
    "eager, fp32 adapters": ("eager", False, True),
    "inductor": ("inductor", False, False),
    "liger": ("liger", False, False),
    "sloth": ("sloth", False, False),
    "sloth, fp32 adapters": ("sloth", False, True),
}
DEFAULT = "fp32;eager;eager, fp32 adapters;sloth;sloth, fp32 adapters"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems.add_model_arguments(parser)
    parser.set_defaults(batch=2, seq=512)
    parser.add_argument("--tiny", action="store_true", help="a two-layer model, 2 x 64 tokens, on the CPU")
    parser.add_argument("--runs", default=DEFAULT, help=f"separated by ';', of: {'; '.join(RUNS)}")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=tables.OUT)
    parser.add_argument("--child-result", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.tiny:
        found.model, found.device, found.seq = "tiny", "cpu", 64
    unknown = [name for name in found.runs.split(";") if name not in RUNS]
    if unknown:
        parser.error(f"unknown run {'; '.join(unknown)}; known: {'; '.join(RUNS)}")
    return found


def main() -> None:
    a = arguments()
    if a.child_result:
        isolate.leave(a.child_result, lambda: curve(a.runs, a))
        return
    names = a.runs.split(";")
    results = isolate.each(names, lambda n: isolate.child(__file__, [*sys.argv[1:], "--runs", n], a.timeout))
    report(a, results)


def curve(name: str, a: argparse.Namespace) -> isolate.Result:
    """Train and return the loss of every step."""
    import torch

    system, widened, fp32_adapters = RUNS[name]
    torch.backends.cuda.matmul.allow_tf32 = False
    if system == "liger":
        systems.patch_liger(a.model)
    model = systems.base_model(a.model, a.device, layers=a.layers, attn=a.attn)
    model = systems.with_adapters(model, a.model, fp32=fp32_adapters)
    if widened:
        model = model.float()
    step_model = systems.compiled(system, model, a.sloth_options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.rate)
    data = systems.batches(model.config.vocab_size, a.batch, a.seq, a.device)
    losses = []
    for i in range(a.steps):
        ids = data[i % len(data)]
        loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return {"losses": losses, "environment": systems.environment(a.device)}


def report(a: argparse.Namespace, results: dict[str, isolate.Result]) -> None:
    ran = {name: r["losses"] for name, r in results.items() if "error" not in r}
    truth = ran.get("fp32")
    header = ["step", *results]
    rows = [[i + 1, *(f"{ran[n][i]:.4f}" if n in ran else "" for n in results)] for i in range(a.steps)]
    if truth:
        rows.append(["largest distance to fp32", *(_distance(ran.get(name), truth) for name in results)])
    failed = [f"\n{name}: {r['error']}" for name, r in results.items() if "error" in r]
    title = f"LoRA r=16, {a.model}, {a.batch} x {a.seq} tokens, {len(ran)} runs, rate {a.rate:g}, {a.device}"
    text = f"### {title}\n\n{tables.markdown(header, rows)}\n" + "".join(failed)
    record = {"title": title, "settings": {k: str(v) for k, v in vars(a).items()}, "results": results}
    tables.write(a.out, f"lora-curve-{a.model}", text, record, (lambda f: draw(f, title, ran)) if ran else None)


def _distance(losses: list[float] | None, truth: list[float]) -> str:
    return f"{max(abs(a - b) for a, b in zip(losses, truth)):.4f}" if losses else ""


def draw(figure: Any, title: str, ran: dict[str, list[float]]) -> None:
    axis = figure.subplots()
    for name, losses in ran.items():
        style = {"color": "black", "linewidth": 4, "alpha": 0.3} if name == "fp32" else {"marker": "."}
        axis.plot(range(1, len(losses) + 1), losses, label=name, **style)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend()
    figure.suptitle(title)


if __name__ == "__main__":
    main()
