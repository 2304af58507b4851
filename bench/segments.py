"""What the gradient of looked-up rows costs: sloth's sums by an index (slothc.kernels.segments) and PyTorch's.

    python bench/segments.py                                                 # on a CUDA device
    TRITON_INTERPRET=1 python bench/segments.py --device cpu --scale 256     # shows that it runs: a 256th of the rows

Rows are fp32, sums are bf16. ``embedding``: embedding_dense_backward and a cast, what sloth takes where it has no kernel.
``index_put``: what eager's x[index] does in its backward, in bf16. ``index_add``: with atomic additions, so that its bits differ
from run to run. GB/s are of rows read and sums written, once each. ``moved``: what sloth does where the index is a permutation by how it
was made (slothc.kernels.moved), with rows in bf16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from joined import milliseconds
from slothc.kernels import moved, segments
from slothc.kernels.devices import available
from torch import Tensor

DTYPE = torch.bfloat16
PERMUTATION = "a permutation"


def cases(a: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """(name, rows, index, number of sums)."""

    def draw(name: str, index: Tensor, width: int, count: int) -> tuple[str, Tensor, Tensor, int]:
        index = index.to(a.device)
        return f"{name}, {index.numel()} x {width} to {count}", torch.randn(index.numel(), width, device=a.device), index, count

    tokens = 4096 // a.scale
    for k in (2, 8):
        perm = torch.randperm(k * tokens)
        yield draw(f"a token's {k} experts", perm // k, 2048, tokens)
        yield draw(PERMUTATION, perm, 2048, k * tokens)
    yield draw("weights of 8 experts", perm, 1, 8 * tokens)
    words = 128256 // a.scale
    zipf = (torch.rand(2 * tokens) ** 4 * words).long()
    yield draw("an embedding", zipf, 2048, words)
    yield draw("an embedding of one word", torch.zeros_like(zipf), 2048, words)
    yield draw("biases of 32 experts", torch.randint(0, 32, (4 * tokens,)), 2880, 32)


def ways(name: str, rows: Tensor, index: Tensor, count: int) -> dict[str, Callable[[], object]]:
    low, shape = rows.to(DTYPE), (count, rows.shape[1])
    found: dict[str, Callable[[], object]] = {
        "embedding": lambda: torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False).to(DTYPE),
        "index_put": lambda: torch.ops.aten.index_put(low.new_zeros(shape), [index], low, True),
        "index_add": lambda: rows.new_zeros(shape).index_add_(0, index, rows).to(DTYPE),
        "sloth": lambda: segments.segment_sum(rows, index, count, DTYPE, skipped=None, signed=False),
    }
    if name.startswith(PERMUTATION):
        found["moved"] = lambda: moved.move_rows(low, index, count, DTYPE)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", type=int, default=1)
    a = parser.parse_args()
    if not available(torch.device(a.device)):
        parser.error(f"no Triton for {a.device} here; for a CPU set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    print("| rows | embedding us | index_put us | index_add us | sloth us | sloth GB/s | moved us |")
    print("| --- " * 7 + "|")
    for name, rows, index, count in cases(a):
        us = {way: milliseconds(call, a.device) * 1e3 for way, call in ways(name, rows, index, count).items()}
        read = rows.numel() * rows.element_size() + count * rows.shape[1] * DTYPE.itemsize
        cells = [f"{us[w]:.1f}" for w in ("embedding", "index_put", "index_add", "sloth")]
        last = f"{us['moved']:.1f}" if "moved" in us else ""
        print(f"| {name} | {' | '.join(cells)} | {read / us['sloth'] / 1e3:.0f} | {last} |", flush=True)


if __name__ == "__main__":
    main()
