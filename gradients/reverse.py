"""Reverse mode over the stages of a row program.

For a stage v = f(u, ...), every argument receives ``adj(u) += adj(v) * df/du`` with df/du from ``sympy.diff``. A reduction's adjoint
broadcasts over the lanes; a value without lanes sums what it receives over the lanes; a value without rows (a column vector)
is summed over all rows when it is stored. A rounding point is the identity to the derivative.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_

import sympy as sp

from .functions import eq
from .program import CONST, Input, Kind, Output, Program, Reduce, Stage, symbol


class NotDifferentiable(ValueError):
    """A stage has no derivative that sympy or the vocabulary knows."""


def derive(program: Program, wrt: Sequence[str] | None = None) -> Program:
    """The backward of ``program`` for the inputs ``wrt`` (default: every differentiable one).

    The result reads the forward's inputs and one cotangent ``g_<output>`` for each output, recomputes the forward stages it needs
    under their own names, and writes ``d_<input>`` in the input's dtype. Raises ``NotDifferentiable``.
    """
    wrt = [i.name for i in program.inputs if i.differentiable] if wrt is None else list(wrt)
    unknown = set(wrt) - set(program.input)
    if unknown:
        raise ValueError(f"cannot differentiate with respect to {sorted(unknown)}: the inputs are {sorted(program.input)}")
    return _Reverse(program, wrt).run()


class _Reverse:
    def __init__(self, program: Program, wrt: list[str]) -> None:
        self.program, self.wrt = program, wrt
        self.kinds: dict[str, Kind] = dict(program.kinds)
        self.active = self._active()
        self.stages: list[Stage] = []
        self.terms: dict[str, list[sp.Expr]] = {}
        self.cotangents: list[Input] = []

    def _active(self) -> set[str]:
        """Every value that some input in ``wrt`` reaches."""
        active = set(self.wrt)
        for stage in self.program.stages:
            if not stage.detached and active & {s.name for s in stage.expr.free_symbols}:
                active.add(stage.name)
        return active

    def run(self) -> Program:
        kinds = [self.program.out_kind(out) for out in self.program.outputs]
        if any(k.rows for k in kinds) and not all(k.rows for k in kinds):
            raise NotDifferentiable("a result without rows beside results with rows: its cotangent would count once for every row")
        for out in self.program.outputs:
            cotangent = Input(f"g_{out.name}", self.program.out_kind(out), out.dtype, differentiable=False)
            self.cotangents.append(cotangent)
            self.kinds[cotangent.name] = cotangent.kind
            self.terms.setdefault(out.value, []).append(symbol(cotangent.name))
        for stage in reversed(self.program.stages):
            if stage.name in self.terms and stage.name in self.active:
                self._visit(stage)
        outputs = tuple(self._gradient(self.program.input[name]) for name in self.wrt)
        whole = Program((*self.program.inputs, *self.cotangents), (*self.program.stages, *self.stages), outputs)
        return without_aliases(whole.pruned())

    def _kind(self, expr: sp.Expr) -> Kind:
        return _union(self.kinds[s.name] for s in expr.free_symbols)

    def _define(self, name: str, value: sp.Expr | Reduce) -> sp.Symbol:
        kind = self._kind(value.body if isinstance(value, Reduce) else value)
        self.kinds[name] = Kind(kind.rows, False) if isinstance(value, Reduce) else kind
        self.stages.append(Stage(name, value))
        return symbol(name)

    def _total(self, name: str, lanes: bool) -> sp.Expr:
        """Everything that ``name`` received; what varies with the lanes is summed over them if ``name`` itself does not."""
        terms = self.terms.pop(name, [])
        if lanes:
            return sp.Add(*terms)
        wide = sp.Add(*[t for t in terms if self._kind(t).lanes])
        narrow = sp.Add(*[t for t in terms if not self._kind(t).lanes])
        return narrow + self._define(f"s_{name}", Reduce("sum", wide)) if wide != 0 else narrow

    def _visit(self, stage: Stage) -> None:
        total = self._total(stage.name, self.kinds[stage.name].lanes)
        if total == 0:
            return
        if not total.is_Symbol:
            total = self._define(f"a_{stage.name}", total)
        body = stage.expr
        wide = isinstance(stage.value, Reduce) or self._kind(body).lanes
        if isinstance(stage.value, Reduce):
            total = total * self._slope(stage.name, stage.value)
        for s in sorted(body.free_symbols, key=lambda s: s.name):
            if s.name in self.active:
                term = total * self._partial(body, s)
                if wide and not self.kinds[s.name].lanes and not self._kind(term).lanes and term != 0:
                    term = self._define(f"n_{stage.name}_{s.name}", Reduce("sum", term))     # the same in every lane: N times it
                if term != 0:
                    self.terms.setdefault(s.name, []).append(term)

    def _slope(self, name: str, value: Reduce) -> sp.Expr:
        """d reduction / d body, lane by lane."""
        if value.op == "sum":
            return sp.Integer(1)
        if value.op == "logsumexp":
            return sp.exp(value.body - symbol(name))                      # d lse / d z_i = e^(z_i - lse)
        hit = eq(value.body, symbol(name))                                # d max / d z_i = [z_i = max] / number of ties
        return hit / self._define(f"ties_{name}", Reduce("sum", hit))

    @staticmethod
    def _partial(body: sp.Expr, s: sp.Symbol) -> sp.Expr:
        partial = sp.diff(body, s)
        if partial.has(sp.Derivative, sp.Subs):
            raise NotDifferentiable(f"no derivative is known for {body} by {s}")
        return partial

    def _gradient(self, source: Input) -> Output:
        total = self._total(source.name, source.kind.lanes)
        name = f"d_{source.name}"
        self._define(name, sp.sympify(total))
        return Output(name, name, source.dtype, over_rows=not source.kind.rows, kind=source.kind if source.kind.rows else None)


def _union(kinds: Iterable[Kind]) -> Kind:
    return reduce(or_, kinds, CONST)


def without_aliases(program: Program) -> Program:
    """The same program without stages that only rename a value or hold a number.

    Nothing else is merged: sympy reorders sums and distributes numbers over them (-1e4 * (1 - b) becomes 1e4 b - 1e4), which costs digits.
    One stage for each of the model's operations keeps its order of evaluation.
    """
    known: dict[sp.Symbol, sp.Expr] = {}
    kept: list[Stage] = []
    results = {out.value for out in program.outputs}
    for stage in program.stages:
        value = stage.value
        if isinstance(value, Reduce):
            value = Reduce(value.op, value.body.xreplace(known))
        else:
            value = value.xreplace(known)
            plain = value.is_Symbol or value.is_number
            if plain and stage.dtype is None and not stage.detached and stage.name not in results:
                known[symbol(stage.name)] = value
                continue
        kept.append(Stage(stage.name, value, stage.dtype, stage.detached))
    return Program(program.inputs, tuple(kept), program.outputs).pruned()
