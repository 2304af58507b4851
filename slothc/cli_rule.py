"""From a rule's name to what is derived for it: its samples captured as a model would be, lifted and planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click
import torch

from slothc.gradients.plan import Plan
from slothc.patterns.rule import Match, RowRule, Sample, StructuralRule

from .capture import captured
from .catalogue import rules
from .found import find
from .options import Options
from .view import GraphView

Rule = StructuralRule | RowRule


@dataclass(frozen=True)
class Lifted:
    """What is found of a rule in a sample, and why other things are not."""

    plans: tuple[Plan, ...]
    matches: tuple[Match, ...]
    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.plans or self.matches)


def named(name: str) -> Rule:
    """The rule, or a usage error with all names."""
    known = {rule.name: rule for rule in rules()}
    if name not in known:
        raise click.BadParameter(f"{name!r} is not a rule; the rules are {', '.join(sorted(known))}", param_hint="RULE")
    return known[name]


def sample_of(rule: Rule, name: str | None) -> Sample:
    """The sample of that name (the first for None), or a usage error with all names."""
    for sample in rule.samples:
        if name in (None, sample.name):
            return sample
    names = ", ".join(repr(sample.name) for sample in rule.samples)
    raise click.BadParameter(f"{name!r} is not a sample of {rule.name}; it has {names}", param_hint="--sample")


def arguments(sample: Sample, seed: int = 0) -> list[Any]:
    """Fresh arguments; what is floating-point is fp32 and requires grad."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = list(sample.arguments())
    for i, x in enumerate(given):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            given[i] = x.detach().float().requires_grad_()
    return given


def lifted(rule: Rule, sample: Sample) -> Lifted:
    """What sloth finds in the sample's graph."""
    found = find(GraphView(captured(sample.function, arguments(sample))), Options())
    plans = tuple(region.plan for region in found.regions if rule.name in region.counts())
    matches = tuple(match for match in found.matches if match.rule == rule.name)
    return Lifted(plans, matches, tuple(dict.fromkeys(miss.reason for miss in found.misses)))
