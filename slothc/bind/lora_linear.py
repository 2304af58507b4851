"""LoRA linear matches onto the low-rank family."""

from __future__ import annotations

from slothc.kernels.lowrank import lora_linear
from slothc.patterns.rule import Match

from .replacement import Replacement


def bind(match: Match) -> list[Replacement]:
    """One call of ``lora_linear`` for the matched sum."""
    args = tuple(match.inputs[name] for name in ("x", "xa", "weight", "bias", "a", "b", "scale"))
    return [Replacement(match.node, lora_linear, args, dict(match.attrs))]
