"""One table over all rules: whatever a rule's file says of itself is tested here, new rules included.

Row rules: the sample gets its rule's name; results and gradients keep the numerical contract in every dtype, in every lowering, at odd
sizes and strides; the derived backward has both witnesses. Structural rules: recognised, and equal through ``torch.compile``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import DRAWS, DTYPES, Case, Errors, case, cast, compare, hold, run
from slothc.gradients.verify import witness
from slothc.patterns.rule import RowRule, Sample
from torch import Tensor

import slothc  # noqa: F401
from slothc.catalogue import rules
from slothc.errors import RegionDropped
from slothc.explain import explain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOWERINGS = ("torch", "triton") if DEVICE == "cuda" else ("torch",)       # test_rowwise.py has the interpreter
WITNESS = 1e-15

ROW = [pytest.param(r.name, s, id=f"{r.name}-{s.name}") for r in rules() if isinstance(r, RowRule) for s in r.samples]
STRUCTURAL = [pytest.param(r.name, s, id=f"{r.name}-{s.name}") for r in rules() if not isinstance(r, RowRule) for s in r.samples]


def drawn(sample: Sample, dtype: torch.dtype) -> list[Any]:
    return cast(sample.arguments(), dtype, DEVICE)


def noisy(sample: Sample, dtype: torch.dtype, seed: int) -> list[Any]:
    """``drawn``, with other numbers for every seed but 0: each tensor of ordinary numbers is drawn again, of its own size."""
    made, arguments = torch.Generator().manual_seed(seed), sample.arguments()
    for k, a in enumerate(arguments):
        if seed and isinstance(a, Tensor) and a.is_floating_point() and float(a.detach().abs().max()) < 100:
            arguments = (*arguments[:k], torch.randn(a.shape, generator=made, dtype=a.dtype) * a.detach().std(), *arguments[k + 1 :])
    return cast(arguments, dtype, DEVICE)


@functools.cache
def lifted(sample: Sample, dtype: torch.dtype) -> Case:
    return case(sample.function, drawn(sample, dtype))


def test_every_rule_has_samples() -> None:
    assert all(r.samples and r.math for r in rules())
    assert len({r.name for r in rules()}) == len(rules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, sample", ROW)
def test_row_sample_gets_its_name(name: str, sample: Sample, dtype: torch.dtype) -> None:
    region = lifted(sample, dtype).region
    assert dict(region.counts()) == {name: 1}
    assert region.rule == name


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, sample", ROW)
def test_row_sample_keeps_the_contract(name: str, sample: Sample, dtype: torch.dtype, lowering: str) -> None:
    hold(lifted(sample, dtype), lowering, lambda: drawn(sample, dtype))


@pytest.mark.parametrize("name, sample", ROW)
def test_derived_gradients_have_a_witness_without_torch(name: str, sample: Sample) -> None:
    plan = lifted(sample, torch.float32).plan
    whole = plan.forward.program
    report = witness(replace(whole, outputs=whole.outputs[: plan.results]))
    assert report.errors and report.worst < WITNESS, str(report)


# odd sizes: one plan serves every number of rows


def resized(arguments: Sequence[Any], sizes: dict[int, int]) -> list[Any]:
    """The arguments with sizes replaced by value, drawn anew; the order of strides is kept."""
    return [_resized(a, sizes) if isinstance(a, Tensor) else a for a in arguments]


def _resized(a: Tensor, sizes: dict[int, int]) -> Tensor:
    order = sorted(range(a.dim()), key=lambda d: -a.stride(d))
    made = torch.randn([sizes.get(a.shape[d], a.shape[d]) for d in order], device=a.device).to(a.dtype)
    return made.permute([order.index(d) for d in range(a.dim())])


def rows_of(arguments: Sequence[Any]) -> list[int]:
    """The sizes that the leading dimensions of all arguments have."""
    return sorted({s for a in arguments if isinstance(a, Tensor) for s in a.shape[:-1]})


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("rows", [0, 1, 3, 67])
@pytest.mark.parametrize("name, sample", ROW)
def test_any_number_of_rows(name: str, sample: Sample, rows: int, lowering: str) -> None:
    c, first = lifted(sample, torch.float32), drawn(sample, torch.float32)
    biggest = rows_of(first)[-1]
    sizes = {s: 1 for s in rows_of(first)} | {biggest: rows}
    hold(c, lowering, lambda: resized(drawn(sample, torch.float32), sizes), draws=1 if rows > 9 else DRAWS)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other row": lambda x: torch.randn(2 * x.shape[0], *x.shape[1:], device=x.device, dtype=x.dtype)[::2],
    "transposed": lambda x: torch.randn(*x.shape[:-2], x.shape[-1], x.shape[-2], device=x.device, dtype=x.dtype).mT,
    "offset": lambda x: torch.randn(*x.shape[:-1], x.shape[-1] + 3, device=x.device, dtype=x.dtype)[..., 3:],
    "expanded rows": lambda x: torch.randn(1, *x.shape[1:], device=x.device, dtype=x.dtype).expand_as(x),
}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, sample", ROW)
def test_any_strides(name: str, sample: Sample, layout: str, lowering: str) -> None:
    def draw() -> list[Any]:
        return [LAYOUTS[layout](a) if isinstance(a, Tensor) and a.dim() > 1 else a for a in drawn(sample, torch.float32)]

    hold(lifted(sample, torch.float32), lowering, draw)


def test_cotangents_without_strides_are_read_in_place() -> None:
    """The gradient of a sum is one element, expanded."""
    for rule in rules():
        if isinstance(rule, RowRule):
            c, sample = lifted(rule.samples[0], torch.float32), rule.samples[0]
            arguments = drawn(sample, torch.float32)
            result = run(c.function, arguments).values["result 0"]
            ones = torch.ones((), device=DEVICE).expand_as(result)
            truth = run(c.function, arguments, [ones], wide=True).values
            for lowering in LOWERINGS:
                for key, value in c.values(lowering)(arguments, [ones]).items():
                    torch.testing.assert_close(value.double(), truth[key], rtol=1e-4, atol=1e-4)


# odd widths: through torch.compile, where a width that the rule has no plan for is left to eager


def _allowed(sample: Sample, lanes: int) -> bool:
    try:
        sample.function(*_widened(sample, lanes))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def _widened(sample: Sample, lanes: int) -> list[Any]:
    arguments = drawn(sample, torch.float32)
    last = {a.shape[-1] for a in arguments if isinstance(a, Tensor) and a.dim()}
    made = resized(arguments, {s: lanes for s in last})
    # a norm of one column is sign(x) up to eps: near 0 the error of one element is all of the error, for eager too
    return [a + a.sign() / 2 if lanes == 1 and isinstance(a, Tensor) and a.is_floating_point() else a for a in made]


def widths() -> Iterator[Any]:
    for param in ROW:
        for lanes in (1, 2, 4097):
            if _allowed(param.values[1], lanes):                          # a fused projection has no single column
                yield pytest.param(*param.values, lanes, id=f"{param.id}-{lanes}")


def compiled(function: Callable[..., Any], drops: str = "error") -> Callable[..., dict[str, Tensor]]:
    """``function`` by ``torch.compile(backend="sloth")``; a dropped region is an error, or with "ignore" left to eager."""
    torch._dynamo.reset()
    fast = torch.compile(function, backend="sloth", dynamic=False)

    def values(arguments: Sequence[Any], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter(drops, RegionDropped)
            return run(fast, arguments, cotangents).values

    return values


@pytest.mark.parametrize("name, sample, lanes", list(widths()))
def test_any_width(name: str, sample: Sample, lanes: int) -> None:
    errors, ours = Errors(), compiled(sample.function, "ignore" if lanes == 1 else "error")   # a norm of one column cancels
    torch.manual_seed(3)
    errors.over(lambda: compare(errors, ours, sample.function, _widened(sample, lanes)), 2 if lanes > 1000 else DRAWS)


# structural rules


@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:2], ids=str)
@pytest.mark.parametrize("name, sample", STRUCTURAL)
def test_structural_sample(name: str, sample: Sample, dtype: torch.dtype) -> None:
    errors, ours = Errors(), compiled(sample.function)
    torch.manual_seed(3)
    seeds = iter(range(1000))
    errors.over(lambda: compare(errors, ours, sample.function, noisy(sample, dtype, next(seeds))))
    leaves = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in drawn(sample, dtype)]
    assert explain(sample.function, *leaves).counts.get(name) == 1
