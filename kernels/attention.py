"""Attention by the best library kernel: say what the mask is where SDPA has a word for it, and hand over the mask
where it has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .sdpa import scaled_dot_product_attention

BLOCK = 1 << 24  # elements compared at a time: the comparison never holds a second mask
MASKED = -1e30  # an additive mask of this or less is exactly zero after the softmax of any row that has a finite score

Steps = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Kind:
    """What a mask is: ``name`` is none, causal, sliding_window or other; a window sees ``window`` keys, its own
    included.

    ``shared``: the mask is the same for every element of the batch.
    """

    name: str
    window: int | None = None
    shared: bool = False

    @property
    def plain(self) -> bool:
        """True when SDPA needs no mask tensor."""
        return self.name in ("none", "causal")


@torch.no_grad()
def classify(mask: torch.Tensor, q_len: int, kv_len: int) -> Kind:
    """What ``mask`` (bool: may attend; floating point: added to the scores) is for queries 0..q_len-1 and keys
    0..kv_len-1.

    The mask broadcasts to [..., q_len, kv_len]. The comparison is exact and element by element; on a GPU it waits for
    the device once. ``causal`` (key j <= query i) and ``sliding_window`` (i - window < j <= i) are said of square
    masks only.
    """
    while mask.dim() < 2:
        mask = mask.unsqueeze(0)
    mask = mask.expand(*mask.shape[:-2], q_len, kv_len)
    if mask.numel() == 0:
        return Kind("none")
    shared = _same_batch(mask)
    if q_len != kv_len:
        everything, same = torch.stack((_everything(mask), shared)).tolist()
        return Kind("none" if everything else "other", shared=same)
    window = _open(mask[..., -1, :]).reshape(-1, kv_len)[0].sum()
    everything, windowed, same, seen = torch.stack(
        [flag.to(torch.int64) for flag in (_everything(mask), _windowed(mask, window), shared, window)]
    ).tolist()
    if everything:
        return Kind("none", shared=True)
    if windowed and seen:
        return Kind("causal", shared=True) if seen >= kv_len else Kind("sliding_window", seen, True)
    return Kind("other", shared=bool(same))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    kind: Kind,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(scale * q k^T + mask) v for q [batch, head, q_len, dim], k and v [batch, head or fewer, kv_len, dim].

    ``mask`` is read only where ``kind`` is not none or causal. With ``enable_gqa``, query head h reads key head h //
    n; keys and values are repeated in memory only where no fused kernel takes them as they are. Gradients, dropout
    and autocast are SDPA's.
    """
    causal = kind.name == "causal"
    mask = None if kind.plain else mask
    if enable_gqa and not _fused(*_autocast(q, k, v), mask, dropout_p, causal, scale):
        n = q.shape[1] // k.shape[1]
        k, v, enable_gqa = repeat_heads(k, n), repeat_heads(v, n), False
    return scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=enable_gqa)


def additive(steps: Steps, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """One additive mask out of the steps that a model takes from its scores to its softmax, the first one first."""
    total = torch.zeros((), dtype=dtype, device=parts[0].device)
    return masked(total, steps, parts)


def blind(mask: torch.Tensor) -> torch.Tensor:
    """Whether an additive mask has a row in which every key is shut (a bool without dimensions).

    There log(sum_j exp(s_j)) = s + log n rounds to s, from which a fused kernel's backward finds weights of 1, not of 1/n.
    """
    return (mask <= MASKED).all(-1).any()


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, steps: Steps, parts: Sequence[torch.Tensor], scale: float
) -> torch.Tensor:
    """softmax(steps(scale * q k^T)) v as it stands, softmax in fp32 at least: for masks with blind rows."""
    if k.shape[1] != q.shape[1]:
        k, v = (repeat_heads(t, q.shape[1] // t.shape[1]) for t in (k, v))
    scores = masked(q @ k.transpose(-2, -1) * scale, steps, parts)
    return torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v


def masked(scores: torch.Tensor, steps: Steps, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``add``: the part is added. ``keep``: a number stands where the part is false; ``drop``: where it is true."""
    for (kind, value), part in zip(steps, parts, strict=True):
        if kind == "add":
            scores = scores + part
        else:
            number = value if value == float("-inf") else max(value, torch.finfo(scores.dtype).min)
            scores = torch.where(part if kind == "keep" else ~part, scores, number)
    return scores


def repeat_heads(x: torch.Tensor, n: int) -> torch.Tensor:
    """[batch, head, length, dim] -> [batch, head * n, length, dim], each head n times in a row."""
    return x[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2)


def _open(mask: torch.Tensor) -> torch.Tensor:
    """True where ``mask`` lets a query see a key and adds nothing."""
    return mask if mask.dtype == torch.bool else mask == 0


def _shut(mask: torch.Tensor) -> torch.Tensor:
    return ~mask if mask.dtype == torch.bool else mask <= MASKED


def _everything(mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([_open(rows).all() for rows, _ in _blocks(mask)]).all()


def _same_batch(mask: torch.Tensor) -> torch.Tensor:
    """Whether all slices along the first of at least three dimensions are equal."""
    if mask.dim() < 3 or mask.shape[0] == 1 or mask.stride(0) == 0:
        return torch.ones((), dtype=torch.bool, device=mask.device)
    return torch.stack([(rows == rows[:1]).all() for rows, _ in _blocks(mask)]).all()


def _windowed(mask: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Whether the mask is open exactly where i - window < j <= i."""
    key = torch.arange(mask.shape[-1], device=mask.device)
    flags = []
    for rows, first in _blocks(mask):
        query = torch.arange(first, first + rows.shape[-2], device=mask.device)[:, None]
        seen = (key <= query) & (key > query - window)
        flags.append(torch.where(seen, _open(rows), _shut(rows)).all())
    return torch.stack(flags).all()


def _blocks(mask: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """The mask's rows in pieces of at most BLOCK elements (or one row), each with its first row's number."""
    step = max(1, BLOCK // max(1, mask.numel() // mask.shape[-2]))
    return [(mask[..., i : i + step, :], i) for i in range(0, mask.shape[-2], step)]


def _autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The casts that SDPA makes under autocast, so that the choice of a kernel sees the dtypes it will run on."""
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))
    return q, k, v


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    causal: bool,
    scale: float | None,
) -> bool:
    """Whether SDPA runs a fused kernel on grouped heads as they are; its unfused path (0) builds all the scores."""
    summed_low = q.dtype in (torch.bfloat16, torch.float16) and (k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and summed_low:
        return False  # there the gradients of a group are summed in bf16: 1.19 times the error of repeated heads
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None or (mask is not None and mask.dtype not in (torch.bool, q.dtype)):
        return False
    return bool(choose(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=True))
