"""Attention written out, as models spell it and otherwise: found, run by a library kernel, equal to eager; or left with a reason."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F
from captured import graphs_of
from contract import Errors, in_float64
from slothc.patterns.rule import Match
from torch import Tensor, nn

from slothc.bind.attention import describe

LENGTH, DIM = 10, 8
LEAST = torch.finfo(torch.float32).min


class Attend(nn.Module):
    """``function(q, k, v)`` as a model of its own."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return self.function(q, k, v, *more)


def below(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()


def additive(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    return torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype).masked_fill(i[None, :] > i[:, None], torch.finfo(q.dtype).min)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(DIM), -1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5 + additive(q)[None, None]
    weights = F.dropout(F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), p=0.0)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * 0.3).matmul(k.permute(0, 1, 3, 2))
    return torch.where(below(q), scores, LEAST).softmax(-1).matmul(v)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q.matmul(k.mT).masked_fill(~below(q), float("-inf")), dim=3).matmul(v)


def upper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    above = torch.triu(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool), diagonal=1)
    return F.softmax((0.5 * (q @ k.mT)).masked_fill(above, float("-inf")), dim=-1) @ v


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = additive(q) + q @ k.transpose(2, 3) * 0.2
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.softmax(-1) @ v


def shifted_pair(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * 0.2 + additive(q)
    return (scores - scores.max(dim=-1, keepdim=True)[0]).softmax(-1) @ v


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys that are kept as [batch, head, dim, length]."""
    keys = torch.tanh(k.permute(0, 1, 3, 2))
    return torch.softmax(q @ keys, -1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :2].repeat_interleave(2, 1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * 0.1
    return torch.where(below(q)[None, None], scores, LEAST).softmax(-1) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    seen = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 4)
    return torch.where(seen, q @ k.mT, LEAST).softmax(-1) @ v


def hidden_beyond(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A condition that says which keys are hidden, not which are seen."""
    i = torch.arange(q.shape[2])
    return (q @ k.mT).masked_fill((i[None, :] > i[:, None]) | (i[None, :] <= i[:, None] - 4), LEAST).softmax(-1) @ v


def sloped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ALiBi: a slope for each head, and a causal mask."""
    i = torch.arange(q.shape[2])
    slopes = (2.0 ** -torch.arange(1, q.shape[1] + 1)).to(q.dtype)
    scores = q @ k.mT * 0.3 + slopes[:, None, None] * (i[None, :] - i[:, None])
    return torch.where(below(q), scores, LEAST).softmax(-1) @ v


def scaled_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * 0.5) / 2.0).masked_fill(~below(q), torch.finfo(q.dtype).min).div(2.0).softmax(-1) @ v


WORDS: dict[Callable[..., Tensor], str] = {
    plain: "none", upcast: "causal", kept: "causal", dropped: "causal", upper: "causal", shifted: "causal", shifted_pair: "causal",
    turned: "none", grouped: "causal", windowed: "sliding_window", hidden_beyond: "sliding_window", sloped: "other", scaled_after: "causal",
}  # fmt: skip


def heads(count: int = 4, dtype: torch.dtype = torch.float32, length: int = LENGTH, seed: int = 2) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(2, count, length, DIM, generator=made).to(dtype).requires_grad_() for _ in range(3)]


def found(function: Callable[..., Tensor], *given: Tensor) -> tuple[list[Match], list[str]]:
    """The attention that is found, and the reasons for what is not."""
    graphs = graphs_of(Attend(function), **dict(zip("qkv", given)))
    matches = [m for g in graphs for m in g.found.matches if m.rule == "attention"]
    return matches, [m.reason for g in graphs for m in g.found.misses if m.rule == "attention"]


def gradients(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    out = function(*given)
    made = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, made)]


def within_contract(function: Callable[..., Tensor], lengths: Iterable[int] = (LENGTH,)) -> None:
    """Compiled once, then the contract for the result and all three gradients, at each length."""
    torch._dynamo.reset()
    compiled, truth = torch.compile(Attend(function), backend="sloth"), in_float64(function)
    for length in lengths:
        seeds, errors = itertools.count(2), Errors()

        def once(length: int = length, seeds: Iterator[int] = seeds, errors: Errors = errors) -> None:
            given = heads(length=length, seed=next(seeds))
            wide = [t.detach().double().requires_grad_() for t in given]
            found = (gradients(run, on) for run, on in ((compiled, given), (function, given), (truth, wide)))
            for name, ours, eager, true in zip(("result", *"qkv"), *found, strict=True):
                errors.add(name, ours, eager, true)

        errors.over(once)


@pytest.mark.filterwarnings("error::slothc.errors.RegionDropped")
@pytest.mark.parametrize("function", WORDS, ids=lambda f: f.__name__)
def test_it_is_found_and_equal(function: Callable[..., Tensor]) -> None:
    given = heads()
    matches, reasons = found(function, *given)
    assert [describe(m) for m in matches] == [WORDS[function]] and reasons == []
    within_contract(function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_stays_as_it_is(dtype: torch.dtype) -> None:
    matches, reasons = found(upcast, *heads(dtype=dtype))
    assert matches == [] and len(reasons) == 1 and "farther from truth" in reasons[0]


def test_why_it_stays_in_16_bits() -> None:
    """Weights that are nearly alike: the gradients of q from a rounded result are several times farther from truth."""

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    off = torch.zeros(2, dtype=torch.float64)
    for seed in range(8):
        q, k, v = heads(dtype=torch.bfloat16, seed=seed)
        given = [t.detach().requires_grad_() for t in (0.05 * q, 0.05 * k, 1 + 0.05 * v)]
        true = gradients(plain, [t.detach().double().requires_grad_() for t in given])[1]
        for side, run in enumerate((fused, plain)):
            off[side] += (gradients(run, given)[1] - true).square().sum()
    assert off[0].sqrt() > 1.10 * off[1].sqrt(), off


def test_no_scores_are_kept() -> None:
    """Of queries x keys numbers nothing is kept for the backward."""
    given, compiled = heads(length=64), torch.compile(Attend(kept), backend="sloth")

    def most(run: Callable[..., Tensor]) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            run(*given)
        return max(sizes)

    torch._dynamo.reset()
    gradients(compiled, given)
    assert most(compiled) < 2 * 4 * 64 * 64 <= most(kept)


def test_every_length() -> None:
    within_contract(kept, lengths=(10, 7, 16, 3))


def hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return torch.where((i > 3)[:, None] & below(q), q @ k.mT, LEAST).softmax(-1) @ v


def hidden_by_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return (q @ k.mT + torch.where((i > 3)[:, None] & below(q), 0.0, LEAST)).softmax(-1) @ v


@pytest.mark.parametrize("function", [hidden, hidden_by_sum])
def test_rows_that_see_nothing(function: Callable[..., Tensor]) -> None:
    """Where every key is shut the weights are all the same, as in eager, and the gradients are eager's."""
    given = heads()
    matches, _ = found(function, *given)
    assert len(matches) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within_contract(function)


def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, q.new_ones(*q.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 5.0) * 5.0).softmax(-1) @ v


def relative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + q.flip(2) @ k.mT).softmax(-1) @ v


def mild(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(below(q), q @ k.mT, -2.0).softmax(-1) @ v


def thinned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v


def shown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights[..., :1]


def scaled_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + torch.linspace(0, 1, q.shape[2])) * 0.5).softmax(-1) @ v


REASONS: dict[Callable[..., Tensor], str] = {
    sink: "more columns than keys", capped: "go through tanh", relative: "two products", mild: "in place of scores",
    thinned: "dropout", shown: "read elsewhere", scaled_mask: "scaled with the scores",
}  # fmt: skip


@pytest.mark.parametrize("function", REASONS, ids=lambda f: f.__name__)
def test_what_the_kernel_has_no_word_for_is_left_with_a_reason(function: Callable[..., Tensor]) -> None:
    given = heads()
    matches, reasons = found(function, *given)
    assert matches == [] and len(reasons) == 1 and REASONS[function] in reasons[0]
    if function is thinned:
        return
    within_contract(function)
