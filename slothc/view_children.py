"""Child graphs of higher-order ops: which arguments are graphs, and example values where a child has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode


def attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a ``get_attr`` node reads, or None."""
    if node.op != "get_attr":
        return None
    found: Any = graph_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def arguments(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes that a higher-order op hands to its body, in order: all but the bodies themselves."""
    flat: list[fx.Node] = []
    fx.map_arg(node.args, flat.append)
    return [item for item in flat if not isinstance(attribute(graph_module, item), fx.GraphModule)]


def child_values(
    child: fx.GraphModule, given: list[Any], example: Callable[[Any], Any], grad_enabled: bool
) -> dict[fx.Node, Any]:
    """Example values of the child's nodes that have none of their own, from those of the call's arguments.

    Inner nodes are run on the fake tensors; a child that cannot be run so keeps only its placeholders' values.
    """
    inputs = [node for node in child.graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(given):
        return {}
    values = {node: value for node, value in zip(inputs, given) if example(node) is None}
    if all(example(node) is not None for node in child.graph.nodes if node.op.startswith("call") and node.users):
        return values
    return values | _propagated(child, [values.get(node, example(node)) for node in inputs], grad_enabled)


class _Recorder(fx.Interpreter):
    """Runs a graph and remembers every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = result = super().run_node(n)
        return result


def _propagated(child: fx.GraphModule, inputs: list[Any], grad_enabled: bool) -> dict[fx.Node, Any]:
    mode = detect_fake_mode(inputs)
    if mode is None:
        return {}
    recorder = _Recorder(child)
    try:
        with mode, torch.set_grad_enabled(grad_enabled):
            recorder.run(*inputs)
    except Exception:  # whatever an op's fake raises: the values up to there are what is known
        pass
    return {node: value for node, value in recorder.values.items() if node.op not in ("placeholder", "output")}
