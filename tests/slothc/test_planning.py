"""Plans: no sizes inside, one gradient formula one tensor, what is saved, what the gradient must not cross."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import Errors, case, compare, hold, run
from forms import FORMS, form, norm_rope, rms_norm
from torch import Tensor, fx

from slothc.capture import found_in
from slothc.found import Found, find
from slothc.options import Options
from slothc.statistics import counts
from slothc.view import GraphView


def dynamic(function: Callable[..., Any], arguments: Sequence[Any], fixed: Sequence[int] = ()) -> Found:
    """What is found in the graph that Dynamo makes when all sizes but the last may vary."""
    graphs: list[fx.GraphModule] = []

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    for k, a in enumerate(arguments):
        if a.is_floating_point() and k not in fixed:
            a.requires_grad_()
        for d in range(a.dim() - 1):
            torch._dynamo.mark_dynamic(a, d)
    torch._dynamo.reset()
    torch.compile(function, backend=record, fullgraph=True)(*arguments)
    torch._dynamo.reset()
    return find(GraphView(graphs[0]), Options())


@pytest.mark.parametrize("f", [form(n) for n in ("rms_norm", "add_norm", "layer_norm", "in_no_file", "softmax", "rope", "gated", "total")],
                         ids=lambda f: f.name)  # fmt: skip
def test_sizes_known_only_at_run_time_give_the_same_plan(f: Any) -> None:
    found = dynamic(f.function, f.draw(torch.float32), f.fixed)
    assert [r.plan.key for r in found.regions] == [case(f.function, f.draw(torch.float32), f.fixed).plan.key]


@pytest.mark.parametrize("f", [f for f in FORMS if f.name != "masked"], ids=lambda f: f.name)
def test_a_plan_holds_no_batch_or_sequence_size(f: Any) -> None:
    keys = {case(f.function, f.draw(torch.float32, rows=rows), f.fixed).plan.key for rows in (5, 9)}
    assert len(keys) == 1


def test_a_new_size_derives_nothing() -> None:
    f = form("chained")
    case(f.function, f.draw(torch.float32, rows=5))
    before = counts["derived"]
    case(f.function, f.draw(torch.float32, rows=11))
    assert counts["derived"] == before


def test_operands_with_one_gradient_formula_share_a_tensor() -> None:
    plan = case(form("add_norm").function, form("add_norm").draw(torch.float32)).plan
    assert plan.backward is not None
    assert len(plan.wrt) == 3 and len(plan.backward.writes) == 2
    targets = dict(zip(plan.wrt, plan.targets))
    rows = [k for k, t in enumerate(plan.forward.reads) if len(t.shape) == 3]
    assert len({targets[k] for k in rows}) == 1


def test_a_norm_saves_one_number_for_each_row() -> None:
    plan = case(rms_norm, form("rms_norm").draw(torch.bfloat16)).plan
    assert [len(t.shape) for t in plan.forward.writes] == [3, 2]
    assert len(plan.saved_operands) == 2


def test_an_activation_saves_nothing_but_its_operands() -> None:
    plan = case(lambda gate, up: F.silu(gate) * up, [torch.randn(2, 5, 48), torch.randn(2, 5, 48)]).plan
    assert len(plan.forward.writes) == plan.results == 1


def test_q_norm_and_rope_are_one_region_with_two_names() -> None:
    f = form("norm_rope")
    region = case(norm_rope, f.draw(torch.float32), f.fixed).region
    assert dict(region.counts()) == {"rms_norm": 1, "rope": 1}
    assert region.rule == "rms_norm+rope"


def test_a_residual_add_joins_the_norm_that_reads_it() -> None:
    region = case(form("add_norm").function, form("add_norm").draw(torch.float32)).region
    assert region.plan.results == 2 and len(region.cone.results) == 2
    assert dict(region.counts()) == {"rms_norm": 1}


def test_without_gradients_there_is_no_backward() -> None:
    f = form("rms_norm")
    x, w = f.draw(torch.float32)
    plan = case(f.function, [x, w], fixed=(0, 1)).plan
    assert plan.backward is None and plan.wrt == () and len(plan.forward.writes) == 1


def test_only_wanted_gradients_are_derived() -> None:
    f = form("rms_norm")
    c = case(f.function, f.draw(torch.float32), fixed=(1,))
    assert c.plan.backward is not None and len(c.plan.backward.writes) == 1
    hold(c, "torch", lambda: f.draw(torch.float32))


# what a region must not cross


def mutated(x: Tensor) -> Tensor:
    """A view outlives the write: which value it shows depends on when it is read."""
    h = torch.tanh(x) * 2.0
    low = h[..., :16]
    h.add_(1.0)
    return F.silu(h) * x + torch.cat((low, low, low), dim=-1)


def mutated_view(x: Tensor) -> Tensor:
    h = x * 2.0
    h[..., :4] = 0.0
    return torch.tanh(h) + 1.0


def constant_scale(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True) + 1.0
    return torch.tanh(x / scale) * x


def detached(x: Tensor) -> Tensor:
    return torch.exp(x - x.detach().amax(-1, keepdim=True)) * x


def detached_inside(x: Tensor) -> Tensor:
    h = torch.tanh(x)
    return x + (h - x).detach() * 1.5 + h


@pytest.mark.parametrize("function", [mutated, mutated_view, constant_scale, detached, detached_inside], ids=lambda f: f.__name__)
def test_boundaries(function: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    fast, errors = torch.compile(function, backend="sloth"), Errors()
    for _ in range(5):
        compare(errors, lambda a, g: run(fast, a, g).values, function, [torch.randn(2, 5, 48)])
    errors.judge()


def test_a_mutated_value_is_in_no_region() -> None:
    found = found_in(mutated, [torch.randn(2, 5, 48)])
    assert found.regions
    for region in found.regions:
        assert not any(found.view.mutated(n) for n in region.cone.nodes)


def test_a_result_that_goes_on_is_not_written_twice() -> None:
    """The sum before a norm is in memory for what comes after it: the backward reads that, unless somebody may write into it."""
    def norm(h: Tensor) -> Tensor:
        f = h.float()
        return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-6)).to(h.dtype)

    def goes_on(x: Tensor, r: Tensor) -> Tensor:
        h = x + r
        return torch.sort(norm(h))[0] @ torch.sort(h)[0].mT

    def leaves(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return norm(h), h

    def written(x: Tensor, r: Tensor) -> Tensor:
        h = x + r
        y = torch.sort(norm(h))[0]
        return y @ torch.sort(h.mul_(2.0))[0].mT

    arguments = [torch.randn(2, 5, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    held = {}
    for function in (goes_on, leaves, written):
        for region in found_in(function, arguments).regions:
            if region.rule == "rms_norm" and region.plan.backward is not None:
                held[function] = [t < region.plan.results for t in region.plan.held]
    assert any(held[goes_on]) and not any(held[leaves]) and not any(held.get(written, []))
