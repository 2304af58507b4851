"""Which spellings of a head and its loss are found, what replaces them, and what is left alone and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slothc.patterns.cross_entropy import RULE
from spliced import V, linears, rows, same, spliced

from slothc.lazy_logits import LazyLogits


def operands(bias=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, 8, generator=g).to(dtype).requires_grad_()
    b = torch.randn(V, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (2, 5), generator=g)
    labels[0, 2] = -100
    return (hidden, weight, b, labels) if bias else (hidden, weight, labels)


@pytest.mark.parametrize("sample", RULE.samples, ids=lambda s: s.name)
@pytest.mark.parametrize("dynamic", [False, True])
def test_samples(sample, dynamic):
    args = [t.float().requires_grad_() if t.is_floating_point() else t for t in sample.arguments()]
    backend, loss = spliced(sample.function, *args, dynamic=dynamic)
    assert len(backend.matches) == 1 and not backend.misses
    assert not [n for n in linears(backend.graphs[0]) if n.meta["example_value"].shape[-1] == V]
    same(loss, sample.function(*args), [t for t in args if t.requires_grad])


def flat(z):
    return z.reshape(-1, z.shape[-1])


SPELLINGS = {
    "flatten": lambda z: z.flatten(0, 1),
    "two casts": lambda z: z.float().float().view(-1, V),
    "cast, scale, cap": lambda z: flat(30.0 * torch.tanh(z.float() / 30.0)),
    "scale by a whole number": lambda z: flat(z * 2),
    "subtracted": lambda z: flat(1.0 - z),
    "clamped": lambda z: flat(z.clamp(-2.0, 2.0)),
    "first classes": lambda z: flat(z[..., :20].float()),
    "contiguous": lambda z: flat(z.contiguous().float()),
    "unsqueezed": lambda z: z.unsqueeze(0).view(-1, V),
    "dropout without effect": lambda z: flat(F.dropout(z, 0.0, True)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    hidden, weight, labels = operands()
    labels = labels.clamp(max=19)

    def model(h, w, y):
        return F.cross_entropy(SPELLINGS[name](F.linear(h, w)), y.view(-1))

    backend, loss = spliced(model, hidden, weight, labels)
    assert len(backend.matches) == 1 and not linears(backend.graphs[0])
    same(loss, model(hidden, weight, labels), (hidden, weight))


CALLS = {
    "positional": lambda z, y: F.cross_entropy(z, y, None, None, -100, None, "mean", 0.0),
    "module": lambda z, y: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(z, y),
    "sum and division": lambda z, y: F.cross_entropy(z, y, reduction="sum") / 7,
    "ignore 3": lambda z, y: F.cross_entropy(z, y.clamp(min=0), ignore_index=3),
    "none": lambda z, y: F.cross_entropy(z, y, reduction="none"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    hidden, weight, bias, labels = operands(bias=True)

    def model(h, w, b, y):
        return CALLS[name](F.linear(h, w, b).view(-1, V), y.view(-1))

    backend, loss = spliced(model, hidden, weight, bias, labels)
    assert len(backend.matches) == 1 and backend.matches[0].inputs["bias"] is not None
    same(loss, model(hidden, weight, bias, labels), (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_returned_logits_are_lazy_and_right(dtype):
    hidden, weight, labels = operands(dtype=dtype)

    def model(h, w, y):
        z = torch.tanh(F.linear(h, w) / 3.0) * 3.0
        return F.cross_entropy(z.float().view(-1, V), y.view(-1)), z

    _, (loss, z) = spliced(model, hidden, weight, labels)
    eager_loss, eager = model(hidden, weight, labels)
    assert isinstance(z, LazyLogits) and not z.materialized and z.dtype == dtype
    loss.backward(retain_graph=True)
    assert not z.materialized
    assert torch.equal(z.materialize(), eager)
    same(loss, eager_loss, (hidden, weight), 1e-5 if dtype == torch.float32 else 1e-2)


def test_views_that_are_returned_read_the_lazy_value():
    hidden, weight, labels = operands()

    def model(h, w, y):
        flat = F.linear(h, w).float().view(-1, V)
        return F.cross_entropy(flat, y.view(-1)), flat[:, :4], flat.detach()

    backend, (_, part, whole) = spliced(model, hidden, weight, labels)
    _, eager_part, eager_whole = model(hidden, weight, labels)
    assert isinstance(part, LazyLogits) and isinstance(whole, LazyLogits)
    assert torch.equal(whole.materialize(), eager_whole)
    same(part.materialize(), eager_part, (hidden, weight))
    assert not linears(backend.graphs[0])


def test_autocast():
    hidden, weight, labels = operands()

    def model(h, w, y):
        return F.cross_entropy(F.linear(h, w).float().view(-1, V), y.view(-1))

    with torch.autocast("cpu", torch.bfloat16):
        backend, loss = spliced(model, hidden, weight, labels)
        eager = model(hidden, weight, labels)
    assert backend.matches[0].attrs["chain"] == "bf16; cast fp32"
    same(loss, eager, (hidden, weight), 1e-2)


def test_two_losses_on_the_same_logits():
    hidden, weight, labels = operands()

    def model(h, w, y):
        z = F.linear(h, w).view(-1, V)
        return F.cross_entropy(z, y.view(-1)) + F.cross_entropy(z, y.view(-1).flip(0), reduction="sum")

    backend, loss = spliced(model, hidden, weight, labels)
    assert len(backend.matches) == 2
    same(loss, model(hidden, weight, labels), (hidden, weight))


LEFT = {
    "weighted": (lambda h, w, y: F.cross_entropy(rows(F.linear(h, w)), y, weight=w[:, 0].detach().abs()), "weighted"),
    "float64": (lambda h, w, y: F.cross_entropy(rows(F.linear(h.double(), w.double())), y), "float64"),
    "last token": (lambda h, w, y: F.cross_entropy(F.linear(h, w)[:, -1], y[:2]), "single tokens"),
    "no linear": (lambda h, w, y: F.cross_entropy(rows(h), y % 8), "not a linear of this graph"),
    "softmaxed": (lambda h, w, y: F.cross_entropy(rows(F.linear(h, w).softmax(-1)), y), "stands softmax"),
    "masked": (lambda h, w, y: F.cross_entropy(rows(F.linear(h, w) + w[:, 0]), y), "add of 2 tensors"),
    "later classes": (lambda h, w, y: F.cross_entropy(rows(F.linear(h, w)[..., 1:]), y), "start at 0"),
    "sliced view": (lambda h, w, y: F.cross_entropy(rows(F.linear(h, w))[1:], y[1:]), "after they were reshaped"),
    "detached": (lambda h, w, y: F.cross_entropy(rows(F.linear(h, w).detach()), y), "stands detach"),
    "written": (lambda h, w, y: F.cross_entropy(rows(F.linear(h, w).mul_(2)), y), ""),
    "z-loss": (lambda h, w, y: (lambda z: F.cross_entropy(z, y) + z.pow(2).mean())(rows(F.linear(h, w))), "read by"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_says_why(name):
    function, reason = LEFT[name]
    hidden, weight, labels = operands()
    labels = (labels.clamp(min=0) % (V - 1)).view(-1)
    backend, loss = spliced(function, hidden, weight, labels)
    assert not backend.matches and len(backend.misses) == 1
    assert reason in backend.misses[0].reason and not backend.misses[0]
    torch.testing.assert_close(loss, function(hidden, weight, labels))


def test_other_nodes_are_nothing():
    backend, _ = spliced(lambda h, w: F.linear(h, w).sum(), *operands()[:2])
    assert not backend.matches and not backend.misses
