"""What a reader would count in every causal LM of transformers, against what is found: each is found, or the cause is known.

Expected counts come from module classes and function names (``expected``), found ones from formulas; neither sees the other.
"""

from __future__ import annotations

import pytest
import torch
from captured import graphs_of
from expected import ONE, WRITTEN, missed

from slothc.survey_child import build, inputs
from slothc.tiny import config_names

# Why a loss is left to PyTorch, or is found only when the model runs: no name of a model decides it.
CAUSES = {
    "loss": (
        "the logits are not a linear of this graph",                     # a later graph than the head's: LazyLogits when it runs
        "the logits of single tokens are picked out",                    # by a mask: how many there are is known only at run time
        "a logit goes through mul of 2 tensors, which is not a known function of one logit",              # a scale for each token
        "between the linear and the loss stands transpose",              # several heads' logits, stacked before the loss
    ),
    "norm": (ONE, WRITTEN),
    "rotated": (                                                         # of a frame that Dynamo makes again with a symbolic head width
        "the row is cut at a place known only at run time",
        "a concatenation joins pieces along an axis whose pieces cannot be told apart",
    ),
    "gated": (),
}  # fmt: skip


@pytest.mark.parametrize("name", config_names())
def test_everything_that_a_reader_counts_is_found(name: str) -> None:
    try:
        model = build(name, None, torch.float32)
    except Exception as error:
        pytest.skip(f"not built: {type(error).__name__}")
    every, lacking = missed(graphs_of(model, **inputs(model, 0)))
    assert every
    assert [(e.kind, e.name, e.location, why) for e, why in lacking if why not in CAUSES[e.kind]] == []
