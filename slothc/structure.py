"""The structural key of a cone: equal keys, equal formula. Identical layers are lifted, named and checked once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .permutations import is_permutation
from .regions import Cone
from .sizes import shape_of
from .view import GraphView


def structure(view: GraphView, cone: Cone) -> tuple[str, list[fx.Node], list[fx.Node]]:
    """(canonical text, the cone's nodes in order, its leaves in order of first use)."""
    nodes = sorted(cone.nodes, key=view.order.__getitem__)
    place = {n: f"v{k}" for k, n in enumerate(nodes)}
    leaves: dict[fx.Node, str] = {}
    lines: list[str] = []

    def name(arg: Any) -> str:
        if not isinstance(arg, fx.Node):
            return repr(arg)
        if arg in place:
            return place[arg]
        if arg not in leaves:
            leaves[arg] = f"leaf{len(leaves)}"
            once = " permutation" if _integers(view, arg) and is_permutation(view, arg) else ""
            lines.append(f"{leaves[arg]}: {_describe(view, arg, strides=False)}{once}")
        return leaves[arg]

    for node in nodes:
        op = view.op(node)
        args = ", ".join(name(a) for a in op.args)
        params = ", ".join(f"{k}={_param(v)}" for k, v in sorted(op.params.items()))
        lines.append(f"{place[node]} = {op.kind}({args}; {params}): {_describe(view, node, node in cone.results)}")
    lines.append("results " + " ".join(f"{place[r]}{' lasts' if view.lasts(r) else ''}" for r in cone.results))
    return "\n".join(lines), nodes, list(leaves)


def _param(value: Any) -> str:
    return f"{value}" if not isinstance(value, fx.Node) else "<node>"


def _integers(view: GraphView, node: fx.Node) -> bool:
    value = view.example(node)
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex()


def _describe(view: GraphView, node: fx.Node, strides: bool) -> str:
    value = view.example(node)
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    text = f"{shape_of(view, node)} {value.dtype} {view.needs_grad(node)}"
    return f"{text} {tuple(value.stride())}" if strides else text
