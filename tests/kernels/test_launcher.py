"""A kernel that fails for a new shape does not fail the program."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from slothc.kernels import rowwise
from torch import Tensor

from slothc import catalogue


class Fails:
    def __init__(self, good: int) -> None:
        self.good = good

    def __call__(self, reads: Sequence[Tensor], writes: Sequence[Tensor] | None = None) -> list[Tensor]:
        if not self.good:
            raise RuntimeError("out of shared memory")
        self.good -= 1
        return [torch.empty_like(reads[1])]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> rowwise.Launcher:
    monkeypatch.setattr(rowwise, "available", lambda device: True)
    _, plan = catalogue.lifted("rms_norm")[0]
    return rowwise.Launcher(plan.forward)


def test_a_first_failure_is_the_checks_business(launcher: rowwise.Launcher) -> None:
    launcher.triton = Fails(0)
    with pytest.raises(RuntimeError, match="shared memory"):
        launcher([torch.ones(8), torch.randn(2, 3, 8)])


def test_a_later_failure_goes_on_with_pytorch_and_one_warning(launcher: rowwise.Launcher) -> None:
    launcher.triton = Fails(1)
    weight, x = torch.ones(8), torch.randn(2, 3, 8)
    launcher([weight, x])
    with pytest.warns(RuntimeWarning, match="out of shared memory"):
        y, *_ = launcher([weight, x])
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))
    launcher([weight, x])                                                 # quietly
