"""A backward that also makes a result of the forward again, so that nobody has to keep it until then.

The backward of ``h = silu(gate) * up`` reads gate and up anyway: with one more store it hands h to the gradient of the linear that
read it. It holds for any plan: what the result is made of is recomputed from what the backward reads, or from more operands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .geometry import Access
from .plan import Pass, Plan
from .program import Input, Program, Stage


@dataclass(frozen=True)
class Remaking:
    """``backward`` reads what the plan's backward reads and then the operands ``more`` (numbers of the forward's reads); it writes the
    gradients as the plan's does, and last the forward's first result.
    """

    backward: Pass
    more: tuple[int, ...]


_made: dict[str, Remaking | None] = {}


def remaking(plan: Plan) -> Remaking | None:
    """The plan's backward with its first result made again; None where there is no backward, or where the result is not worth its
    making: it needs a pass over the row (a reduction) that the backward does without.
    """
    if plan.key not in _made:
        _made[plan.key] = _remaking(plan)
    return _made[plan.key]


def _remaking(plan: Plan) -> Remaking | None:
    if plan.backward is None:
        return None
    forward, backward = plan.forward, plan.backward
    kept = set(plan.saved_stages)
    outputs = [(o, a) for o, a in zip(forward.program.outputs, forward.stores) if a.tensor == 0]
    stages = _stages(forward.program, {o.value for o, _ in outputs}, kept)
    made = backward.program.stage
    if any(s in forward.program.reductions and s.name not in made for s in stages):
        return None
    inputs, loads, more = _inputs(plan, stages, {o.value for o, _ in outputs} - kept)
    if any(forward.reads[t].lookup is not None for t in more):
        return None                                                        # its index is numbered among other reads
    again = [replace(o, name=f"again_{o.name}") for o, _ in outputs]
    program = Program(
        (*backward.program.inputs, *inputs), _ordered([*backward.program.stages, *(s for s in stages if s.name not in made)]),
        (*backward.program.outputs, *again),
    )  # fmt: skip
    number = len(backward.writes)
    sizes = tuple((n, e) for n, e in forward.sizes if n in program.input)
    stores = (*backward.stores, *(Access(number, a.index) for _, a in outputs))
    return Remaking(
        replace(
            backward, program=program, loads=(*backward.loads, *loads), stores=stores,
            reads=(*backward.reads, *(forward.reads[t] for t in more)), writes=(*backward.writes, forward.writes[0]), sizes=sizes,
        ),
        more,
    )  # fmt: skip


def _stages(program: Program, wanted: set[str], kept: set[str]) -> list[Stage]:
    """The stages behind ``wanted`` that ``kept`` values do not spare, in order."""
    names, found = set(wanted), []
    for stage in reversed(program.stages):
        if stage.name in names and stage.name not in kept:
            names |= {s.name for s in stage.expr.free_symbols}
            found.append(stage)
    return found[::-1]


def _inputs(plan: Plan, stages: list[Stage], results: set[str]) -> tuple[list[Input], list[Access | None], tuple[int, ...]]:
    """The inputs that the backward lacks, their accesses, and the operands that it does not read yet."""
    assert plan.backward is not None
    forward, known = plan.forward, plan.backward.program.input
    read = {s.name for stage in stages for s in stage.expr.free_symbols} | results
    place = {t: k for k, t in enumerate(plan.saved_operands)}
    inputs: list[Input] = []
    loads: list[Access | None] = []
    more: list[int] = []
    for i, access in zip(forward.program.inputs, forward.loads):
        if i.name not in read or i.name in known:
            continue
        if access is not None and access.tensor not in place:
            place[access.tensor] = len(plan.backward.reads) + len(more)
            more.append(access.tensor)
        inputs.append(i)
        loads.append(None if access is None else Access(place[access.tensor], access.index))
    return inputs, loads, tuple(more)


def _ordered(stages: list[Stage]) -> tuple[Stage, ...]:
    """Each stage after those that it reads."""
    waiting, names = list(stages), {s.name for s in stages}
    done: list[Stage] = []
    while waiting:
        ready = [s for s in waiting if not any(x.name in names for x in s.expr.free_symbols)]
        if not ready:
            raise ValueError(f"stages read one another: {', '.join(s.name for s in waiting)}")
        done += ready
        names -= {s.name for s in ready}
        waiting = [s for s in waiting if s not in ready]
    return tuple(done)
