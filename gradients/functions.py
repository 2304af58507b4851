"""The scalar functions a row program may use beyond sympy's own, each beside its derivative.

Every class is opaque to sympy's simplifier (no automatic rewriting), knows its derivative (``fdiff``) and its value at
floating-point arguments (``_eval_evalf``), so that the mpmath witness needs nothing else.
"""

from __future__ import annotations

import mpmath
import sympy as sp


class _Scalar(sp.Function):
    """A real scalar function; ``rule(*args)`` is its value at mpmath numbers."""

    is_real = True

    @staticmethod
    def rule(*args: mpmath.mpf) -> mpmath.mpf:
        raise NotImplementedError

    def _eval_evalf(self, prec: int) -> sp.Expr | None:
        if not all(a.is_number for a in self.args):
            return None
        with mpmath.workprec(prec + 10):
            return sp.Float(self.rule(*[mpmath.mpmathify(a.evalf(mpmath.mp.dps)) for a in self.args]), precision=prec)


class _Flat(_Scalar):
    """A step function: its derivative is zero wherever it exists."""

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sp.Integer(0)


class sigmoid(_Scalar):
    """1 / (1 + e^-x)."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return self * (1 - self)                                   # s' = s (1 - s)

    @staticmethod
    def rule(x: mpmath.mpf) -> mpmath.mpf:
        return 1 / (1 + mpmath.exp(-x))


class softplus(_Scalar):
    """log(1 + e^x)."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return sigmoid(self.args[0])

    @staticmethod
    def rule(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.log(1 + mpmath.exp(x))


class relu(_Scalar):
    """max(x, 0), derivative 0 at the kink, as in torch."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return gt(self.args[0], 0)

    @staticmethod
    def rule(x: mpmath.mpf) -> mpmath.mpf:
        return max(x, mpmath.mpf(0))


class absolute(_Scalar):
    """|x|, derivative 0 at the kink, as in torch."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        return signum(self.args[0])

    @staticmethod
    def rule(x: mpmath.mpf) -> mpmath.mpf:
        return abs(x)


class signum(_Flat):
    """-1, 0 or 1."""

    nargs = 1

    @staticmethod
    def rule(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.sign(x)


class gt(_Flat):
    """1 where a > b, else 0."""

    nargs = 2

    @staticmethod
    def rule(a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
        return mpmath.mpf(a > b)


class ge(_Flat):
    """1 where a >= b, else 0."""

    nargs = 2

    @staticmethod
    def rule(a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
        return mpmath.mpf(a >= b)


class eq(_Flat):
    """1 where a == b, else 0."""

    nargs = 2

    @staticmethod
    def rule(a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
        return mpmath.mpf(a == b)


class floor(_Flat):
    """The largest integer not above x."""

    nargs = 1

    @staticmethod
    def rule(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.floor(x)


class select(_Scalar):
    """a where c is not 0, else b."""

    nargs = 3

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        c = self.args[0]
        if argindex == 1:
            return sp.Integer(0)
        return select(c, 1, 0) if argindex == 2 else select(c, 0, 1)

    @staticmethod
    def rule(c: mpmath.mpf, a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
        return a if c != 0 else b


class maximum(_Scalar):
    """max(a, b); a tie gives each side half, as in torch."""

    nargs = 2

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        a, b = self.args
        return (gt(a, b) + ge(a, b)) / 2 if argindex == 1 else (gt(b, a) + ge(b, a)) / 2

    @staticmethod
    def rule(a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
        return max(a, b)


class minimum(_Scalar):
    """min(a, b); a tie gives each side half, as in torch."""

    nargs = 2

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        a, b = self.args
        return (gt(b, a) + ge(b, a)) / 2 if argindex == 1 else (gt(a, b) + ge(a, b)) / 2

    @staticmethod
    def rule(a: mpmath.mpf, b: mpmath.mpf) -> mpmath.mpf:
        return min(a, b)


class clip(_Scalar):
    """x limited to [lo, hi]; the gradient passes on the closed interval, as in torch.clamp with numbers."""

    nargs = 3

    def fdiff(self, argindex: int = 1) -> sp.Expr:
        x, lo, hi = self.args
        return ge(x, lo) * ge(hi, x) if argindex == 1 else sp.Integer(0)

    @staticmethod
    def rule(x: mpmath.mpf, lo: mpmath.mpf, hi: mpmath.mpf) -> mpmath.mpf:
        return min(max(x, lo), hi)


VOCABULARY: tuple[type[sp.Function], ...] = (
    sigmoid, softplus, relu, absolute, signum, gt, ge, eq, floor, select, maximum, minimum, clip,
)
