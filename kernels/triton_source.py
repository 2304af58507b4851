"""Triton source for any pass.

Two shapes of kernel. ``tile``: a block of rows by a block of lanes, each element read once; a reduction needs the whole row in the
block, or in several blocks side by side whose sizes are powers of two (``pieces``: 2304 = 2048 + 256). ``loop``: one row at a time, as
many passes over it as its reductions are deep, for rows that do not fit a block.
Column-vector gradients are summed by a persistent grid: each program keeps partial sums and writes one row of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sympy as sp
from slothc.gradients.bounds import bounds, span
from slothc.gradients.geometry import Access
from slothc.gradients.plan import Pass
from slothc.gradients.program import Input, Output, Reduce, Stage

from .binding import DTYPE
from .expression import TRITON, render
from .triton_arguments import Groups, arguments, tensors
from .triton_helpers import DIALECT, MOST_SUMS, module, tanh8
from .triton_pieces import COMBINED, block_names, in_pieces

ELEMENT = {"fp32": "tl.float32", "bf16": "tl.bfloat16", "fp16": "tl.float16", "fp64": "tl.float64", "i64": "tl.int64", "i32": "tl.int32",
           "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "bool": "tl.int1"}  # fmt: skip

SHORT = {"bf16", "fp16"}
LOOP_BLOCK = 4096     # lanes of a row that a loop kernel has in hand
AHEAD = 48 << 10      # bytes of shared memory for blocks of a row on their way
NARROW = 64.0         # of exponents: e^-64 is far from fp32's smallest number, and so is a sum of 2^31 of them


def source(p: Pass, groups: Groups, loop: bool, name: str = "kernel", pieces: int = 1, nvidia: bool = False) -> str:
    """The text of a module with one kernel ``name`` for pass ``p`` whose row axes are merged into ``groups``.

    ``pieces``: blocks that hold a row of a tile kernel, 1 unless ``splits(p)``. ``nvidia``: for a device from sm_75 on alone.
    """
    body = "\n".join(_Kernel(p, groups).text(name, loop, pieces)) + "\n"
    return module(body, nvidia)


def splits(p: Pass) -> bool:
    """Whether a row may lie in several blocks: its reductions are sums and maxima, whose parts combine."""
    return bool(p.program.reductions) and all(s.value.op in COMBINED for s in p.program.reductions if isinstance(s.value, Reduce))


def sums_rows(p: Pass) -> bool:
    """Whether a program sums over the rows that it goes through."""
    return any(o.over_rows and not p.folded(k) for k, o in enumerate(p.program.outputs))


def staged(p: Pass, loop: bool) -> bool:
    """Whether a tile kernel of the pass goes over many blocks of rows, and takes ``STAGES``: how many are on their way at once."""
    return not loop and sums_rows(p)


def flat(p: Pass) -> bool:
    """Whether the programs of a tile kernel are numbered through, a row's blocks one after another: nothing is summed in them."""
    return not p.program.reductions and not sums_rows(p)


def _is_tanh(e: sp.Basic) -> bool:
    return type(e).__name__ == "tanh"


class _Kernel:
    def __init__(self, p: Pass, groups: Groups) -> None:
        self.p, self.program, self.groups = p, p.program, groups
        self.arguments = arguments(p, groups)
        self.names = {a for a, *_ in self.arguments}
        folded = [p.folded(k) for k in range(len(self.program.outputs))]
        self.sums = [o for o, fold in zip(self.program.outputs, folded) if o.over_rows and not fold]
        self.parts = [o for o, fold in zip(self.program.outputs, folded) if fold]
        self.direct = [(o, a) for o, a in zip(self.program.outputs, p.stores) if not o.over_rows]
        self.kinds = self.program.kinds
        wide = {o.value for o, a in zip(self.program.outputs, p.stores) if p.writes[a.tensor].dtype not in SHORT}
        self.exact = self.program.needed(wide)                            # all else ends in results of 16 bits
        shorts = [s.expr for s in self.program.stages if s.dtype == "bf16" and _is_tanh(s.expr)]
        self.short = {e.args[0] for e in shorts}                          # eager has no more than eight bits of their tanh
        self.bounds = bounds(self.program)

    def text(self, name: str, loop: bool, pieces: int) -> Iterator[str]:
        pointers = [f"in{t}" for t in tensors(self.p)]
        pointers += [f"out{t}" for t in sorted({a.tensor for _, a in self.direct})]
        pointers += [f"sum_{o.name}" for o in self.sums] + [f"part_{o.name}" for o in self.parts]
        integers = [a for a, *_ in self.arguments] + [f"n{g}" for g in range(len(self.groups))]
        sizes = [i.name for i in self.program.inputs if i.role == "size"]
        yield "@triton.jit"
        yield f"def {name}({', '.join([*pointers, *integers, *sizes, 'ROWS', 'LANES'])},"
        constants = ("BLOCK_R", *block_names(pieces), "WIDE", "EVEN_R", "EVEN_L", *(("STAGES",) if staged(self.p, loop) else ()))
        yield f"{' ' * (5 + len(name))}{', '.join(f'{c}: tl.constexpr' for c in constants)}):"
        lines = self._loop() if loop else self._tile(pieces == 1)
        if pieces > 1:
            lines = in_pieces(lines, self._lanewise(), self._reduced(), pieces)
        yield from ("    " + line for line in lines)

    def _lanewise(self) -> set[str]:
        """The names in a tile kernel whose values have lanes."""
        values = {n for n, kind in self.kinds.items() if kind.lanes}
        sums = {f"acc_{o.name}" for o in self.sums if self.kinds[o.value].lanes}
        return {"lane", "lane_ok"} | values | sums | {f"at_{i.name}" for i in self.program.inputs if f"l_j_{i.name}" in self.names}

    def _reduced(self) -> dict[str, str]:
        """Reductions by name: how the blocks' are combined."""
        return {s.name: COMBINED[s.value.op] for s in self.program.reductions if isinstance(s.value, Reduce)}

    # addresses

    def _rows(self) -> Iterator[str]:
        yield "row = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]"
        yield "row_ok = (row < ROWS) | EVEN_R"
        yield "if WIDE:"
        yield "    row = row.to(tl.int64)"
        rest = "row"
        for g in reversed(range(len(self.groups))):
            if g:
                yield f"a{g} = {rest} % n{g}"
                yield f"q{g} = {rest} // n{g}"
                rest = f"q{g}"
            else:
                yield f"a0 = {rest}"

    def _lanes(self, start: str) -> Iterator[str]:
        yield f"lane = {start} + tl.arange(0, BLOCK_L)[None, :]"
        yield "lane_ok = (lane < LANES) | EVEN_L"
        yield "if WIDE:"
        yield "    lane = lane.to(tl.int64)"

    def _address(self, base: str, label: str) -> str:
        terms = [f"o_{label}"] if f"o_{label}" in self.names else []
        terms += [f"a{g} * s_{label}_{g}" for g in range(len(self.groups)) if f"s_{label}_{g}" in self.names]
        terms += [f"lane * l_{label}"] if f"l_{label}" in self.names else []
        return " + ".join([base, *terms])

    def _load(self, i: Input) -> Iterator[str]:
        access = self.p.loads[self.program.inputs.index(i)]
        assert access is not None
        lookup = self.p.reads[access.tensor].lookup
        if lookup is None:
            yield f"{i.name} = tl.load({self._address(f'in{access.tensor}', i.name)}{self._guard(self._masks(i.name))}).to(tl.float32)"
            return
        at, place, size = f"at_{i.name}", self._masks(f"j_{i.name}"), f"c_{i.name}"
        where = f"{self._address(f'in{lookup.index}', f'j_{i.name}')} + tl.zeros((1, 1), tl.int32)"
        yield f"{at} = tl.load({where}{self._guard(place)}).to(tl.int64)"
        if lookup.signed:
            yield f"{at} = tl.where({at} < 0, {at} + {size}, {at})"
        masks = [*dict.fromkeys((*place, *self._masks(i.name))), f"({at} >= 0) & ({at} < {size})"]
        address = f"{self._address(f'in{access.tensor}', i.name)} + {at} * g_{i.name}"
        yield f"{i.name} = tl.load({address}, mask={' & '.join(masks)}, other=float('nan')).to(tl.float32)"

    def _masks(self, label: str) -> list[str]:
        rows = any(f"s_{label}_{g}" in self.names for g in range(len(self.groups)))  # not where its row axes all have size 1 here
        return [m for m, on in (("row_ok", rows), ("lane_ok", f"l_{label}" in self.names)) if on]

    @staticmethod
    def _guard(masks: Sequence[str]) -> str:
        return f", mask={' & '.join(masks)}, other=0" if masks else ""

    def _inputs(self, names: set[str], rows: bool, lanes: bool | None = None) -> Iterator[str]:
        for i in self.program.inputs:
            if i.name in names and i.kind.rows == rows and (lanes is None or i.kind.lanes == lanes):
                if i.role == "data":
                    yield from self._load(i)
                elif i.role == "index":
                    yield f"{i.name} = {'places + start' if lanes else 'lane.to(tl.float32)'}"

    def _store(self, out: Output, access: Access) -> Iterator[str]:
        label = out.name if out.name not in self.program.input else f"out_{out.name}"
        kind = self.program.out_kind(out)
        masks = [m for m, on in (("row_ok", kind.rows), ("lane_ok", kind.lanes)) if on]
        mask = f", mask={' & '.join(masks)}" if masks else ""
        address = self._address(f"out{access.tensor}", label)
        if not masks:                                                     # one element: the value may be a block of one
            address += " + tl.zeros((1, 1), tl.int32)"
        if not kind.rows:                                                 # the same for all rows: written once
            yield "if block == 0:"
        yield f"{'' if kind.rows else '    '}tl.store({address}, {out.value}{mask})"

    def _store_part(self, out: Output) -> str:
        """A row of what is summed over some of the row axes afterwards, [rows, lanes] in fp32."""
        if self.kinds[out.value].lanes:
            return f"tl.store(part_{out.name} + row * LANES + lane, {out.value}, mask=row_ok & lane_ok)"
        return f"tl.store(part_{out.name} + row, {out.value}, mask=row_ok)"

    # equations

    def _equation(self, stage: Stage) -> str:
        if isinstance(stage.value, Reduce):
            return f"{stage.name} = {self._reduction(stage.value)}"
        value = stage.value
        if stage.dtype == "bf16" or stage.name not in self.exact:
            value = value.replace(lambda e: _is_tanh(e) and e.args[0] in self.short, lambda e: tanh8(*e.args))
        text = render(value, DIALECT)
        if stage.dtype in SHORT or stage.name not in self.exact:
            text = text.replace("_tanh(", "_tanh16(")
        if stage.dtype and stage.dtype != "fp32" and stage.value.free_symbols:
            text = f"{text}.to({ELEMENT[stage.dtype]}).to(tl.float32)"
        return f"{stage.name} = {text}"

    def _equations(self, whole: bool) -> Iterator[str]:
        """All stages. Where a block is a ``whole`` row, sums of which none waits for another are one reduction: it costs one barrier."""
        together = {s.name: group for group in self._together() for s in group} if whole else {}
        done: set[str] = set()
        for stage in self.program.stages:
            if stage.name in done:
                continue
            group = together.get(stage.name, (stage,))
            needed = self.program.needed({x.name for s in group for x in s.expr.free_symbols}) - done
            before = [s for s in self.program.stages if s.name in needed]
            yield from map(self._equation, before)
            done |= {s.name for s in (*before, *group)}
            if len(group) == 1:
                yield self._equation(stage)
            else:
                terms = ", ".join(self._term(s.expr) for s in group)
                yield f"{', '.join(s.name for s in group)} = _sums{len(group)}({terms})"

    def _together(self) -> Iterator[tuple[Stage, ...]]:
        """Sums over the same rows and lanes that are as deep as one another."""
        depth = self.program.depth
        sums = [s for s in self.program.reductions if isinstance(s.value, Reduce) and s.value.op == "sum" and self.kinds[s.name].rows]
        for level in sorted({depth[s.name] for s in sums}):
            alike = [s for s in sums if depth[s.name] == level]
            yield from (tuple(alike[k : k + MOST_SUMS]) for k in range(0, len(alike), MOST_SUMS))

    @staticmethod
    def _term(body: sp.Expr) -> str:
        return f"tl.where(lane_ok, {render(body, TRITON)}, 0.0)"

    def _reduction(self, value: Reduce) -> str:
        body = render(value.body, TRITON)
        if value.op == "sum":
            return f"tl.sum({self._term(value.body)}, axis=1)[:, None]"
        top = f"tl.max(tl.where(lane_ok, {body}, -float('inf')), axis=1)[:, None]"
        if value.op == "max":
            return top
        greatest = self._greatest(value)
        if greatest is not None:
            return f"{greatest} + tl.log(tl.sum(tl.where(lane_ok, tl.exp({body} - {greatest}), 0.0), axis=1)[:, None])"
        return f"_logsumexp({body}, lane_ok)"

    def _greatest(self, value: Reduce) -> float | None:
        """What no exponent of a logsumexp is above, where none is so far below that it would be lost: it needs no maximum then."""
        low, high = span(value.body, self.bounds)
        return high if high - low <= NARROW else None

    # kernels

    def _tile(self, whole: bool) -> Iterator[str]:
        needed = set(self.kinds)
        first = "tl.program_id(1) * BLOCK_L"
        if flat(self.p):                                                  # neighbours in a row are neighbours in time
            yield "across = tl.cdiv(LANES, BLOCK_L)"
            first = "tl.program_id(0) % across * BLOCK_L"
        yield from self._lanes(first)
        yield from self._inputs(needed, rows=False)
        for out in self.sums:
            yield f"acc_{out.name} = tl.zeros({self._sum_shape(out)}, tl.float32)"
        if self.sums:
            yield "for block in tl.range(tl.program_id(0), tl.cdiv(ROWS, BLOCK_R), tl.num_programs(0), num_stages=STAGES):"
        else:
            yield f"block = tl.program_id(0){' // across' if flat(self.p) else ''}"
        pad = "    " if self.sums else ""
        for line in (*self._rows(), *self._inputs(needed, rows=True), *self._equations(whole)):
            yield pad + line
        for out in self.sums:
            yield f"{pad}acc_{out.name} += tl.where({self._sum_mask(out)}, {out.value}, 0.0)"
        yield from (pad + line for out, access in self.direct for line in self._store(out, access))
        for out in self.parts:
            yield pad + self._store_part(out)
        for out in self.sums:                                             # rows meet once: in the loop they would at a barrier
            yield self._store_sum(out, f"tl.sum(acc_{out.name}, axis=0)[None, :]")

    def _sum_shape(self, out: Output) -> str:
        return "(BLOCK_R, BLOCK_L)" if self.kinds[out.value].lanes else "(BLOCK_R, 1)"

    def _sum_mask(self, out: Output) -> str:
        return "row_ok & lane_ok" if self.kinds[out.value].lanes else "row_ok"

    def _store_sum(self, out: Output, value: str) -> str:
        if self.kinds[out.value].lanes:
            return f"tl.store(sum_{out.name} + tl.program_id(0) * LANES + lane, {value}, mask=lane_ok)"
        return f"tl.store(sum_{out.name} + tl.program_id(0) + tl.zeros((1, 1), tl.int32), {value})"

    def _loop(self) -> Iterator[str]:
        """One row per step; pass d over its lanes finds the reductions of depth d, a last pass the results."""
        constants = {i.name for i in self.program.inputs if not i.kind.lanes}
        for out in self.sums:
            if not self.kinds[out.value].lanes:
                yield f"acc_{out.name} = tl.zeros((1, 1), tl.float32)"
        yield from self._inputs(constants, rows=False)
        yield "for block in range(tl.program_id(0), tl.cdiv(ROWS, BLOCK_R), tl.num_programs(0)):"
        for line in (*self._rows(), *self._inputs(constants, rows=True), *self._passes()):
            yield "    " + line
        for out in self.sums:
            if not self.kinds[out.value].lanes:
                yield self._store_sum(out, f"acc_{out.name}")

    def _passes(self) -> Iterator[str]:
        depth = self.program.depth
        last = max(depth.values(), default=0)
        for level in range(last + 1):
            for stage in self.program.stages:                             # per-row scalars known by now
                if not isinstance(stage.value, Reduce) and not self.kinds[stage.name].lanes and depth[stage.name] == level:
                    yield self._equation(stage)
            if level < last:
                yield from self._reduce_pass([s for s in self.program.reductions if depth[s.name] == level + 1])
        yield from self._final_pass()

    def _lane_loop(self, targets: set[str]) -> Iterator[str]:
        """The head of a loop over the lanes that makes the lane-wise values ``targets`` known."""
        needed = self.program.needed(targets)
        if any(i.name in needed and i.role == "index" for i in self.program.inputs):
            yield "places = tl.arange(0, BLOCK_L)[None, :].to(tl.float32)"  # a sum is cheaper than a conversion
        yield f"for start in tl.range(0, LANES, BLOCK_L, num_stages={self._ahead(needed)}):"
        for line in self._lanes("start"):
            yield "    " + line
        for rows in (False, True):
            for line in self._inputs(needed, rows=rows, lanes=True):
                yield "    " + line
        for stage in self.program.stages:
            if stage.name in needed and self.kinds[stage.name].lanes:
                yield "    " + self._equation(stage)

    def _ahead(self, needed: set[str]) -> int:
        """Blocks of a row on their way at once: three where they fit ``AHEAD``."""
        rows = [i for i in self.program.inputs if i.name in needed and i.role == "data" and i.kind.lanes and i.kind.rows]
        return max(1, min(3, AHEAD // max(1, LOOP_BLOCK * sum(self._size(i) for i in rows))))

    def _size(self, i: Input) -> int:
        """Bytes of one of its elements."""
        access = self.p.loads[self.program.inputs.index(i)]
        return DTYPE[self.p.reads[access.tensor].dtype].itemsize if access else 0

    def _reduce_pass(self, stages: list[Stage]) -> Iterator[str]:
        for s in stages:
            assert isinstance(s.value, Reduce)
            if s.value.op != "sum" and self._greatest(s.value) is None:
                yield f"top_{s.name} = tl.full((BLOCK_R, BLOCK_L), -float('inf'), tl.float32)"
            if s.value.op != "max":
                yield f"sum_of_{s.name} = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)"
        symbols = {x.name for s in stages for x in s.expr.free_symbols}
        yield from self._lane_loop({x for x in symbols if self.kinds[x].lanes})
        for s in stages:
            assert isinstance(s.value, Reduce)
            for line in self._accumulate(s.name, s.value):
                yield "    " + line
        for s in stages:
            assert isinstance(s.value, Reduce)
            if s.value.op == "sum":
                yield f"{s.name} = tl.sum(sum_of_{s.name}, axis=1)[:, None]"
                continue
            if s.value.op == "logsumexp" and (greatest := self._greatest(s.value)) is not None:
                yield f"{s.name} = {greatest} + tl.log(tl.sum(sum_of_{s.name}, axis=1)[:, None])"
                continue
            yield f"{s.name} = tl.max(top_{s.name}, axis=1)[:, None]"
            if s.value.op == "logsumexp":                                 # lse = M + log(sum_j s_j e^(m_j - M))
                shift = f"tl.where({s.name} == -float('inf'), 0.0, {s.name})"
                yield f"{s.name} = {shift} + tl.log(tl.sum(sum_of_{s.name} * tl.exp(top_{s.name} - {shift}), axis=1)[:, None])"

    def _accumulate(self, name: str, value: Reduce) -> Iterator[str]:
        body = render(value.body, TRITON)
        if value.op == "sum":
            yield f"sum_of_{name} += tl.where(lane_ok, {body}, 0.0)"
            return
        if value.op == "logsumexp" and (greatest := self._greatest(value)) is not None:
            yield f"sum_of_{name} += tl.where(lane_ok, tl.exp({body} - {greatest}), 0.0)"
            return
        yield f"next_{name} = tl.where(lane_ok, {body}, -float('inf'))"
        if value.op == "max":
            yield f"top_{name} = tl.maximum(top_{name}, next_{name}, propagate_nan=tl.PropagateNan.ALL)"
            return
        # s e^(m - M) + e^(x - M) for M = max(m, x): one of the two exponents is 0
        yield f"step_{name} = tl.where(next_{name} == top_{name}, 0.0, next_{name} - top_{name})"
        yield f"less_{name} = tl.exp(-tl.abs(step_{name}))"
        yield f"sum_of_{name} = tl.where(step_{name} > 0.0, sum_of_{name} * less_{name} + 1.0, sum_of_{name} + less_{name})"
        yield f"top_{name} = tl.maximum(top_{name}, next_{name}, propagate_nan=tl.PropagateNan.ALL)"

    def _final_pass(self) -> Iterator[str]:
        wide = [(o, a) for o, a in self.direct if self.program.out_kind(o).lanes]
        sums = [o for o in self.sums if self.kinds[o.value].lanes]
        parts = [o for o in self.parts if self.kinds[o.value].lanes]
        if wide or sums or parts:
            yield from self._lane_loop({o.value for o in (*(o for o, _ in wide), *sums, *parts)})
            for out in parts:
                yield "    " + self._store_part(out)
            yield from ("    " + line for out, access in wide for line in self._store(out, access))
            for out in sums:                                              # this program's own row of partial sums
                at = f"sum_{out.name} + tl.program_id(0) * LANES + lane"
                yield f"    mine = {at}"
                yield f"    part = tl.sum(tl.where(row_ok & lane_ok, {out.value}, 0.0), axis=0)[None, :]"
                yield "    tl.store(mine, tl.load(mine, mask=lane_ok, other=0.0) + part, mask=lane_ok)"
        for out in self.sums:
            if not self.kinds[out.value].lanes:
                yield f"acc_{out.name} += tl.sum(tl.where(row_ok, {out.value}, 0.0), axis=0)[None, :]"
        for out in self.parts:
            if not self.kinds[out.value].lanes:
                yield self._store_part(out)
        for out, access in self.direct:
            if not self.program.out_kind(out).lanes:
                yield from self._store(out, access)
