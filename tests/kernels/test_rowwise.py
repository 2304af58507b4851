"""The ``rowwise`` family against float64 truth: the Triton kernels and the PyTorch lowering of the same plans.

On a GPU the kernels run compiled; without one in Triton's interpreter, whose cast to bf16 cuts digits off where hardware rounds: an
error of 2^-7 at most at each rounding point.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import sympy as sp
import torch
from contract import DRAWS, SLACK, Case, Errors, case, hold, run
from forms import FORMS, Form, form
from slothc.gradients.geometry import Access, Axis
from slothc.gradients.geometry import Form as Map
from slothc.gradients.plan import Operand, Pass
from slothc.gradients.program import COLUMN, ROW, Input, Output, Program, Stage, symbol
from slothc.kernels import rowwise, shapes, triton_launch
from slothc.kernels.binding import Binder, Unbindable
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRUNCATED = 2**-6                     # two bf16 roundings one behind the other, each cut off: 2^-7 at most each
LOWERINGS = ("torch", "triton")
ALL = [pytest.param(f, id=f.name) for f in FORMS]

pytestmark = pytest.mark.usefixtures("triton_kernels")


@functools.cache
def lifted(f: Form, dtype: torch.dtype) -> Case:
    return case(f.function, f.draw(dtype, DEVICE), f.fixed)


def cut(lowering: str, dtype: torch.dtype) -> float:
    return TRUNCATED if lowering == "triton" and dtype == torch.bfloat16 and not CUDA else 0.0


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("f", ALL)
def test_results_and_gradients(f: Form, dtype: torch.dtype, lowering: str) -> None:
    hold(lifted(f, dtype), lowering, lambda: f.draw(dtype, DEVICE), more=cut(lowering, dtype))


@pytest.mark.parametrize("f", ALL)
def test_lowerings_agree(f: Form) -> None:
    """Two implementations of one plan differ by the rounding of fp32 and by nothing else, saved values included."""
    c = lifted(f, torch.float32)
    reads = [t.detach() for t in _operands(c, f.draw(torch.float32, DEVICE))]
    for p in c.passes():
        written = rowwise.launcher(p).torch(reads)
        for a, b in zip(rowwise.launcher(p).triton(reads), written):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        if p is c.plan.backward:
            continue
        cotangents = [torch.randn_like(t) for t in written[: c.plan.results]]
        reads = [*(reads[k] for k in c.plan.saved_operands), *(written[k] for k in c.plan.held), *cotangents]


def _operands(c: Case, arguments: Sequence[Any]) -> list[Tensor]:
    return [arguments[k] for k in c.places]


# sizes


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("f", [p for p in ALL if p.values[0].name not in ("masked",)])
def test_rows(f: Form, rows: int, lowering: str) -> None:
    """One plan for every number of rows; a persistent grid sums the gradients of columns."""
    hold(lifted(f, torch.float32), lowering, lambda: f.draw(torch.float32, DEVICE, rows=rows), draws=1 if rows > 9 else DRAWS)


LONG = ("rms_norm", "add_norm", "layer_norm", "in_no_file", "softmax", "log_softmax", "largest", "chained", "total")


@pytest.mark.parametrize("lanes", [1, 31, 4097, 20000, *([40000, 262144] if CUDA else [])])
@pytest.mark.parametrize("name", LONG)
def test_row_lengths(name: str, lanes: int) -> None:
    """Rows past the limit of a block are read in several passes."""
    f = form(name)
    c = case(f.function, f.draw(torch.float32, DEVICE, lanes=lanes), f.fixed) if lanes == 1 else lifted(f, torch.float32)
    arguments = f.draw(torch.float32, DEVICE, rows=2, lanes=lanes)
    reference = run(f.function, arguments)
    exact = run(f.function, [a.double() for a in arguments], [g.double() for g in reference.cotangents])
    ours = c.values("triton")(arguments, reference.cotangents)
    for key, value in ours.items():
        truth, eager = exact.values[key], reference.values[key]
        scale = max(float(truth.norm()), 1e-2 * truth.numel() ** 0.5)        # a norm of one column has no gradient
        error = float((value.double() - truth).norm()) / scale
        assert error <= SLACK * float((eager.double() - truth).norm()) / scale + (1e-6 if lanes > 1 else 1e-4), key


@pytest.mark.parametrize("name", LONG)
def test_loop_kernels_on_short_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows through both kinds of kernel."""
    f = form(name)
    c = lifted(f, torch.float32)
    arguments = f.draw(torch.float32, DEVICE)
    cotangents = run(f.function, arguments).cotangents
    tile = c.values("triton")(arguments, cotangents)
    monkeypatch.setattr(shapes, "ROW_LIMIT", 16)
    monkeypatch.setattr(rowwise, "_launchers", {})
    for key, value in c.values("triton")(arguments, cotangents).items():
        torch.testing.assert_close(value, tile[key], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lanes", [48, 56, 61])
@pytest.mark.parametrize("f", ALL)
def test_rows_in_blocks_side_by_side(f: Form, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three blocks of a power of two hold a row as one block with unused lanes does."""
    if lanes != 48 and f.name not in LONG:
        pytest.skip("the form has one length")
    c = lifted(f, torch.float32)
    arguments = f.draw(torch.float32, DEVICE, lanes=lanes)
    cotangents = run(f.function, arguments).cotangents
    whole = c.values("triton")(arguments, cotangents)
    monkeypatch.setattr(shapes, "SPLIT", 16)
    monkeypatch.setattr(shapes, "SMALLEST", 8)
    monkeypatch.setattr(rowwise, "_launchers", {})
    for key, value in c.values("triton")(arguments, cotangents).items():
        torch.testing.assert_close(value, whole[key], rtol=2e-5, atol=2e-5)


def test_blocks_of_a_row() -> None:
    """As few as waste less than a tenth; three at most."""
    found = [shapes._pieces(n) for n in (1000, 1024, 1100, 2304, 2880, 3072, 3584, 7168)]
    expected = [(1024,), (1024,), (1024, 256), (2048, 256), (2048, 1024), (2048, 1024), (2048, 1024, 512), (4096, 2048, 1024)]
    assert found == expected


@pytest.mark.parametrize("change", ["masks", "sums together"])
@pytest.mark.parametrize("name", LONG)
def test_what_costs_less_changes_nothing(name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end where rows do need no masks; sums of which none waits for another are one reduction."""
    f = form(name)
    c = lifted(f, torch.float32)
    arguments = f.draw(torch.float32, DEVICE, rows=32, lanes=64)
    cotangents = run(f.function, arguments).cotangents
    found = c.values("triton")(arguments, cotangents)
    if change == "masks":
        monkeypatch.setattr(triton_launch, "even", lambda shape, bound: (False, False))
    else:
        monkeypatch.setattr(triton_launch, "nvidia", lambda: not CUDA)
    monkeypatch.setattr(rowwise, "_launchers", {})
    for key, value in c.values("triton")(arguments, cotangents).items():
        torch.testing.assert_close(value, found[key], rtol=0 if change == "masks" else 1e-5, atol=0 if change == "masks" else 1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_a_layer_norm_whose_gradient_cancels(mean: float, lowering: str) -> None:
    """Upstream is the result: in every lane what comes through the spread is what comes directly. No sum of zeros is left to help."""
    c, errors = lifted(form("layer_norm"), torch.float32), Errors()

    def once() -> None:
        x, w, b = torch.randn(2, 32, 256, device=DEVICE) + mean, torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE)
        reference = run(c.function, (x, w, b))
        upstream = [reference.values["result 0"]]
        eager, exact = run(c.function, (x, w, b), upstream), run(c.function, (x, w, b), upstream, wide=True)
        for name, value in c.values(lowering)((x, w, b), upstream).items():
            errors.add(name, value, eager.values[name], exact.values[name])

    torch.manual_seed(5)
    errors.over(once)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "largest"])
@pytest.mark.parametrize("limit", [16, 16384])
def test_shifts_keep_large_and_infinite_values(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "ROW_LIMIT", limit)
    monkeypatch.setattr(rowwise, "_launchers", {})
    f = form(name)
    x, *rest = f.draw(torch.float32, DEVICE)
    x = x * 200.0
    x[0, 0, 3:7] = -float("inf") if name != "largest" else -500.0
    x[0, 1, 1:] = -float("inf") if name == "softmax" else 3.0
    c = lifted(f, torch.float32)
    for lowering in LOWERINGS:
        got = c.values(lowering)([x, *rest], [torch.ones_like(x)])["result 0"]
        torch.testing.assert_close(got, f.function(x, *rest), rtol=1e-5, atol=1e-5)


# memory


def sliced(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[0], shape[1] + 1, shape[2] * 2, device=DEVICE)[:, 1:, ::2]


def transposed(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[1], shape[0], shape[2], device=DEVICE).transpose(0, 1)


def columns(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[0], shape[2], shape[1], device=DEVICE).mT


def one_row(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(1, 1, shape[2], device=DEVICE).expand(shape)


def one_lane(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape[:2], 1, device=DEVICE).expand(shape)


def one_element(shape: tuple[int, ...]) -> Tensor:
    return torch.randn((), device=DEVICE).expand(shape)


@pytest.mark.parametrize("layout", [sliced, transposed, columns, one_row, one_lane, one_element], ids=lambda f: f.__name__)
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["rms_norm", "add_norm", "in_no_file", "softmax", "scalars"])
def test_strides_of_operands_and_cotangents(name: str, lowering: str, layout: Any) -> None:
    """Rows that cannot merge into one loop, lanes far apart, elements read many times: all in place."""
    f = form(name)
    arguments = f.draw(torch.float32, DEVICE)
    arguments[0] = layout((2, 5, 48))
    results = f.function(*arguments)
    cotangents = [layout((2, 5, 48)) for _ in (results if isinstance(results, tuple) else (results,))]
    reference = run(f.function, arguments, cotangents)
    exact = run(f.function, [a.double() for a in arguments], [g.double() for g in cotangents])
    for key, value in lifted(f, torch.float32).values(lowering)(arguments, cotangents).items():
        torch.testing.assert_close(value.double(), exact.values[key], rtol=2e-4, atol=2e-5)
        assert value.shape == reference.values[key].shape


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_results_may_overwrite_operands(lowering: str) -> None:
    """An element is read before it is written, so a gradient may take its cotangent's memory."""
    f = form("add_norm")
    p = lifted(f, torch.float32).plan.forward
    x, r, w = f.draw(torch.float32, DEVICE)
    expected = rowwise.launcher(p).torch([t for t in _operands(lifted(f, torch.float32), [x, r, w])])
    operands = _operands(lifted(f, torch.float32), [x, r, w])
    writes = [x, r, *(torch.empty_like(t) for t in expected[2:])]
    getattr(rowwise.launcher(p), lowering)(operands, writes)
    for got, want in zip(writes, expected):
        torch.testing.assert_close(got, want)


def test_rows_merge_into_one_loop_where_memory_allows() -> None:
    c = lifted(form("rms_norm"), torch.float32)
    binder = Binder(c.plan.forward)
    w = torch.randn(48)

    def groups(x: Tensor) -> int:
        reads = _operands(c, [x, w])
        return len(binder.bind(reads, binder.allocate(reads)).groups)

    assert groups(torch.randn(4, 6, 48)) == 1
    assert groups(torch.randn(4, 8, 48)[:, :6]) == 2
    assert groups(torch.randn(6, 4, 48).transpose(0, 1)) == 2
    assert groups(torch.randn(1, 8, 48)[:, :6]) == 1
    assert groups(torch.randn(1, 1, 48)) == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    c = lifted(form("rope"), torch.float32)
    binder = Binder(c.plan.forward)
    reads = _operands(c, form("rope").draw(torch.float32))
    with pytest.raises(Unbindable, match="the plan reads 3"):
        binder.bind(reads[:2], [])


# offsets past 2^31


def test_offsets_are_64_bits_wide_where_a_tensor_needs_it() -> None:
    c = lifted(form("rms_norm"), torch.float32)
    binder = Binder(c.plan.forward)
    w = torch.empty(48, device="meta")

    def wide(x: Tensor) -> bool:
        reads = _operands(c, [x, w])
        return binder.bind(reads, binder.allocate(reads)).wide

    assert not wide(torch.empty(2, 1000, 48, device="meta"))
    assert wide(torch.empty(2, 24_000_000, 48, device="meta"))
    assert wide(torch.empty(48 * 2**26, device="meta").as_strided((2, 5, 48), (2**31, 48, 1)))


@pytest.mark.skipif(not CUDA, reason="needs 20 GiB of memory")
def test_a_tensor_of_more_than_2_31_elements() -> None:
    f = form("rms_norm")
    c = lifted(f, torch.bfloat16)
    rows, lanes = 2**18 + 3, 8192
    x = torch.randn(1, rows, lanes, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(lanes, device=DEVICE, dtype=torch.bfloat16)
    written = rowwise.launcher(c.plan.forward).triton(_operands(c, [x, w]))
    for part in (slice(0, 2), slice(rows - 5, rows)):
        torch.testing.assert_close(written[0][:, part], f.function(x[:, part], w))
    assert c.plan.backward is not None
    reads = [*(_operands(c, [x, w])[k] for k in c.plan.saved_operands), *(written[k] for k in c.plan.held), x]
    found = rowwise.launcher(c.plan.backward).triton(reads)
    gradients = {c.places[o]: found[t] for o, t in zip(c.plan.wrt, c.plan.targets)}
    tail = run(f.function, [x[:, -5:], w], [x[:, -5:]]).values["gradient 0"]
    torch.testing.assert_close(gradients[0][:, -5:], tail, rtol=2e-2, atol=2e-2)
    assert gradients[1].isfinite().all()


# the lane's own number


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("lanes", [7, 20000])
def test_index_inputs(lowering: str, lanes: int) -> None:
    """y_i = x_i + i w_i."""
    x, w, v = symbol("x"), symbol("w"), symbol("v")
    program = Program(
        (Input("x", ROW), Input("w", COLUMN), Input("v", COLUMN, "i64", differentiable=False, role="index")),
        (Stage("y", x + v * w),), (Output("y", "y"),),
    )  # fmt: skip
    b, n = sp.Symbol("b", integer=True, positive=True), sp.Symbol("n", integer=True, positive=True)
    index = (Map.axis("a"), Map.axis("i"))
    p = Pass(
        program, (Axis("a", b),), Axis("i", n), (Access(0, index), Access(1, index[1:]), None), (Access(0, index),),
        (Operand((b, n), "fp32"), Operand((n,), "fp32")), (Operand((b, n), "fp32"),),
    )  # fmt: skip
    given = torch.randn(3, lanes, device=DEVICE), torch.randn(lanes, device=DEVICE)
    (y,) = getattr(rowwise.launcher(p), lowering)(given)
    torch.testing.assert_close(y, given[0] + torch.arange(lanes, device=DEVICE) * given[1])
