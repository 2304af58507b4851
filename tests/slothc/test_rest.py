"""``rest="inductor"``: what sloth leaves alone is compiled around its operations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
import whole
from processor import DEVICE, NATIVE_BF16
from torch import nn

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor's CPU code needs a C++ compiler"
)
DTYPE = torch.bfloat16 if NATIVE_BF16 else torch.float32


class Block(nn.Module):
    """A norm, two linears and an activation with a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_a_module() -> None:
    block, x = Block().to(DEVICE), torch.randn(3, 5, 32, device=DEVICE)

    def step(f: Any) -> list[torch.Tensor]:
        y = x.clone().requires_grad_()
        z = f(y)
        return [z.detach(), *torch.autograd.grad(z.square().sum(), [y, *block.parameters()])]

    for _ in range(2):
        ours = step(torch.compile(block, backend="sloth", options={"rest": "inductor"}))
        for a, b in zip(ours, step(block)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
    return tm.step(owner, run, **{name: t.to(DEVICE) for name, t in tm.batch(seed=draw).items()})


def not_checkpointed(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
    owner.gradient_checkpointing_disable()                                 # it asks for the forward's dtypes again, which are widened
    return step(owner, run, draw)


@pytest.mark.parametrize("name", ["llama", "llama, checkpointed, fp32 adapters", "mixtral"])
def test_adapters(name: str) -> None:
    """The same fused operations as without Inductor, which sees each as one."""
    torch._dynamo.reset()
    name, *form = name.split(", ")
    dtype = torch.float32 if name == "mixtral" else DTYPE                  # in 16 bits a token near a tie has other experts than in truth
    owner = tm.adapted(tm.model(name, dtype, shallow=True), fp32="fp32 adapters" in form).to(DEVICE)
    if form:
        owner.gradient_checkpointing_enable({"use_reentrant": False})
    run = torch.compile(owner, backend="sloth", options={"rest": "inductor"})
    used = tm.counted(whole.contract(owner, run, dtype, step, not_checkpointed))
    assert used["lora_linear"] and used["rms_norm"] and used["cross_entropy"], used
