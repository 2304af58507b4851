"""From a rule's name to what is derived for it: its samples captured as a model would be, lifted and planned."""

from __future__ import annotations

from typing import Any

import click
import torch
from torch import fx

from slothc.patterns.rule import RowRule, Sample, StructuralRule

from .catalogue import rules
from .found import Found, find
from .options import Options
from .view import GraphView

Rule = StructuralRule | RowRule


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


def arguments(sample: Sample, dtype: torch.dtype, seed: int = 0) -> list[Any]:
    """Fresh arguments with every floating-point tensor in ``dtype`` and requiring grad."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = sample.arguments()
    return [x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in given]  # fmt: skip


def found_in(sample: Sample, dtype: torch.dtype = torch.float32) -> Found:
    """What sloth finds in the sample's graph. The graph itself runs as it is."""
    seen: list[Found] = []

    def look(module: fx.GraphModule, example_inputs: Any) -> Any:
        seen.append(find(GraphView(module), Options()))
        return module.forward

    torch._dynamo.reset()
    torch.compile(sample.function, backend=look, fullgraph=True, dynamic=False)(*arguments(sample, dtype))
    return seen[0]
