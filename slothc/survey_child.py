"""One side process of ``slothc coverage``: measures the models it is asked for, one after the other.

Jobs come in as lines of JSON on standard input, ``{"name", "peft", "dtype", "device"}``. What goes out, one line of JSON each:
``{"stage"}`` as a measurement enters a stage, so that whoever reads knows where a process died, and ``{"row"}`` when it is done. Whatever
a model prints goes to standard error.
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
from torch import nn

from .errors import RegionDropped
from .explain import explain
from .survey_choices import too_many, turned
from .survey_judge import Values, brief, judge, step, truth_of
from .tiny import causal_class, tiny_config

DRAWS, MORE, BATCH, LENGTH = 5, 20, 2, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Stage = Callable[[str], None]


def measure(
    name: str, peft: str | None, dtype: str, stage: Stage = lambda _: None, report: bool = True, device: str = "cpu"
) -> dict[str, Any]:
    """The row of model type ``name``, which runs on ``device``: ``status``, and as much of the rest as could be measured.

    Statuses: ``ok``; ``off`` (runs, and breaks the contract); ``crash`` (runs in eager, raises under sloth); ``no capture`` (raises under
    a backend that does nothing too); ``eager fails``; ``not built``. ``reason`` says more. Without ``report`` what was found is left out,
    and the compile times are of cold captures.
    """
    row: dict[str, Any] = {"name": name, "status": "ok", "reason": ""}
    at = "build"

    def enter(text: str) -> None:
        nonlocal at
        at = text
        stage(text)

    try:
        _measure(row, enter, peft, DTYPES[dtype], report, torch.device(device))
    except Exception as error:
        row |= {"status": FAILED[at], "reason": brief(error)}
    return row


FAILED = {"build": "not built", "eager": "eager fails", "do-nothing backend": "no capture", "sloth": "crash", "explain": "crash",
          "truth": "no truth"}  # fmt: skip


def _measure(row: dict[str, Any], enter: Stage, peft: str | None, dtype: torch.dtype, report: bool, device: torch.device) -> None:
    enter("build")
    model = build(row["name"], peft, dtype).to(device)
    draws = [inputs(model, seed) for seed in range(DRAWS)]
    fresh = copy.deepcopy(model)
    enter("eager")
    eager = [step(model, model, x, seed) for seed, x in enumerate(draws)]
    enter("do-nothing backend")
    if report:
        _capture_time(model, "eager", draws[0])                             # what the first capture loads is nobody's compile time
    row["compile_nothing_s"], row["graphs_nothing"] = _capture_time(model, "eager", draws[0])
    enter("sloth")
    with _dropped() as dropped:
        row["compile_s"], row["graphs_sloth"] = _capture_time(model, "sloth", draws[0])
        compiled = torch.compile(model, backend="sloth")
        ours = [step(model, compiled, x, seed) for seed, x in enumerate(draws)]
    row["dropped"] = dropped
    enter("truth")
    row |= _judged(model, fresh, compiled, draws, eager, ours, dtype)
    if report:
        enter("explain")
        torch._dynamo.reset()
        row |= explain(model, **draws[0]).as_dict()


def _judged(
    model: nn.Module, fresh: nn.Module, compiled: Callable[..., Any], draws: list[dict[str, Any]],
    eager: list[Values], ours: list[Values], dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """Whether the contract holds. Where it does not over five draws, the errors over more decide: that of a few numbers (the losses, a
    gradient of four elements) is not known from five. ``fresh``: the model as it was before its first step."""
    true, said = truth_of(fresh, draws, eager, dtype)
    verdict = judge(true, eager, ours, dtype)
    if verdict["status"] == "off" and "errors" in verdict:
        verdict = _judged_over_more(model, fresh, compiled, dtype)
    return said | verdict


def _judged_over_more(model: nn.Module, fresh: nn.Module, compiled: Callable[..., Any], dtype: torch.dtype) -> dict[str, Any]:
    """The verdict over all draws; where they break the contract in 16 bits, over those in which nobody chose otherwise than the truth
    (``survey_choices``), if no more of sloth's than chance explains did. ``turned`` says in how many who did."""
    draws = [inputs(model, seed) for seed in range(DRAWS + MORE)]
    made: dict[str, list[list[torch.Tensor]]] = {"eager": [], "sloth": [], "truth": []}
    eager = [step(model, model, x, seed, made["eager"]) for seed, x in enumerate(draws)]
    ours = [step(model, compiled, x, seed, made["sloth"]) for seed, x in enumerate(draws)]
    true = truth_of(fresh, draws, eager, dtype, made["truth"])[0]
    verdict = judge(true, eager, ours, dtype)
    if verdict["status"] == "ok" or dtype == torch.float32:
        return verdict
    theirs, mine = (turned(made[who], made["truth"] or made["eager"]) for who in ("eager", "sloth"))
    kept = [k for k, (a, b) in enumerate(zip(theirs, mine)) if not a and not b]
    said = {"turned": {"eager": sum(theirs), "sloth": sum(mine)}}
    if len(kept) == len(draws) or len(kept) < DRAWS or too_many(sum(mine), sum(theirs)):
        return verdict | said
    left = [eager[k] for k in kept]
    return judge(left if true is eager else [true[k] for k in kept], left, [ours[k] for k in kept], dtype) | said


def build(name: str, peft: str | None, dtype: torch.dtype, **settings: Any) -> nn.Module:
    """A tiny seeded model of type ``name`` in train mode: dropout off, no cache, no norm weight at its initial constant.

    ``peft="lora"``: adapters on all linears whose ``lora_B`` is no longer zero. ``settings``: what to change in the config.
    """
    config = tiny_config(name)
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = _as_loaded(causal_class(name)._from_config(config, dtype=dtype), dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() <= 1 and p.numel() > 1 and p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _with_lora(model) if peft == "lora" else model


def _as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """Every parameter in ``dtype``, as a checkpoint is loaded: what a model makes in fp32 by itself too, unless it is to stay that."""
    stay = {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    stay |= {*(model._keep_in_fp32_modules_strict or ())}
    for name, p in model.named_parameters():
        if p.is_floating_point() and not any(f".{part}." in f".{name}." for part in stay):
            p.data = p.data.to(dtype)
    return model


def _with_lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return adapted.train()


def inputs(model: Any, seed: int, batch: int = BATCH, length: int = LENGTH) -> dict[str, Any]:
    """Keyword arguments of one step: ``input_ids`` and ``labels`` [batch, length], a quarter of the labels ignored; an image where one is
    read.

    A model with several heads reads a sequence for each and stacks their labels in a last dimension.
    """
    made = torch.Generator().manual_seed(seed)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 200
    heads = len(getattr(model, "lm_heads", [None]))
    ids = torch.randint(5, min(200, vocabulary), (batch * heads, length), generator=made)
    labels = ids.clone()
    labels[:, : length // 4] = -100
    if heads > 1:
        labels = labels.view(batch, heads, length).transpose(1, 2).contiguous()
    given: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if model.config.model_type == "git":
        size = model.config.vision_config.image_size
        given["pixel_values"] = torch.randn(batch, 3, size, size, generator=made).to(model.dtype)
    return {name: t.to(model.device) for name, t in given.items()}


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
