"""PEFT in all its forms: loss and every gradient under the contract, and the adapted linears a reader of the model would count.

A covering design over (architecture, form) in fp32 and bf16: every form on several architectures, every architecture with several forms.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tm
import torch
import whole
from peft.tuners.lora import LoraLayer
from peft_forms import LORA, OTHER
from torch import nn

DTYPES = (torch.float32, torch.bfloat16)
ARCHITECTURES = (
    "llama", "gemma2", "qwen3", "phi3", "glm4", "cohere2", "olmo2", "gpt2", "gpt_oss", "stablelm", "gptj", "starcoder2", "granite",
    "gpt_neox", "opt", "bloom", "phi", "mistral", "falcon", "qwen2", "smollm3", "gemma3_text", "mixtral", "deepseek_v3", "nanochat", "mpt",
)  # fmt: skip


INTACT = {
    "prompt": ("llama", "falcon"), "prefix": ("qwen3", "smollm3"), "p-tuning": ("glm4",),       # in both dtypes
    "ia3": ("olmo2",), "loha": ("mistral",), "lokr": ("granite",), "vera": ("qwen2",), "adalora": ("llama",), "oft": ("phi",),
}  # fmt: skip


def design() -> list[tuple[str, str, torch.dtype]]:
    """Every architecture with a form in both dtypes, every second one with another form in one of them."""
    lora, pairs = list(LORA), []
    for k, name in enumerate(ARCHITECTURES):
        pairs += [(name, lora[k % len(lora)], dtype) for dtype in DTYPES]
        pairs += [(name, lora[(k + 7) % len(lora)], DTYPES[k // 2 % 2])] if k % 2 == 0 else []
    for k, (form, names) in enumerate(INTACT.items()):
        pairs += [(name, form, dtype) for name in names for dtype in (DTYPES if k < 3 else DTYPES[k % 2 :][:1])]
    return pairs


def adapted_calls(owner: nn.Module) -> list[nn.Module]:
    """Filled, as the model runs, with the adapted linears that it calls."""
    calls: list[nn.Module] = []
    for m in owner.modules():
        if isinstance(m, LoraLayer) and not isinstance(m.get_base_layer(), nn.Embedding):
            m.register_forward_hook(lambda module, *rest: calls.append(module))
    return calls


def graphs_of_nothing(owner: nn.Module) -> int:
    """How many graphs Dynamo makes for a backend that does nothing."""
    graphs: list[Any] = []

    def nothing(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(owner, backend=nothing)(**tm.batch())
    return len(graphs)


COUNTED = {(name, form): dtype for name, form, dtype in design() if form == "dora" or form in OTHER}
"""Whose graphs are counted beside those of a backend that does nothing, and in which of its dtypes."""


@pytest.mark.parametrize("name, form, dtype", design(), ids=str)
def test_a_step_with_adapters(name: str, form: str, dtype: torch.dtype) -> None:
    owner = {**LORA, **OTHER}[form](whole.shallow(name, dtype))
    made = graphs_of_nothing(owner) if COUNTED.get((name, form)) == dtype else 0
    torch._dynamo.reset()
    graphs = whole.contract(owner, torch.compile(owner, backend="sloth"), dtype)

    if made:
        assert len(graphs) <= made
    if form in OTHER:
        return
    calls = adapted_calls(owner)
    owner(**tm.batch())
    missed = [m.reason for g in graphs for r in g.all() for m in r.found.misses if m.rule == "lora_linear"]
    if form == "dora":
        assert 0 < len(missed) <= len(calls) and all("DoRA" in reason for reason in missed)   # a compiled frame may serve several
        return
    heads = [m for m in calls if m is owner.get_output_embeddings()]                             # the head's adapter is part of the loss
    assert tm.counted(graphs)["lora_linear"] == len(calls) - len(heads) > 0 and missed == []
    assert len(heads) == (form == "lm_head")
    if heads:
        assert tm.counted(graphs)["cross_entropy"] == 1
        assert all(bool(p.grad.any()) for n, p in heads[0].named_parameters() if "lora_" in n)


def values(owner: Any, run: Any, draw: int) -> tm.Step:
    """Loss and logits: merged adapters train nothing."""
    with torch.no_grad():
        found = run(**tm.batch(seed=draw))
    return tm.Step(found.loss, {"logits": found.logits + 0})


@pytest.mark.parametrize("name, dtype", [("llama", DTYPES[0]), ("qwen3", DTYPES[1]), ("phi", DTYPES[0])], ids=str)
def test_adapters_switched_and_merged_between_steps(name: str, dtype: torch.dtype) -> None:
    owner = LORA["two active"](whole.shallow(name, dtype))
    run = torch.compile(owner, backend="sloth")
    for active in (["default", "second"], ["second"], ["default"]):
        owner.base_model.set_adapter(active)
        whole.contract(owner, run, dtype)
    owner.merge_adapter()
    graphs = whole.contract(owner, run, dtype, values)
    assert tm.counted(graphs)["lora_linear"] == 0
    owner.unmerge_adapter()
    whole.contract(owner, run, dtype)
