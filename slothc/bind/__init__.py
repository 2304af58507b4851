"""From a match to the calls that replace its nodes: one module for each structural rule."""

from __future__ import annotations

from slothc.patterns.rule import Match

from . import attention, constant, cross_entropy, lora_linear
from .replacement import Replacement

_BIND = {"attention": attention.bind, "constant": constant.bind, "cross_entropy": cross_entropy.bind, "lora_linear": lora_linear.bind}


def calls(match: Match) -> list[Replacement]:
    """What replaces the match's nodes; empty where the graph is best left as it is."""
    return _BIND[match.rule](match)
