"""Whole models: loss and every gradient under the numerical contract, and the counts a reader of the source would make.

Truth is the same model in float64, every upcast to fp32 widened too (``tiny_models.truth``).
"""

from __future__ import annotations

import warnings

import pytest
import tiny_models as tm
import torch

from slothc.errors import RegionDropped

# What the source of each architecture says, in two layers: norm calls (of one kind), rotated tensors, gated activations (dense, shared
# and routed ones), calls of scaled_dot_product_attention, and linears that PEFT adapts ("all-linear" where it can, see tm.TARGETS).
COUNTS: dict[str, dict[str, int]] = {
    "llama": {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 14},
    "qwen3": {"rms_norm": 9, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 14},
    "gemma2": {"rms_norm": 9, "rope": 4, "gated_mlp": 2, "lora_linear": 14},
    "gemma3_text": {"rms_norm": 13, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 14},
    "phi3": {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 8},
    "glm4": {"rms_norm": 9, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 12},
    "cohere2": {"layer_norm": 3, "rope": 2, "gated_mlp": 2, "attention": 2, "lora_linear": 14},
    "olmo2": {"rms_norm": 9, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 14},
    "gpt_oss": {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "lora_linear": 8},
    "nanochat": {"rms_norm": 10, "rope": 4, "attention": 2, "lora_linear": 12},
    "llama4_text": {"rms_norm": 9, "rope": 4, "gated_mlp": 4, "attention": 2, "lora_linear": 14},
    "deepseek_v3": {"rms_norm": 9, "rope": 4, "gated_mlp": 3, "attention": 2, "lora_linear": 10},
    "mixtral": {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 8},
    "stablelm": {"layer_norm": 5, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 14},
    "gptj": {"layer_norm": 3, "rope": 4, "attention": 2, "lora_linear": 12},
    "starcoder2": {"layer_norm": 5, "rope": 4, "attention": 2, "lora_linear": 12},
    "granite": {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "attention": 2, "lora_linear": 14},
    "falcon_h1": {"rms_norm": 5, "rope": 4, "gated_mlp": 4, "attention": 2, "lora_linear": 16},
}
# deepseek_v3: one dense layer, one of experts. mixtral: every token meets every expert, or else two correct bf16 programs may choose
# different ones, and the distance says nothing about either.
SETTINGS = {"deepseek_v3": {"first_k_dense_replace": 1}, "mixtral": {"num_experts_per_tok": 4}}
NAMES = list(COUNTS)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_as_near_to_truth_as_eager(name: str, lora: bool, dtype: torch.dtype) -> None:
    owner, inputs, tiny = tm.model(name, dtype, lora, **SETTINGS.get(name, {})), tm.batch(), tm.TINY[dtype]
    with tm.watched() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        ours = tm.step(owner, torch.compile(owner, backend="sloth"), **inputs)
    eager, true = tm.step(owner, **inputs), tm.truth(owner, **inputs)

    assert set(ours.gradients) == set(eager.gradients) == set(true.gradients)
    off, reference = (abs(float(s.loss) / float(true.loss) - 1) for s in (ours, eager))
    assert off <= 1.10 * reference + tiny
    assert tm.distance(ours, true) <= 1.10 * tm.distance(eager, true) + tiny
    single, usual = tm.distances(ours, true), tm.distances(eager, true)
    assert {n: (single[n], usual[n]) for n in single if single[n] > 1.5 * usual[n] + tiny} == {}

    expected = {"cross_entropy": 1, **{k: v for k, v in COUNTS[name].items() if lora or k != "lora_linear"}}
    found = tm.counted(graphs)
    assert {k: v for k, v in found.items() if k != "rowwise"} == expected
    assert len(graphs) == 1
