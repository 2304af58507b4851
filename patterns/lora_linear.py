"""LoRA linear: y = x W' + b + s (drop(x) A') B', a base linear with low-rank adapters beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from .meaning import View
from .rule import Match, Miss, Sample, StructuralRule

NAME = "lora_linear"
MATH = "y = x W' + b + sum of s ((xa A') B' + c) over adapters,  xa = x or dropout(x),  A [r, K], B [N, r], r < min(N, K); rounded once"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Unlike(Exception):
    """The graph is not of this form; ``reason`` is None where it does not even look like it."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Branch:
    """linear(linear(source, a), b, bias) * scale * factor, and the nodes from its value back to ``source``."""

    a: fx.Node
    b: fx.Node
    down: fx.Node
    up: fx.Node
    scale: float
    factor: fx.Node | None
    bias: fx.Node | None
    source: fx.Node
    inside: list[fx.Node] = field(default_factory=list)


@dataclass
class Base:
    """The base linear behind ``node``; ``x`` is what it reads."""

    linear: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    layout: str
    inside: list[fx.Node] = field(default_factory=list)


def _widens(view: View, node: fx.Node) -> bool:
    """A cast that loses nothing."""
    before, after = view.value(view.op(node).args[0]).dtype, view.value(node).dtype
    return before in FLOATS and after in FLOATS and torch.promote_types(before, after) is after


def _peel(view: View, node: Any, passed: list[fx.Node], reshapes: bool = False) -> Any:
    """The value behind identities and casts that lose nothing (and, if ``reshapes``, views of the leading dims)."""
    while isinstance(node, fx.Node):
        op = view.op(node)
        kept = op.kind == "identity" or (op.kind == "cast" and _widens(view, node))
        if not kept and reshapes and op.kind == "reshape":
            kept = view.value(node).shape[-1:] == view.value(op.args[0]).shape[-1:]
        if not kept:
            break
        passed.append(node)
        node = op.args[0]
    return node


def _scaled(view: View, node: Any, passed: list[fx.Node], factors: list[fx.Node]) -> tuple[Any, float]:
    """node = value * scale * factors: the value behind identities and products with numbers; ``factors`` gets those that are known
    only at run time.
    """
    scale = 1.0
    while True:
        node = _peel(view, node, passed)
        op = view.op(node) if isinstance(node, fx.Node) else None
        if op is None or op.kind != "pointwise" or op.params.get("fn") not in ("mul", "div", "neg"):
            return node, scale
        numbers = [a for a in op.args if not _is_tensor(view, a)]
        nodes = [a for a in op.args if _is_tensor(view, a)]
        fn = op.params["fn"]
        if len(nodes) != 1 or (fn != "neg" and len(numbers) != 1) or (fn == "div" and op.args[0] is not nodes[0]):
            return node, scale
        if fn != "neg" and isinstance(numbers[0], fx.Node):
            if fn == "div":
                return node, scale
            factors.append(numbers[0])
        else:
            scale = -scale if fn == "neg" else scale * numbers[0] if fn == "mul" else scale / numbers[0]
        passed.append(node)
        node = nodes[0]


def _is_tensor(view: View, arg: Any) -> bool:
    try:
        return isinstance(arg, fx.Node) and isinstance(view.value(arg), torch.Tensor)
    except KeyError:  # a number known at run time only
        return False


def _is_linear(view: View, node: Any) -> bool:
    return isinstance(node, fx.Node) and view.op(node).kind == "linear"


def _branch(view: View, node: Any) -> Branch | None:
    """The adapter that ends in ``node``; None where it is not two linears in a row. Its value may be narrowed before it is added (PEFT does
    beside a base in four bits): the sum here is not the poorer by that rounding.
    """
    inside: list[fx.Node] = []
    factors: list[fx.Node] = []
    if isinstance(node, fx.Node) and view.op(node).kind == "cast" and not _widens(view, node) and view.value(node).dtype in FLOATS:
        inside.append(node)
        node = view.op(node).args[0]
    up, s1 = _scaled(view, node, inside, factors)
    late = len(factors)
    if not _is_linear(view, up):
        return None
    down, s2 = _scaled(view, view.op(up).args[0], inside, factors)
    if not _is_linear(view, down):
        return None
    source, a, _ = _parts(view, down)
    _, b, bias = _parts(view, up)
    if len(factors) > 1 or (bias is not None and (s2 != 1 or late < len(factors))):
        return None
    return Branch(a, b, down, up, s1 * s2, factors[0] if factors else None, bias, source, inside + [up, down])


def _parts(view: View, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    args = tuple(view.op(node).args) + (None,)
    return args[0], args[1], args[2]


def _base(view: View, node: Any) -> Base | None:
    inside: list[fx.Node] = []
    linear = _peel(view, node, inside, reshapes=True)
    if not _is_linear(view, linear):
        return None
    x, weight, bias = _parts(view, linear)
    return Base(linear, x, weight, bias, view.op(linear).params.get("layout", "nk"), inside + [linear])


def _sides(view: View, node: fx.Node) -> tuple[Base, list[Branch]]:
    """The base and the adapters of the sum at ``node``."""
    op = view.op(node)
    if op.kind != "pointwise" or op.params.get("fn") != "add" or len(op.args) != 2:
        raise _Unlike
    for one, other in (op.args, op.args[::-1]):
        branch = _branch(view, other)
        if branch is None:
            continue
        base = _base(view, one)
        if base is not None and _branch(view, one) is None:
            return base, [branch]
        inner: list[fx.Node] = []
        before = _peel(view, one, inner)
        if isinstance(before, fx.Node) and view.op(before).kind == "pointwise":
            base, branches = _sides(view, before)
            base.inside += [*inner, before]
            return base, [*branches, branch]
    if any(_magnified(view, arg) for arg in op.args):
        raise _Unlike("the adapter is multiplied by a magnitude for each column (DoRA): its products stay eager")
    raise _Unlike


def _magnified(view: View, node: Any) -> bool:
    """Whether a term is DoRA's m s (xa A') B', with a number m for each column."""
    node, _ = _scaled(view, node, [], [])
    op = view.op(node) if isinstance(node, fx.Node) else None
    if op is None or op.kind != "pointwise" or op.params["fn"] != "mul" or not all(_is_tensor(view, a) for a in op.args):
        return False
    for column, term in (op.args, op.args[::-1]):
        branch = _branch(view, term) if all(size == 1 for size in view.value(column).shape[:-1]) else None
        if branch is not None and view.value(branch.a).shape[0] < min(view.value(branch.a).shape[1], view.value(branch.b).shape[0]):
            return True
    return False


def adapted(view: View, node: fx.Node) -> tuple[Base, list[Branch]] | None:
    """The base linear and the adapters of the sum at ``node``; None where it is not such a sum."""
    try:
        return _sides(view, node)
    except (_Unlike, KeyError):
        return None


def _adapter_input(view: View, base: Base, branch: Branch, inside: list[fx.Node]) -> fx.Node | None:
    """What the adapter reads where that is not the base's x: dropout(x), or x narrowed. None where it is x."""
    passed: list[fx.Node] = []
    x = _peel(view, base.x, [], reshapes=True)
    source = _peel(view, branch.source, passed)
    op, wide = view.op(source), _narrowed_for_both(view, x, branch)
    for read in (x, *([] if wide is None else [wide])):
        if _peel(view, source, [], reshapes=True) is read:
            inside.extend(n for n in passed if view.op(n).kind != "reshape")
            return None
        if op.kind in ("dropout", "cast") and _peel(view, op.args[0], [], reshapes=True) is read:
            return branch.source
    raise _Unlike


def _narrowed_for_both(view: View, x: fx.Node, branch: Branch) -> fx.Node | None:
    """The value in fp32 behind ``x`` that the base reads narrowed, and the adapter as autocast narrows it; None where it is not so."""
    op, dtype = view.op(x), view.value(x).dtype
    if op.kind != "cast" or view.value(branch.down).dtype is not dtype or view.value(branch.source).dtype is dtype:
        return None
    wide: fx.Node = _peel(view, op.args[0], [], reshapes=True)
    read = _peel(view, branch.source, [], reshapes=True)
    if view.op(read).kind == "dropout":
        read = _peel(view, view.op(read).args[0], [], reshapes=True)
    return wide if read is wide else None


def _read_by_both(view: View, base: Base, branch: Branch) -> fx.Node:
    """The value that the base and the adapter read, before casts that do nothing where the adapter reads it without them."""
    passed: list[fx.Node] = []
    x, source = base.x, branch.source
    behind = {_peel(view, source, passed), *passed}
    wide = _narrowed_for_both(view, _peel(view, x, [], reshapes=True), branch)
    if wide is not None:
        return wide
    node = x
    while node not in behind:
        op = view.op(node)
        if op.kind != "identity" and not (op.kind == "cast" and view.value(op.args[0]).dtype is view.value(node).dtype):
            return x
        node = op.args[0]
    return node


def _guard(view: View, base: Base, branch: Branch, out: torch.dtype) -> None:
    """Raise where the value is LoRA but the kernel does not compute it."""
    a, b, weight = (view.value(n) for n in (branch.a, branch.b, base.weight))
    if any(view.op(n).params.get("layout", "nk") != "nk" for n in (branch.down, branch.up)):
        raise _Unlike("the adapter's weights are stored [in, out]")
    if any(t.dtype not in FLOATS or t.dim() != 2 for t in (a, b, weight)):
        raise _Unlike("a weight is not a floating-point matrix")
    if a.shape[0] >= min(weight.shape):
        raise _Unlike(f"rank {a.shape[0]} is not below {min(weight.shape)}: not a low-rank adapter")
    if _parts(view, branch.down)[2] is not None:
        raise _Unlike("the adapter's first product has a bias")
    if out is not view.value(base.linear).dtype:
        raise _Unlike(f"the sum stays {out}, the base linear is {view.value(base.linear).dtype}")


def _ends_later(view: View, node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the sum's only reader is the cast back to the base's dtype, which is then the node to match."""
    users = view.users(node)
    return len(users) == 1 and view.op(users[0]).kind == "cast" and view.value(users[0]).dtype is dtype


def _leaves(view: View, node: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes that go: all of ``inside``; a cast of x that others read stays. Raises where an inner value is read
    outside.
    """
    nodes = list(dict.fromkeys([node, *inside]))
    while True:
        read = [n for n in nodes if n is not node and any(u not in nodes for u in view.users(n))]
        inputs = [n for n in read if view.op(n).kind in ("identity", "cast")]
        if not read:
            return tuple(nodes)
        if len(inputs) < len(read):
            first = next(n for n in read if n not in inputs)
            raise _Unlike(f"{first.name} is also read outside of the adapted linear")
        nodes = [n for n in nodes if n not in inputs]


def _match(view: View, node: fx.Node) -> Match | None:
    top, out = node, view.value(node).dtype
    inside: list[fx.Node] = []
    if view.op(node).kind == "cast":
        top = view.op(node).args[0]
        if not isinstance(top, fx.Node) or view.value(top).dtype is out:
            return None
        inside.append(top)
    try:
        base, branches = _sides(view, top)
    except _Unlike as found:
        raise found if top is node else _Unlike() from None  # the sum itself has already been reported
    base_dtype = view.value(base.linear).dtype
    if top is node and out is not base_dtype and _ends_later(view, node, base_dtype):
        return None
    if top is not node and view.value(top).dtype is base_dtype:
        return None                                                        # the sum is the match, whatever it is cast to
    inside += base.inside + [n for branch in branches for n in branch.inside]
    xa, *others = (_adapter_input(view, base, branch, inside) for branch in branches)
    if any(other is not xa for other in others):
        raise _Unlike("a further active adapter reads x by a dropout of its own: its products stay eager")
    for branch in branches:
        _guard(view, base, branch, out)
    whole = view.value(base.x).shape[:-1] == view.value(node).shape[:-1]
    x = _read_by_both(view, base, branches[0]) if whole else _peel(view, base.x, [], reshapes=True)
    inputs = {"x": x, "xa": xa, "weight": base.weight, "bias": base.bias, **_adapter(branches[0])}
    attrs = {"out_dtype": out, "adapter_dtype": _widest(view, branches), "layout": base.layout}
    return Match(NAME, node, _leaves(view, node, inside), inputs | {"more": tuple(map(_adapter, branches[1:]))}, attrs)


def _adapter(branch: Branch) -> dict[str, Any]:
    """Its value is scale * factor * ((xa A') B' + c); factor and c may be None."""
    return {"a": branch.a, "b": branch.b, "c": branch.bias, "scale": branch.scale, "factor": branch.factor}


def _widest(view: View, branches: list[Branch]) -> torch.dtype:
    wide = view.value(branches[0].down).dtype
    for n in (n for branch in branches for n in (branch.down, branch.up)):
        wide = torch.promote_types(wide, view.value(n).dtype)
    return wide


def _goes_on(view: View, part: fx.Node) -> bool:
    """Whether a further adapter is added to the value, in a sum that is a match itself."""
    node = part
    while len(users := view.users(node)) == 1:
        node = users[0]
        if view.op(node).kind not in ("identity", "cast") and view.op(node).params.get("fn") != "add":
            return False
        try:
            found = _match(view, node)
        except (_Unlike, KeyError):
            found = None
        if found is not None:
            return part in found.nodes
    return False


def recognise(view: View, node: fx.Node) -> Match | Miss | None:
    """The adapted linear that ends at ``node``: the sum, or the cast of the sum back to the base's dtype."""
    if view.op(node).kind not in ("pointwise", "cast"):
        return None
    try:
        found: Match | Miss | None = _match(view, node)
    except _Unlike as unlike:
        found = Miss(NAME, node, unlike.reason) if unlike.reason else None
    except KeyError:  # a node without an example tensor: a size or a tuple, no matrix
        found = None
    return None if found is not None and _goes_on(view, node) else found


def _lora(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0


def _lora_bias(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 0.75 * F.linear(F.linear(x, a), b) + F.linear(x, w, bias)


def _lora_unscaled(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w) + F.linear(F.linear(x, a), b)


def _lora_conv1d(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    base = torch.addmm(bias, x.view(-1, x.size(-1)), w).view(2, 5, 9)
    return base + F.linear(F.linear(x, a), b) * 2.0


def _draw(*shapes: tuple[int, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    def arguments() -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(0)
        return tuple(torch.randn(s, generator=g, dtype=torch.float64) / s[-1] ** 0.5 for s in shapes)

    return arguments


SAMPLES = (
    Sample("lora", _lora, _draw((2, 5, 7), (9, 7), (3, 7), (9, 3))),
    Sample("lora with a base bias", _lora_bias, _draw((2, 5, 7), (9, 7), (9,), (3, 7), (9, 3))),
    Sample("lora with scale 1", _lora_unscaled, _draw((2, 5, 7), (9, 7), (3, 7), (9, 3))),
    Sample("lora on a Conv1D base", _lora_conv1d, _draw((2, 5, 7), (7, 9), (9,), (3, 7), (9, 3))),
)

RULE = StructuralRule(NAME, MATH, recognise, SAMPLES)
