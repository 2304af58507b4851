"""Attention written out: the product of queries and keys, scaled, masked, through a softmax, times the values.

    out[b,h,i,:] = sum_j softmax_j(scale * q[b,h,i,:].k[b,h,j,:] + mask[b,h,i,j]) v[b,h,j,:]

The scores and their softmax are what costs: queries x keys numbers, several times over. Between the two products every
step is one of: a number to scale with, a tensor to add, a number where a condition does not hold, the row's maximum to
subtract (softmax does not see it), a cast. What else stands there has no word in scaled_dot_product_attention.

In 16 bits it stays as it is: the backward of a fused kernel, dS = P (dP - rowsum(dO O)), takes the row sum from the rounded O. Where
weights are nearly alike the difference is far smaller than its terms, and the gradients of q and k lose digits that the written form,
which sums P dP, keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .meaning import Op, View
from .rule import Miss

RULE_NAME = "attention"
LOW = (torch.bfloat16, torch.float16)
SHUT = -1e30         # this and less takes in any score: added to it or in its place is the same number


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
    """Attention as its parts. ``turned``: k is [batch, head, dim, length]. ``nodes``: what only computes the scores and weights."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    turned: bool
    scale: float
    parts: tuple[Part, ...]
    nodes: tuple[fx.Node, ...]


class _Stop(Exception):
    """The reason why this is left alone."""


@dataclass
class _Walk:
    """From the softmax back to the product: numbers met so far, mask steps met (the last one first), nodes seen."""

    scale: float = 1.0
    parts: list[Part] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


def written(view: View, node: fx.Node) -> Scores | Miss | None:
    """The attention whose product with the values ``node`` is; None where it is another product."""
    if view.op(node).kind != "matmul" or view.value(node).dim() != 4:
        return None
    weights, v = view.op(node).args
    walk = _Walk()
    softmax, sliced = _softmax(view, walk, weights)
    if softmax is None:
        return None
    product = _product(view, softmax)
    if product is None:
        return None
    try:
        if sliced is not None:
            raise _Stop(sliced)
        return _scores(view, node, walk, view.op(softmax).args[0], v)
    except _Stop as stop:
        return Miss(RULE_NAME, node, str(stop))


def _softmax(view: View, walk: _Walk, node: fx.Node) -> tuple[fx.Node | None, str | None]:
    """The softmax over the last dimension behind the weights; why it is not all that makes them, if so."""
    sliced = None
    while True:
        walk.nodes.append(node)
        op = view.op(node)
        if op.kind == "softmax":
            last = op.params["fn"] == "softmax" and op.params["dim"] == view.value(node).dim() - 1
            return (node if last else None), sliced
        if op.kind == "index":
            sliced = "its softmax has more columns than keys (a sink)"
        elif op.kind == "dropout":
            sliced = "dropout between the softmax and the values draws its mask otherwise in a library's kernel"
        elif op.kind not in ("cast", "identity"):
            return None, None
        node = op.args[0]


def _product(view: View, softmax: fx.Node) -> fx.Node | None:
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


def _scores(view: View, node: fx.Node, walk: _Walk, start: fx.Node, v: fx.Node) -> Scores:
    at = start
    while view.op(at).kind != "matmul":
        walk.nodes.append(at)
        at = _before(view, walk, at, view.op(at))
    walk.nodes.append(at)
    q, k = view.op(at).args
    back = view.op(k)
    turned = not (back.kind == "permute" and back.params["dims"] == (0, 1, 3, 2))
    k = k if turned else back.args[0]
    _check_shapes(view, node, q, k, v, turned)
    _check_mask(view, walk, q, at, start)
    _check_readers(view, node, walk.nodes)
    return Scores(q, k, v, turned, walk.scale, tuple(reversed(walk.parts)), tuple(walk.nodes))


def _before(view: View, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    """The scores before the step that ``node`` takes; ``walk`` notes the step."""
    if op.kind in ("cast", "identity"):
        return op.args[0]
    if op.kind != "pointwise":
        raise _Stop(f"between the scores and the softmax stands {op.params.get('fn') or op.kind}")
    step = _STEPS.get(op.params["fn"])
    if step is None:
        raise _Stop(f"the scores go through {op.params['fn']}")
    return step(view, walk, node, op)


def _scaled(view: View, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    numbers = [a for a in op.args if type(a) in (int, float)]
    nodes = [a for a in op.args if isinstance(a, fx.Node)]
    inverse = op.params["fn"] == "div"
    if len(numbers) != 1 or len(nodes) != 1 or (inverse and op.args[1] is not numbers[0]):
        raise _Stop("the scores are scaled by a tensor")
    number = float(numbers[0])
    if not 0.0 < number < float("inf"):
        raise _Stop(f"the scores are scaled by {number}")
    walk.scale *= 1.0 / number if inverse else number
    return nodes[0]


def _added(view: View, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    """x + mask, whichever of the two is written first: the scores are the side that has a product behind it."""
    first, second = op.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        raise _Stop("a number is added to the scores")
    scores = [a for a in (first, second) if _product(view, a) is not None]
    if len(scores) != 1:
        raise _Stop("two products are added: positions have scores of their own")
    _unscaled(walk)
    walk.parts.append(Part("add", second if scores[0] is first else first))
    return scores[0]


def _unscaled(walk: _Walk) -> None:
    if walk.scale != 1.0:
        raise _Stop("the mask is scaled with the scores")


def _filled(view: View, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    condition, true, false = op.args
    for kind, scores, value in (("keep", true, false), ("drop", false, true)):
        number = _number(view, value)
        if isinstance(scores, fx.Node) and number is not None:
            if not number * walk.scale <= SHUT:
                raise _Stop(f"{number} stands in place of scores")
            walk.parts.append(Part(kind, condition, number * walk.scale))
            return scores
    raise _Stop("the scores are chosen from two tensors")


def _number(view: View, value: object) -> float | None:
    """A number, or a tensor that one makes."""
    if type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, fx.Node) and view.op(value).kind == "full":
        return _number(view, view.op(value).params["value"])
    return None


def _shifted(view: View, walk: _Walk, node: fx.Node, op: Op) -> fx.Node:
    """x - max(x) along the row: softmax(x - c) = softmax(x)."""
    x, shift = op.args
    if not (isinstance(x, fx.Node) and isinstance(shift, fx.Node)):
        raise _Stop("a number is subtracted from the scores")
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


_Step = Callable[[View, _Walk, fx.Node, Op], fx.Node]
_STEPS: dict[str, _Step] = {"mul": _scaled, "div": _scaled, "add": _added, "where": _filled, "sub": _shifted}


def _check_shapes(view: View, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, turned: bool) -> None:
    values = [view.value(n) for n in (q, k, v)]
    if len({t.dtype for t in (*values, view.value(node))}) != 1:
        raise _Stop("queries, keys, values and result are not of one dtype")
    if values[0].dtype in LOW:
        raise _Stop(f"in {str(values[0].dtype).removeprefix('torch.')} a fused kernel's gradients are farther from truth than these")
    if any(t.dim() != 4 for t in values):
        raise _Stop("queries, keys and values are not [batch, head, length, dim]")
    shapes = [tuple(t.shape) for t in values]
    if turned:
        shapes[1] = (*shapes[1][:2], shapes[1][3], shapes[1][2])
    lead = all(statically_known_true(s[d] == shapes[0][d]) for s in shapes[1:] for d in (0, 1))
    if not lead or not statically_known_true(shapes[0][3] == shapes[1][3]) or not statically_known_true(shapes[1][2] == shapes[2][2]):
        raise _Stop("queries, keys and values are broadcast against each other")


def _check_mask(view: View, walk: _Walk, q: fx.Node, product: fx.Node, start: fx.Node) -> None:
    before, after = view.value(product).shape, view.value(start).shape
    if len(before) != len(after) or not all(statically_known_true(a == b) for a, b in zip(before, after)):
        raise _Stop("the mask makes more scores than there are")
    if any(p.kind == "add" and view.value(p.node).dtype is not view.value(q).dtype for p in walk.parts):
        raise _Stop("the mask is added in another dtype than the queries'")


def _check_readers(view: View, node: fx.Node, nodes: list[fx.Node]) -> None:
    inside = {node, *nodes}
    for n in nodes:
        if any(user not in inside for user in view.users(n)):
            raise _Stop("its scores or weights are read elsewhere")
