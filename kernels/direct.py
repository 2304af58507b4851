"""Launching a kernel again without the work that Triton does to find it: tens of microseconds a call for a kernel that is already known.

The first launch is Triton's own and yields the compiled kernel. Later ones call its launcher with pointers and numbers, as long as all that
the kernel was specialised on holds: dtypes, numbers and device by the caller's record (one ``Direct`` for each), addresses divisible by
16 by looking at them. Anything else is Triton's: a misaligned operand, a profiler's hook, internals that are not as known (``refused``).
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

ENABLED = os.environ.get("SLOTH_DIRECT") != "0"
ALIGNMENT = 16                # what Triton specialises pointers on
KEPT = 512                    # encoded descriptors of one geometry
START = ["self", "gridX", "gridY", "gridZ", "stream", "function"]
FLAT = ("self.launch(gridX,gridY,gridZ,stream,function,self.launch_cooperative_grid,self.launch_pdl,"
        "global_scratch,profile_scratch,*args)")  # fmt: skip
_device = getattr(torch._C, "_cuda_getDevice", None)
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

refused: Counter[str] = Counter()   # why kernels stay with Triton's launch, and how many

Descriptor: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], list[int]]   # shape, strides, block
_maps: dict[tuple[Any, ...], dict[int, list[Any]]] = {}


class Unknown(Exception):
    """Triton's internals are not those that this file knows."""


class Direct:
    """``launch(tensors)``: one kernel with its grid and all its arguments but the tensors, which come first in its signature.

    ``numbers`` follow the tensors; ``options`` are constexprs by name, in the signature's order, and compiler options. The first
    ``len(descriptors)`` tensors are passed as tensor descriptors. Dtypes, shapes and strides must be the same for every call.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: Sequence[float], options: Mapping[str, Any], device: torch.device,
        descriptors: Sequence[Descriptor] = (),
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.numbers, self.options, self.descriptors = kernel, grid, tuple(numbers), options, tuple(descriptors)
        self.index = device.index if device.type == "cuda" else None
        self.possible = ENABLED and self.index is not None and not torch.version.hip
        self.known: _Known | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        index = self.index
        if index is not None and index != _device():                      # type: ignore[misc]
            with torch.cuda.device(index):
                return self(tensors)
        if not self.possible:
            self.ordinary(tensors)
            return
        pointers = [t.data_ptr() for t in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if bits % ALIGNMENT or hooked(self.kernel):
            self.ordinary(tensors)
        elif self.known is None:
            self._learn(self.ordinary(tensors), len(tensors))
        else:
            self._again(self.known, tensors, pointers)

    def ordinary(self, tensors: Sequence[Tensor]) -> Any:
        """Triton's launch; what it returns is the compiled kernel."""
        if self.descriptors:
            tensors = [*self._described(tensors), *tensors[len(self.descriptors) :]]
        return self.kernel[self.grid](*tensors, *self.numbers, **self.options)

    def _described(self, tensors: Sequence[Tensor]) -> list[Any]:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return [TensorDescriptor(t, list(shape), list(strides), block) for t, (shape, strides, block) in zip(tensors, self.descriptors)]

    def _again(self, known: _Known, tensors: Sequence[Tensor], pointers: list[int]) -> None:
        try:
            if known.maps:
                pointers = self._encoded(known, tensors, pointers)
            known.launch(*known.grid, _stream(self.index), *known.fixed, *pointers, *known.tail)  # type: ignore[misc]
        except (TypeError, AttributeError) as error:                       # arguments are read before anything is launched
            self._refuse(f"{type(error).__name__}: {error}")
            self.ordinary(tensors)

    def _encoded(self, known: _Known, tensors: Sequence[Tensor], pointers: list[int]) -> list[Any]:
        """Descriptors by address. One holds an address and a geometry, nothing of the tensor: it stays right for what lies there later."""
        flat: list[Any] = []
        for n, (kept, pointer) in enumerate(zip(known.maps, pointers)):
            found = kept.get(pointer)
            if found is None:
                if len(kept) >= KEPT:
                    kept.clear()
                found = kept[pointer] = known.encode(self._described(tensors)[n], known.metas[n])
            flat += found
        flat += pointers[len(known.maps) :]
        return flat

    def _learn(self, compiled: Any, count: int) -> None:
        try:
            self.known = _Known(self, compiled, count)
        except (Unknown, AttributeError, TypeError, KeyError, ImportError, OSError) as error:
            self._refuse(f"{type(error).__name__}: {error}")

    def _refuse(self, reason: str) -> None:
        self.possible, self.known = False, None
        refused[reason] += 1


class _Known:
    """A compiled kernel's launcher and the arguments that stay: launch(*grid, stream, *fixed, *pointers or descriptors, *tail)."""

    def __init__(self, direct: Direct, compiled: Any, count: int) -> None:
        run, names = compiled.run, list(direct.kernel.arg_names)
        parameters = list(inspect.signature(type(run).__call__).parameters)
        if type(run).__name__ != "CudaLauncher" or parameters[: len(START)] != START:
            raise Unknown(f"launcher {type(run).__name__}({', '.join(parameters)})")
        self.tail = (*direct.numbers, *(direct.options[n] for n in names[count + len(direct.numbers) :]))
        _agree(compiled.src.signature, names, count, len(direct.descriptors), len(self.tail))
        self.grid = (*direct.grid, 1, 1)[:3]
        self.compiled = compiled                                           # keeps the loaded module
        self.maps: list[dict[int, list[Any]]] = []
        self.launch: Any = run
        self.fixed: tuple[Any, ...] = (compiled.function, compiled.packed_metadata, None, None, None)
        raw = _raw(run)
        if raw is not None:
            self.launch, cell = raw
            self.fixed = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *self.fixed[1:])
        if direct.descriptors:
            if raw is None:
                raise Unknown("descriptors are encoded elsewhere")
            self._encoder(direct, cell["tensordesc_meta"])

    def _encoder(self, direct: Direct, metas: Sequence[Any]) -> None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        if len(inspect.signature(make_tensordesc_arg).parameters) != 2 or len(metas) != len(direct.descriptors) or None in metas:
            raise Unknown("descriptors are not encoded by the driver")
        self.encode, self.metas = make_tensordesc_arg, metas
        for n, (shape, strides, _) in enumerate(direct.descriptors):      # block, swizzle and dtype are the compiled kernel's
            if len(_maps) > KEPT:
                _maps.clear()                                             # records keep theirs
            self.maps.append(_maps.setdefault((self.compiled.hash, n, shape, strides), {}))


def _agree(signature: Mapping[str, str], names: list[str], count: int, described: int, rest: int) -> None:
    """The kernel's signature must be the tensors, then the tail."""
    kinds = list(signature.values())
    right = list(signature) == names and len(names) == count + rest
    right = right and all(str(k).startswith("tensordesc") for k in kinds[:described])
    right = right and all(str(k).startswith("*") for k in kinds[described:count])
    if not right or any(str(k).startswith(("*", "tensordesc")) for k in kinds[count:]):
        raise Unknown(f"signature {dict(signature)}")


def _raw(run: Any) -> tuple[Any, dict[str, Any]] | None:
    """The C function inside the launcher, where its text says that it is called flat and it needs no scratch memory; its closure."""
    text = "".join(inspect.getsource(type(run).__call__).split())
    if FLAT not in text or run.global_scratch_size or run.profile_scratch_size:
        return None
    launch, cell = run.launch, {}
    if isinstance(launch, FunctionType):
        cell = {name: c.cell_contents for name, c in zip(launch.__code__.co_freevars, launch.__closure__ or ())}
        if set(cell) != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
            return None
        launch = cell["launcher"]
    return launch, cell


def hooked(kernel: Any) -> bool:
    """Whether somebody watches launches: then they are Triton's own, so that a profiler sees each kernel's name and arguments."""
    runtime = _runtime()
    if runtime is None or kernel.pre_run_hooks:
        return True
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)))


_found: list[Any] = []


def _runtime() -> Any:
    """Triton's switches for launches; None where it has none."""
    if not _found:
        try:
            from triton import knobs

            _found.append(knobs.runtime)
        except (ImportError, AttributeError):
            _found.append(None)
    return _found[0]
