"""A linear and its cross-entropy in numbers: operands, chains, and the contract over several draws."""

from __future__ import annotations

import pytest
import torch
from slothc.gradients.vocabulary import Chain
from slothc.kernels.devices import available
from torch.utils._python_dispatch import TorchDispatchMode

TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
CHAINS = {
    "plain": "{d}",
    "float": "{d}; cast fp32",
    "soft-cap": "{d}; div 5.0 {d}; tanh {d}; mul 5.0 {d}; cast fp32",
    "scale": "{d}; mul 0.0625 {d}; cast fp32",
    "cap in fp32": "{d}; cast fp32; div 5.0 fp32; tanh fp32; mul 5.0 fp32",
}
DRAWS = 5
INTERPRETED = available(torch.device("cpu"))
TRUNCATED = INTERPRETED and not torch.cuda.is_available()


def draw(seed, dtype, device="cpu", n=41, d=24, v=257, bias=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=g) * 0.5).to(device, dtype).requires_grad_()
    b = torch.randn(v, generator=g).to(device, dtype).requires_grad_() if bias else None
    labels = torch.randint(0, v, (n,), generator=g)
    labels[2::5] = -100
    return hidden, weight, b, labels.to(device), torch.rand(n, generator=g).to(device)


def in_double(chain):
    return Chain("fp64", tuple(type(s)(s.fn, s.numbers, "fp64") for s in chain.steps))


def run(loss_of, operands, upstream):
    """The loss and the gradient of every operand that wants one."""
    leaves = [t for t in operands if t is not None and t.requires_grad]
    loss = loss_of(*operands)
    total = (loss.float() * upstream).sum() if loss.dim() else loss.float() * 0.37
    return [loss.detach(), *torch.autograd.grad(total, leaves)]


def assert_contract(draws, dtype, truncated=TRUNCATED):
    if dtype == torch.bfloat16 and truncated:
        pytest.skip("the Triton interpreter rounds to bfloat16 towards zero")
    for results in zip(*(zip(*d) for d in draws)):
        norm = sum(float(t.double().norm()) ** 2 for _, _, t in results) ** 0.5 or 1.0
        ours, theirs = (sum(float((r[k].double() - r[2]).norm()) ** 2 for r in results) ** 0.5 / norm for k in (0, 1))
        assert ours <= 1.10 * theirs + TINY[dtype], (ours, theirs)
        assert all(r[0].dtype == r[1].dtype and r[0].shape == r[1].shape for r in results)


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out
