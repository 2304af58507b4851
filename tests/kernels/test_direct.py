"""Launching a known kernel directly: taken when all it was specialised on holds, Triton's own launch otherwise. The launcher is a fake."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from slothc.kernels import direct
from slothc.kernels.direct import Direct

knobs = pytest.importorskip("triton.knobs")
DEVICE = torch.device("cuda", 0)
TYPES = {"x": "*fp32", "y": "*fp32", "n": "i32", "one": "constexpr", "BLOCK": "constexpr"}


class CudaLauncher:
    """Called as the launcher of a compiled kernel is."""

    def __init__(self, failure: type[Exception] | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failure = failure

    def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *args: Any) -> None:
        if self.failure:
            raise self.failure("argument 7 must be something else")
        self.calls.append((gridX, gridY, gridZ, stream, function, *args))


class RocmLauncher(CudaLauncher):
    pass


class Renamed(CudaLauncher):
    def __call__(self, grid: tuple[int, ...], stream: int, *args: Any) -> None:  # type: ignore[override]
        raise AssertionError("launched without knowing how")


Renamed.__name__ = "CudaLauncher"


class Kernel:
    """As a JIT function: ``kernel[grid](...)`` launches and returns the compiled kernel."""

    def __init__(self, run: Any, signature: dict[str, str] | None = None) -> None:
        self.arg_names, self.pre_run_hooks = list(TYPES), []
        self.ordinary: list[tuple[Any, ...]] = []
        source = types.SimpleNamespace(signature=signature or TYPES)
        self.compiled = types.SimpleNamespace(run=run, src=source, function=77, packed_metadata=(4, 1, 0), hash="h")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.ordinary.append((grid, args, options))
            return self.compiled

        return launch


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A CUDA device that is not there: the current one is number 0, its stream 5."""
    state = types.SimpleNamespace(current=0)

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, state.current = state.current, index
        yield
        state.current = before

    monkeypatch.setattr(direct, "_device", lambda: state.current)
    monkeypatch.setattr(direct, "_stream", lambda index: 5 + index)
    monkeypatch.setattr(direct, "ENABLED", True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.version, "hip", None)
    direct.refused.clear()
    yield state
    direct.refused.clear()


def made(kernel: Kernel, device: torch.device = DEVICE) -> Direct:
    return Direct(kernel, (3, 2), [100, 1], dict(BLOCK=64, num_warps=4), device)


def aligned(offset: int = 0) -> torch.Tensor:
    memory = torch.zeros(64)
    start = (-memory.data_ptr() // 4) % 4
    return memory[start + offset : start + offset + 16]


def test_the_second_call_is_direct() -> None:
    kernel = Kernel(CudaLauncher())
    call, x, y = made(kernel), aligned(), aligned()
    call([x, y])
    assert kernel.ordinary == [((3, 2), (x, y, 100, 1), {"BLOCK": 64, "num_warps": 4})] and kernel.compiled.run.calls == []
    call([y, x])
    assert len(kernel.ordinary) == 1
    assert kernel.compiled.run.calls == [(3, 2, 1, 5, 77, (4, 1, 0), None, None, None, y.data_ptr(), x.data_ptr(), 100, 1, 64)]
    assert not direct.refused


def test_a_misaligned_tensor_is_tritons() -> None:
    kernel = Kernel(CudaLauncher())
    call = made(kernel)
    call([aligned(), aligned(1)])                                         # what this compiles is for any address: not remembered
    call([aligned(), aligned()])
    call([aligned(), aligned()])
    assert (len(kernel.ordinary), len(kernel.compiled.run.calls)) == (2, 1)
    call([aligned(1), aligned()])
    assert (len(kernel.ordinary), len(kernel.compiled.run.calls)) == (3, 1)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hook_sees_the_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(CudaLauncher())
    call = made(kernel)
    call([aligned(), aligned()])
    with monkeypatch.context() as patched:
        patched.setattr(knobs.runtime, name, lambda metadata: None)
        call([aligned(), aligned()])
    assert (len(kernel.ordinary), len(kernel.compiled.run.calls)) == (2, 0)
    hook = getattr(knobs.runtime, name)
    hook.add(print)
    try:
        call([aligned(), aligned()])
    finally:
        hook.remove(print)
    assert (len(kernel.ordinary), len(kernel.compiled.run.calls)) == (3, 0)
    call([aligned(), aligned()])
    assert (len(kernel.ordinary), len(kernel.compiled.run.calls)) == (3, 1)


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(Renamed()), Kernel(RocmLauncher()), Kernel(None), Kernel(CudaLauncher(), {**TYPES, "y": "i32"}),
        Kernel(CudaLauncher(), dict(reversed(TYPES.items()))), Kernel(CudaLauncher(), {**TYPES, "more": "i32"}),
    ],
    ids=["renamed", "other backend", "no launcher", "number for a tensor", "other order", "other count"],
)  # fmt: skip
def test_unknown_internals_are_tritons_for_good(kernel: Kernel) -> None:
    call = made(kernel)
    for _ in range(3):
        call([aligned(), aligned()])
    assert len(kernel.ordinary) == 3 and sum(direct.refused.values()) == 1
    assert getattr(kernel.compiled.run, "calls", []) == []


def test_a_launcher_that_takes_other_arguments_is_left_for_good() -> None:
    kernel = Kernel(CudaLauncher(TypeError))
    call = made(kernel)
    for _ in range(3):
        call([aligned(), aligned()])
    assert len(kernel.ordinary) == 3 and list(direct.refused) == ["TypeError: argument 7 must be something else"]


def test_an_error_of_the_device_is_raised() -> None:
    kernel = Kernel(CudaLauncher(RuntimeError))
    call = made(kernel)
    call([aligned(), aligned()])
    with pytest.raises(RuntimeError):
        call([aligned(), aligned()])
    assert len(kernel.ordinary) == 1


def test_operands_on_another_device_launch_there(machine: types.SimpleNamespace) -> None:
    seen: list[int] = []
    kernel = Kernel(CudaLauncher())
    item = Kernel.__getitem__
    kernel_class = type("Watched", (Kernel,), {"__getitem__": lambda self, grid: (seen.append(machine.current), item(self, grid))[1]})
    kernel.__class__ = kernel_class
    call = made(kernel, torch.device("cuda", 1))
    call([aligned(), aligned()])
    call([aligned(), aligned()])
    assert seen == [1] and machine.current == 0
    assert [c[3] for c in kernel.compiled.run.calls] == [6]               # the stream of device 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_switched_off(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "ENABLED", device == "cpu")
    kernel = Kernel(CudaLauncher())
    call = made(kernel, torch.device(device, 0))
    for _ in range(2):
        call([aligned(), aligned()])
    assert len(kernel.ordinary) == 2 and not kernel.compiled.run.calls


class C:
    """The C function inside a launcher."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


class Flat:
    """With the text of Triton 3.6's launcher, which hands all arguments to a C function."""

    def __init__(self, launch: Any, scratch: int = 0) -> None:
        self.launch, self.num_ctas = launch, 1
        self.launch_cooperative_grid, self.launch_pdl = False, True
        self.global_scratch_size, self.profile_scratch_size = scratch, 0

    def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *args: Any) -> None:
        global_scratch, profile_scratch = self.global_scratch_size or None, None
        self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl,
                    global_scratch, profile_scratch, *args)  # fmt: skip


Flat.__name__ = "CudaLauncher"


def described(launcher: Any, tensordesc_meta: list[Any]) -> Any:
    """As Triton's ``wrap_handle_tensordesc``: a closure over the C function and what descriptors are encoded with."""
    tensordesc_indices = {0}

    def inner(*args: Any) -> None:
        launcher(*args, tensordesc_indices, tensordesc_meta)

    return inner


def test_the_c_function_is_called_with_what_the_launcher_would_give() -> None:
    c = C()
    kernel = Kernel(Flat(c))
    call, x, y = made(kernel), aligned(), aligned()
    call([x, y])
    call([x, y])
    again = c.calls.pop()
    kernel.compiled.run(3, 2, 1, 5, 77, (4, 1, 0), None, None, None, x.data_ptr(), y.data_ptr(), 100, 1, 64)
    assert c.calls == [again] and len(kernel.ordinary) == 1


def test_scratch_memory_is_the_launchers_business() -> None:
    c = C()
    kernel = Kernel(Flat(c, scratch=128))
    call = made(kernel)
    call([aligned(), aligned()])
    call([aligned(), aligned()])
    assert c.calls[0][7] == 128 and len(kernel.ordinary) == 1


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses in the order in which they were encoded."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    addresses: list[int] = []

    def make_tensordesc_arg(arg: Any, metadata: Any) -> list[Any]:
        addresses.append(arg.base.data_ptr())
        return [(arg.base.data_ptr(), metadata), *arg.shape, *arg.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", make_tensordesc_arg)
    direct._maps.clear()
    return addresses


def with_descriptor(run: Any) -> tuple[Kernel, Direct]:
    kernel = Kernel(run, {**TYPES, "x": "tensordesc<fp32[2, 8]>"})
    return kernel, Direct(kernel, (3,), [100, 1], dict(BLOCK=64), DEVICE, [((2, 8), (8, 1), [2, 8])])


def test_a_descriptor_is_encoded_once_for_each_address(encoded: list[int]) -> None:
    c = C()
    kernel, call = with_descriptor(Flat(described(c, ["swizzle"])))
    one, two, y = aligned().view(2, 8), aligned().view(2, 8), aligned()
    for x in (one, one, two, one, two):
        call([x, y])
    assert encoded == [one.data_ptr(), two.data_ptr()] and len(kernel.ordinary) == 1
    start = (3, 1, 1, 5, 77, False, True, None, None, (4, 1, 0), None, None, None)
    assert c.calls == [(*start, (x.data_ptr(), "swizzle"), 2, 8, 8, 1, y.data_ptr(), 100, 1, 64) for x in (one, two, one, two)]
    assert all(base.base is one for base in [kernel.ordinary[0][1][0]])


def test_descriptors_kept_are_bounded(encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "KEPT", 2)
    _, call = with_descriptor(Flat(described(C(), ["swizzle"])))
    tensors = [aligned().view(2, 8) for _ in range(4)]
    for x in (tensors[0], *tensors):
        call([x, aligned()])
    assert [len(kept) for kept in direct._maps.values()] == [2]


@pytest.mark.parametrize(
    "run", [CudaLauncher(), Flat(described(C(), [None])), Flat(lambda *args: None)], ids=["not flat", "not encoded by the host", "closure"]
)
def test_descriptors_that_are_encoded_otherwise_are_tritons(run: Any, encoded: list[int]) -> None:
    kernel, call = with_descriptor(run)
    for _ in range(2):
        call([aligned().view(2, 8), aligned()])
    assert len(kernel.ordinary) == 2 and sum(direct.refused.values()) == 1 and not encoded
