"""What surrounds a model, each item on several architectures in fp32 and bf16, under the contract.

A covering design: every item on several architectures, every architecture with several items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import surroundings
import tiny_models as tm
import torch
import whole
from surroundings import BF16, cleared, compiled, gradients
from torch import nn

ARCHITECTURES = (
    "llama", "gemma2", "qwen3", "phi3", "glm4", "cohere2", "olmo2", "gpt2", "gpt_oss", "stablelm", "gptj", "starcoder2", "granite",
    "gpt_neox", "opt", "bloom", "phi", "mistral", "falcon", "qwen2", "smollm3", "gemma3_text", "mixtral", "deepseek_v3", "nanochat", "mpt",
)  # fmt: skip


def _compilations(owner: nn.Module, backend: Callable[..., Any], shapes: list[tuple[int, int]], step: Callable[..., Any]) -> int:
    made = []

    def counting(module: Any, inputs: Any) -> Any:
        made.append(module)
        return backend(module, inputs)

    torch._dynamo.reset()
    run = torch.compile(owner, backend=counting)
    for k, shape in enumerate(shapes):
        step(owner, run, k, shape)
    return len(made)


def shapes(name: str, dtype: torch.dtype) -> None:
    """Batches and lengths that change, one of each among them: right, and compiled no more often than by a backend that does nothing."""
    from slothc.backend import sloth

    owner = whole.shallow(name, dtype)
    sizes = [(2, 16), (2, 24), (4, 16), (1, 40), (3, 9), (1, 2), (3, 16)]
    ours: list[tm.Step] = []

    def step(owner: Any, run: Any, draw: int, size: tuple[int, int]) -> tm.Step:
        return tm.step(owner, run, **tm.batch(*size, seed=draw))

    reference = _compilations(owner, lambda module, inputs: module.forward, sizes, step)
    assert _compilations(owner, sloth, sizes, lambda *a: ours.append(step(*a))) <= reference
    eager = [step(owner, owner, k, size) for k, size in enumerate(sizes)]
    with whole.widened(owner) as wide:
        true = [step(wide, wide, k, size) for k, size in enumerate(sizes)]
    assert not whole.broken(ours, eager, true, dtype)


def one_token(name: str, dtype: torch.dtype) -> None:
    """A batch of one sequence of one token: values and gradients of its logits."""
    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        cleared(owner)
        logits = run(input_ids=torch.tensor([[7 + draw]])).logits
        loss = logits.double().logsumexp(-1).sum() - logits.double()[..., 3].sum()
        loss.backward()
        return tm.Step(loss.detach(), gradients(owner))

    owner = whole.shallow(name, dtype)
    whole.contract(owner, compiled(owner), dtype, step)


def dynamic(name: str, dtype: torch.dtype) -> None:
    """``dynamic=True``: the adapters' scales are numbers known at run time."""
    owner = tm.adapted(whole.shallow(name, dtype), dropout=0.3).train()
    graphs = whole.contract(owner, compiled(owner, dynamic=True), dtype)
    assert tm.counted(graphs)["lora_linear"] > 0


ITEMS = {**surroundings.ITEMS, "shapes": shapes, "one_token": one_token, "dynamic": dynamic}
SLOW = {"shapes", "checkpointing", "generation", "modes", "dynamic"}     # other tests have them on further architectures


def design() -> list[tuple[str, str, torch.dtype]]:
    """Two items for each architecture, one in both dtypes, the other in every second one's; what other files test further in bf16."""
    items = sorted(ITEMS, key=SLOW.__contains__)
    fast = [i for i in items if i not in SLOW]
    found = []
    for k, name in enumerate(ARCHITECTURES):
        both, one = items[k % len(items)], fast[(k + 8) % len(fast)]
        found += [(name, both, dtype) for dtype in ((torch.float32, BF16) if both in surroundings.ITEMS else (BF16,))]
        found.append((name, one, (torch.float32, BF16)[k % 2] if one in surroundings.ITEMS else BF16))
    return found


@pytest.mark.parametrize("name, item, dtype", design(), ids=str)
def test_around(name: str, item: str, dtype: torch.dtype) -> None:
    ITEMS[item](name, dtype)
