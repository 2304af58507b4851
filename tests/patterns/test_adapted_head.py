"""A head with adapters and its loss: which spellings are taken, what takes their place, and what is left alone and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spliced import V, linears, rows, same, spliced

from slothc.lazy_logits import LazyLogits


def operands(dtype=torch.float32, adapter=None):
    g = torch.Generator().manual_seed(0)
    shapes = {"h": (2, 5, 8), "w": (V, 8), "bias": (V,), "a": (3, 8), "b": (V, 3), "a2": (2, 8), "b2": (V, 2), "c": (V,)}
    made = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    made = {n: t.to(dtype if n in ("h", "w", "bias") else adapter or dtype).requires_grad_() for n, t in made.items()}
    labels = torch.randint(0, V, (2, 5), generator=g)
    labels[0, 2] = -100
    return [*made.values(), labels]


def wide(h):
    return h.to(torch.float32)


HEADS = {
    "plain": lambda h, w, bias, a, b, a2, b2, c: F.linear(h, w) + F.linear(F.linear(h, a), b) * 2.0,
    "other order": lambda h, w, bias, a, b, a2, b2, c: 0.5 * F.linear(F.linear(h, a), b) + F.linear(h, w, bias),
    "scale before": lambda h, w, bias, a, b, a2, b2, c: F.linear(h, w, bias) + F.linear(F.linear(h, a) * 0.5, b),
    "two adapters": lambda h, w, bias, a, b, a2, b2, c: (
        F.linear(h, w) + F.linear(F.linear(h, a), b) * 2.0 + F.linear(F.linear(h, a2), b2) * 0.5
    ),
    "bias": lambda h, w, bias, a, b, a2, b2, c: F.linear(h, w, bias) + F.linear(F.linear(h, a), b, c) * 2.0,
    "bias alone": lambda h, w, bias, a, b, a2, b2, c: F.linear(h, w) + F.linear(F.linear(h, a), b, c) * 2.0,
    "another input": lambda h, w, bias, a, b, a2, b2, c: F.linear(h, w) + F.linear(F.linear(h.sin(), a), b) * 2.0,
    "soft-cap": lambda h, w, bias, a, b, a2, b2, c: torch.tanh((F.linear(h, w) + F.linear(F.linear(h, a), b)) / 3.0) * 3.0,
    "shifted": lambda h, w, bias, a, b, a2, b2, c: (F.linear(h, w) + F.linear(F.linear(h, a), b))[:, :, :20],
    "cast back": lambda h, w, bias, a, b, a2, b2, c: (F.linear(h, w) + F.linear(F.linear(wide(h), wide(a)), wide(b)) * 2.0).to(h.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_adapted_heads(name, dtype):
    *leaves, labels = operands(dtype)
    labels = labels.clamp(max=19)

    def model(*given):
        *given, y = given
        z = HEADS[name](*given)
        return F.cross_entropy(z.float().reshape(-1, z.shape[-1]), y.view(-1)), z

    backend, (loss, z) = spliced(model, *leaves, labels)
    assert len(backend.matches) == 1 and not backend.misses
    kept = [n for n in linears(backend.graphs[0]) if n.meta["example_value"].shape[-1] == V]
    assert not kept and isinstance(z, LazyLogits) and not z.materialized
    expected, eager = model(*leaves, labels)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) for x in (loss, expected)]
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    same(loss, expected, [t for t, g in zip(leaves, grads[1]) if g is not None], tolerance)
    assert not z.materialized
    assert (z.materialize().double() - eager.double()).norm() <= tolerance * eager.double().norm()
    same(z, eager, [t for t, g in zip(leaves, grads[1]) if g is not None], tolerance)


LEFT = {
    "full rank": (lambda h, w, bias, a, b, a2, b2, c, y: F.cross_entropy(rows(F.linear(h, w) + F.linear(F.linear(h, w[:8]), w)), y),
                  "sum of two heads"),
    "stays wide": (lambda h, w, bias, a, b, a2, b2, c, y: F.cross_entropy(
        rows(F.linear(h.bfloat16(), w.bfloat16()) + F.linear(F.linear(h, a), b)), y), "stays torch.float32"),
    "base read": (lambda h, w, bias, a, b, a2, b2, c, y: (lambda z: F.cross_entropy(rows(z + F.linear(F.linear(h, a), b)), y) + z.sum())(
        F.linear(h, w)), "also read elsewhere"),
    "magnitude": (lambda h, w, bias, a, b, a2, b2, c, y: F.cross_entropy(rows(F.linear(h, w) + c * F.linear(F.linear(h, a), b)), y),
                  "add of 2 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_says_why(name):
    function, reason = LEFT[name]
    *leaves, labels = operands()
    backend, loss = spliced(function, *leaves, labels.view(-1))
    assert not backend.matches and [reason in m.reason for m in backend.misses] == [True]
    torch.testing.assert_close(loss, function(*leaves, labels.view(-1)))
