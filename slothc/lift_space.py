"""The iteration space of a lift: its axes, how one is split, and which are unrolled into separate equations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import prod

import sympy as sp

from slothc.gradients.geometry import Form, Size

from .lift_forms import NotAffine

MAX_LANES = 16


class OtherLane(Exception):
    """The lane must be another axis, or a new one of this size."""

    def __init__(self, axis: str | None, size: Size = 0) -> None:
        super().__init__(axis, size)
        self.axis, self.size = axis, size


class TellsParts(Exception):
    """This axis tells real from imaginary parts: it must be unrolled."""

    def __init__(self, axis: str) -> None:
        super().__init__(axis)
        self.axis = axis


@dataclass
class Space:
    """The iteration space: row axes, one lane axis, and the axes unrolled into separate equations.

    ``unrolled`` axes are parts of the row, ``blocks`` tell rows of one kind from rows of another (the pieces of a stack).
    """

    axes: dict[str, Size]
    index: list[Form]
    lane: str
    unrolled: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    fresh: int = 0

    def split(self, axis: str, inner: Size, blocked: bool) -> None:
        """axis = inner_size * outer + inner. Pieces of the lane are told apart by unrolling."""
        outer, low = f"{axis}o{self.fresh}", f"{axis}i{self.fresh}"
        self.fresh += 1
        size = self.axes[axis]
        count = size // inner if isinstance(size, int) and isinstance(inner, int) else sp.cancel(sp.sympify(size) / inner)
        names = list(self.axes)
        entries = {outer: count, low: inner}
        self.axes = {k: v for n in names for k, v in (entries.items() if n == axis else ((n, self.axes[n]),))}
        to = Form(((outer, inner),)) + Form.axis(low)
        self.index = [substitute(f, axis, to) for f in self.index]
        if axis == self.lane:
            if blocked:
                self._unroll(outer, count)
                self.lane = low if inner != 1 else self._before(low)
            elif isinstance(inner, int) and inner <= 4:
                self._unroll(low, inner)
                self.lane = outer
            else:
                self.lane = low
        elif blocked:
            self._unroll(outer, count, self.blocks)

    def _unroll(self, axis: str, count: Size, among: dict[str, int] | None = None) -> None:
        total = count * prod(self.unrolled.values()) * prod(self.blocks.values())
        if not isinstance(count, int) or not isinstance(total, int) or total > MAX_LANES:
            raise NotAffine(f"the row falls into {total} pieces, more than {MAX_LANES}")
        (self.unrolled if among is None else among)[axis] = count

    def unroll_pairs(self, axis: str) -> None:
        """The axis of real and imaginary parts becomes two equations; where it was the lane, the axis before it is."""
        self._unroll(axis, 2)
        if axis == self.lane:
            self.lane = self._before(axis)

    def _before(self, axis: str) -> str:
        """The last axis that could be the lane where ``axis`` has nothing to run along."""
        return next((a for a in reversed(self.axes) if a not in self.unrolled and a != axis), axis)

    @property
    def rows(self) -> list[str]:
        return [a for a in self.axes if a != self.lane and a not in self.unrolled and a not in self.blocks]

    def lane_count(self) -> Size:
        """The elements of a row, over all unrolled lanes."""
        return self.axes[self.lane] * prod(self.unrolled.values())

    def combinations(self) -> Iterator[dict[str, int]]:
        """Every value of the unrolled axes: one equation each."""
        return _counts(self.unrolled | self.blocks)

    def lanes(self) -> Iterator[dict[str, int]]:
        """Every value of those that are parts of one row."""
        return _counts(self.unrolled)


def _counts(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    for values in product(*map(range, sizes.values())):
        yield dict(zip(sizes, values))


def substitute(form: Form, axis: str, to: Form | int) -> Form:
    """The form with ``axis`` replaced."""
    c = form.coefficient(axis)
    if c == 0:
        return form
    rest = Form(tuple(t for t in form.terms if t[0] != axis), form.const)
    return rest + (to * c)


def fixed(form: Form, combination: dict[str, int]) -> Form:
    """The form at one combination of the unrolled axes' values."""
    for axis, value in combination.items():
        form = substitute(form, axis, value)
    return form
