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
FEW, BATCHES = 32, 8      # numbers of a gradient whose distance one batch does not tell, and batches that do


def far(ours: dict[str, float], eager: dict[str, float], tiny: float) -> dict[str, tuple[float, float]]:
    """The gradients that are more than half as far again from truth as eager's."""
    return {n: (ours[n], eager[n]) for n in ours if ours[n] > 1.5 * eager[n] + tiny}


def typical(found: list[dict[str, float]]) -> dict[str, float]:
    """Root mean squares over batches."""
    return {n: (sum(f[n] ** 2 for f in found) / len(found)) ** 0.5 for n in found[0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_as_near_to_truth_as_eager(name: str, lora: bool, dtype: torch.dtype) -> None:
    owner, inputs, tiny = tm.model(name, dtype, lora, **SETTINGS.get(name, {})), tm.batch(), tm.TINY[dtype]
    with tm.watched() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        fast = torch.compile(owner, backend="sloth")
        ours = tm.step(owner, fast, **inputs)
    eager, true = tm.step(owner, **inputs), tm.truth(owner, **inputs)

    assert set(ours.gradients) == set(eager.gradients) == set(true.gradients)
    off, reference = (abs(float(s.loss) / float(true.loss) - 1) for s in (ours, eager))
    assert off <= 1.10 * reference + tiny
    assert tm.distance(ours, true) <= 1.10 * tm.distance(eager, true) + tiny
    farther = far(tm.distances(ours, true), tm.distances(eager, true), tiny)
    assert {n: v for n, v in farther.items() if true.gradients[n].numel() > FEW} == {}
    if farther:                                                            # of a few numbers one batch's rounding says little
        draws = [tm.batch(seed=s) for s in range(BATCHES)]
        truths = [tm.truth(owner, **b) for b in draws]
        mean = [typical([tm.distances(tm.step(owner, run, **b), t) for b, t in zip(draws, truths)]) for run in (fast, None)]
        assert {n: v for n, v in far(*mean, tiny).items() if n in farther} == {}

    expected = {"cross_entropy": 1, **{k: v for k, v in COUNTS[name].items() if lora or k != "lora_linear"}}
    found = tm.counted(graphs)
    assert {k: v for k, v in found.items() if k != "rowwise"} == expected
    assert len(graphs) == 1
