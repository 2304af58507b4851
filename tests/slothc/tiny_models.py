"""Tiny random models of real architectures, and how far a run of one is from float64 truth."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import slothc.backend
from slothc import rewrite as rewriting
from slothc.rewrite import Rewritten
from slothc.survey_judge import Wide
from slothc.tiny import tiny_config

TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
# Where "all-linear" is not possible: PEFT refuses the out_proj of Mamba blocks, breaks a router that returns a tuple, and turns experts
# into parametrisations that break the graph.
TARGETS = {
    "falcon_h1": ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama4_text": r".*(self_attn\.[qkvo]_proj|shared_expert\.(gate|up|down)_proj)",
    "deepseek_v3": r".*self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "mixtral": r".*self_attn\.[qkvo]_proj",
}


def model(
    name: str, dtype: torch.dtype = torch.float32, lora: bool = False, seed: int = 0, shallow: bool = False, **config: Any
) -> nn.Module:
    """A two-layer model of architecture ``name`` in train mode, no parameter at its initial constant.

    ``lora``: PEFT adapters on all linears, with an adapter that is no longer zero. ``shallow``: one layer, where all are alike: for tests
    of what is around a model, or added to it, most of whose time goes to Dynamo's reading layers. ``config``: what to change in the config.
    """
    torch.manual_seed(seed)
    settings = tiny_config(name)
    for key, value in config.items():
        setattr(settings, key, value)
    if shallow:
        _one_of_a_kind(settings)
    try:
        made = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    except ValueError:
        made = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() <= 1 and p.numel() > 1:
                p.add_(torch.randn_like(p) * 0.02)
    made = made.to(dtype).train()
    return adapted(made) if lora else made


def _one_of_a_kind(settings: Any) -> None:
    """One layer in place of several that are alike."""
    lists = {n: v for n, v in vars(settings).items() if isinstance(v, list) and len(v) == settings.num_hidden_layers}
    if getattr(settings, "first_k_dense_replace", None) or any(len(set(map(str, v))) > 1 for v in lists.values()):
        return
    for name, value in lists.items():
        setattr(settings, name, value[:1])
    settings.num_hidden_layers = 1


def adapted(base: nn.Module, rank: int = 8, dropout: float = 0.0, fp32: bool = False) -> nn.Module:
    """PEFT LoRA on all linears of ``base``, lora_B drawn at random. ``fp32``: PEFT's adapters in fp32 over any base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    targets = TARGETS.get(base.config.model_type, "all-linear")
    settings = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=dropout)
    made = get_peft_model(base, settings, autocast_adapter_dtype=fp32)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return made


def batch(size: int = 2, length: int = 16, seed: int = 0, vocab: int = 200) -> dict[str, Tensor]:
    """Keyword arguments of one training forward: input_ids [size, length] and labels, some of them ignored."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (size, length), generator=made)
    labels = ids.clone()
    labels[:, : length // 4] = -100
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Step:
    """One forward and backward: the loss, and the gradient of every parameter that got one."""

    loss: Tensor
    gradients: dict[str, Tensor]


def step(owner: nn.Module, run: Callable[..., Any] | None = None, **inputs: Any) -> Step:
    """Forward and backward of ``run`` (by default ``owner``); gradients are read from ``owner``."""
    for p in owner.parameters():
        p.grad = None
    loss = (owner if run is None else run)(**inputs).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}
    return Step(loss.detach(), found)


def truth(owner: nn.Module, **inputs: Any) -> Step:
    """The same step in float64, from the same (rounded) parameters."""
    wide = copy.deepcopy(owner).double()
    wide.config._experts_implementation = "eager"  # the grouped products have no float64
    with Wide():
        return step(wide, **inputs)


def distance(found: Step, true: Step) -> float:
    """Relative L2 distance over all gradients together."""
    pairs = [(found.gradients[n].double(), true.gradients[n].double()) for n in true.gradients]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())


def distances(found: Step, true: Step) -> dict[str, float]:
    """Relative L2 distance of every gradient. Where truth is zero up to rounding, relative to all gradients' typical size."""
    total = sum(float(g.double().square().sum()) for g in true.gradients.values())
    typical = (total / sum(g.numel() for g in true.gradients.values())) ** 0.5
    return {
        n: float((found.gradients[n].double() - g.double()).norm() / max(float(g.norm()), 1e-3 * typical * g.numel() ** 0.5))
        for n, g in true.gradients.items()
    }


@contextmanager
def watched() -> Iterator[list[Rewritten]]:
    """Every graph that the backend rewrites inside the block."""
    graphs: list[Rewritten] = []

    def record(*args: Any, **kwargs: Any) -> Rewritten:
        graphs.append(rewriting.rewrite(*args, **kwargs))
        return graphs[-1]

    slothc.backend.rewrite = record
    try:
        yield graphs
    finally:
        slothc.backend.rewrite = rewriting.rewrite


def counted(graphs: list[Rewritten]) -> Counter[str]:
    """What was used in all graphs, children included, by name."""
    total: Counter[str] = Counter()
    for item in (i for g in graphs for r in g.all() for i in r.used):
        total += item.counts() if hasattr(item, "counts") else Counter({item.rule: item.count})
    return total
