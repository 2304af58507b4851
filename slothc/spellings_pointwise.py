"""Spellings of pointwise functions, casts and things that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from slothc.patterns.meaning import Op

from .spellings_call import Call, Decline, Row, is_number, node_of, operand, same_kind


def _unary(fn: str) -> Callable[[Call], Op]:
    return lambda call: Op("pointwise", (node_of(call["x"]),), {"fn": fn})


def _binary(fn: str, neutral: float | None = None, commutes: bool = False) -> Callable[[Call], Op]:
    def make(call: Call) -> Op:
        alpha = call.bound.get("alpha", 1)
        if not is_number(alpha):
            raise Decline("alpha is a node")
        if call.bound.get("rounding_mode") is not None:
            raise Decline(f"rounding_mode={call['rounding_mode']}")
        left, right = operand(call["x"]), operand(call["other"])
        if alpha != 1:
            return Op("pointwise", (left, right, alpha), {"fn": f"{fn}_scaled"})
        if neutral is not None and _does_nothing(call, left, right, neutral):
            return Op("identity", (left,))
        if neutral is not None and commutes and _does_nothing(call, right, left, neutral):
            return Op("identity", (right,))
        return Op("pointwise", (left, right), {"fn": fn})

    return make


def _does_nothing(call: Call, x: Any, number: Any, neutral: float) -> bool:
    if not (isinstance(x, fx.Node) and is_number(number, neutral)):
        return False
    value = call.example(x)
    return isinstance(value, torch.Tensor) and same_kind(value, call.out)


def _swapped(make: Callable[[Call], Op]) -> Callable[[Call], Op]:
    return lambda call: make(replace(call, bound={**call.bound, "x": call["other"], "other": call["x"]}))


def _is_bool(call: Call, item: Any) -> bool:
    value = call.example(item)
    return isinstance(item, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)


def _boolean(fn: str) -> Callable[[Call], Op]:
    def make(call: Call) -> Op:
        args = (operand(call["x"]), operand(call["other"]))
        if not all(_is_bool(call, arg) for arg in args):
            raise Decline("bitwise or logical arithmetic on integers")
        return Op("pointwise", args, {"fn": fn})

    return make


def _not(call: Call) -> Op:
    if _is_bool(call, call["x"]):
        return Op("pointwise", (node_of(call["x"]),), {"fn": "not"})
    if call.name == "logical_not":
        return Op("pointwise", (node_of(call["x"]), 0), {"fn": "eq"})
    raise Decline("bitwise not of integers")


def _square(call: Call) -> Op:
    return Op("pointwise", (node_of(call["x"]), 2), {"fn": "pow"})


def _positive(call: Call) -> Op:
    return Op("identity", (node_of(call["x"]),))


def _gelu(call: Call) -> Op:
    fn = {"none": "gelu", "tanh": "gelu_tanh"}.get(call["approximate"])
    if fn is None:
        raise Decline(f"approximate={call['approximate']}")
    return Op("pointwise", (node_of(call["x"]),), {"fn": fn})


def _plain(fn: str, **usual: float) -> Callable[[Call], Op]:
    """A function whose shape parameters have their usual values."""

    def make(call: Call) -> Op:
        for name, number in usual.items():
            if not is_number(call[name], number):
                raise Decline(f"{name}={call[name]}")
        return Op("pointwise", (node_of(call["x"]),), {"fn": fn})

    return make


def _leaky_relu(call: Call) -> Op:
    if not is_number(call["negative_slope"]):
        raise Decline("negative_slope is not a number")
    return Op("pointwise", (node_of(call["x"]), call["negative_slope"]), {"fn": "leaky_relu"})


def _clamp(call: Call) -> Op:
    x, low, high = node_of(call["x"]), call["min"], call["max"]
    if all(bound is None or is_number(bound) for bound in (low, high)):
        return Op("pointwise", (x, low, high), {"fn": "clamp"})
    if high is None:
        return Op("pointwise", (x, operand(low)), {"fn": "maximum"})
    if low is None:
        return Op("pointwise", (x, operand(high)), {"fn": "minimum"})
    raise Decline("clamp between tensors")


def _clamp_to(low: float, high: float) -> Callable[[Call], Op]:
    return lambda call: Op("pointwise", (node_of(call["x"]), low, high), {"fn": "clamp"})


def _where(call: Call) -> Op:
    if call["x"] is None or call["other"] is None:
        raise Decline("where with one argument")
    return Op("pointwise", (node_of(call["condition"]), operand(call["x"]), operand(call["other"])), {"fn": "where"})


def _masked_fill(call: Call) -> Op:
    return Op("pointwise", (node_of(call["mask"]), operand(call["value"]), node_of(call["x"])), {"fn": "where"})


def convert(call: Call) -> Op:
    """Any conversion: what it does is read off the example values, not off its arguments."""
    x = node_of(call["x"])
    before, after = call.value(x), call.out
    if before.device != after.device:
        raise Decline(f"moves from {before.device} to {after.device}")
    if before.is_complex() != after.is_complex() or before.layout != after.layout:
        raise Decline("converts to or from complex numbers or another layout")
    if before.dtype != after.dtype:
        return Op("cast", (x,))
    copies = call.name == "_to_copy" or bool(call.bound.get("copy"))
    return Op("identity", (x,), {"clone": True} if copies else {})


def _clone(call: Call) -> Op:
    return Op("identity", (node_of(call["x"]),), {"clone": True})


def _same(call: Call) -> Op:
    return Op("identity", (node_of(call["x"]),))


def _detach(call: Call) -> Op:
    return Op("detach", (node_of(call["x"]),))


def _dropout(call: Call) -> Op:
    x, p = node_of(call["x"]), call["p"]
    if p == 0 or call["training"] is False:
        return Op("identity", (x,))
    if not is_number(p) or call["training"] is not True:
        raise Decline("dropout decided by a node")
    return Op("dropout", (x,), {"p": float(p)})


def _max_or_maximum(fn: str) -> Callable[[Call], Op]:
    """``max(x)`` reduces all, ``max(x, y)`` is pointwise, ``max(x, dim)`` is a pair."""

    def make(call: Call) -> Op:
        x, other = node_of(call["x"]), call["other"]
        if other is None and call.bound.get("dim") is None:
            rank = call.value(x).dim()
            return Op("reduce", (x,), {"fn": f"a{fn}", "dims": tuple(range(rank)), "keepdim": False})
        if isinstance(other, fx.Node) and isinstance(call.example(other), torch.Tensor):
            return Op("pointwise", (x, other), {"fn": f"{fn}imum"})
        raise Decline(f"{fn} over a dim is a pair of tensors")

    return make


_UNARY = {
    "neg": "neg negative __neg__", "exp": "exp", "log": "log", "log1p": "log1p", "expm1": "expm1", "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "reciprocal": "reciprocal", "abs": "abs absolute __abs__", "sign": "sign sgn", "tanh": "tanh F.tanh", "erf": "erf",
    "sigmoid": "sigmoid F.sigmoid expit", "sin": "sin", "cos": "cos", "floor": "floor", "logsigmoid": "logsigmoid",
}  # fmt: skip
_INPLACE_UNARY = {"silu": "silu", "relu": "relu F.relu", "mish": "mish", "hardswish": "hardswish"}
_BINARY = {
    "add": "add __add__", "sub": "sub subtract __sub__", "mul": "mul multiply __mul__",
    "div": "div divide true_divide truediv __truediv__",
    "pow": "pow __pow__",
    "maximum": "maximum", "minimum": "minimum",
    "gt": "gt greater __gt__", "ge": "ge greater_equal __ge__", "lt": "lt less __lt__",
    "le": "le less_equal __le__", "eq": "eq __eq__", "ne": "ne not_equal __ne__",
}  # fmt: skip
_NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0, "pow": 1.0}
_BOOLEAN = {
    "and": "and_ bitwise_and logical_and __and__",
    "or": "or_ bitwise_or logical_or __or__",
    "ne": "xor bitwise_xor logical_xor __xor__",
}
_CONVERT = "to type_as type _to_copy float double half bfloat16 int long short bool byte char cuda cpu"
_CONVERSION_OPTIONS = (
    "device",
    "dtype",
    "non_blocking",
    "copy",
    "memory_format",
    "other",
    "layout",
    "pin_memory",
    "tensor",
)
_REFLECTED = {
    "add": "__radd__",
    "sub": "rsub __rsub__",
    "mul": "__rmul__",
    "div": "__rtruediv__ __rdiv__",
    "pow": "__rpow__",
}


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def put(names: str, signature: str, make: Callable[[Call], Op], **defaults: Any) -> None:
        rows.update({name: Row.of(signature, make, **defaults) for name in names.split()})

    for fn, names in _UNARY.items():
        put(names, "x", _unary(fn))
    for fn, names in _INPLACE_UNARY.items():
        put(names, "x inplace", _unary(fn), inplace=False)
    for fn, names in _BINARY.items():
        make = _binary(fn, _NEUTRAL.get(fn), fn in ("add", "mul"))
        put(names, "x other", make, alpha=1, rounding_mode=None)
    for fn, names in _REFLECTED.items():
        put(names, "x other", _swapped(_binary(fn, _NEUTRAL.get(fn), fn in ("add", "mul"))), alpha=1)
    for fn, names in _BOOLEAN.items():
        put(names, "x other", _boolean(fn))
    put("invert inv not_ bitwise_not logical_not __invert__", "x", _not)
    put("square", "x", _square)
    put("pos positive", "x", _positive)
    put("gelu", "x approximate", _gelu, approximate="none")
    put("softplus", "x beta threshold", _plain("softplus", beta=1, threshold=20), beta=1, threshold=20)
    put("elu", "x alpha inplace", _plain("elu", alpha=1), alpha=1.0, inplace=False)
    put("leaky_relu", "x negative_slope inplace", _leaky_relu, negative_slope=0.01, inplace=False)
    put("clamp clip", "x min max", _clamp, min=None, max=None)
    put("clamp_min", "x min", _clamp, max=None)
    put("clamp_max", "x max", _clamp, min=None)
    put("relu6", "x inplace", _clamp_to(0.0, 6.0), inplace=False)
    put("hardtanh", "x min_val max_val inplace", _hardtanh, min_val=-1.0, max_val=1.0, inplace=False)
    put("where", "condition x other", _where, x=None, other=None)
    put(".where", "x condition other", _where)
    put("masked_fill", "x mask value", _masked_fill)
    put(_CONVERT, "x *rest", convert, **dict.fromkeys(_CONVERSION_OPTIONS))
    put("contiguous alias", "x", _same, memory_format=None)
    put("clone", "x", _clone, memory_format=None)
    put("detach _get_data_attr", "x", _detach)
    put("F.dropout", "x p training inplace", _dropout, p=0.5, training=True, inplace=False)
    put("dropout", "x p training", _dropout)
    put("max", "x other keepdim", _max_or_maximum("max"), other=None, dim=None, keepdim=False)
    put("min", "x other keepdim", _max_or_maximum("min"), other=None, dim=None, keepdim=False)
    return rows


def _hardtanh(call: Call) -> Op:
    return _clamp_to(call["min_val"], call["max_val"])(call)


POINTWISE = _rows()
