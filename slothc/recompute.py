"""A checkpoint as one autograd function: the forward keeps the arguments, the backward runs the body again and differentiates that.

    y = f(a),    dL/da = (df/da)(a)' dL/dy    with f run once more from the same random state (Chen et al., arXiv:1604.06174)

``torch.utils.checkpoint`` hands every tensor that the body saves through Python, three times each, and builds a graph in the forward that
is dropped again; where the body is a graph that says what it does, none of it is needed. What it cannot say stays with
``torch.utils.checkpoint`` (``fits``).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import compiled_autograd
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing.reductions import StorageWeakRef

from slothc.kernels.tracing import traced

from .autocast import as_it_is
from .spellings import target_name
from .spellings_call import example
from .spellings_effects import written
from .unneeded import without_unneeded
from .view_alias import storages
from .view_children import attribute

PLAIN = {"use_reentrant", "preserve_rng_state"}          # arguments of a checkpoint that say nothing of how it is to be run
DEVICES = ("cpu", "cuda", "xpu")                         # whose random numbers have states by device
CHANGED = "one of the arguments of a checkpoint was modified by an inplace operation after its forward: it cannot be run again from it"
_fit: weakref.WeakKeyDictionary[fx.GraphModule, bool] = weakref.WeakKeyDictionary()
_state = threading.local()


def fits(body: fx.GraphModule, kwargs: Mapping[str, Any], args: Sequence[Any]) -> bool:
    """Whether ``recomputed`` may run this checkpoint: a body that returns a flat tuple and writes to nothing
    that it is given, in a call that nobody traces or transforms.
    """
    if set(kwargs) - PLAIN or "_checkpoint_context_fn" in body.meta or compiled_autograd.compiled_autograd_enabled:
        return False
    tensors = [a for a in args if isinstance(a, Tensor)]
    if traced(*args) or any(t.device.type not in DEVICES or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        return False
    if body not in _fit:
        _fit[body] = _describable(body)
    return _fit[body]


def recomputed(body: fx.GraphModule, args: Sequence[Any], preserve: bool) -> Any:
    """``body(*args)`` with its gradients. ``preserve``: the backward draws the forward's random numbers."""
    if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return body.forward(*args)
    return _Recomputed.apply(body, preserve, *args)


def again() -> bool:
    """Whether this thread is running a body for the second time: with the very arguments of the first."""
    return getattr(_state, "depth", 0) > 0


def _describable(body: fx.GraphModule) -> bool:
    output = next(n for n in body.graph.nodes if n.op == "output").args[0]
    if not isinstance(output, tuple | list) or not all(o is None or isinstance(o, fx.Node) for o in output):
        return False
    return _harmless(body)


def _harmless(module: fx.GraphModule) -> bool:
    """Whether the graph, with those that it calls, writes to nothing that it is given, and reads no leaf that is no argument: it would get
    no gradient.
    """
    own = {s for n in module.graph.nodes if n.op in ("placeholder", "get_attr") for s in storages(example(n))}
    for node in module.graph.nodes:
        held = attribute(module, node)
        if node.op == "call_module" or (isinstance(held, Tensor) and held.requires_grad):
            return False
        if isinstance(held, fx.GraphModule) and node.users and not _harmless(held):
            return False
        if node.op.startswith("call") and any(_given(n, own) for n in written(node, target_name(node), example)):
            return False
    return True


def _given(node: fx.Node, own: Collection[StorageWeakRef]) -> bool:
    """Whether ``node`` may be a view of an argument, whose storages are ``own``: where no example value says it, if its first operands
    lead to one.
    """
    found = storages(example(node))
    if found and own:
        return any(s in own for s in found)
    while node.op.startswith("call") and node.args and isinstance(node.args[0], fx.Node):
        overloads = _overloads(node.target)
        if overloads and not any(r.alias_info for o in overloads for r in o._schema.returns):
            return False                                                   # new memory
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


def _cut_off(body: fx.GraphModule) -> tuple[bool, ...]:
    """Which results no gradient goes to, as Dynamo saw them."""
    output = next(n for n in reversed(body.graph.nodes) if n.op == "output").args[0]
    values = [example(o) if isinstance(o, fx.Node) else None for o in output]
    return tuple(isinstance(v, Tensor) and not v.requires_grad for v in values)


def _overloads(target: Any) -> list[OpOverload]:
    if isinstance(target, OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return [target] if isinstance(target, OpOverload) else []


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, body: fx.GraphModule, preserve: bool, *args: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.body, ctx.autocast = body, as_it_is("cpu", _device(args).type)
        ctx.random = _Random(args) if preserve else None
        ctx.places = [k for k, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
        ctx.save_for_backward(*(args[k] for k in ctx.places))
        ctx.rest = list(args)                                              # what has no gradient is no activation: nobody need move it
        for k in ctx.places:
            ctx.rest[k] = None
        ctx.versions = _versions(ctx.rest)
        outputs = tuple(body.forward(*args))
        ctx.mark_non_differentiable(*(o for o, cut in zip(outputs, _cut_off(body)) if cut and isinstance(o, Tensor)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, args, create = ctx.saved_tensors, list(ctx.rest), torch.is_grad_enabled()
        if _versions(ctx.rest) != ctx.versions:
            raise RuntimeError(CHANGED)
        for k, t in zip(ctx.places, saved):
            args[k] = t if create else t.detach().requires_grad_()
        wanted = [k for k in ctx.places if ctx.needs_input_grad[2 + k]]
        with torch.enable_grad(), ctx.autocast(), ctx.random or contextlib.nullcontext(), _running_again():
            outputs = without_unneeded(ctx.body).forward(*args)
        pairs = [(o, g) for o, g in zip(outputs, given) if g is not None and isinstance(o, Tensor) and o.requires_grad]
        found: list[Tensor | None] = [None] * len(args)
        if pairs and wanted:
            made = torch.autograd.grad(
                [o for o, _ in pairs], [args[k] for k in wanted], [g for _, g in pairs], allow_unused=True, create_graph=create
            )
            for k, g in zip(wanted, made):
                found[k] = g
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.rest = ctx.versions = ()                                   # a loss that is kept keeps no masks and tables
        return (None, None, *found)


@contextmanager
def _running_again() -> Iterator[None]:
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


def _versions(args: Sequence[Any]) -> list[int]:
    return [a._version for a in args if isinstance(a, Tensor) and not a.is_inference()]


def _device(args: Sequence[Any]) -> torch.device:
    """The accelerator that the arguments are on, or the CPU."""
    devices = (a.device for a in args if isinstance(a, Tensor))
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


class _Random:
    """The state of the random numbers as it is now; entered, they start from it, and afterwards go on from where they were."""

    def __init__(self, args: Sequence[Any]) -> None:
        on = {a.device for a in args if isinstance(a, Tensor)} - {torch.device("cpu")}
        self.states = [(None, torch.get_rng_state()), *((d, _module(d).get_rng_state(d)) for d in on)]

    def __enter__(self) -> None:
        self.before = [(d, torch.get_rng_state() if d is None else _module(d).get_rng_state(d)) for d, _ in self.states]
        self._set(self.states)

    def __exit__(self, *error: Any) -> None:
        self._set(self.before)

    def _set(self, states: Sequence[tuple[torch.device | None, Tensor]]) -> None:
        for device, state in states:
            if device is None:
                torch.set_rng_state(state)
            else:
                _module(device).set_rng_state(state, device)


def _module(device: torch.device) -> Any:
    """``torch.cuda`` and its like."""
    return getattr(torch, device.type)
