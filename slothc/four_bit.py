"""Linears whose frozen weight is held in four bits (bitsandbytes), as plain linears of a weight made whole.

    y = gemm_4bit(x, q, ..)          w = whole(q, ..);  y = linear(x, w, b)

so that the rules for linears and their adapters hold for them. With a gradient the product is an autograd function of bitsandbytes, by one
call (``four_bit_product``) or by its forward and backward as Dynamo traces them. That its backward multiplies with the same weight is tried
out, once for each form, before it is believed. The calls stay in the graph until something takes the linear in; where nothing does they
take their place again (``restore``), so that no whole weight is kept for a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from slothc.kernels.four_bit import FourBit, Held, maker
from slothc.kernels.lowrank import lora_linear

from .bind.lora_linear import WEIGHT, joined_lora_linear
from .bind.replacement import Replacement
from .four_bit_product import gemm_4bit
from .spellings import target_name
from .view import GraphView
from .view_children import arguments, attribute

PRODUCT, FUNCTION = "bitsandbytes.gemm_4bit", "autograd_function_apply"
NAMES = ("x", "q", "shape", "s", "blocksize", "kind", "bias", "s8", "code", "offset")      # gemm_4bit's arguments; nested: s8 of scales s
KEYWORDS = {"A": "x", "B": "q", "shapeB": "shape", "absmax": "s", "quant_type": "kind", "absmax_8bit": "s8", "absmax_code": "code",
            "absmax_offset": "offset"}  # fmt: skip
FROZEN = "sloth_frozen"                   # in an input's meta: a part of a weight that is not trained
INSTEAD = "sloth_four_bit"                # in a linear's meta: the node whose place it has
TOKENS = 4
NEAR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}    # relative distance of two right products, four roundings
_trusted: dict[str, bool] = {}


@dataclass(frozen=True)
class _Call:
    """y = x W' + b: ``node`` is y, ``held`` are the operands of ``form``."""

    node: fx.Node
    x: fx.Node
    held: tuple[fx.Node, ...]
    bias: fx.Node | None
    form: FourBit


def four_bit(view: GraphView) -> bool:
    """Rewrite the graph of ``view`` as above; whether anything changed (the view is then out of date)."""
    calls = list(_calls(view))
    for call in calls:
        _write(view, call)
    return bool(calls)


def restore(graph: fx.Graph) -> None:
    """Linears that nothing took in are what they were."""
    for node in graph.nodes:
        before = node.meta.get(INSTEAD)
        if before is not None and node.target is F.linear and node.users:
            node.replace_all_uses_with(before)


def held(view: GraphView, r: Replacement) -> Replacement:
    """The same with a weight that is made whole inside the call, where the call takes one so."""
    if r.target not in (lora_linear, joined_lora_linear) or view.op(r.args[WEIGHT]).kind != "whole":
        return r
    op = view.op(r.args[WEIGHT])
    args = (*r.args[:WEIGHT], *op.args, *r.args[WEIGHT + 1 :])
    return replace(r, target=_with_held(r.target, op.params["form"]), args=args)


@cache
def _with_held(function: Callable[..., Tensor], form: FourBit) -> Callable[..., Tensor]:
    """``function`` of the operands of a weight's ``form`` in the weight's place."""
    count = len(form.operands)

    def run(*args: Any, **attrs: Any) -> Tensor:
        operands = args[WEIGHT : WEIGHT + count]
        return function(*args[:WEIGHT], Held(form, operands), *args[WEIGHT + count :], **attrs)

    run.__name__ = f"{function.__name__}_four_bit"
    return run


def _calls(view: GraphView) -> Iterator[_Call]:
    for node in view.nodes:
        if node.op != "call_function" or not view.alive(node):
            continue
        found = None
        if node.target is gemm_4bit:
            found = _one_call(view, node)
        elif target_name(node) == PRODUCT and not view.needs_grad(node):
            found = _described(view, node, _named(node))
        elif target_name(node) == FUNCTION:
            found = _function(view, node)
        if found is not None:
            yield found


def _one_call(view: GraphView, node: fx.Node) -> _Call | None:
    """The autograd function by one call, whatever its backward is."""
    x, q, bias, shape, blocksize, kind, _, scales, *nested = node.args
    values = dict.fromkeys(NAMES) | {"x": x, "q": q, "bias": bias, "shape": shape, "blocksize": blocksize, "kind": kind, "s": scales}
    if nested:
        (s, code, size, dtype), offset = cast(Any, nested)
        if (size, dtype) != (256, torch.float32):
            return None
        values |= {"s8": scales, "s": s, "code": code, "offset": offset}
    call = _described(view, node, values)
    if call is None:
        return None
    return call if not view.needs_grad(node) or _believed(view, _Trial.of(view, node, call, lambda y: y)) else None


def _function(view: GraphView, node: fx.Node) -> _Call | None:
    """An autograd function whose forward is the product of its arguments, and whose backward is that product's."""
    users = view.users(node)
    bodies = [m for n in node.all_input_nodes if isinstance(m := attribute(view.graph_module, n), fx.GraphModule)]
    if len(users) != 1 or target_name(users[0]) != "getitem" or users[0].args[1] != 0 or not bodies:
        return None
    products = [n for n in bodies[0].graph.nodes if n.op == "call_function" and target_name(n) == PRODUCT]
    output = next(n for n in bodies[0].graph.nodes if n.op == "output")
    if len(products) != 1 or _first(output.args) is not products[0]:
        return None
    given = arguments(view.graph_module, node)
    inputs = [n for n in bodies[0].graph.nodes if n.op == "placeholder"]
    outside = dict(zip(inputs[len(inputs) - len(given) :], given))       # older Dynamo's body begins with a context
    values = {name: outside.get(_behind(v)) if isinstance(v, fx.Node) else v for name, v in _named(products[0]).items()}
    call = _described(view, users[0], values)
    return call if call is not None and _believed(view, _Trial.of(view, node, call, lambda y: cast(Tensor, y[0]))) else None


def _first(value: Any) -> Any:
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value


def _behind(node: fx.Node) -> fx.Node:
    """The value behind other shapes of the same memory."""
    while node.op == "call_method" and node.target in ("view", "reshape", "detach", "contiguous") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _named(node: fx.Node) -> dict[str, Any]:
    """The product's arguments by name."""
    given = {KEYWORDS.get(k, k): v for k, v in node.kwargs.items()}
    return {**dict.fromkeys(NAMES), **dict(zip(NAMES, node.args)), **given}


def _described(view: GraphView, node: fx.Node, values: Mapping[str, Any]) -> _Call | None:
    """The call whose result is ``node``; None where its operands are not what the format says."""
    nested = values["s8"] is not None
    parts = [values[name] for name in (("q", "s8", "s", "code", "offset") if nested else ("q", "s"))]
    x, bias, shape = values["x"], values["bias"], values["shape"]
    if not all(isinstance(n, fx.Node) for n in (x, *parts)) or not (bias is None or isinstance(bias, fx.Node)):
        return None
    if bias is not None and view.needs_grad(bias):
        return None                                                        # its gradient would have to be tried out too
    if not isinstance(shape, tuple | list) or len(shape) != 2 or not all(type(n) is int for n in shape):
        return None
    held = tuple(_source(view, n) for n in parts)
    dtype = view.value(x).dtype
    right = dtype in NEAR and view.value(x).shape[-1] == shape[1] and not any(view.needs_grad(n) or view.mutated(n) for n in held)
    if not right or type(values["blocksize"]) is not int or not isinstance(values["kind"], str):
        return None
    return _Call(node, x, held, bias, FourBit((shape[0], shape[1]), values["blocksize"], values["kind"], nested, dtype))


def _source(view: GraphView, node: fx.Node) -> fx.Node:
    """What is held, whatever its shape: nothing between has to be known where it is read."""
    while view.op(node).kind in ("identity", "reshape") and isinstance(view.op(node).args[0], fx.Node):
        node = view.op(node).args[0]
    return node


@dataclass(frozen=True)
class _Trial:
    """What is run to try a call out: ``node`` with other values in the place of its arguments."""

    node: fx.Node
    call: _Call
    bodies: dict[fx.Node, fx.GraphModule]     # arguments that are graphs
    given: tuple[fx.Node, ...]                # those that are not
    result: Callable[[Any], Tensor]           # y, of what the node gives

    @staticmethod
    def of(view: GraphView, node: fx.Node, call: _Call, result: Callable[[Any], Tensor]) -> _Trial:
        graphs = {n: m for n in node.all_input_nodes if isinstance(m := attribute(view.graph_module, n), fx.GraphModule)}
        return _Trial(node, call, graphs, tuple(n for n in node.all_input_nodes if n not in graphs), result)

    def key(self, view: GraphView) -> str:
        """Of everything that the outcome depends on."""
        place = {n: f"v{k}" for k, n in enumerate((*self.bodies, *self.given))}
        shapes = [(tuple(v.shape), v.dtype, v.device) if isinstance(v := view.example(n), Tensor) and n is not self.call.x else None
                  for n in self.given]  # fmt: skip
        written = fx.map_arg((self.node.args, self.node.kwargs), place.__getitem__)
        return "\n".join([*(_text(b.graph) for b in self.bodies.values()), f"{target_name(self.node)} {written} {shapes} {self.call.form}"])

    def run(self, values: Mapping[fx.Node, Any]) -> Tensor:
        held: dict[fx.Node, Any] = {**self.bodies, **values}
        args, kwargs = cast(Any, fx.map_arg((self.node.args, self.node.kwargs), held.__getitem__))
        return self.result(cast(Any, self.node.target)(*args, **kwargs))


def _believed(view: GraphView, trial: _Trial) -> bool:
    """Whether the function's value and gradient are those of the linear, tried out on random operands."""
    key = trial.key(view)
    if key not in _trusted:
        try:
            _trusted[key] = _tried(view, trial)
        except Exception:                                                  # it does not run so: nothing is known of it
            _trusted[key] = False
    return _trusted[key]


def _text(graph: fx.Graph) -> str:
    """What the graph does, whatever its nodes are called."""
    place = {n: f"v{k}" for k, n in enumerate(graph.nodes)}
    lines = []
    for n in graph.nodes:
        args, kwargs = fx.map_arg((n.args, n.kwargs), place.__getitem__)
        lines.append(f"{n.op} {'' if n.op == 'placeholder' else n.target} {args} {kwargs}")
    return "\n".join(lines)


def _tried(view: GraphView, trial: _Trial) -> bool:
    call, device = trial.call, view.value(trial.call.x).device
    if device.type == "meta":
        return True
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), _alone(device):
        torch.manual_seed(20)
        values = {n: _drawn(view, n, n is call.x) for n in trial.given}
        x = values[call.x].requires_grad_()
        y = trial.run(values)
        known = {_source(view, n): values[n] for n in trial.given}
        w = call.form.whole(*(known[n] for n in call.held))
        again = x.detach().requires_grad_()
        z = F.linear(again, w, None if call.bias is None else values[call.bias])
        towards = torch.randn_like(y)
        found, true = (torch.autograd.grad(v, leaf, towards)[0] for v, leaf in ((y, x), (z, again)))
    near = NEAR[call.form.dtype]
    return all(float((a - b).float().norm()) <= near * float(b.float().norm()) for a, b in ((y.detach(), z.detach()), (found, true)))


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Whatever autocast is on, and whoever watches what is saved."""
    with torch.autocast(device.type, enabled=False), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


def _drawn(view: GraphView, node: fx.Node, few: bool) -> Tensor:
    """Random values like the node's; ``few``: of some rows only."""
    example = view.value(node)
    shape = (1, TOKENS, example.shape[-1]) if few else tuple(int(s) for s in example.shape)
    if example.dtype.is_floating_point:
        return torch.randn(shape, dtype=example.dtype, device=example.device)
    return torch.randint(0, 256, shape, device=example.device).to(example.dtype)


def _write(view: GraphView, call: _Call) -> None:
    graph, node = view.graph_module.graph, call.node
    with graph.inserting_after(node):
        made = graph.call_function(maker(call.form), call.held)
    with graph.inserting_after(made):
        linear = graph.call_function(F.linear, (call.x, made, call.bias))
    made.meta = {**node.meta, "example_value": _fake(view.value(node), call.form)}
    linear.meta = {**node.meta, "example_value": view.value(node), INSTEAD: node}
    node.replace_all_uses_with(linear)
    for part in call.held:
        part.meta[FROZEN] = True


def _fake(like: Tensor, form: FourBit) -> Tensor:
    if not isinstance(like, FakeTensor):
        return torch.empty(form.shape, dtype=form.dtype, device="meta")
    with like.fake_mode:
        return torch.empty(form.shape, dtype=form.dtype, device=like.device)
