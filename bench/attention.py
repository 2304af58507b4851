"""What attention costs whose scores a library's kernel has no word for, beside the ways there are to run it.

    python bench/attention.py             # bf16, the shapes of Gemma-2-2B and of an 8B Llama, 4 x 2,048 tokens, on a CUDA device
    python bench/attention.py --tune      # a table of block shapes for each kernel instead
    python bench/attention.py --device cpu --batch 1 --tokens 64      # shows that it runs

``sloth``: slothc.kernels.scores. ``eager``: written out. ``sdpa``: F.scaled_dot_product_attention, where it can say it. ``flex``:
flex_attention, compiled. TFLOP/s count two products forward and five backward, half of each where the mask is causal. Errors are relative
distances of out, dq, dk and dv from the written form in float64 on the first element of the batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from slothc.kernels import scores, scores_launch
from slothc.kernels.scores_launch import Blocks, Part, block

NAMES = ("out", "dq", "dk", "dv")
TRIED = {
    "forward": {
        256: "128.64.8.2 128.64.8.1 128.32.8.2 128.32.8.3 128.32.8.4 64.64.4.2 64.64.8.2 64.32.4.2 64.32.4.3 128.64.16.2 64.128.8.1",
        128: "128.64.8.3 128.64.8.2 128.64.4.3 128.64.4.2 128.128.8.2 64.64.4.3 64.64.4.2 128.32.4.3 64.128.4.2 128.32.8.3",
    },
    "to_queries": {
        256: "64.32.4.3 64.64.8.2 64.64.4.2 64.64.8.1 64.32.4.2 64.32.4.4 64.32.8.3 128.64.16.1 128.64.8.1 128.32.8.1 128.32.8.2 32.64.4.2",
        128: "128.64.8.2 128.64.8.1 128.64.8.3 64.64.4.2 64.64.4.3 128.32.4.2 128.32.8.3 64.128.8.2 128.128.8.1 64.32.4.3",
    },
    "to_values": {256: "64.64.8.2 64.128.8.1 64.128.8.2 64.128.8.3 128.128.8.1 32.128.8.2 32.128.8.3 32.64.8.3 64.64.4.1 128.64.8.1"},
    "to_keys": {256: "64.64.8.2 64.64.8.1 32.64.8.2 32.64.8.3 64.128.8.1 64.128.16.1 32.128.8.1 32.128.8.2 64.64.4.1"},
    "by_weights": {256: "64.64.8.4 64.64.8.3 64.64.8.2 128.64.8.2 64.128.16.4 64.128.16.3 64.128.8.4 32.64.8.6 64.64.4.4"},
    "to_both": {
        256: "32.64.8.3 32.64.8.2 32.64.8.1 64.64.8.2 64.64.8.1 16.64.8.3 16.64.8.2 16.128.8.2 32.128.8.1 32.64.4.2",
        128: "64.128.8.2 64.128.8.1 64.64.4.2 64.64.8.2 32.128.8.2 32.128.8.3 32.64.4.3 64.64.4.1 64.64.8.1 32.64.8.3",
    },
}  # fmt: skip
"""Queries, keys, warps and stages."""
COUNTS = {"forward": 1.0, "to_queries": 1.5, "to_values": 1.0, "to_keys": 1.5, "by_weights": 1.0, "to_both": 2.0}
"""Pairs of products."""


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    groups: int
    dim: int
    cap: float | None

    @property
    def chain(self) -> str:
        text = f"fp32; mul {self.dim**-0.5} fp32"
        return text if self.cap is None else f"{text}; div {self.cap} fp32; tanh fp32; mul {self.cap} fp32"

    def draw(self, batch: int, tokens: int, device: str) -> list[Tensor]:
        made = {"device": device, "dtype": torch.bfloat16}
        counts = (self.heads, self.groups, self.groups)
        return [torch.randn(batch, tokens, n, self.dim, **made).transpose(1, 2).requires_grad_() for n in counts]


SHAPES = (Shape("Gemma-2-2B", 8, 4, 256, 50.0), Shape("8B Llama", 32, 8, 128, None))


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=30, rep=150, return_mode="median"))
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def written(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(n, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * shape.dim**-0.5
    if shape.cap is not None:
        scores = torch.tanh(scores / shape.cap) * shape.cap
    mask = torch.full(scores.shape[2:], torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(scores + mask, -1, dtype=wide).to(q.dtype) @ v


def ways(shape: Shape, device: str) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {
        "sloth": lambda q, k, v: scores.attend(q, k, v, chain=shape.chain, kind="causal"),
        "eager": lambda q, k, v: written(shape, q, k, v),
    }
    if shape.cap is None:
        found["sdpa"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if device == "cuda":
        found["flex"] = flex(shape)
    return found


def flex(shape: Shape) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def capped(score: Tensor, *_: Any) -> Tensor:
        return score if shape.cap is None else shape.cap * torch.tanh(score / shape.cap)

    call, masks = torch.compile(flex_attention), {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[2]
        if t not in masks:
            masks[t] = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device=q.device.type)
        return call(q, k, v, score_mod=capped, block_mask=masks[t], scale=shape.dim**-0.5, enable_gqa=True)

    return run


def everything(run: Callable[..., Tensor], given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    out = run(*given)
    return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]


def compare(shape: Shape, batch: int, tokens: int, device: str) -> None:
    given = shape.draw(batch, tokens, device)
    upstream = torch.randn(batch, tokens, shape.heads, shape.dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
    first = [t[:1].detach().double().requires_grad_() for t in given]
    true = everything(lambda *x: written(shape, *x), first, upstream[:1])
    flops = 2 * batch * shape.heads * tokens**2 * shape.dim                # a product and half of it
    print(f"\n{shape.name}: {batch} x {tokens}, {shape.heads} heads, {shape.groups} of keys, {shape.dim} wide, soft-cap {shape.cap}")
    print("| | forward ms | TFLOP/s | forward and backward ms | TFLOP/s | peak GiB | " + " | ".join(NAMES) + " |\n|" + " --- |" * 10)
    for name, run in ways(shape, device).items():
        try:
            print(f"| {name} | " + " | ".join(measured(run, given, upstream, true, flops, device)) + " |", flush=True)
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:200]} |", flush=True)


def measured(run: Callable[..., Tensor], given: list[Tensor], upstream: Tensor, true: list[Tensor], flops: float, device: str) -> list[str]:
    found = everything(run, given, upstream)
    errors = [float((a[:1].double() - t).norm() / t.norm()) for a, t in zip(found, true)]
    del found
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        everything(run, given, upstream)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    with torch.no_grad():
        ahead = milliseconds(lambda: run(*given), device)
    both = milliseconds(lambda: everything(run, given, upstream), device)
    rates = [flops * k / ms / 1e9 for k, ms in ((1, ahead), (3.5, both))]
    times = [f"{ahead:.3f}", f"{rates[0]:.0f}", f"{both:.3f}", f"{rates[1]:.0f}", f"{peak:.2f}"]
    return [*times, *(f"{e:.2e}" for e in errors)]


def tune(shape: Shape, batch: int, tokens: int, device: str, only: str | None) -> None:
    """Each kernel by itself at every block shape."""
    q, k, v = (t.detach() for t in shape.draw(batch, tokens, device))
    upstream = torch.randn(batch, tokens, shape.heads, shape.dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
    s = scores.Scoring(shape.chain, "causal")
    saved = scores.forward(s, q, k, v, None, None)
    flops = 2 * batch * shape.heads * tokens**2 * shape.dim
    for name, count in COUNTS.items():
        if (only and name not in only.split(",")) or block(shape.dim) not in TRIED[name]:
            continue
        if name == "by_weights" and not left_at_once(q, k, v):
            continue
        print(f"\n{shape.name}: {name}\n| queries.keys.warps.stages | ms | TFLOP/s | spills |\n| --- | --- | --- | --- |")
        for text in TRIED[name][block(shape.dim)].split():
            calls = alone(name, s, (q, k, v), upstream, saved, Blocks(*map(int, text.split("."))))
            try:
                ms, spills = calls[0](), calls[1]()
                print(f"| {text} | {ms:.3f} | {flops * count / ms / 1e9:.0f} | {spills} |", flush=True)
            except Exception as error:
                print(f"| {text} | {type(error).__name__}: {str(error).splitlines()[0][:80]} |", flush=True)


def left_at_once(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the backward leaves weights for dk and dv."""
    (batch, heads, tq, d), (groups, tk) = q.shape, k.shape[1:3]
    return scores_launch.at_once(batch * groups, heads // groups, (tq, tk), (d, v.shape[3]), q.element_size()) > 0


def alone(
    name: str, s: scores.Scoring, given: Any, upstream: Tensor, saved: Any, blocks: Blocks
) -> tuple[Callable[[], float], Callable[[], Any]]:
    """The time of one kernel with these blocks; how many registers it spills."""
    q, k, v = given
    dq, dk, dv, deltas = *(torch.empty_like(t) for t in given), torch.zeros_like(saved[2])
    out, low, tops, inverses = saved
    (batch, heads, tq, _), (groups, tk) = q.shape, k.shape[1:3]
    left = left_at_once(q, k, v)
    weights, slopes = q.new_zeros((2, batch * heads * tq * scores_launch.left_row(tk) if left else 0))
    more, operands = {
        "forward": ((out,), (q, k, v, q, q, *saved)),
        "to_queries": ((out, upstream, dq), (q, k, v, q, out, low, upstream, tops, inverses, deltas, dq, weights, slopes)),
        "by_weights": ((upstream, dk, dv), (q, upstream, weights, slopes, dk, dv)),
        "to_both": ((upstream, dk, dv), (q, k, v, q, upstream, tops, inverses, deltas, dk, dv)),
    }["to_both" if name in scores_launch.PARTS else name]
    part = Part(0, batch * (groups if name in scores_launch.BY_KEYS else heads), left and name not in ("forward", *scores_launch.PARTS))
    scores._kernels.clear()
    scores_launch.chosen[name, 2 * block(q.shape[3]), q.dtype.itemsize] = blocks
    try:
        kernel = scores._kernel(name, s.form(None, None), 0, q, k, v, q, more, part)
    finally:
        scores_launch.chosen.clear()

    def spills() -> Any:
        made = kernel.run.ordinary(operands)
        return getattr(made, "n_spills", "?")

    return lambda: milliseconds(lambda: kernel(*operands), q.device.type), spills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", help="kernels to tune: " + ",".join(COUNTS))
    parser.add_argument("--shape", help="the shape whose name holds this")
    parser.add_argument("--tanh", choices=["exact", "quick", "approx"], help="how the soft-cap's tanh is computed")
    parser.add_argument("--apart", action="store_true", help="dk and dv apart at any width")
    parser.add_argument("--left", type=int, metavar="MIB", help="most that is left of weights at a time; 0: scores are made again")
    a = parser.parse_args()
    torch.manual_seed(0)
    if a.tanh:
        scores_launch.tanh = lambda dtype: a.tanh
    if a.apart:
        scores_launch.TOGETHER = 0
    if a.left is not None:
        scores_launch.LEFT = a.left << 20
    for shape in SHAPES:
        if a.shape and a.shape.lower() not in shape.name.lower():
            continue
        if a.tune:
            tune(shape, a.batch, a.tokens, a.device, a.only)
        else:
            compare(shape, a.batch, a.tokens, a.device)


if __name__ == "__main__":
    main()
