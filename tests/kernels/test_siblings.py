"""Adapted linears that read one value, with and without the region that makes it, against the same model code in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import Errors, cast, compare, run
from slothc.kernels import joined, siblings, siblings_op, summed
from slothc.kernels.products import native
from slothc.kernels.siblings_block import Siblings
from slothc.kernels.siblings_program import Linear, stacked
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch.utils._python_dispatch import TorchDispatchMode

from slothc.capture import region_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [d for d in (torch.float32, torch.bfloat16) if native(DEVICE, d)]
WIDTHS, RANKS, SCALES = (16, 24, 8, 40), (4, 8, 4, 3), (1.0, 0.5, 2.0, 0.25)


def adapted(count: int) -> list[Linear]:
    return [Linear(s, r) for s, r in zip(SCALES[:count], RANKS)]


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def added_norm(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    f = h.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype), h


def linears(x: Tensor, flat: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, ...]:
    each = zip(flat[::3], flat[1::3], flat[2::3])
    return tuple(F.linear(x, w.detach()) + s * F.linear(F.linear(x, a), b) for s, (w, a, b) in zip(scales, each))


def draw(operands: int, count: int, rows: tuple[int, ...] = (2, 5)) -> list[Tensor]:
    made = [torch.randn(*rows, 32, dtype=torch.float64) for _ in range(operands)]
    for n, r in zip(WIDTHS[:count], RANKS):
        made += [torch.randn(size, dtype=torch.float64) / size[1] ** 0.5 for size in ((n, 32), (r, 32), (n, r))]
    return made


def forms(count: int) -> dict[str, tuple[Callable[..., Any] | None, int, Callable[..., tuple[Tensor, ...]]]]:
    """name -> (region or None, its operands, what all of it computes)."""
    scales = SCALES[:count]

    def after_norm(x: Tensor, r: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        y, h = added_norm(x, r)
        return (*linears(y, flat, scales), h)

    return {
        "given": (None, 1, lambda x, *flat: linears(x, flat, scales)),
        "gated": (gated, 2, lambda gate, up, *flat: linears(gated(gate, up), flat, scales)),
        "norm of a sum that goes on": (added_norm, 2, after_norm),
    }


def frozen(f: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """The base weights get no gradient."""
    return lambda *t: f(*(x if k < operands or (k - operands) % 3 else x.detach() for k, x in enumerate(t)))


@pytest.mark.parametrize("rows", [(2, 5), (1, 1), (1, 67)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["given", "gated", "norm of a sum that goes on"])
def test_contract(name: str, count: int, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    region, operands, whole = forms(count)[name]
    plan = region_of(region, cast(draw(operands, 0), dtype, DEVICE), dtype).plan if region else None
    ours, errors = frozen(siblings.call(plan, adapted(count)), operands), Errors()
    torch.manual_seed(2)
    eager = frozen(whole, operands)
    arguments = lambda: cast(draw(operands, count, rows), dtype, DEVICE)  # noqa: E731
    errors.over(lambda: compare(errors, lambda a, g: run(ours, a, g).values, eager, arguments()))


def everything(f: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor]) -> list[Tensor]:
    """Results and gradients of the operands that have one."""
    results = f(*given)
    total = sum((r.float() * torch.linspace(0, 1, r.numel(), device=r.device).view(r.shape)).sum() for r in results if r.requires_grad)
    found = torch.autograd.grad(total, [t for t in given if t.requires_grad], allow_unused=True)
    return [*results, *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["given", "gated", "norm of a sum that goes on"])
@pytest.mark.parametrize("needed", [True, False], ids=["needed", "unneeded"])
def test_a_tracer_sees_one_operation_for_each_pass(name: str, dtype: torch.dtype, needed: bool) -> None:
    """What it then runs is the same to the bit."""
    region, operands, _ = forms(1)[name]
    plan = region_of(region, cast(draw(operands, 0), dtype, DEVICE), dtype).plan if region else None
    call, seen = siblings.call(plan, MIXED, needed), []
    given = [t.requires_grad_() for t in cast(draw(operands, 0), dtype, DEVICE)]
    for m in MIXED:
        sizes = {"W": (24, 32), "A": (m.rank, 32), "B": (24, m.rank), "b": (24,)}
        given += [torch.randn(sizes[n], device=DEVICE).to(dtype).requires_grad_(n in m.wanted) for n in m.operands]

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        seen.append([str(n.target) for n in graph.graph.nodes if "siblings" in str(n.target)])
        return graph

    one, two = everything(call, given), everything(aot_function(call, keep), given)
    skip = 0 if needed else len(MIXED)                 # what the y_i hold is undefined then
    assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one[skip:], two[skip:]))
    assert seen == [["sloth.siblings.default"], ["sloth.siblings_backward.default"]]


def test_what_a_tracer_is_told_is_so() -> None:
    plan = region_of(added_norm, cast(draw(2, 0), torch.float32, DEVICE), torch.float32).plan
    for region, operands in ((None, 1), (plan, 2)):
        s = Siblings(region, tuple(adapted(3)))
        siblings_op.BLOCKS[s.key] = s
        given = cast(draw(operands, 3), torch.float32, DEVICE)
        torch.library.opcheck(torch.ops.sloth.siblings.default, (given, s.key))
        made = siblings_op.forward(s, given)
        kept = [given[k] for k in s.kept] if region else [given[0].reshape(-1, 32)]
        results = [*made.ys, *made.written[1:2]]
        rest = ([made.written[k] for k in s.held], [made.t, made.a], [given[k] for k in s.base], [torch.randn_like(y) for y in results])
        torch.library.opcheck(torch.ops.sloth.siblings_backward.default, (kept, *rest, True, s.key))


MIXED = (
    Linear(0.5, 4), Linear(), Linear(trained=True), Linear(trained=True, bias=True), Linear(2.0, 8), Linear(bias=True),
    Linear(0.25, 4, bias=True),
)  # fmt: skip
PARTS = (slice(2, 4), slice(3, 4), slice(1, 3), slice(0, 2), slice(6, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linears", [MIXED, *(MIXED[k] for k in PARTS)], ids=lambda m: f"{len(m)} {m[0].rank}")
@pytest.mark.parametrize("name", ["given", "gated", "norm of a sum that goes on"])
def test_plain_linears_beside_adapted_ones(name: str, linears: tuple[Linear, ...], dtype: torch.dtype) -> None:
    """Trained or frozen, with a bias or without one."""
    region, operands, _ = forms(1)[name]
    plan = region_of(region, cast(draw(operands, 0), dtype, DEVICE), dtype).plan if region else None
    sizes = {"W": (24, 32), "A": (4, 32), "B": (24, 4), "b": (24,)}
    shapes = [(m, name, tuple(m.rank if d == 4 else d for d in sizes[name])) for m in linears for name in m.operands]

    def held(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t if name in m.wanted else t.detach() for t, (m, name, _) in zip(tensors, shapes)]

    def whole(*tensors: Tensor) -> tuple[Tensor, ...]:
        made = region(*tensors[:operands]) if region else tensors[0]
        x, *more = made if isinstance(made, tuple) else (made,)
        own, results = iter(held(tensors[operands:])), []
        for m in linears:
            if m.rank:
                w, a, b, *bias = (next(own) for _ in m.operands)
                results.append(F.linear(x, w, *bias) + m.scale * F.linear(F.linear(x, a), b))
            else:
                results.append(F.linear(x, *(next(own) for _ in m.operands)))
        return (*results, *more)

    def made() -> list[Tensor]:
        flat = [torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5 for _, _, s in shapes]
        return cast([torch.randn(2, 5, 32, dtype=torch.float64) for _ in range(operands)] + flat, dtype, DEVICE)

    call, errors = siblings.call(plan, linears), Errors()
    ours = lambda *t: call(*t[:operands], *held(t[operands:]))  # noqa: E731
    errors.over(lambda: compare(errors, lambda a, g: run(ours, a, g).values, whole, made()))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a product of low precision that leaves its sums in fp32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["given", "gated", "norm of a sum that goes on"])
def test_adapters_in_fp32(name: str, dtype: torch.dtype) -> None:
    """Results and the gradient of x are rounded once, the adapters' gradients have fp32's accuracy."""
    region, operands, _ = forms(3)[name]
    plan = region_of(region, cast(draw(operands, 0), dtype, DEVICE), dtype).plan if region else None
    call, errors = siblings.call(plan, [Linear(s, 8) for s in SCALES[:3]]), Errors()
    ours = frozen(call, operands)

    def whole(*t: Tensor) -> tuple[Tensor, ...]:
        made = region(*t[:operands]) if region else t[0]
        x, *more = made if isinstance(made, tuple) else (made,)
        each = zip(t[operands::3], t[operands + 1 :: 3], t[operands + 2 :: 3], SCALES)
        sums = (F.linear(x, w) + s * F.linear(F.linear(x.to(a.dtype), a), b) for w, a, b, s in each)
        return (*(y.to(x.dtype) for y in sums), *more)

    def made() -> list[Tensor]:
        rows = cast([torch.randn(2, 150, 1024, dtype=torch.float64) for _ in range(operands)], dtype, DEVICE)
        for n in (512, 64, 512):
            w, a, b = (torch.randn(s, dtype=torch.float64) / 32 for s in ((n, 1024), (8, 1024), (n, 8)))
            rows += [*cast([w], dtype, DEVICE), *cast([a, b], torch.float32, DEVICE)]
        return rows

    eager = frozen(whole, operands)
    errors.over(lambda: compare(errors, lambda a, g: run(ours, a, g).values, eager, made()))


def test_what_no_gradient_reaches_gets_none() -> None:
    """As in eager, where an optimizer then leaves the weight alone."""
    torch.manual_seed(0)
    plan = region_of(gated, draw(2, 0), torch.float32).plan
    gate, up, a, b = (torch.randn(*n, 32).requires_grad_() for n in ((2, 5), (2, 5), (24,), (16,)))
    first, _ = siblings.call(plan, [Linear(trained=True)] * 2)(gate, up, a, b)
    found = torch.autograd.grad(first.square().sum(), (gate, up, a, b), allow_unused=True)
    true = torch.autograd.grad(F.linear(gated(gate, up), a).square().sum(), (gate, up, a, b), allow_unused=True)
    assert found[3] is None and true[3] is None
    for ours, eager in zip(found[:3], true[:3]):
        torch.testing.assert_close(ours, eager)


def test_a_frozen_linear_of_what_has_no_gradient() -> None:
    """Beside a trained one: its result has none either."""
    torch.manual_seed(0)
    x, frozen, trained = torch.randn(2, 5, 32), torch.randn(16, 32), torch.randn(24, 32, requires_grad=True)
    call = siblings.call(None, [Linear(), Linear(trained=True)])
    assert [y.requires_grad for y in call(x, frozen, trained)] == [False, True]
    assert [y.requires_grad for y in call(x.requires_grad_(), frozen, trained)] == [True, True]


def test_a_gradient_of_the_regions_other_result_alone() -> None:
    """Of x + r, not of its norm: neither the norm's weight nor the linear's gets one."""

    def weighted(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6) * w, s

    torch.manual_seed(0)
    operands = [torch.randn(*n).requires_grad_() for n in ((2, 5, 32), (2, 5, 32), (32,), (24, 32))]
    plan = region_of(weighted, operands[:3], torch.float32).plan
    _, s = siblings.call(plan, [Linear(trained=True)])(*operands)
    found = torch.autograd.grad(s.square().sum(), operands, allow_unused=True)
    assert found[2] is None and found[3] is None
    for ours in found[:2]:
        torch.testing.assert_close(ours, 2 * (operands[0] + operands[1]))


@pytest.mark.parametrize("linears", [adapted(2), [Linear(trained=True)] * 2], ids=["adapted", "trained"])
def test_no_gradient_is_made_of_an_x_that_wants_none(linears: list[Linear]) -> None:
    """As in a model's first layer, whose embedding is frozen: the products with W are made in the forward only."""
    torch.manual_seed(0)
    x, *operands = cast(draw(1, 2), torch.float32, DEVICE)
    if not linears[0].rank:
        operands = operands[::3]
    names = [name in m.wanted for m in linears for name in m.operands]
    operands = [t.detach().requires_grad_(wanted) for t, wanted in zip(operands, names)]
    results = siblings.call(None, linears)(x.detach(), *operands)
    with Products() as made:
        sum(y.square().sum() for y in results).backward()
    assert all((t.grad is not None) == wanted for t, wanted in zip(operands, names))
    assert x.shape[-1] * x[..., 0].numel() not in made.sizes

    again = [t.detach().requires_grad_(wanted) for t, wanted in zip(operands, names)]
    sum(y.square().sum() for y in siblings.call(None, linears)(x.detach().requires_grad_(), *again)).backward()
    for one, two in zip(operands, again):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad)


class Products(TorchDispatchMode):
    """Elements of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if "mm" in function.__name__:
            self.sizes.append(found.numel())
        return found


def test_x_is_not_kept() -> None:
    """Of a region's result nothing is left for the backward: what is saved are its operands, T [tokens, ranks], A and the weights."""
    plan = region_of(gated, draw(2, 0), torch.float32).plan
    tensors = [t.requires_grad_() for t in cast(draw(2, 2), torch.float32, DEVICE)]
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        siblings.call(plan, adapted(2))(*tensors)
    assert sorted(s for s in saved if s[-1:] == (32,) and len(s) == 3) == [(2, 5, 32)] * 2
    assert (10, 12) in saved


def test_a_region_without_a_backward_is_refused() -> None:
    arguments = [t.float() for t in draw(2, 0)]
    from slothc.capture import captured
    from slothc.found import find
    from slothc.options import Options
    from slothc.view import GraphView

    found = find(GraphView(captured(added_norm, arguments)), Options())
    with pytest.raises(ValueError, match="no backward"):
        siblings.call(found.regions[0].plan, adapted(1))


def test_the_program_is_the_derived_plan() -> None:
    """Every line that multiplies stands over the equation it comes from."""
    text = stacked((*adapted(2), Linear(trained=True, bias=True))).source
    for equation in ("Y = 1 b' + X W'", "dX = G W", "dW = G' X", "db = G' 1",
                     "T = X A'", "Y = s T B' + X W'", "U = G B", "dX = s U A + G W", "dA = s U' X", "dB = s G' T"):
        assert f"# {equation}" in text


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sums_of_products(count: int) -> None:
    m, n, r = 37, 48, 20
    pairs = [(torch.randn(m, k, device=DEVICE), torch.randn(k, n, device=DEVICE)) for k in (16, 64, 24, 8, 40)[:count]]
    a, b = torch.randn(m, r, device=DEVICE), torch.randn(r, n, device=DEVICE)
    truth = a.double() @ b.double() + sum(x.double() @ w.double() for x, w in pairs)
    assert float((summed.summed(pairs, a, b).double() - truth).norm() / truth.norm()) < 1e-6


@pytest.fixture
def copies(triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that need the bulk tensor copy engine: on a device that has one, or in the interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr(joined, "_hopper", lambda device: True)
        monkeypatch.setattr(joined, "_processors", lambda device: 2)
        monkeypatch.setattr(joined, "rounds_once", lambda device, dtype: False)
        monkeypatch.setattr(Tensor, "is_cuda", True)
    elif not joined._hopper(torch.device(DEVICE)):
        pytest.skip("no bulk tensor copies")


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_kernel_sums_over_all_pairs(count: int) -> None:
    """One rounding of the whole sum, at sizes that are no multiple of a block."""
    m, n, r = 136, 264, 12
    made = torch.Generator().manual_seed(0)
    draw_ = lambda *s: torch.randn(*s, generator=made).to(DEVICE, torch.float16)  # noqa: E731
    pairs = [(draw_(m, k), draw_(k, n)) for k in (72, 64, 8, 136)[:count]]
    a, b = draw_(m, r), draw_(r, n)
    truth = a.double() @ b.double() + sum(x.double() @ w.double() for x, w in pairs)
    error = float((summed.summed(pairs, a, b).double() - truth).norm() / truth.norm())
    once = float((truth.half().double() - truth).norm() / truth.norm())
    assert error < (1.05 * once if count < 4 else 2.5 * once)
    assert not joined._broken


@pytest.mark.usefixtures("copies")
def test_a_bias_in_the_same_accumulator() -> None:
    made = torch.Generator().manual_seed(0)
    x, w, a, b, c = (torch.randn(s, generator=made).to(DEVICE, torch.float16) for s in ((136, 72), (72, 264), (136, 8), (8, 264), (264,)))
    truth = x.double() @ w.double() + 0.5 * a.double() @ b.double() + 8 * c.double()
    error = float((joined.joined(a, b, 0.5, x, w, 8 * c).double() - truth).norm() / truth.norm())
    assert error < 1.05 * float((truth.half().double() - truth).norm() / truth.norm())
    assert not joined._broken


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("rank", [5, 40])
def test_fp32_factors_beside_a_low_precision_product(rank: int) -> None:
    """Two parts of each factor: as close as one rounding of the sum, whatever the factors' last bits are."""
    m, n, k = 136, 264, 72
    made = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=made).to(DEVICE, torch.float16) for s in ((m, k), (k, n)))
    a, b = (torch.randn(s, generator=made).to(DEVICE) for s in ((m, rank), (rank, n)))
    truth = x.double() @ w.double() + 0.5 * a.double() @ b.double()
    error = float((joined.joined(a, b, 0.5, x, w).double() - truth).norm() / truth.norm())
    assert error < 1.05 * float((truth.half().double() - truth).norm() / truth.norm())
    assert not joined._broken
