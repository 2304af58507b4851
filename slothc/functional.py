"""Writes in place as values: a fresh tensor that is changed step by step becomes one value after another.

    k = new_empty(...); k[..., :n].copy_(a); k[..., n:].copy_(b); f(k)
    k0 = new_empty(...); k1 = written(k0, (..., :n), a); k2 = written(k1, (..., n:), b); f(k2)

Only where nobody can tell: the memory was made in this graph, no view of it outlives a write, and every write has the memory's own
dtype and grad mode. What no region takes in is put back in place (``restore``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
from torch import fx

from .lift_forms import same
from .sizes import shape_of
from .spellings import target_name
from .view import GraphView
from .view_alias import storages
from .written import write_into, written

_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.itruediv: operator.truediv,
}  # fmt: skip
_METHODS = set("add_ sub_ mul_ div_ neg_ exp_ sqrt_ rsqrt_ sigmoid_ tanh_ relu_ clamp_ clamp_min_ clamp_max_ masked_fill_".split())
_FILLS = {"copy_", "fill_", "zero_"}
_VIEWS = {"index", "reshape", "permute", "expand", "identity", "split", "item"}
_WHOLE = _VIEWS - {"split", "item", "expand"}
PLACE = "sloth_in_place"                  # in a node's meta: the target that does the same in place


@dataclass(frozen=True)
class _Write:
    """A write at ``node``: ``view`` is the part of the memory it goes to (None: all of it).

    ``echo``: ``x[key] += y`` ends with ``x[key] = x[key]``, which does nothing more.
    """

    node: fx.Node
    view: fx.Node | None
    echo: fx.Node | None = None


def functional(view: GraphView) -> bool:
    """Rewrite the graph of ``view`` as above, where it can be done; whether anything changed (the view is then out of date)."""
    if not any(view.op(n).params.get("mutates") for n in view.nodes):
        return False
    changed = _plain(view)
    view = view.again() if changed else view
    order = view.order
    for members in view.memories():
        base = _base(view, members)
        writes = [] if base is None else _writes(view, base, members, order)
        if base is not None and writes:
            _Versions(view, base, order).through(writes)
            changed = True
    return changed


def _plain(view: GraphView) -> bool:
    """Readers of what is only another name of memory that is written to (``contiguous`` where nothing moves) read that memory itself."""
    changed = False
    for node in (n for members in view.memories() for n in reversed(members)):                    # readers first: names of names
        source = view.op(node).args[0] if view.op(node).kind == "identity" else None
        if isinstance(source, fx.Node) and source.op.startswith("call") and node.users and _one(view.example(node), view.example(source)):
            node.replace_all_uses_with(source)
            changed = True
    return changed


def _one(a: Any, b: Any) -> bool:
    """Whether two example values are one tensor: the same memory, read the same way."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or not storages(a) or storages(a) != storages(b):
        return False
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def _base(view: GraphView, members: Sequence[fx.Node]) -> fx.Node | None:
    """The node that stands for the memory: where it is made, or the one view of all of it that everything else goes through."""
    base = members[0]
    if base.op not in ("call_function", "call_method") or not isinstance(view.example(base), torch.Tensor) or view.op(base).kind in _VIEWS:
        return None
    while len(base.users) == 1:
        node = next(iter(base.users))
        if node not in members or view.op(node).kind not in _WHOLE or not _as_large(view, node, base):
            break
        base = node
    return base


def _as_large(view: GraphView, a: fx.Node, b: fx.Node) -> bool:
    return same(sp.Mul(*shape_of(view, a)), sp.Mul(*shape_of(view, b)))


def _writes(view: GraphView, base: fx.Node, members: Sequence[fx.Node], order: dict[fx.Node, int]) -> list[_Write]:
    """The writes to one piece of memory in order; none where they cannot be told as values."""
    found: list[_Write] = []
    handles, echoes = {base}, set[fx.Node]()                               # nodes that are the whole memory; writes that do nothing more
    later = [n for n in members if order[n] > order[base]]
    for node in later:
        if not view.op(node).params.get("mutates"):
            if view.op(node).kind not in _VIEWS:
                return []
            continue
        if node in echoes:
            continue
        write = _write(view, node, handles)
        if write is None or view.grad_enabled(node) != view.grad_enabled(base):
            return []
        part = write.view
        if part is None:
            handles.add(node)
        else:
            echo = _echo(write, handles)
            write = replace(write, echo=echo)
            if echo is not None:
                echoes.add(echo)
            if len(node.users) > (echo is not None) or _later(part, node, order):
                return []
        found.append(write)
    stale = [v for v in later if v not in handles and not view.op(v).params.get("mutates")]
    if any(order[v] < order[w.node] and v is not w.view and _later(v, w.node, order) for v in stale for w in found):
        return []
    return found


def _echo(write: _Write, handles: set[fx.Node]) -> fx.Node | None:
    """The ``x[key] = x[key]`` that Python adds to ``x[key] += y``."""
    user = next(iter(write.node.users), None)
    if user is None or user.target is not operator.setitem or write.view is None or user.args[0] not in handles:
        return None
    return user if user.args[1:] == (write.view.args[1], write.node) else None


def _later(node: fx.Node, than: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the node is read after ``than``."""
    return any(order[u] > order[than] for u in node.users)


def _write(view: GraphView, node: fx.Node, handles: set[fx.Node]) -> _Write | None:
    """One write, where its target is the whole memory or a basic index of it and its value is of the memory's dtype."""
    if len(view.op(node).params["targets"]) != 1 or not node.args or "out" in node.kwargs:
        return None
    target = node.args[0]
    name, whole = target_name(node), target in handles
    if node.target is operator.setitem:
        return _Write(node, None) if whole and _basic(node.args[1]) and not node.users else None
    part = None if whole else _indexed(view, target, handles)
    if not whole and part is None:
        return None
    known = node.target in _OPERATORS or (node.op == "call_method" and name in _METHODS | _FILLS)
    return _Write(node, part) if known and (name in _FILLS or _keeps(view, node)) else None


def _indexed(view: GraphView, target: Any, handles: set[fx.Node]) -> fx.Node | None:
    if not isinstance(target, fx.Node) or target.target is not operator.getitem or target.args[0] not in handles:
        return None
    return target if view.op(target).kind == "index" and not view.op(target).params.get("clone") else None


def _basic(key: Any) -> bool:
    items = key if isinstance(key, tuple) else (key,)
    return all(i is None or i is Ellipsis or (isinstance(i, int | slice) and not isinstance(i, bool)) for i in items)


def _keeps(view: GraphView, node: fx.Node) -> bool:
    """Whether the operation out of place has its first argument's shape and dtype too."""
    mine = view.example(node.args[0])
    for other in (*node.args[1:], *node.kwargs.values()):
        value = view.example(other) if isinstance(other, fx.Node) else other
        if isinstance(value, torch.Tensor):
            fits = value.dim() <= mine.dim() and all(b == 1 or b is a or b == a for a, b in zip(mine.shape[::-1], value.shape[::-1]))
            if not fits or (value.dtype != torch.bool and torch.result_type(mine, value) != mine.dtype):
                return False
        elif isinstance(value, float | complex) and torch.result_type(mine, value) != mine.dtype:
            return False
    return mine.is_floating_point()


class _Versions:
    """One piece of memory, version after version."""

    def __init__(self, view: GraphView, base: fx.Node, order: dict[fx.Node, int]) -> None:
        self.view, self.graph, self.order = view, view.graph_module.graph, order
        self.base = self.current = base

    def through(self, writes: Sequence[_Write]) -> None:
        for write in writes:
            with self.graph.inserting_before(write.node):
                new = self._value(write)
            if write.echo is not None:
                self.graph.erase_node(write.echo)
            self._from_here(write.node, new)
            self.graph.erase_node(write.node)
            self.current = new

    def _from_here(self, node: fx.Node, new: fx.Node) -> None:
        """Readers of the memory after ``node`` read ``new``."""
        for old in {self.current, node}:
            for user in list(old.users):
                if user is not node and user is not new and self._after(user, node):
                    user.replace_input_with(old, new)

    def _after(self, user: fx.Node, node: fx.Node) -> bool:
        return user in self.order and self.order[user] > self.order[node]

    def _value(self, write: _Write) -> fx.Node:
        node, name = write.node, target_name(write.node)
        if node.target is operator.setitem:
            return self._put(node, node.args[1], node.args[2])
        if write.view is None and name not in _FILLS:
            return self._computed(node, self.current, self.current)
        key = (Ellipsis,) if write.view is None else write.view.args[1]
        if name in _FILLS:
            return self._put(node, key, 0 if name == "zero_" else node.args[1])
        assert write.view is not None
        return self._put(node, key, self._computed(node, write.view, None))

    def _computed(self, node: fx.Node, x: fx.Node, memory: fx.Node | None) -> fx.Node:
        """The operation of ``node`` out of place on ``x``."""
        rest = (x, *node.args[1:])
        if node.op == "call_function":
            made = self.graph.call_function(_OPERATORS[node.target], rest, dict(node.kwargs))
        else:
            made = self.graph.call_method(str(node.target)[:-1], rest, dict(node.kwargs))
        made.meta = dict(node.meta)
        if memory is not None:
            made.meta[PLACE] = node.target
        return made

    def _put(self, node: fx.Node, key: Any, value: Any) -> fx.Node:
        made = self.graph.call_function(written, (self.current, key, value))
        made.meta = {**node.meta, **{k: v for k, v in self.base.meta.items() if k in ("example_value", "val")}, PLACE: write_into}
        return made


def restore(view: GraphView, made: set[fx.Node]) -> None:
    """Writes that are still nodes of the graph go back in place, where nothing in ``made`` and nothing later reads the old value.

    A call that took a region's place may stand behind a write whose old value it reads through a view.
    """
    graph = view.graph_module.graph
    order = {n: k for k, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = node.meta.get(PLACE)
        if target is None or node in made:
            continue
        x = node.args[0]
        if x in made or x.op not in ("call_function", "call_method"):
            continue
        if any(u in made or order[u] > order[node] for u in _readers(view, x, made)):
            continue
        node.target = target


def _readers(view: GraphView, x: fx.Node, made: set[fx.Node]) -> set[fx.Node]:
    """The nodes that read the memory of ``x`` as it is there, also through views of it."""
    found: set[fx.Node] = set()
    waiting = [x]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                if user.op.startswith("call") and user not in made and PLACE not in user.meta and view.op(user).kind in _VIEWS:
                    waiting.append(user)
    return found
