"""The frozen result of deriving: what the forward computes and saves, and what the backward computes from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from .geometry import Access, Axis, Size
from .program import Output, Program


@dataclass(frozen=True)
class Lookup:
    """Rows looked up: dimension ``dim`` of the tensor is read where the integer tensor ``index`` (a number among the reads) says.

    The operand's shape is that of the result, [..., *index's shape, ...]. A row ``skipped`` gets no gradient (a padding row).
    ``along``: each element has an index of its own, which has the result's shape and the tensor's dimensions. ``signed``: a negative
    index counts from the end; without it such an index is an error. ``once``: the index is a permutation of the numbers below its length.
    """

    index: int
    dim: int
    skipped: int | None = None
    along: bool = False
    signed: bool = False
    once: bool = False


@dataclass(frozen=True)
class Operand:
    """A tensor that a pass reads or writes: its shape (ints or expressions over size symbols) and storage dtype.

    ``order``: its dimensions from the outermost in memory to the innermost; results are allocated that way. ``zero``: a result that the
    pass fills only in part starts as zeros. ``complex``: a complex tensor, read as one of pairs [..., 2].
    ``number``: no tensor but a Python number that differs from call to call. ``lookup``: the tensor is a table, see ``Lookup``.
    """

    shape: tuple[Size, ...]
    dtype: str
    order: tuple[int, ...] | None = None
    zero: bool = False
    complex: bool = False
    number: bool = False
    lookup: Lookup | None = None


    def __str__(self) -> str:
        text = f"{self.shape} {self.dtype} {self.order} {self.zero} {self.complex} {self.number}"
        return text if self.lookup is None else f"{text} {self.lookup}"


@dataclass(frozen=True)
class Pass:
    """A program with its geometry: one access for each program input (None for index and size inputs) and each output.

    ``axes`` are the row axes, outermost first; ``lane`` is the axis that reductions run over. Sizes are symbols, found at launch
    from the shapes of ``reads``; ``sizes`` gives the program's size inputs as expressions over them. ``reads`` and ``writes`` are
    the tensors that accesses number.
    """

    program: Program
    axes: tuple[Axis, ...]
    lane: Axis
    loads: tuple[Access | None, ...]
    stores: tuple[Access, ...]
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    sizes: tuple[tuple[str, Size], ...] = ()

    def __post_init__(self) -> None:
        if len(self.loads) != len(self.program.inputs) or len(self.stores) != len(self.program.outputs):
            raise ValueError("one access is needed for each program input and output")

    def folded(self, number: int) -> bool:
        """Whether output ``number`` is summed over some of the row axes and kept over others: its access names only those."""
        mine = self.stores[number].axes & {a.name for a in self.axes}
        return self.program.outputs[number].over_rows and bool(mine)

    @cached_property
    def text(self) -> str:
        """Canonical text: equal text, equal kernel."""
        head = f"axes {', '.join(f'{a.name}:{a.size}' for a in self.axes)}; lane {self.lane.name}:{self.lane.size}"
        loads = "; ".join(f"{i.name}={a}" for i, a in zip(self.program.inputs, self.loads))
        stores = "; ".join(f"{o.name}={a}" for o, a in zip(self.program.outputs, self.stores))
        tensors = "; ".join(map(str, self.reads + self.writes))
        head += "".join(f"; {n} = {e}" for n, e in self.sizes)
        return "\n".join((head, self.program.text(), loads, stores, tensors))

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """A lifted region with its derived backward.

    ``forward`` writes the region's results, then values that only the backward reads. ``backward`` reads, in this order: the operands in
    ``saved_operands`` (numbers of the forward's reads), the saved values ``held`` (numbers of the forward's writes: a result that is one
    is not written twice), the gradients of the results; it writes the
    gradients of the operands in ``wrt``: operand ``wrt[k]`` gets result ``targets[k]`` (operands whose gradients have one formula, such
    as the two terms of a sum, share a tensor); a table's is that of the rows looked up. Where ``targets[k]`` is -1 - r, it is the gradient
    of result r itself. ``backward`` is None where no operand is differentiable.
    """

    forward: Pass
    backward: Pass | None
    results: int
    saved_operands: tuple[int, ...]
    wrt: tuple[int, ...]
    targets: tuple[int, ...] = ()
    held: tuple[int, ...] = ()

    @cached_property
    def differentiable(self) -> tuple[bool, ...]:
        """Of each result, whether an operand that has a gradient is a part of it."""
        program, made = self.forward.program, dict[int, set[str]]()
        for output, access in zip(program.outputs, self.forward.stores):
            made.setdefault(access.tensor, set()).update(program.needed({output.value}))
        return tuple(any(program.input[n].differentiable for n in made[k] if n in program.input) for k in range(self.results))

    @cached_property
    def reach(self) -> tuple[frozenset[int], ...]:
        """For each operand in ``wrt``, the results whose gradients its own is made of."""
        if self.backward is None:
            return ()
        first, behind = len(self.saved_operands) + len(self.held), dict[int, set[str]]()
        program = self.backward.program
        of = {i.name: a.tensor - first for i, a in zip(program.inputs, self.backward.loads) if a is not None and a.tensor >= first}
        for output, access in zip(program.outputs, self.backward.stores):
            behind.setdefault(access.tensor, set()).update(program.needed({output.value}))
        return tuple(frozenset(of[n] for n in behind[t] if n in of) if t >= 0 else frozenset({-1 - t}) for t in self.targets)

    @cached_property
    def saved_values(self) -> tuple[str, ...]:
        """The names of the forward's outputs that are saved."""
        return tuple(o.name for o in self._saved)

    @cached_property
    def saved_stages(self) -> tuple[str, ...]:
        """The names of the forward's stages that are saved."""
        return tuple(o.value for o in self._saved)

    @cached_property
    def _saved(self) -> tuple[Output, ...]:
        made = {a.tensor: o for o, a in zip(self.forward.program.outputs, self.forward.stores)}
        return tuple(made[t] for t in self.held)

    @cached_property
    def key(self) -> str:
        text = "\n".join((self.forward.text, self.backward.text if self.backward else "", f"{self.wrt} {self.held}"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
