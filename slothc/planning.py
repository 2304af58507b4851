"""From a lifted region to a frozen plan: sizes made symbolic, the backward derived, what is saved decided.

A plan holds no batch or sequence size: a row axis's size is a symbol that the launcher finds from the operands' shapes, so that one
plan, derived and checked once, serves every length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy as sp
import torch
from torch import fx

from slothc.gradients.geometry import Access, Axis, Form, Size
from slothc.gradients.plan import Lookup, Operand, Pass, Plan
from slothc.gradients.program import Input, Output, Program, symbol
from slothc.gradients.reverse import NotDifferentiable, derive
from slothc.gradients.zero_sums import without_zero_sums

from .lift import CannotLift, Lifted
from .lift_forms import same
from .lift_loader import STORAGE
from .saving import saved_stages
from .sizes import shape_of, size_of
from .statistics import counts
from .view import GraphView


def plan(view: GraphView, lifted: Lifted) -> Plan:
    """The plan of a lifted region. Raises ``CannotLift`` where a gradient or a size has no formula."""
    literal: frozenset[str] = frozenset()
    lasting = tuple(map(view.lasts, lifted.results))
    for _ in range(3):
        made = _symbolic(lifted, _Abstract(view, lifted, literal).run(), lasting)
        hidden = _hidden_sizes(made.forward) | (_hidden_sizes(made.backward) if made.backward else frozenset())
        if not hidden:
            return made
        literal |= hidden                                                  # no operand's shape tells these sizes: they stay numbers
    raise CannotLift(lifted.results[0], "a size that no operand's shape gives")


def _symbolic(lifted: Lifted, forward: Pass, lasting: tuple[bool, ...]) -> Plan:
    wrt = _wrt(forward)
    if not wrt:
        return Plan(forward, None, len(lifted.results), (), ())
    key = (forward.text, lasting)
    if key not in _derived:
        _derived[key] = _derive(lifted, forward, wrt, lasting)
    return _derived[key]


_derived: dict[tuple[str, tuple[bool, ...]], Plan] = {}


def _derive(lifted: Lifted, forward: Pass, wrt: tuple[int, ...], lasting: tuple[bool, ...]) -> Plan:
    counts["derived"] += 1
    try:
        backward = derive(forward.program, [i.name for i in forward.program.inputs if i.differentiable])
    except NotDifferentiable as error:
        raise CannotLift(lifted.results[0], str(error)) from None
    return _joined(forward, backward, wrt, lasting)


def _hidden_sizes(p: Pass) -> frozenset[str]:
    """Size symbols that cannot be found from the shapes of what the pass reads: products of known sizes and one unknown give it."""
    known: set[str] = set()
    progress = True
    while progress:
        progress = False
        for dim in (sp.sympify(d) for t in p.reads for d in t.shape):
            symbols = [s for s in sp.Mul.make_args(dim) if not s.is_number]
            fresh = [s for s in symbols if str(s) not in known]
            if len(fresh) == 1 and fresh[0].is_Symbol and all(s.is_Symbol for s in symbols):
                known.add(str(fresh[0]))
                progress = True
    sizes = [a.size for a in (*p.axes, p.lane)] + [d for t in p.writes for d in t.shape]
    return frozenset(str(s) for e in sizes for s in sp.sympify(e).free_symbols) - known


class _Abstract:
    """Replaces the sizes of one graph by symbols."""

    def __init__(self, view: GraphView, lifted: Lifted, literal: frozenset[str] = frozenset()) -> None:
        self.view, self.lifted = view, lifted
        self.actual: dict[str, Size] = {a.name: a.size for a in (*lifted.axes, lifted.lane)}
        self.names = {a.name: f"a{k}" for k, a in enumerate(lifted.axes)} | {lifted.lane.name: "i"}
        self.symbols: dict[str, Size] = {a.name: sp.Symbol(f"n{k}", integer=True, positive=True) for k, a in enumerate(lifted.axes)}
        if self._lane_is_free():
            self.symbols[lifted.lane.name] = sp.Symbol("n", integer=True, positive=True)
        elif isinstance(lifted.lane.size, int):
            self.symbols[lifted.lane.name] = lifted.lane.size
        else:
            raise CannotLift(lifted.results[0], "the row is cut at a place known only at run time")
        for axis, s in self.symbols.items():
            if str(s) in literal:
                if not isinstance(self.actual[axis], int):
                    raise CannotLift(lifted.results[0], "a size that no operand's shape gives")
                self.symbols[axis] = self.actual[axis]
        self.extra = 0

    def _lane_is_free(self) -> bool:
        lane = self.lifted.lane.name
        accesses = [a for a in (*self.lifted.loads, *self.lifted.stores) if a]
        forms = [f for a in accesses for f in a.index]
        used = [f for f in forms if lane in f.axes]
        whole = all(f.const == 0 and f.coefficient(lane) == 1 for f in used)
        return whole and all(f.const == 0 for f in forms)

    def run(self) -> Pass:
        lifted = self.lifted
        reads = [self._operand(leaf, self._accesses(k), leaf, k) for k, leaf in enumerate(lifted.leaves)]
        writes = [self._operand(node, [a for a in lifted.stores if a.tensor == k], node) for k, node in enumerate(lifted.results)]
        axes = tuple(Axis(self.names[a.name], self.symbols[a.name]) for a in lifted.axes)
        lane = Axis("i", self.symbols[lifted.lane.name])
        count = {n: self._count(e) for n, e in lifted.sizes}
        loads = tuple(self._access(a) if a else None for a in lifted.loads)
        stores = tuple(map(self._access, lifted.stores))
        return Pass(lifted.program, axes, lane, loads, stores, tuple(reads), tuple(writes), tuple(count.items()))

    def _accesses(self, leaf: int) -> list[Access]:
        """Where the leaf is read, by the program or to find rows of another."""
        found = [a for a in self.lifted.loads if a and a.tensor == leaf]
        return found + [Access(leaf, lookup.at) for _, lookup in self.lifted.lookups if lookup.index == leaf]

    def _count(self, size: Size) -> Size:
        name, lanes = self.lifted.lane.name, self.lifted.lane.size
        if isinstance(size, int) and isinstance(lanes, int) and lanes:
            return self.symbols[name] * (size // lanes)
        return self.symbols[name] * sp.cancel(sp.sympify(size) / lanes)

    def _access(self, access: Access) -> Access:
        return Access(access.tensor, tuple(self._form(f)[0] for f in access.index))

    def _form(self, form: Form) -> tuple[Form, Size, Size]:
        """The form over symbols, and one past its largest value: as it is here, and over symbols."""
        terms = dict(form.terms)
        result, actual, abstract = Form((), form.const), 1, sp.Integer(1)
        while terms:
            axis = next((a for a, c in terms.items() if same(c, actual)), None)
            if axis is None:
                axis = min(terms, key=lambda a: _at_64(terms[a]))
                abstract = sp.sympify(terms[axis])
                if abstract.free_symbols:
                    raise CannotLift(self.lifted.results[0], f"a stride of {abstract} elements is known only at run time")
            c = terms.pop(axis)
            result = result + Form(((self.names[axis], int(abstract) if sp.sympify(abstract).is_Integer else abstract),))
            actual, abstract = c * self.actual[axis], abstract * self.symbols[axis]
        return result, actual, abstract

    def _operand(self, node: fx.Node, accesses: Sequence[Access], named: fx.Node, leaf: int | None = None) -> Operand:
        if not isinstance(self.view.example(named), torch.Tensor):
            return Operand((), "fp32", number=True)
        value = self.view.value(named)
        pairs = value.dtype.is_complex
        shape = (*shape_of(self.view, node), *((2,) if pairs else ()))
        lookup = dict(self.lifted.lookups).get(leaf) if leaf is not None else None
        if lookup is not None:
            table = shape_of(self.view, self.lifted.leaves[lookup.index])
            shape = table if lookup.along else (*shape[: lookup.dim], *table, *shape[lookup.dim + 1 :])
        dims: list[Size] = []
        for d, size in enumerate(shape):
            forms = [self._form(a.index[d]) for a in accesses]
            fit = next((abstract for f, actual, abstract in forms if f.terms and f.const == 0 and same(actual, size)), None)
            if fit is None and not isinstance(size, int):
                fit = sp.Symbol(f"m{self.extra}", integer=True, positive=True)
                self.extra += 1
            dims.append(size if fit is None else int(fit) if sp.sympify(fit).is_Integer else fit)
        dtype = "fp32" if pairs else STORAGE[value.dtype]
        if lookup is not None:
            how = Lookup(lookup.index, lookup.dim, lookup.skipped, lookup.along, lookup.signed, lookup.once)
            return Operand(tuple(dims), dtype, complex=pairs, lookup=how)
        strides, sizes = [_typical(s) for s in value.stride()], [_typical(s) for s in value.shape]
        if pairs:
            strides, sizes = [2 * s for s in strides] + [1], [*sizes, 2]
        order = tuple(sorted(range(len(shape)), key=lambda d: (-strides[d] if sizes[d] > 1 else -(10**15), d)))
        order = _settled(order, sizes)
        return Operand(tuple(dims), dtype, None if order == tuple(range(len(shape))) else order, complex=pairs)


def _at_64(size: Size) -> int:
    """The size with every symbol at 64: enough to order strides."""
    size = sp.sympify(size)
    return int(size.subs({x: 64 for x in size.free_symbols}))


def _typical(s: int | torch.SymInt) -> int:
    return _at_64(size_of(s))


def _settled(order: tuple[int, ...], sizes: Sequence[int]) -> tuple[int, ...]:
    """Dimensions of size 1 lie anywhere in memory: put them where they keep the order plain."""
    big = [d for d in order if sizes[d] > 1]
    if big == sorted(big):
        return tuple(range(len(sizes)))
    return order


def _wrt(forward: Pass) -> tuple[int, ...]:
    """Numbers of the operands that get a gradient."""
    found: set[int] = set()
    for i, access in zip(forward.program.inputs, forward.loads):
        if i.differentiable and access is not None:
            found.add(access.tensor)
    return tuple(sorted(found))


@dataclass
class _Numbering:
    """Tensor numbers of the backward: operands it reads, saved values, cotangents."""

    operands: dict[int, int]
    saved: dict[str, int]
    cotangents: int


def _joined(forward: Pass, backward: Program, wrt: tuple[int, ...], lasting: tuple[bool, ...]) -> Plan:
    rounded = {s.name: s.dtype or "fp32" for s in forward.program.stages}
    whole_results = _whole(forward, rounded, lasting)
    stored = sorted(saved_stages(forward.program, backward, whole_results.keys()), key=[s.name for s in forward.program.stages].index)
    backward = _reading(backward, {n: Input(n, forward.program.kinds[n], rounded[n], differentiable=False) for n in stored})
    backward = without_zero_sums(backward, forward.program, dict(forward.sizes), forward.lane.size)
    load = dict(zip((i.name for i in forward.program.inputs), forward.loads))
    read = {a.tensor for i in backward.inputs if (a := load.get(i.name)) is not None}
    tables = {t: lookup for t in (*read, *wrt) if (lookup := forward.reads[t].lookup)}
    saved_operands = tuple(sorted(read | {lookup.index for lookup in tables.values()}))
    before = len(saved_operands)
    numbering = _Numbering(
        {t: k for k, t in enumerate(saved_operands)}, {n: before + k for k, n in enumerate(stored)}, before + len(stored)
    )
    new = [n for n in stored if n not in whole_results]
    extra = {n: _kept(forward, n, len(forward.writes) + k, rounded[n]) for k, n in enumerate(new)}
    outputs = (*forward.program.outputs, *(o for o, _, _ in extra.values()))
    whole = replace(
        forward, program=replace(forward.program, outputs=outputs),
        stores=(*forward.stores, *(a for _, a, _ in extra.values())), writes=(*forward.writes, *(t for _, _, t in extra.values())),
    )  # fmt: skip
    kept = {n: whole_results.get(n) or extra[n][1] for n in stored}
    held = tuple(kept[n].tensor for n in stored)
    store = {f"g_{o.name}": a for o, a in zip(forward.program.outputs, forward.stores)}
    stores = tuple(_as_access(load[o.name.removeprefix("d_")]) for o in backward.outputs)
    backward = _folding(forward, backward, stores)
    targets, backward, stores = _shared(forward, backward, stores, wrt)
    passed, backward, stores = _passed(forward, backward, stores)
    loads = tuple(_load(i, load, store, kept, numbering) for i in backward.inputs)
    first = [t for k in range(max(targets) + 1) if (t := wrt[targets.index(k)]) not in passed]
    renumber = {t: k for k, t in enumerate(first)}
    leaders = [wrt[targets.index(k)] for k in targets]
    targets = tuple(-1 - passed[t] if t in passed else renumber[t] for t in leaders)
    stores = tuple(Access(renumber[a.tensor], a.index) for a in stores)
    reads = (*(_renumbered(forward.reads[t], numbering) for t in saved_operands), *(whole.writes[t] for t in held), *forward.writes)
    sizes = tuple((n, e) for n, e in forward.sizes if n in backward.input)
    writes = tuple(_gradient_operand(forward, t, stores, k) for k, t in enumerate(first))
    back = Pass(backward, forward.axes, forward.lane, loads, stores, reads, writes, sizes)
    return Plan(whole, back, len(forward.writes), saved_operands, wrt, targets, held)


def _whole(forward: Pass, rounded: Mapping[str, str], lasting: tuple[bool, ...]) -> dict[str, Access]:
    """Stages that a result holds, element by element and as they are rounded, with the access to it."""
    found: dict[str, Access] = {}
    for o, a in zip(forward.program.outputs, forward.stores):
        alone = sum(b.tensor == a.tensor for b in forward.stores) == 1 and not forward.writes[a.tensor].complex
        if alone and lasting[a.tensor] and not o.over_rows and rounded.get(o.value) == forward.writes[a.tensor].dtype:
            if forward.program.out_kind(o) == forward.program.kinds[o.value]:
                found.setdefault(o.value, a)
    return found


def _folding(forward: Pass, backward: Program, stores: Sequence[Access]) -> Program:
    """The backward with every gradient that is wider than its operand marked for summing; those of rows that are summed yet unrounded."""
    rows = {a.name for a in forward.axes if a.size != 1}
    outputs = tuple(replace(o, over_rows=True, kind=None) if rows - a.axes else o for o, a in zip(backward.outputs, stores))
    summed = [_summed_later(forward.reads[a.tensor]) for a in stores]
    return replace(backward, outputs=tuple(replace(o, dtype="fp32") if later else o for o, later in zip(outputs, summed)))


def _summed_later(operand: Operand) -> bool:
    """Whether the operand is a table whose rows may be read more than once."""
    return operand.lookup is not None and not operand.lookup.once


def _as_access(access: Access | None) -> Access:
    assert access is not None
    return access


def _shared(
    forward: Pass, backward: Program, stores: tuple[Access, ...], wrt: tuple[int, ...]
) -> tuple[tuple[int, ...], Program, tuple[Access, ...]]:
    """Operands whose gradients are the same formula at the same places get one tensor: the targets, and the program without repeats."""
    written: dict[int, tuple[object, ...]] = {}
    for t in wrt:
        mine = [(o, a) for o, a in zip(backward.outputs, stores) if a.tensor == t]
        written[t] = (forward.reads[t], *((_value(backward, o.value), a.index, o.dtype, o.over_rows) for o, a in mine))
    leader = {t: next(u for u in wrt if written[u] == written[t]) for t in wrt}
    kept = [k for k, a in enumerate(stores) if leader[a.tensor] == a.tensor]
    firsts = list(dict.fromkeys(leader[t] for t in wrt))
    program = Program(backward.inputs, backward.stages, tuple(backward.outputs[k] for k in kept)).pruned()
    return tuple(firsts.index(leader[t]) for t in wrt), program, tuple(stores[k] for k in kept)


def _passed(forward: Pass, backward: Program, stores: tuple[Access, ...]) -> tuple[dict[int, int], Program, tuple[Access, ...]]:
    """Operands whose gradient is a result's cotangent, element by element: (operand -> result), and the program without them."""
    cotangent = {symbol(f"g_{o.name}"): a for o, a in zip(forward.program.outputs, forward.stores)}
    found: dict[int, int] = {}
    for o, a in zip(backward.outputs, stores):
        given = cotangent.get(_value(backward, o.value))
        alone = sum(b.tensor == a.tensor for b in stores) == 1 and not o.over_rows
        if alone and given is not None and given.index == a.index and _alike(forward, a, given):
            found[a.tensor] = given.tensor
    kept = [k for k, a in enumerate(stores) if a.tensor not in found]
    program = Program(backward.inputs, backward.stages, tuple(backward.outputs[k] for k in kept)).pruned()
    return found, program, tuple(stores[k] for k in kept)


def _alike(forward: Pass, operand: Access, result: Access) -> bool:
    """Whether both tensors are of one shape and dtype, and the pass writes the result in one piece."""
    read, written = forward.reads[operand.tensor], forward.writes[result.tensor]
    whole = sum(a.tensor == result.tensor for a in forward.stores) == 1
    return whole and read.shape == written.shape and read.dtype == written.dtype and not read.complex


def _value(program: Program, name: str) -> object:
    return program.stage[name].value if name in program.stage else name


def _reading(backward: Program, saved: Mapping[str, Input]) -> Program:
    """The backward with some recomputed stages read from memory in their place."""
    stages = tuple(s for s in backward.stages if s.name not in saved)
    return Program((*backward.inputs, *saved.values()), stages, backward.outputs).pruned()


def _renumbered(operand: Operand, numbering: _Numbering) -> Operand:
    """The operand as the backward reads it."""
    found = operand.lookup
    return operand if found is None else replace(operand, lookup=replace(found, index=numbering.operands[found.index]))


def _kept(forward: Pass, name: str, number: int, dtype: str) -> tuple[Output, Access, Operand]:
    """A stage stored for the backward: its output, access and tensor [row axes..., lane where it has one]."""
    kind = forward.program.kinds[name]
    axes = [*(forward.axes if kind.rows else ()), *([forward.lane] if kind.lanes else [])]
    access = Access(number, tuple(Form.axis(a.name) for a in axes))
    return Output(f"keep_{name}", name, dtype), access, Operand(tuple(a.size for a in axes), dtype)


def _load(
    i: Input, load: Mapping[str, Access | None], store: Mapping[str, Access], kept: Mapping[str, Access], n: _Numbering
) -> Access | None:
    if i.name in store:
        return Access(n.cotangents + store[i.name].tensor, store[i.name].index)
    if i.name in kept:
        return Access(n.saved[i.name], kept[i.name].index)
    access = load[i.name]
    return None if access is None else Access(n.operands[access.tensor], access.index)


def _gradient_operand(forward: Pass, tensor: int, stores: Sequence[Access], number: int) -> Operand:
    """The gradient's tensor: like the operand, zeroed first where the region reads only part of it."""
    operand = forward.reads[tensor]
    sizes = {a.name: a.size for a in (*forward.axes, forward.lane)}
    mine = [a for a in stores if a.tensor == number]
    covered = sum((sp.Mul(*(sizes[x] for x in a.axes)) for a in mine), sp.Integer(0))
    dtype = "fp32" if _summed_later(operand) else operand.dtype
    return replace(operand, dtype=dtype, lookup=None, zero=not same(covered, sp.Mul(*operand.shape)))
