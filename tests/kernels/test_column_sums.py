"""Partial sums of a persistent grid, added up and rounded once: wherever the target's elements lie, and however many sums there are."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels.binding import Placement
from slothc.kernels.column_sums import COUNT, PARTIALS, ColumnSums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("partials, lanes", [(1, 1), (3, 40), (131, 257), (PARTIALS + 5, 16)])
def test_sums_go_to_their_places(partials: int, lanes: int, interpreted: bool) -> None:
    """More sums than one launch takes; every other element of a target, a part of one, one value for all lanes and one alone."""
    torch.manual_seed(3)
    targets = [torch.full((2 * lanes + 7,), -1.0, device=DEVICE, dtype=d) for d in (torch.float32, torch.float16, torch.float32)]
    targets += [torch.full((1,), -1.0, device=DEVICE), *(torch.empty(lanes, device=DEVICE) for _ in range(COUNT))]
    ways = [(Placement(0, 0, (0,), 2), lanes), (Placement(1, 7, (0,), 1), lanes)]
    ways += [(Placement(2, 3, (0,), 1), 1), (Placement(3, 0, (0,), 0), 1)]
    ways += [(Placement(4 + k, 0, (0,), 1), lanes) for k in range(COUNT)]
    parts = [torch.randn(partials, width, device=DEVICE) for _, width in ways]
    ColumnSums(ways, partials, lanes, DEVICE, interpreted)(parts, targets)
    for (place, _), part in zip(ways, parts):
        got, expected = targets[place.tensor], part.double().sum(0)
        if place.lane:
            expected = expected.expand(lanes)
            mine = got.as_strided((lanes,), (place.lane,), place.offset)
            assert int((got == -1.0).sum()) == got.numel() - lanes
        else:
            mine = got
        tolerance = 2e-3 if got.dtype is torch.float16 else 1e-5
        torch.testing.assert_close(mine.double(), expected.to(mine.dtype).double(), rtol=tolerance, atol=partials**0.5 * 1e-5)
