"""What one call of each operation costs the processor, with Triton's launches and with direct ones (slothc.kernels.direct).

    python bench/launch.py                # on a CUDA device: microseconds of wall time per call, the queue never full
    python bench/launch.py --device cpu   # what is left without a device: PyTorch's lowering

Tensors are small and nothing waits in between, so the time is the processor's. Each way runs in a process of its own
(``SLOTH_DIRECT=0`` switches direct launches off) and its first, ordinary result must be its last one's bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tables import markdown

TOKENS, WIDTH, RANK, VOCAB, CALLS, ROUNDS = 64, 256, 16, 512, 300, 5
Case = tuple[str, Callable[[], Any]]


def microseconds(call: Callable[[], Any], device: str, calls: int) -> float:
    """The median over rounds of the time per call until all are enqueued."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    first = call()
    for _ in range(20):
        call()
    times = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    same(first, last)
    return statistics.median(times)


def same(first: Any, last: Any) -> None:
    pairs = [(first, last)] if isinstance(first, torch.Tensor) else list(zip(first, last))
    for a, b in pairs:
        if not torch.equal(a, b):
            raise AssertionError("a later launch gives other numbers than the first")


def rowwise(device: str, dtype: torch.dtype) -> Iterator[Case]:
    from slothc.kernels.rowwise import launcher
    from slothc.kernels.rowwise_op import call

    from slothc import catalogue

    for name in ("rms_norm", "gated_mlp"):
        _, plan = catalogue.lifted(name, dtype)[0]
        draw = {"device": device, "dtype": dtype}
        operands = [torch.randn(WIDTH if len(o.shape) == 1 else (2, TOKENS // 2, WIDTH), **draw) for o in plan.forward.reads]
        yield f"{name} forward", lambda plan=plan, operands=operands: launcher(plan.forward)(operands)
        for t in operands:
            t.requires_grad_()
        run = call(plan)
        y = run(*operands)
        g = torch.randn_like(y)
        yield f"{name} forward, recorded", lambda plan=plan, operands=operands, run=run: run(*operands)
        yield f"{name} backward", lambda y=y, g=g, operands=operands: torch.autograd.grad(y, operands, g, retain_graph=True)


def lora(device: str, dtype: torch.dtype) -> Iterator[Case]:
    from slothc.kernels.joined import joined
    from slothc.kernels.lowrank import lora_linear

    draw = {"device": device, "dtype": dtype}
    x, w = torch.randn(2, TOKENS // 2, WIDTH, **draw), torch.randn(WIDTH, WIDTH, **draw)
    a, b = torch.randn(RANK, WIDTH, **draw), torch.randn(WIDTH, RANK, **draw)
    t, rows = torch.randn(TOKENS, RANK, **draw), x.view(TOKENS, WIDTH)
    yield "torch.mm", lambda: torch.mm(rows, w.t())
    yield "joined", lambda: joined(t, b.t(), 2.0, rows, w.t())
    for leaf in (x, a, b):
        leaf.requires_grad_()
    yield "lora_linear forward", lambda: lora_linear(x, None, w, None, a, b, 2.0)
    y = lora_linear(x, None, w, None, a, b, 2.0)
    g = torch.randn_like(y)
    yield "lora_linear backward", lambda: torch.autograd.grad(y, (x, a, b), g, retain_graph=True)


def vocab(device: str, dtype: torch.dtype) -> Iterator[Case]:
    from slothc.kernels.vocab import linear_cross_entropy

    hidden = torch.randn(TOKENS, WIDTH, device=device, dtype=dtype, requires_grad=True)
    weight, labels = torch.randn(VOCAB, WIDTH, device=device, dtype=dtype), torch.randint(VOCAB, (TOKENS,), device=device)
    yield "vocab forward", lambda: linear_cross_entropy(hidden, weight, None, labels).detach()
    y = linear_cross_entropy(hidden, weight, None, labels)
    yield "vocab backward", lambda: torch.autograd.grad(y, hidden, retain_graph=True)


def one(device: str, calls: int) -> dict[str, Any]:
    """This process's way: microseconds by operation, and why kernels stayed with Triton's launch."""
    from slothc.kernels import direct

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spent = {name: microseconds(call, device, calls) for make in (rowwise, lora, vocab) for name, call in make(device, dtype)}
    return {"spent": spent, "refused": dict(direct.refused)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--one", action="store_true", help="only this process's way, as JSON")
    a = parser.parse_args()
    if a.one:
        print(json.dumps(one(a.device, a.calls)))
        return
    found = []
    for way in "01":
        command = [sys.executable, __file__, "--one", "--device", a.device, "--calls", str(a.calls)]
        done = subprocess.run(command, env={**os.environ, "SLOTH_DIRECT": way}, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    ordinary, direct = (f["spent"] for f in found)
    rows = [(name, f"{us:.1f} us", f"{direct[name]:.1f} us", f"{us / direct[name]:.2f}") for name, us in ordinary.items()]
    print(markdown(("operation", "ordinary", "direct", "ratio"), rows))
    for reason, count in found[1]["refused"].items():
        print(f"{count} kernels stay with Triton's launch: {reason}")


if __name__ == "__main__":
    main()
