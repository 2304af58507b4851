"""What a recogniser may ask about a captured graph: meanings, values, users, aliasing, gradients, source lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from slothc.kernels.devices import available
from slothc.patterns.meaning import Op

from .spellings import meaning, target_name
from .spellings_call import example
from .view_alias import Groups, storages
from .view_children import arguments, attribute, child_values
from .view_location import location

_MAY_ALIAS = {"reshape", "permute", "expand", "index", "split", "item", "identity", "detach", "complex"}
_WITHOUT_EFFECT = {"_log_api_usage_once"}
_EFFECTS = (
    "_set_grad_enabled",
    "_enter_",
    "_exit_",
    "_assert",
    "_check",
    "manual_seed",
    "set_rng_state",
    "sym_constrain",
)
_FUNCTION = "autograd_function_apply"
_NESTING = ("_vmap_", "_grad_", "_jvp_")


class MissingValue(KeyError):
    """A node has no example tensor."""

    def __str__(self) -> str:
        return str(self.args[0])


class GraphView:
    """Answers about one fx.GraphModule as Dynamo hands it over. Never changes it; it must not change while in use.

    ``values``: example values of nodes whose meta has none. ``grad_enabled``: the grad mode at the graph's start. ``autocast``: the
    arguments of the ``_enter_autocast`` that the graph starts in, where it is in another graph.
    """

    def __init__(
        self, graph_module: fx.GraphModule, values: Mapping[fx.Node, Any] | None = None, grad_enabled: bool = True,
        autocast: tuple[Any, ...] | None = None,
    ) -> None:  # fmt: skip
        self.graph_module = graph_module
        self.nodes: tuple[fx.Node, ...] = tuple(graph_module.graph.nodes)
        self.order: dict[fx.Node, int] = {n: k for k, n in enumerate(self.nodes)}
        self._values: dict[fx.Node, Any] = dict(values or {})
        self._ops: dict[fx.Node, Op] = {}
        self._grad = _grad_spans(self.nodes, grad_enabled)
        self._autocast = _autocast_spans(self.nodes, autocast)
        self._nested = _nested(self.nodes)
        self._alive: set[fx.Node] | None = None
        self._mutated: set[fx.Node] | None = None
        self._memories: list[list[fx.Node]] | None = None
        self._children: dict[tuple[fx.Node, fx.GraphModule], GraphView] = {}

    def op(self, node: fx.Node) -> Op:
        """The node's canonical meaning."""
        found = self._ops.get(node)
        if found is None:
            found = meaning(node, self.example)
            if node in self._nested and found.kind not in ("input", "opaque"):
                found = Op("opaque", tuple(node.all_input_nodes), {"fn": target_name(node), "reason": "inside vmap"})
            self._ops[node] = found
        return found

    def example(self, node: Any) -> Any:
        """The example value whatever it is: a fake tensor, a tuple, a number, None."""
        found = self._values.get(node) if isinstance(node, fx.Node) else None
        return example(node) if found is None else found

    def value(self, node: fx.Node) -> torch.Tensor:
        """The example tensor of a node. Raises MissingValue, naming the node, where there is none."""
        found = self.example(node)
        if not isinstance(found, torch.Tensor):
            kind = "nothing" if found is None else f"a {type(found).__name__}"
            raise MissingValue(f"node {node} at {self.location(node)} has no example tensor: it has {kind}")
        return found

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of the node's value."""
        return self.value(node).dtype

    def source(self, node: Any) -> Any:
        """The first value behind identities and casts that keep the dtype. A detach stays: its gradient is zero."""
        while isinstance(node, fx.Node):
            op = self.op(node)
            same_dtype = op.kind == "cast" and self.dtype(op.args[0]) == self.dtype(node)
            if op.kind != "identity" and not same_dtype:
                return node
            node = op.args[0]
        return node

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read this one's value, without dead code."""
        return [user for user in node.users if self.alive(user)]

    def alive(self, node: fx.Node) -> bool:
        """Whether the node is an output, a mutation or another effect, or one of those depends on it."""
        if self._alive is None:
            self._alive = self._living()
        return node in self._alive

    def location(self, node: fx.Node) -> str:
        """``transformers/models/llama/modeling_llama.py:114 in forward``, or the node's name."""
        return location(node)

    def grad_enabled(self, node: fx.Node) -> bool:
        """False between ``_set_grad_enabled(False)`` and the call that turns it on again."""
        return self._grad[node]

    def autocast(self, node: fx.Node) -> tuple[Any, ...] | None:
        """(device type, dtype, enabled, ...) of the innermost autocast that the graph enters around the node; None: none."""
        return self._autocast[node]

    def needs_grad(self, node: fx.Node) -> bool:
        """Whether autograd records the node's value."""
        found = self.example(node)
        return self.grad_enabled(node) and isinstance(found, torch.Tensor) and bool(found.requires_grad)

    def generates(self, device: torch.device) -> bool:
        """Whether kernels are generated for the device, or would be for the one that a meta device stands for."""
        return device.type == "meta" or available(device)

    def mutated(self, node: fx.Node) -> bool:
        """Whether the node's value, or one that may share its storage, is written to, here or in a child graph."""
        if self._mutated is None:
            self._mutated = self._find_mutated()
        return node in self._mutated

    def lasts(self, node: fx.Node) -> bool:
        """Whether the node's value stays as it is: nobody writes into it here, and nobody outside the graph gets it."""
        waiting, seen = [node], {node}
        while waiting:
            for user in waiting.pop().users:
                if user.op == "output":
                    return False
                if user not in seen and self.op(user).kind in _MAY_ALIAS:
                    seen.add(user)
                    waiting.append(user)
        return not self.mutated(node)

    def child_modules(self) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
        """(the node that calls it, the child graph) for every graph that a higher-order op takes."""
        for node in self.nodes:
            yield from ((node, child) for child in self._bodies(node))

    def child(self, node: fx.Node, module: fx.GraphModule) -> GraphView:
        """The view of a child graph of ``node``; values that the child lacks come from the arguments of the call."""
        found = self._children.get((node, module))
        if found is None:
            given = [self.example(item) for item in arguments(self.graph_module, node)]
            values = child_values(module, given, example, self.grad_enabled(node))
            found = self._children[node, module] = GraphView(module, values, self.grad_enabled(node), self.autocast(node))
        return found

    def _bodies(self, node: fx.Node) -> list[fx.GraphModule]:
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            return []
        found = (attribute(self.graph_module, item) for item in node.all_input_nodes)
        return [item for item in found if isinstance(item, fx.GraphModule)]

    def _living(self) -> set[fx.Node]:
        alive: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node in alive or self.has_effect(node):
                alive.add(node)
                alive.update(node.all_input_nodes)
        return alive

    def has_effect(self, node: fx.Node) -> bool:
        if node.op == "output" or self.op(node).params.get("mutates"):
            return True
        if not node.op.startswith("call"):
            return False
        name = target_name(node)
        gives_nothing = not node.users and self.example(node) is None and name not in _WITHOUT_EFFECT
        return gives_nothing or name.startswith(_EFFECTS + _NESTING)

    def memories(self) -> list[list[fx.Node]]:
        """The values that may share storage with one that is written to, set by set, each in order."""
        if self._memories is None:
            self._memories = self._find_memories()
        return self._memories

    def _find_memories(self) -> list[list[fx.Node]]:
        groups, found = self._groups(), dict[fx.Node, list[fx.Node]]()
        for node in self.nodes:
            found.setdefault(groups.root(node), []).append(node)
        written = {groups.root(target) for node in self.nodes for target in self._written(node)}
        return [members for root, members in found.items() if root in written]

    def again(self) -> GraphView:
        """A view of the same graph after it was changed."""
        first = self._grad[self.nodes[0]] if self.nodes else True
        return GraphView(self.graph_module, self._values, first)

    def _groups(self) -> Groups:
        groups = Groups()
        for node in self.nodes:
            for other in self._aliases(node):
                groups.join(node, other)
            groups.join_storages(node, self.example(node))
        return groups

    def _find_mutated(self) -> set[fx.Node]:
        groups = self._groups()
        written = {groups.root(target) for node in self.nodes for target in self._written(node)}
        return {node for node in self.nodes if groups.root(node) in written}

    def _aliases(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Arguments that the value may share storage with by what the node does; unknown ops go by their storages."""
        op = self.op(node)
        if op.params.get("mutates"):
            return tuple(op.params["targets"])
        if op.kind in _MAY_ALIAS and not op.params.get("clone"):
            return tuple(arg for arg in op.args if isinstance(arg, fx.Node))
        unknown = op.kind == "opaque" and node.op.startswith("call") and not storages(self.example(node))
        return op.args if unknown and not op.params.get("scalar") else ()

    def writes(self, node: fx.Node) -> bool:
        """Whether the node, or a child graph it runs, writes to a value in place."""
        return bool(self._written(node))

    def _written(self, node: fx.Node) -> tuple[fx.Node, ...]:
        targets = list(self.op(node).params.get("targets", ()))
        bodies = self._bodies(node)
        for module in bodies[:1] if target_name(node) == _FUNCTION else bodies:     # a function's backward is given something else
            view = self.child(node, module)
            inputs = [item for item in view.nodes if item.op == "placeholder"]
            given = arguments(self.graph_module, node)
            if len(inputs) == len(given):
                targets += [arg for item, arg in zip(inputs, given) if view.mutated(item)]
        return tuple(targets)


def _grad_spans(nodes: tuple[fx.Node, ...], enabled: bool) -> dict[fx.Node, bool]:
    found: dict[fx.Node, bool] = {}
    for node in nodes:
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        found[node] = enabled
    return found


def _autocast_spans(nodes: tuple[fx.Node, ...], outer: tuple[Any, ...] | None) -> dict[fx.Node, tuple[Any, ...] | None]:
    found: dict[fx.Node, tuple[Any, ...] | None] = {}
    entered = [outer]
    for node in nodes:
        name = target_name(node) if node.op == "call_function" else ""
        if name == "_enter_autocast":
            entered.append(node.args)
        elif name == "_exit_autocast":
            entered.pop()
        found[node] = entered[-1]
    return found


def _nested(nodes: tuple[fx.Node, ...]) -> set[fx.Node]:
    """Nodes between functorch's increment and decrement of a nesting level: their shapes hide the batched dims."""
    depth, found = 0, set()
    for node in nodes:
        name = target_name(node) if node.op == "call_function" else ""
        if name.startswith(_NESTING) and name.endswith(("_increment_nesting", "_decrement_nesting")):
            depth += 1 if "increment" in name else -1
        if depth:
            found.add(node)
    return found
