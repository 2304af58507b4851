"""Row programs: scalar equations and row reductions over an iteration space of rows x lanes.

A program is a straight line of stages over named scalars. Whether a scalar varies with the row, with the lane, with both or
with neither is its ``Kind``; a reduction runs over the lanes of one row. Several lanes of one tensor (the two halves that
RoPE rotates, gate and up of a fused projection) are simply several inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import sympy as sp


@dataclass(frozen=True)
class Kind:
    """What a scalar varies with."""

    rows: bool
    lanes: bool

    def __or__(self, other: Kind) -> Kind:
        return Kind(self.rows or other.rows, self.lanes or other.lanes)

    def __str__(self) -> str:
        return {(True, True): "row", (False, True): "column", (True, False): "scalar", (False, False): "const"}[
            (self.rows, self.lanes)
        ]


ROW, COLUMN, SCALAR, CONST = Kind(True, True), Kind(False, True), Kind(True, False), Kind(False, False)

DTYPES = ("fp32", "bf16", "fp16", "fp64", "i64", "i32", "i16", "i8", "u8", "bool")
REDUCTIONS = ("sum", "max", "logsumexp")


def symbol(name: str) -> sp.Symbol:
    """The sympy symbol that stands for the scalar ``name`` (real, commutative)."""
    return sp.Symbol(name, real=True)


@dataclass(frozen=True)
class Input:
    """A scalar the program reads. ``dtype`` is its storage; arithmetic is in fp32.

    ``role``: "data" for tensor elements, "index" for the lane's own number, "size" for a number known only at launch.
    """

    name: str
    kind: Kind
    dtype: str = "fp32"
    differentiable: bool = True
    role: str = "data"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"input {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Reduce:
    """A reduction of ``body`` over the lanes of a row: sum, max, or log(sum(exp(body))) computed stably."""

    op: str
    body: sp.Expr

    def __post_init__(self) -> None:
        if self.op not in REDUCTIONS:
            raise ValueError(f"reduction {self.op!r} is not one of {', '.join(REDUCTIONS)}")


@dataclass(frozen=True)
class Stage:
    """One equation. ``dtype`` is a rounding point: the value is rounded to it before anyone reads it (None: stays fp32).

    ``detached``: the results do not depend on this value, whatever it is (the shift in a softmax), so no derivative goes through it.
    """

    name: str
    value: sp.Expr | Reduce
    dtype: str | None = None
    detached: bool = False

    @property
    def expr(self) -> sp.Expr:
        return self.value.body if isinstance(self.value, Reduce) else self.value


@dataclass(frozen=True)
class Output:
    """A result: the value of stage or input ``value``, stored as ``dtype``; ``over_rows`` sums it in fp32 over the rows that
    its tensor does not vary with (all of them for a column vector).

    ``kind`` is what the stored tensor varies with, where that is more than its value does (a scalar broadcast over the lanes).
    """

    name: str
    value: str
    dtype: str = "fp32"
    over_rows: bool = False
    kind: Kind | None = None


@dataclass(frozen=True)
class Program:
    """Inputs, stages in order, outputs."""

    inputs: tuple[Input, ...]
    stages: tuple[Stage, ...]
    outputs: tuple[Output, ...]

    def __post_init__(self) -> None:
        known = {i.name for i in self.inputs}
        for stage in self.stages:
            missing = {s.name for s in stage.expr.free_symbols} - known
            if missing:
                raise ValueError(f"stage {stage.name!r} reads {sorted(missing)} before they are defined")
            if stage.name in known:
                raise ValueError(f"{stage.name!r} is defined twice")
            known.add(stage.name)
        for out in self.outputs:
            if out.value not in known:
                raise ValueError(f"output {out.name!r} reads {out.value!r}, which is not defined")

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The kind of every input and stage."""
        kinds = {i.name: i.kind for i in self.inputs}
        for stage in self.stages:
            kind = CONST
            for s in stage.expr.free_symbols:
                kind = kind | kinds[s.name]
            kinds[stage.name] = Kind(kind.rows, False) if isinstance(stage.value, Reduce) else kind
        return kinds

    @cached_property
    def stage(self) -> dict[str, Stage]:
        return {s.name: s for s in self.stages}

    @cached_property
    def input(self) -> dict[str, Input]:
        return {i.name: i for i in self.inputs}

    @cached_property
    def depth(self) -> dict[str, int]:
        """How many reductions lie, one behind the other, before each value is known: the number of passes over a long row."""
        depth = {i.name: 0 for i in self.inputs}
        for stage in self.stages:
            level = max((depth[s.name] for s in stage.expr.free_symbols), default=0)
            depth[stage.name] = level + isinstance(stage.value, Reduce)
        return depth

    @property
    def reductions(self) -> tuple[Stage, ...]:
        return tuple(s for s in self.stages if isinstance(s.value, Reduce))

    def out_kind(self, out: Output) -> Kind:
        """What the stored result varies with."""
        return out.kind or self.kinds[out.value]

    def needed(self, names: set[str]) -> set[str]:
        """Every input and stage that the values ``names`` depend on, themselves included."""
        names = set(names)
        for stage in reversed(self.stages):
            if stage.name in names:
                names |= {s.name for s in stage.expr.free_symbols}
        return names

    def pruned(self) -> Program:
        """The same program without the inputs and stages that no output needs."""
        keep = self.needed({o.value for o in self.outputs})
        return Program(
            tuple(i for i in self.inputs if i.name in keep), tuple(s for s in self.stages if s.name in keep), self.outputs
        )

    def text(self) -> str:
        """The canonical text: equal text, equal program."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for i in self.inputs:
            yield f"in {i.name}: {i.kind} {i.dtype} {i.role}{'' if i.differentiable else ' fixed'}"
        for s in self.stages:
            body = f"{s.value.op}[{sp.sstr(s.value.body, order='lex')}]" if isinstance(s.value, Reduce) else sp.sstr(s.value, order="lex")
            yield f"{s.name} = {body}{' as ' + s.dtype if s.dtype else ''}{' detached' if s.detached else ''}"
        for o in self.outputs:
            yield f"out {o.name}: {o.value} {o.dtype}{' over rows' if o.over_rows else ''}{f' {o.kind}' if o.kind else ''}"
