"""Cross-entropy of a linear's result: the head of a language model.

    Z = H W^T + b,   c = chain(Z),   loss_t = logsumexp_v(c_tv) - c_(t, y_t)

The logits between the two are what costs: tokens x vocabulary numbers that nobody keeps. ``chain`` is whatever the
model does to one logit: casts, a scale, a soft-cap a tanh(z / a). Where the head is an adapted linear, Z = H W^T + b + s L B^T with
L = H A^T as the graph makes it: one linear over [H, s L] and [W, B]. Views are seen through; a slice of the tokens becomes
one of H, a slice of the vocabulary from 0 one of W. Logits that the graph also returns are made on demand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from slothc.gradients.vocabulary import Chain
from torch import fx

from .adapted_head import AdaptedHead, adapted_head
from .likelihood import Likelihood, likelihood
from .meaning import Op, View
from .rule import Match, Miss, Sample, StructuralRule
from .steps import NoStep, step

RULE_NAME = "cross_entropy"
MATH = "loss[t] = logsumexp_v(chain(Z[t,v])) - chain(Z[t,y[t]]),  Z = H W^T + b;  chain(z) = z, s*z, a*tanh(z/a), ..."
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VIEWS = ("reshape", "permute", "index")


class _Stop(Exception):
    """The reason why this is left alone."""


@dataclass
class _Head:
    """What was found between a loss and its linear; ``path`` runs from the loss's operand to the linear or an adapted one's sum."""

    path: list[fx.Node] = field(default_factory=list)
    steps: list[tuple[fx.Node, str, tuple[float, ...]]] = field(default_factory=list)
    views: list[fx.Node] = field(default_factory=list)
    index: tuple[Any, ...] | None = None
    vocab: int | None = None
    normalised: fx.Node | None = None
    adapted: AdaptedHead | None = None

    @property
    def linear(self) -> fx.Node:
        return self.path[-1] if self.adapted is None else self.adapted.linear

    @property
    def inside(self) -> tuple[fx.Node, ...]:
        """The nodes of an adapted head that nobody else reads."""
        return () if self.adapted is None else tuple(n for n in self.adapted.inside if n not in self.path)


def recognise(view: View, node: fx.Node) -> Match | Miss | None:
    """A loss (see ``likelihood``) whose logits come from a linear.

    ``inputs``: hidden, weight, bias (or None), labels, adapters (see ``AdaptedHead``). ``attrs``: chain (text of a ``Chain``),
    ignore_index, label_smoothing, reduction, sign and picked (see ``Likelihood``), dtype (of the loss), index (items for hidden's
    dimensions, or None), vocab (rows of the weight that count, or None), lazy (for each node in ``extra``: the text of
    the chain up to it). ``extra``: nodes whose values are read elsewhere and can be made on demand.
    """
    loss = likelihood(view, node)
    if loss is None:
        return None
    try:
        return _match(view, node, loss)
    except _Stop as stop:
        return Miss(RULE_NAME, node, str(stop)) if not loss.last else None


def _match(view: View, node: fx.Node, loss: Likelihood) -> Match:
    _check_loss(view, loss)
    head = _walk(view, loss.logits, loss.last)
    if loss.normalised and head.normalised is None:
        raise _Stop("what is picked is not the logarithm of a softmax")
    hidden, weight, bias = _check_linear(view, head, loss.labels)
    _check_effects(view, node, head)
    lazy, kept = _outside(view, {node, *loss.around}, head)
    attrs = {
        "chain": _chain(view, head, len(head.path)).text,
        "ignore_index": loss.params["ignore_index"],
        "label_smoothing": float(loss.params["label_smoothing"]),
        "reduction": loss.params["reduction"],
        "sign": loss.sign,
        "picked": loss.picked,
        "dtype": view.value(node).dtype,
        "index": head.index,
        "vocab": head.vocab,
        "lazy": lazy,
    }
    nodes = (node, *loss.around, *(n for n in head.path if n not in kept), *head.inside)
    adapters = () if head.adapted is None else head.adapted.adapters
    inputs = {"hidden": hidden, "weight": weight, "bias": bias, "labels": loss.labels, "adapters": adapters}
    return Match(RULE_NAME, node, nodes, inputs, attrs, extra=tuple(lazy))


def _check_loss(view: View, op: Likelihood) -> None:
    logits, labels = view.value(op.logits), view.value(op.labels)
    if op.params.get("weight") is not None:
        raise _Stop("the classes are weighted")
    if type(op.params["ignore_index"]) is not int or type(op.params["label_smoothing"]) not in (int, float):
        raise _Stop("ignore_index or label_smoothing is not a number")
    if not 0.0 <= op.params["label_smoothing"] <= 1.0:
        raise _Stop(f"label_smoothing is {op.params['label_smoothing']}")
    if op.params["reduction"] not in ("mean", "sum", "none"):
        raise _Stop(f"reduction is {op.params['reduction']!r}")
    if labels.dtype != torch.int64:
        raise _Stop(f"labels are {labels.dtype}, not class numbers in int64")
    if logits.dim() < 2:
        raise _Stop("the logits are a single row")
    if labels.device != logits.device:
        raise _Stop(f"labels are on {labels.device}, logits on {logits.device}")


# from the loss back to the linear


def _walk(view: View, start: fx.Node, last: bool) -> _Head:
    head, node = _Head(), start
    if view.value(start).dim() > 2 and not last:
        node = _classes_last(view, head, start)
    while True:
        if not isinstance(node, fx.Node):
            raise _Stop("the logits are a number")
        head.path.append(node)
        op = view.op(node)
        if op.kind == "linear" or _is_adapted(view, head, node, op):
            return head
        node = _before(view, head, node, op)


def _is_adapted(view: View, head: _Head, node: fx.Node, op: Op) -> bool:
    """Whether ``node`` is the sum of a linear and its adapters; one that is wider than the linear ends with the cast back."""
    found = adapted_head(view, node) if op.kind == "pointwise" else None
    if found is None:
        return False
    if found.reason:
        raise _Stop(found.reason)
    base = view.value(found.linear).dtype
    if view.value(node).dtype is not base:
        last = head.path[-2:][0]
        if not head.steps or head.steps[-1][:2] != (last, "cast") or view.value(last).dtype is not base:
            raise _Stop(f"the adapted head's sum stays {view.value(node).dtype}, its linear is {base}")
        head.steps.pop()
        head.path.pop()
    head.adapted = found
    return True


def _classes_last(view: View, head: _Head, node: fx.Node) -> fx.Node:
    """The operand of a transpose that puts the classes where cross_entropy wants them: [B, T, V] -> [B, V, T]."""
    while view.op(node).kind in ("identity", "cast"):
        _before(view, head, node, view.op(node))
        head.path.append(node)
        node = view.op(node).args[0]
    rank = view.value(node).dim()
    if view.op(node).kind != "permute" or view.op(node).params["dims"] != (0, rank - 1, *range(1, rank - 1)):
        raise _Stop("the classes are not the last dimension of a linear's result")
    head.path.append(node)
    head.views.append(node)
    return view.op(node).args[0]


def _before(view: View, head: _Head, node: fx.Node, op: Op) -> fx.Node:
    """The operand whose logits ``node`` changes one by one or shows in another shape; ``head`` notes how."""
    if op.kind == "identity":
        return op.args[0]
    if op.kind == "cast":
        head.steps.append((node, "cast", ()))
        return op.args[0]
    if op.kind == "softmax" and op.params["fn"] == "log_softmax":
        return _unnormalised(view, head, node, op)
    if op.kind == "pointwise":
        try:
            source, fn, numbers = step(op)
        except NoStep as reason:
            raise _Stop(f"a logit goes through {reason}") from None
        head.steps.append((node, fn, numbers))
        return source
    if op.kind in ("reshape", "index"):
        head.views.append(node)
        _see_through(view, head, node, op)
        return op.args[0]
    if op.kind == "input":
        raise _Stop("the logits are not a linear of this graph")
    raise _Stop(f"between the linear and the loss stands {_name(node)}")


def _unnormalised(view: View, head: _Head, node: fx.Node, op: Op) -> fx.Node:
    """The logits of a log_softmax: the loss's own does nothing more to it. After it come casts and views, or the loss is another."""
    if op.params["dim"] != view.value(node).dim() - 1 or any(fn != "cast" for _, fn, _ in head.steps):
        raise _Stop("the logarithm of a softmax is changed before the loss")
    if view.value(node).dtype != view.value(op.args[0]).dtype:
        head.steps.append((node, "cast", ()))
    head.normalised = node
    return op.args[0]


def _see_through(view: View, head: _Head, node: fx.Node, op: Op) -> None:
    after, before = view.value(node), view.value(op.args[0])
    if op.kind == "reshape":
        if after.dim() == 0 or before.dim() == 0 or after.shape[-1] != before.shape[-1]:
            raise _Stop("a view mixes the vocabulary with other dimensions")
        if head.index is not None:
            raise _Stop("the tokens are sliced after they were reshaped")
        return
    items = op.params["items"]
    if len(items) != before.dim() or not all(isinstance(item, slice) for item in items):
        raise _Stop("the logits of single tokens are picked out")
    *leading, last = items
    if last != slice(None):
        if last.start not in (None, 0) or last.step not in (None, 1) or head.vocab is not None:
            raise _Stop("a slice of the vocabulary that does not start at 0")
        head.vocab = int(after.shape[-1])
    if any(item != slice(None) for item in leading):
        if head.index is not None:
            raise _Stop("the tokens are sliced twice")
        head.index = tuple(leading)


# what must hold


def _check_linear(view: View, head: _Head, labels: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    hidden, weight, bias = view.op(head.linear).args[:3]
    z, h, w = view.value(head.linear), view.value(hidden), view.value(weight)
    if view.op(head.linear).params["layout"] != "nk":
        raise _Stop("the weight is stored [in, out]")
    if z.dtype not in DTYPES:
        raise _Stop(f"the logits are {z.dtype}; the kernels know {', '.join(str(d) for d in DTYPES)}")
    if not (h.is_floating_point() and w.is_floating_point()):
        raise _Stop("the linear's operands are not floating-point")
    if view.op(weight).kind == "whole":
        raise _Stop("the weight is held in four bits")
    devices = {view.value(n).device for n in (hidden, weight, bias, labels) if isinstance(n, fx.Node)}
    if len(devices) > 1:
        raise _Stop(f"operands are on several devices: {', '.join(sorted(map(str, devices)))}")
    for taken, _, _ in head.steps:
        if view.value(taken).dtype not in DTYPES:
            raise _Stop(f"a logit is {view.value(taken).dtype} on its way to the loss")
    return hidden, weight, bias


def _check_effects(view: View, node: fx.Node, head: _Head) -> None:
    mutated, grad = getattr(view, "mutated", None), getattr(view, "grad_enabled", None)
    written = [n for n in (*head.path, *head.inside) if mutated is not None and mutated(n)]
    if written:
        raise _Stop(f"{written[0]} is written to in place")
    if grad is not None and len({grad(n) for n in (node, *head.path, *head.inside)}) > 1:
        raise _Stop("part of it is under no_grad")


def _chain(view: View, head: _Head, upto: int) -> Chain:
    """The steps that the last ``upto`` nodes of the path make, in the order in which they happen."""
    inside = set(head.path[len(head.path) - upto :])
    chain = Chain(DTYPES[view.value(head.linear).dtype])
    for node, fn, numbers in reversed(head.steps):
        if node in inside:
            chain = chain.then(fn, *numbers, dtype=DTYPES[view.value(node).dtype])
    return chain


# other readers


def _outside(view: View, loss: set[fx.Node], head: _Head) -> tuple[dict[fx.Node, str], set[fx.Node]]:
    """Which nodes become lazy values (with the chain up to each), and which nodes stay to read those."""
    inner = {*loss, *head.path, *head.inside}
    shared = next((n for n in head.inside if any(u not in inner for u in view.users(n))), None)
    if shared is not None:
        raise _Stop(f"{shared.name}, a part of the adapted head, is also read elsewhere")
    lazy: dict[fx.Node, str] = {}
    kept: set[fx.Node] = set()
    for place, n in enumerate(head.path):
        readers = [u for u in view.users(n) if u not in inner]
        if not readers:
            continue
        if head.normalised is not None and place <= head.path.index(head.normalised):
            raise _Stop("the logarithms of the probabilities are also read elsewhere")
        for reader in readers:
            _check_reader(view, reader)
        root = next(k for k in range(place, len(head.path)) if not set(head.path[k:]) & set(head.views))
        lazy[head.path[root]] = _chain(view, head, len(head.path) - root).text
        kept |= set(head.path[place:root])
    return lazy, kept


def _check_reader(view: View, reader: fx.Node) -> None:
    """Raises where reading lazy logits is certain to build them at every step."""
    for end in _ends(view, reader):
        op = view.op(end)
        lazily = (
            end.op == "output" or op.kind == "cross_entropy" or (op.kind == "reduce" and op.params["fn"] == "logsumexp")
        )
        if not lazily:
            raise _Stop(f"the logits are also read by {_name(end)}, at every step")


def _ends(view: View, node: fx.Node) -> Iterator[fx.Node]:
    """The first readers that are no cast or view."""
    if node.op != "output" and view.op(node).kind in ("identity", "cast", "detach", "reshape", "index"):
        for user in view.users(node):
            yield from _ends(view, user)
    else:
        yield node


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", None) or str(node.target)


# samples


def _llama(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden[:, slice(0, None), :], weight).float()
    target = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1).to(logits.device)
    return F.cross_entropy(logits.view(-1, weight.shape[0]), target, ignore_index=-100, reduction="mean")


def _gemma2(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = torch.tanh(F.linear(hidden, weight) / 30.0) * 30.0
    return (
        F.cross_entropy(logits.float().view(-1, weight.shape[0]), labels.view(-1), ignore_index=-100, reduction="sum")
        / 7
    )


def _lora(hidden: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight) + F.linear(F.linear(hidden, a), b) * 2.0
    return F.cross_entropy(logits.float().view(-1, weight.shape[0]), labels.view(-1))


def _cohere(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight) * 0.0625
    return F.cross_entropy(logits.float().view(-1, weight.shape[0]), labels.view(-1), label_smoothing=0.1)


def _shifted_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias)[..., :-1, :].contiguous().float()
    return F.cross_entropy(logits.view(-1, weight.shape[0]), labels[..., 1:].contiguous().view(-1))


def _per_token(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).transpose(1, 2), labels, reduction="none")


def _arguments(bias: bool = False, rank: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 5, 8), (33, 8)))
    labels = torch.randint(0, 33, (2, 5), generator=generator)
    labels[0, 2] = -100
    more = ((33,),) if bias else ((rank, 8), (33, rank)) if rank else ()
    return (hidden, weight, *(torch.randn(s, generator=generator, dtype=torch.float64) for s in more), labels)


RULE = StructuralRule(
    name=RULE_NAME,
    math=MATH,
    recognise=recognise,
    samples=(
        Sample("llama", _llama, _arguments),
        Sample("gemma2: soft-cap, sum over num_items", _gemma2, _arguments),
        Sample("cohere: scale, smoothing", _cohere, _arguments),
        Sample("shifted logits, bias", _shifted_logits, lambda: _arguments(bias=True)),
        Sample("an adapted head", _lora, lambda: _arguments(rank=3)),
        Sample("a loss for each token", _per_token, _arguments),
    ),
)
