"""Every causal LM of the installed transformers: forward and backward under sloth, loss and every gradient held against float64."""

from __future__ import annotations

from typing import Any

import pytest

from slothc.survey_child import measure
from slothc.tiny import config_names

# What transformers itself does not make of the types' own configs here, and what it says.
NOT_BUILT = {"gemma3n": "timm", "gemma4_assistant": "hidden_size_per_layer_input", "gemma4_unified_assistant": "set of layer types"}
# What does not run in bf16 without sloth either.
EAGER_FAILS = {("xlstm", "bf16")}

pytestmark = pytest.mark.timeout(400)


def expected(name: str, dtype: str) -> str:
    if name in NOT_BUILT:
        return "not built"
    return "eager fails" if (name, dtype) in EAGER_FAILS else "ok"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", config_names())
def test_contract(name: str, dtype: str) -> None:
    row: dict[str, Any] = measure(name, None, dtype, report=False)
    assert row["status"] == expected(name, dtype), row["reason"]
    assert NOT_BUILT.get(name, "") in row["reason"]
    assert row.get("graphs_sloth") == row.get("graphs_nothing")
    assert row["status"] != "ok" or row["truth"] == "float64", row["no_truth"]
