"""What torch functions do to logits that are not built: metadata, more laziness, or a result chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from slothc.kernels.vocab import NAMES, linear_argmax, linear_cross_entropy, linear_logsumexp
from slothc.kernels.vocab_chain import picked

from .lazy_logits import LazyLogits

_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "requires_grad",
    "grad_fn",
    "is_leaf",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_quantized",
    "is_mkldnn",
    "is_xpu",
    "is_mps",
    "is_nested",
    "itemsize",
    "nbytes",
    "output_nr",
    "_version",
    "names",
    "_grad",
    "grad",
    "_backward_hooks",
    "is_sparse_csr",
)
_METHODS = (
    "size",
    "dim",
    "ndimension",
    "stride",
    "storage_offset",
    "numel",
    "nelement",
    "element_size",
    "get_device",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "is_contiguous",
    "is_inference",
    "is_conj",
    "is_neg",
    "is_shared",
    "__len__",
    "__hash__",
    "_is_view",
    "is_same_size",
    "has_names",
    "__repr__",
    "__format__",
    "__dir__",
)
_WRITES = (
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ipow__",
    "requires_grad_",
    "retain_grad",
    "register_hook",
)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


def _metadata() -> set[Any]:
    found = {_getter(name) for name in _PROPERTIES if hasattr(Tensor, name)}
    found |= {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
    return found | {
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        torch.is_inference,
        torch.is_same_size,
        torch.is_tensor,
    }


METADATA = _metadata()
BY_VALUE = {_getter(name) for name in ("grad", "_version", "_backward_hooks")}
"""Metadata that changes when the real tensor is used."""
NO_LABEL = -(1 << 40)


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` where some argument is a ``LazyLogits``."""
    if func in BY_VALUE and args[0].materialized:
        return func(args[0].materialize(), *args[1:], **kwargs)
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    handler = HANDLERS.get(func)
    if handler is not None and args and isinstance(args[0], LazyLogits) and not args[0].materialized:
        if not any(isinstance(leaf, LazyLogits) for leaf in tree_leaves((args[1:], kwargs))):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
    build = LazyLogits._materialize_shared if _writes(func, kwargs) else LazyLogits.materialize
    args, kwargs = tree_map(lambda v: build(v) if isinstance(v, LazyLogits) else v, (args, kwargs))
    return func(*args, **kwargs)


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in _WRITES or (name.endswith("_") and not name.endswith("__")) or name == "__set__" or "out" in kwargs


# casts and arithmetic: one more step of the chain


def _step(
    x: LazyLogits, fn: str, *numbers: Any, dtype: torch.dtype | None = None, same: Callable[[Tensor], Tensor]
) -> Any:
    plain = all(type(c) in (int, float) and math.isfinite(c) for c in numbers)
    if not plain or x.recipe.normalised is not None or (dtype or x.dtype) not in NAMES:
        return NotImplemented
    chain = x.recipe.chain.then(fn, *numbers, dtype=NAMES[dtype or x.dtype])
    return x.derive(same, view=False, chain=chain)


def _cast(x: LazyLogits, dtype: torch.dtype, copy: bool = False) -> Any:
    if dtype == x.dtype and not copy:
        return x
    if not dtype.is_floating_point:
        return NotImplemented
    return _step(x, "cast", dtype=dtype, same=lambda t: t.to(dtype, copy=copy))


def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """``to`` with a dtype, this tensor's device, or both; anything else builds the logits."""
    given = [*args, *(v for k, v in kwargs.items() if k in ("dtype", "device", "other"))]
    other = next((v for v in given if isinstance(v, Tensor)), None)
    dtype = next((v for v in given if isinstance(v, torch.dtype)), None if other is None else other.dtype)
    device = next((v for v in given if isinstance(v, torch.device | str)), None if other is None else other.device)
    if kwargs.get("memory_format") not in (None, torch.preserve_format) or any(type(v) is int for v in given):
        return NotImplemented
    if device is not None and not _same_device(torch.device(device), x.device):
        return NotImplemented
    return _cast(
        x, dtype or x.dtype, copy=bool(kwargs.get("copy", args[-1] if len(args) > 2 and args[-1] is True else False))
    )


def _same_device(asked: torch.device, have: torch.device) -> bool:
    return asked == have or (asked.type == have.type and asked.index is None and have.type == "cpu")


def _binary(fn: str) -> Callable[..., Any]:
    def handler(x: LazyLogits, other: Any, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else _step(x, fn, other, same=lambda t: getattr(torch, fn)(t, other))

    return handler


def _unary(fn: str) -> Callable[..., Any]:
    return lambda x: _step(x, fn, same=getattr(torch, fn))


# the same elements, fewer of them, or in another shape of leading dimensions


def _detach(x: LazyLogits) -> LazyLogits:
    with torch.no_grad():
        return x.derive(Tensor.detach, view=True)


def _contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return x if memory_format in (torch.contiguous_format, torch.preserve_format) else NotImplemented


def _clone(x: LazyLogits, *, memory_format: Any = torch.preserve_format) -> Any:
    plain = memory_format in (torch.contiguous_format, torch.preserve_format)
    return x.derive(Tensor.clone, view=False) if plain else NotImplemented


def _reshape(x: LazyLogits, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    if not all(isinstance(s, int) for s in sizes):
        return NotImplemented
    new = torch.empty(x.shape, device="meta").reshape(sizes).shape
    return _reshaped(x, new)


def _reshaped(x: LazyLogits, new: torch.Size) -> Any:
    if not new or new[-1] != x.shape[-1] or x.numel() == 0:
        return NotImplemented
    changes = x.recipe.tokens(lambda t: t.reshape(*new[:-1], t.shape[-1]))
    return x.derive(lambda t: t.reshape(new), view=True, **changes)


def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _reshaped(x, torch.empty(x.shape, device="meta").flatten(start_dim, end_dim).shape)


def _squeezed(name: str) -> Callable[..., Any]:
    return lambda x, *dim: _reshaped(x, getattr(torch.empty(x.shape, device="meta"), name)(*dim).shape)


def _getitem(x: LazyLogits, key: Any) -> Any:
    """An index of the leading dimensions is one of the hidden states, a slice of the vocabulary one of the weight."""
    items = list(key) if isinstance(key, tuple) else [key]
    widths = [_width(item) for item in items]
    if None in widths or widths.count(-1) > 1:
        return NotImplemented
    if -1 in widths:
        at = widths.index(-1)
        fill = x.dim() - sum(w for w in widths if w is not None and w > 0)
        items[at : at + 1], widths[at : at + 1] = [slice(None)] * fill, [1] * fill
    recipe, place = x.recipe, tuple(items)
    view = not any(isinstance(item, Tensor) for item in place)
    if sum(w or 0 for w in widths) < x.dim():
        return x.derive(lambda t: t[place], view=view, **recipe.tokens(lambda t: t[place]))
    *leading, last = items
    if not isinstance(last, slice) or sum(w or 0 for w in widths) > x.dim():
        return NotImplemented
    changes = recipe.tokens(lambda t: t[tuple(leading)] if leading else t)
    if not _is_whole(last, x.shape[-1]):
        if recipe.normalised is not None:
            return NotImplemented
        changes |= recipe.classes(last)
    return x.derive(lambda t: t[place], view=view, **changes)


def _width(item: Any) -> int | None:
    """How many dimensions an index item takes; -1 for an ellipsis, None for what is left to the real tensor."""
    if item is Ellipsis:
        return -1
    if isinstance(item, Tensor):
        return item.dim() if item.dtype == torch.bool else 1
    return 1 if isinstance(item, slice) or type(item) is int else None


def _is_whole(item: Any, size: int) -> bool:
    return isinstance(item, slice) and item.indices(size) == (0, size, 1)


def _unbind(x: LazyLogits, dim: int = 0) -> Any:
    return tuple(x[i] for i in range(x.shape[0])) if dim == 0 and x.dim() > 1 else NotImplemented


# results chunk by chunk


def _is_last(x: LazyLogits, dim: Any) -> bool:
    return isinstance(dim, int) and dim in (-1, x.dim() - 1)


def _in_chunks(x: LazyLogits) -> bool:
    """Whether the chunked losses compute these logits in their precision: they work in fp32."""
    chain = x.recipe.chain
    return "fp64" not in (chain.dtype, *(s.dtype for s in chain.steps)) and x.recipe.normalised != torch.float64


def _operands(x: LazyLogits) -> tuple[Tensor, Tensor, Tensor | None]:
    x.check()
    return x.recipe.hidden, x.recipe.weight, x.recipe.bias


def _log_softmax(x: LazyLogits, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    if not _is_last(x, dim) or x.recipe.normalised is not None:
        return NotImplemented
    asked = dtype or (torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype)
    return x.derive(lambda t: torch.log_softmax(t, -1, dtype=asked), view=False, normalised=asked)


def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not _is_last(x, dim) or x.recipe.normalised is not None or not _in_chunks(x):
        return NotImplemented
    result = linear_logsumexp(*_operands(x), chain=x.recipe.chain.text, adapter=x.recipe.adapter)
    return result.unsqueeze(-1) if keepdim else result


def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(x, dim) or x.recipe.normalised is not None or not _in_chunks(x):
        return NotImplemented
    result = linear_argmax(*_operands(x), chain=x.recipe.chain.text, adapter=x.recipe.adapter)
    return result.unsqueeze(-1) if keepdim else result


def _gather(x: LazyLogits, dim: Any, index: Any, *, sparse_grad: bool = False) -> Any:
    """A few logits a token are as many dot products; a few log-probabilities are losses."""
    fits = isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == x.dim()
    fits = fits and index.shape[:-1] == x.shape[:-1]
    if not _is_last(x, dim) or not fits or sparse_grad or not _in_chunks(x):
        return NotImplemented
    normalised, hidden = x.recipe.normalised, x.recipe.hidden
    if normalised is not None:
        if index.shape[-1] != 1:
            return NotImplemented
        target, chain = index[..., 0], x.recipe.chain.text
        loss = linear_cross_entropy(
            *_operands(x), target, chain=chain, reduction="none", dtype=normalised, ignore_index=NO_LABEL, adapter=x.recipe.adapter
        )
        return -loss.unsqueeze(-1)
    if index.shape[-1] * hidden.shape[-1] > x.shape[-1]:
        return NotImplemented
    return picked(*_operands(x), x.recipe.chain, index, x.recipe.adapter)


def _cross_entropy(
    x: LazyLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = weight is None and size_average is None and reduce is None and x.dim() == 2 and isinstance(target, Tensor)
    plain = plain and target.dtype == torch.int64 and target.shape == x.shape[:1]
    if not plain or x.recipe.normalised is not None or not _in_chunks(x):
        return NotImplemented
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    return linear_cross_entropy(
        *_operands(x), target, chain=x.recipe.chain.text, dtype=dtype,
        ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, adapter=x.recipe.adapter,
    )  # fmt: skip


def _handlers() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {
        F.log_softmax: _log_softmax,
        F.cross_entropy: _cross_entropy,
        Tensor.to: _to,
        F.tanh: _unary("tanh"),
        Tensor.__getitem__: _getitem,
        Tensor.__rmul__: _binary("mul"),
        Tensor.view: _reshape,
        torch.true_divide: _binary("div"),
    }
    for name, dtype in {
        "float": torch.float32,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
        "double": torch.float64,
    }.items():
        table[getattr(Tensor, name)] = lambda x, *, dtype=dtype: _cast(x, dtype)
    functions: dict[str, Callable[..., Any]] = {
        "mul": _binary("mul"),
        "multiply": _binary("mul"),
        "div": _binary("div"),
        "divide": _binary("div"),
        "tanh": _unary("tanh"),
        "neg": _unary("neg"),
        "detach": _detach,
        "clone": _clone,
        "reshape": _reshape,
        "flatten": _flatten,
        "squeeze": _squeezed("squeeze"),
        "unsqueeze": _squeezed("unsqueeze"),
        "unbind": _unbind,
        "logsumexp": _logsumexp,
        "log_softmax": _log_softmax,
        "argmax": _argmax,
        "gather": _gather,
    }
    for name, handler in functions.items():
        table[getattr(torch, name)] = table[getattr(Tensor, name)] = handler
    methods: dict[str, Callable[..., Any]] = {
        "contiguous": _contiguous,
        "__mul__": _binary("mul"),
        "__truediv__": _binary("div"),
        "__neg__": _unary("neg"),
        "true_divide": _binary("div"),
    }
    for name, handler in methods.items():
        table[getattr(Tensor, name)] = handler
    table[_getter("data")] = _detach
    return table


HANDLERS = _handlers()
