"""One signature of a graph, recorded: its forward and its backward, replayed as one node of the user's autograd graph.

    forward:   copy what moved into place, replay, copy the results out
    backward:  copy the incoming gradients into place, replay, copy the gradients out

Between the two the recording is *pending*: the memory that the backward reads is overwritten by the next forward. Who replays has to see
that there is none in between (``graphed``). A backward that was not recorded (gradients for other outputs, ``create_graph``) runs the
graph once more, as it is, from the same inputs and random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import as_it_is, without_cache
from .held import holding
from .outputs import Layout, Place, Unrecordable, apart
from .recorder import Recorder
from .statistics import counts

LENT = 256 << 20       # bytes of parameters' gradients from which on they are not copied out: 84 MB is LoRA r=16 on 8B, 2.5 GB all of 1B
CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: a parameter was written to between "
    "a forward pass and its backward"
)
Run = Callable[..., Sequence[Any]]


class Recording:
    """``forward(given)`` replays; ``fixed``: the numbers of the inputs that are read where they are, ``moving``: of those copied.

    ``wanted``: the places whose gradients come in. ``whole``: all of what is fixed may be read in the backward. ``lend``: large gradients
    may be given out without a copy; who replays next asks ``returned`` first. ``facts``: what may be assumed, of the inputs it reads.
    """

    def __init__(
        self, run: Run, given: Sequence[Any], fixed: Sequence[int], moving: Sequence[int], wanted: frozenset[Place], recorder: Recorder,
        whole: bool, lend: bool, facts: Callable[[Sequence[Any]], Mapping[Any, Any]],
    ) -> None:  # fmt: skip
        self.run, self.recorder, self.fixed = run, recorder, list(fixed)
        self.pointers, self.trained = place_of(given, fixed)
        self.moving = list(moving)
        self.slots = [_slot(given[k]) for k in self.moving]
        self.leaves = [k for k, v in enumerate(given) if isinstance(v, Tensor) and v.requires_grad]
        self.autocast = as_it_is(given[self.leaves[0]].device.type)
        self.mark = torch.empty(0)
        self.unforeseen = 0                                               # backward passes of another kind
        self.twice = False
        self.spent, self.lend, self.lent = True, lend, False
        self.held: list[Tensor] = []
        self._record(given, wanted, whole, facts)

    # recording ---------------------------------------------------------------------------------------------------------------------------
    def _record(self, given: Sequence[Any], wanted: frozenset[Place], whole: bool, facts: Callable[..., Mapping[Any, Any]]) -> None:
        arguments = self._arguments(given)
        known = facts(arguments)
        leaves = [arguments[k] for k in self.leaves]
        self._fill(given)
        live: list[Any] = []
        saved: set[int] = set()

        def forward() -> list[Tensor]:
            with holding(self.held, known), without_cache(), torch.enable_grad():
                layout, tensors = apart(self.run(*arguments), arguments)
            live[:] = [layout, tensors]
            return [t.detach() for t in tensors]

        def backward() -> Sequence[Tensor | None]:
            through = [live[1][k] for k in self.incoming]
            live[1] = None                                                # what was saved goes as the backward goes
            with holding(self.held, known), without_cache(), torch.autocast(leaves[0].device.type, enabled=False):
                return torch.autograd.grad(through, leaves, self.upstream, allow_unused=True)

        with torch.autograd.graph.saved_tensors_hooks(_noted(saved), lambda t: t):
            self.outputs, self._forward = self.recorder.record(forward)
        self.layout: Layout = live[0]
        self.differentiable = [t.requires_grad for t in live[1]]
        self.incoming = self.layout.gradients(wanted)
        if not self.incoming or not all(self.differentiable[k] for k in self.incoming):
            raise Unrecordable("no output has a gradient")
        self.upstream = [torch.zeros_like(self.outputs[k]) for k in self.incoming]
        self.gradients, self._backward = self.recorder.record(backward)
        self.watched = [k for k in self.fixed if whole or given[k].untyped_storage().data_ptr() in saved]
        self._plan_copies()
        counts["recorded"] += 1

    def _arguments(self, given: Sequence[Any]) -> list[Any]:
        """What the recorded passes read: fixed inputs' memory and the slots, as leaves without anybody's hooks."""
        arguments = list(given)
        for k, slot in zip(self.moving, self.slots):
            arguments[k] = slot
        return [a.detach().requires_grad_(a_given.requires_grad) if isinstance(a, Tensor) else a for a, a_given in zip(arguments, given)]

    def _plan_copies(self) -> None:
        """What is copied out, and which gradients are lent: a parameter's, alone in memory that is the recording's."""
        memory = [0 if g is None else g.untyped_storage().data_ptr() for g in self.gradients]
        others = {t.untyped_storage().data_ptr() for t in (*self.upstream, *self.outputs)}
        fixed = set(self.fixed)
        own = {
            n: g.untyped_storage()
            for n, (g, k, m) in enumerate(zip(self.gradients, self.leaves, memory))
            if g is not None and k in fixed and memory.count(m) == 1 and m not in others and g.nbytes == g.untyped_storage().nbytes()
        }
        self.loans = own if self.lend and sum(s.nbytes() for s in own.values()) > LENT else {}
        self.references = {n: _references(s) for n, s in self.loans.items()}
        self.copied = _Copies([g for n, g in enumerate(self.gradients) if g is not None and n not in self.loans])
        self.results = _Copies(self.outputs)

    # replaying ---------------------------------------------------------------------------------------------------------------------------
    def forward(self, given: Sequence[Any]) -> tuple[tuple[Any, ...], Pending]:
        """The outputs for inputs ``given``, and what stands for the memory that their backward needs."""
        pending = Pending(self, given)
        tensors = _Step.apply(pending, *[given[k] for k in self.leaves])
        return self.layout.whole(tensors, given), pending

    def _fill(self, given: Sequence[Any]) -> None:
        if self.moving:
            with torch.no_grad():
                torch._foreach_copy_([compact(s) for s in self.slots], [compact(given[k].detach()) for k in self.moving])

    def replay_forward(self) -> list[Tensor]:
        self._forward()
        self.spent = False
        counts["replayed"] += 1
        return self.results()

    def replay_backward(self, incoming: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the leaves, for gradients of all tensors."""
        for k, slot in zip(self.incoming, self.upstream):
            g = incoming[k]
            if g is None:
                slot.zero_()
            else:
                slot.copy_(g)
        self._backward()
        self.spent = True
        self.lent = bool(self.loans)
        copied = iter(self.copied())
        return [None if g is None else g.detach() if k in self.loans else next(copied) for k, g in enumerate(self.gradients)]

    def returned(self) -> bool:
        """Whether nobody has a lent gradient any more; waits for who may still be reading one on another stream."""
        if not self.lent:
            return True
        if any(_references(s) > self.references[n] for n, s in self.loans.items()):
            return False
        self.recorder.settle()
        self.lent = False
        return True

    def again(self, pending: Pending, incoming: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients by running the graph as it is, with a graph of their own where one is asked for."""
        create = torch.is_grad_enabled()
        self.twice = self.twice or create
        given = pending.given
        arguments = list(given) if create else self._arguments(given)
        if create:
            pending.check(all_of=True)
        with torch.enable_grad(), self.recorder.random_from(pending.random), self.autocast():
            _, tensors = apart(self.run(*arguments), arguments)
            pairs = [(t, g) for t, g in zip(tensors, incoming) if g is not None and t.requires_grad]
            leaves = [arguments[k] for k in self.leaves]
            return torch.autograd.grad(
                [t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, create_graph=create
            )


class Pending:
    """A forward pass that was replayed, and is to be gone through backwards. It lives as long as its node of the autograd graph."""

    def __init__(self, recording: Recording, given: Sequence[Any]) -> None:
        self.recording, self.given, self.done = recording, given, False
        self.versions = [given[k]._version for k in recording.watched]
        self.all_versions = [given[k]._version for k in recording.moving]
        self.random: Any = None

    def forward(self) -> list[Tensor]:
        self.random = self.recording.recorder.random_state()
        self.recording._fill(self.given)
        return self.recording.replay_forward()

    def check(self, all_of: bool = False) -> None:
        """Raises what autograd raises where a saved tensor was written to."""
        r, given = self.recording, self.given
        changed = [given[k]._version for k in r.watched] != self.versions
        if changed or (all_of and [given[k]._version for k in r.moving] != self.all_versions):
            raise RuntimeError(CHANGED)

    def backward(self, incoming: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        r, keep = self.recording, torch._C._autograd._get_current_graph_task_keep_graph()
        self.check()
        foreseen = {k for k, g in enumerate(incoming) if g is not None} <= set(r.incoming)
        r.unforeseen += not foreseen
        if torch.is_grad_enabled() or not foreseen or (r.spent and not r.returned()):
            found = r.again(self, incoming)
        else:
            if r.spent:                                                   # a second time: what the first one used up is made again
                with r.recorder.random_from(self.random):
                    r.replay_forward()
            found = tuple(r.replay_backward(incoming))
        if not keep:
            self.done = True
            self.given = ()
        return found


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Pending, *leaves: Tensor) -> tuple[Tensor, ...]:
        recording = pending.recording
        ctx.set_materialize_grads(False)
        ctx.pending = pending
        ctx.save_for_backward(recording.mark)                             # read in the backward: autograd's own error for a second one
        outputs = pending.forward()
        ctx.mark_non_differentiable(*[t for t, d in zip(outputs, recording.differentiable) if not d])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return (None, *ctx.pending.backward(incoming))


def place_of(given: Sequence[Any], fixed: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Where the fixed inputs are, and which are trained."""
    return [given[k].data_ptr() for k in fixed], [given[k].requires_grad for k in fixed]


def compact(t: Tensor) -> Tensor:
    """``t`` with one of the elements that an expanded dimension repeats."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride())):
        if stride == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t


def _slot(t: Tensor) -> Tensor:
    """Memory for an input of this geometry."""
    small = compact(t)
    return torch.empty_strided(small.shape, small.stride(), dtype=t.dtype, device=t.device).expand(t.shape)


class _Copies:
    """``()``: new tensors with what is in ``tensors`` now, in few launches."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.sources = [compact(t) for t in tensors]
        self.blanks = [(t.shape, t.stride(), t.dtype, t.device) for t in self.sources]
        self.expanded = [(k, t.shape) for k, (t, s) in enumerate(zip(tensors, self.sources)) if t.shape != s.shape]

    def __call__(self) -> list[Tensor]:
        with torch.no_grad():
            made = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in self.blanks]
            if made:
                torch._foreach_copy_(made, self.sources)
            for k, shape in self.expanded:
                made[k] = made[k].expand(shape)
        return made


def _references(storage: Any) -> int:
    return int(torch._C._storage_Use_Count(storage._cdata))


def _noted(saved: set[int]) -> Callable[[Tensor], Tensor]:
    def note(t: Tensor) -> Tensor:
        if t.layout == torch.strided:
            saved.add(t.untyped_storage().data_ptr())
        return t

    return note
