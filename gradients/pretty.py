"""Programs, passes and plans as a reader would write them: plain text and LaTeX.

Equations that are read once are written where they are read, so that a norm is one line:
``y = w * x * rsqrt(mean(x^2) + eps)``. A rounding point is ``bf16(...)``, a sum over the number of lanes ``mean(...)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy as sp
from sympy.printing.latex import LatexPrinter
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from .functions import VOCABULARY
from .plan import Pass, Plan
from .program import Kind, Program, Reduce, symbol

WIDTH = 100
SUMMED = r"\sum_t "
RANK = {"row": 0, "scalar": 1, "column": 2, "const": 3}


class _Over(sp.Function):
    """A reduction inside an expression: _Over(tag, body), opaque to sympy."""

    is_real = True
    nargs = 2


class _Round(sp.Function):
    """A rounding point inside an expression: _Round(tag, value)."""

    is_real = True
    nargs = 2


@dataclass(frozen=True)
class Equation:
    """``name = value``, where reductions and rounding points are functions inside ``value``."""

    name: str
    value: sp.Expr


def equations(program: Program, size: int | None = None, name_scalars: bool = False) -> list[Equation]:
    """The program with single-use, unrounded stages inlined; with ``name_scalars`` every reduction keeps its own line.

    ``size`` is the number of lanes where means are written with it as a literal.
    """
    uses = _uses(program)
    sizes = [symbol(i.name) for i in program.inputs if i.role == "size"] + ([sp.Integer(size)] if size else [])
    shown = {o.value: o.name for o in program.outputs}
    known: dict[sp.Symbol, sp.Expr] = {}
    lines: list[Equation] = []
    for s in program.stages:
        body = s.expr.xreplace(known)
        value = _reduction(s.value.op, body, sizes) if isinstance(s.value, Reduce) else _means(body, sizes)
        if s.dtype:
            value = _Round(sp.Symbol(s.dtype), value)
        named = name_scalars and isinstance(s.value, Reduce)
        if s.name not in shown and uses.get(s.name, 0) == 1 and not named:
            known[symbol(s.name)] = value
        else:
            lines.append(Equation(s.name, value))
    alias = [Equation(o.name, symbol(o.value).xreplace(known)) for o in program.outputs if o.name != o.value]
    return [e for e in lines + alias if e.value != symbol(e.name)]


def _uses(program: Program) -> dict[str, int]:
    uses: dict[str, int] = {}
    for s in program.stages:
        for x in s.expr.free_symbols:
            uses[x.name] = uses.get(x.name, 0) + int(s.expr.count(x))
    return uses


def _reduction(op: str, body: sp.Expr, sizes: Iterable[sp.Expr]) -> sp.Expr:
    if op == "sum" and body.could_extract_minus_sign() and body.is_Mul:
        return -_reduction(op, -body, sizes)
    for n in sizes if op == "sum" else ():
        rest = body * n
        if _divides(body, n) and not (n.is_Symbol and rest.has(n)):
            return _Over(sp.Symbol("mean"), rest)
    return _Over(sp.Symbol(op), body)


def _divides(term: sp.Expr, n: sp.Expr) -> bool:
    """Is 1/n a factor of ``term``?"""
    if n.is_Symbol:
        return 1 / n in sp.Mul.make_args(term)
    return any(f.is_Rational and f.q == n for f in sp.Mul.make_args(term)) and n > 4


def _means(expr: sp.Expr, sizes: Iterable[sp.Expr]) -> sp.Expr:
    """Every sum(...)/N in ``expr`` as mean(...)."""
    total = sp.Symbol("sum")
    for n in sizes:

        def is_mean(e: sp.Expr, n: sp.Expr = n) -> bool:
            return e.is_Mul and _divides(e, n) and any(isinstance(a, _Over) and a.args[0] == total for a in e.args)

        def to_mean(e: sp.Expr, n: sp.Expr = n) -> sp.Expr:
            first = next(a for a in e.args if isinstance(a, _Over) and a.args[0] == total)
            return e * n / first * _Over(sp.Symbol("mean"), first.args[1])

        expr = expr.replace(is_mean, to_mean)
    return expr


def _decimal(n: sp.Rational) -> bool:
    """Is n best read as a decimal: 0.044715, not 8943/200000?"""
    return (
        n.q >= 20
        and abs(n.p) != 1
        and set(sp.factorint(n.q)) <= {2, 5}
        and float(f"{float(n):.12g}") == float(n)
        and len(f"{float(n):.12g}") < 10
    )


class _Text(StrPrinter):
    """``*`` spaced, ``^`` for powers, rsqrt and sqrt by name, terms that vary most first."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        super().__init__()
        self.kinds = kinds

    def _rank(self, e: sp.Expr) -> int:
        return min((RANK[str(self.kinds[s.name])] for s in e.free_symbols if s.name in self.kinds), default=4)

    def _print_Add(self, expr: sp.Add, order: object = None) -> str:
        terms = sorted(expr.args, key=lambda t: (t.could_extract_minus_sign(), self._rank(t), -sp.count_ops(t), str(t)))
        text = ""
        for t in terms:
            minus = t.could_extract_minus_sign()
            part = self.parenthesize(-t if minus else t, PRECEDENCE["Add"] + (1 if minus else 0))
            text += (f" - {part}" if minus else f" + {part}") if text else (f"-{part}" if minus else part)
        return text

    def _print_Mul(self, expr: sp.Mul) -> str:
        if expr.could_extract_minus_sign():
            return "-" + self.parenthesize(-expr, PRECEDENCE["Mul"])
        above, below = [], []
        for f in expr.args:
            if f.is_Rational and _decimal(f):
                above.append(f)
            elif f.is_Rational:
                above += [sp.Integer(f.p)] if f.p != 1 else []
                below += [sp.Integer(f.q)] if f.q != 1 else []
            elif f.is_Pow and f.exp.is_Integer and f.exp < 0:
                below.append(1 / f)
            else:
                above.append(f)
        top = " * ".join(self._factor(f) for f in sorted(above, key=self._place)) or "1"
        bottom = "".join(f" / {self._factor(f)}" for f in sorted(below, key=self._place))
        return top + bottom

    def _factor(self, f: sp.Expr) -> str:
        return f"({self._print(f)})" if f.is_Add or f.is_Mul else self._print(f)

    def _place(self, f: sp.Expr) -> tuple[bool, bool, bool, int, str]:
        return not f.is_Number, not f.is_Symbol, f.is_Add, int(sp.count_ops(f)), str(f)

    def _print_Pow(self, expr: sp.Pow, rational: bool = False) -> str:
        base, e = expr.base, expr.exp
        if e == sp.Rational(1, 2):
            return f"sqrt({self._print(base)})"
        if e.is_Rational and e.q == 2 and e < 0:
            power = "" if e == sp.Rational(-1, 2) else f"^{-e.p}"
            return f"rsqrt({self._print(base)}){power}"
        if e.is_Integer and e < 0:
            return f"1 / {self._factor(base**-e)}"
        return f"{self.parenthesize(base, PRECEDENCE['Pow'] + 1)}^{self.parenthesize(e, PRECEDENCE['Pow'])}"

    def _print_Rational(self, expr: sp.Rational) -> str:
        return f"{float(expr):.12g}" if _decimal(expr) else f"{expr.p}/{expr.q}"

    def _print_exp(self, expr: sp.exp) -> str:
        return f"exp({self._print(expr.args[0])})"

    def _print_Float(self, expr: sp.Float) -> str:
        return f"{float(expr):.12g}"

    def _print__Over(self, expr: _Over) -> str:
        return f"{expr.args[0].name}({self._print(expr.args[1])})"

    _print__Round = _print__Over

    def _print_absolute(self, expr: sp.Function) -> str:
        return f"|{self._print(expr.args[0])}|"

    def _comparison(self, expr: sp.Function) -> str:
        sign = {"gt": ">", "ge": "≥", "eq": "="}[type(expr).__name__]
        return f"[{self._print(expr.args[0])} {sign} {self._print(expr.args[1])}]"

    _print_gt = _print_ge = _print_eq = _comparison


class _Latex(LatexPrinter):
    """Elements carry their indices: t for the row, i for the lane, the next letter inside each reduction."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        super().__init__({"mul_symbol": " "})
        self.kinds, self.lane = kinds, 0

    def _print_Symbol(self, expr: sp.Symbol, style: str = "plain") -> str:
        kind = self.kinds.get(expr.name, Kind(False, False))
        index = ("t" if kind.rows else "") + ("ijkl"[min(self.lane, 3)] if kind.lanes else "")
        letter = {"eps": r"\varepsilon"}.get(expr.name)
        stem = letter or (expr.name if len(expr.name) == 1 else "\\mathrm{" + expr.name.replace("_", "\\_") + "}")
        return f"{stem}_{{{index}}}" if index else stem

    def _print__Over(self, expr: _Over, exp: str | None = None) -> str:
        self.lane += 1
        letter, body = "ijkl"[min(self.lane, 3)], expr.args[1]
        text = self.parenthesize(body, PRECEDENCE["Mul"])
        self.lane -= 1
        head = {
            "sum": rf"\sum_{letter}",
            "mean": rf"\frac{{1}}{{N}}\sum_{letter}",
            "max": rf"\max_{letter}",
            "logsumexp": rf"\log\sum_{letter}\exp",
        }[expr.args[0].name]
        whole = rf"{head} {text}" if expr.args[0].name != "logsumexp" else rf"{head}\left({self._inner(body)}\right)"
        return (
            rf"\left({whole}\right)^{{{exp}}}"
            if exp
            else rf"\left({whole}\right)"
            if expr.args[0].name != "max"
            else whole
        )

    def _inner(self, body: sp.Expr) -> str:
        self.lane += 1
        text = self._print(body)
        self.lane -= 1
        return text

    def _print__Round(self, expr: _Round, exp: str | None = None) -> str:
        whole = rf"\mathrm{{{expr.args[0].name}}}\left({self._print(expr.args[1])}\right)"
        return f"{whole}^{{{exp}}}" if exp else whole

    def _named(self, expr: sp.Function, exp: str | None = None) -> str:
        args = ", ".join(self._print(a) for a in expr.args)
        name = {"sigmoid": r"\sigma", "absolute": "abs", "signum": "sign"}.get(type(expr).__name__, type(expr).__name__)
        head = name if name.startswith("\\") else rf"\operatorname{{{name}}}"
        return rf"{head}{f'^{{{exp}}}' if exp else ''}\left({args}\right)"


for _f in VOCABULARY:
    setattr(_Latex, f"_print_{_f.__name__}", _Latex._named)


def _kinds(program: Program) -> dict[str, Kind]:
    return {**{o.name: program.out_kind(o) for o in program.outputs}, **program.kinds}


def _wrapped(line: str, width: int = WIDTH) -> list[str]:
    """``line`` broken before operators outside function arguments where possible, continuation lines indented."""
    lines = []
    indent = " " * (line.index(" = ") + 3 if " = " in line[:30] else 4)
    while len(line) > width:
        best, depth, level = 0, 0, 99
        for k, ch in enumerate(line[:width]):
            depth += (ch in "([") - (ch in ")]")
            if (
                k > len(indent)
                and line[k : k + 3] in (" + ", " - ", " * ", " / ")
                and (depth < level or (depth == level and k > best))
            ):
                best, level = k, depth
        if not best:
            break
        lines.append(line[:best])
        line = indent + line[best + 1 :]
    return [*lines, line]


def formula(program: Program | Pass, *, name_scalars: bool = False) -> str:
    """The equations of a program as plain text, one a line, about 100 columns wide; outputs summed over rows say so."""
    program, size = (program.program, _literal(program)) if isinstance(program, Pass) else (program, None)
    printer, summed = _Text(_kinds(program)), {o.value for o in program.outputs if o.over_rows}
    lines: list[str] = []
    for e in equations(program, size, name_scalars):
        text = printer.doprint(e.value)
        lines += _wrapped(f"{e.name} = {f'sum_rows({text})' if e.name in summed else text}")
    return "\n".join(lines)


def latex(program: Program | Pass, *, name_scalars: bool = False) -> str:
    """The equations as a LaTeX ``aligned`` block."""
    program, size = (program.program, _literal(program)) if isinstance(program, Pass) else (program, None)
    kinds = _kinds(program)
    printer, lines = _Latex(kinds), []
    summed = {o.value: o for o in program.outputs if o.over_rows}
    for e in equations(program, size, name_scalars):
        right = printer.doprint(e.value)
        left_kind = Kind(False, kinds[e.name].lanes) if e.name in summed else kinds[e.name]
        left = _Latex({e.name: left_kind}).doprint(symbol(e.name))
        lines.append(f"{left} &= {SUMMED if e.name in summed else ''}{right}")
    return "\\begin{aligned}\n" + " \\\\\n".join(lines) + "\n\\end{aligned}"


def _literal(p: Pass) -> int | None:
    return int(p.lane.size) if isinstance(p.lane.size, int) or getattr(p.lane.size, "is_Integer", False) else None


def describe(plan: Plan) -> str:
    """Forward, what is saved, and the derived backward of a plan, as text."""
    operands = [operand_names(plan.forward, k) for k in plan.saved_operands]
    lines = ["forward", *_indented(formula(plan.forward)), "saved", f"  operands: {', '.join(operands) or 'none'}"]
    lines += [f"  values:   {', '.join(plan.saved_values) or 'none'}"]
    if plan.backward is None:
        return "\n".join([*lines, "backward", "  none: no operand is differentiable"])
    return "\n".join([*lines, "backward", *_indented(formula(plan.backward, name_scalars=True))])


def operand_names(p: Pass, number: int) -> str:
    """The names of the inputs that read operand ``number``, and its storage."""
    names = [i.name for i, a in zip(p.program.inputs, p.loads, strict=True) if a is not None and a.tensor == number]
    return f"{' and '.join(names) or f'operand {number}'} ({p.reads[number].dtype})"


def _indented(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]
