"""Lifting by evaluation: views become index maps, whatever their spelling, and what has no formula says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import case, hold
from slothc.gradients.geometry import Form
from torch import Tensor

from slothc.capture import captured, found_in
from slothc.lift import CannotLift, lift
from slothc.lift_forms import NotAffine, Split, divmod_form, part, reshape
from slothc.view import GraphView


def halves(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((a * torch.sigmoid(b), b - a), dim=-1)


def chunks(x: Tensor) -> Tensor:
    a, b, c = x.chunk(3, dim=-1)
    return torch.tanh(a) * b + c


def pairs(x: Tensor) -> Tensor:
    return torch.stack((x[..., ::2] * 2.0, torch.sin(x[..., 1::2])), dim=-1).flatten(-2) + 1.0


def pairs_by_view(x: Tensor) -> Tensor:
    p = x.reshape(*x.shape[:-1], -1, 2)
    a, b = p.unbind(-1)
    return torch.stack((a - b, a * b), dim=-1).reshape(x.shape) + 1.0


def partial(x: Tensor) -> Tensor:
    return torch.cat((torch.exp(x[..., :8]), x[..., 8:]), dim=-1)


def pieces(x: Tensor) -> Tensor:
    a, b, c = torch.split(x, [8, 24, 16], dim=-1)
    return torch.cat((c * 2.0, torch.tanh(a), F.silu(b)), dim=-1)


def grouped_norm(x: Tensor, w: Tensor) -> Tensor:
    g = x.view(*x.shape[:-1], 4, -1)
    g = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * g.view(*x.shape)


def norm_of_heads(x: Tensor, w: Tensor) -> Tensor:
    h = x.view(*x.shape[:-1], 6, 8).transpose(1, 2)
    return w[:8] * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def merged_heads(x: Tensor) -> Tensor:
    return torch.tanh(x.view(2, 5, 6, 8).transpose(1, 2)).transpose(1, 2).flatten(2) + 1.0


def sum_of_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (a * b).sum(-1)


def whole_row_of_pieces(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    y = torch.cat((-b, a), dim=-1) * 1.5
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)


def outer(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x[..., :1] * w) + w.expand_as(x)


def from_the_end(x: Tensor) -> Tensor:
    return x[..., -16:] * x[:, -1:, -16:].exp()


def from_a_list(x: Tensor) -> Tensor:
    return torch.tanh(x[:, [-3, -2]]) * 2.0


def padded(x: Tensor) -> Tensor:
    return F.pad(torch.tanh(x), (16, 16), value=0.5) * 2.0


def padded_rows(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 2)) * 2.0 + 1.0


def cut_by_padding(x: Tensor) -> Tensor:
    return F.pad(torch.exp(x), (-8, -8, 0, 0)) + 1.0


def not_padded(x: Tensor) -> Tensor:
    return F.pad(torch.tanh(x), (0, 0, 0, 0))


def repeated(x: Tensor) -> Tensor:
    return torch.tanh(x.repeat(2, 3, 1)) + 1.0


def interleaved(x: Tensor) -> Tensor:
    return torch.tanh(x.repeat_interleave(3, dim=1)) * 2.0


def few(x: Tensor) -> Tensor:
    return torch.tanh(x.view(2, 5, 4, 12)).sum(2) * 2.0


def few_of_two(x: Tensor) -> Tensor:
    return x.view(2, 5, 2, 2, 12).mean((2, 3), keepdim=True) * x.view(2, 5, 2, 2, 12)


def stacked(x: Tensor) -> Tensor:
    return torch.stack((x * 2.0, torch.tanh(x)), dim=1) + 1.0


def joined_rows(x: Tensor) -> Tensor:
    return torch.cat((x[:, :2], torch.exp(x[:, 1:])), dim=1) + 1.0


def normed_stack(x: Tensor, w: Tensor) -> Tensor:
    h = torch.stack((x * 2.0, torch.tanh(x)), dim=1)
    return w * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


def filled(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.full_like(x, -2.0)) * torch.ones(48) + x.new_zeros(5, 1)


VIEWS: dict[Callable[..., Any], int] = {                                  # with the number of scalar equations a row falls into
    halves: 2, chunks: 1, pairs: 2, pairs_by_view: 2, partial: 6, pieces: 6, grouped_norm: 1, norm_of_heads: 1, merged_heads: 1,
    sum_of_halves: 1, whole_row_of_pieces: 2, outer: 1, from_the_end: 1, from_a_list: 1, padded: 5, padded_rows: 8, cut_by_padding: 1,
    not_padded: 1, repeated: 1, interleaved: 1, few: 1, few_of_two: 1, stacked: 2, joined_rows: 3, normed_stack: 2, filled: 1,
}  # fmt: skip


def arguments(function: Callable[..., Any]) -> list[Tensor]:
    return [torch.randn(2, 5, 48), torch.randn(48)][: function.__code__.co_argcount]


@pytest.mark.parametrize("function", VIEWS, ids=lambda f: f.__name__)
def test_views_become_index_maps(function: Callable[..., Any]) -> None:
    c = case(function, arguments(function))
    assert len(c.plan.forward.program.outputs) - len(c.plan.forward.writes) + c.plan.results == VIEWS[function]
    hold(c, "torch", lambda: arguments(function))


def test_equal_spellings_lift_to_one_plan() -> None:
    """pow(2) and square, rsqrt and ** -0.5, unsqueeze and None, t() and transpose, dropout(p=0) and contiguous: nothing differs."""

    def one(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def two(x: Tensor) -> Tensor:
        h = F.dropout(x, 0.0).contiguous() * 1.0
        return torch.square(h).mean(dim=-1).unsqueeze(-1).add(1e-6) ** -0.5 * h

    keys = {case(f, [torch.randn(2, 5, 48)]).plan.key for f in (one, two)}
    assert len(keys) == 1


REASONS: list[tuple[Callable[..., Any], str]] = [
    (lambda x: torch.cumsum(x, -1) * 2.0, "formula"),
    (lambda x: x.transpose(1, 2).repeat(1, 2, 1).mean(1, keepdim=True) + 1.0, "not the last"),
    (lambda x: torch.cat([x[:1]] * 17) * 2.0, "17 pieces"),
    (lambda x: F.pad(x, (1, 1), mode="reflect") * 2.0, "formula"),
    (lambda x: x.view(2, 5, 16, 3).transpose(2, 3).reshape(2, 5, 48).cumprod(-1), "formula"),
]


@pytest.mark.parametrize("function, reason", REASONS)
def test_what_has_no_formula_says_why(function: Callable[..., Any], reason: str) -> None:
    view = GraphView(captured(function, [torch.randn(2, 5, 48, requires_grad=True)]))
    result = next(n for n in view.nodes if n.op == "output").args[0][0]
    region = {n for n in view.nodes if n.op not in ("placeholder", "output")}
    with pytest.raises(CannotLift, match=reason):
        lift(view, region, [result])


def test_what_has_no_formula_becomes_an_operand() -> None:
    def function(x: Tensor) -> Tensor:
        return F.silu(torch.cumsum(x, -1)) * x

    (region,) = found_in(function, [torch.randn(2, 5, 48)]).regions
    assert {n.op for n in region.operands} == {"placeholder", "call_function"}


def test_every_node_rounds_to_its_own_dtype() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.tanh(x * 2.0).float() + 1.0

    program = case(function, [torch.randn(2, 5, 48).bfloat16()]).plan.forward.program
    assert [s.dtype for s in program.stages] == ["bf16", "bf16", None]
    assert [o.dtype for o in program.outputs[:1]] == ["fp32"]


# index arithmetic

SIZES = {"a": 6, "i": 8, "b": 4}


def test_division_of_forms() -> None:
    a, i = Form.axis("a"), Form.axis("i")
    assert divmod_form(a * 8 + i, 8, SIZES) == (a, i)
    assert divmod_form(a * 8 + i + 16, 8, SIZES) == (a + 2, i)
    with pytest.raises(Split) as split:
        divmod_form(i, 4, SIZES)
    assert (split.value.axis, split.value.inner) == ("i", 4)
    with pytest.raises(NotAffine):
        divmod_form(a * 5, 8, SIZES)


def test_reshape_of_indices() -> None:
    a, i = Form.axis("a"), Form.axis("i")
    assert reshape((a * 8 + i,), (48,), (6, 8), SIZES) == (a, i)
    assert reshape((a, i), (6, 8), (48,), SIZES) == (a * 8 + i,)
    assert reshape((a, Form(), i), (6, 1, 8), (6, 8), SIZES) == (a, i)


def test_pieces_of_a_concatenation() -> None:
    i = Form.axis("i")
    assert part(i + 8, [8, 8], SIZES, "i") == (1, i)
    with pytest.raises(Split) as split:
        part(i, [2, 6], SIZES, "i")
    assert split.value.inner == 2 and split.value.blocked
    with pytest.raises(Split) as split:
        part(Form.axis("a"), [2, 4], SIZES, "i")
    assert (split.value.axis, split.value.inner) == ("a", 2) and split.value.blocked
    with pytest.raises(NotAffine):
        part(Form.axis("a") + Form.axis("b"), [2, 4], SIZES, "i")
