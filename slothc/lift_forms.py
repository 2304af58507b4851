"""Index arithmetic for views: how a reshape, a slice or a concatenation maps an element's index to its source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import sympy as sp

from slothc.gradients.geometry import Form, Size


class Split(Exception):
    """Axis ``axis`` must become (outer, inner) with ``inner`` elements in the inner one before the view can be followed.

    ``blocked``: the cut is one of a concatenation or slice, so the outer part tells pieces apart.
    """

    def __init__(self, axis: str, inner: Size, blocked: bool = False) -> None:
        super().__init__(axis, inner, blocked)
        self.axis, self.inner, self.blocked = axis, inner, blocked


class NotAffine(Exception):
    """The view has no affine index map over this iteration space."""


def divides(a: Size, b: Size) -> Size | None:
    """b / a where that is a whole number for every size, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return b // a if a and b % a == 0 else None
    try:
        quotient = sp.cancel(sp.sympify(b) / a)
    except sp.PolynomialError:
        return None
    if quotient.is_Integer:
        return int(quotient)
    return quotient if sp.denom(quotient) == 1 else None


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    return a == b if isinstance(a, int) and isinstance(b, int) else sp.expand(sp.sympify(a) - b) == 0


def extent(form: Form, sizes: Mapping[str, Size]) -> Size:
    """The largest value of the form."""
    total: Size = form.const
    for axis, c in form.terms:
        total = total + c * (sizes[axis] - 1)
    return total


def below(value: Size, bound: Size) -> bool:
    """Whether value < bound for all positive sizes, as far as that can be told."""
    difference = sp.expand(sp.sympify(bound) - value)
    return bool(difference.is_positive) or (difference.is_Integer and difference > 0) or _positive(difference)


def _positive(difference: sp.Expr) -> bool:
    """A polynomial whose symbols are at least 1: put s = 1 + t; if no coefficient is negative and the constant is positive, it is."""
    symbols = sorted(difference.free_symbols, key=lambda s: s.name)
    if not symbols:
        return False
    try:
        moved = sp.Poly(sp.expand(difference.subs({s: s + 1 for s in symbols})), *symbols)
    except sp.PolynomialError:                                            # a size with a division in it
        return False
    return all(c >= 0 for c in moved.coeffs()) and moved.coeff_monomial(1) > 0


def divmod_form(form: Form, by: Size, sizes: Mapping[str, Size]) -> tuple[Form, Form]:
    """(form // by, form % by). Raises ``Split`` where an axis straddles the boundary, ``NotAffine`` where nothing helps."""
    high, low = Form(), Form()
    for axis, c in form.terms:
        quotient = divides(by, c)
        if quotient is not None:
            high = high + Form(((axis, quotient),))
        else:
            low = low + Form(((axis, c),))
    if isinstance(form.const, int) and isinstance(by, int):
        high, low = high + form.const // by, low + form.const % by
    else:
        low = low + form.const
    if below(extent(low, sizes), by):
        return high, low
    for axis, c in low.terms:
        inner = divides(c, by)
        if inner is not None and not same(inner, sizes[axis]) and divides(inner, sizes[axis]) is not None:
            raise Split(axis, inner)
    raise NotAffine(f"{form} cannot be divided by {by}")


def reshape(index: Sequence[Form], to: Sequence[Size], source: Sequence[Size], sizes: Mapping[str, Size]) -> tuple[Form, ...]:
    """The source index of element ``index`` of a tensor of shape ``to`` that views one of shape ``source``."""
    result: list[Form] = []
    for outer, inner in _blocks(list(to), list(source)):
        flat, stride = Form(), 1
        for d in reversed(outer):
            flat = flat + index[d] * stride
            stride = stride * to[d]
        part: list[Form] = []
        for k, d in enumerate(reversed(inner)):
            if k == len(inner) - 1:
                part.append(flat)
            else:
                flat, rest = divmod_form(flat, source[d], sizes)
                part.append(rest)
        result += reversed(part)
    return tuple(result)


def _blocks(to: list[Size], source: list[Size]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions of both shapes with equal products, as short as possible."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(to) or j < len(source):
        outer, inner = [], []
        if i < len(to):
            outer.append(i)
        if j < len(source):
            inner.append(j)
        a = to[i] if i < len(to) else 1
        b = source[j] if j < len(source) else 1
        i, j = min(i + 1, len(to)), min(j + 1, len(source))
        while not same(a, b):
            if i < len(to) and (divides(a, b) is not None or j >= len(source)):
                a, i = a * to[i], i + 1
                outer.append(i - 1)
            elif j < len(source):
                b, j = b * source[j], j + 1
                inner.append(j - 1)
            elif i < len(to):
                a, i = a * to[i], i + 1
                outer.append(i - 1)
            else:
                raise NotAffine(f"shapes {to} and {source} hold different numbers of elements")
        blocks.append((outer, inner))
    return blocks


def part(form: Form, widths: Sequence[Size], sizes: Mapping[str, Size], lane: str) -> tuple[int, Form]:
    """Which piece of a concatenation the element is in, and its index there. Raises ``Split`` on the axis where pieces mix."""
    start: Size = 0
    for number, width in enumerate(widths):
        if below(extent(form, sizes), start + width) and not below(form.const, start):
            return number, form + (0 - start)
        start = start + width
    axis = lane if form.axes & {lane} else next(iter(form.axes), "") if len(form.axes) == 1 else ""
    if axis and all(isinstance(w, int) for w in widths) and isinstance(sizes[axis], int):
        step = form.coefficient(axis)
        width, edge = sizes[axis], 0
        for w in widths:
            edge += w
            if isinstance(step, int) and (edge - form.const) % step == 0:
                width = gcd(width, abs(edge - form.const) // step)
            else:
                raise NotAffine(f"a concatenation is cut at {edge}, inside a step of {step}")
        if width != sizes[axis]:
            raise Split(axis, width, blocked=True)
    raise NotAffine("a concatenation joins pieces along an axis whose pieces cannot be told apart")
