"""The numerical contract over a whole model: a step's loss and gradients, in eager and under sloth, held against float64.

Truth is the same model in float64 from the same rounded parameters. Where a step decides otherwise than it: ``survey_choices``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .check import SLACK, TINY
from .survey_choices import Choices

SINGLE = 1.5         # of eager's error, for one gradient by itself: two right roundings of few numbers differ by more than a tenth
FAR = 1e-4           # from eager, in fp32, where there is no float64 to tell which of the two is wrong
NARROW = (torch.float32, torch.bfloat16, torch.float16)

Values = dict[str, Tensor]


def brief(error: BaseException) -> str:
    """The error's type and what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def step(owner: nn.Module, run: Callable[..., Any], given: dict[str, Any], seed: int, choices: list[list[Tensor]] | None = None) -> Values:
    """``loss`` and the gradient of every parameter of ``owner`` that gets one. ``choices`` gets what the step decided."""
    owner.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    seen = Choices()
    with contextlib.nullcontext() if choices is None else seen:
        loss = run(**given).loss
        loss.backward()
    if choices is not None:
        choices.append(seen.made)
    found = {n: p.grad.detach().clone() for n, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


class Wide(TorchFunctionMode):
    """Every floating-point dtype that a model asks for is float64: an upcast to fp32 written in it is no rounding of the truth."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args, kwargs = torch.utils._pytree.tree_map(self._wide, (args, kwargs or {}))
        return function(*args, **kwargs)

    @staticmethod
    def _wide(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def truths(model: nn.Module, draws: list[dict[str, Any]], choices: list[list[Tensor]] | None = None) -> list[Values]:
    """Every step in float64, from the same rounded parameters. Raises what float64 makes the model raise."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide.config, "_experts_implementation"):
        wide.config._experts_implementation = "eager"                       # the grouped products have no float64
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            return [step(wide, wide, _cast(x, torch.float64), seed, choices) for seed, x in enumerate(draws)]
    finally:
        torch.set_default_dtype(torch.float32)


def _cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def truth_of(
    model: nn.Module, draws: list[dict[str, Any]], eager: list[Values], dtype: torch.dtype, choices: list[list[Tensor]] | None = None
) -> tuple[list[Values], dict[str, Any]]:
    """The true values of every step, and what the row says of them: why they are not float64's where the model has none. ``choices`` gets
    what the true steps decided, nothing where truth is ``eager`` itself."""
    try:
        return truths(model, draws, choices), {"truth": "float64"}
    except Exception as error:
        said = {"truth": "eager fp32", "no_truth": brief(error)}
    if choices is not None:
        choices.clear()
    if dtype == torch.float32:
        return eager, said
    plain = copy.deepcopy(model).float()
    return [step(plain, plain, _cast(x, torch.float32), seed, choices) for seed, x in enumerate(draws)], said


def judge(true: list[Values], eager: list[Values], ours: list[Values], dtype: torch.dtype) -> dict[str, Any]:
    """``err(sloth) <= 1.10 * err(eager) + tiny``, err the relative L2 distance over all draws together, for the loss and for all
    gradients together; 1.5 in place of 1.10 for each gradient by itself. Where truth is eager itself, tiny is 1e-4. ``share`` is the larger
    of the two errors as a share of what is allowed.
    """
    lacking = sorted({n for e, o in zip(eager, ours) for n in e.keys() ^ o.keys()})
    if lacking:
        return {"status": "off", "reason": f"gradients of eager and sloth are not of the same parameters: {', '.join(lacking[:4])}"}
    names = list(dict.fromkeys(n for e in eager for n in e if n != "loss"))
    tiny = FAR if true is eager else TINY[dtype]
    sums = {who: {n: _sums(run, true, n) for n in ("loss", *names)} for who, run in (("eager", eager), ("sloth", ours))}

    def errors(of: list[str], floor: float = 0.0) -> dict[str, float]:
        return {who: _distance([found[n] for n in of], floor) for who, found in sums.items()}

    row: dict[str, Any] = {"errors": {"loss": errors(["loss"]), "gradients": errors(names)}}
    broken = [f"{k}: {_says(e)}" for k, e in row["errors"].items() if not e["sloth"] <= SLACK * e["eager"] + tiny]
    floor = 1e-3 * _typical(true, names)
    single = {n: errors([n], floor) for n in names}
    broken += [f"{n}: {_says(e)}" for n, e in single.items() if not e["sloth"] <= SINGLE * e["eager"] + tiny]
    worst = max(single, key=lambda n: single[n]["sloth"] / (single[n]["eager"] + tiny), default=None)
    row["worst"] = {"name": worst, **single[worst]} if worst else None
    row["share"] = max(e["sloth"] / (SLACK * e["eager"] + tiny) for e in row["errors"].values())
    row |= {"holds": not broken, "draws": len(true)}
    return row | ({"status": "off", "reason": "; ".join(broken[:4])} if broken else {"status": "ok", "reason": ""})


def _says(error: dict[str, float]) -> str:
    return f"{error['sloth']:.2e} from truth, eager {error['eager']:.2e}"


def _sums(found: list[Values], true: list[Values], name: str) -> tuple[float, float, int]:
    """Of one value over all draws: the squares of its distance to truth and of truth, and how many numbers they are."""
    off, size, count = 0.0, 0.0, 0
    for mine, right in ((f.get(name), t.get(name)) for f, t in zip(found, true)):
        zero = right if mine is None else mine                             # no gradient (of an expert that no token chose) is a zero one
        if zero is None:
            continue
        right = torch.zeros_like(zero, dtype=torch.float64) if right is None else right.double()
        off += float((right if mine is None else mine - right).square().sum())
        size += float(right.square().sum())
        count += right.numel()
    return off, size, count


def _distance(sums: list[tuple[float, float, int]], floor: float = 0.0) -> float:
    """Relative L2 distance of all values together. ``floor``: an element's size below which truth counts as that large."""
    off, size, count = (sum(s) for s in zip(*sums)) if sums else (0.0, 0.0, 0)
    scale = max(size**0.5, floor * count**0.5)
    return off**0.5 / scale if scale else off**0.5


def _typical(true: list[Values], names: list[str]) -> float:
    """Root mean square of an element."""
    kept = [t[n].double() for t in true for n in names if n in t]
    return (sum(float(k.square().sum()) for k in kept) / max(sum(k.numel() for k in kept), 1)) ** 0.5
