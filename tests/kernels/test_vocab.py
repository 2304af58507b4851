"""Linear and cross-entropy in chunks: value and gradients by the numerical contract, seams, memory, the op."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from slothc.gradients.vocabulary import Chain
from slothc.kernels import in_place, vocab_chunks, vocab_rows
from slothc.kernels.binding import DTYPE
from slothc.kernels.torch_lowering import TorchLauncher
from slothc.kernels.triton_launch import TritonLauncher
from slothc.kernels.vocab import NAMES, _gradients_op, _op, linear_argmax, linear_cross_entropy, linear_logsumexp
from slothc.kernels.vocab_chain import logits, picked
from vocab_case import CHAINS, DRAWS, INTERPRETED, TINY, Allocations, assert_contract, draw, in_double, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]

@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks for a handful of tokens."""
    monkeypatch.setattr(vocab_chunks, "CPU_CHUNK_BYTES", 16 * 257 * 4)
    monkeypatch.setattr(vocab_chunks, "GPU_CHUNK_BYTES", 16 * 257 * 4)
    monkeypatch.setattr(vocab_chunks, "GPU_SUMMED_BYTES", 0)


def three(seed, dtype, device, text, reduction, smoothing, **shape):
    """(sloth, eager, float64 truth): each the loss and its gradients."""
    hidden, weight, bias, labels, upstream = draw(seed, dtype, device, **shape)
    chain = Chain.parse(text)
    how = {"reduction": reduction, "label_smoothing": smoothing}
    ops = (hidden, weight, bias)
    sloth = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, chain=text, **how), ops, upstream)
    eager = run(lambda h, w, b: F.cross_entropy(logits(h, w, b, chain), labels, **how), ops, upstream)
    wide = tuple(None if t is None else t.detach().double().requires_grad_() for t in ops)
    truth = run(lambda h, w, b: F.cross_entropy(logits(h, w, b, in_double(chain)), labels, **how), wide, upstream)
    return sloth, eager, truth


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_contract(device, dtype, name, reduction):
    text = CHAINS[name].format(d=NAMES[dtype])
    smoothings = itertools.cycle((0.0, 0.1))
    draws = [three(s, dtype, device, text, reduction, 0.0 if s % 2 else next(smoothings)) for s in range(DRAWS)]
    assert_contract(draws, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_hidden_states_kept_in_three_bytes(reduction, monkeypatch):
    monkeypatch.setattr("slothc.kernels.vocab.packs", lambda t: True)
    dtype = torch.float16 if DEVICES == ["cpu"] else torch.bfloat16
    text = f"{NAMES[dtype]}; cast fp32"
    assert_contract([three(s, dtype, "cpu" if DEVICES == ["cpu"] else "cuda", text, reduction, 0.0) for s in range(DRAWS)], dtype)


@pytest.mark.parametrize("shape", [{"n": 1, "bias": False}, {"v": 1}, {"v": 131}, {"n": 16}, {"n": 17}, {"bias": False}, {"d": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_seams(shape, dtype):
    text = f"{NAMES[dtype]}; cast fp32"
    for reduction in ("mean", "none"):
        assert_contract([three(s, dtype, "cpu", text, reduction, 0.0, **shape) for s in range(DRAWS)], dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_only_what_is_trained_gets_a_gradient(reduction, frozen):
    *ops, labels, upstream = draw(0, torch.float32)
    ops = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(ops)]
    if len(frozen) == 3:
        loss = linear_cross_entropy(*ops, labels, reduction=reduction)
        assert not loss.requires_grad
        return
    ours = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    eager = run(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), labels, reduction=reduction), ops, upstream)
    assert len(ours) == len(eager)
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tied_weight_gets_both_gradients():
    weight = torch.randn(57, 8, requires_grad=True)
    ids, labels = torch.randint(0, 57, (2, 6)), torch.randint(0, 57, (2, 6))
    ours = linear_cross_entropy(F.embedding(ids, weight), weight, None, labels)
    eager = F.cross_entropy(F.linear(F.embedding(ids, weight), weight).view(-1, 57), labels.view(-1))
    torch.testing.assert_close(*(torch.autograd.grad(x, weight)[0] for x in (ours, eager)))


def test_no_grad_computes_the_loss_alone(monkeypatch):
    *ops, labels, _ = draw(0, torch.float32)
    modes = []
    monkeypatch.setattr(vocab_chunks, "run_rows", lambda loss, mode, *a, **k: modes.append(mode) or k["losses"].zero_())
    with torch.no_grad():
        assert not linear_cross_entropy(*ops, labels).requires_grad
    assert set(modes) == {"value"}


def test_backward_twice_and_other_upstream():
    *ops, labels, _ = draw(0, torch.float32)
    loss = linear_cross_entropy(*ops, labels)
    first = torch.autograd.grad(loss, ops, retain_graph=True)
    again = torch.autograd.grad(loss * 3, ops)
    for a, b in zip(first, again):
        torch.testing.assert_close(a * 3, b)


@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_weight_is_rounded_in_place_where_nobody_reads_its_sums_again(tied, upstream, device, monkeypatch):
    """The same bits as beside them; the sums stay where a second backward, or who was given them, may read them."""
    monkeypatch.setattr(in_place, "LEAST", 0)
    monkeypatch.setattr(in_place, "FIRST", 5)
    rounded = in_place.rounded_in_place
    places = []

    def noted(sums, *more):
        places.extend([sums.data_ptr()] * (sums.shape[0] == 57))           # hidden's sums lie in fp32, too, where they are not packed
        return rounded(sums, *more)

    monkeypatch.setattr(in_place, "rounded_in_place", noted)
    torch.manual_seed(4)
    weight = torch.randn(57, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids, labels = (torch.randint(0, 57, (2, 6), device=device) for _ in range(2))

    def loss():
        hidden = F.embedding(ids, weight) if tied else torch.ones(2, 6, 8, device=device, dtype=torch.bfloat16)
        return linear_cross_entropy(hidden, weight, None, labels) * upstream

    both = loss()
    kept = torch.autograd.grad(both, weight, retain_graph=True)[0]
    assert not places
    again = torch.autograd.grad(both, weight)[0]
    assert len(places) == 1 and torch.equal(kept, again)
    if not tied:
        assert again.data_ptr() == places[0] and again.is_contiguous()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        watched = loss()
    assert torch.equal(torch.autograd.grad(watched, weight)[0], kept) and len(places) == 1
    loss().backward()
    loss().backward()
    assert len(places) == 3 and torch.equal(weight.grad, kept + kept)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", ["ignored", "empty"])
def test_nothing_to_learn_from_is_what_eager_says(reduction, labels):
    hidden, weight, bias, *_ = draw(0, torch.float32, n=0 if labels == "empty" else 6)
    target = torch.full((hidden.shape[0],), -100)
    ours, eager = (
        run(f, (hidden, weight, bias), torch.ones(hidden.shape[0]))
        for f in (
            lambda h, w, b: linear_cross_entropy(h, w, b, target, reduction=reduction),
            lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target, reduction=reduction),
        )
    )
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 257, 10**9])
def test_label_out_of_range(bad):
    *ops, labels, _ = draw(0, torch.float32)
    labels[3] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        linear_cross_entropy(*ops, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_out_of_range_is_nan_on_a_device(reduction):
    *ops, labels, upstream = draw(0, torch.float32, "cuda")
    labels[3] = 257
    loss, *grads = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    assert loss.isnan().any() and all(g.isnan().any() for g in grads)


def test_negative_ignore_index_and_class_zero():
    *ops, labels, upstream = draw(0, torch.float32)
    labels[labels == -100] = 0
    ours = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, ignore_index=0), ops, upstream)
    eager = run(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), labels, ignore_index=0), ops, upstream)
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "median"}, "reduction 'median' is not one of mean, sum, none"),
        ({"chain": "fp64"}, "float32, bfloat16 or float16, not torch.float64"),
        ({"label_smoothing": 2.0}, "between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    *ops, labels, _ = draw(0, torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*ops, labels, **change)


def test_shapes_and_dtypes_are_checked():
    hidden, weight, bias, labels, _ = draw(0, torch.float32)
    for bad in (
        (hidden[:, 1:], weight, bias, labels),
        (hidden, weight, bias[1:], labels),
        (hidden, weight, bias, labels[1:]),
    ):
        with pytest.raises(ValueError, match=r"expected|needs"):
            linear_cross_entropy(*bad)
    with pytest.raises(ValueError, match=r"labels must be int64, got torch\.int32"):
        linear_cross_entropy(hidden, weight, bias, labels.int())


def test_autocast_outside_changes_nothing():
    *ops, labels, _ = draw(0, torch.float32)
    plain = linear_cross_entropy(*ops, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_cross_entropy(*ops, labels)
        mixed = linear_cross_entropy(*ops, labels, chain="bf16; cast fp32")
        eager = F.cross_entropy(F.linear(*ops).float(), labels)
    assert inside == plain and mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, eager, rtol=1e-4, atol=1e-4)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(mixed, ops))


def test_fp16_gradients_do_not_underflow():
    """Each token's share of a mean over 4,096 is far below what fp16 holds; unscaled it is not."""
    hidden, weight = torch.randn(64, 8), torch.randn(512, 8) * 0.1
    labels = torch.zeros(64, dtype=torch.int64)
    h, w = hidden.half().requires_grad_(), weight.half().requires_grad_()
    loss = linear_cross_entropy(h, w, None, labels, chain="fp16; cast fp32", reduction="sum") * 65536 / 4096
    found = torch.autograd.grad(loss, (h, w))
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(F.linear(h64, w64), labels, reduction="sum") * 16, (h64, w64))
    for a, b in zip(found, truth):
        assert (a.double() - b).norm() / b.norm() < 2e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_tokens_times_vocabulary_is_allocated(reduction, dtype):
    n, d, v = 512, 8, 257
    *ops, labels, upstream = draw(0, dtype, n=n, d=d, v=v)
    with Allocations() as seen:
        run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    assert 0 < seen.largest <= max(2 * vocab_chunks.CPU_CHUNK_BYTES, n * d * 4, v * d * 4) < n * v * 4 // 8


def test_chunks_are_even_and_bounded(monkeypatch):
    rows = vocab_chunks.chunk_rows(4096, 128256, 2, torch.device("cuda"))
    assert 1 <= rows <= 16 * 257 * 4
    monkeypatch.setattr(vocab_chunks, "GPU_CHUNK_BYTES", 256 << 20)
    monkeypatch.setattr(vocab_chunks, "GPU_SUMMED_BYTES", 512 << 20)
    for vocab, width in ((256000, 2304), (128256, 4096), (50257, 768)):        # a weight that gets a gradient is summed less often
        frozen = vocab_chunks.chunk_rows(8192, vocab, 2, torch.device("cuda"))
        trained = vocab_chunks.chunk_rows(8192, vocab, 2, torch.device("cuda"), vocab * width * 2)
        assert frozen * vocab * 2 <= 256 << 20 and trained * vocab * 2 <= max(256 << 20, min(512 << 20, vocab * width))
        assert trained > frozen if vocab > 100000 else trained == frozen
    for tokens, vocab in ((0, 7), (1, 10**9), (5, 100), (1000, 257)):
        assert 1 <= vocab_chunks.chunk_rows(tokens, vocab, 4, torch.device("cpu"))


def test_logsumexp_argmax_and_picked():
    hidden, weight, bias, *_ = draw(0, torch.float32)
    chain = Chain.parse("fp32; div 5.0 fp32; tanh fp32; mul 5.0 fp32")
    z = logits(hidden, weight, bias, chain)
    index = torch.randint(0, weight.shape[0], (hidden.shape[0], 2))
    pairs = [
        (linear_logsumexp(hidden, weight, bias, chain=chain.text), z.logsumexp(-1)),
        (picked(hidden, weight, bias, chain, index), z.gather(-1, index)),
    ]
    for ours, eager in pairs:
        torch.testing.assert_close(ours, eager)
        upstream = torch.randn_like(eager)
        grads = (torch.autograd.grad((x * upstream).sum(), (hidden, weight, bias), retain_graph=True) for x in (ours, eager))
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (linear_argmax(hidden, weight, bias, chain=chain.text) == z.argmax(-1)).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_op(reduction):
    hidden, weight, bias, labels, _ = draw(0, torch.float32, n=5, v=19, d=4)
    low, up = torch.randn(5, 2), torch.randn(19, 2)
    for wants in ([True, True, True, False, False], [True, False, False, False, False], [True, False, False, True, True], [False] * 5):
        ops = [t.detach().requires_grad_(w) for t, w in zip((hidden, weight, bias, low, up), wants)]
        ops = ops if wants[4] else [*ops[:3], None, None]
        torch.library.opcheck(_op, (*ops, labels, 0.5, "fp32", -100, 0.1, reduction, torch.float32, wants))
    given = (torch.ones(5), torch.ones(5), hidden.detach(), weight.detach(), None, low, up, labels)
    torch.library.opcheck(_gradients_op, (*given, 0.5, "fp32", -100, 0.0, [True, True, False, True, True]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_op_agrees_with_the_direct_path(reduction, monkeypatch):
    *ops, labels, upstream = draw(0, torch.float32)
    direct = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    monkeypatch.setattr("slothc.kernels.vocab._is_plain", lambda t: True)
    through = run(lambda h, w, b: linear_cross_entropy(h, w, b, labels, reduction=reduction), ops, upstream)
    for a, b in zip(direct, through):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, -1.0])
@pytest.mark.parametrize(("mode", "vocab"), [*((mode, 131) for mode in vocab_rows.MODES), ("both", 20011)])
def test_interpreted_kernel_and_pytorch_agree(dtype, smoothing, mode, vocab):
    loss = vocab_rows.Loss(CHAINS["soft-cap"].format(d=NAMES[dtype]), -100, smoothing, "none", torch.float32)
    p = vocab_rows.row_plan(loss, vocab, mode, False)
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(3, vocab, generator=g) * 4).to(dtype)
    given = {"z": z, "label": torch.tensor([5, -100, vocab - 1]), "g_loss": torch.rand(3), "g_lse": torch.rand(3)}
    reads = [given[i.name] for i in p.program.inputs if i.role == "data"]
    kernel, plain = (launch(p)([t.clone() for t in reads]) for launch in (TritonLauncher, TorchLauncher))
    for a, b, o in zip(kernel, plain, p.program.outputs):
        assert a.dtype == DTYPE[o.dtype]
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-5 if a.dtype == torch.float32 else 2e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_compiler_sees_one_op(backend):
    *ops, labels, upstream = draw(0, torch.float32)
    function = torch.compile(lambda h, w, b: linear_cross_entropy(h, w, b, labels), backend=backend, fullgraph=True)
    for a, b in zip(run(function, ops, upstream), run(lambda *o: linear_cross_entropy(*o, labels), ops, upstream)):
        torch.testing.assert_close(a, b)
