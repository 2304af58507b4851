"""Matrix calculus: gradients of sums of matrix products, and the cheapest products that make them.

The forward is a sympy matrix expression Y of ``MatrixSymbol`` operands (sums, products, transposes, scalar factors,
and vectors of ones for broadcasts). With G the gradient of Y, the gradient of an operand Z is d Trace(G' Y) / dZ,
which sympy differentiates. Three things then turn formulas into a program of few products:

- *association*: each chain of factors is multiplied in the order that costs the fewest FLOPs (2 m k n for [m, k] [k,
  n]), found by dynamic programming over the chain for given sizes;
- *sharing*: a product that is already known, or whose transpose is, costs nothing and is not made again;
- *order*: a sum adds its cheapest product first, so that the dearest one can accumulate onto the rest and round once.

For a low-rank adapter of rank r the choice depends on no size as long as r (K + N) <= K N: (G B) A beats G (B A) then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import sympy as sp

ONES = "1"
SIZES = {"M": 4096, "K": 4096, "N": 4096, "r": 16}


@dataclass(frozen=True)
class Factor:
    """An operand or an intermediate, or its transpose; ``ONES`` is the column of ones, one for each row of Y."""

    name: str
    transposed: bool = False

    @property
    def t(self) -> Factor:
        return Factor(self.name, not self.transposed)

    def __str__(self) -> str:
        return self.name + ("'" if self.transposed else "")


Pair = tuple[Factor, Factor]


@dataclass(frozen=True)
class Term:
    """coefficient * left @ right (or only left); the coefficient is an expression in the plan's scalars."""

    coefficient: sp.Expr
    left: Factor
    right: Factor | None = None

    @property
    def factors(self) -> tuple[Factor, ...]:
        return (self.left,) if self.right is None else (self.left, self.right)

    def __str__(self) -> str:
        product = " ".join(map(str, self.factors))
        return product if self.coefficient == 1 else f"{sp.sstr(self.coefficient)} {product}"


@dataclass(frozen=True)
class Step:
    """name = sum of terms, of shape ``rows`` x ``cols``; terms are in the order to add them, cheapest first."""

    name: str
    rows: sp.Expr
    cols: sp.Expr
    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return f"{self.name} = {' + '.join(map(str, self.terms))}"


@dataclass(frozen=True)
class MatrixPlan:
    """What to multiply, in order. ``forward`` ends with Y; ``backward`` starts from G and makes the gradients.

    ``gradients``: (operand, step that is its gradient). ``saved``: forward intermediates that the backward reads.
    ``shapes``: rows and columns of every operand and step; ``rows`` is the row size of Y, the one summed over by
    gradients of weights.
    """

    expression: sp.MatrixExpr
    formulas: tuple[tuple[str, sp.MatrixExpr], ...]
    scalars: tuple[str, ...]
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    gradients: tuple[tuple[str, str], ...]
    saved: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[sp.Expr, sp.Expr]], ...]

    @cached_property
    def rows(self) -> sp.Expr:
        return self.expression.shape[0]

    @cached_property
    def shape(self) -> dict[str, tuple[sp.Expr, sp.Expr]]:
        return dict(self.shapes)

    def inner(self, term: Term) -> sp.Expr:
        """The size that the term's product sums over."""
        return _shape(term.left, self.shape)[1]

    def backward_for(self, operands: Iterable[str]) -> tuple[Step, ...]:
        """The backward steps that the gradients of ``operands`` need."""
        wanted = {dict(self.gradients)[o] for o in operands}
        return _needed(self.backward, wanted)

    def evaluate(self, values: Mapping[str, sp.MatrixBase], scalars: Mapping[str, sp.Expr]) -> dict[str, sp.MatrixBase]:
        """Every step's value from the operands', G's and the scalars' values, in exact arithmetic."""
        known = dict(values)
        known.setdefault(ONES, sp.ones(known["G"].rows, 1))
        at = {sp.Symbol(k, real=True): v for k, v in scalars.items()}
        for step in self.forward + self.backward:
            total = None
            for term in step.terms:
                product = sp.Mul(1, term.coefficient.subs(at)) * read(term.left, known)
                product = product if term.right is None else product * read(term.right, known)
                total = product if total is None else total + product
            known[step.name] = total
        return known

    def text(self) -> str:
        """Formula, gradients, products in the order they are made; ``'`` transposes, ``1`` is a column of ones."""
        lines = ["formula", f"  Y = {_plain(self.expression)}", "gradients (G is the gradient of Y)"]
        lines += [f"  d{name} = {_plain(formula)}" for name, formula in self.formulas]
        lines += ["forward"] + [f"  {step}" for step in self.forward]
        lines += ["saved", f"  {', '.join(self.saved) or 'nothing beyond the operands'}"]
        return "\n".join(lines + ["backward"] + [f"  {step}" for step in self.backward])

    def latex(self) -> str:
        """The same formulas as LaTeX, one aligned block."""
        rows = [rf"Y &= {sp.latex(self.expression)}"]
        rows += [rf"\frac{{\partial L}}{{\partial {name}}} &= {sp.latex(formula)}" for name, formula in self.formulas]
        return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"


def _plain(expression: sp.MatrixExpr) -> str:
    return " + ".join(
        " ".join(([sp.sstr(c)] if c != 1 else []) + [str(f) for f in chain]) for c, chain in chains(expression)
    )


def read(factor: Factor, known: Mapping[str, sp.MatrixBase]) -> sp.MatrixBase:
    return known[factor.name].T if factor.transposed else known[factor.name]


def _shape(factor: Factor, shapes: Mapping[str, tuple[sp.Expr, sp.Expr]]) -> tuple[sp.Expr, sp.Expr]:
    rows, cols = shapes[factor.name]
    return (cols, rows) if factor.transposed else (rows, cols)


def _needed(steps: tuple[Step, ...], names: set[str]) -> tuple[Step, ...]:
    """The steps that the values ``names`` depend on."""
    kept: list[Step] = []
    names = set(names)
    for step in reversed(steps):
        if step.name in names:
            kept.append(step)
            names |= {f.name for t in step.terms for f in t.factors}
    return tuple(reversed(kept))


def _factor(matrix: sp.MatrixExpr) -> Factor:
    if isinstance(matrix, sp.Transpose):
        return _factor(matrix.arg).t
    if isinstance(matrix, sp.MatrixSymbol):
        return Factor(matrix.name)
    if isinstance(matrix, sp.OneMatrix) and 1 in matrix.shape:
        return Factor(ONES, transposed=matrix.shape[1] != 1)
    raise ValueError(f"matrix plan: {matrix!r} is not a symbol, a transposed symbol or a vector of ones")


def chains(expression: sp.MatrixExpr) -> list[tuple[sp.Expr, tuple[Factor, ...]]]:
    """The expression as a sum of coefficient * product of factors."""
    expression = expression.doit().expand().doit()
    terms = expression.args if isinstance(expression, sp.MatAdd) else (expression,)
    found = []
    for term in terms:
        coefficient, matrices = term.as_coeff_matrices() if isinstance(term, sp.MatMul) else (sp.Integer(1), [term])
        found.append((sp.simplify(coefficient), tuple(_factor(m) for m in matrices)))
    return found


Tree = Factor | tuple["Tree", "Tree"]


class _Products:
    """The products made so far, and the cheapest tree for a new chain given them."""

    def __init__(
        self, shapes: dict[str, tuple[sp.Expr, sp.Expr]], sizes: Mapping[sp.Symbol, int], shared: frozenset[Pair]
    ) -> None:
        self.shapes, self.sizes, self.shared = shapes, sizes, shared
        self.names: dict[Pair, Factor] = {}
        self.steps: list[Step] = []

    def known(self, left: Tree, right: Tree) -> Factor | None:
        """The intermediate that already is left @ right."""
        if not (isinstance(left, Factor) and isinstance(right, Factor)):
            return None
        if (left, right) in self.names:
            return self.names[left, right]
        flipped = self.names.get((right.t, left.t))  # (l r)' = r' l'
        return flipped.t if flipped else None

    def flops(self, left: Factor, right: Factor, before: sp.Expr | None = None) -> int:
        """2 m k n at the plan's sizes."""
        m, k = _shape(left, self.shapes)
        return int((2 * m * k * _shape(right, self.shapes)[1]).subs(self.sizes))

    def best(self, chain: tuple[Factor, ...]) -> Tree:
        """The cheapest tree over the chain: cost(i, j) = min over k of cost(i, k) + cost(k, j) + 2 m_i n_k p_j."""
        ends = [_shape(f, self.shapes)[0] for f in chain] + [_shape(chain[-1], self.shapes)[1]]
        dims = [int(sp.sympify(e).subs(self.sizes)) for e in ends]
        table: dict[tuple[int, int], tuple[int, Tree]] = {(i, i + 1): (0, f) for i, f in enumerate(chain)}
        for width in range(2, len(chain) + 1):
            for i in range(len(chain) - width + 1):
                table[i, i + width] = min(
                    (
                        self._join(table[i, k], table[k, i + width], 2 * dims[i] * dims[k] * dims[i + width])
                        for k in range(i + 1, i + width)
                    ),
                    key=lambda found: found[0],
                )
        return table[0, len(chain)][1]

    def _join(self, left: tuple[int, Tree], right: tuple[int, Tree], cost: int) -> tuple[int, Tree]:
        ready = self.known(left[1], right[1])
        return (0, ready) if ready else (left[0] + right[0] + cost, (left[1], right[1]))

    def make(self, tree: Tree) -> Factor:
        """The tree's value as an operand or an intermediate, adding the steps it needs."""
        if isinstance(tree, Factor):
            return tree
        left, right = self.make(tree[0]), self.make(tree[1])
        ready = self.known(left, right)
        if ready:
            return ready
        name = next(n for n in _names() if n not in self.shapes)
        self.shapes[name] = (_shape(left, self.shapes)[0], _shape(right, self.shapes)[1])
        rows, cols = self.shapes[name]
        self.steps.append(Step(name, rows, cols, (Term(sp.Integer(1), left, right),)))
        self.names[left, right] = Factor(name)
        return Factor(name)

    def term(self, coefficient: sp.Expr, chain: tuple[Factor, ...]) -> Term:
        tree = self.best(chain)
        if isinstance(tree, Factor):
            return Term(coefficient, tree)
        left, right = self.make(tree[0]), self.make(tree[1])
        if (left, right) in self.shared or (right.t, left.t) in self.shared:
            return Term(coefficient, self.make((left, right)))
        return Term(coefficient, left, right)

    def result(self, name: str, expression: sp.MatrixExpr) -> None:
        """Add the step name = expression."""
        terms = [self.term(c, chain) for c, chain in chains(expression)]
        terms.sort(key=lambda t: (self.flops(t.left, t.right) if t.right else 0, str(t)))
        self.shapes[name] = tuple(expression.shape)
        rows, cols = expression.shape
        self.steps.append(Step(name, rows, cols, tuple(terms)))


def _names() -> Iterable[str]:
    yield from "TUVPQRS"
    number = 1
    while True:
        yield f"P{number}"
        number += 1


def matrix_plan(
    expression: sp.MatrixExpr, wrt: Iterable[sp.MatrixSymbol], sizes: Mapping[str, int] | None = None
) -> MatrixPlan:
    """The plan of Y = ``expression`` and of its gradients with respect to ``wrt``.

    ``sizes``: a number for every size symbol by name, used only to compare costs (default ``SIZES``).
    Raises ValueError for a factor that is not a symbol, its transpose or a vector of ones, for an operand called G, Y
    or like a gradient, and for a size that has no number.
    """
    wrt, operands = tuple(wrt), _operands(expression)
    G = sp.MatrixSymbol("G", *expression.shape)
    formulas = tuple((m.name, sp.diff(sp.Trace(G.T * expression), m).doit().expand()) for m in wrt)
    shapes = {m.name: tuple(m.shape) for m in (*operands, G)} | {ONES: (expression.shape[0], sp.Integer(1))}
    made, split = _associated(expression, formulas, shapes, _numbers(expression, sizes or SIZES))
    forward, backward = tuple(made.steps[:split]), tuple(made.steps[split:])
    read = {f.name for s in backward for t in s.terms for f in t.factors}
    scalars = sorted(
        s.name
        for s in expression.free_symbols - set(operands)
        if s.name not in _size_names(expression)
    )
    return MatrixPlan(
        expression,
        formulas,
        tuple(scalars),
        forward,
        backward,
        tuple((m.name, f"d{m.name}") for m in wrt),
        tuple(s.name for s in forward if s.name in read),
        tuple(made.shapes.items()),
    )


def _operands(expression: sp.MatrixExpr) -> list[sp.MatrixSymbol]:
    """The matrices of an expression, by name; ValueError for a name that the plan needs."""
    operands = sorted(expression.atoms(sp.MatrixSymbol), key=lambda m: m.name)
    reserved = {"G", "Y", ONES} | {f"d{m.name}" for m in operands}
    clash = [m.name for m in operands if m.name in reserved]
    if clash:
        raise ValueError(f"matrix plan: operand names {clash} are reserved")
    return operands


def _associated(
    expression: sp.MatrixExpr,
    formulas: Iterable[tuple[str, sp.MatrixExpr]],
    shapes: Mapping[str, tuple[sp.Expr, ...]],
    numbers: Mapping[sp.Symbol, int],
) -> tuple[_Products, int]:
    """The products of the result and of the gradients, and how many of them are the result's."""
    shared: frozenset[Pair] = frozenset()
    for _ in range(2):  # the second round knows which whole terms occur twice
        made = _Products(dict(shapes), numbers, shared)
        made.result("Y", expression)
        split = len(made.steps)
        for name, formula in formulas:
            made.result(f"d{name}", formula)
        shared = _repeated(made.steps)
    return made, split


def size_symbols(expression: sp.MatrixExpr) -> set[sp.Symbol]:
    leaves = expression.atoms(sp.MatrixSymbol) | expression.atoms(sp.OneMatrix)
    return {s for m in leaves for d in m.shape for s in sp.sympify(d).free_symbols}


def _size_names(expression: sp.MatrixExpr) -> set[str]:
    return {s.name for s in size_symbols(expression)}


def _numbers(expression: sp.MatrixExpr, sizes: Mapping[str, int]) -> dict[sp.Symbol, int]:
    symbols = size_symbols(expression)
    missing = sorted(s.name for s in symbols if s.name not in sizes)
    if missing:
        raise ValueError(f"matrix plan: no number is given for the sizes {missing}")
    return {s: sizes[s.name] for s in symbols}


def _repeated(steps: Iterable[Step]) -> frozenset[Pair]:
    """The products that more than one step's term makes."""
    counts = Counter(
        min((t.left, t.right), (t.right.t, t.left.t), key=str) for s in steps for t in s.terms if t.right is not None
    )
    return frozenset(pair for pair, n in counts.items() if n > 1)


@cache
def linear_plan(bias: bool = True) -> MatrixPlan:
    """The linear: Y = X W' + 1 b', with its derived gradients. X [M, K], W [N, K], b [N, 1] if ``bias``."""
    M, K, N = sp.symbols("M K N", integer=True, positive=True)
    X, W, b = sp.MatrixSymbol("X", M, K), sp.MatrixSymbol("W", N, K), sp.MatrixSymbol("b", N, 1)
    Y = X * W.T + sp.OneMatrix(M, 1) * b.T if bias else X * W.T
    return matrix_plan(Y, [X, W, *([b] if bias else [])])


@cache
def lora_plan(layout: str = "nk", bias: bool = True, shared: bool = True) -> MatrixPlan:
    """The low-rank adapted linear: Y = X W' + 1 b' + s (Xa A') B', with its derived gradients.

    X [M, K], W [N, K] (``layout`` "nk") or [K, N] ("kn"), b [N, 1] if ``bias``, A [r, K], B [N, r], s a scalar.
    ``shared``: the adapter reads X itself; else Xa [M, K], say dropout(X), which then has a gradient of its own.
    """
    if layout not in ("nk", "kn"):
        raise ValueError(f"lora plan: layout {layout!r} is not one of nk, kn")
    M, K, N, r = sp.symbols("M K N r", integer=True, positive=True)
    s = sp.Symbol("s", real=True)
    X, A, B = sp.MatrixSymbol("X", M, K), sp.MatrixSymbol("A", r, K), sp.MatrixSymbol("B", N, r)
    W, b = sp.MatrixSymbol("W", *((N, K) if layout == "nk" else (K, N))), sp.MatrixSymbol("b", N, 1)
    Xa = X if shared else sp.MatrixSymbol("Xa", M, K)
    Y = X * (W.T if layout == "nk" else W) + s * Xa * A.T * B.T
    if bias:
        Y = Y + sp.OneMatrix(M, 1) * b.T
    operands = [X] + ([] if shared else [Xa]) + [A, B, W] + ([b] if bias else [])
    return matrix_plan(Y, operands)
