"""Attention is right whatever plans the process has made before, and leaves none that make others wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kept_plans import Plans, kept_plans
from processor import DEVICE
from slothc.kernels import sdpa as module
from slothc.kernels.sdpa import by_rows
from slothc.kernels.sdpa import scaled_dot_product_attention as sdpa

from slothc import survey_child

BATCH, HEADS, LENGTH, DIM = 2, 4, 64, 64


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plans | None]:
    """cuDNN's where there is a GPU, and what stands for it elsewhere."""
    if DEVICE == "cuda":
        yield None
        return
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    with kept_plans() as found:
        yield found


def _leaves(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """q, k [batch, head, length, dim] in that order in memory, as partial rotary embeddings leave them, and v by rows."""
    draw = torch.Generator().manual_seed(5)
    made = [torch.randn(BATCH, HEADS, LENGTH, DIM, generator=draw).to(torch.bfloat16).to(DEVICE, dtype) for _ in range(3)]
    made[2] = by_rows(made[2])
    return [t.requires_grad_() for t in made]


def _gradients(layout: int) -> torch.Tensor:
    """The same numbers in three layouts: head by head, by rows, a part of what is twice as wide."""
    g = torch.randn(BATCH, HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(6)).to(DEVICE, torch.bfloat16)
    if layout == 2:
        return torch.cat((g, g), -1)[..., DIM:]
    return by_rows(g) if layout else g


def _off(function: object, layout: int) -> float:
    """The largest relative distance of a gradient from float64's."""
    leaves, wide = _leaves(), _leaves(torch.float64)
    found = torch.autograd.grad(function(*leaves, is_causal=True), leaves, _gradients(layout))  # type: ignore[operator]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril()
    scores = torch.where(mask, wide[0] @ wide[1].mT * DIM**-0.5, float("-inf"))
    true = torch.autograd.grad(torch.softmax(scores, -1) @ wide[2], wide, _gradients(layout).double())
    return max(float((f - t).norm() / t.norm()) for f, t in zip(found, true))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_every_layout_of_the_gradient(plans: Plans | None, first: int) -> None:
    before = _off(F.scaled_dot_product_attention, first)
    assert before < 2e-2
    assert max(_off(sdpa, layout) for layout in (0, 1, 2)) < 2e-2
    assert _off(F.scaled_dot_product_attention, first) == pytest.approx(before)
    if plans is not None:                                                  # what stands for cuDNN has the fault
        assert not all(_off(F.scaled_dot_product_attention, layout) < 0.5 for layout in (0, 1, 2))


def test_what_it_is_beside_that(plans: Plans | None) -> None:
    q, k, v = _leaves()
    assert torch.equal(sdpa(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert by_rows(_gradients(1)).data_ptr() != by_rows(_gradients(0)).data_ptr()
    rows = _gradients(1)
    assert by_rows(rows) is rows and torch.equal(by_rows(_gradients(2)), rows)


@pytest.mark.parametrize("name", ["glm", "diffllama"])
def test_models_whose_eager_step_came_first(plans: Plans | None, name: str) -> None:
    """glm's gradient comes by rows to a q that is not; diffllama's is a part of what is twice as wide."""
    row = survey_child.measure(name, "lora", "bf16", report=False, device=DEVICE)
    assert (row["status"], row["dropped"]) == ("ok", []), row["reason"]
