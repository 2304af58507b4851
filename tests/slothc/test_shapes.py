"""Acceptance 7: new sizes compile nothing that Dynamo itself would not, and derive and check nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_models as tm
import torch
from torch import fx

from slothc.backend import sloth
from slothc.statistics import counts

SHAPES = [(2, 16), (2, 24), (4, 16), (3, 40), (2, 64), (5, 9), (4, 33), (3, 16)]
WITH_ONE = [(2, 16), (2, 24), (4, 16), (1, 40), (2, 64), (5, 9), (1, 33), (3, 16)]


class Counting:
    """A backend that counts what it is asked to compile."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend, self.compilations = backend, 0

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return self.backend(module, inputs)


def nothing(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What backend="eager" does."""
    return module.forward


def run(backend: Callable[..., Any], shapes: list[tuple[int, int]], lora: bool) -> tuple[int, list[tuple[int, int]]]:
    """Compilations over all shapes, and (derived, checked) after each; every step of ours is compared with eager."""
    torch._dynamo.reset()
    owner, counting = tm.model("llama", lora=lora, shallow=True), Counting(backend)
    compiled, after = torch.compile(owner, backend=counting), []
    for k, (size, length) in enumerate(shapes):
        inputs = tm.batch(size, length, seed=k)
        if backend is nothing:
            compiled(**inputs)
            continue
        found = tm.step(owner, compiled, **inputs)
        after.append((counts["derived"], counts["checked"]))
        assert tm.distance(found, tm.step(owner, **inputs)) < 1e-5
    return counting.compilations, after


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shapes, expected", [(SHAPES, 3), (WITH_ONE, 4)], ids=["batches", "one"])
def test_7_eight_shapes_compile_no_more_than_a_backend_that_does_nothing(shapes: list[tuple[int, int]], expected: int, lora: bool) -> None:
    reference, _ = run(nothing, shapes, lora)
    found, after = run(sloth, shapes, lora)
    assert found <= reference <= expected
    assert len(set(after[2:])) == 1 if expected == 3 else len(set(after[4:])) == 1, after


def test_7_no_plan_is_derived_or_checked_again_for_a_new_size() -> None:
    torch._dynamo.reset()
    owner = tm.model("qwen3")
    compiled = torch.compile(owner, backend="sloth", dynamic=False)
    tm.step(owner, compiled, **tm.batch(2, 16))
    first = counts["derived"], counts["checked"]
    for k, (size, length) in enumerate([(3, 24), (5, 32)]):
        inputs = tm.batch(size, length, seed=k)
        assert tm.distance(tm.step(owner, compiled, **inputs), tm.step(owner, **inputs)) < 1e-5
    assert (counts["derived"], counts["checked"]) == first


def test_a_dynamic_graph_from_the_start() -> None:
    owner = tm.model("llama", lora=True)
    compiled = torch.compile(owner, backend="sloth", dynamic=True)
    with tm.watched() as graphs:
        for size, length in [(2, 16), (3, 40), (2, 7)]:
            inputs = tm.batch(size, length)
            assert tm.distance(tm.step(owner, compiled, **inputs), tm.step(owner, **inputs)) < 1e-5
    assert tm.counted(graphs[:1])["rms_norm"] == 5      # with its epsilon a number known at run time
    assert len(graphs) == 1
