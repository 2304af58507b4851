"""Products with a thin matrix, r columns or rows beside thousands: what an adapter costs beside its base.

    across:  x a  for a [k, r],           along:  u' x  for u [m, r],
    both:    u_i = s_i g_i b_i  and  d_i = s_i g_i' t_i,  each g_i read once.

Reading the large matrix is all the time that they take. Here a program reads a block of its rows and some of its columns and leaves what
they are of the results, and one more launch adds these parts in fp32 and rounds once; the library would read g twice, sum in parts in
launches of its own, and round in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .broken import give_up
from .devices import available, dependent, memory, processors
from .direct import Direct
from .products import LOW, product
from .triton_pieces import power_of_two

MOST = 3                      # matrices in one launch
WIDEST = 64                   # columns of a thin matrix
NARROW = 32                   # and of those that meet a gradient twice: the parts of d are a quarter of it then, in bytes
BLOCK_M, BLOCK_N, STAGES, WARPS = 256, 64, 4, 4
PROGRAMS = 1                  # for each multiprocessor: more would not fit its shared memory, and leave more parts
SPAN = 512                    # columns summed by a matrix unit beside fp32 factors: its running sum is cut short of fp32's rounding
BLOCK, PARTS = 256, 8         # of the sum of parts
KEPT = 512

_records: dict[tuple[Any, ...], _Record | None] = {}
_broken: set[tuple[Any, ...]] = set()     # (device, which product, dtype of the thin matrices)


def both(gs: Sequence[Tensor], bs: Sequence[Tensor], t: Tensor, scales: Sequence[float]) -> tuple[Tensor, Sequence[Tensor]]:
    """[s_1 g_1 b_1 ..] [m, sum r_i] and the s_i g_i' t_i [n_i, r_i] for g_i [m, n_i], b_i [n_i, r_i], t [m, sum r_i], each rounded once.

    The g_i are of one dtype; bs and t of it too, or in fp32 and then the results are.
    """
    found = _launched(("both", *scales), gs, bs, t)
    if found is None:
        return _both(gs, bs, t, scales)
    u, d = found
    return u, d.split([g.shape[1] for g in gs])


def across(x: Tensor, a: Tensor) -> Tensor:
    """x a for x [m, k], a [k, r], of a's dtype. The library is as fast where they are of one dtype."""
    found = None if a.dtype is x.dtype else _launched(("across", 1.0), [x], [a], None)
    return product(x, a) if found is None else found[0]


def along(u: Tensor, x: Tensor) -> Tensor:
    """u' x for u [m, r], x [m, k], of u's dtype: a sum over tokens."""
    found = None if u.dtype is x.dtype else _launched(("along", 1.0), [x], [], u, turned=True)
    return product(u.t(), x, long=True) if found is None else found[1]


def has_kernel(large: Sequence[Tensor], right: Sequence[Tensor], left: Tensor | None) -> bool:
    """Whether the kernels take these: [m, n_i] of one low-precision dtype with gapless rows, thin ones of it or in fp32, right ones of
    one rank.
    """
    first, thin = large[0], [*right, *([] if left is None else [left])]
    if first.dtype not in LOW or not _runs(first.device) or len(large) > MOST or first.shape[0] == 0:
        return False
    if any(x.dtype is not first.dtype or x.stride(1) != 1 or x.shape[1] == 0 for x in large):
        return False
    if len({b.shape[1] for b in right}) > 1 or len({t.dtype for t in thin}) > 1:
        return False
    return thin[0].dtype in (first.dtype, torch.float32) and thin[0].shape[1] <= (NARROW if len(thin) > 1 else WIDEST)


@cache
def _runs(device: torch.device) -> bool:
    """Whether there is Triton and, on NVIDIA's devices, matrix units for all low-precision dtypes."""
    old = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8
    return available(device) and not old


def _both(gs: Sequence[Tensor], bs: Sequence[Tensor], t: Tensor, scales: Sequence[float]) -> tuple[Tensor, Sequence[Tensor]]:
    """The same by the library's products."""
    ranks = [b.shape[1] for b in bs]
    if bs[0].dtype is gs[0].dtype and all(r % 8 == 0 for r in ranks):      # cuBLAS rounds twice into columns at odd addresses (H100)
        u = t.new_empty(t.shape)
        for into, g, b, s in zip(u.split(ranks, 1), gs, bs, scales):
            into.addmm_(g, b, beta=0, alpha=s)
    else:
        u = torch.cat([product(g, b, s) for g, b, s in zip(gs, bs, scales)], 1)
    return u, [product(g.t(), own, s, long=True) for g, own, s in zip(gs, t.split(ranks, 1), scales)]


def _launched(
    what: tuple[Any, ...], large: Sequence[Tensor], right: Sequence[Tensor], left: Tensor | None, turned: bool = False
) -> list[Any] | None:
    """[large right or None, large' left or None]; None where there is no kernel for them, or where it cannot be built for the device,
    which is remembered.
    """
    tensors = (*large, *right, *(() if left is None else (left,)))
    key = (*what, large[0].device, *((t.shape, t.stride(), t.dtype) for t in tensors))
    kind = (large[0].device, what[0], tensors[-1].dtype)
    if kind in _broken:
        return None
    try:
        if key not in _records:
            if len(_records) > KEPT:
                _records.clear()
            _records[key] = _Record(large, right, left, what[1:], turned) if has_kernel(large, right, left) else None
        record = _records[key]
        return None if record is None else record(large, right, left)
    except Exception as error:
        give_up(_broken, kind, kind[0], "makes an adapter's products", error)
        return None


class _Record:
    """The two launches for operands of these dtypes, shapes and strides: (large, right, left) -> [across or None, down or None]."""

    def __init__(
        self, large: Sequence[Tensor], right: Sequence[Tensor], left: Tensor | None, scales: Sequence[float], turned: bool
    ) -> None:  # fmt: skip
        x, thin = large[0], right[0] if right else left
        assert thin is not None
        self.device, self.count, wide = x.device, len(large), thin.dtype is torch.float32
        m, r, sizes = x.shape[0], thin.shape[1], [g.shape[1] for g in large]
        rank = max(16, power_of_two(r))
        block_m = max(16, min(BLOCK_M if rank < WIDEST else BLOCK_M // 2, power_of_two(m)))
        blocks = -(-m // block_m)
        chunk = _chunk(sum(sizes) * blocks, processors(x.device), SPAN if wide else None)
        pieces = [-(-n // chunk) for n in sizes]
        self.parts = (sum(pieces) * m * r if right else 0, blocks * sum(sizes) * r if left is not None else 0)
        self.shapes = ((m, r * self.count), (r, sizes[0]) if turned else (sum(sizes), r))
        self.dtype, three = thin.dtype, lambda v: [*v, *[0] * (MOST - len(v))]
        strides = [*three([g.stride(0) for g in large]), *three([b.stride(0) for b in right])]
        strides += [right[0].stride(1) if right else 0, 0 if left is None else left.stride(0), *((1, sizes[0]) if turned else (r, 1))]
        numbers = [m, *three(sizes), *[*pieces, 0][:2], chunk, r, *strides]
        options = dict(COUNT=self.count, ACROSS=bool(right), DOWN=left is not None, RANK=rank, BLOCK_M=block_m, BLOCK_N=BLOCK_N,
                       STAGES=_stages(x.device, 2 * block_m * BLOCK_N), num_warps=WARPS)  # fmt: skip
        self.read = Direct(_kernel("thin"), (blocks, sum(pieces)), numbers, options, x.device)
        first = -(-m * r // BLOCK) if right else 0                         # programs for each u_i
        last = -(-sum(sizes) * r // BLOCK) if left is not None else 0
        numbers = [*three([float(s) for s in scales]), m, *three(sizes), *three(pieces), blocks, r, max(first, 1)]
        options = dict(COUNT=self.count if right else 0, TURNED=turned, BLOCK=BLOCK, PARTS=PARTS, **dependent(x.device), num_warps=4)
        self.sum = Direct(_kernel("add"), (self.count * first + last,), numbers, options, x.device)

    def __call__(self, large: Sequence[Tensor], right: Sequence[Tensor], left: Tensor | None) -> list[Any]:
        parts = [torch.empty(n, dtype=torch.float32, device=self.device) for n in self.parts]
        found = [torch.empty(s if n else 0, dtype=self.dtype, device=self.device) for s, n in zip(self.shapes, self.parts)]
        fill = [large[0]] * (MOST - self.count)
        factors = [*right, *[right[0]] * (MOST - self.count)] if right else [large[0]] * MOST
        self.read((*large, *fill, *factors, large[0] if left is None else left, *parts))
        self.sum((*parts, *found))
        return found


def _stages(device: torch.device, tile: int) -> int:
    """Tiles of so many bytes on their way at once: what fits the shared memory, with two fifths more for what is beside them."""
    return next((n for n in range(STAGES, 1, -1) if 7 * n * tile <= 5 * memory(device)), 1)


def _chunk(work: int, processors: int, most: int | None) -> int:
    """Columns of a program: as many as give every multiprocessor PROGRAMS programs, in whole tiles, and enough to pay for the parts."""
    least = -(-work // (PROGRAMS * processors))
    chunk = max(4 * BLOCK_N, -(-least // BLOCK_N) * BLOCK_N)
    return chunk if most is None else min(chunk, most)


@cache
def _kernel(name: str) -> Callable[..., Any]:
    from . import thin_kernel

    return getattr(thin_kernel, name)
