"""Written-out attention that a kernel of our own does: soft-caps, sinks, biases, 16 bits; what is still left, with its reason.

The kernel's PyTorch lowering stands in for it: here it is asked whether the rule and its binding say the right thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
import whole
from captured import graphs_of
from slothc.kernels import scores
from slothc.patterns.rule import Match
from torch import Tensor, nn

import slothc.bind.proof
import slothc.view
from slothc.bind.attention import Scored, bind

LENGTH, DIM, HEADS = 18, 8, 4
TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
CAPPED = "fp32; mul 0.25 fp32; div 5.0 fp32; tanh fp32; mul 5.0 fp32"


@pytest.fixture(autouse=True)
def generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that kernels are generated for."""
    monkeypatch.setattr(slothc.view, "available", lambda device: True)
    monkeypatch.setattr(scores, "available", lambda device: False)
    monkeypatch.setattr(slothc.bind.proof, "_proofs", {})


class Attend(nn.Module):
    """``function(self, q, k, v)`` as a model of its own, with what some of them learn."""

    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.sinks = nn.Parameter(torch.linspace(-1, 1, HEADS).to(dtype))
        self.bias = nn.Parameter(torch.zeros(HEADS, LENGTH, LENGTH, dtype=dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(self, q, k, v)


def below(q: Tensor, window: int = LENGTH) -> Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    return (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)


def least(q: Tensor, seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)


def repeated(k: Tensor) -> Tensor:
    b, h, t, d = k.shape
    return k[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)


def cap(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Gemma 2 spells it."""
    weights = torch.matmul(q, repeated(k[:, :2]).transpose(2, 3)) * 0.25
    weights = torch.tanh(weights / 5.0) * 5.0 + least(q, below(q))[None, None]
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0), repeated(v[:, :2])).transpose(1, 2).contiguous()


def cap_window(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.25 / 5.0).tanh().mul(5.0)
    return scores.masked_fill(~below(q, 5), float("-inf")).softmax(-1) @ v


def sink(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As gpt-oss spells it."""
    weights = q @ k.transpose(2, 3) * 0.3 + least(q, below(q, 7))
    sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    weights = torch.cat([weights, sinks], dim=-1)
    weights = weights - weights.max(dim=-1, keepdim=True).values
    return F.softmax(weights, dim=-1, dtype=weights.dtype)[..., :-1].to(v.dtype) @ v


def sink_alone(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = self.sinks[None, :, None, None].expand(2, HEADS, q.shape[2], 1)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1] @ v


def alibi(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias for each head, then flags: two steps of a mask."""
    i = torch.arange(q.shape[2])
    slopes = (2.0 ** -torch.arange(1, HEADS + 1)).to(q.dtype)
    scores = (q @ k.mT / 5.0).tanh() * 5.0 + slopes[:, None, None] * (i[None, :] - i[:, None])
    return torch.where(below(q), scores, torch.finfo(q.dtype).min).softmax(-1) @ v


def bias(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return ((q @ k.mT).clamp(-2.0, 2.0) + (i[None, :] - i[:, None]).to(q.dtype) * 0.1).softmax(-1) @ v


def flags(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = ~below(q)
    hidden[3] = True
    return torch.sigmoid(q @ k.mT).masked_fill(hidden.roll(2, 0), -1e35).softmax(-1) @ v


FOUND: dict[Callable[..., Tensor], tuple[str, str]] = {
    cap: (CAPPED, "causal"), cap_window: (CAPPED, "sliding_window"), sink: ("fp32; mul 0.3 fp32", "sliding_window"),
    sink_alone: ("fp32", "none"), alibi: ("fp32; div 5.0 fp32; tanh fp32; mul 5.0 fp32", "other"),
    bias: ("fp32; clamp -2.0 2.0 fp32", "other"), flags: ("fp32; sigmoid fp32", "other"),
}  # fmt: skip


def heads(dtype: torch.dtype, seed: int = 2, length: int = LENGTH) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, length, DIM, generator=made).to(dtype).requires_grad_() for _ in range(3)]


def found(model: Attend, given: list[Tensor]) -> tuple[list[Match], list[str]]:
    graphs = graphs_of(model, **dict(zip("qkv", given)))
    matches = [m for g in graphs for m in g.found.matches if m.rule == "attention"]
    return matches, [m.reason for g in graphs for m in g.found.misses if m.rule == "attention"]


def gradients(run: Callable[..., Tensor], owner: Attend, given: list[Tensor]) -> list[Tensor]:
    out = run(*given)
    made = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    leaves = [*given, *([owner.sinks] if "sink" in owner.function.__name__ else [])]
    return [out.detach(), *torch.autograd.grad(out, leaves, made)]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What kernels are asked for."""
    asked: list[str] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, **how: Any) -> Tensor:
        asked.append(how["kind"] if mask is None else "other")
        return scores.attend(q, k, v, mask, sinks, **how)

    monkeypatch.setattr(slothc.bind.attention, "attended", watched)
    yield asked


@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_it_is_found_and_holds_the_contract(function: Callable[..., Tensor], dtype: torch.dtype, kinds: list[str]) -> None:
    owner = Attend(function, dtype)
    matches, reasons = found(owner, heads(dtype))
    chain, kind = FOUND[function]
    assert len(matches) == 1 and reasons == [] and matches[0].attrs["chain"] == chain
    assert matches[0].attrs["out_swapped"] == (function is cap)
    (call,) = bind(matches[0])
    assert isinstance(call.target, Scored) and (matches[0].inputs["sinks"] is not None) == ("sink" in function.__name__)
    torch._dynamo.reset()
    compiled, sums = torch.compile(owner, backend="sloth"), {}
    wide = Attend(function, dtype).double()
    for seed in range(5):
        given = heads(dtype, seed)
        with whole.used():
            ours = gradients(compiled, owner, given)
        with tm.Wide():
            true = gradients(wide, wide, [t.detach().double().requires_grad_() for t in given])
        for k, (a, b, t) in enumerate(zip(ours, gradients(owner, owner, given), true, strict=True)):
            assert a.shape == b.shape and a.dtype == b.dtype
            errors = [float((x.double() - t).square().sum()) for x in (a, b)]
            sums[k] = [s + e for s, e in zip(sums.get(k, [0.0] * 3), (*errors, float(t.square().sum())))]
    for ours_, eager, size in sums.values():
        assert (ours_ / size) ** 0.5 <= 1.10 * (eager / size) ** 0.5 + TINY[dtype], sums
    assert set(kinds) == {kind}


def two_steps(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + least(q, below(q))) / 5.0).tanh().softmax(-1) @ v


def learned(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tanh() + self.bias).softmax(-1) @ v


def by_query(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v


def kept_sink(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = self.sinks[None, :, None, None].expand(2, HEADS, q.shape[2], 1)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., 1:] @ v


def gated(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * torch.sigmoid(q.sum(-1, keepdim=True))).softmax(-1) @ v


def seen(self: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).tanh().softmax(-1)
    return weights @ v + weights[..., :1]


REASONS: dict[Callable[..., Tensor], str] = {
    two_steps: "goes through the scores' chain", learned: "the mask is learned", by_query: "not one for each head",
    kept_sink: "some of its weights are left out", gated: "of more than themselves", seen: "read elsewhere",
}  # fmt: skip


@pytest.mark.parametrize("function", REASONS, ids=lambda f: f.__name__)
def test_what_is_left_has_a_reason(function: Callable[..., Tensor]) -> None:
    owner = Attend(function, torch.float32)
    matches, reasons = found(owner, heads(torch.float32))
    assert matches == [] and len(reasons) == 1 and REASONS[function] in reasons[0]
    torch._dynamo.reset()
    for mine, eager in zip(*(gradients(run, owner, heads(torch.float32)) for run in (torch.compile(owner, backend="sloth"), owner))):
        torch.testing.assert_close(mine, eager, rtol=5e-6, atol=5e-6)


def test_every_length() -> None:
    owner = Attend(cap, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(owner, backend="sloth")
    for length in (18, 7, 33, 3):
        given = heads(torch.float32, length=length)
        for mine, eager in zip(gradients(compiled, owner, given), gradients(owner, owner, given), strict=True):
            torch.testing.assert_close(mine, eager, rtol=5e-6, atol=5e-6)


def test_no_scores_are_kept() -> None:
    owner, given = Attend(cap, torch.bfloat16), heads(torch.bfloat16, length=64)
    compiled = torch.compile(owner, backend="sloth")

    def most(run: Callable[..., Tensor]) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            run(*given)
        return max(sizes)

    torch._dynamo.reset()
    compiled(*given)
    assert most(compiled) < 2 * HEADS * 64 * 64 <= most(owner)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before its first result is used, also where the scores are too many to be checked."""
    right = slothc.bind.proof.attend
    monkeypatch.setattr(slothc.bind.proof, "attend", lambda *a, **k: right(*a, **k) * 1.01)
    monkeypatch.setattr("slothc.check.TRIAL", 1)
    owner, given = Attend(cap, torch.float32), heads(torch.float32)
    torch._dynamo.reset()
    with pytest.warns(match="leaves attention of torch.float32 to eager: result is 1.00e-02"):
        ours = gradients(torch.compile(owner, backend="sloth"), owner, given)
    for mine, eager in zip(ours, gradients(owner, owner, given), strict=True):
        torch.testing.assert_close(mine, eager, rtol=5e-6, atol=5e-6)


def test_under_autocast() -> None:
    """Operands in fp32, products in bf16: they are rounded as autocast rounds them."""
    owner, given = Attend(cap, torch.float32), heads(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(owner, backend="sloth")
    with tm.watched() as graphs, torch.autocast("cpu", torch.bfloat16):
        ours = gradients(compiled, owner, given)
        eager = gradients(owner, owner, given)
    assert tm.counted(graphs)["attention"] == 1
    wide = Attend(cap, torch.float32).double()
    with tm.Wide():
        true = gradients(wide, wide, [t.detach().double().requires_grad_() for t in given])
    for a, b, t in zip(ours, eager, true, strict=True):
        assert a.dtype == b.dtype and float((a - t).norm()) <= 1.10 * float((b - t).norm()) + 1e-4 * float(t.norm())


@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("name, counts", [("gemma2", {"rms_norm": 9, "rope": 4}), ("gpt_oss", {"rms_norm": 5, "rope": 4})])
def test_whole_models(name: str, counts: dict[str, int], dtype: torch.dtype) -> None:
    """Two layers, one of them with a window shorter than the text."""
    owner = whole.model(name, dtype)
    torch._dynamo.reset()
    graphs = whole.contract(owner, torch.compile(owner, backend="sloth"), dtype)
    used = tm.counted(graphs)
    assert used["attention"] == 2 and counts.items() <= used.items()
