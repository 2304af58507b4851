"""Programs nobody wrote: random formulas in random spellings, lifted, derived, lowered twice, against float64 autograd.

Captured as Dynamo captures a model. The formulas are made of what row programs are made of: pointwise functions, reductions over the
last dimension, slices, chunks, concatenations, interleaving, heads, broadcasting.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import Case, Errors, case, compare, hold, run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slothc.capture import found_in
from slothc.errors import RegionDropped

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = {"x": (2, 3, 8), "u": (2, 3, 8), "w": (8,), "s": (2, 3, 1), "f": (2, 3, 16)}
MORE = 2e-5                     # formulas that cancel round differently; a wrong derivative is off by far more

LEAVES = ("x", "x", "u", "u", "w", "s * x", "f.chunk(2, -1)[0]", "f.chunk(2, dim=-1)[1]", "f[..., :8]", "f[..., 8:]", "f[..., ::2]",
          "f[..., 1::2]", "torch.split(f, [8, 8], dim=-1)[1]",
          "f.unflatten(-1, (2, 8))[..., 1, :]", "w.expand_as(x)", "f.narrow(-1, 4, 8)")  # fmt: skip
UNARY = (
    "torch.tanh({a})", "({a}).sigmoid()", "F.silu({a})", "F.gelu({a}, approximate='tanh')", "F.gelu({a})", "torch.exp(-({a}).abs())",
    "F.softplus({a})", "F.relu({a})", "({a}).square()", "torch.pow({a}, 2)", "(1 + ({a}) ** 2).sqrt()", "torch.rsqrt(({a}).pow(2) + 0.5)",
    "-({a})", "({a}) * 0.5 + 1.0", "torch.sin({a})", "({a}).clamp(-0.7, 0.9)", "({a}).float()", "F.leaky_relu({a}, 0.1)",
    "({a}).contiguous()", "F.dropout({a}, 0.0)", "torch.log1p(({a}).abs())", "torch.reciprocal(1.5 + ({a}).abs())",
)  # fmt: skip
BINARY = (
    "({a}) + ({b})", "({a}) - ({b})", "torch.mul({a}, {b})", "({a}) * ({b})", "({a}) / (1.5 + ({b}).abs())", "torch.maximum({a}, {b})",
    "torch.minimum({a}, {b})", "torch.where(({a}) > 0.1, {a}, {b})", "torch.add({a}, {b}, alpha=0.5)", "(({a}) > ({b})) * ({a})",
)  # fmt: skip
REDUCED = (
    "({a}) * ({b}).mean(-1, keepdim=True)", "({a}) - ({b}).mean(dim=-1).unsqueeze(-1)", "({a}) * (({b}) ** 2).sum(-1)[..., None]",
    "({a}) - torch.logsumexp({b}, -1, keepdim=True)", "torch.softmax({a}, dim=-1) * ({b})", "({a}) / (1 + ({b}).abs().amax(-1, True))",
    "F.layer_norm(({a}) + x, (8,)) * ({b})", "F.rms_norm(({a}) + x, (8,), w, 1e-3) + ({b})",
    "({a}) + torch.mean(({a}) * ({b}), -1, True)", "({a}) * torch.rsqrt(({b}).var(-1, keepdim=True, correction=0) + 0.3)",
)  # fmt: skip
LANES = (
    "torch.cat((({a})[..., 4:], ({b})[..., :4]), dim=-1)", "torch.cat((-({a})[..., 4:], ({a})[..., :4]), -1) * ({b})",
    "torch.stack((({a})[..., ::2], ({b})[..., 1::2]), dim=-1).flatten(-2)", "torch.cat((({a})[..., :2], ({b})[..., 2:]), -1)",
    "torch.cat([t * k for k, t in enumerate((({a}) + x).chunk(4, -1))], -1) + ({b})",
    "torch.tanh((({a}) + x).view(2, 3, 2, 4)).view(2, 3, 8) * ({b})",
    "torch.tanh((({a}) + x).reshape(2, 3, 4, 2).transpose(1, 2)).transpose(1, 2).reshape(2, 3, 8) - ({b})",
)  # fmt: skip


def formulas() -> st.SearchStrategy[str]:
    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        one = st.tuples(st.sampled_from(UNARY), inner).map(lambda t: t[0].format(a=t[1]))
        two = st.tuples(st.sampled_from((*BINARY, *REDUCED, *LANES)), inner, inner).map(lambda t: t[0].format(a=t[1], b=t[2]))
        return st.one_of(one, two, two)

    return st.recursive(st.sampled_from(LEAVES), grow, max_leaves=6)


def written(formula: str) -> Callable[..., Tensor]:
    """The formula as a function of those arguments it reads."""
    body = f"torch.tanh({formula}) * x"
    names = [n for n in SHAPES if n in {t for t in _words(body)}]
    scope: dict[str, Any] = {"torch": torch, "F": F}
    source = f"def random_formula({', '.join(names)}):\n    return {body}\n"
    exec(source, scope)
    return scope["random_formula"]


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c in "_." else " " for c in text.replace(".", " .")).split()


def draw(function: Callable[..., Any]) -> list[Tensor]:
    return [torch.randn(SHAPES[n], device=DEVICE) for n in inspect.signature(function).parameters]


@pytest.mark.usefixtures("triton_kernels")
@settings(max_examples=40, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])  # fmt: skip
@given(formulas())
def test_random_formulas(formula: str) -> None:
    function = written(formula)
    c = whole(function)
    if c is None:
        through_compile(function)
        return
    for lowering in ("torch", "triton"):
        hold(c, lowering, lambda: draw(function), more=MORE)


def whole(function: Callable[..., Any]) -> Case | None:
    """The plan of the function, if all of it is one region."""
    found = found_in(function, draw(function))
    if len(found.regions) == 1 and all(n.op == "placeholder" for n in found.regions[0].operands):
        return case(function, draw(function))
    return None


def through_compile(function: Callable[..., Any]) -> None:
    """What falls into several regions, or partly to eager."""
    torch._dynamo.reset()
    fast, errors = torch.compile(function, backend="sloth", dynamic=False), Errors()

    def ours(arguments: Sequence[Any], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RegionDropped)
            return run(fast, arguments, cotangents).values

    for _ in range(5):
        compare(errors, ours, function, draw(function))
    errors.judge(MORE)
