"""A cross-section of ``make zoo``: one architecture for each kind of arithmetic, forward and backward against float64, in two dtypes."""

from __future__ import annotations

import pytest

from slothc.survey_child import measure

KINDS = (
    "gpt2", "bloom", "gptj", "phi", "cohere", "gemma2", "gemma3n_text", "glm4", "starcoder2", "musicgen",    # norms, RoPEs, MLPs, biases
    "mixtral", "gpt_oss", "deepseek_v3",                                                # experts and their routers
    "mamba2", "rwkv", "recurrent_gemma", "qwen3_next", "lfm2", "xlstm",                                  # scans
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_contract(name: str, dtype: str) -> None:
    row = measure(name, None, dtype, report=False)
    assert row["status"] == ("eager fails" if (name, dtype) == ("xlstm", "bf16") else "ok"), row["reason"]
    assert row.get("graphs_sloth") == row.get("graphs_nothing")
