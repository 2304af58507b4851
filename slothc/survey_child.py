"""One side process of ``slothc coverage``: measures the models it is asked for, one after the other.

Jobs come in as lines of JSON on standard input, ``{"name", "peft", "dtype"}``. What goes out, one line of JSON each: ``{"stage"}`` as a
measurement enters a stage, so that whoever reads knows where a process died, and ``{"row"}`` when it is done. Whatever a model prints
goes to standard error.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .check import SLACK, TINY
from .errors import RegionDropped
from .explain import explain
from .tiny import causal_class, tiny_config

DRAWS, BATCH, LENGTH = 5, 2, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SINGLE = 1.5         # of eager's error, for one gradient by itself: two right roundings of few numbers differ by more than a tenth
FAR = 1e-4           # from eager, in fp32, where there is no float64 to tell which of the two is wrong
NARROW = (torch.float32, torch.bfloat16, torch.float16)

Values = dict[str, Tensor]
Stage = Callable[[str], None]


def measure(name: str, peft: str | None, dtype: str, stage: Stage = lambda _: None) -> dict[str, Any]:
    """The row of model type ``name``: ``status``, and as much of the rest as could be measured.

    Statuses: ``ok``; ``off`` (runs, and breaks the contract); ``crash`` (runs in eager, raises under sloth); ``no capture`` (raises under
    a backend that does nothing too); ``eager fails``; ``not built``. ``reason`` says more.
    """
    row: dict[str, Any] = {"name": name, "status": "ok", "reason": ""}
    at = "build"

    def enter(text: str) -> None:
        nonlocal at
        at = text
        stage(text)

    try:
        _measure(row, enter, peft, DTYPES[dtype])
    except Exception as error:
        row |= {"status": FAILED[at], "reason": _brief(error)}
    return row


FAILED = {"build": "not built", "eager": "eager fails", "do-nothing backend": "no capture", "sloth": "crash", "explain": "crash",
          "truth": "no truth"}  # fmt: skip


def _brief(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def _measure(row: dict[str, Any], enter: Stage, peft: str | None, dtype: torch.dtype) -> None:
    enter("build")
    model = build(row["name"], peft, dtype)
    draws = [inputs(model, seed) for seed in range(DRAWS)]
    enter("eager")
    eager = [step(model, model, x, seed) for seed, x in enumerate(draws)]
    enter("do-nothing backend")
    _capture_time(model, "eager", draws[0])                                 # what the first capture loads is nobody's compile time
    row["compile_nothing_s"], row["graphs_nothing"] = _capture_time(model, "eager", draws[0])
    enter("sloth")
    torch._dynamo.reset()
    with _dropped() as dropped:
        row["compile_s"], _ = _capture_time(model, "sloth", draws[0])
        compiled = torch.compile(model, backend="sloth")
        ours = [step(model, compiled, x, seed) for seed, x in enumerate(draws)]
    row["dropped"] = dropped
    enter("explain")
    torch._dynamo.reset()
    row |= explain(model, **draws[0]).as_dict()
    torch._dynamo.reset()
    enter("truth")
    row |= _judged(model, draws, eager, ours, dtype)


def build(name: str, peft: str | None, dtype: torch.dtype) -> nn.Module:
    """A tiny seeded model of type ``name`` in train mode: dropout off, no cache, no norm weight at its initial constant.

    ``peft="lora"``: adapters on all linears whose ``lora_B`` is no longer zero.
    """
    config = tiny_config(name)
    torch.manual_seed(0)
    model = causal_class(name)._from_config(config, dtype=dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() <= 1 and p.numel() > 1 and p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _with_lora(model) if peft == "lora" else model


def _with_lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return adapted.train()


def inputs(model: Any, seed: int) -> dict[str, Any]:
    """Keyword arguments of one step: ``input_ids`` and ``labels`` [2, 16], a quarter of the labels ignored; an image where one is read.

    A model with several heads reads a sequence for each and stacks their labels in a last dimension.
    """
    made = torch.Generator().manual_seed(seed)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 200
    heads = len(getattr(model, "lm_heads", [None]))
    ids = torch.randint(5, min(200, vocabulary), (BATCH * heads, LENGTH), generator=made)
    labels = ids.clone()
    labels[:, : LENGTH // 4] = -100
    if heads > 1:
        labels = labels.view(BATCH, heads, LENGTH).transpose(1, 2).contiguous()
    given: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if model.config.model_type == "git":
        size = model.config.vision_config.image_size
        given["pixel_values"] = torch.randn(BATCH, 3, size, size, generator=made).to(model.dtype)
    return given


def step(owner: nn.Module, run: Callable[..., Any], given: dict[str, Any], seed: int) -> Values:
    """``loss`` and the gradient of every parameter of ``owner`` that gets one."""
    owner.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = run(**given).loss
    loss.backward()
    found = {n: p.grad.detach().clone() for n, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def _capture_time(model: nn.Module, backend: str, given: dict[str, Any]) -> tuple[float, int]:
    """(seconds that a first forward takes longer than a second, graphs that Dynamo made)."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    compiled = torch.compile(model, backend=backend)
    spent = []
    for _ in range(2):
        start = time.perf_counter()
        compiled(**given)
        spent.append(time.perf_counter() - start)
    return max(spent[0] - spent[1], 0.0), counters["unique_graphs"] - before


@contextmanager
def _dropped() -> Iterator[list[str]]:
    """The texts of the RegionDropped warnings given inside the block, those of an earlier model included."""
    from .rewrite import _warned

    _warned.clear()
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegionDropped)
        yield texts
    texts += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, RegionDropped))


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


def truths(model: nn.Module, draws: list[dict[str, Any]]) -> list[Values]:
    """Every step in float64, from the same rounded parameters. Raises what float64 makes the model raise."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide.config, "_experts_implementation"):
        wide.config._experts_implementation = "eager"                       # the grouped products have no float64
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            return [step(wide, wide, _cast(x, torch.float64), seed) for seed, x in enumerate(draws)]
    finally:
        torch.set_default_dtype(torch.float32)


def _cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def _judged(
    model: nn.Module, draws: list[dict[str, Any]], eager: list[Values], ours: list[Values], dtype: torch.dtype
) -> dict[str, Any]:
    """Errors of both against truth, and whether the contract holds; why there is no float64 truth where there is none."""
    row: dict[str, Any] = {"truth": "float64"}
    try:
        true = truths(model, draws)
    except Exception as error:
        row = {"truth": "eager fp32", "no_truth": _brief(error)}
        plain = copy.deepcopy(model).float()
        true = eager if dtype == torch.float32 else [step(plain, plain, _cast(x, torch.float32), s) for s, x in enumerate(draws)]
    return row | judge(true, eager, ours, dtype, alone=true is eager)


def judge(true: list[Values], eager: list[Values], ours: list[Values], dtype: torch.dtype, alone: bool = False) -> dict[str, Any]:
    """``err(sloth) <= 1.10 * err(eager) + tiny``, err the relative L2 distance over all draws together, for the loss and for all
    gradients together; 1.5 in place of 1.10 for each gradient by itself. ``alone``: truth is eager itself, and tiny is 1e-4. ``share``
    is the larger of the two errors as a share of what is allowed.
    """
    lacking = sorted(set(eager[0]) ^ set(ours[0]))
    if lacking:
        return {"status": "off", "reason": f"gradients of eager and sloth are not of the same parameters: {', '.join(lacking[:4])}"}
    names = [n for n in true[0] if n != "loss" and n in eager[0]]
    tiny = FAR if alone else TINY[dtype]
    kinds = {"loss": ["loss"], "gradients": names}
    row: dict[str, Any] = {"errors": {k: {"eager": _distance(eager, true, n), "sloth": _distance(ours, true, n)} for k, n in kinds.items()}}
    broken = [f"{k}: {_says(e)}" for k, e in row["errors"].items() if not e["sloth"] <= SLACK * e["eager"] + tiny]
    floor = 1e-3 * _typical(true, names)
    single = {n: {"eager": _distance(eager, true, [n], floor), "sloth": _distance(ours, true, [n], floor)} for n in names}
    broken += [f"{n}: {_says(e)}" for n, e in single.items() if not e["sloth"] <= SINGLE * e["eager"] + tiny]
    worst = max(single, key=lambda n: single[n]["sloth"] / (single[n]["eager"] + tiny), default=None)
    row["worst"] = {"name": worst, **single[worst]} if worst else None
    row["share"] = max(e["sloth"] / (SLACK * e["eager"] + tiny) for e in row["errors"].values())
    row["holds"] = not broken
    return row | ({"status": "off", "reason": "; ".join(broken[:4])} if broken else {})


def _says(error: dict[str, float]) -> str:
    return f"{error['sloth']:.2e} from truth, eager {error['eager']:.2e}"


def _distance(found: list[Values], true: list[Values], names: list[str], floor: float = 0.0) -> float:
    """Relative L2 distance of the named values over all draws. ``floor``: an element's size below which truth counts as that large."""
    off = size = count = 0.0
    for f, t in zip(found, true):
        for n in names:
            off += float((f[n].double() - t[n].double()).square().sum())
            size += float(t[n].double().square().sum())
            count += t[n].numel()
    scale = max(size**0.5, floor * count**0.5)
    return off**0.5 / scale if scale else off**0.5


def _typical(true: list[Values], names: list[str]) -> float:
    count = sum(t[n].numel() for t in true for n in names)
    return (sum(float(t[n].double().square().sum()) for t in true for n in names) / max(count, 1)) ** 0.5


def main() -> None:
    """Serve jobs until standard input ends."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)

    def send(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    for job in map(json.loads, sys.stdin):
        send(row=measure(**job, stage=lambda at: send(stage=at)))
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
