"""The graph view: values, users, aliasing, gradient spans, child graphs; every node of real models has a meaning."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from slothc.view import GraphView, MissingValue
from slothc.view_location import short_path


def view_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> GraphView:
    """A view of the graph that Dynamo hands to a backend."""
    graphs: list[fx.GraphModule] = []

    def recorder(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=recorder)(*args, **kwargs)
    return GraphView(graphs[0])


def by_fn(view: GraphView, fn: str) -> fx.Node:
    """The first node of that function."""
    return next(node for node in view.nodes if view.op(node).params.get("fn") == fn)


def x34() -> torch.Tensor:
    return torch.linspace(-2, 2, 12).reshape(3, 4)


def test_value_source_and_op_are_read_off_the_graph() -> None:
    view = view_of(lambda x: torch.exp(x.sin().contiguous().to(torch.float32) * 1.0).detach().cos(), x34())
    sin, exp, cos = (by_fn(view, fn) for fn in ("sin", "exp", "cos"))
    assert view.source(exp.args[0]) is sin and view.source(sin) is sin and view.source(3.0) == 3.0
    assert view.op(view.source(cos.args[0])).kind == "detach"
    assert view.value(exp).shape == (3, 4) and view.dtype(exp) == torch.float32
    assert view.op(exp) is view.op(exp)
    (output,) = (node for node in view.nodes if node.op == "output")
    with pytest.raises(MissingValue, match="output"):
        view.value(output)


def test_users_leave_dead_code_out() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        y.cos().exp()
        return y.tanh()

    view = view_of(function, x34())
    sin = by_fn(view, "sin")
    assert [view.op(user).params["fn"] for user in view.users(sin)] == ["tanh"]
    assert len(sin.users) == 2 and not view.alive(by_fn(view, "exp"))


def test_what_writes_keeps_its_inputs_alive() -> None:
    def function(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        buffer.copy_(x.cos())
        return x.sin()

    view = view_of(function, x34(), x34())
    assert view.alive(by_fn(view, "cos")) and view.users(by_fn(view, "cos"))


def test_grad_spans_and_needs_grad() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            c = w.cos()
        return w.sin() * c + x.exp()

    view = view_of(function, x34(), x34().requires_grad_())
    assert not view.grad_enabled(by_fn(view, "cos")) and view.grad_enabled(by_fn(view, "sin"))
    assert [view.needs_grad(by_fn(view, fn)) for fn in ("cos", "sin", "exp")] == [False, True, False]


@pytest.mark.parametrize(
    ("function", "mutated", "kept"),
    [
        (lambda s, c: s.view(-1).add_(1) + c.sum(), "sin", "cos"),
        (lambda s, c: s.split(2, 1)[0].mul_(2) + c.sum(), "sin", "cos"),
        (lambda s, c: operator_setitem(s[:, 1:], c) + c.sum(), "sin", "cos"),
        (lambda s, c: s.detach().copy_(c) + s, "sin", "cos"),
        (lambda s, c: s.clone().add_(1) + c, "", "sin"),
        (lambda s, c: torch.mul(c, 2, out=s) + 1, "sin", "cos"),
        (lambda s, c: s.unfold(1, 2, 1).add_(1).sum() + c, "sin", "cos"),
        (lambda s, c: torch.relu_(s.expand(3, 4)) + c, "sin", "cos"),
    ],
)
def test_mutation_is_seen_through_views(function: Callable[..., Any], mutated: str, kept: str) -> None:
    view = view_of(lambda x: function(x.sin(), x.cos()), x34())
    assert not mutated or view.mutated(by_fn(view, mutated))
    assert not view.mutated(by_fn(view, kept))
    (placeholder,) = (node for node in view.nodes if node.op == "placeholder")
    assert not view.mutated(placeholder)


def operator_setitem(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``x[0] = ...`` as an expression."""
    x[0] = value[0, 0]
    return x


def test_child_graphs_have_values_even_without_meta() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda h: torch.tanh(h @ w.T).mean(-1), x.sin(), use_reentrant=False)

    view = view_of(function, x34(), torch.ones(5, 4).requires_grad_())
    ((node, module),) = view.child_modules()
    assert view.child(node, module) is view.child(node, module)
    bare = copy.deepcopy(module)
    for inner in bare.graph.nodes:
        inner.meta.clear()
    for child in (view.child(node, module), view.child(node, bare)):
        tanh = by_fn(child, "tanh")
        assert child.value(tanh).shape == (3, 5) and child.needs_grad(tanh)
        assert child.op(by_fn(child, "mean")).params["dims"] == (1,)
        assert child.op(tanh.args[0]).kind == "linear"


def test_nothing_is_named_inside_vmap() -> None:
    view = view_of(lambda x: torch.vmap(lambda row: row.sin() * 2)(x).cos(), x34())
    inside = [view.op(node) for node in view.nodes if node.name.startswith("sin")]
    assert [(op.kind, op.params["reason"]) for op in inside] == [("opaque", "inside vmap")]
    assert view.op(by_fn(view, "cos")).kind == "pointwise"
    assert all(view.alive(node) for node in view.nodes if "nesting" in node.name)


def test_locations_are_short() -> None:
    view = view_of(lambda x: torch.nn.functional.silu(x.sin()), x34())
    assert view.location(by_fn(view, "sin")).startswith("slothc/test_view.py:")
    assert view.location(view.nodes[-1]) == "output"
    assert short_path("/a/lib/site-packages/transformers/models/x.py") == "transformers/models/x.py"


MODELS = [
    "llama", "gemma2", "phi3", "gptj", "gpt_oss", "deepseek_v3", "falcon_h1", "stablelm", "cohere2", "nanochat",
]  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 0, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
                  "mamba_chunk_size": 8},
}  # fmt: skip
REALLY_OPAQUE = set(
    (
        "_grouped_mm _log_api_usage_once _set_grad_enabled add_ arange conv1d copy_ cumsum diff einsum empty "
        "empty_like floordiv full full_like gather getitem histc index_add_ index_select itruediv "
        "masked_fill_ max new_empty new_ones one_hot ones output pad scatter scatter_ setitem sort tensor "
        "topk tril zero_ zeros zeros_like "
    ).split()
)


def tiny_model(name: str) -> torch.nn.Module:
    """A one-layer causal LM of that architecture."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **OWN.get(name, {})})
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_every_node_of_a_model_has_a_meaning(name: str) -> None:
    ids = torch.arange(16).reshape(2, 8)
    view = view_of(tiny_model(name), input_ids=ids, labels=ids)
    opaque = Counter(view.op(node).params["fn"] for node in view.nodes if view.op(node).kind == "opaque")
    assert set(opaque) <= REALLY_OPAQUE, set(opaque) - REALLY_OPAQUE
    for node in view.nodes:
        assert view.location(node) and isinstance(view.mutated(node), bool) and isinstance(view.users(node), list)
        assert not view.needs_grad(node) or view.value(view.source(node)).is_floating_point()
    assert all(not view.mutated(node) for node in view.nodes if view.op(node).kind == "linear" and name == "llama")
