"""Terms of a sum over a row that are zero by how the forward made them: sum(x - sum(x)/n) = 0.

A mean's part in a backward is such a term. Without it layer_norm's second sum does not wait for its first, and what is exactly zero
costs no rounding. Only terms go; what stays is summed as it was, so that nothing cancels that did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import sympy as sp

from .program import Kind, Program, Reduce, Stage, symbol
from .reverse import without_aliases

LONGEST = 100         # operations of a term that is looked at, and of what an equation stands for: chains of them may double at every step


def without_zero_sums(backward: Program, forward: Program, sizes: Mapping[str, sp.Expr], lanes: sp.Expr) -> Program:
    """``backward`` with the terms of its sums over rows gone that are zero. ``sizes``: the size inputs, ``lanes``: a row's length."""
    totals = _Totals(backward, forward, {symbol(n): sp.sympify(e) for n, e in sizes.items()}, sp.sympify(lanes))
    stages = tuple(totals.without(s) if isinstance(s.value, Reduce) and s.value.op == "sum" else s for s in backward.stages)
    return backward if stages == backward.stages else without_aliases(replace(backward, stages=stages))


class _Totals:
    def __init__(self, backward: Program, forward: Program, sizes: Mapping[sp.Expr, sp.Expr], lanes: sp.Expr) -> None:
        self.kinds: dict[str, Kind] = {**forward.kinds, **backward.kinds}
        stages = [s for s in {s.name: s for s in (*forward.stages, *backward.stages)}.values() if s.dtype is None and not s.detached]
        self.equations = {symbol(s.name): s.value for s in stages if not isinstance(s.value, Reduce)}
        self.sizes, self.lanes = sizes, lanes
        self.lengths: dict[sp.Symbol, int] = {}
        sums = [(s, *self._parts(self._open(s.expr, True))) for s in stages if isinstance(s.value, Reduce) and s.value.op == "sum"]
        self.sums = {f: symbol(s.name) / c for s, c, f in sums if f != 1 and c != 0 and c.free_symbols <= sizes.keys()}

    def without(self, stage: Stage) -> Stage:
        kept = self._kept(stage.expr)
        if kept == stage.expr:
            return stage
        return replace(stage, value=Reduce("sum", kept) if kept != 0 else kept)

    def _kept(self, expr: sp.Expr) -> sp.Expr:
        """``expr`` without the terms that vanish; a sum that stands for a symbol is looked into."""
        return sp.Add(*(t for term in sp.Add.make_args(expr) if (t := self._left(term)) != 0))

    def _left(self, term: sp.Expr) -> sp.Expr:
        if self._vanishes(term):
            return sp.Integer(0)
        factor, value = self._parts(term)
        within = self.equations.get(value)
        if within is None or not within.is_Add:
            return term
        kept = self._kept(sp.Add(*(factor * t for t in within.args)))
        return kept if len(sp.Add.make_args(kept)) < len(within.args) else term

    def _vanishes(self, term: sp.Expr) -> bool:
        """Whether the sum over the lanes is zero for every row."""
        opened = self._open(term, True)
        if not opened.has(sp.Add) or sp.count_ops(opened) > LONGEST:       # one product is zero for no reason that is seen here
            return False
        total = sp.Add(*(c * (self.lanes if f == 1 else self.sums.get(f, sp.Dummy())) for c, f in self._terms(opened)))
        total = self._open(total, False).xreplace(self.sizes)
        return bool(sp.count_ops(total) <= LONGEST and sp.expand_mul(total) == 0)

    def _open(self, expr: sp.Expr, lanes: bool) -> sp.Expr:
        """``expr`` with the equations of its symbols in their place, as far as these have lanes, or have none."""
        while found := {s: self.equations[s] for s in self._of(expr.free_symbols, lanes)}:
            expr = expr.xreplace(found)
        return expr

    def _of(self, symbols: Iterable[sp.Symbol], lanes: bool) -> list[sp.Symbol]:
        return [s for s in symbols if s in self.equations and self.kinds[s.name].lanes == lanes and self._length(s) <= LONGEST]

    def _length(self, e: sp.Expr) -> int:
        """Nodes of an expression with all equations in their places, counted as often as they stand there."""
        if e not in self.equations:
            return 1 + sum(self._length(a) for a in e.args)
        if e not in self.lengths:
            self.lengths[e] = self._length(self.equations[e])
        return self.lengths[e]

    def _terms(self, expr: sp.Expr) -> list[tuple[sp.Expr, sp.Expr]]:
        return [self._parts(t) for t in sp.Add.make_args(sp.expand_mul(expr))]

    def _parts(self, term: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
        """A product as (what no lane changes, what has lanes)."""
        factors = sp.Mul.make_args(term)
        lanes = [f for f in factors if any(self.kinds[s.name].lanes for s in f.free_symbols)]
        return sp.Mul(*(f for f in factors if f not in lanes)), sp.Mul(*lanes)
