"""Products with a weight that is held in four bits are those with the weight that it stands for, to the bit."""

from __future__ import annotations

import pytest
import torch
from processor import DEVICE
from slothc.kernels import four_bit, handwritten, siblings
from slothc.kernels.four_bit import FourBit, Held
from slothc.kernels.lowrank import lora_linear
from slothc.kernels.siblings_program import Linear
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

bnb = pytest.importorskip("bitsandbytes")
N, K, R = 48, 64, 4


def packed(nested: bool, dtype: torch.dtype) -> tuple[FourBit, tuple[Tensor, ...], Tensor]:
    """(form, what the weight is held in, the weight by the library)."""
    q, state = bnb.functional.quantize_4bit(torch.randn(N, K, device=DEVICE).to(dtype), quant_type="nf4", compress_statistics=nested)
    held = (q, state.absmax, state.state2.absmax, state.state2.code, state.offset) if nested else (q, state.absmax)
    return FourBit((N, K), 64, "nf4", nested, dtype), held, bnb.functional.dequantize_4bit(q, state)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, torch.ones_like(y)))


def by_the_table(q: Tensor, scales: Tensor, kind: str, blocksize: int, shape: tuple[int, int]) -> Tensor:
    """``table[code] * scale`` in float32, by definition: two codes in a byte, the first in its upper half; a scale for each block."""
    codes = torch.stack([q.flatten() >> 4, q.flatten() & 15], 1).flatten()[: shape[0] * shape[1]]
    table = bnb.functional.get_4bit_type(kind, device=q.device)
    return (table[codes.long()] * scales.repeat_interleave(blocksize)[: codes.numel()]).reshape(shape)


@pytest.fixture
def launched(triton_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handwritten, "available", lambda device: True)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested scales"])
@pytest.mark.parametrize("shape, blocksize", [((2, 2), 64), ((5, 70), 64), ((300, 128), 256), ((64, 4160), 4096)])
def test_a_weight_made_whole_by_one_kernel_is_the_librarys(shape: tuple[int, int], blocksize: int, nested: bool, kind: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])):    # the interpreter cuts bf16 off
        w = (torch.randn(shape, device=DEVICE) * 0.02).to(dtype)
        q, state = bnb.functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
        held = (q, state.absmax, *((state.state2.absmax, state.state2.code, state.offset) if nested else ()))
        form = FourBit(shape, blocksize, kind, nested, dtype)
        got, (small, *nested_parts) = form._launched(*held), held[1:]
        if nested:
            s2, code, offset = nested_parts
            small = torch.ops.bitsandbytes.dequantize_blockwise.default(small, s2, code, 256, torch.float32) + offset
        true = by_the_table(q, small, kind, blocksize, shape).to(dtype)
        assert got is not None and got.dtype is dtype and torch.equal(got, true) and torch.equal(form.whole(*held), true)
        if DEVICE == "cuda":        # on a processor with AVX-512 the library's own is wrong where a block reaches over rows
            assert torch.equal(true, bnb.functional.dequantize_4bit(q, state))


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("shape, blocksize", [((3, 5), 64), ((4, 8), 96)])
def test_what_the_kernel_does_not_read_is_the_librarys_work(shape: tuple[int, int], blocksize: int) -> None:
    count = shape[0] * shape[1]
    q, s = torch.zeros(-(-count // 2), 1, dtype=torch.uint8, device=DEVICE), torch.ones(-(-count // blocksize), device=DEVICE)
    assert FourBit(shape, blocksize, "nf4", False, torch.float32)._launched(q, s) is None
    assert four_bit.KERNELS.here(q.device)


@pytest.mark.usefixtures("launched")
def test_a_tracer_sees_the_librarys_operations() -> None:
    four_bit.table.cache_clear()
    form, held, w = packed(True, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        made = form.whole(*(mode.from_tensor(t) for t in held))
    assert isinstance(made, FakeTensor) and made.shape == form.shape
    assert torch.equal(form.whole(*held), w)


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested scales"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_siblings(dtype: torch.dtype, nested: bool) -> None:
    torch.manual_seed(0)
    form, held, w = packed(nested, dtype)
    x, a, b = (torch.randn(size, device=DEVICE, dtype=dtype, requires_grad=True) for size in ((2, 5, K), (R, K), (N, R)))
    for linear, own in ((Linear(2.0, R), (a, b)), (Linear(), ())):
        leaves = [x, *own]
        taken = Linear(linear.scale, linear.rank, held=form)
        call = siblings.call(None, [taken])
        (y,), (z,), (again,) = (
            siblings.call(None, [linear])(x, w, *own), call(x, *held, *own), aot_function(call, lambda graph, _: graph)(x, *held, *own)
        )  # fmt: skip
        true = [y, *gradients(y, leaves)]
        for ours in (z, again):
            assert all(torch.equal(a, b) for a, b in zip([ours, *gradients(ours, leaves)], true))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_reads_something_else(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    form, held, w = packed(True, dtype)
    x, a, b = (torch.randn(size, device=DEVICE, dtype=dtype, requires_grad=True) for size in ((2, 5, K), (R, K), (N, R)))
    leaves, bias = [x, a, b], torch.randn(N, device=DEVICE, dtype=dtype)
    y, z = (lora_linear(x, x * 0.5, v, bias, a, b, 2.0) for v in (w, Held(form, held)))
    for ours, true in zip([z, *gradients(z, leaves)], [y, *gradients(y, leaves)]):
        assert torch.equal(ours, true)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x[..., :8], None, Held(form, held), None, a, b, 2.0)
