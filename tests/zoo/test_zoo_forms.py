"""The forms of PEFT and the surroundings over every causal LM of the installed transformers: one of each for an architecture.

By its place in the list an architecture gets a form, a surrounding and a dtype for each, so that every form and every surrounding meets
many architectures in both dtypes. What does not run there with a backend that does nothing either is left for the next in the list.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import surroundings
import tiny_models as tm
import torch
import whole
from peft_forms import FORMS
from torch import nn

from slothc.survey_child import build, inputs
from slothc.tiny import EXPERTS, config_names, tiny_config

TRIES = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
pytestmark = pytest.mark.timeout(400)


def design(names: list[str], first: int) -> list[tuple[str, str, str]]:
    """(architecture, what it gets, dtype); ``first`` is 1 where the dtypes begin with the second."""
    models = config_names()
    return [(m, names[k // 2 % len(names)], list(DTYPES)[(k + first) % 2]) for k, m in enumerate(models)]


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The models that ``surroundings`` asks for are the zoo's, every token meeting every expert, and so are their batches."""
    latest: list[nn.Module] = []

    def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> nn.Module:
        if isinstance(getattr(tiny_config(name), "num_experts_per_tok", None), int):
            settings["num_experts_per_tok"] = EXPERTS
        made = build(name, None, dtype, **settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in made.parameters() if seed else ():
                p.add_(torch.randn_like(p) * 0.02)
        latest[:] = [made]
        return made

    def batch(size: int = 2, length: int = 16, seed: int = 0) -> dict[str, Any]:
        return inputs(latest[0], seed, size, length)

    monkeypatch.setattr(whole, "model", model)
    monkeypatch.setattr(tm, "model", model)
    monkeypatch.setattr(tm, "batch", batch)
    yield


def attempt(run: Callable[[], None], backend: str, monkeypatch: pytest.MonkeyPatch) -> Exception | None:
    monkeypatch.setattr(surroundings, "BACKEND", backend)
    torch._dynamo.reset()
    try:
        run()
    except Exception as error:
        return error
    return None


def first_that_runs(names: list[str], wanted: str, run: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """``wanted``, or the next that runs without sloth."""
    at, reasons = names.index(wanted), []
    for name in (names[(at + k) % len(names)] for k in range(TRIES)):
        error = attempt(lambda name=name: run(name), "sloth", monkeypatch)
        if error is None:
            return
        without = attempt(lambda name=name: run(name), "eager", monkeypatch)
        if type(without) is not type(error) or (isinstance(error, AssertionError) and _said(without) != _said(error)):
            raise error                                                     # what Dynamo alone gets wrong it gets wrong by the same words
        reasons.append(f"{name}: {type(error).__name__}: {error}"[:100])
    pytest.skip(f"without sloth: {'; '.join(reasons)}")


def _said(error: BaseException) -> tuple[str, list[int]]:
    """What an assertion says, and the lines that it was reached by in the lists of what is tested."""
    return str(error), [at.lineno or 0 for at in traceback.extract_tb(error.__traceback__) if at.filename == surroundings.__file__]


@pytest.mark.parametrize("name, form, dtype", design(list(FORMS), 0))
def test_form(name: str, form: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(form: str) -> None:
        owner = FORMS[form](whole.model(name, DTYPES[dtype]))
        whole.contract(owner, surroundings.compiled(owner), DTYPES[dtype])

    first_that_runs(list(FORMS), form, run, monkeypatch)


@pytest.mark.parametrize("name, item, dtype", design(list(surroundings.ITEMS), 1))
def test_surrounding(name: str, item: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first_that_runs(list(surroundings.ITEMS), item, lambda item: surroundings.ITEMS[item](name, DTYPES[dtype]), monkeypatch)
