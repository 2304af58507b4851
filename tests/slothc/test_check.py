"""The check sees functions that have values only at positive numbers, and lets nothing through that it could not compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from slothc.kernels import rowwise_op
from torch import Tensor

from slothc.capture import found_in
from slothc.check import _smaller, check, draw
from slothc.errors import RegionDropped, VerificationFailed
from slothc.found import Region
from slothc.regions import leaves


def run(function: Callable[..., Tensor], wrong: float = 0.0) -> dict[str, tuple[float, float]]:
    found = found_in(function, (torch.rand(2, 5, 16) + 0.5,))
    region: Region = found.regions[0]
    inputs = leaves(region.cone)
    place, call = [inputs.index(n) for n in region.operands], rowwise_op.call(region.plan)
    return check(
        found.view, list(region.cone.nodes), inputs, region.cone.results, lambda *v: call(*(v[k] for k in place)) + wrong
    )


def logarithm(x: Tensor) -> Tensor:
    return (torch.log(x) + torch.sqrt(x)).sum(-1, keepdim=True) * x


def never(x: Tensor) -> Tensor:
    return torch.log(-x * x) * x


def test_a_function_of_positive_numbers_is_checked() -> None:
    assert all(ours < 1e-6 for ours, _ in run(logarithm).values())
    with pytest.raises(VerificationFailed, match="result 0"):
        run(logarithm, wrong=0.01)


def overflowing(x: Tensor) -> Tensor:
    return torch.exp(80 * x) * torch.exp(-80 * x) + x


def test_where_eager_overflows_nothing_is_compared() -> None:
    assert all(ours < 1e-4 for ours, _ in run(overflowing).values())
    with pytest.raises(VerificationFailed, match="result 0"):
        run(overflowing, wrong=0.01)


def of_small_numbers(x: Tensor) -> Tensor:
    """16 squares of 200 x are beyond fp16 together at every draw of size 1, not at an eighth of that."""
    h = x.half()
    return h * (h * 200.0).square().sum(-1, keepdim=True)


def test_a_function_of_small_numbers_is_checked() -> None:
    assert all(ours < 2e-3 for ours, _ in run(of_small_numbers).values())
    with pytest.raises(VerificationFailed, match="result 0"):
        run(of_small_numbers, wrong=1e3)


def test_what_has_no_value_at_any_draw_is_not_let_through() -> None:
    with pytest.raises(VerificationFailed, match="could not be checked"):
        run(never)


def test_a_table_of_one_row_is_looked_up_where_it_has_one() -> None:
    """RoBERTa's token types: integers beyond the table are no draw."""
    def function(ids: Tensor, kinds: Tensor, words: Tensor, types: Tensor) -> Tensor:
        return F.layer_norm(F.embedding(ids, words) + F.embedding(kinds.view(2, 5), types), (24,))

    words, types = torch.randn(7, 24, requires_grad=True), torch.randn(1, 24, requires_grad=True)
    given = torch.randint(0, 7, (2, 5)), torch.zeros(10, dtype=torch.int64), words, types
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        ours = torch.compile(function, backend="sloth")(*given)
    torch.testing.assert_close(ours, function(*given))


def test_rows_are_looked_up_all_over_a_table() -> None:
    """An expert's outputs put back in order: with two rows drawn, two numbers would judge the gradient of the weights."""
    def function(out: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return (out * weights[:, None])[order].view(40, 2, 24).sum(1).square()

    found = found_in(function, (torch.rand(80, 24), torch.rand(80), torch.randperm(80)))
    order = next(n for n in found.view.nodes if n.op == "placeholder" and found.view.example(n).dtype is torch.int64)
    assert draw(found.view, order).unique().numel() > 20


def test_a_loss_is_checked_on_few_rows_of_a_small_vocabulary() -> None:
    """In float64 the logits of a large one would be more than the model itself needs."""
    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float().view(-1, 900), labels.view(-1))

    found = found_in(function, (torch.rand(3, 200, 16), torch.rand(900, 16), torch.randint(0, 900, (3, 200))))
    labels = next(n for n in found.view.nodes if n.target == "view" and found.view.example(n).dtype is torch.int64)
    inputs = [*(n for n in found.view.nodes if n.op == "placeholder" and found.view.example(n).is_floating_point()), labels]
    sizes = _smaller(found.view, inputs)
    assert (sizes[200], sizes[900]) == (72, 68)
    assert sizes[600] == 3 * sizes[200]


def test_what_a_check_saves_goes_through_nobodys_hooks() -> None:
    """A checkpoint around a compiled model would run the model for it: on a GPU in the thread that the check waits for."""
    layer, packed = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8)), []
    run = torch.compile(layer, backend="sloth", options={"verify": "always"})
    counts = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        for _ in range(2):
            packed.clear()
            run(torch.randn(4, 8, requires_grad=True)).sum().backward()
            counts.append(len(packed))
    assert counts[0] == counts[1] > 0
