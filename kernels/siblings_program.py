"""Adapted linears that read one x as one program: ``gradients.matrix.lora_plan`` for each, what they share done once.

The plan of one linear is written out for all of them. A product whose other factor is x stands once, over the linears' factors stacked:

    [T_1 T_2 ..] = X [A_1; A_2; ..]',      [dA_1; dA_2; ..] = [s_1 U_1 s_2 U_2 ..]' X,

and the gradient of x is one sum over all of them, its low-rank terms stacked too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import sympy as sp
import torch
from slothc.gradients.matrix import Factor, Term, lora_plan

from .joined import joined
from .products import rounded
from .summed import summed

X = "X"
OWN = ("W", "A", "B")


@dataclass(frozen=True)
class Stacked:
    """``forward(X, (W, A, B) of each) -> (Y of each, T, A)``, ``towards(G of each, (W, B) of each, A) -> (dX, U)``,
    ``weights(G of each, X, T, U) -> ((dA, dB) of each)``; matrices of one dtype, ``source`` what they are.
    """

    forward: Callable[..., tuple[Any, ...]]
    towards: Callable[..., tuple[Any, ...]]
    weights: Callable[..., tuple[Any, ...]]
    source: str


@cache
def stacked(scales: tuple[float, ...], ranks: tuple[int, ...], wide: bool) -> Stacked:
    """The program for linears with these scales and ranks. ``wide``: sums over tokens leave the GEMM in fp32 and are rounded after."""
    text = _Text(scales, ranks, wide)
    source = "\n".join([*text.forward(), *text.towards(), *text.weights()])
    space: dict[str, Any] = {"mm": torch.mm, "cat": torch.cat, "float32": torch.float32}
    space |= {"joined": joined, "summed": summed, "rounded": rounded}
    exec(compile(source, f"<{len(scales)} adapted linears>", "exec"), space)
    return Stacked(space["forward"], space["towards"], space["weights"], source)


class _Text:
    """The source, made from the plan of one linear, W [N, K] frozen and without bias."""

    def __init__(self, scales: Sequence[float], ranks: Sequence[int], wide: bool) -> None:
        self.plan, self.scales, self.wide = lora_plan("nk", False, True), scales, wide
        self.each = range(len(scales))
        ends = [0, *accumulate(ranks)]
        self.aligned = all(r % 8 == 0 for r in ranks)                      # cuBLAS rounds twice into columns at odd addresses (H100)
        self.columns = [f"{a}:{b}" for a, b in pairwise(ends)]
        self.inner, self.result = self.plan.forward
        backward = self.plan.backward_for((X, "A", "B"))
        made = {name: step for name, step in self.plan.gradients}
        self.dx, self.da, self.db = (next(s for s in backward if s.name == made[o]) for o in (X, "A", "B"))
        self.back = next(s for s in backward if s not in (self.dx, self.da, self.db))
        self._known()

    def _known(self) -> None:
        """Raises ValueError where the plan has another form than what is stacked here."""
        t, u = Factor(self.inner.name), Factor(self.back.name)
        stacks = self.inner.terms[0].factors == (Factor(X), Factor("A", True)) and self.da.terms[0].factors == (u.t, Factor(X))
        sums = [f.left for f in self.result.terms] == [t, Factor(X)] and [f.left for f in self.dx.terms] == [u, Factor("G")]
        scaled = self.dx.terms[0].coefficient == self.da.terms[0].coefficient == sp.Symbol("s", real=True)
        if not (stacks and sums and scaled and self.dx.terms[0].right == Factor("A") and len(self.plan.saved) == 1):
            raise ValueError("stacked: the plan of an adapted linear has another form")

    def forward(self) -> list[str]:
        arguments = [X, *(f"{name}{k}" for k in self.each for name in OWN)]
        t = self.inner.name
        lines = [f"def forward({', '.join(arguments)}):", f"    A = {self._rows('A')}", f"    {t} = mm(X, A.t())", f"    # {self.inner}"]
        for k in self.each:
            low, base = self.result.terms
            lines.append(f"    Y{k} = joined({self._pair(low, k)}, {self._number(low, k)}, {self._pair(base, k)})")
        return [*lines, f"    # {self.result}", f"    return {', '.join(f'Y{k}' for k in self.each)}, {t}, A"]

    def _rows(self, name: str) -> str:
        return f"{name}0" if len(self.each) == 1 else f"cat(({', '.join(f'{name}{k}' for k in self.each)}))"

    def towards(self) -> list[str]:
        arguments = [*(f"G{k}" for k in self.each), *(f"{name}{k}" for k in self.each for name in ("W", "B")), "A"]
        u = self.back.name
        lines = [f"def towards({', '.join(arguments)}):"]
        if self.aligned:
            lines.append(f"    {u} = G0.new_empty(G0.shape[0], A.shape[0])")
        for k in self.each:                                               # s U, as both of its readers want it
            into = f"{u}[:, {self.columns[k]}]" if self.aligned else f"G0.new_empty(G0.shape[0], B{k}.shape[1])"
            made = f"{into}.addmm_({self._pair(self.back.terms[0], k)}, beta=0, alpha={self.scales[k]!r})"
            lines.append(f"    {made}" if self.aligned else f"    {u}{k} = {made}")
        if not self.aligned:
            lines.append(f"    {u} = cat(({', '.join(f'{u}{k}' for k in self.each)},), 1)")
        pairs = ", ".join(f"({self._pair(self.dx.terms[1], k)})" for k in self.each)
        return [*lines, f"    # {self.back}", f"    dX = summed(({pairs},), {u}, A)", f"    # {self.dx}", f"    return dX, {u}"]

    def weights(self) -> list[str]:
        u, t = self.back.name, self.inner.name
        lines = [f"def weights({', '.join(f'G{k}' for k in self.each)}, X, {t}, {u}):"]
        lines += [f"    dA = {self._sum(f'{u}.t(), X', '1')}", f"    # {self.da}"]
        lines += [f"    dB{k} = {self._sum(self._pair(self.db.terms[0], k), self._number(self.db.terms[0], k))}" for k in self.each]
        found = ", ".join(f"dA[{self.columns[k]}], dB{k}" for k in self.each)
        return [*lines, f"    # {self.db}", f"    return {found},"]

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
        if name in (self.inner.name, self.back.name):
            name = f"{name}[:, {self.columns[k]}]"
        elif name != X:
            name = f"{name}{k}"
        return f"{name}.t()" if factor.transposed else name

    def _number(self, term: Term, k: int) -> str:
        return repr(float(term.coefficient.subs(sp.Symbol("s", real=True), self.scales[k])))
