"""Matrix plans made runnable: step by step for mixed dtypes, or as straight-line source where all are one dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy as sp
import torch
from slothc.gradients.matrix import Factor, MatrixPlan, Step, lora_plan
from slothc.gradients.matrix import Term as PlanTerm

from .joined import joined
from .products import Matrix, product, rounded, total

OPERANDS = ("X", "Xa", "W", "b", "A", "B")  # the order of the tensor arguments


@dataclass(frozen=True)
class Term:
    """coefficient(s) * left @ right; a transposed factor is read through ``.t()``. ``coefficient`` None is 1."""

    coefficient: Callable[[float], float] | None
    left: str
    left_t: bool
    right: str
    right_t: bool

    def read(self, env: Mapping[str, Matrix], scale: float) -> tuple[float, Matrix, Matrix]:
        left, right = env[self.left], env[self.right]
        return (
            1.0 if self.coefficient is None else self.coefficient(scale),
            left.t() if self.left_t else left,
            right.t() if self.right_t else right,
        )


@dataclass(frozen=True)
class Run:
    """A plan's step, ready to run. ``long``: it sums over tokens. ``operand``: whose gradient it is, if it is one."""

    name: str
    terms: tuple[Term, ...]
    long: bool
    operand: str | None

    def __call__(
        self, env: Mapping[str, Matrix], scale: float, dtype: torch.dtype | None, strict: bool = False
    ) -> torch.Tensor:
        terms = [t.read(env, scale) for t in self.terms]
        if len(terms) == 1:
            alpha, left, right = terms[0]
            return product(left, right, alpha, dtype, self.long)
        wide = terms[0][1].dtype if dtype is None else dtype
        return total(terms, wide, strict)


@dataclass(frozen=True)
class Program:
    """The forward of one form of the linear, and the backward steps for one set of wanted gradients."""

    forward: tuple[Run, ...]
    backward: tuple[Run, ...]
    saved: tuple[str, ...]
    reads: frozenset[str]


def _term(plan: MatrixPlan, term: PlanTerm) -> Term:
    coefficient = None if term.coefficient == 1 else sp.lambdify([sp.Symbol("s", real=True)], term.coefficient, "math")
    left, right = _pair(term)
    return Term(coefficient, left.name, left.transposed, right.name, right.transposed)


def _run(plan: MatrixPlan, step: Step) -> Run:
    operand = {made: name for name, made in plan.gradients}.get(step.name)
    long = any(plan.inner(t) == plan.rows for t in step.terms)
    return Run(step.name, tuple(_term(plan, t) for t in step.terms), long, operand)


@cache
def program(layout: str, bias: bool, shared: bool, wanted: tuple[str, ...]) -> Program:
    plan = lora_plan(layout, bias, shared)
    steps = plan.backward_for(wanted)
    reads = frozenset(f.name for s in steps for t in s.terms for f in t.factors)
    saved = tuple(name for name in plan.saved if name in reads)
    return Program(tuple(_run(plan, s) for s in plan.forward), tuple(_run(plan, s) for s in steps), saved, reads)


@dataclass(frozen=True)
class Straight:
    """A program for operands of one dtype as two functions and their source.

    ``forward(X, Xa, W, A, B, s)`` returns Y and the saved values; ``backward(G, X, Xa, W, A, B, *saved, s)`` returns
    the gradients of X, Xa, W, A, B, None where not wanted. ``reads`` are the operands that the backward reads.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., tuple[torch.Tensor | None, ...]]
    reads: frozenset[str]
    source: str


@cache
def straight(layout: str, shared: bool, wanted: tuple[str, ...], wide: bool) -> Straight:
    """The straight-line program without bias. ``wide``: sums over tokens leave the GEMM in fp32 and are rounded
    after.
    """
    plan = lora_plan(layout, False, shared)
    form = program(layout, False, shared, wanted)
    operands = [name for name in OPERANDS if name != "b"]
    made = dict(plan.gradients)
    grads = [made[name] if name in wanted else "None" for name in operands]
    source = "\n".join(
        _function("forward", [*operands, "s"], plan, plan.forward, ["Y", *form.saved], wide)
        + _function("backward", ["G", *operands, *form.saved, "s"], plan, plan.backward_for(wanted), grads, wide)
    )
    space: dict[str, Any] = {"mm": torch.mm, "joined": joined, "rounded": rounded, "float32": torch.float32}
    exec(compile(source, f"<lora_linear {layout} {' '.join(wanted)}>", "exec"), space)
    return Straight(space["forward"], space["backward"], form.reads, source)


def _function(
    name: str, arguments: list[str], plan: MatrixPlan, steps: tuple[Step, ...], results: list[str], wide: bool
) -> list[str]:
    lines = [f"def {name}({', '.join(arguments)}):"]
    for step in steps:
        lines += [f"    {line}" for line in _lines(plan, step, wide)] + [f"    # {step}"]
    return [*lines, f"    return {', '.join(results)},"]


def _lines(plan: MatrixPlan, step: Step, wide: bool) -> list[str]:
    """The first term makes the value; a second one, the larger, is summed with it in one accumulator."""
    first, *rest = step.terms
    if len(rest) == 1 and rest[0].coefficient == 1:
        factors = ", ".join(map(_spell, _pair(first)))
        return [f"{step.name} = joined({factors}, {sp.pycode(first.coefficient)}, {', '.join(map(_spell, _pair(rest[0])))})"]
    (a, b), c = _pair(first), sp.pycode(first.coefficient)
    left, right = _spell(a), _spell(b)
    made = f"{step.name} = mm({left}, {right})"
    if wide and plan.inner(first) == plan.rows:
        made = f"{step.name} = rounded(mm({left}, {right}, out_dtype=float32), {c}, {a.name}.dtype)"
    elif c != "1":
        rows = f"{a.name}.shape[{int(a.transposed)}]"
        cols = f"{b.name}.shape[{int(not b.transposed)}]"
        empty = f"{a.name}.new_empty({rows}, {cols})"
        made = f"{step.name} = {empty}.addmm_({left}, {right}, beta=0, alpha={c})"
    onto = [f"{', '.join(map(_spell, _pair(t)))}, alpha={sp.pycode(t.coefficient)}" for t in rest]
    return [made, *(f"{step.name}.addmm_({arguments})" for arguments in onto)]


def _pair(term: PlanTerm) -> tuple[Factor, Factor]:
    if term.right is None:
        raise ValueError(f"straight: the term {term} is no product")
    return term.left, term.right


def _spell(factor: Factor) -> str:
    return f"{factor.name}.t()" if factor.transposed else factor.name
