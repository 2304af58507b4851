"""Lifting by evaluation: a region of a graph, run at symbolic indices, gives its formula, whatever its spelling.

Every node is a loader: given an index (one affine form for each dimension) it returns a scalar expression over loads of the region's
operands. Evaluating the region's results at symbolic indices *is* the lift; no node needs to know about any other. Where a view cannot
be followed because an axis straddles a boundary, that axis is split and the evaluation starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from slothc.gradients.geometry import Access, Axis, Form, Size
from slothc.gradients.program import Kind, Output, Program
from slothc.gradients.reverse import without_aliases

from .lift_composite import Composite
from .lift_forms import NotAffine, Split, reshape
from .lift_loader import LONGEST, STORAGE, CannotLift, LeafLookup, OtherRow
from .lift_pointwise import Pointwise
from .lift_space import OtherLane, Space, TellsParts, fixed
from .lift_views import Views
from .sizes import shape_of
from .view import GraphView

__all__ = ["CannotLift", "Lifted", "OtherRow", "lift"]


@dataclass(frozen=True)
class Lifted:
    """A region's formula: the program, its space, and where each input is read and each output written.

    ``leaves``: the operands, in order. ``loads``: per program input. ``stores``: per program output, numbering ``results``.
    ``lookups``: the leaves that are tables, and how they are read.
    """

    program: Program
    axes: tuple[Axis, ...]
    lane: Axis
    leaves: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    loads: tuple[Access | None, ...]
    stores: tuple[Access, ...]
    sizes: tuple[tuple[str, Size], ...]
    lookups: tuple[tuple[int, LeafLookup], ...] = ()


def lift(view: GraphView, region: set[fx.Node], results: Sequence[fx.Node], longest: int = LONGEST) -> Lifted:
    """The row program of ``region``, which computes ``results``, in at most ``longest`` steps. Raises ``CannotLift``."""
    space = _space(view, results[0])
    for _ in range(12):
        attempt = _Evaluation(view, region, space, longest)
        try:
            lifted = _attempted(attempt, results)
        except NotAffine as error:
            raise CannotLift(attempt.at or results[0], str(error)) from None
        if lifted is not None:
            return lifted
    raise CannotLift(results[0], "its axes split without end")


def _attempted(attempt: _Evaluation, results: Sequence[fx.Node]) -> Lifted | None:
    """The formula, or None where the space had to change first. Raises ``NotAffine``, ``CannotLift``."""
    space = attempt.space
    try:
        return attempt.run(results)
    except Split as split:
        if split.axis not in space.axes:
            raise NotAffine("a dimension that is looked up is cut") from None
        space.split(split.axis, split.inner, split.blocked)
    except TellsParts as parts:
        space.unroll_pairs(parts.axis)
    except OtherLane as lane:
        if lane.axis is None:
            space.axes["lane"] = lane.size
        space.lane = lane.axis or "lane"
    return None


def _space(view: GraphView, node: fx.Node) -> Space:
    shape = shape_of(view, node)
    names = [f"r{d}" for d in range(len(shape))]
    return Space(dict(zip(names, shape)), [Form.axis(n) for n in names], names[-1] if names else "")


class _Evaluation(Pointwise, Views, Composite):
    """One evaluation of a region over a fixed space."""

    def run(self, results: Sequence[fx.Node]) -> Lifted:
        outputs: list[Output] = []
        stores: list[Access] = []
        space = self.space
        for number_, node in enumerate(results):
            shape = shape_of(self.view, node)
            first = shape_of(self.view, results[0])
            place = tuple(space.index) if shape == first else reshape(space.index, first, shape, space.axes)
            for combination in space.combinations():
                index = tuple(fixed(f, combination) for f in place)
                value = self._stage(self.load(node, index), None, force=True)
                access = Access(number_, index)
                kind = Kind(bool(access.axes - {space.lane}), space.lane in access.axes)
                outputs.append(Output(f"y{len(outputs) or ''}", value.name, STORAGE[self.view.dtype(node)], kind=kind))
                stores.append(access)
        program = without_aliases(Program(tuple(self.inputs), tuple(self.stages), tuple(outputs)))
        kept = [k for k, i in enumerate(self.inputs) if i.name in program.input]
        sizes = (("D", space.lane_count()),) if "D" in program.input else ()
        axes = tuple(Axis(a, space.axes[a]) for a in space.rows)
        lane = Axis(space.lane, space.axes.get(space.lane, 1))
        loads = tuple(self.loads[k] for k in kept)
        lookups = tuple(sorted(self.lookups.items()))
        return Lifted(program, axes, lane, tuple(self.leaves), tuple(results), loads, tuple(stores), sizes, lookups)
