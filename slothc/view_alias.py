"""Which values of a graph may share storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef


class Groups:
    """Sets of nodes that may share storage (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._storages: dict[StorageWeakRef, fx.Node] = {}

    def root(self, node: fx.Node) -> fx.Node:
        """The representative of the node's set."""
        while (parent := self._parent.get(node, node)) is not node:
            self._parent[node] = self._parent.get(parent, parent)
            node = parent
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        """The two may share storage."""
        self._parent[self.root(a)] = self.root(b)

    def join_storages(self, node: fx.Node, value: Any) -> None:
        """Joins the node with every earlier one whose example value has a storage of ``value``."""
        for storage in storages(value):
            self.join(node, self._storages.setdefault(storage, node))


def storages(value: Any) -> list[StorageWeakRef]:
    """The storages of an example value: a tensor, or a tuple of them at any depth."""
    if isinstance(value, tuple | list):
        return [storage for item in value for storage in storages(item)]
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return []
    try:
        return [StorageWeakRef(value.untyped_storage())]
    except (NotImplementedError, RuntimeError):  # tensor subclasses without a storage of their own
        return []
