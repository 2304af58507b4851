"""Products with a thin matrix by their kernels, against float64, at sizes that fill no block."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels import thin
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16                # the interpreter truncates to bf16
SCALES = (0.5, 2.0, 1.0)
SIZES = ((264, 40, 328), (1104,), (64, 64))


@pytest.fixture(autouse=True)
def kernels(triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_runs", lambda device: True)
    monkeypatch.setattr(thin, "_records", {})


def draw(*size: int, dtype: torch.dtype = LOW) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def near(ours: Tensor, true: Tensor) -> None:
    """Off by one rounding of the true value; in fp32 by what its arithmetic leaves."""
    assert ours.shape == true.shape
    error = float((ours.double() - true).norm() / true.norm())
    once = float((true.to(ours.dtype).double() - true).norm() / true.norm())
    assert error <= (1e-6 if ours.dtype is torch.float32 else 1.05 * once)


@pytest.mark.parametrize("dtype", [LOW, torch.float32], ids=["low", "fp32"])
@pytest.mark.parametrize("rank", [5, 16, 24])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("m", [1, 37, 300])
def test_both_readers_of_a_gradient(m: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gs = [draw(m, n) for n in sizes]
    bs, t = [draw(n, rank, dtype=dtype) for n in sizes], draw(m, rank * len(sizes), dtype=dtype)
    assert thin.has_kernel(gs, bs, t)
    found = thin.both(gs, bs, t, SCALES[: len(sizes)])
    near(found[0], torch.cat([s * g.double() @ b.double() for s, g, b in zip(SCALES, gs, bs)], 1))
    for s, g, own, ours in zip(SCALES, gs, t.split(rank, 1), found[1]):
        near(ours, s * g.t().double() @ own.double())


def across(x: Tensor, a: Tensor) -> Tensor:
    """By the kernel, for factors of x's dtype too."""
    (found, _) = thin._launched(("across", 1.0), [x], [a], None) or (None, None)
    assert found is not None
    return found


def along(u: Tensor, x: Tensor) -> Tensor:
    (_, found) = thin._launched(("along", 1.0), [x], [], u, turned=True) or (None, None)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [LOW, torch.float32], ids=["low", "fp32"])
@pytest.mark.parametrize("rank", [3, 48])
@pytest.mark.parametrize("m", [1, 300])
def test_across_and_along(m: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, a, u = draw(m, 1104), draw(rank, 1104, dtype=dtype), draw(m, rank, dtype=dtype)
    near(across(x, a.t()), x.double() @ a.t().double())
    near(along(u, x), u.t().double() @ x.double())


def test_rows_apart_and_columns_of_a_wider_matrix() -> None:
    g, t = draw(70, 512)[:, 128:328], draw(70, 64)[:, 8:24]
    b = draw(16, 200).t()
    assert thin.has_kernel([g], [b], t)
    found = thin.both([g], [b], t, [1.0])
    near(found[0], g.double() @ b.double())
    near(found[1][0], g.t().double() @ t.double())


@pytest.mark.parametrize("what", ["fp32", "different ranks", "no rows", "columns of columns", "too wide", "wide", "four"])
def test_what_has_no_kernel(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, rank, gs = 8, [4, 4], [draw(8, 32), draw(8, 32)]
    if what == "fp32":
        gs = [g.float() for g in gs]
    elif what == "different ranks":
        rank = [4, 8]
    elif what == "no rows":
        m, gs = 0, [g[:0] for g in gs]
    elif what == "columns of columns":
        gs = [g.t().contiguous().t() for g in gs]
    elif what == "too wide":
        rank = [thin.WIDEST + 1] * 2
    elif what == "wide":
        rank = [thin.NARROW + 8] * 2
    else:
        gs, rank = gs * 2, rank * 2
    bs, t = [draw(32, r, dtype=gs[0].dtype) for r in rank], draw(m, sum(rank), dtype=gs[0].dtype)
    assert not thin.has_kernel(gs, bs, t)
    monkeypatch.setattr(thin, "_Record", None)
    u, d = thin.both(gs, bs, t, [1.0] * len(gs))
    assert u.shape == (m, sum(rank)) and [tuple(v.shape) for v in d] == [(32, r) for r in rank]
    if m:
        true = torch.cat([g.double() @ b.double() for g, b in zip(gs, bs)], 1)
        library = torch.cat([torch.mm(g, b) for g, b in zip(gs, bs)], 1)      # of odd ranks it may round twice
        assert (u - true).norm() <= 1.05 * max((library - true).norm(), (true.to(u.dtype) - true).norm()) + 1e-6 * true.norm()
        for ours, g, own in zip(d, gs, t.split(rank, 1)):
            near(ours, g.t().double() @ own.double())


def test_a_kernel_that_cannot_be_built_leaves_it_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_broken", set())
    monkeypatch.setattr(thin, "_kernel", lambda name: 1 / 0)
    torch.manual_seed(0)
    g, b, t = draw(8, 32), draw(32, 8), draw(8, 8)
    with pytest.warns(RuntimeWarning, match="with PyTorch"):
        u, (d,) = thin.both([g], [b], t, [0.5])
    near(u, 0.5 * g.double() @ b.double())
    near(d, 0.5 * g.t().double() @ t.double())
