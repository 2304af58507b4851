"""A cross-section of ``make zoo``: one architecture for each kind of arithmetic, forward and backward against float64, in two dtypes.

Those that ``test_end_to_end`` and ``test_surroundings`` hold to the same contract are left to them.
"""

from __future__ import annotations

import pytest

from slothc.survey_child import measure

KINDS = (
    "gpt2", "bloom", "phi", "cohere", "gemma3n_text", "musicgen",                       # norms, RoPEs, MLPs, biases; experts: see above
    "mamba2", "rwkv", "recurrent_gemma", "qwen3_next", "lfm2", "xlstm",                 # scans
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_contract(name: str, dtype: str) -> None:
    row = measure(name, None, dtype, report=False)
    assert row["status"] == ("eager fails" if (name, dtype) == ("xlstm", "bf16") else "ok"), row["reason"]
    assert row.get("graphs_sloth") == row.get("graphs_nothing")
