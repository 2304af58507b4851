"""What a rule is: a name, its math, how it is recognised, and samples written as a model author would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slothc.gradients.geometry import Access
from slothc.gradients.program import Program
from torch import fx

from .meaning import View


@dataclass(frozen=True)
class Miss:
    """Something that looked like ``rule`` and was left alone. Falsy; ``reason`` is for the report."""

    rule: str
    node: fx.Node
    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Match:
    """A structural find: the value of ``node`` (and of ``extra`` nodes) can be computed from ``inputs`` instead.

    ``nodes``: every node that the rewrite makes unnecessary, ``node`` included. ``inputs``: named operands (nodes, numbers or None).
    ``attrs``: static facts for the kernel family. ``count``: how many of this rule a reader of the model's source would count.
    """

    rule: str
    node: fx.Node
    nodes: tuple[fx.Node, ...]
    inputs: Mapping[str, Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    extra: tuple[fx.Node, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Sample:
    """A plain torch function and a maker of its float64 arguments: what the tests, ``derive`` and ``check`` run."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class StructuralRule:
    """A rule for what contains matmuls: finds its nodes by structure."""

    name: str
    math: str
    recognise: Callable[[View, fx.Node], Match | Miss | None]
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class RowRule:
    """A rule that names a lifted row program: ``identify(program, loads)`` evaluates it at random points and says whether it is this
    formula. ``loads`` are the program inputs' accesses (which of them read one tensor). Names decide counts, never kernels.
    """

    name: str
    math: str
    identify: Callable[[Program, Sequence[Access | None]], bool]
    samples: tuple[Sample, ...] = ()
