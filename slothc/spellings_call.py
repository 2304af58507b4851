"""One call of a torch function, its arguments bound by name: positional and keyword spellings become the same thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slothc.patterns.meaning import Op

_REQUIRED = object()
_KEYWORDS = {
    "input": ("x",), "self": ("x",), "axis": ("dim",), "keepdims": ("keepdim",), "dims": ("dim", "sizes", "repeats"),
    "dim": ("sizes",), "size": ("sizes",), "shape": ("sizes",), "normalized_shape": ("sizes",), "pad": ("sizes",),
    "mat2": ("other",), "fill_value": ("value",),
    "ord": ("p",), "query": ("q",), "key": ("k",), "value": ("v",), "split_size_or_sections": ("split_size",),
    "indices_or_sections": ("parts",), "indices": ("x", "parts"), "sections": ("parts",),
    "axis0": ("dim0",), "axis1": ("dim1",), "abs": ("x",), "angle": ("other",), "imag": ("other",), "real": ("x",),
    "train": ("training",), "vec2": ("other",), "exponent": ("other",),
}  # fmt: skip


class Decline(Exception):
    """The call has no canonical meaning: the node is opaque. The message says why."""


@dataclass(frozen=True)
class Signature:
    """Parameter names in positional order; ``*sizes`` in the text form takes one sequence, or all that is left."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    star: str | None

    @staticmethod
    def parse(text: str, **defaults: Any) -> Signature:
        """``"x other alpha *sizes"``: names, in order; ``defaults`` are the values of the optional ones."""
        names = tuple(word for word in text.split() if not word.startswith("*"))
        star = next((word[1:] for word in text.split() if word.startswith("*")), None)
        return Signature(names, defaults, star)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name. Raises Decline for arguments that the signature does not have."""
        bound: dict[str, Any] = dict(zip(self.names, args))
        rest = args[len(self.names) :]
        if rest and self.star is None:
            raise Decline(f"{len(rest)} more positional arguments than {' '.join(self.names)}")
        if self.star is not None:
            bound[self.star] = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else tuple(rest)
        for key, item in kwargs.items():
            name = self._name(key)
            if name == self.star:
                item = tuple(item) if isinstance(item, tuple | list) else (item,)
            bound[name] = item
        bound = {**self.defaults, **bound}
        missing = [name for name in self.names if name not in bound]
        if missing:
            raise Decline(f"argument {missing[0]} is missing")
        return bound

    def _name(self, key: str) -> str:
        known = (*self.names, self.star, *self.defaults)
        if key in known:
            return key
        for name in _KEYWORDS.get(key, ()):
            if name in known:
                return name
        raise Decline(f"unknown argument {key}")


@dataclass(frozen=True)
class Call:
    """A node and its arguments by name."""

    node: fx.Node
    name: str
    bound: dict[str, Any]
    example: Callable[[Any], Any]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def value(self, node: Any) -> torch.Tensor:
        """The example value of an operand. Raises Decline where there is no tensor."""
        found = self.example(node)
        if not isinstance(found, torch.Tensor):
            raise Decline(f"{node} has no example tensor")
        return found

    @property
    def out(self) -> torch.Tensor:
        """The node's own example value."""
        return self.value(self.node)

    def dim(self, dim: Any, rank: int) -> int:
        """``dim`` as 0 <= dim < rank."""
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise Decline(f"dim {dim} is not a number")
        if not -max(rank, 1) <= dim < max(rank, 1):
            raise Decline(f"dim {dim} of a tensor of rank {rank}")
        return dim % max(rank, 1)

    def dims(self, dims: Any, rank: int) -> tuple[int, ...]:
        """Non-negative dims; None and () mean all of them."""
        if dims is None or (isinstance(dims, tuple | list) and not dims):
            return tuple(range(rank))
        items: Iterable[Any] = dims if isinstance(dims, tuple | list) else (dims,)
        return tuple(self.dim(item, rank) for item in items)


@dataclass(frozen=True)
class Row:
    """One line of the table: how arguments are named and what the call means."""

    signature: Signature
    make: Callable[[Call], Op]

    @staticmethod
    def of(text: str, make: Callable[[Call], Op], **defaults: Any) -> Row:
        """A row from the text form of a signature."""
        return Row(Signature.parse(text, **defaults), make)


def settled(value: Any, otherwise: Any) -> Any:
    """The number that a symbolic one is known to be (Dynamo guards on it), else ``otherwise``."""
    if not isinstance(value, torch.SymInt | torch.SymFloat):
        return otherwise
    number = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else value.node.maybe_as_float()
    return otherwise if number is None else number


def example(node: Any) -> Any:
    """What Dynamo recorded as the node's value (a fake tensor, a tuple of them, a number), or None."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value")
    return node.meta.get("val") if found is None else found


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are known to have one shape."""
    return len(a.shape) == len(b.shape) and all(same_size(m, n) for m, n in zip(a.shape, b.shape))


def same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and device."""
    return a.dtype == b.dtype and a.device == b.device and same_shape(a, b)


def is_number(item: Any, equal: float | None = None) -> bool:
    """Whether ``item`` is a Python number (and that one)."""
    return isinstance(item, int | float) and (equal is None or item == equal)


def operand(item: Any) -> Any:
    """A pointwise operand: a node or a real number. Raises Decline for anything else."""
    if isinstance(item, fx.Node | int | float):
        return item
    raise Decline(f"operand {item!r} is neither a node nor a number")


def node_of(item: Any) -> fx.Node:
    """An operand that must be a node."""
    if isinstance(item, fx.Node):
        return item
    raise Decline(f"operand {item!r} is not a node")
