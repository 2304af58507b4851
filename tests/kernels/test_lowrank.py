"""LoRA linear: forward and every gradient by the numerical contract, seams, mixed dtypes, the op, and what an adapter
learns.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from slothc.kernels import lowrank, lowrank_program, products
from slothc.kernels.lowrank import lora_linear
from torch import nn
from torch.nn import functional as F

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
SCALE = 1.7


def eager(x, xa, w, bias, a, b, scale, layout="nk"):
    """What PEFT writes."""
    base = F.linear(x, w if layout == "nk" else w.t(), bias)
    adapter = F.linear(F.linear((x if xa is None else xa).to(a.dtype), a), b)
    return (base + adapter * scale).to(base.dtype)


def draw(
    seed,
    m=37,
    k=48,
    n=65,
    r=5,
    dtype=torch.float32,
    adapter=None,
    size=1.0,
    bias=True,
    own=False,
    layout="nk",
    device="cpu",
):
    """x, xa, w, bias, a, b, g with entries of ordinary size."""
    g = torch.Generator().manual_seed(seed)
    adapter = adapter or dtype

    def normal(*shape, to, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(device=device, dtype=to)

    w = normal(n, k, to=dtype, scale=k**-0.5)
    return (
        normal(m, k, to=dtype),
        normal(m, k, to=dtype) if own else None,
        w if layout == "nk" else w.t().contiguous(),
        normal(n, to=dtype) if bias else None,
        normal(r, k, to=adapter, scale=k**-0.5),
        normal(n, r, to=adapter, scale=size * r**-0.5),
        normal(m, n, to=dtype),
    )


def values(function, operands, to=lambda t: t, **options):
    """The output and the gradient of every operand."""
    *inputs, g = operands
    leaves = [None if t is None else to(t).detach().requires_grad_() for t in inputs]
    y = function(*leaves, SCALE, **options)
    present = {n: t for n, t in zip(("x", "xa", "w", "bias", "a", "b"), leaves) if t is not None}
    grads = torch.autograd.grad(y, list(present.values()), to(g).to(y.dtype))
    return {"y": y.detach(), **dict(zip(present, grads))}


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def compare(draws, **options):
    """The contract: err(ours) <= 1.10 err(eager) + tiny over the draws together, for the output and every gradient; tiny goes by the
    dtype of the tensor itself: an fp32 adapter's gradient is held to fp32's.
    """
    ours, theirs, tiny = {}, {}, {}
    for operands in draws:
        truth = values(eager, operands, lambda t: t.double(), **options)
        e, s = values(eager, operands, **options), values(lora_linear, operands, **options)
        for name, t in truth.items():
            assert s[name].dtype is e[name].dtype and s[name].shape == e[name].shape
            tiny[name] = TINY[e[name].dtype]
            ours[name] = ours.get(name, 0.0) + error(s[name], t) ** 2
            theirs[name] = theirs.get(name, 0.0) + error(e[name], t) ** 2
    count = len(draws)
    for name in ours:
        mine, eagers = (ours[name] / count) ** 0.5, (theirs[name] / count) ** 0.5
        assert mine <= 1.10 * eagers + tiny[name], (name, mine, eagers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 4.0])
@pytest.mark.parametrize("form", list(itertools.product((True, False), (False, True), ("nk", "kn"))), ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_contract(dtypes, form, size, device):
    dtype, adapter = dtypes
    bias, own, layout = form
    draws = [
        draw(s, dtype=dtype, adapter=adapter, size=size, bias=bias, own=own, layout=layout, device=device)
        for s in range(5)
    ]
    compare(draws, layout=layout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(0, 8, 6, 2), (1, 7, 5, 1), (3, 33, 41, 5), (130, 64, 24, 16), (5, 1, 3, 1)], ids=str
)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=str)
def test_seams(shape, dtypes, device):
    m, k, n, r = shape
    dtype, adapter = dtypes
    draws = [
        draw(s, m, k, n, r, dtype, adapter, bias=bool(s % 2), own=s % 4 > 1, device=device)
        for s in range(10 if m * n > 99 else 80)
    ]
    compare([d for d in draws if d[3] is None and d[1] is None])
    compare([d for d in draws if d[3] is not None and d[1] is not None])


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_and_ranks(device):
    _, _, w, bias, a, b, _ = draw(0, device=device)
    big = torch.randn(4, 96, 50, device=device)
    forms = {
        "transposed": big.transpose(1, 2)[..., :48],
        "sliced": big[:, 1:9, 1:49],
        "offset": big.reshape(-1)[7 : 7 + 48 * 9].view(9, 48),
        "column-major": torch.randn(48, 9, device=device).t(),
        "strided": big[..., ::1].reshape(4, -1)[:, ::100],
        "vector": torch.randn(48, device=device),
        "4-d": torch.randn(2, 1, 3, 48, device=device),
        "expanded": big[:1, :1, :48].expand(3, 2, 48),
    }
    for name, x in forms.items():
        x = x.detach().requires_grad_()
        y, want = lora_linear(x, None, w, bias, a, b, SCALE), eager(x, None, w, bias, a, b, SCALE)
        torch.testing.assert_close(y, want, msg=name)
        for seed in (
            torch.ones(1, device=device).expand_as(y),
            torch.randn(y.shape[::-1], device=device).permute(*range(y.dim())[::-1]),
        ):
            torch.testing.assert_close(
                torch.autograd.grad(y, x, seed, True)[0], torch.autograd.grad(want, x, seed, True)[0], msg=name
            )


def test_float64_gradcheck():
    for bias, own, layout in itertools.product((True, False), (False, True), ("nk", "kn")):
        *inputs, _ = draw(1, 3, 4, 5, 2, torch.float64, bias=bias, own=own, layout=layout)
        inputs = [None if t is None else t.requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(lambda *t, at=layout: lora_linear(*t, SCALE, layout=at), inputs)


@pytest.mark.parametrize("wanted", ["x", "a", "b", "ab", "xb", "w", "i"])
def test_only_wanted_gradients(wanted):
    names = "x_wiab"
    *inputs, g = draw(2, dtype=torch.bfloat16, bias=True)
    inputs = [t if t is None else t.detach().requires_grad_(n in wanted) for n, t in zip(names, inputs)]
    y = lora_linear(*inputs, SCALE)
    saved = sum(t is not None for t in y.grad_fn.saved_tensors)
    y.backward(g)
    assert [t is not None and t.grad is not None for t in inputs] == [n in wanted for n in names]
    assert saved <= {"i": 0, "w": 1, "a": 2, "b": 1}.get(wanted, 4)
    with torch.no_grad():
        assert not lora_linear(*inputs, SCALE).requires_grad


def test_backward_twice_is_refused_clearly():
    x, _, w, bias, a, b, _ = draw(2)
    a = a.requires_grad_()
    for loss in (lora_linear(x, None, w, bias, a, b, SCALE).square().sum(), lora_linear(x, None, w, None, a, b, SCALE).sum()):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss, a, create_graph=True)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_result_can_be_written_into(with_bias):
    x, _, w, bias, a, b, _ = draw(2)
    y = lora_linear(x, None, w, bias if with_bias else None, a.requires_grad_(), b, SCALE)
    expected = y.detach() + 1
    y += 1
    assert torch.equal(y, expected)
    y.sum().backward()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype):
    """Under autocast the operands are cast as autocast casts them; parameters get gradients in their own dtype."""
    theirs, ours = {}, {}
    for seed in range(5):
        x, _, w, _, a, b, g = draw(seed)
        operands = (x, None, w.to(weight_dtype), None, a, b, g)
        with torch.autocast("cpu", torch.bfloat16):
            e = values(eager, operands)
            s = values(lambda *t: lora_linear(*t, out_dtype=torch.bfloat16, adapter_dtype=torch.bfloat16), operands)
        t = values(eager, operands, lambda v: v.double())
        for n in t:
            assert s[n].dtype is e[n].dtype, n
            theirs[n] = theirs.get(n, 0.0) + error(e[n], t[n]) ** 2
            ours[n] = ours.get(n, 0.0) + error(s[n], t[n]) ** 2
    assert all(ours[n] ** 0.5 <= 1.10 * theirs[n] ** 0.5 + 1e-4 for n in ours), (ours, theirs)


@pytest.fixture
def widening(monkeypatch):
    """A device whose mm and addmm can return fp32 sums, as CUDA's can: the split of fp32 operands is then used."""
    mm, addmm, bmm = torch.mm, torch.addmm, torch.bmm

    def wide(t, out):
        return t if out is None else t.to(out)

    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype=None: mm(wide(a, out_dtype), wide(b, out_dtype)))
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype=None: bmm(wide(a, out_dtype), wide(b, out_dtype)))
    monkeypatch.setattr(
        torch,
        "addmm",
        lambda c, a, b, alpha=1, out_dtype=None: addmm(c, wide(a, out_dtype), wide(b, out_dtype), alpha=alpha),
    )
    for module in (products, lowrank):
        monkeypatch.setattr(module, "widens", lambda device: True)
    monkeypatch.setattr(products, "widens_onto", lambda device: True)
    lowrank_program.straight.cache_clear()  # programs hold the products they were made with
    yield
    lowrank_program.straight.cache_clear()


@pytest.mark.parametrize("shape", [(37, 48, 65, 5), (16, 200, 8, 3), (1100, 1300, 40, 4)], ids=["joined", "fp32 sum", "spans"])
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[3], DTYPES[4]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_contract_with_fp32_sums(widening, dtypes, shape, bias):
    draws = [draw(s, *shape, *dtypes, size=2.0, bias=bias) for s in range(6)]
    compare(draws)


def survival(y, base, delta):
    """The share of delta that is left in y - base: 1 where it survives, 0 where it is rounded away."""
    return ((y.double() - base.double()) * delta).sum().item() / delta.square().sum().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
def test_a_delta_below_half_an_ulp_survives(adapter, bias, device):
    x, _, w, bi, a, b, _ = draw(5, 256, 64, 96, 4, torch.bfloat16, adapter, size=2e-4, bias=bias, device=device)
    base = F.linear(x, w, bi)
    delta = (x.double() @ a.double().t()) @ b.double().t() * SCALE
    ours = survival(lora_linear(x, None, w, bi, a, b, SCALE), base, delta)
    theirs = survival(eager(x, None, w, bi, a, b, SCALE), base, delta)
    print(f"{adapter} bias={bias}: share of the delta that survives: ours {ours:.3f}, eager {theirs:.3f}")
    assert abs(ours - 1) < 0.25 and theirs < 0.5


def test_one_rounding_exactly():
    """Against the float64 sum rounded once: what differs is only where the delta's own rounding crosses a tie."""
    for bias, adapter in itertools.product((False, True), (torch.bfloat16, torch.float32)):
        x, _, w, bi, a, b, _ = draw(6, 128, 64, 96, 4, torch.bfloat16, adapter, size=1e-2, bias=bias)
        truth = eager(*(None if t is None else t.double() for t in (x, None, w, bi, a, b)), SCALE).to(torch.bfloat16)
        y, other = lora_linear(x, None, w, bi, a, b, SCALE), eager(x, None, w, bi, a, b, SCALE)
        assert (y != truth).double().mean() < 0.03 and (other != truth).double().mean() > 0.1


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(dtypes, grad):
    *inputs, _ = draw(3, 6, 8, 10, 2, *dtypes, bias=True, own=True)
    inputs = [t.requires_grad_(grad) for t in inputs]
    torch.library.opcheck(torch.ops.sloth.lora_linear.default, (*inputs, SCALE), rtol=1e-2, atol=1e-2)


def test_the_op_and_the_direct_path_agree():
    operands = draw(4, dtype=torch.bfloat16)
    direct, op = values(lora_linear, operands), values(torch.ops.sloth.lora_linear, operands)
    assert all(torch.equal(direct[n], op[n]) for n in direct)
    with torch.inference_mode():
        assert torch.equal(torch.ops.sloth.lora_linear(*operands[:-1], SCALE), direct["y"])


def test_errors():
    x, _, w, bias, a, b, _ = draw(0)
    with pytest.raises(ValueError, match="nk, kn"):
        lora_linear(x, None, w, bias, a, b, 1.0, layout="nn")
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, None, w, bias, a, b.t(), 1.0)
    with pytest.raises(ValueError, match="bias"):
        lora_linear(x, None, w, bias[:-1], a, b, 1.0)
    with pytest.raises(TypeError, match="floating-point"):
        lora_linear(x.long(), None, w, bias, a, b, 1.0)


class Adapted(nn.Module):
    """A frozen linear with a trained adapter; a is drawn as PEFT draws it for an input of 2,048, b starts at zero."""

    def __init__(self, k, n, function, r=16):
        super().__init__()
        self.weight = nn.Parameter(4 * torch.randn(n, k) * k**-0.5, requires_grad=False)
        self.a, self.b = nn.Parameter((2 * torch.rand(r, k) - 1) * 2048**-0.5), nn.Parameter(torch.zeros(n, r))
        self.function = function

    def forward(self, x):
        return self.function(x, None, self.weight, None, self.a, self.b, 1.0)


class Tiny(nn.Module):
    """Residual MLP layers between an embedding and a head, all frozen but for the adapters."""

    def __init__(self, function, vocab=64, width=128, layers=2):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(vocab, width), requires_grad=False)
        self.head = nn.Parameter(4 * torch.randn(vocab, width) * width**-0.5, requires_grad=False)
        self.up = nn.ModuleList(Adapted(width, 2 * width, function) for _ in range(layers))
        self.down = nn.ModuleList(Adapted(2 * width, width, function) for _ in range(layers))

    def forward(self, ids):
        h = self.embed[ids]
        for up, down in zip(self.up, self.down):
            h = h + down(F.silu(up(F.rms_norm(h, h.shape[-1:]))))
        return F.linear(F.rms_norm(h, h.shape[-1:]), self.head).float()


def curve(function, base, adapter, steps=24):
    """Losses of AdamW at lr 1e-4. Every run starts from the same bf16 numbers, so only the arithmetic differs."""
    torch.manual_seed(0)
    model = Tiny(function)
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.bfloat16).to(adapter if name.endswith((".a", ".b")) else base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, 64, (4, 129), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_training_follows_the_fp32_curve():
    truth = curve(eager, torch.float32, torch.float32)
    print(f"fp32 learns {truth[0] - truth[-1]:.4f} in {len(truth)} steps: {[round(v, 4) for v in truth.tolist()[::4]]}")
    for adapter in (torch.bfloat16, torch.float32):
        gaps = {}
        for name, function in (("one rounding", lora_linear), ("eager", eager)):
            found = curve(function, torch.bfloat16, adapter)
            gaps[name] = (found - truth).abs().max().item()
            print(
                f"  {adapter} {name:12s} off by {gaps[name]:.4f} at most: {[round(v, 4) for v in found.tolist()[::4]]}"
            )
        assert gaps["one rounding"] < 0.015 < 0.025 < gaps["eager"]


def test_the_straight_source_is_the_derived_plan():
    code = lowrank.straight("nk", True, ("X", "A", "B"), False).source
    assert all(
        f"# {step}" in code for step in ("T = X A'", "U = G B", "dX = s U A + G W", "dA = s U' X", "dB = s G' T")
    )
    assert "dW" not in code and "return dX, None, None, dA, dB," in code


@pytest.mark.parametrize("shape", [(2, 4, 8), (4, 8)], ids=["batched", "rows"])
def test_the_result_may_be_written_into(shape: tuple[int, ...]) -> None:
    x, w, a, b = (torch.randn(s, dtype=torch.float64) for s in (shape, (6, 8), (2, 8), (6, 2)))
    x.requires_grad_()
    (found,) = torch.autograd.grad(lora_linear(x, None, w, None, a, b, SCALE).mul_(3).sum(), x)
    (expected,) = torch.autograd.grad(3 * (x @ w.t() + SCALE * (x @ a.t() @ b.t())).sum(), x)
    torch.testing.assert_close(found, expected)
