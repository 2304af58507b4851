"""Adapted linears that read one value, in a graph: which blocks are formed, that they hold, and that a bad one falls apart quietly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models as tm
import torch
from processor import NATIVE_BF16
from slothc.kernels import siblings_block

import slothc.backend
from slothc import rewrite as rewriting
from slothc.blocks import Block
from slothc.errors import RegionDropped
from slothc.rewrite import Rewritten


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rewritten]]:
    graphs: list[Rewritten] = []
    rewrite = rewriting.rewrite

    def record(*a: Any, **k: Any) -> Rewritten:
        graphs.append(rewrite(*a, **k))
        return graphs[-1]

    monkeypatch.setattr(slothc.backend, "rewrite", record)
    yield graphs


def shapes(blocks: list[Block]) -> list[tuple[str, int]]:
    return [(b.rule, len(b.readers)) for b in blocks]


def held(name: str, dtype: torch.dtype, lora: bool, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The blocks of a model whose steps hold the contract."""
    model = tm.model(name, dtype, lora=lora)
    with recorded(monkeypatch) as graphs:
        fast = torch.compile(model, backend="sloth")
        draws = [tm.batch(seed=s) for s in range(5)]
        ours, eager, true = ([run(x) for x in draws] for run in (
            lambda x: tm.step(model, fast, **x), lambda x: tm.step(model, **x), lambda x: tm.truth(model, **x)
        ))  # fmt: skip
    mean = lambda found: (sum(tm.distance(f, t) ** 2 for f, t in zip(found, true)) / len(true)) ** 0.5  # noqa: E731
    assert mean(ours) <= 1.10 * mean(eager) + tm.TINY[dtype]
    return shapes(graphs[0].blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_blocks_of_a_model_hold_the_contract(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = held(name, dtype, True, monkeypatch)
    if dtype is torch.bfloat16 and not NATIVE_BF16:
        assert found == []
        return
    # the first layer's q, k, v: nothing before them wants a gradient
    assert found.count(("lora_linear", 3)) == 1 and found.count(("rms_norm+lora_linear", 3)) == 1
    assert found.count(("rms_norm+lora_linear", 2)) == 2 and found.count(("gated_mlp+lora_linear", 1)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_what_trained_linears_read_is_not_kept(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full fine-tuning: norms and gated products are made again for the gradients of the weights."""
    found = held(name, dtype, False, monkeypatch)
    if dtype is torch.bfloat16 and not NATIVE_BF16:
        assert found == []
        return
    assert found.count(("rms_norm+linear", 3)) == 2 and found.count(("rms_norm+linear", 2)) == 2
    assert found.count(("gated_mlp+linear", 1)) == 2


def test_members_are_counted_and_covered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as graphs:
        tm.step(model := tm.model("llama", lora=True), torch.compile(model, backend="sloth"), **tm.batch())
    used = graphs[0].used
    assert len(used) == len({id(i) for i in used}) == len(graphs[0].found.regions) + len(graphs[0].found.matches)


def test_what_others_read_is_kept() -> None:
    """Where x has another reader it exists anyway: only the products are shared."""
    from slothc.capture import captured
    from slothc.found import find
    from slothc.options import Options
    from slothc.view import GraphView

    def function(x: torch.Tensor, u: torch.Tensor, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.nn.functional.silu(x) * u
        w, v, a, b, c, d = flat
        linear = torch.nn.functional.linear
        return linear(y, w) + linear(linear(y, a), b) * 0.5, linear(y, v) + linear(linear(y, c), d) * 0.5, torch.sort(y)[0]

    widths = ((2, 5, 32), (2, 5, 32), (24, 32), (16, 32), (4, 32), (24, 4), (4, 32), (16, 4))
    arguments = [torch.randn(s).requires_grad_(k not in (2, 3)) for k, s in enumerate(widths)]
    view = GraphView(captured(function, arguments))
    found = find(view, Options())
    from slothc.blocks import blocks

    assert shapes(blocks(view, [*found.regions, *found.matches])) == [("lora_linear", 2)]


class Filled(torch.nn.Module):
    """A linear of a gated product whose factor was written step by step: of ``h`` the region takes the shape alone (RecurrentGemma)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.layer_norm(torch.sin(x) @ torch.ones(16, 16), (16,))
        g, y = torch.zeros_like(h), torch.tanh(x @ torch.ones(16, 16))
        g[:, 0] = y[:, 0] * 2
        g[:, 1] = y[:, 1] + 1
        return self.linear(torch.nn.functional.gelu(x @ torch.ones(16, 16)) * g) + h


def test_a_block_whose_region_takes_only_the_shape_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Filled(), torch.randn(2, 2, 16).requires_grad_()
    with recorded(monkeypatch) as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        ours, eager = (torch.autograd.grad(f(x).sum(), [x, *model.parameters()]) for f in (torch.compile(model, backend="sloth"), model))
    assert graphs[0].blocks
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b)


def test_a_block_that_fails_its_check_falls_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its members are used one by one, with a warning that names them."""
    true = siblings_block.forward
    monkeypatch.setattr(siblings_block, "forward", lambda s, t: true(s, t)._replace(ys=[y * 1.01 for y in true(s, t).ys]))
    monkeypatch.setattr(rewriting, "_verdicts", {})
    monkeypatch.setattr(rewriting, "_warned", set())
    model = tm.model("llama", lora=True)
    with recorded(monkeypatch) as graphs, pytest.warns(RegionDropped, match=r"rms_norm\+lora_linear at .*float64 truth"):
        step = tm.step(model, torch.compile(model, backend="sloth"), **tm.batch())
    assert not graphs[0].blocks and len(graphs[0].used) == len(graphs[0].found.regions) + len(graphs[0].found.matches)
    assert tm.distance(step, tm.truth(model, **tm.batch())) < 1e-6
