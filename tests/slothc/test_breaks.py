"""Where Dynamo stops: the cause, the line, the remedy; what is around it is rewritten all the same."""

from __future__ import annotations

import json
import logging
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from torch import Tensor, nn

import slothc
from slothc.breaks import Break, count, explained
from slothc.explain import ISOLATED

logger = logging.getLogger("tests.breaks")


class Model(nn.Module):
    """Two norms with something in between that Dynamo does not capture."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.RMSNorm(16), nn.RMSNorm(16), between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * 2
        return self.second(self.between(self, y) + x)


def item(_: Model, y: Tensor) -> Tensor:
    return y * float(y.detach().abs().max().item())


def nonzero(_: Model, y: Tensor) -> Tensor:
    return y * y.detach().abs().sum(-1).nonzero().shape[0]


def mask(_: Model, y: Tensor) -> Tensor:
    return y * y[y.detach() > 0].sum()


def branch(_: Model, y: Tensor) -> Tensor:
    if y.detach().sum() > 100:
        y = y * 3
    return y


def log(_: Model, y: Tensor) -> Tensor:
    logger.info("half way")
    return y


def warn(_: Model, y: Tensor) -> Tensor:
    warnings.warn("half way")  # noqa: B028
    return y


def seed(_: Model, y: Tensor) -> Tensor:
    torch.manual_seed(1)
    return y * 2


def show(_: Model, y: Tensor) -> Tensor:
    print("half way")
    return y


def explicit(_: Model, y: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return y


CASES = [
    (item, "number read from a tensor", "capture_scalar_outputs", ".item()"),
    (nonzero, "nonzero", "torch.where", ".nonzero()"),
    (mask, "boolean mask", "torch.where", "y[y.detach() > 0]"),
    (branch, "branch that depends on a tensor's values", "torch.cond", "if y.detach().sum() > 100"),
    (show, "print", "outside forward", "print("),
    (log, "logger line", "ignore_logging_functions", "logger.info"),
    (warn, "warning", "outside forward", "warnings.warn"),
    (seed, "seed", "Generator", "torch.manual_seed(1)"),
    (explicit, "graph_break()", "remove it", "torch._dynamo.graph_break()"),
]


@pytest.mark.parametrize(("between", "cause", "remedy", "line"), CASES, ids=[c[0].__name__ for c in CASES])
def test_the_cause_is_named_and_both_sides_are_rewritten(between: Any, cause: str, remedy: str, line: str) -> None:
    torch.manual_seed(0)
    model, x = Model(between), torch.randn(3, 16)
    report = slothc.explain(model, x)
    assert report.graphs >= 2 and report.counts["rms_norm"] == 2
    (found, times), *others = report.breaks.items()
    assert not others and times == 1
    assert cause in found.cause and remedy in found.remedy and line in found.line
    assert "test_breaks.py:" in found.location and f"in {between.__name__}" in found.location
    assert f"break  {found.cause} at {found.location}; remedy: {found.remedy}" in str(report)

    eager = [v.detach().clone() for v in _step(model, model, x)]
    with tm.watched() as graphs:
        ours = _step(model, torch.compile(model, backend="sloth"), x)
    assert tm.counted(graphs)["rms_norm"] == 2
    assert len(eager) == len(ours) == 3
    for a, b in zip(eager, ours):
        assert (a - b).norm() <= 1e-5 * a.norm()


def _step(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


def test_the_remedy_for_the_loss_type_works() -> None:
    model = tm.model("gpt2")
    before = slothc.explain(model, **tm.batch())
    ((found, times),) = before.breaks.items()
    assert (before.graphs, times) == (2, 1) and "loss_type" in found.cause and "cross_entropy" not in before.counts
    assert found.location.startswith("transformers/modeling_utils.py") and "logger.warning_once" in found.line
    torch._dynamo.reset()
    assert 'model.loss_type = "ForCausalLM"' in found.remedy
    model.loss_type = "ForCausalLM"
    after = slothc.explain(model, **tm.batch())
    assert (after.graphs, after.breaks, after.counts["cross_entropy"]) == (1, {}, 1)


def test_json_html_and_print_say_the_same(tmp_path: Path) -> None:
    report = slothc.explain(Model(item), torch.randn(3, 16))
    ((found, _),) = report.breaks.items()
    report.to_json(tmp_path / "r.json")
    report.to_html(tmp_path / "r.html")
    (read,) = json.loads((tmp_path / "r.json").read_text())["breaks"]
    assert read == {"cause": found.cause, "remedy": found.remedy, "location": found.location, "line": found.line, "count": 1}
    page = (tmp_path / "r.html").read_text()
    assert "number read from a tensor" in page and "capture_scalar_outputs" in page and "1 break<" in page


def _frame(name: str = "forward") -> traceback.FrameSummary:
    return traceback.FrameSummary("/site-packages/pack/model.py", 7, name, line="x = f(x)")


def test_an_unknown_break_comes_with_dynamos_own_hint() -> None:
    found = explained("Something new\n  Explanation: no.\n  Hint: Do this.\n  Hint: Or that.\n", [_frame()])
    assert found == Break("Something new", "Do this", "pack/model.py:7 in forward", "x = f(x)")
    found = explained("Something new\n  Hint: This is likely to be a Dynamo bug.\n", [_frame()])
    assert found.remedy.startswith("TORCH_LOGS=graph_breaks")
    assert explained("", []).cause == "unknown" and explained("", []).location == ""
    assert explained("Something new", [_frame("torch_dynamo_resume_in_forward_at_5")]).location.endswith("in forward")


def test_a_break_counts_once_for_each_time_its_own_function_stops() -> None:
    class Reason:
        def __init__(self, reason: str, depth: int) -> None:
            self.reason, self.user_stack = reason, [_frame("caller")] * (depth - 1) + [_frame()]

    stops = [Reason("A", 3), Reason("A", 2), Reason("step_unsupported", 1), Reason("A", 1), Reason("A", 1), Reason("B", 2)]
    assert {b.cause: n for b, n in count(stops).items()} == {"A": 2, "B": 1}


class Experts(nn.Module):
    """Which experts run, and over how many tokens, is read from values: all of them, with a norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(16) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] * 10).long() % 3
        sizes = torch.bincount(chosen, minlength=3).tolist()
        parts = x[chosen.argsort()].split(sizes, dim=0)
        return torch.cat([norm(part) * 2 for norm, part in zip(self.norms, parts)])


def test_what_a_break_lets_through_depends_on_values() -> None:
    """Placeholders have none: sizes that are read from them do not add up."""
    x = torch.arange(48).view(3, 16) / 160
    model = Experts()
    report = slothc.explain(model, x)
    assert report.graphs == 2 and report.counts["rms_norm"] == 3
    assert {b.line for b in report.breaks} == {"sizes = torch.bincount(chosen, minlength=3).tolist()"}
    eager, ours = _step(model, model, x)[0].detach(), _step(model, torch.compile(model, backend="sloth"), x)[0]
    assert (eager - ours).norm() <= 1e-5 * eager.norm()


class Layers(nn.Module):
    """Layers of one code, each broken in the middle: Dynamo compiles the second half once and runs it in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Model(explicit) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_graph_counts_as_often_as_it_runs() -> None:
    report = slothc.explain(Layers(), torch.randn(3, 16))
    assert report.counts["rms_norm"] == 8 and report.graphs < 8
    assert sum(r.count for r in report.regions if r.name == "rms_norm") == 8


@pytest.mark.skipif(not ISOLATED, reason="before torch 2.13 every compilation counts towards the limit of its code")
def test_explain_leaves_later_compilations_of_a_breaking_model_alone() -> None:
    torch._dynamo.reset()
    model, x = Layers(), torch.randn(3, 16)
    for _ in range(3):
        slothc.explain(model, x)
    eager = [v.detach().clone() for v in _step(model, model, x)]
    with tm.watched() as graphs:
        ours = _step(model, torch.compile(model, backend="sloth"), x)
    assert tm.counted(graphs)["rms_norm"] >= 2
    assert all((a - b).norm() <= 1e-5 * a.norm() for a, b in zip(eager, ours))
