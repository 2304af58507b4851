"""Spellings of views, joins and splits: what moves values without changing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from slothc.patterns.meaning import Op

from .spellings_call import Call, Decline, Row, is_number, node_of, same_kind, same_shape


def _identity_or(call: Call, op: Op) -> Op:
    """Identity where nothing moves."""
    x = call.value(op.args[0])
    return Op("identity", op.args) if same_shape(x, call.out) and x.dtype == call.out.dtype else op


def _reshape(call: Call) -> Op:
    x = node_of(call["x"])
    if call.value(x).dtype != call.out.dtype:
        raise Decline("a view of the bits as another dtype")
    return _identity_or(call, Op("reshape", (x,)))


def _permuted(x: Any, dims: tuple[int, ...]) -> Op:
    if dims == tuple(range(len(dims))):
        return Op("identity", (x,))
    return Op("permute", (x,), {"dims": dims})


def _permute(call: Call) -> Op:
    x = node_of(call["x"])
    return _permuted(x, call.dims(call["sizes"], call.value(x).dim()))


def _swap(x: fx.Node, rank: int, first: int, second: int) -> Op:
    dims = list(range(rank))
    if rank:
        dims[first], dims[second] = second, first
    return _permuted(x, tuple(dims))


def _transpose(call: Call) -> Op:
    x = node_of(call["x"])
    rank = call.value(x).dim()
    return _swap(x, rank, call.dim(call["dim0"], rank), call.dim(call["dim1"], rank))


def _t(call: Call) -> Op:
    x = node_of(call["x"])
    rank = call.value(x).dim()
    return _permuted(x, tuple(reversed(range(rank))))


def _matrix_t(call: Call) -> Op:
    x = node_of(call["x"])
    rank = call.value(x).dim()
    return _swap(x, rank, rank - 2, rank - 1)


def _movedim(call: Call) -> Op:
    x = node_of(call["x"])
    rank = call.value(x).dim()
    source, target = call.dims(call["source"], rank), call.dims(call["destination"], rank)
    rest = iter(dim for dim in range(rank) if dim not in source)
    place = dict(zip(target, source))
    return _permuted(x, tuple(place[dim] if dim in place else next(rest) for dim in range(rank)))


def _expand(call: Call) -> Op:
    return _identity_or(call, Op("expand", (node_of(call["x"]),)))


def attribute(call: Call) -> Op:
    """``getattr(tensor, name)``."""
    make = {
        "T": _t,
        "mT": _matrix_t,
        "data": lambda c: Op("detach", (c["x"],)),
        "real": _complex("real"),
        "imag": _complex("imag"),
    }
    if call["name"] not in make or call.example(call["x"]) is None:
        raise Decline(f"attribute {call['name']}")
    return make[call["name"]](call)


def getitem(call: Call) -> Op:
    """``x[items]``: an item of a tuple, a basic index of a tensor; anything else is declined."""
    x, key = node_of(call["x"]), call["key"]
    value = call.example(x)
    if not isinstance(value, torch.Tensor):
        if not isinstance(key, int) or not isinstance(call.out, torch.Tensor):
            raise Decline("item of something that is not a tuple")
        return Op("item", (x,), {"number": key})
    items = key if isinstance(key, tuple) else (key,)
    if _keeps_all(items) and same_kind(value, call.out):
        return Op("identity", (x,))
    if any(isinstance(item, fx.Node) for item in items):
        return _looked_up(call, x, items)
    if any(isinstance(item, list) for item in items):
        return _copied(_indexed(call, x, _items(_runs(items), value)))
    return _indexed(call, x, _items(items, value))


def _looked_up(call: Call, x: fx.Node, items: tuple[Any, ...]) -> Op:
    """One integer tensor among whole slices: rows of ``x`` looked up."""
    at = [k for k, item in enumerate(items) if isinstance(item, fx.Node)]
    rest = [item for k, item in enumerate(items) if k not in at]
    if len(at) != 1 or not all(isinstance(item, slice) and item == slice(None) for item in rest[: at[0]]):
        raise Decline("indexed by tensors or nodes")
    if not all(item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in rest[at[0] :]):
        raise Decline("indexed by a tensor among other things")
    return _gather(call, x, at[0], node_of(items[at[0]]), signed=True)


def _gather(call: Call, x: fx.Node, dim: int, index: fx.Node, signed: bool = False) -> Op:
    if call.value(index).dtype not in (torch.int64, torch.int32):
        raise Decline("indexed by flags")
    return Op("gather", (x, index), {"dim": dim, "signed": signed})


def _each(call: Call) -> Op:
    """``torch.gather``: every element looked up along one dimension at an index of its own."""
    x, index = node_of(call["x"]), node_of(call["index"])
    rank = call.value(x).dim()
    if call.value(index).dtype not in (torch.int64, torch.int32) or rank != call.value(index).dim() or not rank:
        raise Decline("gathered at flags or at one number")
    return Op("gather", (x, index), {"dim": call.dim(call["dim"], rank), "along": True})


def _index_select(call: Call) -> Op:
    x, index = node_of(call["x"]), node_of(call["index"])
    if call.value(index).dim() != 1:
        raise Decline("selected at one number")
    return _gather(call, x, call.dim(call["dim"], call.value(x).dim()), index)


def _runs(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """The one list among slices as the slice that it spells: numbers that count up by one, from either end."""
    lists = [item for item in items if isinstance(item, list)]
    plain = all(item is None or item is Ellipsis or isinstance(item, slice | list) for item in items)
    numbers = lists[0]
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if len(lists) != 1 or not plain or not numbers or not whole or numbers != [*range(numbers[0], numbers[-1] + 1)]:
        raise Decline("indexed by a list")
    first, last = numbers[0], numbers[-1]
    if first < 0 <= last:
        raise Decline("indexed by a list that goes round")
    return tuple(slice(first, last + 1 or None) if isinstance(item, list) else item for item in items)


def _copied(op: Op) -> Op:
    """The same elements in memory of their own."""
    return Op(op.kind, op.args, {**op.params, "clone": True})


def _keeps_all(items: tuple[Any, ...]) -> bool:
    """Whether a result of the same shape must be the same values: slices of step 1 only, wherever they end."""
    return all(item is Ellipsis or (isinstance(item, slice) and item.step in (None, 1)) for item in items)


def _items(key: Any, value: torch.Tensor) -> tuple[Any, ...]:
    """One item per input dim (None: a new dim), Ellipsis and missing dims filled in; see ``_plain_item``."""
    given = list(key)
    if any(
        isinstance(item, bool) or not (item is None or item is Ellipsis or isinstance(item, int | slice))
        for item in given
    ):
        raise Decline("indexed by tensors or nodes")
    used = sum(1 for item in given if isinstance(item, int | slice))
    fill = [slice(None)] * (value.dim() - used)
    at = next((i for i, item in enumerate(given) if item is Ellipsis), len(given))
    given[at : at + 1] = fill
    sizes = iter(value.shape)
    return tuple(item if item is None else _plain_item(item, next(sizes)) for item in given)


def _plain_item(item: int | slice, size: Any) -> int | slice:
    """With a known size: 0 <= int < size, slices have non-negative bounds, the whole dim is ``slice(None)``."""
    if isinstance(item, int):
        return item + size if item < 0 and isinstance(size, int) else item
    if not all(bound is None or isinstance(bound, int) for bound in (item.start, item.stop, item.step)):
        raise Decline("sliced at a node")
    if item.start in (None, 0) and item.stop is None and item.step in (None, 1):
        return slice(None)
    if not isinstance(size, int):
        return item
    start, stop, step = item.indices(size)
    return slice(None) if (start, stop, step) == (0, size, 1) else slice(start, max(start, stop), step)


def _indexed(call: Call, x: fx.Node, items: tuple[Any, ...]) -> Op:
    if all(item == slice(None) for item in items):
        return Op("identity", (x,))
    return Op("index", (x,), {"items": items})


def _narrow(call: Call) -> Op:
    x, start, length = node_of(call["x"]), call["start"], call["length"]
    if not isinstance(start, int) or not isinstance(length, int):
        raise Decline("narrowed at a node")
    return _along(call, x, slice(start, None if start < 0 and start + length == 0 else start + length))


def _select(call: Call) -> Op:
    if not isinstance(call["index"], int):
        raise Decline("selected at a node")
    return _along(call, node_of(call["x"]), call["index"])


def _slice(call: Call) -> Op:
    return _along(call, node_of(call["x"]), slice(call["start"], call["end"], call["step"]))


def _along(call: Call, x: fx.Node, item: int | slice) -> Op:
    value = call.value(x)
    dim = call.dim(call["dim"], value.dim())
    return _indexed(call, x, _items([slice(None)] * dim + [item], value))


def _cat(call: Call) -> Op:
    nodes = tuple(node_of(item) for item in call["tensors"])
    rank = call.out.dim()
    nodes = tuple(node for node in nodes if call.value(node).dim() == rank)  # torch skips empty 1-D tensors of any rank
    if any(call.value(node).dtype != call.out.dtype for node in nodes):
        raise Decline("cat of several dtypes")
    if len(nodes) == 1:
        return Op("identity", nodes, {"clone": True})
    return Op("cat", nodes, {"dim": call.dim(call["dim"], rank)})


def _stack(call: Call) -> Op:
    nodes = tuple(node_of(item) for item in call["tensors"])
    if any(call.value(node).dtype != call.out.dtype for node in nodes):
        raise Decline("stack of several dtypes")
    return Op("stack", nodes, {"dim": call.dim(call["dim"], call.out.dim())})


def _split(call: Call) -> Op:
    x, parts = node_of(call["x"]), call.example(call.node)
    if not isinstance(parts, tuple | list) or not all(isinstance(part, torch.Tensor) for part in parts):
        raise Decline("split into unknown parts")
    dim = call.dim(call["dim"], call.value(x).dim())
    return Op("split", (x,), {"dim": dim, "sizes": tuple(part.shape[dim] for part in parts)})


def _unbind(call: Call) -> Op:
    x = node_of(call["x"])
    return Op("split", (x,), {"fn": "unbind", "dim": call.dim(call["dim"], call.value(x).dim()), "sizes": None})


def _repeat_interleave(call: Call) -> Op:
    x, repeats = node_of(call["x"]), call["repeats"]
    if not isinstance(repeats, int) or call["dim"] is None:
        raise Decline("repeats from a node, or flattened")
    dim = call.dim(call["dim"], call.value(x).dim())
    return Op("repeat_interleave", (x,), {"dim": dim, "repeats": repeats})


def _repeat(call: Call) -> Op:
    x, repeats = node_of(call["x"]), tuple(call["repeats"])
    if not all(isinstance(item, int) for item in repeats):
        raise Decline("repeats from a node")
    if call.name == "tile":
        repeats = (1,) * (call.value(x).dim() - len(repeats)) + repeats
    return _identity_or(call, Op("repeat", (x,), {"repeats": repeats}))


def _pad(call: Call) -> Op:
    x, widths, value = node_of(call["x"]), call["sizes"], call["value"]
    if call["mode"] != "constant" or not all(isinstance(w, int) for w in widths) or not (value is None or is_number(value)):
        raise Decline("padded by nodes, or by values of its own")
    if not any(widths):
        return Op("identity", (x,), {"clone": True})
    rank = call.value(x).dim()
    pads = [(0, 0)] * (rank - len(widths) // 2) + [(widths[k], widths[k + 1]) for k in range(len(widths) - 2, -1, -2)]
    return Op("pad", (x,), {"pads": tuple(pads), "value": value or 0})


def _full(value: float | None) -> Callable[[Call], Op]:
    """A tensor of one number; ``value`` None: the call says which."""

    def make(call: Call) -> Op:
        number = call["value"] if value is None else value
        if not is_number(number) or not (call.out.is_floating_point() or call.out.dtype == torch.bool):
            raise Decline("filled with a node, or with integers")
        return Op("full", (), {"value": number})

    return make


def _written(call: Call) -> Op:
    x, key, value = node_of(call["x"]), call["key"], call["value"]
    if not isinstance(value, fx.Node) and not is_number(value):
        raise Decline("written from something that is neither a tensor nor a number")
    items = _items(key if isinstance(key, tuple) else (key,), call.value(x))
    if any(isinstance(i, slice) and i.step not in (None, 1) for i in items):
        raise Decline("written in steps")
    return Op("write", (x, value), {"items": items})


def _empty(call: Call) -> Op:
    return Op("empty")


def _complex(fn: str) -> Callable[[Call], Op]:
    return lambda call: Op("complex", (node_of(call["x"]),), {"fn": fn})


def _complex_pair(fn: str) -> Callable[[Call], Op]:
    return lambda call: Op("complex", (node_of(call["x"]), node_of(call["other"])), {"fn": fn})


_NEW = dict.fromkeys(("dtype", "device", "layout", "memory_format", "pin_memory", "out"))


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def put(names: str, signature: str, make: Callable[[Call], Op], **defaults: Any) -> None:
        rows.update({name: Row.of(signature, make, **defaults) for name in names.split()})

    put("view reshape _unsafe_view view_as reshape_as", "x *sizes", _reshape, other=None)
    put("flatten", "x start_dim end_dim", _reshape, start_dim=0, end_dim=-1)
    put("unflatten", "x dim sizes", _reshape)
    put("unsqueeze", "x dim", _reshape)
    put("squeeze", "x *dim", _reshape)
    put("ravel", "x", _reshape)
    put("permute", "x *sizes", _permute)
    put("transpose swapaxes swapdims", "x dim0 dim1", _transpose)
    put("t", "x", _t)
    put("movedim moveaxis", "x source destination", _movedim)
    put("expand broadcast_to", "x *sizes", _expand, implicit=False)
    put("expand_as", "x other", _expand)
    put("getattr", "x name", attribute)
    put("getitem __getitem__", "x key", getitem)
    put("narrow", "x dim start length", _narrow)
    put("select", "x dim index", _select)
    put("index_select", "x dim index", _index_select)
    put("gather", "x dim index", _each, sparse_grad=False)
    put("slice", "x dim start end step", _slice, dim=0, start=None, end=None, step=1)
    put("cat concat concatenate", "tensors dim", _cat, dim=0)
    put("stack", "tensors dim", _stack, dim=0)
    put("split split_with_sizes", "x split_size dim", _split, dim=0)
    put("chunk unsafe_chunk", "x chunks dim", _split, dim=0)
    put("tensor_split", "x parts dim", _split, dim=0)
    put("unbind", "x dim", _unbind, dim=0)
    put("repeat_interleave", "x repeats dim", _repeat_interleave, dim=None, output_size=None)
    put("repeat tile", "x *repeats", _repeat)
    put("pad constant_pad_nd", "x sizes mode value", _pad, mode="constant", value=None)
    for name, number in (("zeros", 0), ("ones", 1)):
        put(f"{name}_like new_{name}", "x *sizes", _full(number), **_NEW)
        put(name, "*sizes", _full(number), **_NEW)
    put("empty_like new_empty", "x *sizes", _empty, **_NEW)
    put("empty", "*sizes", _empty, **_NEW)
    put("written", "x key value", _written)
    put("full_like", "x value", _full(None), **_NEW)
    put("new_full", "x sizes value", _full(None), **_NEW)
    put("full", "sizes value", _full(None), **_NEW)
    put("tensor", "value", _full(None), **_NEW, requires_grad=False)
    put("view_as_complex", "x", _complex("view_as_complex"))
    put("view_as_real", "x", _complex("view_as_real"))
    put("real", "x", _complex("real"))
    put("imag", "x", _complex("imag"))
    put("conj", "x", _complex("conj"))
    put("polar complex", "x other", lambda call: _complex_pair(call.name)(call), dtype=None)
    return rows


VIEWS = _rows()
