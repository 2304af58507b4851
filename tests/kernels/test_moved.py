"""Rows moved to the places of a permutation: the same bits as ``index_copy``, for all widths, dtypes and numbers of rows."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels import moved

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("lowering", ["torch", "triton"])
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("n, more, width", [(1, 0, 1), (6, 3, 20), (33, 0, 1030), (5000, 2, 1), (0, 4, 3), (7, 0, 0)])
def test_every_row_is_where_the_index_says(
    n: int, more: int, width: int, index: torch.dtype, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0) if CUDA else torch.device("cpu")
    monkeypatch.setattr(moved.KERNELS, "broken", {device} if lowering == "torch" else set())
    torch.manual_seed(n)
    whole = torch.randn(n, 2 * width, device=DEVICE)
    for rows in (whole[:, :width], whole[:, width:].contiguous().to(torch.float16)):
        order = torch.randperm(n, device=DEVICE).to(index)
        for dtype in (torch.float32, torch.float16):
            got = moved.move_rows(rows, order, n + more, dtype)
            expected = torch.zeros(n + more, width, dtype=dtype, device=DEVICE)
            expected[order.long()] = rows.to(dtype)
            assert got.dtype is dtype and torch.equal(got, expected)
