"""Linears that read one x as one program: ``gradients.matrix.linear_plan`` or ``lora_plan`` for each, what they share done once.

The plan of one linear is written out for all of them. A product of adapters whose other factor is x stands once, over the linears' factors
stacked:

    [T_1 T_2 ..] = X [A_1; A_2; ..]',      [dA_1; dA_2; ..] = [s_1 U_1 s_2 U_2 ..]' X,

and the gradient of x is one sum over all of them, its low-rank terms stacked too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import sympy as sp
import torch
from slothc.gradients.matrix import Factor, MatrixPlan, Step, Term, linear_plan, lora_plan

from .joined import joined
from .products import rounded
from .summed import summed

X = "X"


@dataclass(frozen=True)
class Linear:
    """One of them: scale and rank of its adapter (rank 0: it has none); without an adapter it may have a bias and may be trained."""

    scale: float = 1.0
    rank: int = 0
    trained: bool = False
    bias: bool = False

    @property
    def operands(self) -> tuple[str, ...]:
        """What it reads besides x: W [N, K], A [r, K], B [N, r], or W and b [N]."""
        return ("W", "A", "B") if self.rank else ("W", "b") if self.bias else ("W",)

    @property
    def read(self) -> tuple[str, ...]:
        """Those that the gradient of x reads."""
        return ("W", "B") if self.rank else ("W",)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Those that have a gradient."""
        return ("A", "B") if self.rank else self.operands if self.trained else ()

    @property
    def plan(self) -> MatrixPlan:
        return lora_plan("nk", False, True) if self.rank else linear_plan(self.bias)


@dataclass(frozen=True)
class Stacked:
    """``forward(X, operands of each) -> (Y of each, T, A)``, ``towards(G of each, what is read of each, A) -> (dX, U)``,
    ``weights(G of each, X, T, U) -> gradients of the operands of each, None where none is wanted``; T, A and U are None without an
    adapter. Matrices are of one dtype, ``source`` what is run.
    """

    forward: Callable[..., tuple[Any, ...]]
    towards: Callable[..., tuple[Any, ...]]
    weights: Callable[..., tuple[Any, ...]]
    source: str


@cache
def stacked(linears: tuple[Linear, ...], wide: bool) -> Stacked:
    """The program for these linears. ``wide``: an adapter's sums over tokens leave the GEMM in fp32 and are rounded after."""
    text = _Text(linears, wide)
    source = "\n".join([*text.forward(), *text.towards(), *text.weights()])
    space: dict[str, Any] = {"mm": torch.mm, "addmm": torch.addmm, "cat": torch.cat, "float32": torch.float32}
    space |= {"joined": joined, "summed": summed, "rounded": rounded}
    exec(compile(source, f"<{len(linears)} linears>", "exec"), space)
    return Stacked(space["forward"], space["towards"], space["weights"], source)


class _Text:
    """The source, made from the plan of each linear, W [N, K]."""

    def __init__(self, linears: Sequence[Linear], wide: bool) -> None:
        self.linears, self.wide = dict(enumerate(linears)), wide
        ranks = [m.rank for m in linears]
        self.columns = [f"{end - r}:{end}" for r, end in zip(ranks, accumulate(ranks))]
        self.aligned = all(r % 8 == 0 for r in ranks)                      # cuBLAS rounds twice into columns at odd addresses (H100)
        self.adapted = [k for k, m in self.linears.items() if m.rank]
        self.of = [_Steps(m) for m in linears]
        for steps in self.of:
            steps.known()

    def forward(self) -> list[str]:
        arguments = [X, *(f"{name}{k}" for k, m in self.linears.items() for name in m.operands)]
        lines, stacked_a = [f"def forward({', '.join(arguments)}):", "    T = A = None"], self._rows("A")
        if self.adapted:
            lines = [lines[0], f"    A = {stacked_a}", "    T = mm(X, A.t())", f"    # {self.of[self.adapted[0]].inner}"]
        for k, m in self.linears.items():
            *others, base = self.of[k].result.terms
            if m.rank:
                lines.append(f"    Y{k} = joined({self._pair(others[0], k)}, {self._number(others[0], k)}, {self._pair(base, k)})")
            else:
                lines.append(f"    Y{k} = {f'addmm(b{k}, ' if m.bias else 'mm('}{self._pair(base, k)})")
            lines.append(f"    # {self.of[k].result}")
        return [*lines, f"    return {', '.join(f'Y{k}' for k in self.linears)}, T, A"]

    def _rows(self, name: str) -> str:
        found = [f"{name}{k}" for k in self.adapted]
        return found[0] if len(found) == 1 else f"cat(({', '.join(found)}))"

    def towards(self) -> list[str]:
        arguments = [*(f"G{k}" for k in self.linears), *(f"{name}{k}" for k, m in self.linears.items() for name in m.read), "A"]
        lines = [f"def towards({', '.join(arguments)}):", *(self._back() if self.adapted else ["    U = None"])]
        pairs = [self._pair(self.of[k].dx.terms[-1], k) for k in self.linears]
        if self.adapted:
            lines.append(f"    dX = summed(({', '.join(f'({p})' for p in pairs)},), U, A)")
        else:
            lines += [f"    dX = mm({pairs[0]})", *(f"    dX.addmm_({p})" for p in pairs[1:])]
        notes = dict.fromkeys(f"    # {s.dx}" for s in self.of)
        return [*lines, *notes, "    return dX, U"]

    def _back(self) -> list[str]:
        """U = s G B of each adapter: scaled as both of its readers want it."""
        lines = [f"    U = G{self.adapted[0]}.new_empty(G{self.adapted[0]}.shape[0], A.shape[0])"] if self.aligned else []
        for k in self.adapted:
            into = f"U[:, {self.columns[k]}]" if self.aligned else f"G{k}.new_empty(G{k}.shape[0], B{k}.shape[1])"
            made = f"{into}.addmm_({self._pair(self.of[k].back.terms[0], k)}, beta=0, alpha={self.linears[k].scale!r})"
            lines.append(f"    {made}" if self.aligned else f"    U{k} = {made}")
        if not self.aligned:
            lines.append(f"    U = cat(({', '.join(f'U{k}' for k in self.adapted)},), 1)")
        return [*lines, f"    # {self.of[self.adapted[0]].back}"]

    def weights(self) -> list[str]:
        lines = [f"def weights({', '.join(f'G{k}' for k in self.linears)}, X, T, U):"]
        if self.adapted:
            lines += [f"    dA = {self._sum('U.t(), X', '1')}", f"    # {self.of[self.adapted[0]].gradients['A']}"]
        found = []
        for k, m in self.linears.items():
            steps = self.of[k].gradients
            for name in m.operands:
                found.append(f"d{name}{k}" if name in m.wanted and name != "A" else f"dA[{self.columns[k]}]" if name == "A" else "None")
            if m.rank:
                db = steps["B"]
                lines += [f"    dB{k} = {self._sum(self._pair(db.terms[0], k), self._number(db.terms[0], k))}", f"    # {db}"]
            elif m.trained:
                lines += [f"    dW{k} = mm({self._pair(steps['W'].terms[0], k)})", f"    # {steps['W']}"]
                lines += [f"    db{k} = G{k}.sum(0)", f"    # {steps['b']}"] if m.bias else []
        return [*lines, f"    return {', '.join(found)},"]

    def _sum(self, pair: str, scale: str) -> str:
        """A product that sums over tokens."""
        if self.wide:
            return f"rounded(mm({pair}, out_dtype=float32), {scale}, X.dtype)"
        return f"mm({pair})" if scale in ("1", "1.0") else f"mm({pair}).mul_({scale})"

    def _pair(self, term: Term, k: int) -> str:
        assert term.right is not None
        return f"{self._spell(term.left, k)}, {self._spell(term.right, k)}"

    def _spell(self, factor: Factor, k: int) -> str:
        name = factor.name
        if name in ("T", "U"):
            name = f"{name}[:, {self.columns[k]}]"
        elif name != X:
            name = f"{name}{k}"
        return f"{name}.t()" if factor.transposed else name

    def _number(self, term: Term, k: int) -> str:
        return repr(float(term.coefficient.subs(sp.Symbol("s", real=True), self.linears[k].scale)))


class _Steps:
    """The steps of one linear's plan, by what they make."""

    def __init__(self, linear: Linear) -> None:
        self.linear, plan = linear, linear.plan
        self.inner, self.result = (plan.forward[0], plan.forward[-1])
        backward = plan.backward_for((X, *(linear.wanted if linear.rank else linear.operands)))
        made = dict(plan.gradients)
        self.gradients: dict[str, Step] = {name: s for name in made for s in backward if s.name == made[name]}
        self.dx = self.gradients[X]
        self.back = next((s for s in backward if s not in self.gradients.values()), self.dx)       # U = G B of an adapter

    def known(self) -> None:
        """Raises ValueError where the plan has another form than what is written out here."""
        g, x, w = Factor("G"), Factor(X), Factor("W")
        if self.linear.rank:
            t, u, s, da = Factor("T"), Factor("U"), sp.Symbol("s", real=True), self.gradients["A"]
            fits = self.inner.terms[0].factors == (x, Factor("A", True)) and da.terms[0].factors == (u.t, x)
            fits &= [f.left for f in self.result.terms] == [t, x] and [f.left for f in self.dx.terms] == [u, g]
            fits &= self.dx.terms[0].coefficient == da.terms[0].coefficient == s and self.dx.terms[0].right == Factor("A")
            fits &= len(self.linear.plan.saved) == 1
        else:
            ones = [(Factor("1"), Factor("b", True))] if self.linear.bias else []
            fits = [f.factors for f in self.result.terms] == [*ones, (x, w.t)] and [f.factors for f in self.dx.terms] == [(g, w)]
            fits &= self.gradients["W"].terms[0].factors == (g.t, x)
            fits &= not ones or self.gradients["b"].terms[0].factors == (g.t, Factor("1"))
        if not fits:
            raise ValueError("stacked: the plan of a linear has another form")
