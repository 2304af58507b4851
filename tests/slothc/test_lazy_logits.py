"""Logits that are not built: what leaves them so, what they become, and that nobody can tell."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from slothc.kernels import vocab_chunks

from slothc.lazy_logits import PRINTED, LazyLogits, StaleLogits, lazy_logits

B, T, D, V = 2, 6, 16, 401


def operands(dtype=torch.float32, seed=0):
    """A leaf x, hidden states made from it, weight, bias: [B, T, D], [V, D], [V]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    return x, x * 1.0, weight, bias


def pair(dtype=torch.float32):
    """(leaves, the lazy logits, eager's)."""
    x, hidden, weight, bias = operands(dtype)
    return (x, weight, bias), lazy_logits(hidden, weight, bias), F.linear(hidden, weight, bias)


def real(value):
    return value.materialize() if isinstance(value, LazyLogits) else value


def gradients(value, leaves):
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(value.shape, generator=g)
    return torch.autograd.grad((real(value).float() * upstream).sum(), leaves, retain_graph=True)


def assert_same(lazy, eager, leaves, tolerance):
    assert lazy.shape == eager.shape and lazy.dtype == eager.dtype and lazy.requires_grad == eager.requires_grad
    pairs = [(real(lazy), eager)]
    if eager.requires_grad:
        pairs += zip(gradients(lazy, leaves), gradients(eager, leaves))
    for a, b in pairs:
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


INDEX = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
STILL_LAZY = {
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.float32).to("cpu").to(z.device, torch.float32),
    "to keywords": lambda z: z.to(device="cpu", dtype=torch.float32),
    "temperature": lambda z: z / 0.7,
    "temperature in place of one": lambda z: 2 * z / 1,
    "soft-cap": lambda z: (torch.tanh(z / 3.0) * 3.0).float(),
    "shift": lambda z: z[:, :-1],
    "shift with ellipsis": lambda z: z[..., :-1, :].contiguous(),
    "last token": lambda z: z[:, -1],
    "one row": lambda z: z[0],
    "mask": lambda z: z[INDEX > 100],
    "slice of classes": lambda z: z[..., :50],
    "slice of all": lambda z: z[0, 2:5, 3:77:2],
    "view": lambda z: z.view(-1, V),
    "reshape": lambda z: z.reshape(T, B, V).flatten(0, 1),
    "unsqueeze": lambda z: z.unsqueeze(0).squeeze(0),
    "detach": lambda z: z.detach(),
    "clone": lambda z: z.clone(),
    "log_softmax": lambda z: F.log_softmax(z.float(), dim=-1),
}
IN_CHUNKS = {
    "logsumexp": lambda z: z.float().logsumexp(-1),
    "logsumexp, kept": lambda z: torch.logsumexp(z.float(), dim=2, keepdim=True),
    "gather": lambda z: z.float().gather(-1, INDEX[..., None]).squeeze(-1),
    "log-probabilities": lambda z: z.float().log_softmax(-1).gather(-1, INDEX[..., None]),
    "row by row": lambda z: torch.stack([torch.logsumexp(row, dim=-1) for row in z.float()]),
    "cross_entropy": lambda z: F.cross_entropy(z.float().view(-1, V), INDEX.view(-1)),
    "cross_entropy, options": lambda z: F.cross_entropy(
        z.view(-1, V).float(), INDEX.view(-1), ignore_index=3, reduction="none", label_smoothing=0.1
    ),
    "argmax": lambda z: z.argmax(dim=-1),
    "accuracy": lambda z: (z[:, :-1].argmax(-1) == INDEX[:, 1:]).float().mean(),
}
BUILDS = {
    "sum": lambda z: z.sum(),
    "softmax": lambda z: z.softmax(-1),
    "add": lambda z: z + z,
    "element": lambda z: z[0, 0, 5],
    "transpose": lambda z: z.transpose(1, 2),
    "topk": lambda z: z.topk(3).values,
    "gather of many": lambda z: z.gather(-1, INDEX[..., None].expand(B, T, 64)),
    "cat": lambda z: torch.cat([z, z], 1),
    "indexed by lists": lambda z: z[[0, 1], [2, 3]],
    "matmul": lambda z: z @ z.transpose(1, 2),
    "multiplied by a tensor": lambda z: z * torch.tensor(2.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*STILL_LAZY, *IN_CHUNKS, *BUILDS])
def test_values_and_gradients_are_eagers(name, dtype):
    function = {**STILL_LAZY, **IN_CHUNKS, **BUILDS}[name]
    leaves, lazy, eager = pair(dtype)
    result = function(lazy)
    assert isinstance(result, LazyLogits) == (name in STILL_LAZY)
    assert lazy.materialized == (name in BUILDS)
    assert not (name in STILL_LAZY and result.materialized)
    assert_same(result, function(eager), leaves, 2e-6 if dtype == torch.float32 else 1e-2)
    assert lazy.materialized == (name in BUILDS or result is lazy)


def test_metadata_is_eagers_and_builds_nothing():
    _leaves, lazy, eager = pair()
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "is_leaf",
        "is_cuda",
        "itemsize",
        "nbytes",
    ):
        assert getattr(lazy, name) == getattr(eager, name), name
    for name in ("size", "dim", "stride", "numel", "element_size", "is_contiguous", "is_floating_point", "__len__"):
        assert getattr(lazy, name)() == getattr(eager, name)(), name
    assert isinstance(lazy, torch.Tensor) and torch.is_tensor(lazy) and lazy.size(-1) == V and lazy.grad is None
    assert "LazyLogits" in repr(lazy) and f"size=({B}, {T}, {V})" in f"{lazy}"
    assert lazy.grad_fn is not None and hash(lazy) is not None and not lazy.materialized
    assert lazy.detach().grad_fn is None and not lazy.detach().requires_grad


def test_small_ones_print_their_values():
    _leaves, lazy, _eager = pair()
    assert V <= PRINTED < lazy.numel()
    assert "tensor(" in repr(lazy[0, 0]) and not lazy.materialized


def test_no_grad():
    _, hidden, weight, bias = operands()
    with torch.no_grad():
        lazy = lazy_logits(hidden, weight, bias)
        part = lazy[:, -1].float()
    assert not lazy.requires_grad and lazy.grad_fn is None and not part.requires_grad
    assert not (lazy + 0).requires_grad and not F.cross_entropy(lazy.view(-1, V), INDEX.view(-1)).requires_grad
    made_with_grad = lazy_logits(hidden, weight, bias)
    with torch.no_grad():
        assert not made_with_grad[:, 0].float().requires_grad
        assert made_with_grad.materialize().requires_grad


def test_inference_mode():
    _, hidden, weight, bias = operands()
    with torch.inference_mode():
        h = hidden * 1.0
        lazy = lazy_logits(h, weight, bias)
        assert torch.equal(lazy.float() + 0, F.linear(h, weight, bias))


def test_the_loss_alone_frees_only_its_own_graph():
    """As in eager: with a retained graph the logits have gradients afterwards, without one they have none."""
    _leaves, lazy, _eager = pair()
    F.cross_entropy(lazy.view(-1, V), INDEX.view(-1)).backward(retain_graph=True)
    lazy.sum().backward()
    _, hidden, weight, bias = operands()
    hidden = hidden.exp()
    lazy = lazy_logits(hidden, weight, bias)
    hidden.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        lazy.sum().backward()


def test_gradient_functions_below_python():
    """A custom Function gets the tensor itself; the gradient still arrives."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return 2 * z * g

    leaves, lazy, eager = pair()
    assert_same(Square.apply(lazy), Square.apply(eager), leaves, 1e-6)


def test_copies_are_plain_tensors():
    _, hidden, weight, _ = operands()
    lazy, eager = lazy_logits(hidden.detach(), weight.detach()), F.linear(hidden, weight).detach()
    file = io.BytesIO()
    torch.save({"logits": lazy}, file)
    file.seek(0)
    for made in (torch.load(file)["logits"], pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy), copy.copy(lazy)):
        assert type(made) is torch.Tensor and torch.equal(made, eager)
    assert (lazy.numpy() == eager.numpy()).all() and lazy.tolist() == eager.tolist()
    assert torch.equal(lazy.cpu(), eager) and torch.equal(torch.from_dlpack(lazy), eager)


def test_deepcopy_of_a_result_fails_as_in_eager():
    _leaves, lazy, eager = pair()
    for z in (eager, lazy):
        with pytest.raises(RuntimeError, match="created explicitly"):
            copy.deepcopy(z)


@pytest.mark.parametrize("trained", ["weight", "hidden"])
def test_changed_operands_are_not_used_silently(trained):
    _, hidden, weight, bias = operands()
    early, late = lazy_logits(hidden, weight, bias), lazy_logits(hidden, weight, bias)
    expected = early.materialize().clone()
    with torch.no_grad():
        (weight if trained == "weight" else hidden).add_(1)
    assert torch.equal(early + 0, expected)
    for use in (lambda z: z.sum(), lambda z: z.float().materialize(), lambda z: z[0].cpu() + 1):
        with pytest.raises(StaleLogits, match="changed in place"):
            use(late)
    assert "LazyLogits" in repr(late[0, 0]) and late.shape == (B, T, V)


@pytest.mark.parametrize(
    "use",
    [
        lambda z: z.argmax(-1),
        lambda z: z.logsumexp(-1),
        lambda z: F.cross_entropy(z.view(-1, V), INDEX.view(-1)),
        lambda z: z[0].float().sum(),
    ],
)
def test_changed_operands_are_not_used_in_chunks_either(use):
    _, hidden, weight, bias = operands()
    lazy = lazy_logits(hidden, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(StaleLogits):
        use(lazy)


def test_writes_reach_views_and_spare_copies():
    _, hidden, weight, _ = operands()
    lazy, eager = lazy_logits(hidden.detach(), weight.detach()), F.linear(hidden, weight).detach()
    for z in (lazy, eager):
        view, copied = z[:1, :2].view(-1, V), z.float().clone()
        z[0, 0] = 5.0
        view[1].mul_(2)
        assert float(view[0, 0]) == 5.0 and float(copied[0, 0, 0]) != 5.0
    assert torch.equal(lazy.materialize(), eager)


def test_retain_grad_and_hooks():
    _, lazy, _ = pair()
    lazy.retain_grad()
    seen = []
    lazy.register_hook(lambda g: seen.append(g.shape))
    (lazy * 2).sum().backward()
    assert lazy.grad.shape == (B, T, V) and seen == [torch.Size((B, T, V))]


def test_autocast_outside():
    _, hidden, weight, bias = operands()
    with torch.autocast("cpu", torch.bfloat16):
        lazy, eager = lazy_logits(hidden, weight, bias, "bf16"), F.linear(hidden, weight, bias)
        assert torch.equal(lazy.materialize(), eager)
        again = lazy_logits(hidden, weight, bias, "bf16")
        ours = F.cross_entropy(again.view(-1, V), INDEX.view(-1))
        theirs = F.cross_entropy(eager.view(-1, V), INDEX.view(-1))
    assert ours.dtype == theirs.dtype and not again.materialized
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_compiler_that_meets_one():
    leaves, lazy, eager = pair()
    function = torch.compile(lambda z: (z.float() * 2).sum() + z.shape[0], backend="eager")
    ours, theirs = function(lazy), (eager.float() * 2).sum() + B
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves, retain_graph=True), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_fake_and_meta_tensors_get_the_ordinary_result():
    meta = lazy_logits(torch.randn(2, D, device="meta"), torch.randn(V, D, device="meta"))
    assert type(meta) is torch.Tensor and meta.shape == (2, V)


def test_nothing_is_kept_alive():
    _, lazy, _ = pair()
    gone = weakref.ref(lazy.float())
    lazy.materialize()
    lazy = None
    gc.collect()
    assert gone() is None


def test_nothing_of_tokens_times_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(vocab_chunks, "CPU_CHUNK_BYTES", 4 * V * 4)
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if type(out) is torch.Tensor and out.device.type != "meta":
                largest = max(largest, out.numel())
            return out

    tokens = 256
    lazy = lazy_logits(torch.randn(tokens, D, requires_grad=True), torch.randn(V, D, requires_grad=True))
    labels = torch.randint(0, V, (tokens,))
    with Watch():
        F.cross_entropy(lazy.float().view(-1, V), labels).backward()
        F.log_softmax(lazy / 2, -1).gather(-1, labels[:, None]).sum().backward()
        lazy.detach()[:, :10].float()
        lazy.argmax(-1)
    assert 0 < largest <= V * D < tokens * V and not lazy.materialized


def test_what_trainers_do_with_outputs():
    operations = pytest.importorskip("accelerate.utils.operations")
    trainer = pytest.importorskip("transformers.trainer_pt_utils")
    _, lazy, eager = pair(torch.bfloat16)
    outputs = operations.convert_to_fp32({"logits": lazy})["logits"]
    kept = trainer.nested_detach((outputs,))[0]
    kept = operations.send_to_device(operations.gather(operations.pad_across_processes(kept, dim=1)), "cpu")
    assert isinstance(kept, LazyLogits) and not kept.materialized and kept.dtype == torch.float32
    assert not kept.requires_grad and outputs.requires_grad
    both = trainer.nested_numpify(trainer.nested_concat(kept, kept.clone()))
    assert (both[:B] == eager.detach().float().numpy()).all()
