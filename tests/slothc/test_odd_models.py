"""Models that are in no list: the numerical contract, and the counts that a reader of their source would make."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import tiny_models as tm
import torch
from odd_models.assembled import OddModel, batch
from odd_models.models import SPELLINGS, odd

from slothc.errors import RegionDropped

DRAWS = 5


def truth(model: OddModel, seed: int) -> tm.Step:
    with tm.Wide():
        return tm.step(copy.deepcopy(model).double(), **batch(seed))


def held(model: OddModel, dtype: torch.dtype) -> Counter[str]:
    """The contract over five batches; what was found."""
    with tm.watched() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        compiled = torch.compile(model, backend="sloth")
        ours = [tm.step(model, compiled, **batch(seed)) for seed in range(DRAWS)]
    eager = [tm.step(model, **batch(seed)) for seed in range(DRAWS)]
    true = [truth(model, seed) for seed in range(DRAWS)]
    tiny = tm.TINY[dtype]
    assert set(ours[0].gradients) == set(eager[0].gradients) == set(true[0].gradients)
    assert off([s.loss for s in ours], [s.loss for s in true]) <= 1.10 * off([s.loss for s in eager], [s.loss for s in true]) + tiny
    assert apart(ours, true) <= 1.10 * apart(eager, true) + tiny
    for name in true[0].gradients:
        assert apart(ours, true, name) <= 1.5 * apart(eager, true, name) + tiny, name
    return Counter({k: v for k, v in tm.counted(graphs).items() if k != "rowwise"})


def off(found: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    a, b = torch.stack(found).double(), torch.stack(true).double()
    return float((a - b).norm() / b.norm())


def apart(found: list[tm.Step], true: list[tm.Step], name: str | None = None) -> float:
    """Relative L2 distance of the gradient called ``name``, or of all together. One smaller than a thousandth of the usual size counts
    as that large."""
    names = [name] if name else list(true[0].gradients)
    gone = sum(float((f.gradients[n].double() - t.gradients[n].double()).square().sum()) for f, t in zip(found, true) for n in names)
    size = sum(float(t.gradients[n].double().square().sum()) for t in true for n in names)
    every = [g for t in true for g in t.gradients.values()]
    usual = sum(float(g.double().square().sum()) for g in every) / sum(g.numel() for g in every)
    return (gone / max(size, 1e-6 * usual * sum(t.gradients[n].numel() for t in true for n in names))) ** 0.5


@pytest.mark.parametrize("name", SPELLINGS)
def test_contract(name: str) -> None:
    held(odd(name), torch.float32)
