"""Which arguments a call writes to: in-place operators and methods, ``out=``, ``inplace=True``, mutable schemas."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

_INPLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift,
    operator.setitem, operator.delitem,
}  # fmt: skip
_DUNDER_INPLACE = {f"__{fn.__name__}__" for fn in _INPLACE_OPERATORS}
_NUMBERS = int | float | torch.SymInt | torch.SymFloat | torch.SymBool
_RUNNING_STATISTICS = {"batch_norm", "instance_norm"}


def written(node: fx.Node, name: str, example: Callable[[Any], Any]) -> tuple[fx.Node, ...]:
    """The argument nodes that ``node`` writes to. ``name``: of its target; ``example`` gives example values."""
    found: list[Any] = []
    if _writes_first(node, name) and node.args:
        found.append(node.args[0])
    found.append(node.kwargs.get("out"))
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        found += _by_schema(node)
    if isinstance(node.target, HigherOrderOperator) and "mutation" in name:
        found += [node.args, node.kwargs]
    if node.kwargs.get("inplace") is True and not found[:-1]:
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    if name in _RUNNING_STATISTICS and (node.kwargs.get("training") or True in node.args):
        found += [node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var")]
    if name == "embedding" and node.kwargs.get("max_norm", node.args[3] if len(node.args) > 3 else None) is not None:
        found.append(node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None))
    return tuple(dict.fromkeys(_nodes(found, example)))


def _writes_first(node: fx.Node, name: str) -> bool:
    if node.op == "call_function":
        plain = not isinstance(node.target, OpOverload | OpOverloadPacket | HigherOrderOperator)
        return plain and (node.target in _INPLACE_OPERATORS or _trailing_underscore(name))
    return node.op == "call_method" and (_trailing_underscore(name) or name in _DUNDER_INPLACE or name == "__setitem__")


def _trailing_underscore(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_", "is_")


def _by_schema(node: fx.Node) -> list[Any]:
    """Arguments that the schema marks as written. A packet counts as mutable where the overload in use may be."""
    target: Any = node.target
    overloads = [target] if isinstance(target, OpOverload) else [getattr(target, item) for item in target.overloads()]
    found: list[Any] = []
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if argument.name in node.kwargs:
                found.append(node.kwargs[argument.name])
            elif place < len(node.args) and not argument.kwarg_only:
                found.append(node.args[place])
    return found


def _nodes(item: Any, example: Callable[[Any], Any]) -> list[fx.Node]:
    """Nodes whose value is not a plain number, at any depth."""
    found: list[fx.Node] = []

    def keep(node: fx.Node) -> fx.Node:
        if not isinstance(
            node.meta.get("example_value"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool
        ):
            found.append(node)
        return node

    fx.map_arg(item, keep)
    return found
