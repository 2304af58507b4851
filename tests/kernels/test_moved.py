"""Rows moved to the places of a permutation: the same bits as ``index_copy``, for all widths, dtypes and numbers of rows."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels import handwritten, moved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("lowering", ["torch", "triton"])
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("n, more, width", [(1, 0, 1), (6, 3, 20), (33, 0, 1030), (5000, 2, 1), (0, 4, 3), (7, 0, 0)])
def test_every_row_is_where_the_index_says(
    n: int, more: int, width: int, index: torch.dtype, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handwritten, "available", lambda device: lowering == "triton")
    torch.manual_seed(n)
    whole = torch.randn(n, 2 * width, device=DEVICE)
    for rows in (whole[:, :width], whole[:, width:].contiguous().to(torch.float16)):
        order = torch.randperm(n, device=DEVICE).to(index)
        for dtype in (torch.float32, torch.float16):
            got = moved.move_rows(rows, order, n + more, dtype)
            expected = torch.zeros(n + more, width, dtype=dtype, device=DEVICE)
            expected[order.long()] = rows.to(dtype)
            assert got.dtype is dtype and torch.equal(got, expected)
    assert not moved.KERNELS.broken
