"""Linears that read one x as one program: ``gradients.matrix.linear_plan`` or ``lora_plan`` for each, what they share done once.

The plan of one linear is written out for all of them. A product of adapters whose other factor is x stands once, over the linears' factors
stacked:

    [T_1 T_2 ..] = X [A_1; A_2; ..]',      [dA_1; dA_2; ..] = [s_1 U_1 s_2 U_2 ..]' X,

the two with a linear's gradient, s U = s G B and dB = s G' T, are made together (``thin.both``), and the gradient of x is one sum over all
of them, its low-rank terms stacked too. Adapters may be in fp32 beside a base of a low-precision dtype: their products and gradients are
in fp32 then.
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

from .four_bit import FourBit
from .joined import joined
from .summed import summed
from .thin import across, along, both

X = "X"


@dataclass(frozen=True)
class Linear:
    """One of them: scale and rank of its adapter (rank 0: it has none), whether it has a bias, and how a weight is held that is not there
    as it is. Without an adapter it may be trained.
    """

    scale: float = 1.0
    rank: int = 0
    trained: bool = False
    bias: bool = False
    held: FourBit | None = None

    @property
    def weight(self) -> tuple[str, ...]:
        """W [N, K], or what it is made of."""
        return ("W",) if self.held is None else self.held.operands

    @property
    def operands(self) -> tuple[str, ...]:
        """What it reads besides x: its weight, with an adapter A [r, K] and B [N, r], and a bias b [N]."""
        return (*self.weight, *(("A", "B") if self.rank else ()), *(("b",) if self.bias else ()))

    @property
    def read(self) -> tuple[str, ...]:
        """Those that the gradient of x reads."""
        return (*self.weight, "B") if self.rank else self.weight

    @property
    def wanted(self) -> tuple[str, ...]:
        """Those that have a gradient."""
        return ("A", "B") if self.rank else self.operands if self.trained else ()

    @property
    def plan(self) -> MatrixPlan:
        return lora_plan("nk", self.bias, True) if self.rank else linear_plan(self.bias)


@dataclass(frozen=True)
class Stacked:
    """``forward(X, operands of each) -> (Y of each, T, A)``, ``unneeded`` the same with the Y of undefined values,
    ``towards(G of each, what is read of each, A, T, whether X wants a gradient) -> (dX or None, U, dB)``,
    ``weights(G of each, X, U, dB) -> gradients of the operands of each, None where none is wanted``; T, A, U and dB (one for each adapter)
    are None without an adapter. Matrices are of one dtype but for an adapter's, which may be fp32; ``source`` is what is run.
    """

    forward: Callable[..., tuple[Any, ...]]
    unneeded: Callable[..., tuple[Any, ...]]
    towards: Callable[..., tuple[Any, ...]]
    weights: Callable[..., tuple[Any, ...]]
    source: str


@cache
def stacked(linears: tuple[Linear, ...]) -> Stacked:
    """The program for these linears."""
    text = _Text(linears)
    source = "\n".join([*text.forward(), *text.unneeded(), *text.towards(), *text.weights()])
    space: dict[str, Any] = {"mm": torch.mm, "addmm": torch.addmm, "cat": torch.cat, "joined": joined, "summed": summed}
    space |= {"across": across, "along": along, "both": both}
    space |= {f"whole{k}": m.held.whole for k, m in enumerate(linears) if m.held is not None}
    exec(compile(source, f"<{len(linears)} linears>", "exec"), space)
    return Stacked(space["forward"], space["unneeded"], space["towards"], space["weights"], source)


class _Text:
    """The source, made from the plan of each linear, W [N, K]."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = dict(enumerate(linears))
        ranks = [m.rank for m in linears]
        self.columns = [f"{end - r}:{end}" for r, end in zip(ranks, accumulate(ranks))]
        self.adapted = [k for k, m in self.linears.items() if m.rank]
        self.of = [_Steps(m) for m in linears]
        for steps in self.of:
            steps.known()

    def _inner(self, name: str) -> list[str]:
        """The head of a function of x and the operands of each, and T."""
        arguments = [X, *(f"{name}{k}" for k, m in self.linears.items() for name in m.operands)]
        lines, each = [f"def {name}({', '.join(arguments)}):"], ", ".join(f"A{k}" for k in self.adapted)
        if not self.adapted:
            return [*lines, "    T = A = None"]
        stack = each if len(self.adapted) == 1 else f"cat(({each}))"
        return [*lines, f"    A = {stack}", "    T = across(X, A.t())", f"    # {self.of[self.adapted[0]].inner}"]

    def unneeded(self) -> list[str]:
        rows = [f"{m.held.shape[0]}" if m.held is not None else f"W{k}.shape[0]" for k, m in self.linears.items()]
        return [*self._inner("unneeded"), f"    return {', '.join(f'X.new_empty(X.shape[0], {n})' for n in rows)}, T, A"]

    def forward(self) -> list[str]:
        lines = self._inner("forward")
        for k, m in self.linears.items():
            *others, base = self.of[k].result.terms
            lines += self._whole(k)
            if m.rank:
                factors, scale = self._pair(others[-1], k), self._number(others[-1], k)
                lines.append(f"    Y{k} = joined({factors}, {scale}, {self._pair(base, k)}{f', b{k}' if m.bias else ''})")
            else:
                lines.append(f"    Y{k} = {f'addmm(b{k}, ' if m.bias else 'mm('}{self._pair(base, k)})")
            lines += [f"    # {self.of[k].result}", *([f"    del W{k}"] if m.held is not None else [])]
        return [*lines, f"    return {', '.join(f'Y{k}' for k in self.linears)}, T, A"]

    def towards(self) -> list[str]:
        arguments = [*(f"G{k}" for k in self.linears), *(f"{name}{k}" for k, m in self.linears.items() for name in m.read)]
        lines = [f"def towards({', '.join(arguments)}, A, T, want):", *(self._back() if self.adapted else ["    U = dB = None"])]
        pairs = [self._pair(self.of[k].dx.terms[-1], k) for k in self.linears]
        lines += ["    if not want: return None, U, dB", *(line for k in self.linears for line in self._whole(k))]
        if self.adapted:
            lines.append(f"    dX = summed(({', '.join(f'({p})' for p in pairs)},), U, A)")
        else:
            lines += [f"    dX = mm({pairs[0]})", *(f"    dX.addmm_({p})" for p in pairs[1:])]
        notes = dict.fromkeys(f"    # {s.dx}" for s in self.of)
        return [*lines, *notes, "    return dX, U, dB"]

    def _back(self) -> list[str]:
        """U = s G B of each adapter, scaled as both of its readers want it, and dB."""
        each = lambda name: ", ".join(f"{name}{k}" for k in self.adapted)  # noqa: E731
        scales = ", ".join(repr(self.linears[k].scale) for k in self.adapted)
        first = self.of[self.adapted[0]]
        return [f"    U, dB = both(({each('G')},), ({each('B')},), T, ({scales},))", f"    # {first.back}", f"    # {first.gradients['B']}"]

    def weights(self) -> list[str]:
        lines = [f"def weights({', '.join(f'G{k}' for k in self.linears)}, X, U, dB):"]
        if self.adapted:
            lines += ["    dA = along(U, X)", f"    # {self.of[self.adapted[0]].gradients['A']}"]
        found = []
        for k, m in self.linears.items():
            made = {"A": f"dA[{self.columns[k]}]", "B": f"dB[{self.adapted.index(k)}]"} if m.rank else {"W": f"dW{k}", "b": f"db{k}"}
            found += [made[name] if name in m.wanted else "None" for name in m.operands]
            steps = self.of[k].gradients
            if m.trained:
                lines += [f"    dW{k} = mm({self._pair(steps['W'].terms[0], k)})", f"    # {steps['W']}"]
                lines += [f"    db{k} = G{k}.sum(0)", f"    # {steps['b']}"] if m.bias else []
        return [*lines, f"    return {', '.join(found)},"]

    def _whole(self, k: int) -> list[str]:
        """W, where it is held in another form."""
        held = self.linears[k].held
        return [] if held is None else [f"    W{k} = whole{k}({', '.join(f'{name}{k}' for name in held.operands)})"]

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
        backward = plan.backward_for((X, *(linear.wanted if linear.rank else ("W", "b") if linear.bias else ("W",))))
        made = dict(plan.gradients)
        self.gradients: dict[str, Step] = {name: s for name in made for s in backward if s.name == made[name]}
        self.dx = self.gradients[X]
        self.back = next((s for s in backward if s not in self.gradients.values()), self.dx)       # U = G B of an adapter

    def known(self) -> None:
        """Raises ValueError where the plan has another form than what is written out here."""
        g, x, w = Factor("G"), Factor(X), Factor("W")
        ones = [(Factor("1"), Factor("b", True))] if self.linear.bias else []
        if self.linear.rank:
            t, u, s, da, db = Factor("T"), Factor("U"), sp.Symbol("s", real=True), self.gradients["A"], self.gradients["B"]
            fits = self.inner.terms[0].factors == (x, Factor("A", True)) and da.terms[0].factors == (u.t, x)
            fits &= [f.factors for f in self.result.terms] == [*ones, (t, Factor("B", True)), (x, w.t)]
            fits &= [f.left for f in self.dx.terms] == [u, g] and self.dx.terms[0].right == Factor("A")
            fits &= self.back.terms[0].factors == (g, Factor("B")) and db.terms[0].factors == (g.t, t)
            fits &= self.dx.terms[0].coefficient == da.terms[0].coefficient == db.terms[0].coefficient == s
            fits &= len(self.linear.plan.saved) == 1
        else:
            fits = [f.factors for f in self.result.terms] == [*ones, (x, w.t)] and [f.factors for f in self.dx.terms] == [(g, w)]
            fits &= self.gradients["W"].terms[0].factors == (g.t, x)
            fits &= not ones or self.gradients["b"].terms[0].factors == (g.t, Factor("1"))
        if not fits:
            raise ValueError("stacked: the plan of a linear has another form")
