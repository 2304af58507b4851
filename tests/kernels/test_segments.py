"""Sums of rows by an index: segments of any length, none, skipped ones, counted from the end, one block of the index or many."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels import handwritten, segments
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.fixture(params=[128, 1024], autouse=True)
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handwritten, "available", lambda device: True)
    monkeypatch.setattr(segments, "LENGTH", request.param)


def drawn(n: int, count: int) -> Tensor:
    return torch.randint(0, count, (n,), device=DEVICE)


def summed(rows: Tensor, index: Tensor, count: int, skipped: int | None = None) -> Tensor:
    kept = (index >= 0) & (index < count) & (index != (-1 if skipped is None else skipped))
    out = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=DEVICE)
    return out.index_add_(0, index[kept], rows[kept].double())


@pytest.mark.parametrize("width", [1, 24, 300])
@pytest.mark.parametrize(("n", "count"), [(1, 1), (400, 40), (300, 1), (7, 500)])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=str)
def test_sums(n: int, count: int, width: int, integer: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, index = torch.randn(n, width, device=DEVICE), drawn(n, count).to(integer)
    found = segments.segment_sum(rows, index, count, torch.float32, skipped=None, signed=False)
    assert found is not None
    torch.testing.assert_close(found.double(), summed(rows, index.long(), count), rtol=1e-6, atol=1e-5)


def test_one_rounding() -> None:
    """A row that a thousand are added to is rounded once to 16 bits, not a thousand times."""
    rows, index = torch.rand(1000, 16, device=DEVICE).half(), torch.zeros(1000, dtype=torch.int64, device=DEVICE)
    found = segments.segment_sum(rows, index, 2, torch.float16, skipped=None, signed=False)
    assert found is not None
    torch.testing.assert_close(found[0].double(), rows.double().sum(0), rtol=2.0**-11, atol=0)
    assert not found[1].any()


def test_the_index_gives_the_order_of_a_sum() -> None:
    """Every run has the same bits, whatever order the device's programs finish in."""
    rows = torch.randn(4096, 8, device=DEVICE) * torch.logspace(-6, 6, 4096, device=DEVICE).unsqueeze(1)
    index = drawn(4096, 3)
    one, two = (segments.segment_sum(rows, index, 3, torch.float32, skipped=None, signed=False) for _ in range(2))
    assert one is not None and two is not None and torch.equal(one, two)
    found = segments._sorted(index, 3, segments.LENGTH, -1, False)
    assert found is not None
    counts, sums, order = found
    counts, sums = counts.view(3, -1), sums.view(3, -1)
    for v in range(3):
        mine = order[1, int(sums[v, 0] - counts[v, 0]) : int(sums[v, -1])]
        assert torch.equal(mine.long(), (index == v).nonzero().squeeze(1))


def test_many_rows_take_longer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "COUNTS", 100)
    assert segments._length(64 * segments.LENGTH, 10) == 8 * segments.LENGTH
    assert segments._length(10, 101) is None
    assert segments.segment_sum(torch.ones(10, 4, device=DEVICE), drawn(10, 9), 101, torch.float32, skipped=None, signed=False) is None


def test_skipped_and_outside() -> None:
    rows, index = torch.randn(64, 20, device=DEVICE), torch.randint(-9, 9, (64,), device=DEVICE)
    found = segments.segment_sum(rows, index, 5, torch.float32, skipped=3, signed=False)
    assert found is not None and not found[3].any()
    torch.testing.assert_close(found.double(), summed(rows, index, 5, 3), rtol=1e-6, atol=1e-6)


def test_from_the_end() -> None:
    rows, index = torch.randn(64, 20, device=DEVICE), torch.randint(-5, 5, (64,), device=DEVICE)
    found = segments.segment_sum(rows, index, 5, torch.float32, skipped=None, signed=True)
    assert found is not None
    torch.testing.assert_close(found.double(), summed(rows, index % 5, 5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 0, 8), (4, 4, 0)], ids=["no rows", "no segments", "no columns"])
def test_nothing(shape: tuple[int, int, int]) -> None:
    n, count, width = shape
    index = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    found = segments.segment_sum(torch.ones(n, width, device=DEVICE), index, count, torch.float32, skipped=None, signed=False)
    assert found is not None and found.shape == (count, width) and not found.any()


def test_a_kernel_that_cannot_be_built_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments.KERNELS, "broken", set())
    monkeypatch.setattr(segments.KERNELS, "records", {})
    monkeypatch.setattr(segments.KERNELS, "named", lambda name: 1 / 0)
    rows, index = torch.ones(3, 4, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="rows' gradients on .* with PyTorch"):
        assert segments.segment_sum(rows, index, 2, torch.float32, skipped=None, signed=False) is None
    assert segments.segment_sum(rows, index, 2, torch.float32, skipped=None, signed=False) is None
