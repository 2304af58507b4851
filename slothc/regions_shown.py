"""A rewritten region for a reader: the lines of source that it takes the place of, and the formulas that take theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from slothc.gradients.plan import Plan
from slothc.gradients.pretty import formula, operand_names
from slothc.patterns.rule import Match

from . import constants
from .catalogue import rules
from .coverage import operation
from .found import Region
from .rewrite import Rewritten
from .view import GraphView
from .view_location import place

FAMILY = {"cross_entropy": "vocab: tiles of logits, never whole", "lora_linear": "lowrank: one sum, one rounding"}


@dataclass(frozen=True)
class RegionLine:
    """One distinct region. ``before``: its (location, source, operations) from the first line to the last; ``formula``, ``backward`` and
    ``saved``: what runs instead; ``kernel``: its name in the cache; ``count``: how many regions of the model are this one."""

    name: str
    location: str
    formula: str
    before: tuple[tuple[str, str, str], ...]
    backward: str = ""
    saved: str = ""
    kernel: str = ""
    count: int = field(default=1, compare=False)


def shown(graphs: Iterable[tuple[Rewritten, int]]) -> Iterator[RegionLine]:
    """Each distinct region of the graphs, the most frequent first. Two are one where plan and source are the same."""
    first: dict[Any, tuple[GraphView, Region | Match]] = {}
    many: dict[Any, int] = {}
    for g, times in graphs:
        for item in g.used:
            view = g.found.view
            key = item.plan.key if isinstance(item, Region) else (item.rule, view.location(item.node), str(_static(item)))
            first.setdefault(key, (view, item))
            many[key] = many.get(key, 0) + times
    for key in sorted(many, key=many.__getitem__, reverse=True):
        view, item = first[key]
        yield _region(view, item, many[key]) if isinstance(item, Region) else _match(view, item, many[key])


def _region(view: GraphView, item: Region, count: int) -> RegionLine:
    plan = item.plan
    kept = tuple(f"{name} = " for name, t in zip(plan.saved_values, plan.held) if t >= plan.results)
    forward = "\n".join(line for line in formula(plan.forward).splitlines() if not line.startswith(kept))
    backward = formula(plan.backward, name_scalars=True) if plan.backward else ""
    at = view.location(item.cone.sink)
    return RegionLine(item.rule, at, forward, _before(view, item.cone.nodes), backward, _saved(plan), f"rowwise_{plan.key}", count)


def _match(view: GraphView, item: Match, count: int) -> RegionLine:
    math = next((r.math for r in rules() if r.name == item.rule), constants.MATH)
    chain = item.attrs.get("chain")
    text = math + (f"\nchain = {chain}" if chain else "")
    return RegionLine(item.rule, view.location(item.node), text, _before(view, item.nodes), kernel=FAMILY.get(item.rule, ""), count=count)


def _before(view: GraphView, nodes: Iterable[fx.Node]) -> tuple[tuple[str, str, str], ...]:
    inside, lines = set(nodes), dict[tuple[str, str], list[str]]()
    for n in view.nodes:
        if n in inside:
            lines.setdefault(place(n), []).append(operation(n))
    return tuple((*at, ", ".join(names)) for at, names in lines.items())


def _static(item: Match) -> dict[str, Any]:
    return {k: v for k, v in item.attrs.items() if isinstance(v, int | float | str | None)}


def _saved(plan: Plan) -> str:
    """What the forward keeps for the backward, in a phrase."""
    if plan.backward is None:
        return "nothing: no gradient"
    alive = [operand_names(plan.forward, k) for k in plan.saved_operands]
    values = [name.removeprefix("keep_") for name in plan.saved_values]
    return "; ".join(f"{what}: {', '.join(n)}" for what, n in (("operands", alive), ("values", values)) if n) or "nothing"
