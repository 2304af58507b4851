"""Complex values as pairs of scalars, so that a rotation by multiplication is the same equations as any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp


@dataclass(frozen=True)
class Pair:
    """re + i im."""

    re: sp.Expr
    im: sp.Expr

    @staticmethod
    def of(value: Pair | sp.Expr) -> Pair:
        return value if isinstance(value, Pair) else Pair(value, sp.Integer(0))

    def __add__(self, other: Pair | sp.Expr) -> Pair:
        other = Pair.of(other)
        return Pair(self.re + other.re, self.im + other.im)

    def __sub__(self, other: Pair | sp.Expr) -> Pair:
        other = Pair.of(other)
        return Pair(self.re - other.re, self.im - other.im)

    def __mul__(self, other: Pair | sp.Expr) -> Pair:
        other = Pair.of(other)
        return Pair(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)

    def __neg__(self) -> Pair:
        return Pair(-self.re, -self.im)


COMPLEX: dict[str, Callable[..., Pair]] = {"add": Pair.__add__, "sub": Pair.__sub__, "mul": Pair.__mul__, "neg": Pair.__neg__}
