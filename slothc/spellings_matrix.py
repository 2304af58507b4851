"""Spellings of reductions, norms, softmax, matrix products, attention and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from slothc.patterns.meaning import Op

from .spellings_call import Call, Decline, Row, is_number, node_of


def _reduce(fn: str) -> Callable[[Call], Op]:
    def make(call: Call) -> Op:
        x = node_of(call["x"])
        params = {"fn": fn, "dims": call.dims(call["dim"], call.value(x).dim()), "keepdim": bool(call["keepdim"])}
        if call.bound.get("dtype") is not None:
            params["dtype"] = call["dtype"]
        return Op("reduce", (x,), params)

    return make


def _spread(fn: str) -> Callable[[Call], Op]:
    """var and std: ``unbiased`` (a bool, possibly where ``dim`` stands) or ``correction``."""

    def make(call: Call) -> Op:
        dim, correction = call["dim"], call["correction"]
        if isinstance(dim, bool):
            correction, dim = int(dim), None
        elif call["unbiased"] is not None:
            correction = int(call["unbiased"])
        if not is_number(correction):
            raise Decline("correction is not a number")
        x = node_of(call["x"])
        dims = call.dims(dim, call.value(x).dim())
        return Op("reduce", (x,), {"fn": fn, "dims": dims, "keepdim": bool(call["keepdim"]), "correction": correction})

    return make


def _norm(call: Call) -> Op:
    """The 2-norm: ``p`` is 2, "fro" or None. ``linalg.norm`` with ord=2 over two dims is the spectral norm."""
    x, p = node_of(call["x"]), call["p"]
    dims = call.dims(call["dim"], call.value(x).dim())
    spectral = call.name == "linalg.norm" and p is not None and len(dims) == 2 and p != "fro"
    if p not in (2, "fro", None) or spectral:
        raise Decline(f"norm of order {p}")
    params = {"fn": "norm", "dims": dims, "keepdim": bool(call["keepdim"])}
    return Op("reduce", (x,), params if call["dtype"] is None else {**params, "dtype": call["dtype"]})


def _normalised(fn: str) -> Callable[[Call], Op]:
    def make(call: Call) -> Op:
        shape = call["sizes"]
        shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
        args = (node_of(call["x"]), call["weight"], call.bound.get("bias"))
        if not all(arg is None or isinstance(arg, fx.Node) for arg in args) or not all(is_number(n) for n in shape):
            raise Decline("the weight, the bias or the normalised shape is not one")
        return Op("norm", args, {"fn": fn, "eps": call["eps"], "shape": shape})

    return make


def _softmax(fn: str) -> Callable[[Call], Op]:
    def make(call: Call) -> Op:
        x = node_of(call["x"])
        dtype = call["dtype"]
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise Decline(f"dtype {dtype}")
        return Op("softmax", (x,), {"fn": fn, "dim": call.dim(call["dim"], call.value(x).dim()), "dtype": dtype})

    return make


def _linear(call: Call) -> Op:
    if call.value(call["weight"]).dim() != 2:
        raise Decline("the weight is not a matrix")
    return Op("linear", (node_of(call["x"]), call["weight"], call["bias"]), {"layout": "nk"})


def _is_matrix_input(call: Call, node: Any) -> bool:
    value = call.example(node)
    return (
        isinstance(node, fx.Node)
        and node.op in ("placeholder", "get_attr")
        and isinstance(value, torch.Tensor)
        and value.dim() == 2
    )


def _transposed_input(call: Call, node: fx.Node) -> fx.Node | None:
    """W where ``node`` is W.T of a matrix input, however it is spelled."""
    from .spellings import meaning

    op = meaning(node, call.example)
    found = op.kind == "permute" and op.params["dims"] == (1, 0) and _is_matrix_input(call, op.args[0])
    return op.args[0] if found else None


def _product(call: Call, x: fx.Node, weight: fx.Node, bias: Any) -> Op | None:
    """x @ W or x @ W.T with a matrix that comes from outside."""
    if _is_matrix_input(call, weight):
        return Op("linear", (x, weight, bias), {"layout": "kn"})
    if (matrix := _transposed_input(call, weight)) is not None:
        return Op("linear", (x, matrix, bias), {"layout": "nk"})
    return None


def _matmul(call: Call) -> Op:
    x, other = node_of(call["x"]), node_of(call["other"])
    linear = _product(call, x, other, None) if call.value(x).dim() >= 2 else None
    return linear or Op("matmul", (x, other))


def _addmm(call: Call) -> Op:
    bias, x, weight = node_of(call["x"]), node_of(call["mat1"]), node_of(call["mat2"])
    if not (is_number(call["beta"], 1) and is_number(call["alpha"], 1)) or call.value(bias).dim() != 1:
        raise Decline("addmm with scales or a matrix to add")
    return _product(call, x, weight, bias) or Op("linear", (x, weight, bias), {"layout": "kn"})


def _sdpa(call: Call) -> Op:
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return Op("sdpa", tuple(node_of(call[name]) for name in "qkv"), {name: call[name] for name in names})


def _loss(kind: str) -> Callable[[Call], Op]:
    def make(call: Call) -> Op:
        logits, labels = node_of(call["x"]), node_of(call["target"])
        if call.value(labels).is_floating_point():
            raise Decline("labels are probabilities")
        reduction = call["reduction"]
        if call["size_average"] is not None or call["reduce"] is not None:
            reduction = torch.nn._reduction.legacy_get_string(call["size_average"], call["reduce"], emit_warning=False)
        params = {"weight": call["weight"], "ignore_index": call["ignore_index"], "reduction": reduction,
                  "label_smoothing": call["label_smoothing"]}  # fmt: skip
        return Op(kind, (logits, labels), params)

    return make


def _embedding(call: Call) -> Op:
    if call.bound.get("max_norm") is not None or call["scale_grad_by_freq"] or call["sparse"]:
        raise Decline("an embedding with max_norm, scale_grad_by_freq or sparse gradients")
    padding = call["padding_idx"]
    return Op(
        "embedding", (node_of(call["x"]), node_of(call["weight"])), {"padding_idx": None if padding == -1 else padding}
    )


_ATTENTION = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
_LOSS_NAMES = "x target weight size_average ignore_index reduce reduction"
_LOSS = {
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}
_EMBEDDING = {"scale_grad_by_freq": False, "sparse": False}


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def put(names: str, signature: str, make: Callable[[Call], Op], **defaults: Any) -> None:
        rows.update({name: Row.of(signature, make, **defaults) for name in names.split()})

    for fn in ("sum", "mean", "prod"):
        put(fn, "x dim keepdim", _reduce(fn), dim=None, keepdim=False, dtype=None)
    for fn in ("amax", "amin", "all", "any", "logsumexp", "special.logsumexp"):
        put(fn, "x dim keepdim", _reduce(fn.split(".")[-1]), dim=None, keepdim=False)
    for fn in ("var", "std"):
        put(fn, "x dim unbiased keepdim", _spread(fn), dim=None, unbiased=None, keepdim=False, correction=1)
    put("norm F.norm", "x p dim keepdim dtype", _norm, p="fro", dim=None, keepdim=False, dtype=None)
    put(
        "linalg.vector_norm linalg_vector_norm",
        "x p dim keepdim dtype",
        _norm,
        p=2,
        dim=None,
        keepdim=False,
        dtype=None,
    )
    put("linalg.norm linalg_norm", "x p dim keepdim dtype", _norm, p=None, dim=None, keepdim=False, dtype=None)
    put("F.layer_norm", "x sizes weight bias eps", _normalised("layer_norm"), weight=None, bias=None, eps=1e-5)
    put(
        "layer_norm",
        "x sizes weight bias eps cudnn_enable",
        _normalised("layer_norm"),
        weight=None,
        bias=None,
        eps=1e-5,
        cudnn_enable=True,
    )
    put("rms_norm F.rms_norm", "x sizes weight eps", _normalised("rms_norm"), weight=None, eps=None)
    for fn in ("softmax", "log_softmax"):
        put(f"{fn} special.{fn}", "x dim dtype", _softmax(fn), dtype=None)
        put(f"F.{fn}", "x dim _stacklevel dtype", _softmax(fn), dim=None, _stacklevel=3, dtype=None)
    put("linear", "x weight bias", _linear, bias=None)
    put("matmul bmm mm __matmul__", "x other", _matmul)
    put("addmm", "x mat1 mat2", _addmm, beta=1, alpha=1)
    put("scaled_dot_product_attention", "q k v attn_mask dropout_p is_causal", _sdpa, **_ATTENTION)
    put("cross_entropy", f"{_LOSS_NAMES} label_smoothing", _loss("cross_entropy"), **_LOSS)
    put("F.nll_loss", _LOSS_NAMES, _loss("nll_loss"), **_LOSS)
    names = "x weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    put("F.embedding", names, _embedding, padding_idx=None, max_norm=None, norm_type=2.0, **_EMBEDDING)
    put("embedding", "weight x padding_idx scale_grad_by_freq sparse", _embedding, padding_idx=-1, **_EMBEDDING)
    return rows


MATRIX = _rows()
