"""``options={...}``: each value does what it says, and every one of them gives eager's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch

import slothc
from slothc import catalogue
from slothc.options import Options
from slothc.statistics import counts

ROOT = Path(__file__).parents[2]


def run(options: dict[str, Any] | None, lora: bool = True) -> tuple[dict[str, int], float]:
    """Counts of what was used in one step, and how far its gradients are from eager's."""
    torch._dynamo.reset()
    owner, inputs = tm.model("llama", lora=lora), tm.batch()
    with tm.watched() as graphs:
        ours = tm.step(owner, torch.compile(owner, backend="sloth", options=options), **inputs)
    return dict(tm.counted(graphs)), tm.distance(ours, tm.step(owner, **inputs))


@pytest.fixture(scope="module")
def everything() -> dict[str, int]:
    """What one step uses where nothing is disabled."""
    return run(None)[0]


@pytest.mark.parametrize("name", catalogue.names())
def test_a_disabled_rule_is_not_used(name: str, everything: dict[str, int]) -> None:
    found, distance = run({"disable": [name]})
    assert name not in found
    assert distance < 1e-5
    others = {k: v for k, v in everything.items() if k not in (name, "rowwise")}
    assert {k: v for k, v in found.items() if k in others} == others


def test_disable_takes_one_name_or_several() -> None:
    assert Options.of({"disable": "rope"}).disable == {"rope"}
    assert Options.of({"disable": ("rope", "rms_norm")}).disable == {"rope", "rms_norm"}


def test_everything_disabled_is_eager() -> None:
    found, distance = run({"disable": list(catalogue.names())})
    assert found == {} and distance == 0.0


def test_verify() -> None:
    run(None)
    before = counts["checked"]
    assert run({"verify": "first"})[1] < 1e-5
    assert counts["checked"] == before
    assert run({"verify": "off"})[1] < 1e-5
    assert counts["checked"] == before
    assert run({"verify": "always"})[1] < 1e-5
    assert counts["checked"] > before


def test_options_may_come_as_keywords_of_the_backend() -> None:
    owner, inputs = tm.model("llama"), tm.batch()
    compiled = torch.compile(owner, backend=lambda m, i: slothc.sloth(m, i, disable="rope"))
    with tm.watched() as graphs:
        tm.step(owner, compiled, **inputs)
    assert "rope" not in tm.counted(graphs)


LOOKUP = """
import torch, sys
from importlib.metadata import EntryPoint
from torch._dynamo.backends import registry
if {installed}:
    registry._BACKENDS["sloth"] = EntryPoint("sloth", "slothc.backend:sloth", "torch_dynamo_backends")
    assert "slothc" not in sys.modules
else:
    import slothc
assert "sloth" in torch._dynamo.list_backends()
f = torch.compile(lambda x: x.exp() / (x.exp() + 1), backend="sloth")
x = torch.randn(3, 4)
torch.testing.assert_close(f(x), x.sigmoid())
import slothc
assert torch._dynamo.lookup_backend("sloth") is slothc.sloth
assert "sloth" in torch._dynamo.list_backends()
print("fine")
"""


@pytest.mark.parametrize("installed", [False, True], ids=["imported", "installed"])
def test_the_backend_is_found_by_name(installed: bool) -> None:
    """From an import, and through the entry point of an installed package without one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = LOOKUP.format(installed=installed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr[-2000:]
