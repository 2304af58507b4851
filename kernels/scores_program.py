"""What happens to one score between the product and the softmax, and its derivative, as text for both lowerings.

With x = q k^T and a chain f, the softmax of f(x) is computed in base 2: y = log2(e) f(x), and the gradient needs f'(x), which is
``sympy.diff`` of f. The two share what they have in common: for a soft-cap one tanh.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import sympy as sp
from slothc.gradients.program import symbol
from slothc.gradients.vocabulary import Chain

from .cache import load
from .expression import TORCH, TRITON, render
from .triton_helpers import module

LOG2E = sp.Float("1.4426950408889634074", 20)
X = symbol("x")
# For 16-bit scores, whose rounding by eager is far larger. quick: within 1e-7 of tanh, absolutely, from one exponential; approx: within
# 2^-11, relatively, from one instruction of NVIDIA's from sm_75 on.
QUICK: Mapping[str, str] = {**TRITON, "tanh": "(1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * {0})))"}
APPROX: Mapping[str, str] = {
    **TRITON, "tanh": 'tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [{0}], dtype=tl.float32, is_pure=True, pack=1)'
}  # fmt: skip
DIALECTS = {"exact": TRITON, "quick": QUICK, "approx": APPROX}


@functools.lru_cache(maxsize=64)
def formulas(chain: str) -> tuple[sp.Expr, sp.Expr]:
    """f and f' in x. The roundings between the chain's steps exist only because they were separate kernels."""
    value: sp.Expr = X
    for step in Chain.parse(chain).steps:
        value = step.expr.xreplace({symbol("z"): value})
    return value, sp.diff(value, X)


def _functions(chain: str, dialect: Mapping[str, str], decorator: str) -> str:
    """``value(x)`` -> y and ``both(x)`` -> (y, f'), the latter a number where it is one."""
    value, slope = formulas(chain)
    lines = []
    for name, results in (("value", [LOG2E * value]), ("both", [LOG2E * value, slope])):
        shared, rest = sp.cse(results, symbols=sp.numbered_symbols("t"), order="canonical")
        lines += ["", "", *([decorator] if decorator else []), f"def {name}(x):"]
        lines += [f"    {t} = {render(part, dialect)}" for t, part in shared]
        lines += [f"    return {', '.join(render(part, dialect) for part in rest)}"]
    return "\n".join(lines) + "\n"


def triton_source(chain: str, tanh: str = "exact") -> str:
    """The text of a Triton module with the two functions."""
    return module(_functions(chain, DIALECTS[tanh], "@triton.jit").lstrip("\n"))


def torch_source(chain: str) -> str:
    """The same over tensors."""
    return "import torch\n" + _functions(chain, TORCH, "")


@functools.lru_cache(maxsize=64)
def triton_functions(chain: str, tanh: str) -> tuple[Any, Any]:
    """(value, both), compiled as parts of the kernels that call them."""
    module = load("scores", triton_source(chain, tanh))
    return module.value, module.both


@functools.lru_cache(maxsize=64)
def torch_functions(chain: str) -> tuple[Any, Any]:
    """(value, both)."""
    module = load("scores_torch", torch_source(chain))
    return module.value, module.both
