"""Masks at run time: evaluate what a mask is computed from no more often than its answer can change."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slothc.kernels.attention import Kind, classify

OTHER = Kind("other")
REMEMBERED = 64  # distinct sizes


@dataclass(frozen=True)
class Verdict:
    """What the mask is, and the mask itself where SDPA needs it."""

    kind: Kind
    mask: torch.Tensor | None


def observable(*tensors: torch.Tensor) -> bool:
    """Whether tensors' elements can be looked at here: not while tracing, on meta or fake tensors, or while a CUDA
    graph records.
    """
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if (
            t.is_meta
            or torch._C._functorch.is_functorch_wrapped_tensor(t)
            or isinstance(t, torch._subclasses.FakeTensor)
        ):
            return False
    return not (tensors and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


class SizeMask:
    """A mask that is a function of sizes: evaluated and classified once for each distinct sizes.

    Only the latest mask that is really needed (a window shorter than the sequence, say) stays in memory, without its
    batch dimension where it is the same for the whole batch. Waits for the device the first time that sizes are seen,
    never after.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self._kinds: OrderedDict[Any, Kind] = OrderedDict()
        self._latest: tuple[Any, torch.Tensor] | None = None

    def __call__(self, reader: object, sizes: tuple[Any, ...], data: tuple[()], q_len: int, kv_len: int) -> Verdict:
        key = (sizes, q_len, kv_len)
        latest, kind = self._latest, self._kinds.get(key)
        if kind is not None and kind.plain:
            return Verdict(kind, None)
        if kind is not None and latest is not None and latest[0] == key:
            return Verdict(kind, latest[1])
        mask = _evaluate(self.function, sizes)
        if kind is None:
            if not observable(mask):
                return Verdict(OTHER, mask)
            kind = classify(mask, q_len, kv_len)
            self._kinds[key] = kind
            if len(self._kinds) > REMEMBERED:
                self._kinds.popitem(last=False)
        if kind.plain:
            return Verdict(kind, None)
        mask = _one_of_batch(mask) if kind.shared else mask
        self._latest = (key, mask)
        return Verdict(kind, mask)


class DataMask:
    """A mask that depends on tensors (padding flags, positions): judged once per forward, shared by all its readers.

    The same tensors, unchanged, read by another attention call of the same forward give the same verdict for free. A
    reader that comes back begins a new forward: the tensors' contents are then compared with contents known to give a
    plain mask (on a GPU: one wait for the device, a few bytes per token), and only if they differ is the mask
    computed and classified (a second, short wait). The mask is let go with the tensors it came from.

    ``given``: the mask is itself the data (an input of the graph), and ``function`` returns it.
    """

    def __init__(self, function: Callable[..., torch.Tensor], given: bool = False) -> None:
        self.function, self.given = function, given
        self._known: OrderedDict[Any, tuple[tuple[torch.Tensor, ...], Kind]] = OrderedDict()
        self._reading: _Reading | None = None

    def __call__(
        self, reader: object, sizes: tuple[Any, ...], data: tuple[torch.Tensor, ...], q_len: int, kv_len: int
    ) -> Verdict:
        key = (sizes, q_len, kv_len, *((t.shape, t.dtype, t.device) for t in data))
        reading = self._reading
        if reading is not None and reading.serves(reader, key, data):
            verdict = reading.verdict
        elif observable(*data):
            verdict = self._judge(key, sizes, data, q_len, kv_len)
            self._reading = _Reading(reader, key, data, verdict, weakref.ref(self))
        else:
            verdict = Verdict(OTHER, None if self.given else _evaluate(self.function, (*sizes, *data)))
        return Verdict(verdict.kind, data[0]) if self.given and not verdict.kind.plain else verdict

    def _judge(
        self, key: Any, sizes: tuple[Any, ...], data: tuple[torch.Tensor, ...], q_len: int, kv_len: int
    ) -> Verdict:
        if self.given:
            return Verdict(classify(data[0], q_len, kv_len), None)
        known = self._known.get(key)
        if known is not None and all(torch.equal(a, b) for a, b in zip(known[0], data)):
            return Verdict(known[1], None)
        mask = _evaluate(self.function, (*sizes, *data))
        kind = classify(mask, q_len, kv_len)
        if not kind.plain:
            return Verdict(kind, mask)
        self._known[key] = (tuple(t.detach().clone() for t in data), kind)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return Verdict(kind, None)


class _Reading:
    """A verdict on certain tensors, valid while they are alive and unchanged, once for each reader."""

    def __init__(
        self, reader: object, key: Any, data: Sequence[torch.Tensor], verdict: Verdict, owner: weakref.ref[DataMask]
    ) -> None:
        def forget(_: object) -> None:
            mask = owner()
            if mask is not None and mask._reading is self:
                mask._reading = None

        self.key, self.verdict = key, verdict
        self.readers = {id(reader)}
        self.tensors = tuple((weakref.ref(t, forget), _version(t)) for t in data)

    def serves(self, reader: object, key: Any, data: Sequence[torch.Tensor]) -> bool:
        """Whether ``reader`` may use the verdict for ``data``; it may do so once."""
        same = self.key == key and all(
            ref() is t and version == _version(t) for (ref, version), t in zip(self.tensors, data)
        )
        if not same or id(reader) in self.readers:
            return False
        self.readers.add(id(reader))
        return True


def _evaluate(function: Callable[..., torch.Tensor], leaves: tuple[Any, ...]) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return function(*leaves)


def _one_of_batch(mask: torch.Tensor) -> torch.Tensor:
    """One element of a batch of equal masks, in memory of its own."""
    return mask[:1].clone() if mask.dim() >= 3 else mask


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was written in place, as far as autograd knows."""
    return -1 if tensor.is_inference() else tensor._version
