"""Spellings of functions that are several operations in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slothc.patterns.meaning import Op

from .spellings_call import Call, Decline, Row, is_number, node_of, operand

FEW = 4              # elements that a contraction adds one by one


def _three(fn: str) -> Callable[[Call], Op]:
    def make(call: Call) -> Op:
        if not is_number(call["value"]):
            raise Decline("scaled by a node")
        args = (node_of(call["x"]), node_of(call["tensor1"]), node_of(call["tensor2"]), call["value"])
        return Op("pointwise", args, {"fn": fn})

    return make


def _lerp(call: Call) -> Op:
    return Op("pointwise", (node_of(call["x"]), node_of(call["end"]), operand(call["weight"])), {"fn": "lerp"})


def _glu(call: Call) -> Op:
    x = node_of(call["x"])
    return Op("glu", (x,), {"dim": call.dim(call["dim"], call.value(x).dim())})


def _normalize(call: Call) -> Op:
    x = node_of(call["x"])
    rank = call.value(x).dim()
    if not is_number(call["p"], 2) or not is_number(call["eps"]) or call.dim(call["dim"], rank) != rank - 1:
        raise Decline("normalize of another order, or not along the last dimension")
    return Op("norm", (x, None, None), {"fn": "normalize", "eps": call["eps"], "shape": tuple(call.value(x).shape[-1:])})


def _moments(call: Call) -> Op:
    """A pair of reductions: the spread, and the mean."""
    x, correction = node_of(call["x"]), call["correction"]
    if call["unbiased"] is not None:
        correction = int(call["unbiased"])
    if not is_number(correction) or isinstance(call["dim"], bool):
        raise Decline("correction is not a number")
    common = {"dims": call.dims(call["dim"], call.value(x).dim()), "keepdim": bool(call["keepdim"])}
    spread = {"fn": call.name.removesuffix("_mean"), "correction": correction, **common}
    return Op("moments", (x,), {"items": (spread, {"fn": "mean", **common})})


def _roll(call: Call) -> Op:
    x, shifts = node_of(call["x"]), _only(call["shifts"])
    dims = call["dim"]
    if dims is None or dims == () or not isinstance(shifts, int):
        raise Decline("rolled over all dimensions, or by a node")
    dim = call.dim(_only(dims), call.value(x).dim())
    if not isinstance(call.value(x).shape[dim], int):
        raise Decline("rolled along a dimension whose size is known only at run time")
    return Op("roll", (x,), {"dim": dim, "shift": shifts})


def _only(items: Any) -> Any:
    if not isinstance(items, tuple | list):
        return items
    if len(items) != 1:
        raise Decline("rolled over several dimensions")
    return items[0]


def _einsum(call: Call) -> Op:
    """A product of elements, summed over at most one letter: along a row that one operand holds, or over few elements
    where one operand holds all but few of what is asked for.

    What is left is a matrix product of its own shape, and opaque.
    """
    tensors, text = tuple(node_of(t) for t in call["tensors"]), call["equation"]
    terms, out = _terms(text, len(tensors))
    sizes = {letter: size for t, term in zip(tensors, terms) for letter, size in zip(term, call.value(t).shape)}
    summed = sorted(set(sizes) - set(out))
    if len(summed) > 1 or not set(out) <= set(sizes):
        raise Decline("a contraction of several letters")
    small = {s for s, n in sizes.items() if isinstance(n, int) and n <= FEW}
    few = set(summed) <= small
    if summed and not any({*out, *summed} - set(term) <= (small if few else set()) for term in terms):
        raise Decline("a matrix product")
    params = {"terms": terms, "out": out, "summed": "".join(summed), "count": sizes[summed[0]] if summed and few else 0}
    return Op("einsum", tensors, params)


def _terms(text: Any, count: int) -> tuple[tuple[str, ...], str]:
    """The letters of every operand and of the result, each letter once."""
    if not isinstance(text, str) or "->" not in text or "." in text:
        raise Decline("an equation with dots, or without a result")
    left, out = text.replace(" ", "").split("->")
    terms = tuple(left.split(","))
    if len(terms) != count or any(len(set(t)) != len(t) for t in (*terms, out)):
        raise Decline("a diagonal")
    return terms, out


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def put(names: str, signature: str, make: Callable[[Call], Op], **defaults: Any) -> None:
        rows.update({name: Row.of(signature, make, **defaults) for name in names.split()})

    put("addcmul", "x tensor1 tensor2", _three("addcmul"), value=1)
    put("addcdiv", "x tensor1 tensor2", _three("addcdiv"), value=1)
    put("lerp", "x end weight", _lerp)
    put("glu F.glu", "x dim", _glu, dim=-1)
    put("F.normalize", "x p dim eps", _normalize, p=2.0, dim=1, eps=1e-12)
    put("var_mean std_mean", "x dim unbiased keepdim", _moments, dim=None, unbiased=None, keepdim=False, correction=1)
    put("roll", "x shifts dim", _roll, dim=None)
    put("einsum", "equation *tensors", _einsum)
    return rows


COMPOSITE = _rows()
