"""Every rule there is. Adding one is a file in patterns/ and a line here."""

from __future__ import annotations

from slothc.patterns import attention, cross_entropy, gated_mlp, layer_norm, lora_linear, rms_norm, rope
from slothc.patterns.rule import RowRule, StructuralRule

STRUCTURAL: tuple[StructuralRule, ...] = (cross_entropy.RULE, lora_linear.RULE, attention.RULE)
ROW: tuple[RowRule, ...] = (rms_norm.RULE, layer_norm.RULE, gated_mlp.RULE, rope.RULE)
UNNAMED = "rowwise"


def rules() -> tuple[StructuralRule | RowRule, ...]:
    """All rules, structural ones first."""
    return (*STRUCTURAL, *ROW)


def names() -> tuple[str, ...]:
    """The names that counts and ``disable`` use."""
    return (*(r.name for r in rules()), UNNAMED)
