"""The likelihood of the right class, however a loss spells it.

    cross_entropy(z, y) = nll_loss(log_softmax(z), y)
                        = -gather(log_softmax(z), y) = logsumexp(z) - gather(z, y)        for each token

and log_softmax(log_softmax(z)) = log_softmax(z).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .meaning import View

EACH = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "none", "weight": None}


@dataclass(frozen=True)
class Likelihood:
    """``logits``: the node of z, or of log_softmax(z) where ``normalised``. ``params``: cross_entropy's. ``around``: nodes of the spelling
    between z and the result. ``sign``: of the result to the loss. ``picked``: labels have a last dimension of 1 that the result has not.
    ``last``: the classes are the last dimension of z, however many there are.
    """

    logits: fx.Node
    labels: fx.Node
    params: Mapping[str, Any]
    around: frozenset[fx.Node] = field(default_factory=frozenset)
    sign: float = 1.0
    normalised: bool = False
    picked: bool = False
    last: bool = False


def likelihood(view: View, node: fx.Node) -> Likelihood | None:
    """What loss ``node`` is, if any."""
    op = view.op(node)
    if op.kind in ("cross_entropy", "nll_loss"):
        return Likelihood(op.args[0], op.args[1], op.params, normalised=op.kind == "nll_loss")
    if _gathers(view, node):
        return Likelihood(op.args[0], op.args[1], EACH, sign=-1.0, normalised=True, last=True)
    if op.kind == "pointwise" and op.params["fn"] == "sub":
        return _difference(view, op.args)
    return None


def _gathers(view: View, node: fx.Node) -> bool:
    """Whether the node picks one element of every row."""
    op = view.op(node)
    if op.kind != "gather" or not op.params.get("along"):
        return False
    x, index = view.value(op.args[0]), view.value(op.args[1])
    return index.dtype == torch.int64 and op.params["dim"] == x.dim() - 1 and _same(tuple(index.shape), (*x.shape[:-1], 1))


def _difference(view: View, args: tuple[Any, ...]) -> Likelihood | None:
    """logsumexp(z) and the right class's z, one from the other."""
    if not all(isinstance(a, fx.Node) for a in args):
        return None
    for total, chosen, sign in ((*args, 1.0), (*reversed(args), -1.0)):
        summed, between = _behind(view, total, ("identity",))
        gathered, dropped = _behind(view, chosen, ("identity", "reshape", "index"))
        op = view.op(summed)
        if op.kind != "reduce" or op.params["fn"] != "logsumexp" or not _gathers(view, gathered):
            continue
        z, labels = view.op(gathered).args
        whole = tuple(op.params["dims"]) == (view.value(z).dim() - 1,)
        picked, size = not op.params["keepdim"], tuple(view.value(labels).shape)
        expected = size[:-1] if picked else size
        if whole and op.args[0] is z and all(_same(tuple(view.value(n).shape), expected) for n in (chosen, total)):
            around = frozenset({summed, gathered, *between, *dropped})
            return Likelihood(z, labels, EACH, around, sign, picked=picked, last=True)
    return None


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are known to be equal, without adding a guard."""
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b))


def _behind(view: View, node: fx.Node, kinds: tuple[str, ...]) -> tuple[fx.Node, list[fx.Node]]:
    """The first node behind those of ``kinds``, and those."""
    passed = []
    while view.op(node).kind in kinds:
        passed.append(node)
        node = view.op(node).args[0]
    return node, passed
