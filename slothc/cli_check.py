"""``slothc check``: two independent witnesses of a rule's gradients, for every sample.

The first never runs torch: mpmath's differences (and the complex step, where every function is analytic) of the
symbolic program, or exact rational differences of a matrix formula. The second never looks at formulas: autograd of the
sample in float64, from which sloth's result and gradients must be no further than eager's (the contract of check.py).
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from slothc.gradients.matrix import lora_plan
from slothc.gradients.matrix_witness import witness as matrix_witness
from slothc.gradients.plan import Plan
from slothc.gradients.verify import witness
from slothc.gradients.vocabulary import Chain, loss_program
from slothc.patterns.rule import Match, Sample

from .check import DRAWS, SLACK, TINY
from .cli_rule import Rule, arguments, lifted, named
from .errors import RegionDropped

SYMBOLIC = 1e-15
_SIZES = {"M": 3, "K": 4, "N": 2, "r": 2}


@dataclass(frozen=True)
class Verdict:
    """One witness of one sample: the error it found and the largest that passes."""

    sample: str
    witness: str
    of: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def witnesses(name: str) -> tuple[str, bool]:
    """(table, did every witness agree)."""
    rule = named(name)
    verdicts = [verdict for sample in rule.samples for verdict in _verdicts(rule, sample)]
    table = Table("sample", "witness", "of", "error", "allowed", "", title=f"{rule.name}: {rule.math}")
    for v in verdicts:
        table.add_row(v.sample, v.witness, v.of, f"{v.error:.1e}", f"{v.allowed:.1e}", "ok" if v.passed else "WRONG")
    text = io.StringIO()
    Console(file=text, width=120, markup=False, emoji=False).print(table)
    return text.getvalue().rstrip(), bool(verdicts) and all(v.passed for v in verdicts)


def _verdicts(rule: Rule, sample: Sample) -> Iterator[Verdict]:
    found = lifted(rule, sample)
    if not found:
        yield Verdict(sample.name, "recognised", "the sample", math.inf, 0.0)
        return
    for plan in found.plans:
        yield from _row(sample, plan)
    for match in found.matches[:1]:
        yield from _structural(sample, match)
    yield from _autograd(sample)


def _row(sample: Sample, plan: Plan) -> Iterator[Verdict]:
    whole = plan.forward
    results = [output for output, store in zip(whole.program.outputs, whole.stores) if store.tensor < plan.results]
    report = witness(replace(whole.program, outputs=tuple(results)))
    for kind, errors in (("differences", report.errors), ("complex step", report.complex_errors)):
        for name, error in errors.items():
            yield Verdict(sample.name, kind, name, error, SYMBOLIC)


def _structural(sample: Sample, match: Match) -> Iterator[Verdict]:
    if match.rule == "lora_linear":
        plan = lora_plan(match.attrs["layout"], match.inputs["bias"] is not None, match.inputs["xa"] is None)
        for name, gap in matrix_witness(plan, _SIZES).items():
            yield Verdict(sample.name, "exact differences", f"d{name}", float(gap), 0.0)
    if match.rule == "cross_entropy":
        chain = Chain.parse(match.attrs["chain"])
        loss = loss_program(chain.dtype, chain.exprs, vocab=3, ignore_index=match.attrs["ignore_index"],
                            smoothing=match.attrs["label_smoothing"])  # fmt: skip
        for name, error in witness(loss, lanes=3).errors.items():
            yield Verdict(sample.name, "differences", name, error, SYMBOLIC)


def _autograd(sample: Sample) -> Iterator[Verdict]:
    """sloth in fp32 against float64 autograd, all draws together: at most 1.10 times eager's error, and a tiny more."""
    torch._dynamo.reset()
    compiled = torch.compile(sample.function, backend="sloth", dynamic=False)
    sums: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        for seed in range(DRAWS):
            ours, eager = (_values(f, arguments(sample, seed)) for f in (compiled, sample.function))
            truth = _values(sample.function, arguments(sample, seed), wide=True)
            for name, exact in truth.items():
                row = sums.setdefault(name, [0.0, 0.0, 0.0])
                row[0] += float((ours[name].double() - exact).square().sum())
                row[1] += float((eager[name].double() - exact).square().sum())
                row[2] += float(exact.square().sum())
    for name, (mine, reference, size) in sums.items():
        scale = math.sqrt(size) or 1.0
        allowed = SLACK * math.sqrt(reference) / scale + TINY[torch.float32]
        yield Verdict(sample.name, "float64 autograd", name, math.sqrt(mine) / scale, allowed)


def _values(function: Any, given: list[Any], wide: bool = False) -> dict[str, torch.Tensor]:
    """Results and gradients by name, for seeded cotangents. ``wide`` runs the same values in float64."""
    floating = [i for i, x in enumerate(given) if isinstance(x, torch.Tensor) and x.requires_grad]
    if wide:
        given = [x.detach().double().requires_grad_(x.requires_grad)
                 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]  # fmt: skip
    results = function(*given)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    pairs = [(r, c) for r, c in zip(results, cotangents) if r.requires_grad]
    wrt = [given[i] for i in floating]
    gradients = torch.autograd.grad([r for r, _ in pairs], wrt, [c for _, c in pairs], allow_unused=True)
    named_results = {f"result {k}": r.detach() for k, r in enumerate(results)}
    return named_results | {f"gradient of argument {i}": g for i, g in zip(floating, gradients) if g is not None}
