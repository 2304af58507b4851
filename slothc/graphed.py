"""``options={"cuda_graphs": True}``: a rewritten graph that is recorded once for each signature and replayed from then on.

The first calls of a signature run ordinarily: kernels are compiled, choices made, and which outputs receive gradients is seen. Then the
forward and the backward are recorded (``recording``). A call is replayed only if nothing is pending: no replayed forward of this graph
whose backward is still to come, no gradient lent out and still in use. Everything else runs ordinarily, as without the option.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import compiled_autograd
from torch.utils._device import DeviceContext
from torch.utils.hooks import unserializable_hook

from slothc.kernels.attention import Kind

from . import recorder
from .bind.masks import Question, questions
from .checkpointing import checkpointed
from .errors import NotGraphed
from .four_bit import FROZEN
from .lazy_logits import LazyLogits
from .outputs import MADE, PLAIN, Place, Unrecordable, apart
from .recordable import device_of, is_number, obstacle
from .recording import Pending, Recording, place_of
from .spellings_call import example
from .statistics import counts

WARM = 2               # ordinary calls with a backward before a signature is recorded
RECORDED = 8           # signatures of one graph: each has memory for what it reads and returns
MOVES = 4              # how often a graph's parameters may move to other memory before it is left alone
COPIED = 64 << 20      # bytes of buffers that are replaced from step to step, and then copied in every step
SEEN = 64              # signatures that are counted
_warned: set[str] = set()


def graphed(module: fx.GraphModule) -> Callable[..., Any]:
    """``module.forward``, replayed where it can be; with one warning, ``module.forward`` itself where it never can."""
    device = device_of(module)
    if device is None:
        return module.forward
    if device.type not in recorder.KINDS:
        _say(f"there are none on the device {device.type}")
        return module.forward
    reason = obstacle(module, device)
    if reason is not None:
        _say(reason)
        return module.forward
    return Graphed(module, device)


def _say(reason: str) -> None:
    message = f"sloth runs a graph without CUDA graphs: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, NotGraphed, stacklevel=3)


class _Signature:
    """What is known about calls with the same geometry of inputs."""

    def __init__(self, kinds: Sequence[tuple[Question, Kind | None]] | None) -> None:
        self.kinds = kinds                                                # what its masks are; None where nobody asked yet
        self.questions: list[Question] = []
        self.calls = 0                                                    # ordinary ones that got a backward, from the same memory
        self.wanted: frozenset[Place] = frozenset()
        self.noticed: set[Place] = set()                                  # of the latest ordinary call
        self.recording: Recording | None = None
        self.restarts = 0
        self.closed = False

    def learn(self) -> None:
        """Count the latest ordinary call if it was gone through backwards."""
        if self.noticed:
            self.calls += 1
            self.wanted |= self.noticed
            self.noticed = set()

    def restart(self) -> None:
        self.recording, self.calls, self.noticed = None, 0, set()


class Graphed:
    """A callable in place of ``module.forward``."""

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        self.module, self.device, self.run = module, device, module.forward
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.fixed = [k for k, n in enumerate(inputs) if _fixed(n)]
        self.numbers = {k for k, n in enumerate(inputs) if is_number(n)}
        self.unused = {k for k, n in enumerate(inputs) if not n.users}
        self._sort(len(inputs))
        self.whole = any(n.target is checkpointed for n in module.graph.nodes)
        self.recorder: recorder.Recorder | None = None
        self.signatures: dict[Any, _Signature] = {}
        self.pending: Callable[[], Pending | None] = lambda: None
        self.closed = False
        self.places: Any = None
        self.lend = True
        self.moves = -1                                                   # where they are first is no move
        self.stream: int | None = None
        self.lock = threading.Lock()

    def _sort(self, count: int) -> None:
        self.count = count
        self.moving = [k for k in range(count) if k not in {*self.fixed, *self.unused}]

    def __call__(self, *given: Any) -> Any:
        if self.closed or not torch.is_grad_enabled() or _watched() or not self.lock.acquire(blocking=False):
            return self.run(*given)
        try:
            signature = self._signature(given)
            outputs = None if signature is None or signature.closed else self._replayed(signature, given)
        finally:
            self.lock.release()
        if outputs is not None:
            return outputs
        if signature is None or signature.closed or signature.recording is not None:
            counts["unreplayed"] += 1
            return self.run(*given)
        return self._ordinary(signature, given)

    # which signature ---------------------------------------------------------------------------------------------------------------------
    def _signature(self, given: Sequence[Any]) -> _Signature | None:
        key = self._key(given)
        found = None if key is None else self._numbered(key, None)
        if found is not None and found.questions and not found.closed:  # its masks depend on values: on what they are now
            kinds = [(q, q.answer(self, given)) for q in found.questions]
            return self._numbered((key, *(kind for _, kind in kinds)), kinds)
        return found

    def _numbered(self, key: Any, kinds: Sequence[tuple[Question, Kind | None]] | None) -> _Signature | None:
        found = self.signatures.get(key)
        if found is None and len(self.signatures) < SEEN:
            found = self.signatures[key] = _Signature(kinds)
        return found

    def _key(self, given: Sequence[Any]) -> Any:
        """Everything that a recording takes for granted but where the fixed inputs are (Dynamo guards their geometry)."""
        kind = self.device.type
        parts: list[Any] = [
            torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch._C._get_flash_sdp_enabled(),
            torch._C._get_mem_efficient_sdp_enabled(), torch._C._get_math_sdp_enabled(), torch._C._get_cudnn_sdp_enabled(),
        ]  # fmt: skip
        for k in self.moving:
            value = given[k].item() if k in self.numbers else given[k]
            if isinstance(value, Tensor):
                if type(value) not in PLAIN or value.device != self.device or value.layout != torch.strided:
                    return None
                parts.append((value.shape, value.stride(), value.dtype, value.requires_grad))
            elif value is None or isinstance(value, int | float):
                parts.append((type(value), value.hex() if isinstance(value, float) else value))
            else:
                return None
        return tuple(parts)

    # a call, replayed --------------------------------------------------------------------------------------------------------------------
    def _replayed(self, signature: _Signature, given: Sequence[Any]) -> Any:
        """The outputs, or None where the call is to run ordinarily."""
        pending = self.pending()
        if pending is not None and not pending.done:
            return None
        if not all(s.recording is None or s.recording.returned() for s in self.signatures.values()):
            self.lend = False                                             # accumulation, say: copied out from now on
            self._drop()
            return None
        found = self._recording(signature, given)
        if found is None or found.recorder.capturing() or found.recorder.stream() != self.stream:
            return None
        outputs, pending = found.forward(given)
        self.pending = weakref.ref(pending)
        return outputs

    def _drop(self) -> None:
        """No recordings any more. What was lent stays whole: nothing writes to it, and a pool gives no memory away that is alive."""
        if self.recorder is not None:
            self.recorder.settle()
        for s in self.signatures.values():
            s.restart()

    def _recording(self, signature: _Signature, given: Sequence[Any]) -> Recording | None:
        """The signature's recording, made now if it is time; None if it is not."""
        signature.learn()
        if not self._in_place(given):
            return None
        found = signature.recording
        if found is not None and found.twice:
            self._close(signature, "its gradients are differentiated again")
            return None
        if found is not None and found.unforeseen >= WARM:
            signature.restart()
            signature.restarts += 1
            if signature.restarts > MOVES:
                self._close(signature, "which outputs have gradients changes again and again")
                return None
            return None
        if found is not None:
            return found
        if signature.calls < WARM:
            return None
        if sum(s.recording is not None for s in self.signatures.values()) >= RECORDED:
            self._close(signature, f"more than {RECORDED} signatures of one graph")
            return None
        return self._record(signature, given)

    def _in_place(self, given: Sequence[Any]) -> bool:
        """Whether the fixed inputs are where they were. Buffers that moved are copied from here on."""
        now, before = place_of(given, self.fixed), self.places
        if now == before:
            return True
        self.places = now
        self._drop()
        moved = [k for k, a, b in zip(self.fixed, before[0], now[0]) if a != b] if before is not None else []
        self.moves += 1
        if self.moves > MOVES:
            self.closed = True
            _say("its parameters move to other memory again and again")
        elif moved and not any(isinstance(given[k], torch.nn.Parameter) for k in moved) and sum(given[k].nbytes for k in moved) <= COPIED:
            self.fixed = [k for k in self.fixed if k not in set(moved)]
            self._sort(self.count)
            self.places = None
            self.signatures.clear()
        return False

    def _record(self, signature: _Signature, given: Sequence[Any]) -> Recording | None:
        if self.recorder is None:
            self.recorder = recorder.KINDS[self.device.type](self.device)
        if self.recorder.capturing():
            return None
        self.stream = self.recorder.stream()

        def facts(arguments: Sequence[Any]) -> dict[Any, Any]:
            return {q.fact(arguments): kind for q, kind in signature.kinds or () if kind is not None}

        moving = [k for k in self.moving if isinstance(given[k], Tensor) and k not in self.numbers]
        try:
            signature.recording = Recording(
                self.run, given, self.fixed, moving, signature.wanted, self.recorder, self.whole, self.lend, facts
            )
        except Unrecordable as error:
            self._close(signature, str(error))
            return None
        except Exception as error:
            self.recorder = None                                          # a pool that a failed capture has seen is not used again
            self._close(signature, f"{type(error).__name__}: {error}".splitlines()[0])
            return None
        return signature.recording

    def _close(self, signature: _Signature, reason: str) -> None:
        signature.closed, signature.recording = True, None
        _say(reason)

    # a call, ordinary and looked at ------------------------------------------------------------------------------------------------------
    def _ordinary(self, signature: _Signature, given: Sequence[Any]) -> Any:
        reason = self._unfit(given)
        if reason is not None:
            self._close(signature, reason)
            return self.run(*given)
        versions = [v._version for v in given if isinstance(v, Tensor)]
        outputs = self._asked(signature, given)
        if versions != [v._version for v in given if isinstance(v, Tensor)]:
            self._close(signature, "it writes to its inputs")
            return outputs
        try:
            apart(outputs, given)
        except Unrecordable as error:
            self._close(signature, str(error))
            return outputs
        signature.noticed = noticed = set[Place]()
        for k, o in enumerate(outputs):
            if isinstance(o, LazyLogits):
                if o.grad_fn is not None:
                    o.grad_fn.register_prehook(_noting(noticed, [(k, part) for part in MADE]))
            elif isinstance(o, Tensor) and o.requires_grad:
                o.register_hook(_noting(noticed, [(k, "")]))
        return outputs

    def _asked(self, signature: _Signature, given: Sequence[Any]) -> Any:
        """The outputs; the first time, what the graph asks about masks is written down: later calls are told apart by the answers."""
        if signature.kinds is not None:
            return self.run(*given)
        with questions(given) as found:
            outputs = self.run(*given)
        signature.kinds, signature.questions = (), found
        return outputs

    def _unfit(self, given: Sequence[Any]) -> str | None:
        tensors = [v for k, v in enumerate(given) if isinstance(v, Tensor) and k not in {*self.numbers, *self.unused}]
        if any(t.is_inference() for t in tensors):
            return "an input is an inference tensor"
        for t in tensors:
            if type(t) not in PLAIN or t.layout != torch.strided:
                return f"an input is a {type(t).__name__}"
            if t.device != self.device:
                return f"an input is on {t.device}"
        return None


def _fixed(node: fx.Node) -> bool:
    """Whether an input is a module's own: it stays where it is, as far as Dynamo knows."""
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") or node.meta.get(FROZEN)
    return bool(static) or isinstance(example(node), torch.nn.Parameter)


def _noting(noticed: set[Place], places: list[Place]) -> Callable[[Any], None]:
    @unserializable_hook
    def note(_: Any) -> None:
        noticed.update(places)

    return note


def _watched() -> bool:
    """Whether somebody looks at what the graph does inside: hooks on saved tensors, modes, transforms, a backward under way."""
    c = torch._C
    if c._current_graph_task_id() != -1 or c._autograd._top_saved_tensors_default_hooks(True) is not None:
        return True
    if c._len_torch_dispatch_stack() or torch.is_anomaly_enabled() or torch.is_inference_mode_enabled():
        return True
    if getattr(compiled_autograd, "compiled_autograd_enabled", False):
        return True
    if c._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return True
    stack = range(c._len_torch_function_stack())
    return any(type(c._get_function_stack_at(k)) is not DeviceContext for k in stack)
