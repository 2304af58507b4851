"""Whole models under the numerical contract: the same steps by sloth, by eager and in float64, judged over all draws together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tiny_models as tm
import torch
from torch import nn

from slothc.errors import RegionDropped
from slothc.rewrite import Rewritten
from slothc.survey_child import judge

DRAWS, MORE = 5, 15
# Every token meets every expert, or else two correct bf16 programs may choose different ones.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1, "num_experts_per_tok": 4},
    "mixtral": {"num_experts_per_tok": 4},
    "gpt_oss": {"num_experts_per_tok": 4},
}
# One step of ``owner``: forward and backward by ``run`` on the inputs of draw ``k``.
Step = Callable[[Any, Callable[..., Any], int], tm.Step]


def model(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    return tm.model(name, dtype, **{**SETTINGS.get(name, {}), **config})


def shallow(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """The same with one layer where all are alike."""
    return model(name, dtype, shallow=True, **config)


def plain(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
    """Forward and backward, nothing around them."""
    return tm.step(owner, run, **tm.batch(seed=draw))


def steps(owner: Any, run: Callable[..., Any], step: Step = plain, draws: range = range(DRAWS)) -> list[tm.Step]:
    """A step for each draw, with the same random numbers whoever runs."""
    found = []
    for draw in draws:
        torch.manual_seed(11 + draw)
        found.append(step(owner, run, draw))
    return found


@contextmanager
def widened(owner: nn.Module) -> Iterator[nn.Module]:
    """A float64 copy; inside the block every dtype that a model asks for is float64 too."""
    wide = copy.deepcopy(owner).double()
    for m in wide.modules():
        if hasattr(m, "config"):
            m.config._experts_implementation = "eager"                     # the grouped products have no float64
    with tm.Wide():
        yield wide


@contextmanager
def used() -> Iterator[list[Rewritten]]:
    """The graphs rewritten inside the block, where nothing found may be dropped."""
    with tm.watched() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        yield graphs


def broken(ours: list[tm.Step], eager: list[tm.Step], true: list[tm.Step], dtype: torch.dtype) -> str:
    """What breaks the contract, of the losses, all gradients together and single ones; empty if nothing does."""
    assert {n: (g.dtype, g.shape) for n, g in ours[0].gradients.items()} == {n: (g.dtype, g.shape) for n, g in eager[0].gradients.items()}
    assert ours[0].loss.dtype == eager[0].loss.dtype
    verdict = judge(*([{"loss": s.loss, **s.gradients} for s in run] for run in (true, eager, ours)), dtype)
    return "" if verdict["holds"] else verdict["reason"]


def contract(
    owner: nn.Module, run: Callable[..., Any], dtype: torch.dtype, step: Step = plain, exact: Step | None = None
) -> list[Rewritten]:
    """``step`` by ``run`` (the compiled ``owner``) is as near to truth as by ``owner`` itself. ``exact``: the step that gives the truth.

    Where five draws say no, the errors over more decide: that of a gradient of a few elements is not known from five.
    Returns the graphs that were rewritten.
    """
    found: tuple[list[tm.Step], ...] = ([], [], [])
    graphs: list[Rewritten] = []
    for draws in (range(DRAWS), range(DRAWS, DRAWS + MORE)):
        with used() as graphs_now:
            found[0].extend(steps(owner, run, step, draws))
        graphs += graphs_now
        found[1].extend(steps(owner, owner.forward, step, draws))
        with widened(owner) as wide:
            found[2].extend(steps(wide, wide, exact or step, draws))
        reason = broken(*found, dtype)
        if not reason:
            return graphs
    raise AssertionError(reason)
