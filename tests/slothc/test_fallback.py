"""Acceptance 6: a plan that is wrong, or whose kernel does not run, leaves its region to eager and says so once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import tiny_models as tm
import torch
from slothc.gradients.plan import Plan
from slothc.gradients.program import Program, Stage
from slothc.kernels import rowwise_op, siblings

from slothc import found as finding
from slothc import planning, rewrite
from slothc.bind import lora_linear as lora_binding
from slothc.errors import RegionDropped


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that is known of other tests' plans is used here, and nothing wrong that is learned here is kept."""
    monkeypatch.setattr(planning, "_derived", {})
    monkeypatch.setattr(finding, "_known", {})
    monkeypatch.setattr(rewrite, "_verdicts", {})
    monkeypatch.setattr(rewrite, "_warned", set())
    yield


def dropped(name: str, lora: bool = False, options: dict[str, Any] | None = None) -> tuple[list[str], dict[str, int]]:
    """Messages of one compiled step whose result must be eager's, and the counts of what was used."""
    owner, inputs = tm.model(name, lora=lora), tm.batch()
    with tm.watched() as graphs, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compiled = torch.compile(owner, backend="sloth", options=options)
        ours = tm.step(owner, compiled, **inputs)
        tm.step(owner, compiled, **inputs)
    eager = tm.step(owner, **inputs)
    assert torch.allclose(ours.loss, eager.loss, rtol=1e-6)
    assert tm.distance(ours, eager) < 2e-6
    return [str(w.message) for w in seen if issubclass(w.category, RegionDropped)], dict(tm.counted(graphs))


def scaled(program: Program, kept: str, factor: float) -> Program:
    """The program with one output's value off by ``factor``."""
    output = next(o for o in program.outputs if o.name == kept)
    stage = program.stage[output.value]
    wrong = Stage(stage.name, sp.sympify(stage.expr) * sp.Float(factor), stage.dtype, stage.detached)
    return replace(program, stages=tuple(wrong if s.name == stage.name else s for s in program.stages))


def corrupt(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    """Every plan with a row reduction gets a result, or a gradient, that is 1% off."""
    real = planning._derive

    def wrong(*args: Any) -> Plan:
        plan = real(*args)
        assert plan.backward is not None
        if not plan.forward.program.reductions:
            return plan
        part = plan.backward if backward else plan.forward
        program = scaled(part.program, part.program.outputs[0].name, 1.01)
        return replace(plan, **{"backward" if backward else "forward": replace(part, program=program)})

    monkeypatch.setattr(planning, "_derive", wrong)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_6_a_wrong_plan_is_dropped_with_one_warning_and_the_result_is_right(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    corrupt(monkeypatch, backward)
    messages, counts = dropped("llama")
    assert messages
    assert len(messages) == len(set(messages))
    what = "gradient of" if backward else "result"
    place = r"transformers/models/llama/modeling_llama.py:\d+ in \w+"
    for message in messages:
        assert re.search(rf"sloth leaves \S*rms_norm\S* at {place} to eager: {what}", message), message
        assert re.search(r"is 1\.\d+e-02 from float64 truth, eager \d\.\d+e-\d+", message), message
    assert "rms_norm" not in counts and counts["rope"] == 4


def test_6_the_same_wrong_plan_warns_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, False)
    first, _ = dropped("llama")
    torch._dynamo.reset()
    again, counts = dropped("llama")
    assert first and again == []
    assert "rms_norm" not in counts


def test_6_verify_off_uses_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, False)
    owner, inputs = tm.model("llama"), tm.batch()
    ours = tm.step(owner, torch.compile(owner, backend="sloth", options={"verify": "off"}), **inputs)
    assert tm.distance(ours, tm.step(owner, **inputs)) > 1e-4  # shows that the corruption is one


@pytest.mark.parametrize("error", [RuntimeError("out of resource: shared memory"), TypeError("no such kernel"), AssertionError("")])
def test_6_a_kernel_that_does_not_launch_is_dropped(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(real: Any) -> Any:
        def call(plan: Plan | None, *more: Any) -> Any:
            if plan is None or not plan.forward.program.reductions:
                return real(plan, *more)

            def launch(*values: Any) -> Any:
                raise error

            return launch

        return call

    for module in (rowwise_op, siblings):                                 # alone, and with the linears that read its result
        monkeypatch.setattr(module, "call", failing(module.call))
    messages, counts = dropped("llama")
    assert messages and len(messages) == len(set(messages))
    place = re.compile(r"rms_norm(\+linear)? at transformers/models/llama")
    assert all(place.search(m) and type(error).__name__ in m and str(error) in m for m in messages)
    assert "rms_norm" not in counts and counts["gated_mlp"] == 2


def test_6_a_structural_rule_that_fails_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot compile")

    monkeypatch.setattr(rewrite, "blocks", lambda view, items: [])         # linears that stand alone; test_blocks.py has the others
    monkeypatch.setattr(lora_binding, "lora_linear", failing)
    messages, counts = dropped("llama", lora=True)
    assert messages and all("sloth leaves lora_linear at" in m and "RuntimeError: cannot compile" in m for m in messages)
    assert "lora_linear" not in counts and counts["rms_norm"] == 5


def test_6_a_structural_rule_that_is_wrong_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lora_binding.lora_linear

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs) * 1.01

    monkeypatch.setattr(rewrite, "blocks", lambda view, items: [])
    monkeypatch.setattr(lora_binding, "lora_linear", wrong)
    messages, counts = dropped("llama", lora=True)
    assert messages and all(re.search(r"result 0 is 1\.\d+e-02 from float64 truth", m) for m in messages)
    assert "lora_linear" not in counts


def test_6_when_the_search_itself_fails_the_graph_runs_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise KeyError("a defect")

    monkeypatch.setattr(rewrite, "find", failing)
    messages, counts = dropped("llama")
    assert len(messages) == 1 and "a whole graph" in messages[0] and "a defect" in messages[0]
    assert counts == {}


def test_6_when_splicing_fails_the_graph_runs_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rewrite._Splice.region

    def failing(self: Any, region: Any) -> None:
        real(self, region)
        raise ValueError("half way")

    monkeypatch.setattr(rewrite._Splice, "region", failing)
    messages, _ = dropped("llama")
    assert len(messages) == 1 and "half way" in messages[0]


def test_verify_always_checks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = rewrite.check
    monkeypatch.setattr(rewrite, "check", lambda *args: seen.append("") or real(*args))
    dropped("llama")
    first = len(seen)
    torch._dynamo.reset()
    dropped("llama")
    assert first > 0 and len(seen) == first
    torch._dynamo.reset()
    dropped("llama", options={"verify": "always"})
    assert len(seen) >= 2 * first
