"""fp32 in three bytes: what is kept, what is not a number stays so, and one rounding of the product."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels import handwritten, packed
from slothc.kernels.packed import Packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16                # the interpreter truncates to bf16


@pytest.fixture(params=["torch", "triton"])
def lowering(request: pytest.FixtureRequest, triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handwritten, "available", lambda device: request.param == "triton")


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("each", [False, True], ids=["one factor", "one for each row"])
def test_values_survive(each: bool) -> None:
    torch.manual_seed(0)
    v = torch.randn(40, 50, device=DEVICE) * torch.logspace(-3, 3, 50, device=DEVICE)
    kept = Packed.empty(v.shape, v.device)
    for start in (0, 24):
        kept.put(start, v[start : start + 24])
    by = torch.randn(40, device=DEVICE) if each else torch.tensor(0.37, device=DEVICE)
    wide = kept.scaled(torch.ones_like(by), torch.float32)
    assert float(((wide - v) / v).abs().max()) <= 2.0**-16
    true = v.double() * (by.double().unsqueeze(1) if each else by.double())
    ours, once = (float((t.double() - true).norm() / true.norm()) for t in (kept.scaled(by, LOW), true.to(LOW)))
    assert ours <= 1.02 * once


@pytest.mark.usefixtures("lowering")
def test_what_is_no_number_stays_so() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x00800000, 0x7F7FFFFF, 0, -0x80000000, 1], dtype=torch.int64)
    v = bits.to(torch.int32).view(torch.float32).to(DEVICE).unsqueeze(0)
    kept = Packed.empty(v.shape, v.device)
    kept.put(0, v)
    found = kept.scaled(torch.tensor(1.0, device=DEVICE), torch.float32)[0].tolist()
    assert found[0] != found[0] and found[1] != found[1]
    assert found[2:5] == [torch.inf, -torch.inf, torch.inf] and found[5:] == [0.0, 0.0, 0.0]


@pytest.mark.usefixtures("triton_kernels")
def test_both_lowerings_keep_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    v, found = torch.randn(37, 50, device=DEVICE), []
    for lowering in (True, False):
        monkeypatch.setattr(handwritten, "available", lambda device, lowering=lowering: lowering)
        found.append(Packed.empty(v.shape, v.device))
        found[-1].put(0, v)
    assert all(torch.equal(one, two) for one, two in zip(*found))


def test_a_kernel_that_cannot_be_built_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handwritten, "available", lambda device: True)
    monkeypatch.setattr(packed.KERNELS, "broken", set())
    monkeypatch.setattr(packed.KERNELS, "records", {})
    monkeypatch.setattr(packed.KERNELS, "named", lambda name: 1 / 0)
    v = torch.randn(8, 16, device=DEVICE)
    kept = Packed.empty(v.shape, v.device)
    with pytest.warns(RuntimeWarning, match="in three bytes on .* with PyTorch"):
        kept.put(0, v)
        wide = kept.scaled(torch.tensor(2.0, device=DEVICE), torch.float32)
    torch.testing.assert_close(wide, 2 * v, rtol=2.0**-16, atol=0)


@pytest.mark.usefixtures("lowering")
def test_nothing() -> None:
    kept = Packed.empty(torch.Size((0, 8)), torch.device(DEVICE))
    kept.put(0, torch.empty(0, 8, device=DEVICE))
    assert kept.scaled(torch.tensor(1.0, device=DEVICE), LOW).shape == (0, 8)


def test_where() -> None:
    assert packed.packs(torch.empty(1, dtype=torch.bfloat16, device=DEVICE)) == (DEVICE == "cuda")
    assert not packed.packs(torch.empty(1, device=DEVICE))
