"""A large matrix product with a low-rank one summed in the same fp32 accumulator: y = round(x w + alpha a b + c), rounded once.

cuBLAS on Hopper rounds x w to bf16 before it adds an accumulated matrix (``rounds_once`` probes it: an adapter's delta below half an ulp is
lost, as in eager), so the sum is made here: a persistent kernel over output tiles, x and w tiles by the bulk tensor copy engine, and one
more short dot for the low-rank factors before the tile is rounded and stored. bench/joined.py measures it beside the library's ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .binding import Blanks
from .broken import give_up
from .direct import Descriptor, Direct
from .tracing import traced

LOW = (torch.bfloat16, torch.float16)
CHUNK = 64            # columns of the low-rank factors in one dot
FETCHED = 32          # and of factors that fit the registers beside a tile, and are fetched while the large product is summed
# one block shape for all sizes, so that only a weight's layout and dtype compile anew: the best tried on an 8B Llama's linears (H100)
BLOCK_M, BLOCK_N, BLOCK_K, GROUP, STAGES = 128, 256, 64, 16, 3
KEPT = 512                    # geometries that are remembered

Pair: TypeAlias = tuple[Tensor, Tensor]
Record: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]        # (a, b, x, w, c)
_records: dict[tuple[Any, ...], Record] = {}


@functools.cache
def rounds_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``addmm`` onto a low-precision matrix adds it in fp32 and rounds the sum once.

    257 + 0.9375 is 257.9375, which bf16 rounds to 258; 257 rounded first is 256, and 256.9375 rounds to 256 (fp16: 2049 and 2050, 2048).
    """
    if device.type == "meta" or dtype not in LOW:
        return True
    whole = 257.0 if dtype is torch.bfloat16 else 2049.0
    n = 256
    with torch.utils._python_dispatch._disable_current_modes():
        x = torch.zeros(n, n, dtype=dtype, device=device)
        w = torch.zeros(n, n, dtype=dtype, device=device)
        x[:, 0], w[0, :] = (16.0, 16.0) if dtype is torch.bfloat16 else (32.0, 64.0)
        x[:, 1], w[1, :] = 1.0, 1.0
        c = torch.full((n, n), 0.9375, dtype=dtype, device=device)
        return bool((c.addmm_(x, w) > whole).all())


def joined(a: Tensor, b: Tensor, alpha: float, x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
    """x w + alpha a b + c for x [m, k], w [k, n], a [m, r], b [r, n], c [n] or None of one dtype, rounded once to it (fp32 and fp64 as
    torch does).

    Where ``takes_wide``, a and b may be fp32 beside low-precision x, w and c.
    """
    if traced(x):
        return torch.ops.sloth.joined(a, b, alpha, x, w, c)
    if not x.is_cuda:
        return _record(a, b, alpha, x, w, c)(a, b, x, w, c)
    key = (
        x.device, alpha, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype, a.shape, a.stride(), a.dtype,
        b.shape, b.stride(), b.dtype, None if c is None else c.stride(),
    )  # fmt: skip
    record = _records.get(key)
    if record is None:
        record = _records[key] = _record(a, b, alpha, x, w, c)
        if len(_records) > KEPT:
            _records.pop(next(iter(_records)))
    return record(a, b, x, w, c)


_library = torch.library.Library("sloth", "FRAGMENT")
_library.define("joined(Tensor a, Tensor b, float alpha, Tensor x, Tensor w, Tensor? c) -> Tensor")
_library.impl("joined", joined, "CompositeExplicitAutograd")


@torch.library.register_fake("sloth::joined", lib=_library)
def _fake(a: Tensor, b: Tensor, alpha: float, x: Tensor, w: Tensor, c: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def _record(a: Tensor, b: Tensor, alpha: float, x: Tensor, w: Tensor, c: Tensor | None) -> Record:
    """How operands of these dtypes, shapes and strides are summed."""
    if x.dtype not in LOW or rounds_once(x.device, x.dtype):
        return lambda a, b, x, w, c: _onto(a, b, alpha, x, w, c)
    if not fits(x, w) or (c is not None and c.stride(0) != 1):
        return lambda a, b, x, w, c: _wide(a, b, alpha, x, w, c)
    (m, k), n, r = x.shape, w.shape[1], a.shape[1]
    run = Tiles("joined", [(x, w)], a, b, [alpha, m, n, k, r], NK=lies_nk(w), BIAS=c is not None)

    def record(a: Tensor, b: Tensor, x: Tensor, w: Tensor, c: Tensor | None) -> Tensor:
        y = run(((x, w),), a, b, b if c is None else c)
        return _wide(a, b, alpha, x, w, c) if y is None else y

    return record


def _onto(a: Tensor, b: Tensor, alpha: float, x: Tensor, w: Tensor, c: Tensor | None) -> Tensor:
    """The small term first, rounded relative to itself; beside a c in low precision it would be rounded relative to that."""
    if c is not None and x.dtype in LOW:
        return (torch.addmm(c.float(), x.float(), w.float()) + torch.mm(a.float(), b.float()).mul_(alpha)).to(x.dtype)
    if c is not None:
        return torch.addmm(c, a, b, alpha=alpha).addmm_(x, w)
    y = torch.mm(a, b) if alpha == 1 else a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha)
    return y.addmm_(x, w)


def takes_wide(x: Tensor, w: Tensor) -> bool:
    """Whether fp32 low-rank factors can be summed with low-precision x w here."""
    return x.is_cuda and x.dtype in LOW and not rounds_once(x.device, x.dtype)


def _wide(a: Tensor, b: Tensor, alpha: float, x: Tensor, w: Tensor, c: Tensor | None) -> Tensor:
    wide = torch.mm(x, w, out_dtype=torch.float32)
    if c is not None:
        wide.add_(c)
    if a.dtype is torch.float32:
        return wide.addmm_(a, b, alpha=alpha).to(x.dtype)
    return torch.addmm(wide, a, b, alpha=alpha, out_dtype=torch.float32).to(x.dtype)


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether the device has the bulk tensor copy engine and Triton its descriptors."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:
        return False
    return True


def fits(x: Tensor, w: Tensor) -> bool:
    """What the copy engine asks of shapes and strides: 16-byte rows, one dimension without gaps."""
    if not _hopper(x.device) or x.stride(1) != 1 or 1 not in w.stride():
        return False
    rows = w.stride(1) if w.stride(0) == 1 else w.stride(0)
    return x.stride(0) % 8 == 0 and rows % 8 == 0 and w.shape[1] % 8 == 0 and x.shape[1] % 8 == 0 < x.shape[1]


_broken: set[tuple[Any, ...]] = set()     # (device, kernel, dtypes of the low-rank factors)


class Tiles:
    """A kernel of joined_kernel.py over the output tiles of sum of x w + a b, for operands of these dtypes, shapes and strides.

    ``(pairs, a, b, *more)`` gives the result, ``more`` what the kernel takes besides; None where addresses do not suit the copy engine, or
    where the kernel cannot be built for the device and the factors' dtypes, which is remembered.
    """

    def __init__(
        self, name: str, pairs: Sequence[Pair], a: Tensor, b: Tensor, numbers: Sequence[float], **constants: Any
    ) -> None:
        x, w = pairs[0]
        m, n, r = x.shape[0], w.shape[1], a.shape[1]
        rank = min(CHUNK, max(16, 1 << (r - 1).bit_length()))             # columns of a in one dot
        self.kind, self.empty = (x.device, name, a.dtype, b.dtype), m * n == 0
        self.blank = Blanks([torch.empty(m, n, dtype=x.dtype, device=x.device)], [False])
        descriptors = [d for pair in pairs for d in _described(*pair)]
        descriptors.append(((m, n), (n, 1), [BLOCK_M, BLOCK_N // 2]))
        processors = _processors(x.device)
        options = dict(
            **constants, ONCE=r <= rank <= FETCHED, RANK=rank, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            GROUP=GROUP, PROGRAMS=processors, num_stages=STAGES, num_warps=8,
        )  # fmt: skip
        grid = (min(-(-m // BLOCK_M) * -(-n // BLOCK_N), processors),)
        self.run = Direct(_kernel(name), grid, [*numbers, *a.stride(), *b.stride()], options, x.device, descriptors)

    def __call__(self, pairs: Sequence[Pair], a: Tensor, b: Tensor, *more: Tensor) -> Tensor | None:
        operands = [t for pair in pairs for t in pair]
        if self.kind in _broken or any(t.data_ptr() % 16 for t in operands):
            return None
        (y,) = self.blank()
        if self.empty:
            return y
        try:
            self.run((*operands, y, a, b, *more))
        except Exception as error:
            give_up(_broken, self.kind, self.kind[0], "sums products", error)
            return None
        return y


def _described(x: Tensor, w: Tensor) -> list[Descriptor]:
    weight = w.t() if lies_nk(w) else w
    return [
        (tuple(x.shape), x.stride(), [BLOCK_M, BLOCK_K]),
        (tuple(weight.shape), weight.stride(), [BLOCK_N, BLOCK_K] if lies_nk(w) else [BLOCK_K, BLOCK_N]),
    ]


def lies_nk(w: Tensor) -> bool:
    """Whether w [k, n] lies in memory as [n, k]."""
    return w.stride(0) == 1 and (w.stride(1) != 1 or w.shape[0] == 1)


@functools.cache
def _kernel(name: str) -> Any:
    from . import joined_kernel

    return getattr(joined_kernel, name)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
