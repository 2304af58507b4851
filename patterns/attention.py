"""Scaled dot-product attention whose mask and repeated heads need not be built.

    out[b,h,i,:] = sum_j softmax_j(scale * q[b,h,i,:].k[b,h//n,j,:] + mask[b,h,i,j]) v[b,h//n,j,:]

A library kernel that knows the mask is causal skips half the work and reads no mask; one that knows n reads each key
head once. What the mask is follows from what its nodes compute (see ``mask``), whether heads repeat from where the
elements come from (see ``heads``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx

from . import heads, mask, scores
from .meaning import View
from .rule import Match, Miss, Sample, StructuralRule

MATH = "out[b,h,i,d] = sum_j softmax_j(scale * sum_e q[b,h,i,e] k[b,h//n,j,e] + mask[b,h,i,j]) v[b,h//n,j,d]"


def recognise(view: View, node: fx.Node) -> Match | Miss | None:
    """A call of ``scaled_dot_product_attention``, or what it does written out (see ``scores``).

    ``inputs``: q, k, v (before their heads are repeated), mask (a node or None), sizes and data (tuples of nodes:
    what the mask is computed from). ``attrs``: cone (``mask.Cone``, or None where the mask is used as it stands),
    kept (why it is), dropout_p, is_causal, scale, enable_gqa (as the model wrote it), repeats (n, or 1), k_swapped,
    v_swapped (the source is [batch, length, head, dim]), steps (of a mask that is written out: (kind, value) for each
    node of ``masks``, or None), k_turned (k is [batch, head, dim, length]), library (whether SDPA can say it). Where it cannot, ``inputs``
    has sinks too (a node [1, head, 1, 1] or None), and ``attrs`` chain (text of a ``Chain``: the product's way to the mask), dtype (of
    the products) and out_swapped (the result is next laid out as [batch, length, head, dim]).
    """
    op = view.op(node)
    if op.kind != "sdpa":
        return _written_out(view, node)
    facts = cast(mask.Facts, view)
    q, k, v = op.args[:3]
    params = dict(op.params)
    given = params.get("attn_mask")
    if given is not None and params.get("is_causal"):
        return Miss("attention", node, "attn_mask and is_causal are both given")
    if not isinstance(params.get("dropout_p", 0.0), (int, float)):
        return Miss("attention", node, "dropout_p is not a number")
    cone = None if given is None else mask.find(facts, given)
    k_heads, v_heads = _repeats(facts, q, k, v) if not params.get("enable_gqa") else (None, None)
    inputs = {
        "q": q,
        "k": k if k_heads is None else k_heads.source,
        "v": v if v_heads is None else v_heads.source,
        "mask": given,
        "masks": () if given is None else (given,),
        "sizes": cone.sizes if isinstance(cone, mask.Cone) else (),
        "data": cone.data if isinstance(cone, mask.Cone) else (),
    }
    return Match("attention", node, _unneeded(node, k_heads, v_heads), inputs, _attrs(params, cone, k_heads, v_heads))


def _written_out(view: View, node: fx.Node) -> Match | Miss | None:
    facts = cast(mask.Facts, view)
    found = scores.written(facts, node)
    if not isinstance(found, scores.Scores):
        return found
    only = found.parts[0] if len(found.parts) == 1 else None
    cone = None if only is None else mask.find(facts, only.node)
    if isinstance(cone, mask.Cone) and only is not None:
        cone = replace(cone, inverted=only.kind == "drop")
    k_heads, v_heads = (None, None) if found.turned else _repeats(facts, found.q, found.k, found.v)
    inputs = {
        "q": found.q,
        "k": found.k if k_heads is None else k_heads.source,
        "v": found.v if v_heads is None else v_heads.source,
        "mask": None if only is None else only.node,
        "masks": tuple(p.node for p in found.parts),
        "sizes": cone.sizes if isinstance(cone, mask.Cone) else (),
        "data": cone.data if isinstance(cone, mask.Cone) else (),
    }
    attrs = _attrs({"scale": found.scale}, cone, k_heads, v_heads)
    attrs |= {"steps": tuple((p.kind, p.value) for p in found.parts), "k_turned": found.turned, "library": found.library}
    if not found.library:
        turns = [view.op(user) for user in view.users(node)]
        swapped = all(op.kind == "permute" and op.params["dims"] == (0, 2, 1, 3) for op in turns)
        inputs["sinks"] = found.sinks
        attrs |= {"chain": found.chain, "dtype": found.dtype, "out_swapped": swapped}
    return Match("attention", node, (*_unneeded(node, k_heads, v_heads), *found.nodes), inputs, attrs)


def _attrs(params: dict[str, Any], cone: mask.Cone | str | None, k_heads: Any, v_heads: Any) -> dict[str, Any]:
    return {
        "cone": cone if isinstance(cone, mask.Cone) else None,
        "kept": cone if isinstance(cone, str) else None,
        "dropout_p": params.get("dropout_p", 0.0),
        "is_causal": bool(params.get("is_causal")),
        "scale": params.get("scale"),
        "enable_gqa": bool(params.get("enable_gqa")),
        "repeats": 1 if k_heads is None else k_heads.n,
        "k_swapped": bool(k_heads and k_heads.swapped),
        "v_swapped": bool(v_heads and v_heads.swapped),
        "steps": None,
        "k_turned": False,
        "library": True,
    }


def _repeats(view: mask.Facts, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[Any, Any]:
    """How k's and v's heads repeat, where both do by the same n and q has as many as they then have; else (None,
    None).
    """
    if any(view.value(t).dim() != 4 for t in (q, k, v)):
        return None, None
    k_heads, v_heads = heads.repeated(view, k), heads.repeated(view, v)
    same = k_heads is not None and v_heads is not None and k_heads.n == v_heads.n
    if not same or view.value(q).shape[1] != view.value(k).shape[1]:
        return None, None
    return k_heads, v_heads


def _unneeded(node: fx.Node, *repeats: heads.Repeat | None) -> tuple[fx.Node, ...]:
    """``node`` and the layout nodes that nothing else reads."""
    dead = {node: None}
    for repeat in repeats:
        for layout in repeat.nodes if repeat is not None else ():
            if all(user in dead for user in layout.users):
                dead[layout] = None
    return tuple(dead)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    batch, groups, length, dim = k.shape
    shape = (batch, groups, q.shape[1] // groups, length, dim)
    k, v = (t[:, :, None].expand(shape).reshape(batch, -1, length, dim) for t in (k, v))
    i = torch.arange(length, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[None, :] <= i[:, None])[None, None])


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    distance = i[:, None] - i[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 3))


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    allowed = (i[None, :] <= i[:, None])[None, None] & flags.bool()[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def _heads(q_heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    sizes = (q_heads, kv_heads, kv_heads)
    return tuple(torch.randn(2, n, 6, 8, dtype=torch.float64, generator=draw).requires_grad_() for n in sizes)


def _with_flags() -> tuple[torch.Tensor, ...]:
    return (*_heads(2, 2), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))


RULE = StructuralRule(
    "attention",
    MATH,
    recognise,
    (
        Sample("causal flag", _plain, lambda: _heads(2, 2)),
        Sample("causal mask, repeated heads", _grouped, lambda: _heads(4, 2)),
        Sample("sliding window", _windowed, lambda: _heads(2, 2)),
        Sample("right padding", _padded, _with_flags),
    ),
)
