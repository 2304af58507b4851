"""A backward that makes the forward's result again: the same gradients, the same result, and no pass that the backward does without."""

from __future__ import annotations

import pytest
import torch
from contract import case
from forms import FORMS, Form
from slothc.gradients.remake import remaking
from slothc.kernels.rowwise import launcher

from slothc.catalogue import ROW, lifted


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_gradients_stay_and_the_result_comes_again(form: Form) -> None:
    c = case(form.function, form.draw(torch.float32), form.fixed)
    made = remaking(c.plan)
    if made is None:
        return
    assert c.plan.backward is not None and set(made.more).isdisjoint(c.plan.saved_operands)
    torch.manual_seed(1)
    arguments = [a.detach() for a in form.draw(torch.float32)]
    operands = [arguments[k] for k in c.places]
    written = launcher(c.plan.forward)(operands)
    cotangents = [torch.randn_like(w) for w in written[: c.plan.results]]
    reads = [*(operands[k] for k in c.plan.saved_operands), *(written[k] for k in c.plan.held), *cotangents]
    *gradients, again = launcher(made.backward)([*reads, *(operands[k] for k in made.more)])
    for mine, theirs in zip(gradients, launcher(c.plan.backward)(reads), strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(again, written[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [r.name for r in ROW])
def test_every_named_rule_can_be_made_again(rule: str) -> None:
    for sample, plan in lifted(rule, torch.bfloat16):
        made = remaking(plan)
        assert made is not None, sample.name
        assert plan.backward is not None
        assert len(made.backward.program.reductions) == len(plan.backward.program.reductions), sample.name


def test_no_backward_nothing_to_add() -> None:
    form = next(f for f in FORMS if f.name == "rms_norm")
    plan = case(form.function, form.draw(torch.float32), fixed=(0, 1)).plan
    assert plan.backward is None and remaking(plan) is None
