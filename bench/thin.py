"""What an adapter's own products cost, by one pass over the large matrix (slothc.kernels.thin) and by the library's products.

    python bench/thin.py                  # an 8B Llama's layer, 4,096 tokens, rank 16, bf16, on a CUDA device
    python bench/thin.py --factors fp32   # adapters in fp32 beside it
    python bench/thin.py --tune           # every block shape
    TRITON_INTERPRET=1 python bench/thin.py --device cpu --tokens 16      # shows that it runs: a 128th of the widths

``both``: s G B and s G' T of the linears that read one value. ``across``: X A'. ``along``: U' X. Rates are of the bytes of G or X, read
once. ``used``: whether sloth takes its own kernel there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from joined import milliseconds
from slothc.kernels import products, thin

LAYER = {"q, k, v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate, up": ((14336, 14336), 4096), "down": ((4096,), 14336)}
RANK = 16
BLOCKS = ((128, 32), (128, 64), (128, 128), (256, 32), (256, 64))
Call = Callable[[], object]


def cases(a: argparse.Namespace) -> Iterator[tuple[str, list[torch.Tensor], Call, Call, bool]]:
    """(name, the large matrices, ours, the library's, whether ours is what sloth takes)."""
    factors = torch.float32 if a.factors == "fp32" else torch.bfloat16

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*size, device=a.device).to(dtype)

    for name, (outs, width) in LAYER.items():
        if a.device == "cpu":
            outs, width = tuple(n // 128 for n in outs), width // 128
        rank, scales = RANK * len(outs), [2.0] * len(outs)
        gs, bs = [draw(a.tokens, n) for n in outs], [draw(n, RANK, dtype=factors) for n in outs]
        x, t, u = draw(a.tokens, width), draw(a.tokens, rank, dtype=factors), draw(a.tokens, rank, dtype=factors)
        down = draw(rank, width, dtype=factors).t()
        yield f"both, {name}", gs, partial(thin.both, gs, bs, t, scales), partial(thin._both, gs, bs, t, scales), True
        ours = partial(thin._launched, ("across", 1.0), [x], [down], None)
        yield f"across, {name}", [x], ours, partial(products.product, x, down), a.factors == "fp32"
        ours = partial(thin._launched, ("along", 1.0), [x], [], u, turned=True)
        yield f"along, {name}", [x], ours, partial(products.product, u.t(), x, long=True), a.factors == "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--factors", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--tune", action="store_true")
    a = parser.parse_args()
    if not thin._runs(torch.device(a.device)):
        parser.error(f"no Triton for {a.device} here; for a CPU set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    print("| products | library us | sloth us | sloth GB/s | used |\n| --- | --- | --- | --- | --- |")
    for name, large, ours, library, used in cases(a):
        ms, other = milliseconds(ours, a.device), milliseconds(library, a.device)
        rate = sum(x.numel() * x.element_size() for x in large) / ms / 1e6
        print(f"| {name} | {other * 1e3:.1f} | {ms * 1e3:.1f} | {rate:.0f} | {'yes' if used else 'no'} |", flush=True)
        if a.tune:
            print(f"| its rows.columns.warps.stages.programs | {', '.join(tuned(ours, a.device))} |  |  |  |", flush=True)


def tuned(call: Call, device: str, best: int = 5) -> list[str]:
    """The fastest block shapes with their microseconds."""
    chosen = thin.BLOCK_M, thin.BLOCK_N, thin.WARPS, thin.STAGES, thin.PROGRAMS
    found: list[tuple[float, str]] = []
    for (m, n), warps, stages, programs in itertools.product(BLOCKS, (4, 8), (2, 3, 4), (1, 2, 4)):
        thin.BLOCK_M, thin.BLOCK_N, thin.WARPS, thin.STAGES, thin.PROGRAMS = m, n, warps, stages, programs
        thin._records.clear()
        try:
            found.append((milliseconds(call, device), f"{m}.{n}.{warps}.{stages}.{programs}"))
        except Exception as error:  # too much shared memory
            print(f"{m}.{n}.{warps}.{stages}: {type(error).__name__}", file=sys.stderr)
    thin.BLOCK_M, thin.BLOCK_N, thin.WARPS, thin.STAGES, thin.PROGRAMS = chosen
    thin._records.clear()
    return [f"{shape} {ms * 1e3:.1f}" for ms, shape in sorted(found)[:best]]


if __name__ == "__main__":
    main()
