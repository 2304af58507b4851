"""Masks at run time: evaluate what a mask is computed from no more often than its answer can change."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from slothc.held import assumed, held, recording
from slothc.kernels.attention import Kind, classify
from slothc.kernels.tracing import traced
from slothc.recompute import again

T = TypeVar("T")
OTHER = Kind("other")
REMEMBERED = 64  # distinct sizes
MASKS = 4  # tensors with a verdict at a time: a forward has one mask for each kind of layer


@dataclass(frozen=True)
class Verdict:
    """What the mask is, and the mask itself where SDPA needs it."""

    kind: Kind
    mask: torch.Tensor | None


def observable(*tensors: torch.Tensor) -> bool:
    """Whether tensors' elements can be looked at here: not while tracing, on meta or fake tensors, or while a CUDA
    graph records: what is seen then holds for every replay.
    """
    if recording() or traced(*tensors) or any(t.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
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
            return Verdict(kind, held(latest[1]))
        mask = _evaluate(self.function, sizes)
        if kind is not None and recording():
            return Verdict(kind, mask)
        if kind is None:
            if not observable(mask):
                return Verdict(OTHER, mask)
            kind = _keep(self._kinds, key, _classify(mask, q_len, kv_len), REMEMBERED)
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
        self._readings: OrderedDict[int, _Reading] = OrderedDict()

    def __call__(
        self, reader: object, sizes: tuple[Any, ...], data: tuple[torch.Tensor, ...], q_len: int, kv_len: int
    ) -> Verdict:
        key = _key(sizes, data, q_len, kv_len)
        if recording() and (kind := assumed((id(self), key, tuple(map(id, data))))) is not None:
            return Verdict(kind, None)
        for asked in _listening:
            asked.append((self, sizes, data, q_len, kv_len))
        reading = self._readings.get(id(data[0]))
        if reading is not None and not (recording() and reading.readers is not None) and reading.serves(reader, key, data):
            verdict = reading.verdict
        elif observable(*data):
            verdict = self._judge(key, sizes, data, q_len, kv_len)
            _keep(self._readings, id(data[0]), _Reading({id(reader)}, key, data, verdict, weakref.ref(self)), MASKS)
        else:
            verdict = Verdict(OTHER, None if self.given else _evaluate(self.function, (*sizes, *data)))
        return Verdict(verdict.kind, data[0]) if self.given and not verdict.kind.plain else verdict

    def announce(self, mask: torch.Tensor, kind: Kind) -> None:
        """The kind of a given mask that nobody writes to is known: readers need not look."""
        key = _key((), (mask,), mask.shape[-2], mask.shape[-1])
        if (reading := self._readings.get(id(mask))) is None or not reading.serves(None, key, (mask,)):
            reading = _Reading(None, key, (mask,), Verdict(kind, None), weakref.ref(self))
            _keep(self._readings, id(mask), reading, MASKS)

    def _judge(
        self, key: Any, sizes: tuple[Any, ...], data: tuple[torch.Tensor, ...], q_len: int, kv_len: int
    ) -> Verdict:
        if self.given:
            return Verdict(_classify(data[0], q_len, kv_len), None)
        known = self._known.get(key)
        with _aside():
            if known is not None and all(torch.equal(a, b) for a, b in zip(known[0], data)):
                return Verdict(known[1], None)
        mask = _evaluate(self.function, (*sizes, *data))
        kind = _classify(mask, q_len, kv_len)
        if not kind.plain:
            return Verdict(kind, mask)
        with _aside():
            _keep(self._known, key, (tuple(t.clone() for t in data), kind), REMEMBERED)
        return Verdict(kind, None)


@dataclass(frozen=True)
class Question:
    """What a graph asks about a mask made of its inputs number ``places``."""

    mask: DataMask
    sizes: tuple[Any, ...]
    places: tuple[int, ...]
    q_len: int
    kv_len: int

    def answer(self, reader: object, given: Sequence[Any]) -> Kind | None:
        """The mask's kind now where SDPA needs no tensor for it. Waits for the device."""
        kind = self.mask(reader, self.sizes, tuple(given[k] for k in self.places), self.q_len, self.kv_len).kind
        return kind if kind.plain else None

    def fact(self, arguments: Sequence[Any]) -> Any:
        """What a recording that reads ``arguments`` calls this question (``held.assumed``)."""
        data = tuple(arguments[k] for k in self.places)
        return id(self.mask), _key(self.sizes, data, self.q_len, self.kv_len), tuple(map(id, data))


_listening: list[list[tuple[DataMask, tuple[Any, ...], tuple[torch.Tensor, ...], int, int]]] = []


@contextmanager
def questions(given: Sequence[Any]) -> Iterator[list[Question]]:
    """Fills, at the end of the block, with what is asked in it about masks made of ``given`` alone."""
    asked: list[tuple[DataMask, tuple[Any, ...], tuple[torch.Tensor, ...], int, int]] = []
    found: list[Question] = []
    _listening.append(asked)
    try:
        yield found
    finally:
        _listening[:] = [a for a in _listening if a is not asked]
    number = {id(v): k for k, v in enumerate(given)}
    for mask, sizes, data, q_len, kv_len in asked:
        if all(id(t) in number for t in data):
            question = Question(mask, sizes, tuple(number[id(t)] for t in data), q_len, kv_len)
            if question not in found:
                found.append(question)


GIVEN = DataMask(lambda mask: mask, given=True)  # one for all: layers in child graphs share a mask, not a graph


class Announced:
    """``(*sizes) -> mask``: a mask of sizes alone for readers in child graphs, its kind known to ``GIVEN`` beforehand.

    The same tensor comes back as long as the sizes stay.
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.__name__ = self.__qualname__ = "sloth_mask"
        self.function = function
        self._kinds: OrderedDict[Any, Kind] = OrderedDict()
        self._latest: tuple[tuple[Any, ...], torch.Tensor, Kind] | None = None

    def __call__(self, *sizes: Any) -> torch.Tensor:
        latest = self._latest
        if latest is None or latest[0] != sizes:
            mask = _evaluate(self.function, sizes)
            if mask.dim() < 2 or not observable(mask):
                return mask
            kind = self._kinds.get(sizes)
            if kind is None:
                kind = _keep(self._kinds, sizes, _classify(mask, mask.shape[-2], mask.shape[-1]), REMEMBERED)
            if kind.shared:
                with _aside():
                    mask = _one_of_batch(mask).expand(mask.shape)
            self._latest = latest = (sizes, mask, kind)
        GIVEN.announce(latest[1], latest[2])
        return held(latest[1])


class _Reading:
    """A verdict on certain tensors, valid while they live unchanged: once for each reader, or always (readers None)."""

    def __init__(
        self,
        readers: set[int] | None,
        key: Any,
        data: Sequence[torch.Tensor],
        verdict: Verdict,
        owner: weakref.ref[DataMask],
    ) -> None:
        first = id(data[0])

        def forget(_: object) -> None:
            mask = owner()
            if mask is not None and mask._readings.get(first) is self:
                del mask._readings[first]

        self.key, self.verdict, self.readers = key, verdict, readers
        self.tensors = tuple((weakref.ref(t, forget), _version(t)) for t in data)

    def serves(self, reader: object, key: Any, data: Sequence[torch.Tensor]) -> bool:
        """Whether ``reader`` may use the verdict for ``data``. A checkpoint run again is still in its forward: it reads what that read."""
        seen = zip(self.tensors, data)
        if self.key != key or not all(ref() is t and version == _version(t) for (ref, version), t in seen):
            return False
        if self.readers is not None and not again():
            if id(reader) in self.readers:
                return False
            self.readers.add(id(reader))
        return True


def _key(sizes: tuple[Any, ...], data: tuple[torch.Tensor, ...], q_len: int, kv_len: int) -> Any:
    return (sizes, q_len, kv_len, *((t.shape, t.dtype, t.device) for t in data))


@contextmanager
def _aside() -> Iterator[None]:
    """Unwatched by autograd and by dispatch modes (a checkpoint's, say, which expects every operation twice)."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


def _evaluate(function: Callable[..., torch.Tensor], leaves: tuple[Any, ...]) -> torch.Tensor:
    with _aside():
        return function(*leaves)


def _classify(mask: torch.Tensor, q_len: int, kv_len: int) -> Kind:
    with _aside():
        return classify(mask, q_len, kv_len)


def _keep(store: OrderedDict[Any, T], key: Any, value: T, most: int) -> T:
    """``store[key] = value``, the oldest entries making room."""
    store[key] = value
    while len(store) > most:
        store.popitem(last=False)
    return value


def _one_of_batch(mask: torch.Tensor) -> torch.Tensor:
    """One element of a batch of equal masks, in memory of its own."""
    with _aside():
        return mask[:1].clone() if mask.dim() >= 3 else mask


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was written in place, as far as autograd knows."""
    return -1 if tensor.is_inference() else tensor._version
