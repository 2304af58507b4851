"""The numerical contract, and row plans run piece by piece: what the tests of rules and kernels share.

``err(sloth) <= 1.10 * err(eager) + tiny`` against float64 truth, err the relative L2 distance over all draws together, for every
result and every gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from slothc.gradients.plan import Plan
from slothc.kernels import rowwise, rowwise_op
from torch import Tensor

from slothc.capture import captured
from slothc.found import Region, find
from slothc.options import Options
from slothc.view import GraphView

SLACK = 1.10
TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
DRAWS = 5
FEW, MOST = 1 << 12, 60   # on few values two right programs differ by a tenth: draws go on until they are not few
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., Any]


@dataclass
class Errors:
    """Squared distances to truth over all draws, by name."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    tiny: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> None:
        assert ours.shape == eager.shape, f"{name}: shape {tuple(ours.shape)}, eager's {tuple(eager.shape)}"
        assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager's {eager.dtype}"
        row = self.sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        self.tiny[name] = TINY[eager.dtype]
        for k, t in enumerate((ours.double() - truth, eager.double() - truth, truth)):
            row[k] += float(t.square().sum())
        row[3] += truth.numel()

    def broken(self, more: float = 0.0) -> dict[str, str]:
        """Every name that breaks the contract by ``more``, and how. Truths that are zero up to rounding count as a tenth of an
        ordinary size."""
        bad = {}
        for name, (ours, eager, truth, count) in self.sums.items():
            scale = max(truth**0.5, 0.1 * max(count, 1.0) ** 0.5)
            mine, reference = ours**0.5 / scale, eager**0.5 / scale
            if not mine <= SLACK * reference + self.tiny[name] + more:
                bad[name] = f"{name}: {mine:.2e} from truth, eager {reference:.2e}"
        return bad

    def judge(self, more: float = 0.0) -> None:
        """Fails with everything that is broken."""
        bad = self.broken(more)
        assert not bad, "; ".join(bad.values())

    def over(self, once: Function, draws: int = DRAWS, more: float = 0.0) -> None:
        """``judge`` over ``draws`` calls of ``once``, each of which adds a draw, and over more where what breaks is few values."""
        for number in range(MOST):
            if number >= draws and not any(self.sums[n][3] < FEW for n in self.broken(more)):
                break
            once()
        self.judge(more)


@dataclass
class Run:
    """Results and gradients of one run, each by name."""

    values: dict[str, Tensor]
    cotangents: list[Tensor]


def run(function: Function, arguments: Sequence[Any], cotangents: Sequence[Tensor] | None = None, wide: bool = False) -> Run:
    """Results and gradients of ``function`` on detached copies of ``arguments`` (in float64 if ``wide``); strides are kept."""
    leaves: dict[int, Tensor] = {}
    given = list(arguments)
    for k, a in enumerate(arguments):
        if isinstance(a, Tensor) and a.is_floating_point():
            given[k] = leaves[k] = (a.detach().double() if wide else a.detach()).requires_grad_()
    results = function(*given)
    results = [results] if isinstance(results, Tensor) else list(results)
    if cotangents is None:
        cotangents = [torch.randn_like(r) for r in results]
    pairs = [(r, c.to(r.dtype)) for r, c in zip(results, cotangents) if r.requires_grad]
    found = torch.autograd.grad([r for r, _ in pairs], list(leaves.values()), [c for _, c in pairs], allow_unused=True)
    values = {f"result {k}": r.detach() for k, r in enumerate(results)}
    values |= {f"gradient {k}": torch.zeros_like(x) if g is None else g for (k, x), g in zip(leaves.items(), found)}
    return Run(values, list(cotangents))


def in_float64(function: Function) -> Function:
    """The same function with the casts it writes widened: truth."""
    from torch.overrides import TorchFunctionMode

    narrow = (torch.float32, torch.bfloat16, torch.float16)

    class Wide(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
            if getattr(f, "__name__", "") in ("float", "half", "bfloat16") and isinstance(args[0], Tensor):
                return args[0].double()
            wide = [torch.float64 if isinstance(a, torch.dtype) and a in narrow else a for a in args]
            named = {k: torch.float64 if isinstance(a, torch.dtype) and a in narrow else a for k, a in (kwargs or {}).items()}
            return f(*wide, **named)

    def double(*arguments: Any) -> Any:
        with Wide():
            return function(*arguments)

    return double


def compare(errors: Errors, ours: Function, eager: Function, arguments: Sequence[Any], truth: Function | None = None) -> None:
    """One draw: ``ours(arguments, cotangents) -> values`` by name, against eager and float64."""
    reference = run(eager, arguments)
    exact = run(truth or in_float64(eager), arguments, reference.cotangents, wide=True)
    mine = ours(arguments, reference.cotangents)
    for name in mine:
        value = reference.values[name]
        errors.add(name, mine[name], value, exact.values[name])


@dataclass(frozen=True)
class Case:
    """A function lifted to one plan. ``places``: the argument that each operand of the plan is."""

    function: Function
    region: Region
    places: tuple[int, ...]
    fixed: frozenset[int] = frozenset()

    @property
    def plan(self) -> Plan:
        return self.region.plan

    def values(self, lowering: str) -> Function:
        """``f(arguments, cotangents) -> values`` by the named lowering, "torch" or "triton"."""
        return lambda arguments, cotangents: self._values(lowering, arguments, cotangents)

    def _values(self, lowering: str, arguments: Sequence[Any], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        plan, operands = self.plan, [arguments[k].detach() for k in self.places]
        written = getattr(rowwise.launcher(plan.forward), lowering)(operands)
        values = {f"result {k}": r for k, r in enumerate(written[: plan.results])}
        values |= {f"gradient {k}": torch.zeros_like(arguments[k]) for k in self.wanted(arguments)}
        if plan.backward is not None:
            reads = [*(operands[k] for k in plan.saved_operands), *(written[k] for k in plan.held), *cotangents]
            found = getattr(rowwise.launcher(plan.backward), lowering)(reads)
            for operand, target in zip(plan.wrt, plan.targets):
                name = f"gradient {self.places[operand]}"
                gradient = found[target] if target >= 0 else cotangents[-1 - target]
                tables = {operand: (operands[operand].shape, operands[operand].dtype)}
                values[name] = values[name] + rowwise_op.whole_gradient(plan, operand, gradient, reads, tables)
        return values

    def wanted(self, arguments: Sequence[Any]) -> list[int]:
        """Numbers of the arguments that get gradients."""
        return [k for k, a in enumerate(arguments) if k not in self.fixed and isinstance(a, Tensor) and a.is_floating_point()]

    def passes(self) -> list[Any]:
        return [p for p in (self.plan.forward, self.plan.backward) if p is not None]


def names_of(function: Function) -> list[str]:
    return list(inspect.signature(function).parameters)


def case(function: Function, arguments: Sequence[Any], fixed: Sequence[int] = ()) -> Case:
    """The one region that holds all of ``function``, all but ``fixed`` arguments wanting gradients. Fails where there is none,
    or more than one."""
    for k, a in enumerate(arguments):
        if isinstance(a, Tensor) and a.is_floating_point() and k not in fixed:
            a.requires_grad_()
    found = find(GraphView(captured(function, arguments)), Options())
    reasons = "; ".join(f"{m.node}: {m.reason}" for m in found.misses)
    assert len(found.regions) == 1, f"{len(found.regions)} regions; {reasons}"
    region = found.regions[0]
    places = [f"L_{n}_" for n in names_of(function)]
    assert all(n.target in places for n in region.operands), f"operands {region.operands} are not all arguments; {reasons}"
    return Case(function, region, tuple(places.index(str(n.target)) for n in region.operands), frozenset(fixed))


def cast(arguments: Iterable[Any], dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Any]:
    """Floating-point arguments in ``dtype``, everything on ``device``; strides are kept."""
    return [a.to(device=device, dtype=dtype if a.is_floating_point() else a.dtype) if isinstance(a, Tensor) else a for a in arguments]


def hold(c: Case, lowering: str, draw: Callable[[], Sequence[Any]], draws: int = DRAWS, more: float = 0.0) -> None:
    """The contract for plan ``c`` over ``draws`` draws of its arguments."""
    errors = Errors()
    torch.manual_seed(5)
    errors.over(lambda: compare(errors, c.values(lowering), c.function, draw()), draws, more)
