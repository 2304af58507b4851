"""Attention written out: the product of queries and keys, scaled, masked, through a softmax, times the values.

    out[b,h,i,:] = sum_j softmax_j(f(q[b,h,i,:].k[b,h,j,:]) + mask[b,h,i,j]) v[b,h,j,:]

The scores and their softmax are what costs: queries x keys numbers, several times over. Between the two products every step is one
of: a pointwise step of the score alone (together the chain f: a scale, a soft-cap), a tensor to add, a number where a condition does not
hold, a column that is the same for every query of a head and is dropped after the softmax (a sink), the row's maximum to subtract (softmax
does not see it), a cast.

scaled_dot_product_attention has a word for a scale and a mask. Where there is more, and in 16 bits, a kernel of our own is needed: the
backward of a library's, dS = P (dP - rowsum(dP P)), takes the row sum from the rounded result, and where weights are nearly alike the
gradients of q and k lose digits that the written form keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from slothc.gradients.vocabulary import Chain
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .mask import Facts
from .meaning import Op
from .rule import Miss
from .steps import NoStep, step

RULE_NAME = "attention"
LOW = (torch.bfloat16, torch.float16)
SHUT = -1e30         # this and less takes in any score: added to it or in its place is the same number
WIDEST = 256         # a head's dimension in a kernel of our own


@dataclass(frozen=True)
class Part:
    """One step of the mask, nearest to the product first.

    ``kind``: ``add`` (``node`` is added), ``keep`` (``value`` stands where ``node`` is false), ``drop`` (where it is true).
    """

    kind: str
    node: fx.Node
    value: float = 0.0


@dataclass
class Scores:
    """Attention as its parts. ``turned``: k is [batch, head, dim, length]. ``nodes``: what only computes the scores and weights.

    ``scale``: what the chain is, where it is a scale; ``chain``: its text. ``sinks``: [1, head, 1, 1] or None. ``library``: whether
    scaled_dot_product_attention can say it. ``dtype``: in which the products are made.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    turned: bool
    scale: float
    chain: str
    sinks: fx.Node | None
    parts: tuple[Part, ...]
    nodes: tuple[fx.Node, ...]
    library: bool
    dtype: torch.dtype


class _Stop(Exception):
    """The reason why this is left alone."""


@dataclass
class _Walk:
    """From the softmax back to the product: steps of the chain and of the mask met so far (the last ones first), nodes seen.

    ``needs``: why a library's kernel cannot do it, if so.
    """

    steps: list[tuple[str, tuple[float, ...]]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    sinks: fx.Node | None = None
    dropped: bool = False
    needs: str = ""

    @property
    def scale(self) -> float | None:
        """The chain's steps so far as one positive factor, if they are that."""
        factor = 1.0
        for fn, numbers in self.steps:
            if fn not in ("mul", "div") or not 0.0 < numbers[0] < float("inf"):
                return None
            factor *= numbers[0] if fn == "mul" else 1.0 / numbers[0]
        return factor


def written(view: Facts, node: fx.Node) -> Scores | Miss | None:
    """The attention whose product with the values ``node`` is; None where it is another product."""
    if view.op(node).kind != "matmul" or view.value(node).dim() != 4:
        return None
    weights, v = view.op(node).args
    walk = _Walk()
    softmax, reason = _softmax(view, walk, weights, v)
    if softmax is None:
        return None
    product = _product(view, softmax)
    if product is None:
        return None
    try:
        if reason is not None:
            raise _Stop(reason)
        return _scores(view, node, walk, view.op(softmax).args[0], v)
    except _Stop as stop:
        return Miss(RULE_NAME, node, str(stop))


def _softmax(view: Facts, walk: _Walk, node: fx.Node, v: fx.Node) -> tuple[fx.Node | None, str | None]:
    """The softmax over the last dimension behind the weights; why something else that stands there cannot be had, if so."""
    reason = None
    while True:
        walk.nodes.append(node)
        op = view.op(node)
        if op.kind == "softmax":
            last = op.params["fn"] == "softmax" and op.params["dim"] == view.value(node).dim() - 1
            return (node if last else None), reason
        if op.kind == "index":
            walk.dropped = True
            if not _drops_last(view, node, op):
                reason = "some of its weights are left out"
        elif op.kind == "dropout":
            reason = "dropout between the softmax and the values draws its mask otherwise in a library's kernel"
        elif op.kind not in ("cast", "identity"):
            return None, None
        node = op.args[0]


def _drops_last(view: Facts, node: fx.Node, op: Op) -> bool:
    """Whether the node is x[..., :-1]."""
    before, after = view.value(op.args[0]).shape, view.value(node).shape
    items = op.params["items"]
    if len(before) != 4 or len(after) != 4 or len(items) != 4 or any(not isinstance(i, slice) for i in items):
        return False
    whole = all(i == slice(None) for i in items[:3])
    last = items[3].start in (None, 0) and items[3].step in (None, 1)
    return whole and last and statically_known_true(before[3] == after[3] + 1)


def _product(view: Facts, softmax: fx.Node) -> fx.Node | None:
    """A product of two matrices of the graph behind the softmax, one step after the other."""
    waiting, seen = [softmax], set()
    while waiting:
        node = waiting.pop()
        op = view.op(node)
        if op.kind == "matmul":
            return node
        if node not in seen and op.kind in ("softmax", "pointwise", "cast", "identity", "reshape", "cat", "index", "expand"):
            seen.add(node)
            waiting += [a for a in node.all_input_nodes if a.op.startswith("call")]
    return None


def _scores(view: Facts, node: fx.Node, walk: _Walk, start: fx.Node, v: fx.Node) -> Scores:
    at = start
    while view.op(at).kind != "matmul":
        walk.nodes.append(at)
        at = _before(view, walk, at, view.op(at))
    walk.nodes.append(at)
    if walk.dropped and walk.sinks is None:
        raise _Stop("its softmax has more columns than keys")
    q, k = view.op(at).args
    back = view.op(k)
    turned = not (back.kind == "permute" and back.params["dims"] == (0, 1, 3, 2))
    k = k if turned else back.args[0]
    dtype = view.value(at).dtype
    _check_shapes(view, node, (q, k, v), turned, dtype)
    _check_mask(view, walk, q, at, start)
    scale, chain = walk.scale, Chain("fp32")
    if scale is None:
        walk.needs = walk.needs or f"the scores go through {', '.join(fn for fn, _ in reversed(walk.steps) if fn not in ('mul', 'div'))}"
    for fn, numbers in reversed(walk.steps):
        chain = chain.then(fn, *numbers)
    _check_readers(view, node, walk.nodes)
    _check_kernel(view, walk, (q, k, v), turned, dtype)
    return Scores(
        q, k, v, turned, scale or 1.0, chain.text, walk.sinks, tuple(reversed(walk.parts)), tuple(walk.nodes), not walk.needs, dtype
    )


def _before(view: Facts, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    """The scores before the step that ``node`` takes; ``walk`` notes the step."""
    if op.kind in ("cast", "identity"):
        return op.args[0]
    if op.kind == "cat" and not walk.steps and not walk.parts:
        return _joined(view, walk, node, op)
    if op.kind != "pointwise":
        raise _Stop(f"between the scores and the softmax stands {op.params.get('fn') or op.kind}")
    special = _STEPS.get(op.params["fn"])
    if special is not None and sum(isinstance(a, fx.Node) for a in op.args) > 1:
        return special(view, walk, node, op)
    try:
        scores, fn, numbers = step(op)
    except NoStep:
        raise _Stop(f"the scores go through {op.params['fn']} of more than themselves") from None
    walk.steps.append((fn, numbers))
    return scores


def _joined(view: Facts, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    """cat of the scores and one column, the same for every query of a head."""
    if not walk.dropped or op.params["dim"] != 3 or len(op.args) != 2 or walk.sinks is not None:
        raise _Stop("its softmax has more columns than keys")
    scores, column = op.args
    while view.op(column).kind in ("expand", "cast", "identity"):
        walk.nodes.append(column)
        column = view.op(column).args[0]
    shape, heads = view.value(column).shape, view.value(scores).shape[1]
    if len(shape) != 4 or not all(statically_known_true(a == b) for a, b in zip(shape, (1, heads, 1, 1))):
        raise _Stop("its softmax has more columns than keys: they are not one for each head")
    walk.sinks, walk.needs = column, "its softmax has more columns than keys (a sink)"
    return scores


def _added(view: Facts, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    """x + mask, whichever of the two is written first: the scores are the side that has a product behind it."""
    first, second = op.args
    scores = [a for a in (first, second) if _product(view, a) is not None]
    if len(scores) != 1:
        raise _Stop("two products are added: positions have scores of their own")
    if walk.steps:
        raise _Stop("the mask is scaled with the scores" if walk.scale else "the mask goes through the scores' chain")
    walk.parts.append(Part("add", second if scores[0] is first else first))
    return scores[0]


def _filled(view: Facts, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    condition, true, false = op.args
    scale = walk.scale
    if scale is None:
        raise _Stop("the mask goes through the scores' chain")
    for kind, scores, value in (("keep", true, false), ("drop", false, true)):
        number = _number(view, value)
        if isinstance(scores, fx.Node) and number is not None:
            if not number * scale <= SHUT:
                raise _Stop(f"{number} stands in place of scores")
            walk.parts.append(Part(kind, condition, number * scale))
            return scores
    raise _Stop("the scores are chosen from two tensors")


def _number(view: Facts, value: object) -> float | None:
    """A number, or a tensor that one makes."""
    if type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, fx.Node) and view.op(value).kind == "full":
        return _number(view, view.op(value).params["value"])
    return None


def _shifted(view: Facts, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    """x - max(x) along the row: softmax(x - c) = softmax(x)."""
    x, shift = op.args
    through = []
    while view.op(shift).kind in ("identity", "detach", "item", "cast"):
        through.append(shift)
        shift = view.op(shift).args[0]
    op = view.op(shift)
    largest = (op.kind == "reduce" and op.params["fn"] == "amax" and op.params["dims"] == (view.value(x).dim() - 1,)) or _pairs(shift, x)
    if not largest or op.args[0] is not x:
        raise _Stop("a tensor is subtracted from the scores")
    walk.nodes += [*through, shift]
    return x


def _pairs(node: fx.Node, x: fx.Node) -> bool:
    """Whether the node is ``x.max(dim=-1)``, a pair of values and places."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return name == "max" and node.args[:1] == (x,) and dim in (-1, 3)


_Step = Callable[[Facts, _Walk, fx.Node, Op], fx.Node]
_STEPS: dict[str, _Step] = {"add": _added, "where": _filled, "sub": _shifted}


def _check_shapes(view: Facts, node: fx.Node, operands: tuple[fx.Node, ...], turned: bool, dtype: torch.dtype) -> None:
    values = [view.value(n) for n in operands]
    if view.value(node).dtype is not dtype or (dtype not in LOW and any(t.dtype is not dtype for t in values)):
        raise _Stop("queries, keys, values and result are not of one dtype")
    if any(t.dim() != 4 for t in values):
        raise _Stop("queries, keys and values are not [batch, head, length, dim]")
    shapes = [tuple(t.shape) for t in values]
    if turned:
        shapes[1] = (*shapes[1][:2], shapes[1][3], shapes[1][2])
    lead = all(statically_known_true(s[d] == shapes[0][d]) for s in shapes[1:] for d in (0, 1))
    if not lead or not statically_known_true(shapes[0][3] == shapes[1][3]) or not statically_known_true(shapes[1][2] == shapes[2][2]):
        raise _Stop("queries, keys and values are broadcast against each other")


def _check_mask(view: Facts, walk: _Walk, q: fx.Node, product: fx.Node, start: fx.Node) -> None:
    before, after = view.value(product).shape, view.value(start).shape
    more = int(walk.sinks is not None)
    if len(before) != len(after) or not all(statically_known_true(a + b == c) for a, b, c in zip(before, (0, 0, 0, more), after)):
        raise _Stop("the mask makes more scores than there are")
    if any(p.kind == "add" and view.value(p.node).dtype is not view.value(q).dtype for p in walk.parts):
        walk.needs = walk.needs or "the mask is added in another dtype than the queries'"


def _check_kernel(view: Facts, walk: _Walk, operands: tuple[fx.Node, ...], turned: bool, dtype: torch.dtype) -> None:
    """Whether there can be a kernel of our own where a library's does not do."""
    if dtype in LOW:
        walk.needs = walk.needs or f"in {str(dtype).removeprefix('torch.')} a library's gradients are farther from truth than these"
    if not walk.needs:
        return
    device = view.value(operands[0]).device
    if not view.generates(device):
        raise _Stop(f"{walk.needs}, and kernels are not generated for {device.type}")
    if dtype not in (*LOW, torch.float32):
        raise _Stop(f"{walk.needs}, and no kernel is made for {str(dtype).removeprefix('torch.')}")
    dims = (view.value(operands[1]).shape[2 if turned else 3], view.value(operands[2]).shape[3])
    if not all(statically_known_true(d <= WIDEST) for d in dims):
        raise _Stop(f"{walk.needs}, and heads wider than {WIDEST} do not fit a kernel")
    if any(p.node is not None and view.value(p.node).requires_grad for p in walk.parts):
        raise _Stop(f"{walk.needs}, and the mask is learned")


def _check_readers(view: Facts, node: fx.Node, nodes: list[fx.Node]) -> None:
    inside = {node, *nodes}
    for n in nodes:
        if any(user not in inside for user in view.users(n)):
            raise _Stop("its scores or weights are read elsewhere")
