"""The canonical meaning of every torch spelling; with spellings_*.py the one place that knows how torch is called."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from slothc.kernels.four_bit import form_of
from slothc.patterns.meaning import Op

from .spellings_call import Call, Decline, Row, example, settled
from .spellings_composite import COMPOSITE
from .spellings_effects import written as written_to
from .spellings_matrix import MATRIX
from .spellings_numpy import numpy_number
from .spellings_pointwise import POINTWISE
from .spellings_views import VIEWS
from .written import written

TABLE: dict[str, Row] = {**POINTWISE, **VIEWS, **MATRIX, **COMPOSITE}

_NAMESPACES: tuple[tuple[ModuleType | Any, str], ...] = (
    (torch, ""), (operator, ""), (torch._C._nn, ""), (F, "F."), (torch.special, "special."), (torch.linalg, "linalg."),
    (torch._C._autograd, ""), (torch.Tensor, ""),
)  # fmt: skip


def _names() -> dict[Any, str]:
    """Function object -> its row's name; a row may be for one namespace only (``F.softmax`` and ``softmax`` differ)."""
    found: dict[Any, str] = {getattr: "getattr", max: "max", min: "min", abs: "abs"}
    for module, prefix in _NAMESPACES:
        for name in sorted(dir(module), key=lambda name: name.startswith("_")):
            function = getattr(module, name, None)
            own = prefix + name if prefix + name in TABLE else name
            if callable(function) and own in TABLE and function.__hash__ is not None:
                found.setdefault(function, own)
    found[torch.Tensor.where] = ".where"
    found[written] = "written"
    return found


_NAMES = _names()


def target_name(node: fx.Node) -> str:
    """A readable name of what the node calls: ``mul``, ``F.dropout``, ``aten.sort``, ``setitem``."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if isinstance(target, OpOverloadPacket):
        return str(target._qualified_op_name).replace("::", ".").removeprefix("aten.")
    return _NAMES.get(target) or getattr(target, "__name__", None) or str(target)


def _row(node: fx.Node, name: str) -> Row | None:
    if node.op == "call_method":
        return TABLE.get("." + name) or TABLE.get(name)
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        return TABLE.get(name)
    return TABLE.get(name) if node.target in _NAMES else None


def meaning(node: fx.Node, example: Callable[[Any], Any] = example) -> Op:
    """What ``node`` computes; never raises. ``example`` gives a node's example value (by default its meta's).

    Unknown calls are ``opaque`` with a readable ``fn`` and often a ``reason``. Calls that write to an argument
    are ``opaque`` with ``mutates``, ``target_arg`` (the first such node), ``targets`` (all of them). Calls that give a
    number are ``opaque`` with ``scalar``.
    """
    if node.op in ("placeholder", "get_attr"):
        return Op("input")
    name = target_name(node)
    if node.op not in ("call_function", "call_method"):
        return Op("opaque", _operands(node), {"fn": node.op})
    targets = written_to(node, name, example)
    if targets:
        return _mutation(node, name, targets)
    value = example(node)
    if value is not None and not isinstance(value, torch.Tensor | tuple | list):
        return Op("opaque", _operands(node), {"fn": name, "scalar": True})
    number = numpy_number(node)
    if number is not None:
        return Op("full", (), {"value": number})
    form = form_of(node.target)
    if form is not None:
        return Op("whole", node.args, {"form": form})
    row = _row(node, name)
    if row is None:
        return Op("opaque", _operands(node), {"fn": name})
    return _meaning(node, name, row, example)


def _meaning(node: fx.Node, name: str, row: Row, example: Callable[[Any], Any]) -> Op:
    try:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: settled(example(n), n))
        bound = row.signature.bind(args, {key: item for key, item in kwargs.items() if key != "out"})
        if bound.get("inplace"):
            return _mutation(node, name, (bound["x"],))
        return row.make(Call(node, name, bound, example))
    except Decline as reason:
        return Op("opaque", _operands(node), {"fn": name, "reason": str(reason)})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # an overload that no row foresaw
        return Op("opaque", _operands(node), {"fn": name, "reason": f"unexpected arguments: {error}"})


def _mutation(node: fx.Node, name: str, targets: tuple[fx.Node, ...]) -> Op:
    params = {"fn": name, "mutates": True, "target_arg": targets[0], "targets": targets}
    return Op("opaque", _operands(node), params)


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(node.all_input_nodes)
