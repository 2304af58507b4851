"""Pointwise steps of one number, by the names that a ``Chain`` has for them."""

from __future__ import annotations

from torch import fx

from .meaning import Op

ALONE = ("neg", "tanh", "sigmoid", "softplus", "relu", "abs", "exp")
WITH_NUMBER = {"add": ("add", "add"), "mul": ("mul", "mul"), "sub": ("sub", "rsub"), "div": ("div", None)}
"""Steps with a number to the right of the logit, and to the left."""


class NoStep(Exception):
    """It is no function of one number; the text says what it is."""


def step(op: Op) -> tuple[fx.Node, str, tuple[float, ...]]:
    """A pointwise function of one node and numbers: (the node, the step's name, its numbers). Raises ``NoStep``."""
    fn, args = op.params["fn"], op.args
    nodes = [a for a in args if isinstance(a, fx.Node)]
    numbers = tuple(float(a) for a in args if type(a) in (int, float))
    if len(nodes) == 1 and len(nodes) + len(numbers) == len(args):
        if fn in ALONE and not numbers:
            return nodes[0], fn, ()
        if fn in WITH_NUMBER and len(numbers) == 1:
            name = WITH_NUMBER[fn][0 if args[0] is nodes[0] else 1]
            if name is not None and abs(numbers[0]) != float("inf") and not (name == "div" and numbers[0] == 0):
                return nodes[0], name, numbers
        if fn == "clamp" and len(numbers) == 2:
            return nodes[0], "clamp", numbers
    raise NoStep(f"{fn} of {len(nodes)} tensors, which is not a known function of one logit")
