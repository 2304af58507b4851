"""Adapters in fp32 under autocast: what it narrows is written out, and their linears are blocks as they are without it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tm
import torch
from processor import NATIVE_BF16
from torch import nn

from slothc import explain
from slothc.narrowed import NARROWED

BF16 = torch.bfloat16


def cast(model: nn.Module, run: Any = None, **inputs: Any) -> tm.Step:
    with torch.autocast("cpu", BF16):
        return tm.step(model, run, **inputs)


def adapted(dtype: torch.dtype = BF16, dropout: float = 0.0, name: str = "llama") -> nn.Module:
    return tm.adapted(tm.model(name, dtype), fp32=True, dropout=dropout).train()


def test_the_contract_and_blocks() -> None:
    model = adapted()
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")
        draws = [tm.batch(seed=s) for s in range(5)]
        ours, eager, true = ([run(x) for x in draws] for run in (
            lambda x: cast(model, fast, **x), lambda x: cast(model, **x), lambda x: tm.truth(model, **x)
        ))  # fmt: skip
    mean = lambda found: (sum(tm.distance(f, t) ** 2 for f, t in zip(found, true)) / len(true)) ** 0.5  # noqa: E731
    assert mean(ours) <= 1.10 * mean(eager) + tm.TINY[BF16]
    assert {g.dtype for g in ours[0].gradients.values()} == {torch.float32}
    assert tm.counted(graphs) == {"lora_linear": 14, "rms_norm": 5, "rope": 4, "gated_mlp": 2, "attention": 2, "cross_entropy": 1}
    assert not graphs[0].dropped
    if NATIVE_BF16:
        readers = sorted(len(b.readers) for b in graphs[0].blocks if b.region)
        assert readers == [1, 1, 2, 2, 3] and len(graphs[0].blocks) == 8


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_dropout_of_the_adapter(name: str) -> None:
    """Also of what a cast has made (gemma2's norms end in one): the value that base and adapter read, not what was cast."""
    model = adapted(name=name, dropout=0.2)
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")

        def seeded(run: Any = None) -> tm.Step:
            torch.manual_seed(5)
            return cast(model, run, **tm.batch())

        assert tm.distance(seeded(fast), seeded()) < 2e-2
    matches = [m for m in graphs[0].found.matches if m.rule == "lora_linear"]
    assert len(matches) == 14 and not graphs[0].dropped
    assert {graphs[0].found.view.dtype(m.inputs["x"]) for m in matches} == {BF16}


@pytest.mark.parametrize("autocast", [False, True])
def test_only_what_autocast_narrows(autocast: bool) -> None:
    """Without autocast an adapter in fp32 is computed in fp32."""
    model = adapted()
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth", options={"disable": ["lora_linear"]})
        with torch.autocast("cpu", BF16, enabled=autocast):
            ours, eager = tm.step(model, fast, **tm.batch()), tm.step(model, **tm.batch())
    casts = [n for n in graphs[0].found.view.graph_module.graph.nodes if NARROWED in n.meta]
    assert len(casts) == (28 if autocast else 0)
    assert tm.distance(ours, eager) < 1e-2


def test_casts_of_autocasts_own_are_not_counted() -> None:
    model = adapted()
    with torch.autocast("cpu", BF16):
        report = str(explain(model, **tm.batch()))
    assert "lora_linear       14" in report and "not covered" not in report


def test_a_base_in_fp32() -> None:
    """All weights in fp32: the base is narrowed by autocast, not here."""
    model = adapted(torch.float32)
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")
        ours, eager, true = cast(model, fast, **tm.batch()), cast(model, **tm.batch()), tm.truth(model, **tm.batch())
    assert tm.distance(ours, true) <= 1.10 * tm.distance(eager, true) + tm.TINY[BF16]
    assert tm.counted(graphs)["lora_linear"] == 14 and not graphs[0].dropped
