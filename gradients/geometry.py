"""Where a program's scalars live: affine index maps over named axes.

Every tensor dimension is addressed by a ``Form``, a sum of axis * coefficient plus a constant. Broadcasting is an axis that is
absent, a transpose an order of forms, a slice a constant, a split or merged dimension a mixed radix sum. Sizes and
coefficients are ints or sympy expressions over size symbols (dynamic shapes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import sympy as sp

Size: TypeAlias = int | sp.Expr


@dataclass(frozen=True)
class Axis:
    """One loop of the iteration space: ``name`` runs from 0 to ``size`` - 1."""

    name: str
    size: Size


@dataclass(frozen=True)
class Form:
    """const + sum of coefficient * axis; ``terms`` is sorted by axis name and holds no zero coefficient."""

    terms: tuple[tuple[str, Size], ...] = ()
    const: Size = 0

    @staticmethod
    def axis(name: str) -> Form:
        return Form(((name, 1),))

    @staticmethod
    def of(value: Size) -> Form:
        return Form((), value)

    def coefficient(self, axis: str) -> Size:
        return dict(self.terms).get(axis, 0)

    def __add__(self, other: Form | Size) -> Form:
        if not isinstance(other, Form):
            return Form(self.terms, self.const + other)
        total = dict(self.terms)
        for a, c in other.terms:
            total[a] = total.get(a, 0) + c
        return Form(tuple(sorted((a, c) for a, c in total.items() if c != 0)), self.const + other.const)

    def __mul__(self, factor: Size) -> Form:
        if factor == 0:
            return Form()
        return Form(tuple((a, c * factor) for a, c in self.terms), self.const * factor)

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(a for a, _ in self.terms)

    def __str__(self) -> str:
        parts = [a if c == 1 else f"{c}*{a}" for a, c in self.terms]
        return " + ".join(parts + ([str(self.const)] if self.const != 0 or not parts else []))


@dataclass(frozen=True)
class Access:
    """Element ``index`` of operand number ``tensor``: one form for each of its dimensions."""

    tensor: int
    index: tuple[Form, ...]

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(a for f in self.index for a in f.axes)

    def __str__(self) -> str:
        return f"#{self.tensor}[{', '.join(map(str, self.index))}]"
