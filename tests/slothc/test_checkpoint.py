"""Gradient checkpointing: child graphs of ``tag_activation_checkpoint`` are rewritten too, and dropout masks are the forward's."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
from slothc.kernels.sdpa import scaled_dot_product_attention
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from slothc.checkpointing import draws
from slothc.errors import RegionDropped


def checkpointed(name: str, lora: bool = False, dropout: float = 0.0, hooked: bool = False, **config: Any) -> nn.Module:
    """``hooked``: as transformers has it, with a hook that makes the embedding's result want a gradient. Over frozen weights Dynamo cuts
    the model into many small graphs around it; without it, it is one graph, as without adapters.
    """
    base = tm.model(name, **config)
    owner = tm.adapted(base, dropout=dropout) if lora else base
    base.gradient_checkpointing_enable({"use_reentrant": False})
    if lora and not hooked:
        base.disable_input_require_grads()
    return owner


def named(found: Counter[str]) -> Counter[str]:
    """Without unnamed regions: a sum at the end of a child graph is one by itself, its norm being in the next child."""
    return Counter({k: v for k, v in found.items() if k != "rowwise"})


CASES = [(n, lora, False) for n in ("llama", "qwen3", "gemma3_text") for lora in (False, True)] + [("qwen3", True, True)]


@pytest.mark.parametrize("name, lora, hooked", CASES, ids=str)
def test_counts_inside_children_and_gradients(name: str, lora: bool, hooked: bool) -> None:
    owner, inputs = checkpointed(name, lora, hooked=hooked, shallow=hooked), tm.batch()
    plain = tm.model(name, lora=lora, shallow=hooked)
    with tm.watched() as expected:
        tm.step(plain, torch.compile(plain, backend="sloth"), **inputs)
    torch._dynamo.reset()
    with tm.watched() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        ours = tm.step(owner, torch.compile(owner, backend="sloth"), **inputs)
    assert named(tm.counted(graphs)) == named(tm.counted(expected))
    assert any(r.children for r in graphs)
    assert tm.distance(ours, tm.step(owner, **inputs)) < 1e-5


@pytest.mark.parametrize("attention, adapters, hooked", [(0.0, 0.3, False), (0.2, 0.0, False), (0.2, 0.3, False), (0.2, 0.3, True)])
def test_recomputed_masks_are_the_forwards(attention: float, adapters: float, hooked: bool) -> None:
    """A gradient is the derivative of the very loss that came back: checked by a difference along a direction."""
    owner = checkpointed("llama", lora=True, dropout=adapters, hooked=hooked, attention_dropout=attention, shallow=hooked).double()
    inputs = tm.batch()
    compiled = torch.compile(owner, backend="sloth")

    def loss() -> Tensor:
        torch.manual_seed(11)
        return compiled(**inputs).loss

    trained = [p for p in owner.parameters() if p.requires_grad]
    first = loss()
    gradients = torch.autograd.grad(first, trained)
    assert float(loss()) == float(first)
    torch.manual_seed(1)
    directions = [torch.randn_like(p) for p in trained]
    h = 1e-3
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(trained, directions):
                p.add_(sign * h * d)
        ends.append(float(loss()))
        with torch.no_grad():
            for p, d in zip(trained, directions):
                p.sub_(sign * h * d)
    slope = float(sum((g * d).sum() for g, d in zip(gradients, directions)))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=2e-3)  # the loss is rounded to fp32: 5e-7 / h


@pytest.mark.parametrize("attention, adapters, hooked", [(0.0, 0.3, False), (0.2, 0.3, True)])
def test_dropout_draws_as_a_backend_that_does_nothing(attention: float, adapters: float, hooked: bool) -> None:
    inputs, found = tm.batch(), []
    for backend in ("sloth", "eager"):
        torch._dynamo.reset()
        owner = checkpointed("llama", lora=True, dropout=adapters, hooked=hooked, attention_dropout=attention, shallow=True)
        compiled = torch.compile(owner, backend=backend)
        tm.step(owner, compiled, **inputs)
        torch.manual_seed(7)
        found.append(tm.step(owner, compiled, **inputs))
    assert torch.allclose(found[0].loss, found[1].loss, rtol=1e-5)


def test_a_plain_checkpoint_with_dropout_between_norms() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.linear, self.out = nn.RMSNorm(32), nn.Linear(32, 32), nn.RMSNorm(32)

        def body(self, x: Tensor) -> Tensor:
            return self.out(x + torch.nn.functional.dropout(self.linear(self.norm(x)), 0.5, self.training))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    layer = Layer()
    x = torch.randn(4, 32)
    compiled = torch.compile(layer, backend="sloth")
    with tm.watched() as graphs:
        compiled(x)
    assert tm.counted(graphs)["rms_norm"] == 2

    def step(f: Any) -> list[Tensor]:
        torch.manual_seed(3)
        y = x.clone().requires_grad_()
        z = f(y)
        return [z.detach(), *torch.autograd.grad(z.square().sum() + z.sum(), [y, *layer.parameters()])]

    ours = step(compiled)
    kept = step(lambda v: compiled.body(v))  # the same draws without a checkpoint
    for a, b in zip(ours, kept):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_attention_that_is_left_draws_as_it_did(probability: float) -> None:
    """It runs apart from the library's plans, and its dropout is still known to whoever runs it again."""
    def layer(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, dropout_p=probability)

    graph = fx.symbolic_trace(layer)
    assert draws(graph) == (probability > 0)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.target = scaled_dot_product_attention
    assert draws(graph) == (probability > 0)
