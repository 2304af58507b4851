"""What a recogniser may ask about a captured graph: meanings, values, users, aliasing, gradients, places in the user's source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef

from slothc.patterns.meaning import Op

from .spellings import meaning, target_name
from .spellings_call import example
from .view_location import location

_MAY_ALIAS = {"reshape", "permute", "expand", "index", "split", "item", "identity", "detach", "complex", "cast"}
_EFFECTS = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_assert", "_check", "manual_seed", "set_rng_state", "_sync", "_saved_tensors")


class MissingValue(KeyError):
    """A node has no example tensor."""

    def __str__(self) -> str:
        return str(self.args[0])


class GraphView:
    """Answers about one fx.GraphModule as Dynamo hands it over. Never changes it; the graph must not change while the view is used.

    ``values`` gives example values for nodes whose meta has none (the placeholders of child graphs).
    """

    def __init__(self, graph_module: fx.GraphModule, values: dict[fx.Node, Any] | None = None) -> None:
        self.graph_module = graph_module
        self.nodes: tuple[fx.Node, ...] = tuple(graph_module.graph.nodes)
        self._values: dict[fx.Node, Any] = dict(values or {})
        self._ops: dict[fx.Node, Op] = {}
        self._grad = _grad_spans(self.nodes)
        self._alive: set[fx.Node] | None = None
        self._mutated: set[fx.Node] | None = None
        self._children: dict[fx.Node, GraphView] = {}

    def op(self, node: fx.Node) -> Op:
        """The node's canonical meaning."""
        found = self._ops.get(node)
        if found is None:
            found = self._ops[node] = meaning(node)
        return found

    def example(self, node: Any) -> Any:
        """The example value whatever it is: a fake tensor, a tuple, a number, None."""
        found = self._values.get(node)
        return example(node) if found is None else found

    def value(self, node: fx.Node) -> torch.Tensor:
        """The example tensor of a node. Raises MissingValue, naming the node, where there is none."""
        found = self.example(node)
        if not isinstance(found, torch.Tensor):
            kind = type(found).__name__ if found is not None else "nothing"
            raise MissingValue(f"node {node} at {self.location(node)} has no example tensor (it has {kind})")
        return found

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of the node's value."""
        return self.value(node).dtype

    def source(self, node: Any) -> Any:
        """The first value behind identities and casts that keep the dtype. A detach stays: it is a constant to the gradient."""
        while isinstance(node, fx.Node):
            op = self.op(node)
            same_dtype = op.kind == "cast" and self.value(op.args[0]).dtype == self.value(node).dtype
            if op.kind != "identity" and not same_dtype:
                return node
            node = op.args[0]
        return node

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read this one's value, without dead code."""
        alive = self._living()
        return [user for user in node.users if user in alive]

    def alive(self, node: fx.Node) -> bool:
        """Whether an output, a mutation or another effect depends on the node."""
        return node in self._living()

    def location(self, node: fx.Node) -> str:
        """``transformers/models/llama/modeling_llama.py:114 in forward``, or the node's name."""
        return location(node)

    def grad_enabled(self, node: fx.Node) -> bool:
        """False between ``_set_grad_enabled(False)`` and the call that turns it on again."""
        return self._grad[node]

    def needs_grad(self, node: fx.Node) -> bool:
        """Whether autograd records the node's value."""
        found = self.example(node)
        return self.grad_enabled(node) and isinstance(found, torch.Tensor) and bool(found.requires_grad)

    def mutated(self, node: fx.Node) -> bool:
        """Whether the node's value, or one that may share its storage, is written to anywhere in the graph or its children."""
        if self._mutated is None:
            self._mutated = self._find_mutated()
        return node in self._mutated

    def child_modules(self) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
        """(the node that calls it, the child graph) for every graph that a higher-order op takes."""
        for node in self.nodes:
            if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
                for item in node.all_input_nodes:
                    child = self._attribute(item)
                    if isinstance(child, fx.GraphModule):
                        yield node, child

    def _attribute(self, node: fx.Node) -> Any:
        if node.op != "get_attr":
            return None
        found: Any = self.graph_module
        for name in str(node.target).split("."):
            found = getattr(found, name, None)
        return found

    def child(self, node: fx.Node, module: fx.GraphModule) -> GraphView:
        """The view of a child graph of ``node``, its placeholders valued by the arguments of the call."""
        return GraphView(module, self._child_values(node, module))

    def _child_values(self, node: fx.Node, module: fx.GraphModule) -> dict[fx.Node, Any]:
        arguments = [arg for arg in _flat(node.args) if not isinstance(self._attribute(arg), fx.GraphModule)]
        inputs = [item for item in module.graph.nodes if item.op == "placeholder"]
        if len(arguments) != len(inputs):
            return {}
        return {item: self.example(arg) for item, arg in zip(inputs, arguments) if example(item) is None}

    def _living(self) -> set[fx.Node]:
        if self._alive is None:
            alive: set[fx.Node] = set()
            for node in reversed(self.nodes):
                if node in alive or self._has_effect(node):
                    alive.add(node)
                    alive.update(node.all_input_nodes)
            self._alive = alive
        return self._alive

    def _has_effect(self, node: fx.Node) -> bool:
        if node.op == "output" or self.op(node).params.get("mutates"):
            return True
        return node.op == "call_function" and target_name(node).startswith(_EFFECTS)

    def _find_mutated(self) -> set[fx.Node]:
        groups = _Groups()
        storages: dict[Any, fx.Node] = {}
        for node in self.nodes:
            for other in self._aliases(node):
                groups.join(node, other)
            for storage in _storages(self.example(node)):
                groups.join(node, storages.setdefault(storage, node))
        written = {groups.root(target) for node in self.nodes for target in self._written(node)}
        return {node for node in self.nodes if groups.root(node) in written}

    def _aliases(self, node: fx.Node) -> tuple[fx.Node, ...]:
        op = self.op(node)
        if op.params.get("mutates"):
            return tuple(op.params["targets"])
        if op.kind in _MAY_ALIAS and not op.params.get("clone"):
            return tuple(arg for arg in op.args if isinstance(arg, fx.Node))
        opaque_view = op.kind == "opaque" and not op.params.get("scalar") and not _storages(self.example(node))
        return op.args if opaque_view and node.op != "output" else ()

    def _written(self, node: fx.Node) -> tuple[fx.Node, ...]:
        targets = tuple(self.op(node).params.get("targets", ()))
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            return targets
        arguments = [arg for arg in _flat(node.args) if not isinstance(self._attribute(arg), fx.GraphModule)]
        for child in (child for caller, child in self.child_modules() if caller is node):
            view = self.child(node, child)
            inputs = [item for item in view.nodes if item.op == "placeholder"]
            targets += tuple(arg for item, arg in zip(inputs, arguments) if view.mutated(item))
        return targets


class _Groups:
    """Sets of nodes that may share storage (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def root(self, node: fx.Node) -> fx.Node:
        while (parent := self._parent.get(node, node)) is not node:
            self._parent[node] = self._parent.get(parent, parent)
            node = parent
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self._parent[self.root(a)] = self.root(b)


def _flat(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(args, lambda node: found.append(node) or node)
    return found


def _storages(value: Any) -> list[StorageWeakRef]:
    items = value if isinstance(value, tuple | list) else (value,)
    tensors = [item for item in items if isinstance(item, torch.Tensor) and item.layout == torch.strided]
    return [StorageWeakRef(item.untyped_storage()) for item in tensors]


def _grad_spans(nodes: tuple[fx.Node, ...]) -> dict[fx.Node, bool]:
    enabled, found = True, {}
    for node in nodes:
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        found[node] = enabled
    return found
