"""Repeated key and value heads: ``out[b, h, s, d] = source[b, h // n, s, d]``, in whatever layout operations it is
written.

The layout nodes are run on a tensor that holds its own element numbers. Where that is a repetition at two different
assignments of the symbolic sizes, it is one: layout operations move elements without looking at them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy as sp
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from .mask import Facts, name

KINDS = frozenset(("reshape", "permute", "expand", "index", "cat", "stack", "repeat_interleave", "repeat", "identity"))
NAMES = frozenset(("repeat", "tile", "broadcast_to", "flatten", "unflatten", "repeat_interleave"))  # where opaque
PRIMES = ((5, 7, 11, 13, 17, 19, 23), (7, 13, 5, 17, 11, 23, 19))


@dataclass(frozen=True)
class Repeat:
    """``n`` adjacent heads read head ``h // n`` of ``source``; ``swapped`` when the source is laid out [batch,
    length, head, dim].

    ``nodes``: the layout nodes between, last one first.
    """

    source: fx.Node
    n: int
    swapped: bool
    nodes: tuple[fx.Node, ...]


def repeated(view: Facts, node: fx.Node) -> Repeat | None:
    """The repetition behind ``node``, a [batch, head, length, dim] value, if there is one."""
    chain: list[fx.Node] = []
    while (source := _layout_of(view, node)) is not None:
        chain.append(node)
        if view.value(source).dim() == 4:
            found = _agreed(view, source, chain)
            if found is not None:
                return Repeat(source, *found, tuple(chain))
        node = source
    return None


def _layout_of(view: Facts, node: fx.Node) -> fx.Node | None:
    """The one tensor that ``node`` rearranges; None for anything but a layout operation."""
    kind = view.op(node).kind
    if node.op not in ("call_function", "call_method") or not (
        kind in KINDS or (kind == "opaque" and name(node) in NAMES)
    ):
        return None
    tensors = [n for n in node.all_input_nodes if isinstance(view.example(n), torch.Tensor)]
    if len(tensors) != 1 or view.value(tensors[0]).dtype != view.value(node).dtype:
        return None
    return tensors[0]


def _agreed(view: Facts, source: fx.Node, chain: list[fx.Node]) -> tuple[int, bool] | None:
    """(n, swapped) where the chain repeats ``source``'s heads at two assignments of the sizes."""
    symbols = sorted(_symbols(view, [source, *chain]), key=str)
    if len(symbols) > len(PRIMES[0]):
        return None
    found = []
    for primes in PRIMES:
        sizes = dict(zip(symbols, primes))
        steps = tuple(_step(view, node, sizes) for node in reversed(chain))
        shape = tuple(_number(size, sizes) for size in view.value(source).shape)
        if any(step is None for step in steps) or None in shape:
            return None
        found.append(_repetition(shape, steps))
    return found[0] if found[0] == found[1] else None


def _symbols(view: Facts, nodes: list[fx.Node]) -> set[sp.Symbol]:
    """The size symbols in the shapes and arguments of ``nodes``."""
    values: list[Any] = []
    for node in nodes:
        values += view.value(node).shape
        values += [view.example(n) for n in node.all_input_nodes]
        fx.node.map_aggregate((node.args, dict(node.kwargs)), values.append)
    values += [size for value in values if isinstance(value, torch.Size) for size in value]
    return {s for value in values if isinstance(value, torch.SymInt) for s in value.node.expr.free_symbols}


@dataclass(frozen=True)
class _Step:
    """One layout call with its sizes as numbers; ``text`` tells steps apart, INPUT stands for the tensor."""

    text: str
    target: Any
    args: Any

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Step) and self.text == other.text

    def run(self, tensor: torch.Tensor) -> torch.Tensor:
        args, kwargs = fx.node.map_aggregate(self.args, lambda a: tensor if a is INPUT else a)
        return (
            getattr(args[0], self.target)(*args[1:], **kwargs)
            if isinstance(self.target, str)
            else self.target(*args, **kwargs)
        )


class _Input:
    def __repr__(self) -> str:
        return "INPUT"


INPUT = _Input()


def _step(view: Facts, node: fx.Node, sizes: Mapping[sp.Symbol, int]) -> _Step | None:
    """``node`` as a step, or None where a size in its arguments has no number."""
    numbers: list[int | None] = []

    def number(value: Any) -> Any:
        example = view.example(value) if isinstance(value, fx.Node) else value
        if isinstance(example, torch.Tensor):
            return INPUT
        if isinstance(example, (tuple, list)):
            return tuple(number(item) for item in example)
        if isinstance(example, torch.SymInt):
            numbers.append(_number(example, sizes))
            return numbers[-1]
        return example

    args = fx.node.map_aggregate((node.args, dict(node.kwargs)), number)
    return None if None in numbers else _Step(f"{name(node)}{args!r}", node.target, args)


def _number(size: Any, sizes: Mapping[sp.Symbol, int]) -> int | None:
    """A size with its symbols replaced."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    value = size.node.expr.subs(sizes)
    return int(value) if value.is_Integer else None


@lru_cache(maxsize=256)
def _repetition(shape: tuple[int, ...], steps: tuple[_Step, ...]) -> tuple[int, bool] | None:
    """(n, swapped) where ``steps`` repeat the heads of a tensor of this shape."""
    with _disable_current_modes():
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device="cpu").view(shape)
        try:
            result = numbers
            for step in steps:
                result = step.run(result)
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
            return None
        for swapped in (False, True):
            heads = numbers.transpose(1, 2) if swapped else numbers
            n = (
                result.shape[1] // max(heads.shape[1], 1)
                if isinstance(result, torch.Tensor) and result.dim() == 4
                else 0
            )
            if n > 1 and result.numel() and torch.equal(result, heads.repeat_interleave(n, 1)):
                return n, swapped
    return None
