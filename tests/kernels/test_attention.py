"""What masks are, by exact comparison, and that attention is the same with a mask named as with it handed over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slothc.kernels.attention import Kind, attention, classify, repeat_heads


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def band(length: int, window: int) -> torch.Tensor:
    return causal(length) & ~causal(length).tril(-window)


def additive(mask: torch.Tensor, low: float = float("-inf")) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


@pytest.mark.parametrize("length", [2, 7, 16])
@pytest.mark.parametrize("shape", [(), (1, 1), (3, 1), (3, 2)])
def test_kinds(length: int, shape: tuple[int, ...]) -> None:
    def kind(mask: torch.Tensor) -> Kind:
        return classify(mask.expand(*shape, *mask.shape), length, length)

    assert kind(causal(length)) == Kind("causal", shared=True)
    assert kind(torch.ones(length, length, dtype=torch.bool)) == Kind("none", shared=True)
    assert kind(band(length, length)).name == kind(band(length, length + 5)).name == "causal"
    assert kind(band(length, 1)) == Kind("sliding_window", 1, True)
    if length > 2:
        assert kind(band(length, length - 1)) == Kind("sliding_window", length - 1, True)


@pytest.mark.parametrize("length", [3, 7, 16])
def test_what_only_looks_causal_is_not(length: int) -> None:
    full = torch.ones(length, length, dtype=torch.bool)
    column, one_more, one_less = causal(length), causal(length), causal(length)
    column[:, -1] = True
    one_more[0, 1] = True
    one_less[length // 2, 0] = False
    last_row = torch.zeros_like(full)
    last_row[-1] = True
    lookalikes = (column, one_more, one_less, last_row, full.tril(-1), full.tril(1), full.triu(), full.tril().flip(0))
    for mask in (*lookalikes, ~full):
        assert classify(mask, length, length).name == "other"


def test_one_sequence_of_the_batch_decides() -> None:
    mask = causal(6).repeat(3, 1, 1, 1)
    assert classify(mask, 6, 6) == Kind("causal", shared=True)
    mask[2, :, :, 0] = False
    assert classify(mask, 6, 6) == Kind("other")
    mask[:, :, :, 0] = False
    assert classify(mask, 6, 6) == Kind("other", shared=True)


def test_additive_masks() -> None:
    assert classify(additive(causal(5)), 5, 5).name == "causal"
    assert classify(additive(causal(5), torch.finfo(torch.bfloat16).min), 5, 5).name == "causal"
    assert classify(additive(band(5, 2)), 5, 5) == Kind("sliding_window", 2, True)
    assert classify(torch.zeros(5, 5), 5, 5).name == "none"
    assert classify(additive(causal(5), -100.0), 5, 5).name == "other"
    assert classify(additive(causal(5)) + 1.0, 5, 5).name == "other"
    assert classify(torch.full((5, 5), float("nan")), 5, 5).name == "other"


def test_oblong_and_broadcast_and_empty() -> None:
    oblong = torch.ones(3, 5, dtype=torch.bool)
    assert classify(oblong, 3, 5).name == "none"
    assert classify(oblong.tril(), 3, 5).name == classify(oblong.tril(2), 3, 5).name == "other"
    assert classify(torch.ones(2, 1, 1, 5, dtype=torch.bool), 5, 5).name == "none"
    assert classify(torch.tensor([True, True, False]), 3, 3).name == "other"
    assert classify(torch.ones(0, 0, dtype=torch.bool), 0, 0).name == "none"
    assert classify(torch.ones(1, 1, dtype=torch.bool), 1, 1).name == "none"


def test_long_masks_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slothc.kernels.attention.BLOCK", 64)
    mask = causal(40).repeat(2, 1, 1, 1)
    assert classify(mask, 40, 40).name == "causal"
    mask[1, 0, 33, 34] = True
    assert classify(mask, 40, 40).name == "other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dim", [16, 5])
@pytest.mark.parametrize("length", [1, 9])
def test_named_mask_agrees_with_the_mask(dtype: torch.dtype, heads: tuple[int, int], dim: int, length: int) -> None:
    """Output and gradients, judged against float64: no further from it than SDPA with the mask and repeated heads."""
    error, base = 0.0, 0.0
    for draw in range(5):
        generator = torch.Generator().manual_seed(draw)
        q, k, v, g = (
            torch.randn(2, n, length, dim, generator=generator).to(dtype)
            for n in (heads[0], heads[1], heads[1], heads[0])
        )
        n = heads[0] // heads[1]

        def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int = n) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, repeat_heads(k, n), repeat_heads(v, n), attn_mask=causal(length))

        def named(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int = n) -> torch.Tensor:
            return attention(q, k, v, None, Kind("causal"), enable_gqa=n > 1)

        truth = results(reference, [t.double() for t in (q, k, v)], g.double())
        error += distance(results(named, [q, k, v], g), truth)
        base += distance(results(reference, [q, k, v], g), truth)
    assert error <= 1.10 * base + 5 * (1e-6 if dtype == torch.float32 else 1e-4)


def results(function, inputs: list[torch.Tensor], g: torch.Tensor) -> torch.Tensor:
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return torch.cat([t.detach().double().flatten() for t in (out, *torch.autograd.grad(out, inputs, g))])


def distance(a: torch.Tensor, truth: torch.Tensor) -> float:
    return float((a - truth).norm() / truth.norm())


def test_window_and_fully_masked_rows_are_left_to_sdpa() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    mask = band(6, 2).repeat(2, 1, 1, 1)
    mask[0, :, 0] = False
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v, mask, Kind("other")), expected, rtol=0, atol=0, equal_nan=True)


def test_autocast_and_dropout() -> None:
    q, k, v = (torch.randn(2, n, 6, 8) for n in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, None, Kind("causal"), enable_gqa=True)
        expected = F.scaled_dot_product_attention(q, repeat_heads(k, 2), repeat_heads(v, 2), is_causal=True)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.manual_seed(1)
    out = attention(q, k, v, None, Kind("causal"), 0.5, enable_gqa=True)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(
        q, repeat_heads(k, 2), repeat_heads(v, 2), attn_mask=causal(6), dropout_p=0.5
    )
    torch.testing.assert_close(out, expected)


def test_empty_sequences() -> None:
    q, k, v = (torch.randn(2, 4, 0, 8, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, None, Kind("causal"))
    out.sum().backward()
    assert out.shape == (2, 4, 0, 8) and q.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("named", [True, False])
def test_grouped_heads_on_a_gpu(dtype: torch.dtype, named: bool) -> None:
    q, k, v, g = (torch.randn(2, n, 128, 64, device="cuda", dtype=dtype) for n in (8, 2, 2, 8))
    mask = causal(128).cuda()

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, None if named else mask, Kind("causal" if named else "other"), enable_gqa=True)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, repeat_heads(k, 4), repeat_heads(v, 4), attn_mask=mask)

    truth = results(reference, [t.double() for t in (q, k, v)], g.double())
    base = distance(results(reference, [q, k, v], g), truth)
    assert distance(results(ours, [q, k, v], g), truth) <= 1.10 * base + (1e-6 if dtype == torch.float32 else 1e-4)
