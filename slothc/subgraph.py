"""Some nodes of a graph as a program of their own, run as they were: the reference that plans are checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from slothc.kernels.sdpa import scaled_dot_product_attention

from .view import GraphView


def extract(
    view: GraphView, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node],
    resize: Mapping[int, int] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """A function of the values of ``inputs`` that runs ``nodes`` and returns the values of ``results``.

    ``resize`` replaces sizes written into the nodes' arguments, so that the same nodes run on smaller tensors. Attention runs apart from
    the library's plans (``kernels.sdpa``): gradients drawn for a trial leave none behind.
    """
    wanted = set(nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: graph.placeholder(f"leaf{k}") for k, n in enumerate(inputs)}
    for node in view.nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if view.op(node).kind == "sdpa":
                copies[node].target = scaled_dot_product_attention
            if resize:
                copies[node].args = fx.map_arg(_resized(copies[node].args, resize), lambda n: n)
    graph.output(tuple(copies[r] for r in results))
    module = fx.GraphModule(_attributes(view, nodes), graph)
    return module.forward


def _resized(args: Any, resize: Mapping[int, int]) -> Any:
    if isinstance(args, tuple | list):
        return type(args)(_resized(a, resize) for a in args)
    return resize.get(args, args) if type(args) is int else args


def _attributes(view: GraphView, nodes: Sequence[fx.Node]) -> torch.nn.Module:
    """A root that holds the attributes the nodes read."""
    root = torch.nn.Module()
    for node in nodes:
        if node.op == "get_attr":
            name = str(node.target)
            setattr(root, name, getattr(view.graph_module, name))
    return root


def in_double(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The same nodes with every floating-point value in float64: casts to a narrower type are left out."""
    module = function.__self__  # type: ignore[attr-defined]
    return _Double(module).run


class _Double(fx.Interpreter):
    """Runs a graph in float64, whatever dtypes its nodes ask for."""

    NARROW = (torch.float32, torch.bfloat16, torch.float16)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(*(self._wide(a) for a in args), **kwargs)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in self.NARROW:
            return value.double()
        if isinstance(value, torch.Tensor) and value.dtype == torch.complex64:
            return value.to(torch.complex128)
        if isinstance(value, torch.dtype) and value in self.NARROW:
            return torch.float64
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return torch.utils._pytree.tree_map(self._wide, args), torch.utils._pytree.tree_map(self._wide, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in ("float", "half", "bfloat16"):
            return args[0].double() if args[0].is_floating_point() else args[0].to(torch.float64)
        return super().call_method(target, args, kwargs)
