"""Does training learn what it should? The same weights, batches and optimizer; only where the arithmetic rounds differs.

    python bench/curve.py                                        # LoRA, Llama-3.2-1B shape, on a GPU
    python bench/curve.py --tiny                                 # the same shown small, on the CPU
    python bench/curve.py --mode full --text --steps 200 --runs 'eager;eager, other kernels;sloth'

Base weights are random bf16 values. Of LoRA, ``fp32`` trains on exactly those values in fp32 and is the truth: early in
training an adapter's contribution is smaller than half a bf16 step of the base linear's output, so a sum that is
rounded a second time loses it, whatever dtype the adapters have. Of a full fine-tune ``eager`` is what to follow, and
``eager, other kernels`` (attention written out) shows how far two right computations drift apart. The table ends with
each run's largest and mean distance to the first.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import isolate
import systems
import tables


@dataclass(frozen=True)
class Run:
    system: str
    widened: bool = False  # the base's values in fp32
    fp32_adapters: bool = False
    attn: str | None = None  # another implementation of attention than --attn


RUNS = {
    "fp32": Run("eager", widened=True, fp32_adapters=True),
    "eager": Run("eager"),
    "eager, fp32 adapters": Run("eager", fp32_adapters=True),
    "eager, other kernels": Run("eager", attn="eager"),
    "inductor": Run("inductor"),
    "liger": Run("liger"),
    "sloth": Run("sloth"),
    "sloth, fp32 adapters": Run("sloth", fp32_adapters=True),
}
DEFAULT = "fp32;eager;eager, fp32 adapters;sloth;sloth, fp32 adapters"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems.add_model_arguments(parser)
    parser.set_defaults(batch=2, seq=512)
    parser.add_argument("--tiny", action="store_true", help="a two-layer model, 2 x 64 tokens, on the CPU")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--text", action="store_true", help="words of Python's own help topics, not random tokens")
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
        isolate.leave(a.child_result, lambda: curve(RUNS[a.runs], a))
        return
    names = a.runs.split(";")
    results = isolate.each(names, lambda n: isolate.child(__file__, [*sys.argv[1:], "--runs", n], a.timeout))
    report(a, results)


def curve(run: Run, a: argparse.Namespace) -> isolate.Result:
    """Train and return the loss of every step."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    if run.system == "liger":
        systems.patch_liger(a.model)
    model = systems.base_model(a.model, a.device, layers=a.layers, attn=run.attn or a.attn)
    if a.mode == "lora":
        model = systems.with_adapters(model, a.model, fp32=run.fp32_adapters)
    if run.widened:
        model = model.float()
    step_model = systems.compiled(run.system, model, a.sloth_options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.rate)
    vocabulary = model.config.vocab_size
    data = words(vocabulary, a) if a.text else systems.batches(vocabulary, a.batch, a.seq, a.device)
    losses = []
    for i in range(a.steps):
        ids = data[i % len(data)]
        loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return {"losses": losses, "environment": systems.environment(a.device)}


def words(vocabulary: int, a: argparse.Namespace) -> list[Any]:
    """Batches of the text, one after the other; a word's number is its place among those seen so far, from 4 on."""
    from pydoc_data.topics import topics

    import torch

    number: dict[str, int] = {}
    found = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)))
    ids = torch.tensor([4 + number.setdefault(word, len(number)) % (vocabulary - 4) for word in found])
    size = a.batch * a.seq
    kept = ids[: len(ids) // size * size].to(a.device)
    return list(kept.view(-1, a.batch, a.seq))


def report(a: argparse.Namespace, results: dict[str, isolate.Result]) -> None:
    ran = {name: r["losses"] for name, r in results.items() if "error" not in r}
    first = next(iter(results))
    shown = [i for i in range(a.steps) if a.steps <= 40 or (i + 1) % 10 == 0 or i == 0]
    rows = [[i + 1, *(f"{ran[n][i]:.4f}" if n in ran else "" for n in results)] for i in shown]
    if first in ran:
        apart = {n: [abs(x - y) for x, y in zip(ran[n], ran[first])] for n in ran}
        for what, of in {"largest": max, "mean": lambda found: sum(found) / len(found)}.items():
            rows.append([f"{what} distance to {first}", *(f"{of(apart[n]):.4f}" if n in ran else "" for n in results)])
    failed = [f"\n{name}: {r['error']}" for name, r in results.items() if "error" in r]
    kind = "LoRA r=16" if a.mode == "lora" else "all weights trained"
    title = (
        f"{kind}, {a.model}, {a.batch} x {a.seq} tokens{' of text' if a.text else ''}, {len(ran)} runs, "
        f"rate {a.rate:g}, {a.device}"
    )
    text = f"### {title}\n\n{tables.markdown(['step', *results], rows)}\n" + "".join(failed)
    record = {"title": title, "settings": {k: str(v) for k, v in vars(a).items()}, "results": results}
    tables.write(a.out, f"{a.mode}-curve-{a.model}", text, record, (lambda f: draw(f, title, ran)) if ran else None)


def draw(figure: Any, title: str, ran: dict[str, list[float]]) -> None:
    axis = figure.subplots()
    for place, (name, losses) in enumerate(ran.items()):
        style = {"marker": "."} if place else {"color": "black", "linewidth": 4, "alpha": 0.3}
        axis.plot(range(1, len(losses) + 1), losses, label=name, **style)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend()
    figure.suptitle(title)


if __name__ == "__main__":
    main()
