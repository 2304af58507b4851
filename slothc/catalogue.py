"""Every rule there is. Adding one is a file in patterns/ and a line here."""

from __future__ import annotations

import torch

from slothc.gradients.plan import Plan
from slothc.patterns import attention, cross_entropy, gated_mlp, layer_norm, lora_linear, rms_norm, rope
from slothc.patterns.rule import RowRule, Sample, StructuralRule

from .errors import OptionError

STRUCTURAL: tuple[StructuralRule, ...] = (cross_entropy.RULE, lora_linear.RULE, attention.RULE)
ROW: tuple[RowRule, ...] = (rms_norm.RULE, layer_norm.RULE, gated_mlp.RULE, rope.RULE)
UNNAMED, CONSTANT = "rowwise", "constant"


def rules() -> tuple[StructuralRule | RowRule, ...]:
    """All rules, structural ones first."""
    return (*STRUCTURAL, *ROW)


def names() -> tuple[str, ...]:
    """The names that counts and ``disable`` use."""
    return (*(r.name for r in rules()), UNNAMED, CONSTANT)


def rule(name: str) -> StructuralRule | RowRule:
    """The rule called ``name``. Raises ``OptionError`` naming the allowed ones."""
    for r in rules():
        if r.name == name:
            return r
    raise OptionError(f"no rule is called {name!r}: the rules are {', '.join(r.name for r in rules())}")


def lifted(name: str, dtype: torch.dtype = torch.float32) -> list[tuple[Sample, Plan]]:
    """The plans that a row rule's samples lift to, each captured by Dynamo as a model's code would be. Raises ``OptionError``."""
    from .capture import region_of

    found = rule(name)
    if not isinstance(found, RowRule):
        raise OptionError(f"{name} is a structural rule: row plans exist for {', '.join(r.name for r in ROW)}")
    return [(s, region_of(s.function, s.arguments(), dtype).plan) for s in found.samples]
