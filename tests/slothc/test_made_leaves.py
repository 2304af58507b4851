"""A value that becomes a leaf inside the model: one graph for sloth, with eager's gradients; other backends are as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_models as tm
import torch
from torch import Tensor, fx, nn
from torch._dynamo.output_graph import OutputGraph

from slothc import explain
from slothc.made_leaves import CHECK
from slothc.recordable import obstacle
from slothc.taught import marked

pytestmark = pytest.mark.skipif(not hasattr(OutputGraph, CHECK), reason="this torch breaks the graph at requires_grad_()")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.linear = nn.Embedding(8, 16).requires_grad_(False), nn.RMSNorm(16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, hand_over: bool = False) -> Any:
        h = self.embedding(ids)
        h.requires_grad_(True)
        y = self.linear(self.norm(h * 2.0))
        return (y, h) if hand_over else y


def graphs_of() -> tuple[list[fx.GraphModule], Callable[..., Any]]:
    made: list[fx.GraphModule] = []

    def record(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        made.append(module)
        return module.forward

    torch._dynamo.reset()
    return made, record


def test_one_graph_and_eagers_gradients() -> None:
    model, ids = Model(), torch.arange(8).view(2, 4)
    with tm.watched() as graphs:
        y, h = torch.compile(model, backend="sloth")(ids, hand_over=True)
    y.square().sum().backward()
    ours = [h.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    z, g = model(ids, hand_over=True)
    z.square().sum().backward()
    true = [g.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert len(graphs) == 1 and tm.counted(graphs)["rms_norm"] == 1 and h.is_leaf
    for a, b in zip(ours, true):
        torch.testing.assert_close(a, b)


def test_other_backends_break_as_before() -> None:
    made, record = graphs_of()
    torch.compile(Model(), backend=record)(torch.arange(8).view(2, 4))
    assert len(made) > 1


def test_not_with_inductor_behind() -> None:
    wrapper = torch._TorchCompileWrapper
    assert marked(wrapper("sloth", None, None, None)) and marked(wrapper("sloth", None, {"verify": "off"}, None))
    assert not marked(wrapper("sloth", None, {"rest": "inductor"}, None)) and not marked(wrapper("eager", None, None, None))
    assert not marked(None)


def test_a_recording_does_not_return_one() -> None:
    made, record = graphs_of()
    record.runs_as_it_stands = True                                       # type: ignore[attr-defined]
    for hand_over in (True, False):
        torch.compile(Model(), backend=record)(torch.arange(8).view(2, 4), hand_over=hand_over)
    first, second = (obstacle(m, torch.device("cpu")) for m in made)
    assert first is not None and "leaf" in first and second is None


def test_explain_sees_one_graph() -> None:
    owner = tm.model("llama", lora=True)
    owner.gradient_checkpointing_enable({"use_reentrant": False})
    owner.enable_input_require_grads()
    found = explain(owner, **tm.batch())
    assert found.graphs == 1 and not found.breaks and found.counts["rms_norm"] == 5
