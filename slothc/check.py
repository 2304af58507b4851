"""The check before a rewrite is used: forward and VJP on random inputs at the real dtypes, judged against float64 truth.

The original nodes run twice, as they are and in float64; the rewrite must not be further from the truth than the original:
``err(sloth) <= 1.10 * err(eager) + tiny`` for every result and every gradient, err the relative L2 distance over all draws together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from .errors import VerificationFailed
from .permutations import is_permutation
from .sizes import size_of
from .spellings_call import settled
from .statistics import counts
from .subgraph import extract, in_double
from .view import GraphView

SLACK = 1.10
TINY = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-4, torch.float16: 1e-4}
DRAWS = 5
FEW, MOST = 1 << 12, 60   # two right programs that round apart differ by a tenth on few values: draws go on until they are not few
NEAR = 2.0                # times eager's error: a rounding's size. Near zeros of a divisor one element decides; other draws then judge
SMALL = 0.125
LARGE = 64
TRIAL = 1 << 22           # elements of one value in a trial
ZERO = 1e-9
MANY = 1 << 20            # elements in one draw that make further draws needless: its error is an average over them

Function = Callable[..., Any]


@dataclass
class Distances:
    """Squared distances to truth, and truth's own norm, over all draws."""

    ours: float = 0.0
    eager: float = 0.0
    truth: float = 0.0
    count: int = 0

    def add(self, ours: Tensor, eager: Tensor, truth: Tensor) -> None:
        self.ours += float((ours.double() - truth).square().sum())
        self.eager += float((eager.double() - truth).square().sum())
        self.truth += float(truth.square().sum())
        self.count += truth.numel()

    def errors(self) -> tuple[float, float]:
        """Relative L2 distances; absolute ones where truth is zero but for float64's own rounding (draws and cotangents are of size 1)."""
        size = max(self.count, 1) ** 0.5
        scale = self.truth**0.5 if self.truth**0.5 > ZERO * size else size
        return self.ours**0.5 / scale, self.eager**0.5 / scale

    def holds(self, tiny: float) -> bool:
        """The contract."""
        ours, eager = self.errors()
        return ours <= SLACK * eager + tiny


def check(
    view: GraphView, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node], ours: Function, resizable: bool = True
) -> dict[str, tuple[float, float]]:
    """The errors (ours, eager's) of every result and gradient of ``ours(*values of inputs)``. Raises ``VerificationFailed``.

    Where the nodes allow it, they run on tensors with large sizes made small: rows are independent, and a plan holds no size. A rewrite
    that is bound to the captured sizes (``resizable`` False: attention, whose mask and heads are compared exactly, element by element,
    when it is bound and when it runs) is not run at large ones.
    """
    counts["checked"] += 1
    resize = _smaller(view, [*inputs, *results])
    if not resizable and (resize or _large(view, nodes)):
        return {}
    with torch.random.fork_rng(devices=_cuda(view, inputs)), _same_autocast(view, inputs, results):
        errors = _at_any_size(view, nodes, inputs, results, ours, resize)
        off = [(mine, reference, tiny) for mine, reference, tiny in errors.values() if not mine <= SLACK * reference + tiny]
        if off and all(mine <= NEAR * reference + tiny for mine, reference, tiny in off):
            errors = _at_any_size(view, nodes, inputs, results, ours, resize, steady=True)
    for name, (mine, reference, tiny) in errors.items():
        if not mine <= SLACK * reference + tiny:
            raise VerificationFailed(f"{name} is {mine:.2e} from float64 truth, eager {reference:.2e}")
    return {name: (mine, reference) for name, (mine, reference, _) in errors.items()}


def _at_any_size(
    view: GraphView, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node], ours: Function,
    resize: dict[int, int], steady: bool = False,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    if resize:
        with contextlib.suppress(_Unresizable):
            return _errors(view, nodes, inputs, results, ours, resize, steady)
    return _errors(view, nodes, inputs, results, ours, {}, steady)


class _Unresizable(Exception):
    """The original nodes do not run at other sizes."""


def _smaller(view: GraphView, nodes: Sequence[fx.Node]) -> dict[int, int]:
    """Large leading sizes, and sizes of vocabularies, with what takes their place. What is a row's length too stays: plans hold those.

    Integers for all rows in one dimension (labels, after ``view(-1)``) are as many as the rows then are.
    """
    found: dict[int, int] = {}
    values = [v for v in map(view.example, nodes) if isinstance(v, Tensor) and v.dim() >= 1]
    flat = {int(v.shape[0]) for v in values if v.dim() == 1 and not v.is_floating_point() and isinstance(v.shape[0], int)}
    shapes = [v.shape for v in values]
    rows = {s[-1] for s in shapes if isinstance(s[-1], int)}
    for shape in shapes:
        found |= {s: LARGE + s % 64 for s in shape[:-1] if isinstance(s, int) and s > LARGE and s not in rows}
    if found:
        leading = [s[:-1] for s in shapes if len(s) > 2 and all(isinstance(n, int) for n in s)]
        found |= {prod(s): prod(found.get(n, n) for n in s) for s in leading if prod(s) in flat}
    return found


def _large(view: GraphView, nodes: Sequence[fx.Node]) -> bool:
    """Whether a value between is more than a trial should hold in float64."""
    values = (view.example(n) for n in nodes)
    return any(isinstance(v, Tensor) and prod(map(int, map(_hint, v.shape))) > TRIAL for v in values)


def _same_autocast(view: GraphView, inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> Any:
    """The nodes run under the autocast they were captured under, without its cache: leaves are made anew."""
    entered = view.autocast(results[0])
    if entered is not None:
        kind, dtype, enabled = entered[:3]
        return torch.autocast(kind, dtype, enabled, cache_enabled=False)
    device = next((v.device.type for v in map(view.example, inputs) if isinstance(v, Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _errors(
    view: GraphView, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node], ours: Function,
    resize: dict[int, int], steady: bool,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    eager = extract(view, nodes, inputs, results, resize)
    truth = in_double(eager)
    sums: dict[str, Distances] = {}
    dtypes: dict[str, torch.dtype] = {}
    torch.manual_seed(21 if steady else 20)
    for kind in ("positive",) if steady else ("normal", "positive", "small"):   # log, sqrt and powers have values at positive draws only
        for number in range(MOST):
            if number >= (4 * DRAWS if steady else DRAWS) and all(s.holds(TINY[dtypes[n]]) or s.count >= FEW for n, s in sums.items()):
                break
            values = [draw(view, n, resize, kind) for n in inputs]
            if resize:
                try:
                    eager(*values)
                except Exception as error:
                    raise _Unresizable from error
            if _compare(view, inputs, values, eager, truth, ours, sums, dtypes) > MANY:
                break
        if not dtypes.keys() - sums.keys():
            break
    for name in dtypes.keys() - sums.keys():
        raise VerificationFailed(f"{name} could not be checked: it is not finite at any draw, in eager or in float64")
    return {name: (*s.errors(), TINY[dtypes[name]]) for name, s in sums.items()}


def _cuda(view: GraphView, inputs: Sequence[fx.Node]) -> list[int]:
    found = {v.device.index or 0 for v in map(view.example, inputs) if isinstance(v, Tensor) and v.device.type == "cuda"}
    return sorted(found)


def draw(view: GraphView, node: fx.Node, resize: dict[int, int] | None = None, kind: str = "normal") -> Any:
    """A random value like the node's example: numbers of a ``kind``, integers (a permutation for one), fair booleans.

    Kinds: normal, positive (their sizes plus 0.1), small (an eighth: powers of scales that a model holds small leave fp16 otherwise).
    """
    example = view.example(node)
    if not isinstance(example, Tensor):
        return _hint(example)
    shape, strides = [_hint(s) for s in example.shape], [_hint(s) for s in example.stride()]
    if resize and any(s in resize for s in shape):
        order = sorted(range(len(shape)), key=lambda d: -strides[d])
        shape = [resize.get(s, s) for s in shape]
        expanded = [s == 0 for s in strides]
        step = 1
        for d in reversed(order):
            strides[d], step = (0, step) if expanded[d] else (step, step * shape[d])
    span = sum((n - 1) * s for n, s in zip(shape, strides) if n > 0) + 1
    if example.dtype.is_floating_point or example.dtype.is_complex:
        memory = torch.randn(span, dtype=example.dtype, device=example.device)
        memory = memory.abs() + 0.1 if kind == "positive" and not example.dtype.is_complex else memory
        memory = memory * SMALL if kind == "small" else memory
    elif is_permutation(view, node):
        return torch.randperm(prod(shape), device=example.device).to(example.dtype).view(shape)
    else:
        memory = torch.randint(0, _choices(view, node, resize or {}), (span,), device=example.device).to(example.dtype)
    return memory.as_strided(shape, strides)


def _choices(view: GraphView, node: fx.Node, resize: dict[int, int]) -> int:
    """How many values are drawn from for these integers: the rows of the smallest table that is looked up by them, two where none is.

    With few of many rows drawn, the gradient of a table would be judged by as few.
    """
    return _rows(view, node, resize) or 2


def _rows(view: GraphView, node: fx.Node, resize: dict[int, int]) -> int | None:
    found = []
    for user in view.users(node):
        op = view.op(user)
        rows: Any = None
        if op.kind in ("identity", "reshape", "expand", "cast", "index") and op.args[0] is node:
            rows = _rows(view, user, resize)
        elif op.kind == "embedding" and node is op.args[0]:
            rows = view.value(op.args[1]).shape[0]
        elif op.kind == "gather" and node is op.args[1]:
            rows = view.value(op.args[0]).shape[op.params["dim"]]
        if rows is not None:
            found.append(_hint(resize.get(rows, rows) if isinstance(rows, int) else rows))
    return min(found, default=None)


def _hint(value: Any) -> Any:
    value = settled(value, value)
    if isinstance(value, torch.SymInt):
        hint = value.node.hint
        return int(hint) if hint is not None else int(size_of(value))
    if isinstance(value, torch.SymFloat):
        return float(value.node.hint) if value.node.hint is not None else 0.5
    return value


def _compare(
    view: GraphView, inputs: Sequence[fx.Node], values: list[Any], eager: Function, truth: Function, ours: Function,
    sums: dict[str, Distances], dtypes: dict[str, torch.dtype],
) -> int:  # fmt: skip
    wrt = [k for k, v in enumerate(values) if view.needs_grad(inputs[k]) and isinstance(v, Tensor) and v.is_floating_point()]
    runs = [_run(f, values, wrt, wide) for f, wide in ((ours, False), (eager, False), (truth, True))]
    cotangents = [torch.randn_like(o) for o in runs[1].results]
    for run in runs:
        run.backward(cotangents)
    names = [f"result {k}" for k in range(len(cotangents))] + [f"gradient of {inputs[k]}" for k in wrt]
    for name, *found in zip(names, *(r.everything() for r in runs)):
        if found[0].shape != found[1].shape or found[0].dtype != found[1].dtype:
            mine, eagers = (f"{tuple(t.shape)} {t.dtype}" for t in found[:2])
            raise VerificationFailed(f"{name} is {mine}, eager's {eagers}")
        dtypes[name] = found[1].dtype
        finite = found[1].isfinite() & found[2].isfinite()                    # where eager itself overflows nothing is to be held
        if bool(finite.any()) or finite.numel() == 0:
            sums.setdefault(name, Distances()).add(*(t[finite] for t in found))
    return max((r.numel() for r in runs[1].results), default=0)


def _leaves(values: list[Any], wrt: list[int], dtype: torch.dtype | None) -> tuple[list[Any], list[Tensor]]:
    fresh = list(values)
    for k in wrt:
        value = values[k].detach() if dtype is None else values[k].detach().to(dtype)
        fresh[k] = value.requires_grad_()
    return fresh, [fresh[k] for k in wrt]


@dataclass
class _Run:
    results: list[Tensor]
    leaves: list[Tensor]
    gradients: list[Tensor]

    def backward(self, cotangents: list[Tensor]) -> None:
        pairs = [(r, c.to(r.dtype)) for r, c in zip(self.results, cotangents) if r.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(self.leaves)
        if pairs and self.leaves:
            found = torch.autograd.grad([r for r, _ in pairs], self.leaves, [c for _, c in pairs], allow_unused=True)
        self.gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(found, self.leaves)]

    def everything(self) -> list[Tensor]:
        return [*(r.detach() for r in self.results), *self.gradients]


def _run(f: Function, values: list[Any], wrt: list[int], wide: bool) -> _Run:
    arguments, leaves = _leaves(values, wrt, torch.float64 if wide else None)
    with torch.enable_grad():
        results = f(*arguments)
    return _Run([results] if isinstance(results, Tensor) else list(results), leaves, [])
