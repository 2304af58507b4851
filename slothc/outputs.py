"""A graph's outputs as tensors, and put together again from other tensors in their places.

Lazy logits are taken apart into what they are made of: hidden states become an output, weights stay the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slothc.gradients.vocabulary import Chain

from .lazy_logits import LazyLogits, Recipe

PARTS = ("hidden", "weight", "bias", "low", "up")
MADE = ("hidden", "bias", "low", "up")               # what a graph may compute; a weight that it computes would be copied in every step
Place: TypeAlias = tuple[int, str]                   # an output's number, "" or the part of lazy logits
PLAIN = (Tensor, torch.nn.Parameter)


class Unrecordable(Exception):
    """Something that a recording could not give back as it is."""


@dataclass(frozen=True)
class Lazy:
    """Lazy logits without their tensors: each part is a place among the tensors, an input's number, or nothing."""

    chain: Chain
    normalised: torch.dtype | None
    scale: float
    places: dict[str, int]
    inputs: dict[str, int]

    def made(self, tensors: Sequence[Tensor], given: Sequence[Any]) -> Tensor:
        parts = {n: tensors[k] for n, k in self.places.items()} | {n: given[k] for n, k in self.inputs.items()}
        hidden, weight, bias, low, up = map(parts.get, PARTS)
        assert hidden is not None and weight is not None
        return LazyLogits.of(Recipe(hidden, weight, bias, self.chain, self.normalised, low, up, self.scale))


@dataclass(frozen=True)
class Layout:
    """``items``: each output as a number among the tensors, a ``Lazy``, or a 1-tuple of a value. ``places``: each tensor's first place."""

    items: tuple[int | Lazy | tuple[Any], ...]
    places: tuple[Place, ...]

    def whole(self, tensors: Sequence[Tensor], given: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of a call with inputs ``given`` whose tensors are these."""
        return tuple(
            tensors[i] if isinstance(i, int) else i.made(tensors, given) if isinstance(i, Lazy) else i[0] for i in self.items
        )

    def gradients(self, wanted: frozenset[Place]) -> tuple[int, ...]:
        """The tensors at these places."""
        return tuple(k for k, place in enumerate(self.places) if place in wanted)


def apart(outputs: Sequence[Any], arguments: Sequence[Any]) -> tuple[Layout, list[Tensor]]:
    """The outputs' layout and tensors. Raises ``Unrecordable`` for what cannot be given back as a copy."""
    tensors: list[Tensor] = []
    places: list[Place] = []
    numbers = {id(a): k for k, a in enumerate(arguments) if isinstance(a, Tensor)}
    seen: dict[int, int] = {}
    shared = {_memory(a) for a in arguments if isinstance(a, Tensor)}

    def add(t: Tensor, place: Place) -> int:
        if id(t) not in seen:
            if type(t) not in PLAIN:
                raise Unrecordable(f"an output is a {type(t).__name__}")
            if not place[1] and _memory(t) in shared:                     # nobody writes to what lazy logits are made of
                raise Unrecordable("an output shares memory with an input or another output")
            if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape)):
                raise Unrecordable("an output is expanded")
            seen[id(t)] = len(tensors)
            tensors.append(t)
            places.append(place)
        return seen[id(t)]

    items: list[int | Lazy | tuple[Any]] = []
    for k, o in enumerate(outputs):
        if isinstance(o, LazyLogits):
            items.append(_lazy(o, k, numbers, add))
        elif isinstance(o, Tensor):
            items.append(add(o, (k, "")))
            shared.add(_memory(o))
        elif o is None or isinstance(o, int | float | bool):
            items.append((o,))
        else:
            raise Unrecordable(f"an output is a {type(o).__name__}")
    return Layout(tuple(items), tuple(places)), tensors


def _lazy(o: LazyLogits, k: int, numbers: dict[int, int], add: Any) -> Lazy:
    if o.materialized or o._origin is not None:
        raise Unrecordable("logits that the graph itself uses")
    r = o.recipe
    parts = {n: t for n, t in zip(PARTS, r.inputs) if t is not None}
    inputs = {n: numbers[id(t)] for n, t in parts.items() if id(t) in numbers}
    if "weight" not in inputs:
        raise Unrecordable("logits of a weight that the graph computes")
    return Lazy(r.chain, r.normalised, r.scale, {n: add(t, (k, n)) for n, t in parts.items() if n not in inputs}, inputs)


def _memory(t: Tensor) -> int:
    """Where the tensor's storage is; a number of its own where it has none."""
    return t.untyped_storage().data_ptr() or -id(t)
