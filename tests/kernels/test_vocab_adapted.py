"""A head with an adapter in chunks: value and gradients by the numerical contract, one rounding, only what is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slothc.gradients.vocabulary import Chain
from slothc.kernels import vocab_chunks, vocab_matrix
from slothc.kernels.vocab import NAMES, linear_argmax, linear_cross_entropy, linear_logsumexp
from slothc.kernels.vocab_chain import logits, picked
from vocab_case import CHAINS, TINY, assert_contract, draw, in_double, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
SCALE = 1.7
DRAWS = 20              # the error of a scalar loss is not known from five


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of tokens, several tiles of the vocabulary."""
    monkeypatch.setattr(vocab_chunks, "CPU_CHUNK_BYTES", 16 * 257 * 4)
    monkeypatch.setattr(vocab_chunks, "GPU_CHUNK_BYTES", 16 * 257 * 4)
    monkeypatch.setattr(vocab_chunks, "GPU_SUMMED_BYTES", 0)
    monkeypatch.setattr(vocab_matrix, "TILE", 64)


def adapter(seed, dtype, device="cpu", n=41, v=257, r=3):
    g = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(s, r, generator=g).to(device, dtype).requires_grad_() for s in (n, v)]


def eager(hidden, weight, bias, low, up, chain):
    return logits(hidden, weight, bias, chain, (low, up, SCALE))


def three(seed, dtype, device, narrow, text, reduction):
    """(sloth, eager, float64 truth): each the loss and its gradients."""
    *ops, labels, upstream = draw(seed, dtype, device)
    ops += adapter(seed, narrow, device)
    chain = Chain.parse(text)
    how = {"chain": text, "reduction": reduction}
    sloth = run(lambda h, w, b, low, up: linear_cross_entropy(h, w, b, labels, **how, adapter=(low, up, SCALE)), ops, upstream)
    theirs = run(lambda *given: F.cross_entropy(eager(*given, chain), labels, reduction=reduction), ops, upstream)
    wide = [t.detach().double().requires_grad_() for t in ops]
    truth = run(lambda *given: F.cross_entropy(eager(*given, in_double(chain)), labels, reduction=reduction), wide, upstream)
    return sloth, theirs, truth


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, narrow", [(d, n) for d in TINY for n in dict.fromkeys((d, torch.float32))], ids=str)
@pytest.mark.parametrize("name", ["float", "soft-cap"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_contract(device, dtype, narrow, name, reduction):
    text = CHAINS[name].format(d=NAMES[dtype])
    assert_contract([three(s, dtype, device, narrow, text, reduction) for s in range(DRAWS)], dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_the_sum_is_rounded_once(device):
    *ops, _, _ = draw(0, torch.bfloat16, device)
    hidden, weight, bias = (t.detach() for t in ops)
    low, up = (t.detach() for t in adapter(0, torch.bfloat16, device))
    z = torch.empty(41, 257, dtype=torch.bfloat16, device=device)
    vocab_matrix.adapted_into(z, hidden, weight, bias, low, up, SCALE)
    exact = F.linear(hidden.double(), weight.double(), bias.double()) + SCALE * low.double() @ up.double().t()
    assert (z.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
    assert ((z.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [(3, 4), (0, 3, 4), (4,), (3,), (0,), (0, 1, 2, 3, 4)])
def test_only_what_is_trained_gets_a_gradient(reduction, trained):
    *ops, labels, upstream = draw(0, torch.float32)
    ops = [t.detach().requires_grad_(k in trained) for k, t in enumerate([*ops, *adapter(0, torch.float32)])]
    ours = run(lambda h, w, b, low, up: linear_cross_entropy(h, w, b, labels, reduction=reduction, adapter=(low, up, SCALE)), ops, upstream)
    theirs = run(lambda *given: F.cross_entropy(eager(*given, Chain("fp32")), labels, reduction=reduction), ops, upstream)
    assert len(ours) == len(theirs) == 1 + len(trained)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_gets_no_buffer(monkeypatch):
    *ops, labels, _ = draw(0, torch.float32)
    seen = []
    made = vocab_chunks.empty_gradients
    monkeypatch.setattr(vocab_chunks, "empty_gradients", lambda *a: seen.append(made(*a)) or seen[-1])
    low, up = adapter(0, torch.float32)
    linear_cross_entropy(*(t.detach() for t in ops), labels, adapter=(low, up, SCALE)).backward()
    assert [g is None for g in seen[0]] == [True, True, True, False, False, True]


def test_functions_of_the_logits():
    *ops, labels, _ = draw(0, torch.float32)
    given = (*adapter(0, torch.float32), SCALE)
    z = logits(*ops, Chain("fp32"), given)
    torch.testing.assert_close(linear_logsumexp(*ops, adapter=given), z.logsumexp(-1))
    assert (linear_argmax(*ops, adapter=given) == z.argmax(-1)).all()
    at = labels.clamp(min=0).unsqueeze(-1)
    torch.testing.assert_close(picked(*ops, Chain("fp32"), at, given), z.gather(-1, at), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_op_agrees_with_the_direct_path(reduction, monkeypatch):
    *ops, labels, upstream = draw(0, torch.float32)
    ops += adapter(0, torch.float32)

    def loss(h, w, b, low, up):
        return linear_cross_entropy(h, w, b, labels, reduction=reduction, adapter=(low, up, SCALE))

    direct = run(loss, ops, upstream)
    monkeypatch.setattr("slothc.kernels.vocab._is_plain", lambda t: False)
    for a, b in zip(direct, run(loss, ops, upstream)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("low, up", [((40, 3), (257, 3)), ((41, 3), (257, 2)), ((41, 3), (256, 3))])
def test_an_adapter_that_does_not_fit_is_named(low, up):
    *ops, labels, _ = draw(0, torch.float32)
    with pytest.raises(ValueError, match=r"low .* and up .* do not fit"):
        linear_cross_entropy(*ops, labels, adapter=(torch.ones(low), torch.ones(up), 1.0))
