"""Every spelling of a function has the same canonical meaning, and what cannot be named is opaque with a reason."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slothc.patterns.meaning import Op
from torch import fx

from slothc.spellings import TABLE, meaning


def capture(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    graphs: list[fx.GraphModule] = []

    def recorder(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic)(*args)
    return graphs[0]


def last(function: Callable[..., Any], *args: Any) -> Op:
    """The meaning of what the function returns."""
    graph = capture(function, *args).graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    return meaning(output.all_input_nodes[-1])


def shape_of(op: Op) -> tuple[Any, ...]:
    """Kind, params and operands with each node as its place among the inputs: equal for equal meanings."""
    return op.kind, tuple("node" if isinstance(arg, fx.Node) else arg for arg in op.args), dict(op.params)


def x34() -> torch.Tensor:
    return torch.linspace(-2, 2, 12).reshape(3, 4)


def x234() -> torch.Tensor:
    return torch.linspace(-2, 2, 24).reshape(2, 3, 4)


N = "node"
POINTWISE = {
    "pow": [lambda x: x**2, lambda x: x.pow(2), lambda x: torch.pow(x, exponent=2), torch.square, lambda x: x.square()],
    "rsqrt": [torch.rsqrt, lambda x: x.rsqrt()],
    "silu": [F.silu, lambda x: F.silu(input=x), torch.nn.SiLU()],
    "sigmoid": [torch.sigmoid, lambda x: x.sigmoid(), torch.special.expit],
    "gelu": [F.gelu, torch.nn.GELU()],
    "gelu_tanh": [lambda x: F.gelu(x, approximate="tanh"), torch.nn.GELU("tanh")],
    "relu": [F.relu, torch.relu, lambda x: x.relu()],
    "neg": [torch.neg, lambda x: -x, lambda x: x.negative()],
    "abs": [torch.abs, abs, lambda x: x.abs()],
    "tanh": [torch.tanh, lambda x: x.tanh()],
    "softplus": [F.softplus, lambda x: F.softplus(x, 1, threshold=20)],
    "leaky_relu": [F.leaky_relu, lambda x: F.leaky_relu(x, negative_slope=0.01)],
    "mish": [F.mish],
    "hardswish": [F.hardswish],
    "elu": [F.elu],
    "logsigmoid": [F.logsigmoid],
}


@pytest.mark.parametrize("fn", POINTWISE)
def test_pointwise_spellings(fn: str) -> None:
    found = [shape_of(last(function, x34())) for function in POINTWISE[fn]]
    assert found[0][0] == "pointwise" and found[0][2]["fn"] == fn
    assert all(item == found[0] for item in found)


@pytest.mark.parametrize(
    ("fn", "args", "functions"),
    [
        ("add", (N, 3), [lambda x: x + 3, lambda x: torch.add(x, 3), lambda x: x.add(other=3)]),
        ("sub", (3, N), [lambda x: 3 - x, lambda x: torch.rsub(x, 3), lambda x: x.__rsub__(3)]),
        ("sub", (N, N), [lambda x: x - x, lambda x: torch.subtract(x, x)]),
        ("div", (N, 3), [lambda x: x / 3, lambda x: torch.true_divide(x, 3), lambda x: x.div(3, rounding_mode=None)]),
        ("pow", (2, N), [lambda x: 2**x, lambda x: torch.pow(2, x)]),
        ("clamp", (N, -1, 1), [lambda x: x.clamp(-1, 1), lambda x: torch.clip(x, max=1, min=-1), F.hardtanh]),
        ("clamp", (N, None, 1), [lambda x: x.clamp(max=1), lambda x: x.clamp_max(1)]),
        ("clamp", (N, 0, None), [lambda x: x.clamp(min=0), lambda x: torch.clamp_min(x, 0)]),
        ("clamp", (N, 0, 6), [F.relu6]),
        ("maximum", (N, N), [torch.maximum, torch.max]),
        ("gt", (N, 0), [lambda x: x > 0, lambda x: torch.gt(x, 0), lambda x: x.greater(0)]),
    ],
)
def test_operands(fn: str, args: tuple[Any, ...], functions: list[Callable[..., Any]]) -> None:
    for function in functions:
        given = (x34(), x34() + 1) if function in (torch.maximum, torch.max) else (x34(),)
        op = last(function, *given)
        assert shape_of(op) == ("pointwise", args, {"fn": fn}), function


def test_where_and_masks_put_the_condition_first() -> None:
    mask = x34() > 0
    for function in (
        lambda x, m: torch.where(m, -1.0, x),
        lambda x, m: x.masked_fill(m, -1.0),
        lambda x, m: x.masked_fill(value=-1.0, mask=m),
    ):
        assert shape_of(last(function, x34(), mask)) == ("pointwise", (N, -1.0, N), {"fn": "where"})
    assert shape_of(last(lambda x, m: x.where(m, 0.0), x34(), mask)) == ("pointwise", (N, N, 0.0), {"fn": "where"})


def test_boolean_arithmetic_is_named_only_for_booleans() -> None:
    mask, number = x34() > 0, torch.ones(3, 4, dtype=torch.int64)
    assert last(operator.and_, mask, mask).params["fn"] == "and"
    assert last(torch.logical_or, mask, mask).params["fn"] == "or"
    assert last(lambda m: ~m, mask).params["fn"] == "not"
    assert last(operator.and_, number, number).kind == "opaque"
    assert last(lambda n: ~n, number).kind == "opaque"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.div(x, 3, rounding_mode="floor"),
        lambda x: F.softplus(x, beta=2.0),
        lambda x: x.cumsum(-1),
        lambda x: torch.einsum("ij,kl->ij", x, x),
        lambda x: torch.baddbmm(x[None], x[None], x[None].mT @ x[None]),
        lambda x: x.view(torch.int32),
        lambda x: F.group_norm(x, 2),
        lambda x: torch.take(x, torch.arange(2)),
    ],
)
def test_opaque(function: Callable[..., Any]) -> None:
    op = last(function, x34())
    assert op.kind == "opaque" and isinstance(op.params["fn"], str)


def test_a_pair_is_opaque_and_its_halves_are_items() -> None:
    op = last(lambda x: x.max(-1).values, x34())
    assert shape_of(op) == ("item", (N,), {"number": 0}) and meaning(op.args[0]).kind == "opaque"


def test_casts_and_what_does_nothing() -> None:
    for function in (
        lambda x: x.to(torch.bfloat16),
        lambda x: x.to(dtype=torch.bfloat16, device="cpu"),
        lambda x: x.bfloat16(),
        lambda x: x.type(torch.bfloat16),
        lambda x: x.type_as(torch.zeros(1, dtype=torch.bfloat16)),
        lambda x: x.to(torch.zeros(1, dtype=torch.bfloat16)),
    ):
        assert shape_of(last(function, x34())) == ("cast", (N,), {})
    for function in (
        lambda x: x.float(),
        lambda x: x.to("cpu"),
        lambda x: x.contiguous(),
        lambda x: F.dropout(x, 0.0, True),
        lambda x: F.dropout(x, p=0.5, training=False),
        lambda x: x * 1.0,
        lambda x: 1 * x,
        lambda x: x / 1,
        lambda x: x + 0.0,
        lambda x: x - 0,
        lambda x: x.view(3, 4),
        lambda x: x.expand(3, -1),
        lambda x: x[:, :9],
        lambda x: x[..., :],
        lambda x: x.transpose(1, 1),
        lambda x: torch.cat([x]),
    ):
        assert last(function, x34()).kind == "identity", function
    assert last(lambda x: x.clone(), x34()).params == {"clone": True}
    assert last(lambda x: x * 1.0, torch.ones(3, dtype=torch.int64)).kind == "pointwise"
    assert last(lambda x: x.to("meta"), x34()).kind == "opaque"
    assert last(lambda x: x.detach(), x34()).kind == "detach"
    assert shape_of(last(lambda x: F.dropout(x, 0.25), x34())) == ("dropout", (N,), {"p": 0.25})


@pytest.mark.parametrize(
    ("params", "functions"),
    [
        (
            {"fn": "mean", "dims": (2,), "keepdim": True},
            [lambda x: x.mean(-1, keepdim=True), lambda x: torch.mean(x, 2, True)],
        ),
        ({"fn": "sum", "dims": (0, 1, 2), "keepdim": False}, [lambda x: x.sum(), torch.sum]),
        (
            {"fn": "sum", "dims": (1, 2), "keepdim": False},
            [lambda x: x.sum((1, -1)), lambda x: torch.sum(x, dim=(1, 2))],
        ),
        ({"fn": "amax", "dims": (2,), "keepdim": False}, [lambda x: x.amax(-1), lambda x: torch.amax(x, dim=-1)]),
        ({"fn": "amax", "dims": (0, 1, 2), "keepdim": False}, [lambda x: x.max(), lambda x: x.amax()]),
        (
            {"fn": "var", "dims": (2,), "keepdim": True, "correction": 0},
            [lambda x: x.var(-1, unbiased=False, keepdim=True), lambda x: torch.var(x, -1, correction=0, keepdim=True)],
        ),
        (
            {"fn": "std", "dims": (2,), "keepdim": False, "correction": 1},
            [lambda x: x.std(-1), lambda x: x.std(-1, True)],
        ),
        (
            {"fn": "norm", "dims": (2,), "keepdim": True},
            [
                lambda x: x.norm(2, dim=-1, keepdim=True),
                lambda x: torch.norm(x, dim=-1, keepdim=True),
                lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
                lambda x: torch.linalg.norm(x, ord=2, dim=-1, keepdim=True),
            ],
        ),
        (
            {"fn": "logsumexp", "dims": (2,), "keepdim": False},
            [lambda x: x.logsumexp(-1), lambda x: torch.logsumexp(x, -1)],
        ),
    ],
)
def test_reductions(params: dict[str, Any], functions: list[Callable[..., Any]]) -> None:
    for function in functions:
        assert shape_of(last(function, x234())) == ("reduce", (N,), params)


def test_norms_and_softmax() -> None:
    w = torch.ones(4)
    layer = last(lambda x, w: F.layer_norm(x, (4,), w, None, 1e-6), x34(), w)
    assert shape_of(layer) == ("norm", (N, N, None), {"fn": "layer_norm", "eps": 1e-6, "shape": (4,)})
    assert shape_of(last(lambda x, w: torch.layer_norm(x, [4], weight=w, eps=1e-6), x34(), w)) == shape_of(layer)
    rms = last(lambda x, w: F.rms_norm(x, (4,), weight=w), x34(), w)
    assert shape_of(rms) == ("norm", (N, N, None), {"fn": "rms_norm", "eps": None, "shape": (4,)})
    assert shape_of(last(lambda x, w: torch.rms_norm(x, (4,), w), x34(), w)) == shape_of(rms)
    for function in (lambda x: F.softmax(x, -1), lambda x: torch.softmax(x, 1), lambda x: x.softmax(dim=-1)):
        assert shape_of(last(function, x34())) == ("softmax", (N,), {"fn": "softmax", "dim": 1, "dtype": None})
    wide = last(lambda x: F.log_softmax(x, dim=-1, dtype=torch.float64), x34())
    assert wide.params == {"fn": "log_softmax", "dim": 1, "dtype": torch.float64}


@pytest.mark.parametrize(
    ("kind", "params", "functions"),
    [
        (
            "reshape",
            {},
            [lambda x: x.view(6, 4), lambda x: x.reshape((2, 12)), lambda x: x.flatten(1), lambda x: x.unsqueeze(0)],
        ),
        (
            "permute",
            {"dims": (0, 2, 1)},
            [lambda x: x.transpose(1, 2), lambda x: x.mT + 0, lambda x: x.permute(0, 2, 1)],
        ),
        ("permute", {"dims": (0, 2, 1)}, [lambda x: torch.swapaxes(x, -1, -2), lambda x: torch.permute(x, (0, 2, 1))]),
        ("permute", {"dims": (1, 2, 0)}, [lambda x: torch.movedim(x, 0, -1), lambda x: x.permute([1, -1, 0])]),
        ("expand", {}, [lambda x: x.expand(5, 2, 3, 4), lambda x: torch.broadcast_to(x, (5, 2, 3, 4))]),
        (
            "index",
            {"items": (slice(None), slice(None), slice(0, 2, 1))},
            [
                lambda x: x[..., :2],
                lambda x: x[:, :, :-2],
                lambda x: x.narrow(-1, 0, 2),
                lambda x: torch.narrow(x, 2, 0, 2),
            ],
        ),
        ("index", {"items": (slice(None), 2, slice(None))}, [lambda x: x[:, -1], lambda x: x.select(1, 2)]),
        ("index", {"items": (slice(None), None, slice(None), slice(1, 4, 2))}, [lambda x: x[:, None, :, 1::2]]),
        ("repeat_interleave", {"dim": 1, "repeats": 2}, [lambda x: x.repeat_interleave(2, dim=-2)]),
        (
            "repeat",
            {"repeats": (1, 1, 2)},
            [lambda x: x.repeat(1, 1, 2), lambda x: x.tile(2), lambda x: x.repeat((1, 1, 2))],
        ),
        ("complex", {"fn": "view_as_complex"}, [lambda x: torch.view_as_complex(x.reshape(2, 3, 2, 2))]),
        ("complex", {"fn": "polar"}, [lambda x: torch.polar(x.abs(), x)]),
    ],
)
def test_views(kind: str, params: dict[str, Any], functions: list[Callable[..., Any]]) -> None:
    for function in functions:
        op = last(function, x234())
        op = meaning(op.args[0]) if op.kind == "identity" else op
        assert (op.kind, dict(op.params)) == (kind, params), function


def test_cat_stack_split_and_items() -> None:
    op = last(lambda x: torch.cat((x, x + 1), dim=-1), x34())
    assert shape_of(op) == ("cat", (N, N), {"dim": 1})
    assert shape_of(last(lambda x: torch.cat([torch.empty(0), x, x]), x34())) == ("cat", (N, N), {"dim": 0})
    assert shape_of(last(lambda x: torch.stack([x, x], -1), x34())) == ("stack", (N, N), {"dim": 2})
    for function in (
        lambda x: x.chunk(2, -1)[1],
        lambda x: torch.split(x, 2, dim=1)[1],
        lambda x: x.split([2, 2], 1)[1],
    ):
        item = last(function, x34())
        assert shape_of(item) == ("item", (N,), {"number": 1})
        assert shape_of(meaning(item.args[0])) == ("split", (N,), {"dim": 1, "sizes": (2, 2)})
    item = last(lambda x: x.unbind(-1)[3], x34())
    assert meaning(item.args[0]).params == {"fn": "unbind", "dim": 1, "sizes": None}


def test_products() -> None:
    w, bias = torch.ones(5, 4), torch.ones(5)
    assert shape_of(last(F.linear, x34(), w, bias)) == ("linear", (N, N, N), {"layout": "nk"})
    for function in (lambda x, w: x @ w.T, lambda x, w: torch.matmul(x, w.t()), lambda x, w: x.mm(w.transpose(0, 1))):
        op = last(function, x34(), w)
        assert shape_of(op) == ("linear", (N, N, None), {"layout": "nk"}) and op.args[1].op == "placeholder"
    assert last(lambda x, w: x @ w, x234(), w.T.contiguous()).params == {"layout": "kn"}
    conv = last(lambda b, x, w: torch.addmm(b, x, w), bias, x34(), w.T.contiguous())
    assert conv.kind == "linear" and conv.params == {"layout": "kn"} and conv.args[2].target != conv.args[0].target
    for function in (
        lambda x: x @ x.mT,
        lambda x: torch.bmm(x, mat2=x.mT),
        lambda x: torch.matmul(x, x.transpose(1, 2)),
    ):
        assert shape_of(last(function, x234())) == ("matmul", (N, N), {})


def test_attention_loss_and_embedding() -> None:
    q = torch.ones(1, 2, 3, 4)
    op = last(lambda q: F.scaled_dot_product_attention(q, q, value=q, is_causal=True, scale=0.5), q)
    params = {"attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": 0.5, "enable_gqa": False}
    assert shape_of(op) == ("sdpa", (N, N, N), params)
    labels = torch.tensor([0, 1, -100])
    plain = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
    for function in (
        F.cross_entropy,
        lambda x, y: F.cross_entropy(x, y, None, None, -100, None, "mean", 0.0),
        lambda x, y: F.cross_entropy(input=x, target=y, reduction="mean"),
    ):
        assert shape_of(last(function, x34(), labels)) == ("cross_entropy", (N, N), plain)
    summed = last(lambda x, y: F.cross_entropy(x, y, size_average=False, ignore_index=1), x34(), labels.abs() % 2)
    assert (summed.params["reduction"], summed.params["ignore_index"]) == ("sum", 1)
    assert last(F.cross_entropy, x34(), x34().softmax(-1)).kind == "opaque"
    assert last(F.nll_loss, x34(), labels.clamp(min=0)).kind == "nll_loss"
    rows = last(lambda w, i: F.embedding(i, w, padding_idx=0), x34(), labels.clamp(min=0))
    assert shape_of(rows) == ("embedding", (N, N), {"padding_idx": 0})


def test_aten_overloads_share_the_rows() -> None:
    aten = torch.ops.aten
    for function, kind in (
        (lambda x: aten.mul.Tensor(x, x), "pointwise"),
        (lambda x: aten.view.default(x, [4, 3]), "reshape"),
        (lambda x: aten.mean.dim(x, [-1], True), "reduce"),
        (lambda x: aten.slice.Tensor(x, 1, 0, 2), "index"),
        (lambda x: aten._to_copy.default(x, dtype=torch.float64), "cast"),
        (lambda x: aten.add_.Tensor(x.clone(), 1), "opaque"),
    ):
        assert last(function, x34()).kind == kind


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.add_(1),
        lambda x: operator.iadd(x, 1),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.silu(x, True),
        lambda x: torch.mul(x, 2, out=x),
        lambda x: x.masked_fill_(x > 0, 0.0),
        lambda x: x.copy_(x + 1),
        lambda x: torch.relu_(x),
    ],
)
def test_mutation_is_opaque_and_names_its_target(function: Callable[..., Any]) -> None:
    graph = capture(lambda x: function(x.sin()), x34()).graph
    (mutation,) = (node for node in graph.nodes if meaning(node).params.get("mutates"))
    target = meaning(mutation).params["target_arg"]
    assert target.name.startswith("sin") and meaning(mutation).params["targets"] == (target,)


def test_symbolic_sizes_are_scalars_and_add_no_guard() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        return (x.view(b, s, 2, d // 2).transpose(1, 2)[..., : d // 4] * (s**-0.5)).reshape(b, 2 * s, -1)[:, :s]

    graph = capture(function, x234(), dynamic=True)
    shapes = next(
        n for n in graph.graph.nodes if n.op == "placeholder" and n.meta["example_value"].__class__ is not int
    )
    kinds = {node.name: meaning(node).kind for node in graph.graph.nodes}
    assert shapes is not None and set(kinds.values()) >= {"reshape", "permute", "pointwise", "input"}
    assert all(
        meaning(n).params.get("scalar")
        for n in graph.graph.nodes
        if isinstance(n.meta.get("example_value"), torch.SymInt) and n.op[:4] == "call"
    )


def test_arguments_that_no_row_foresaw_are_opaque() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in (torch.cat, torch.softmax, torch.view_as_complex, operator.getitem, F.layer_norm):
        assert meaning(graph.call_function(target, (x, 1.5, {}))).kind == "opaque"
        assert meaning(graph.call_function(target, ())).kind == "opaque"


def test_every_row_is_reachable_by_name() -> None:
    assert len(TABLE) > 200 and all(name == name.strip() for name in TABLE)
