"""PEFT's ``target_modules="all-linear"`` on every causal LM of the installed transformers that it can be put on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import slothc.backend
from slothc import rewrite as rewriting
from slothc.rewrite import Rewritten
from slothc.survey_child import build, inputs, measure, step
from slothc.tiny import config_names

NEAR = 1e-4                     # relative distance of all gradients to eager's in fp32; beyond it float64 truth decides
HOLD = 150
# What does not run with adapters on all linears without sloth either: PEFT refuses the projections of Mamba blocks and replaces routers
# that return a tuple, transformers does not build some types from their own configs, or the step itself fails.
WITHOUT = {
    "deepseek_v4", "falcon_h1", "falcon_mamba", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "llama4", "llama4_text", "mamba",
    "mamba2", "nemotron_h", "phimoe", "qwen4_exp", "qwen4_exp_text", "reformer", "xmod", "zamba", "zamba2",
}  # fmt: skip
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rewritten]]:
    found: list[Rewritten] = []

    def record(*args: object, **kwargs: object) -> Rewritten:
        found.append(rewriting.rewrite(*args, **kwargs))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(slothc.backend, "rewrite", record)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("name", config_names())
def test_all_linear(name: str, graphs: list[Rewritten]) -> None:
    try:
        model = build(name, "lora", torch.float32)
        given = inputs(model, 0)
        eager = step(model, model, given, 0)
    except Exception as error:
        if name not in WITHOUT:
            raise
        pytest.skip(f"without sloth: {type(error).__name__}: {error}"[:200])
    ours = step(model, torch.compile(model, backend="sloth"), given, 0)

    assert ours.keys() == eager.keys()
    off = sum(float((ours[n] - eager[n]).double().square().sum()) for n in eager) ** 0.5
    if not off <= NEAR * sum(float(g.double().square().sum()) for g in eager.values()) ** 0.5:
        row = measure(name, "lora", "fp32")
        assert row["status"] == "ok", row["reason"]
    assert sum(item.rule == "lora_linear" for g in graphs for r in g.all() for item in r.used) > 0


def test_enough_of_them() -> None:
    assert len(set(config_names()) - WITHOUT) >= HOLD
