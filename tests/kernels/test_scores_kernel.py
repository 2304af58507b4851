"""Attention with a chain of steps, masks, sinks, grouped heads: value and every gradient by the numerical contract, odd shapes, strides."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from slothc.kernels import scores, scores_launch
from slothc.kernels.scores import attend
from slothc.kernels.scores_launch import Blocks
from slothc.kernels.scores_rows import bits, whole
from slothc.kernels.scores_written import written
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("error:sloth computes attention")   # PyTorch in a kernel's place would pass everything
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
SCALE, CAP = "fp32; mul 0.25 fp32", "fp32; mul 0.25 fp32; div 5 fp32; tanh fp32; mul 5 fp32"
ODD = "fp32; mul -0.3 fp32; clamp -2 2 fp32; sigmoid fp32; add 1 fp32; softplus fp32"
DRAWS = 5
# how it runs, and in which dtypes: the interpreter rounds to bfloat16 towards zero
RUNS = [("torch", d) for d in TINY] + [("triton", d) for d in TINY if CUDA or d is not torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Shapes, what happens to the scores, and how the mask is made: by ``kind``, or a tensor (``mask``)."""

    q: int = 40
    k: int = 40
    heads: int = 2
    groups: int = 1
    dim: int = 16
    value: int = 16
    chain: str = SCALE
    kind: str = "none"
    window: int = 0
    mask: str = ""
    sinks: bool = False
    batch: int = 2

    def draw(self, seed: int, dtype: torch.dtype, device: str = DEVICE) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """Operands (laid out as a model's: [batch, length, head, dim] in memory), the mask, the gradient that arrives."""
        made = torch.Generator().manual_seed(seed)
        sizes = ((self.q, self.heads, self.dim), (self.k, self.groups, self.dim), (self.k, self.groups, self.value))
        ops = [torch.randn(self.batch, *s, generator=made).to(device, dtype).transpose(1, 2) for s in sizes]
        ops += [torch.randn(self.heads, generator=made).to(device, dtype)] if self.sinks else []
        upstream = torch.randn(self.batch, self.q, self.heads, self.value, generator=made).to(device, dtype).transpose(1, 2)
        return [t.requires_grad_() for t in ops], self.tensor(made, dtype, device), upstream

    def tensor(self, made: torch.Generator, dtype: torch.dtype, device: str) -> Tensor | None:
        if not self.mask:
            return None
        shape = (self.batch, 1, self.q, self.k)
        if self.mask == "bias":                                            # one for each head, not for the batch; of another dtype
            return torch.randn(self.heads, self.q, self.k, generator=made).to(device)[None].expand(self.batch, -1, -1, -1)
        seen = torch.rand(shape, generator=made) > 0.3
        seen[..., 0] = True
        if "shut" in self.mask:
            seen[:, :, self.q // 2] = False
        if "flags" in self.mask:
            return seen.to(device)
        wide = torch.float32 if dtype is torch.float16 else dtype           # which has no number that takes in every score
        return torch.zeros(shape, dtype=wide).masked_fill(~seen, torch.finfo(torch.bfloat16).min).to(device)

    @property
    def fill(self) -> float:
        return -1e38 if self.mask == "shut flags" else float("-inf")

    def sloth(self, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask, *sinks, chain=self.chain, kind=self.kind, window=self.window, fill=self.fill)

    def written(self, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.dtype is not torch.bool and q.dtype is not torch.float16:
            mask = mask.to(q.dtype)
        return written(q, k, v, mask, *sinks, chain=self.chain, kind=self.kind, window=self.window, fill=self.fill)


CASES = {
    "plain": Case(),
    "several blocks": Case(q=150, k=150, heads=4, groups=2, chain=CAP, kind="causal", batch=1),
    "a window": Case(q=130, k=130, groups=2, chain=CAP, kind="sliding_window", window=40, sinks=True, batch=1),
    "a window of one": Case(q=70, k=70, kind="sliding_window", window=1, sinks=True, batch=1),
    "a long window": Case(q=90, k=90, kind="sliding_window", window=75),
    "more keys than queries, causal": Case(q=33, k=100, kind="causal"),
    "more queries than keys, window": Case(q=60, k=47, kind="sliding_window", window=47),
    "a learned sink": Case(chain=CAP, kind="causal", sinks=True),
    "odd widths": Case(q=33, k=47, dim=20, value=24, chain=CAP),
    "a mask of numbers": Case(q=33, k=47, dim=20, value=20, mask="numbers"),
    "a bias for each head": Case(q=37, k=41, heads=4, groups=2, chain=CAP, mask="bias", sinks=True),
    "a bias and causal": Case(q=70, k=70, mask="bias", kind="causal", batch=1),
    "a mask of flags": Case(q=70, k=47, mask="flags", sinks=True),
    "a row that sees nothing": Case(q=33, k=47, mask="shut numbers"),
    "a row whose scores are replaced": Case(q=33, k=47, mask="shut flags"),
    "an odd chain": Case(chain=ODD),
    "one query": Case(q=1, k=70, chain=CAP),
    "wide heads": Case(q=20, k=20, dim=96, value=128, batch=1),
    "the widest": Case(q=20, k=33, heads=1, dim=130, value=144, batch=1, chain=CAP),
}


@pytest.fixture(params=RUNS, ids=lambda r: f"{r[0]}-{str(r[1])[6:]}")
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """One lowering and one dtype."""
    lowered(request.param[0], request, monkeypatch)
    return request.param[1]


def lowered(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "triton":
        request.getfixturevalue("triton_kernels")
    monkeypatch.setattr(scores, "available", lambda device: name == "triton")


def everything(function: Any, ops: list[Tensor], mask: Tensor | None, upstream: Tensor) -> list[Tensor]:
    out = function(*ops, mask=mask)
    return [out.detach(), *torch.autograd.grad(out, ops, upstream.to(out.dtype))]


def three(case: Case, seed: int, dtype: torch.dtype, change: Any = None) -> tuple[list[Tensor], ...]:
    """(sloth, eager, float64 truth): each the result and every gradient."""
    ops, mask, upstream = case.draw(seed, dtype)
    if change is not None:
        ops = [t.detach().requires_grad_() for t in change(*ops)]
    wide = [t.detach().double().requires_grad_() for t in ops]
    found = [everything(f, ops, mask, upstream) for f in (case.sloth, case.written)]
    return *found, everything(case.written, wide, mask, upstream)


def hold(draws: list[tuple[list[Tensor], ...]], dtype: torch.dtype) -> None:
    """The contract over all draws, for the result and each gradient."""
    for name, *each in zip(("out", "dq", "dk", "dv", "sinks"), *([list(x) for x in zip(*run)] for run in zip(*draws))):
        ours, eager, true = each
        size = sum(float(t.double().square().sum()) for t in true) ** 0.5
        errors = [sum(float((a.double() - t).square().sum()) for a, t in zip(x, true)) ** 0.5 / size for x in (ours, eager)]
        assert errors[0] <= 1.10 * errors[1] + TINY[dtype], (name, errors)
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, eager)), name


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, run: torch.dtype) -> None:
    hold([three(CASES[name], seed, run) for seed in range(DRAWS)], run)


def test_weights_that_are_nearly_alike(run: torch.dtype) -> None:
    """Where a result rounded to 16 bits would cost the gradients of q and k their digits."""

    def alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return 0.05 * q, 0.05 * k, 1 + 0.05 * v

    for case in (Case(q=10, k=10), Case(q=64, k=64, kind="causal"), Case(q=10, k=10, chain=CAP)):
        hold([three(case, seed, run, alike) for seed in range(8)], run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_more_bits(dtype: torch.dtype) -> None:
    full = torch.cat((torch.randn(4096) * 10, torch.randn(4096) * 1e-3, torch.tensor([0.0, -0.0, 1.0, 256.5])))
    again = whole(full.to(dtype), bits(full, full.to(dtype)))
    left = 2.0**-15 if dtype is torch.bfloat16 else 2.0**-18
    assert bool(((again - full).abs() <= left * full.abs() + (0 if dtype is torch.bfloat16 else 2.0**-25)).all())


@pytest.mark.parametrize("how", ["torch", "triton"])
def test_operands_as_they_lie(how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layout gives the same; the result lies as it was asked for."""
    lowered(how, request, monkeypatch)
    case = Case(q=20, k=28, heads=4, groups=2, chain=CAP)
    ops, _, upstream = case.draw(0, torch.float32)
    expected = everything(case.sloth, ops, None, upstream)
    layouts = {
        "heads first": lambda t: t.contiguous(),
        "dims before lengths": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "a slice of a wider one": lambda t: torch.cat((t, t), 3)[..., : t.shape[3]],
        "every other query": lambda t: torch.stack((t, t), 3).flatten(2, 3)[:, :, ::2],
        "offset": lambda t: torch.cat((t[:1], t))[1:],
    }
    for name, lay in layouts.items():
        given = [lay(t.detach()).requires_grad_() for t in ops]
        for mine, theirs in zip(everything(case.sloth, given, None, lay(upstream)), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    out = attend(*ops, chain=CAP)
    assert out.transpose(1, 2).is_contiguous() and attend(*ops, chain=CAP, swapped=False).is_contiguous()
    (grad,) = torch.autograd.grad(out.sum(), ops[:1])                       # an upstream gradient without memory of its own
    torch.testing.assert_close(grad, everything(case.sloth, ops, None, torch.ones_like(upstream))[1])


@pytest.mark.parametrize("how", ["torch", "triton"])
@pytest.mark.parametrize("case", [Case(q=0), Case(k=0, sinks=True), Case(batch=0)], ids=["no query", "no key", "no batch"])
def test_nothing(case: Case, how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered(how, request, monkeypatch)
    ops, mask, upstream = case.draw(0, torch.float32)
    for mine, theirs in zip(*(everything(f, ops, mask, upstream) for f in (case.sloth, case.written)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("how", ["torch", "triton"])
def test_a_row_without_keys_is_nan(how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With -inf everywhere, as eager has it; other rows know nothing of it."""
    lowered(how, request, monkeypatch)
    ops, mask, _ = Case(q=33, k=47, mask="flags", batch=1).draw(0, torch.float32)
    assert mask is not None
    mask[:, :, 5] = False
    out = attend(*ops, mask, chain=SCALE)
    assert bool(out[:, :, 5].isnan().all()) and int(out.isnan().sum()) == out[:, :, 5].numel()


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (32, 128)], ids=str)
def test_any_block_shape(blocks: tuple[int, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered("triton", request, monkeypatch)
    for name in ("forward", "to_queries", "to_both"):
        monkeypatch.setitem(scores_launch.chosen, (name, 32, 4), Blocks(*blocks, 4, 1))
    monkeypatch.setattr(scores, "_kernels", {})
    for case in (Case(q=90, k=90, kind="sliding_window", window=37), Case(q=90, k=90, kind="causal"), Case(q=90, k=50, mask="bias")):
        hold([three(case, 0, torch.float32)], torch.float32)


@pytest.mark.parametrize("left", [0, 1 << 20, 1 << 30], ids=["made again", "a part at a time", "all left"])
def test_dk_and_dv_apart(left: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two wide accumulators do not fit: from scores that are made again, or from weights that are left in memory."""
    lowered("triton", request, monkeypatch)
    monkeypatch.setattr(scores_launch, "TOGETHER", 16)
    monkeypatch.setattr(scores_launch, "LEFT", left)
    monkeypatch.setattr(scores, "_kernels", {})
    for case in (Case(chain=CAP, kind="causal", heads=4, groups=2), Case(q=33, k=47, mask="shut flags")):
        hold([three(case, seed, torch.float32) for seed in range(2)], torch.float32)


@pytest.mark.parametrize("trained", [s for n in (1, 2) for s in itertools.combinations(range(4), n)], ids=str)
def test_only_what_is_trained_gets_a_gradient(trained: tuple[int, ...]) -> None:
    case = Case(q=12, k=12, sinks=True)
    ops, _, upstream = case.draw(0, torch.float32, "cpu")
    every = everything(case.sloth, ops, None, upstream)
    some = [t.detach().requires_grad_(i in trained) for i, t in enumerate(ops)]
    case.sloth(*some, mask=None).backward(upstream)
    for i, t in enumerate(some):
        assert (t.grad is None) == (i not in trained)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, every[i + 1])


@pytest.mark.parametrize("case", [Case(q=12, k=14, chain=CAP, mask="bias"), Case(q=12, k=12, sinks=True, kind="causal")])
def test_the_op(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes opcheck and agrees with the direct path."""
    ops, mask, upstream = case.draw(0, torch.float32, "cpu")
    given = (*ops[:3], mask, ops[3] if case.sinks else None)
    torch.library.opcheck(scores._op, (*given, case.chain, case.kind, 0, case.fill, True), test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"))  # fmt: skip
    direct = everything(case.sloth, ops, mask, upstream)
    monkeypatch.setattr(scores, "_is_plain", lambda t: False)
    for a, b in zip(direct, everything(case.sloth, ops, mask, upstream)):
        assert torch.equal(a, b)


def test_it_is_differentiated_once() -> None:
    ops, _, _ = Case(q=4, k=4).draw(0, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(attend(*ops, chain=SCALE).sum(), ops, create_graph=True)


def test_what_does_not_fit_is_named() -> None:
    q, k = torch.ones(1, 4, 6, 8), torch.ones(1, 3, 6, 8)
    wrong = {
        r"do not fit each other": ((q, k, k), {}),
        r"must be \[batch, head": ((q, q.double(), q), {}),
        r"take up to 256": ((q.repeat(1, 1, 1, 64),) * 3, {}),
        r"expected one for each of 4 heads": ((q, q, q, None, torch.ones(3)), {}),
        r"requires a gradient": ((q, q, q, torch.ones(6, 6, requires_grad=True)), {}),
        r"expected bool or floating": ((q, q, q, torch.ones(6, 6, dtype=torch.int64)), {}),
        r"sliding_window with a window of 0": ((q, q, q), {"kind": "sliding_window"}),
    }
    for text, (given, how) in wrong.items():
        with pytest.raises(ValueError, match=text):
            attend(*given, chain=SCALE, **how)
    with pytest.raises(ValueError, match="does not start with a dtype"):
        attend(q, q, q, chain="nothing")
