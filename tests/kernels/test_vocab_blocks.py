"""A head that is not trained, by blocks of the vocabulary: the numerical contract wherever the label and the greatest logit lie, what is no
number, seams, memory, the op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slothc.gradients.vocabulary import Chain
from slothc.kernels import handwritten, packed, rescaled, rowwise, vocab_blocks, vocab_chunks
from slothc.kernels.shapes import ROW_LIMIT
from slothc.kernels.vocab import NAMES, linear_cross_entropy
from slothc.kernels.vocab_chain import logits
from slothc.kernels.vocab_chunks import Operands, Wants
from slothc.kernels.vocab_rows import Loss
from vocab_case import CHAINS, DRAWS, Allocations, assert_contract, draw, in_double, run

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LANES, GROUP = 64, 16
MORE = {
    "clamp": "{d}; cast fp32; clamp -2.0 3.0 fp32",
    "shifted": "{d}; cast fp32; neg fp32; add 3.5 fp32",
    "cap of 50": "{d}; div 50.0 {d}; tanh {d}; mul 50.0 {d}",
}
TEXTS = CHAINS | MORE
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")   # what is masked may overflow
# the interpreter rounds to bfloat16 towards zero
RUNS = [(low, d) for low in ("torch", "triton") for d in (torch.float32, torch.bfloat16) if CUDA or (low, d) != ("triton", torch.bfloat16)]
SEEDS = {"torch": DRAWS, "triton": DRAWS if CUDA else 2}                   # the interpreter is slow


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of tokens and five blocks of a vocabulary of 257, on a device with Triton whose rows run in Triton or, where that is
    broken, in PyTorch."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    monkeypatch.setattr(vocab_blocks, "TOKENS", GROUP)
    monkeypatch.setattr(vocab_blocks, "BLOCK_BYTES", GROUP * LANES * given.get("dtype", torch.float32).itemsize)
    monkeypatch.setattr(vocab_blocks, "STEP", 8)
    which = given.get("which", "torch")
    monkeypatch.setattr(vocab_blocks, "available", lambda device: True)
    for module in (rowwise, handwritten, packed):
        monkeypatch.setattr(module, "available", lambda device: which == "triton")


def frozen(seed, dtype, **shape):
    """hidden, which is trained; weight and bias, which are not; labels; the upstream gradient."""
    hidden, weight, bias, labels, upstream = draw(seed, dtype, DEVICE, **shape)
    return hidden, weight.detach(), None if bias is None else bias.detach(), labels, upstream


def three(given, dtype, text="{d}; cast fp32", reduction="mean", **how):
    """(sloth, eager, float64 truth): each the loss and hidden's gradient."""
    *ops, labels, upstream = given
    text, how = text.format(d=NAMES[dtype]), {"reduction": reduction, **how}
    chain = Chain.parse(text)
    sloth = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, chain=text, **how), ops, upstream)
    eager = run(lambda h, w, b: F.cross_entropy(logits(h, w, b, chain), labels, **how), ops, upstream)
    wide = [None if t is None else t.detach().double() for t in ops]
    wide[0].requires_grad_()
    truth = run(lambda h, w, b: F.cross_entropy(logits(h, w, b, in_double(chain)), labels, **how), wide, upstream)
    return sloth, eager, truth


def hold(draws, dtype):
    """The contract; PyTorch's lowering rounds to bfloat16 as a device does."""
    assert_contract(draws, dtype, truncated=False)


def blocks(vocab, dtype):
    """The number of the block in which each logit lies."""
    return torch.arange(vocab, device=DEVICE) // vocab_blocks.geometry(GROUP, vocab, dtype.itemsize)[1]


@pytest.mark.parametrize("which, dtype", RUNS, ids=str)
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_contract(which, dtype, name, reduction):
    hold([three(frozen(s, dtype), dtype, TEXTS[name], reduction) for s in range(SEEDS[which])], dtype)


@pytest.mark.parametrize("which, dtype", RUNS, ids=str)
@pytest.mark.parametrize("shape", [{"n": 1, "bias": False}, {"v": 1}, {"v": 2}, {"v": 64}, {"v": 65}, {"v": 131}, {"n": 16}, {"n": 17},
                                   {"bias": False}, {"d": 1}, {"n": 33, "v": 40}], ids=str)  # fmt: skip
def test_seams(which, dtype, shape):
    for reduction in ("mean", "none"):
        hold([three(frozen(s, dtype, **shape), dtype, reduction=reduction) for s in range(SEEDS[which])], dtype)


@pytest.mark.parametrize("which, dtype", RUNS, ids=str)
@pytest.mark.parametrize("place", [0, 63, 64, 130, 256])
def test_the_label_may_lie_in_any_block(which, dtype, place):
    def given(seed):
        *ops, labels, upstream = frozen(seed, dtype)
        return *ops, torch.full_like(labels, place), upstream

    hold([three(given(s), dtype, reduction="none") for s in range(SEEDS[which])], dtype)


@pytest.mark.parametrize("which, dtype", RUNS, ids=str)
@pytest.mark.parametrize("confidence", [1.0, 3.0, 10.0, -3.0, -10.0])
@pytest.mark.parametrize("name", ["float", "soft-cap"])
def test_a_model_that_is_sure(which, dtype, confidence, name):
    """1 - p_y from 1 down to nothing, and p_y from 1 down to nothing."""
    def given(seed):
        hidden, weight, bias, labels, upstream = frozen(seed, dtype)
        hidden = (hidden.detach() * 0.1 + confidence * weight[labels.clamp(min=0)]).requires_grad_()
        return hidden, weight, bias, labels, upstream

    hold([three(given(s), dtype, TEXTS[name], "none") for s in range(SEEDS[which])], dtype)


@pytest.mark.parametrize("which, dtype", RUNS, ids=str)
@pytest.mark.parametrize("step", [30.0, 50.0, 5000.0, -50.0, -5000.0])
@pytest.mark.parametrize("every", [False, True], ids=["after the first", "each block"])
def test_blocks_far_from_one_another(which, dtype, step, every, monkeypatch):
    """Later logits far above the first, so that the sums are rescaled, or far below."""
    factors = []
    real = vocab_blocks.rescale
    monkeypatch.setattr(vocab_blocks, "rescale", lambda a, by: factors.append(by.clone()) or real(a, by))

    def given(seed):
        hidden, weight, bias, labels, upstream = frozen(seed, dtype)
        block = blocks(bias.shape[0], dtype)
        lift = step * (block if every else block.clamp(max=1))
        if abs(step) > 100:
            lift = lift - (lift.max() if step > 0 else 0.0)                # the greatest of ordinary size: the rest is masked
        return hidden, weight, (bias + lift).to(dtype), labels, upstream

    draws = [given(s) for s in range(SEEDS[which])]
    hold([three(d, dtype, reduction="none") for d in draws], dtype)
    assert any(bool((f != 1).any()) for f in factors) == (step > 40 or (every and step > 0))


@pytest.mark.parametrize("which, dtype", RUNS, ids=str)
@pytest.mark.parametrize("masked", [(0,), (1,), (4,), (0, 1, 2), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("by", [-torch.inf, None], ids=["-inf", "least number"])
def test_blocks_of_masked_logits(which, dtype, masked, by):
    def given(seed):
        hidden, weight, bias, labels, upstream = frozen(seed, dtype)
        hit = torch.isin(blocks(bias.shape[0], dtype), torch.tensor(masked, device=DEVICE))
        labels = torch.where(hit[labels.clamp(min=0)], -100, labels)
        bias = bias.masked_fill(hit, torch.finfo(dtype).min if by is None else by)
        return hidden, weight * 0.5, bias, labels, upstream

    hold([three(given(s), dtype, reduction="none") for s in range(SEEDS[which])], dtype)


@pytest.mark.parametrize("which", ["torch", "triton"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 256])
@pytest.mark.parametrize("at_label", [False, True])
def test_what_is_no_number_is_as_in_eager(which, value, place, at_label):
    hidden, weight, bias, labels, upstream = frozen(0, torch.float32, n=20)
    labels = torch.where(labels == -100, -100, place if at_label else (labels + (labels == place)) % 257)
    labels[0] = -100                                                        # an ignored token stays without effect
    bias[place] = value
    sloth, eager, _ = three((hidden, weight, bias, labels, upstream), torch.float32, reduction="none")
    counts = labels != -100
    for ours, theirs in zip(sloth, eager):
        torch.testing.assert_close(ours[counts], theirs[counts], equal_nan=True, rtol=1e-4, atol=1e-5)
        assert (ours[~counts] == 0).all()


@pytest.mark.parametrize("which", ["torch", "triton"])
def test_every_logit_masked(which):
    *ops, labels, upstream = frozen(0, torch.float32, n=5)
    ops[2].fill_(-torch.inf)
    (loss, grad), (theirs, _), _ = three((*ops, labels, upstream), torch.float32, reduction="none")
    assert torch.equal(loss.isnan(), theirs.isnan()) and torch.equal(grad.isnan().all(1), theirs.isnan())


@pytest.mark.parametrize("which", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", ["ignored", "empty"])
def test_nothing_to_learn_from_is_what_eager_says(which, reduction, labels):
    *ops, _, _ = frozen(0, torch.float32, n=0 if labels == "empty" else 6)
    target = torch.full((ops[0].shape[0],), -100, device=DEVICE)
    sloth, eager, _ = three((*ops, target, torch.ones(ops[0].shape[0], device=DEVICE)), torch.float32, reduction=reduction)
    for a, b in zip(sloth, eager):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("which", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_that_are_not_left_out(which, reduction, monkeypatch):
    """As on a device, which alone knows how many there are; one of them has no numbers."""
    monkeypatch.setattr(vocab_blocks, "counting", lambda ops, loss: (None, ops))
    for ignore_index in (-100, 0):
        hidden, weight, bias, labels, upstream = frozen(0, torch.float32)
        labels[labels == -100] = ignore_index
        clean = three((hidden, weight, bias, labels, upstream), torch.float32, reduction=reduction, ignore_index=ignore_index)
        hold([clean], torch.float32)
        with torch.no_grad():
            hidden[int((labels == ignore_index).nonzero()[0])] = torch.nan
        spoilt, _, _ = three((hidden, weight, bias, labels, upstream), torch.float32, reduction=reduction, ignore_index=ignore_index)
        for a, b in zip(spoilt, clean[0]):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_out_of_range_is_nan_on_a_device(which, reduction, monkeypatch):
    monkeypatch.setattr("slothc.kernels.vocab._labels_out_of_range", lambda labels, vocab, ignore: (labels >= vocab) & (labels != ignore))
    *ops, labels, upstream = frozen(0, torch.float32)
    labels[3] = 257
    loss, grad = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    assert loss.isnan().any() and grad[3].isnan().any()
    if reduction == "none":
        assert loss.isnan().sum() == 1 and grad.isnan().any(1).sum() == 1


@pytest.mark.parametrize("which, dtype", RUNS, ids=str)
def test_the_gradient_kept_in_three_bytes(which, dtype, monkeypatch):
    monkeypatch.setattr("slothc.kernels.vocab.packs", lambda t: t.dtype == torch.bfloat16)
    for reduction in ("mean", "none"):
        hold([three(frozen(s, dtype), dtype, reduction=reduction) for s in range(SEEDS[which])], dtype)


@pytest.mark.parametrize("which", ["torch", "triton"])
def test_both_loops_agree_and_a_backward_may_come_twice(which, monkeypatch):
    *ops, labels, _ = frozen(0, torch.float32)
    loss = linear_cross_entropy(*ops, labels)
    first, again = torch.autograd.grad(loss, ops[0], retain_graph=True)[0], torch.autograd.grad(loss * 3, ops[0])[0]
    torch.testing.assert_close(first * 3, again)
    monkeypatch.setattr(vocab_blocks, "takes", lambda *a: False)
    torch.testing.assert_close(linear_cross_entropy(*ops, labels), loss)
    torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy(*ops, labels), ops[0])[0], first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_op_agrees_with_the_direct_path(which, reduction, monkeypatch):
    *ops, labels, upstream = frozen(0, torch.float32)
    direct = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    monkeypatch.setattr("slothc.kernels.vocab._is_plain", lambda t: False)
    through = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    for a, b in zip(direct, through):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "soft-cap"])
def test_blocks_longer_than_a_row_in_one_program(name, monkeypatch):
    monkeypatch.setattr(rowwise, "available", lambda device: True)
    monkeypatch.setattr(vocab_blocks, "BLOCK_BYTES", (ROW_LIMIT * 3 // 2) * 4)
    given = frozen(0, torch.float32, n=1, d=4, v=2 * ROW_LIMIT + 100)
    assert vocab_blocks.geometry(1, 2 * ROW_LIMIT + 100, 4)[1] > ROW_LIMIT
    hold([three(given, torch.float32, TEXTS[name], "none")], torch.float32)


def test_what_is_made_here():
    loss = Loss("bf16", -100, 0.0, "mean", torch.bfloat16)
    ops = Operands(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16), None, torch.zeros(2, dtype=torch.int64))
    alone = Wants(hidden=True)
    assert vocab_blocks.takes(ops, loss, alone)
    for wants in (Wants(), Wants(weight=True), Wants(hidden=True, weight=True), Wants(hidden=True, bias=True)):
        assert not vocab_blocks.takes(ops, loss, wants)
    for smoothing in (0.1, -1.0):
        assert not vocab_blocks.takes(ops, Loss("bf16", -100, smoothing, "mean", torch.bfloat16), alone)
    half = Operands(ops.hidden.half(), ops.weight.half(), None, ops.labels)
    adapted = Operands(ops.hidden, ops.weight, None, ops.labels, torch.ones(2, 1), torch.ones(4, 1))
    assert not vocab_blocks.takes(half, loss, alone) and not vocab_blocks.takes(adapted, loss, alone)


def test_bounded_logits_need_no_maximum():
    for text, high in (("bf16; div 30.0 bf16; tanh bf16; mul 30.0 bf16", 30.0), ("bf16", None), (MORE["cap of 50"].format(d="bf16"), None)):
        assert vocab_blocks.bound(text) == high
        ops = [s.value.op for s in vocab_blocks.block_plan(text).program.reductions]
        assert ops.count("max") == (high is None)


def test_geometry(monkeypatch):
    monkeypatch.undo()
    mib = 1 << 20
    for tokens, width, vocab, most in ((8192, 4096, 128256, 1.22), (8192, 2304, 256000, 1.28), (4096, 4096, 128256, 1.19)):
        rows, lanes = vocab_blocks.geometry(tokens, vocab, 2)
        assert rows % 128 == lanes % 4096 == 0 and rows * lanes * 2 <= vocab_blocks.BLOCK_BYTES and lanes <= ROW_LIMIT
        held = vocab * width * 2 + tokens * width * (2 + 3) + rows * width * 4 + rows * lanes * 2 + 2 * mib
        assert held <= most * 2**30 and tokens * width * 2 <= rows * width * 4 + rows * lanes * 2
    assert len({vocab_blocks.geometry(n, 128256, 2)[1] for n in range(1024, 10000)}) <= 3
    for tokens, vocab in ((0, 7), (1, 10**8), (5, 100), (1000, 257), (2049, 50257)):
        rows, lanes = vocab_blocks.geometry(tokens, vocab, 2)
        assert 1 <= rows <= max(1, tokens) and 1 <= lanes <= vocab and rows * lanes * 2 <= vocab_blocks.BLOCK_BYTES


def test_rescaled_rows_alone_are_touched(monkeypatch):
    a, by = torch.randn(5, 2500, device=DEVICE), torch.tensor([1.0, 0.5, 1.0, torch.nan, 0.0], device=DEVICE)
    for which in (False, True):
        monkeypatch.setattr(handwritten, "available", lambda device, which=which: which)
        ours = a.clone()
        rescaled.rescale(ours, by)
        torch.testing.assert_close(ours, a * by.unsqueeze(1), equal_nan=True, rtol=0, atol=0)
    rescaled.rescale(a[:0], by[:0])


def test_nothing_of_tokens_times_vocabulary_is_allocated():
    n, d, v = 512, 8, 2570
    *ops, labels, upstream = frozen(0, torch.float32, n=n, d=d, v=v)
    with Allocations() as seen:
        run(lambda h, w, b: linear_cross_entropy(h, w, b, labels), ops, upstream)
    assert 0 < seen.largest <= max(vocab_blocks.BLOCK_BYTES, n * d * 4, v * d * 4) < vocab_chunks.CPU_CHUNK_BYTES
