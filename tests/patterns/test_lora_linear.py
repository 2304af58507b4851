"""The lora_linear rule: what it finds in captured graphs, what it leaves alone and why, and that its match computes
the same.
"""

from __future__ import annotations

import pytest
import torch
from slothc.kernels.lowrank import lora_linear
from slothc.patterns.lora_linear import RULE
from slothc.patterns.rule import Match, Miss
from torch.nn import functional as F

from slothc.bind.lora_linear import bind
from slothc.view import GraphView

K, N, R = 12, 20, 3


def graph_of(function, *args):
    """Dynamo's graph of function(*args)."""
    torch._dynamo.reset()
    graphs = []

    def keep(module, _):
        graphs.append(module)
        return module.forward

    torch.compile(function, backend=keep, fullgraph=True)(*args)
    return graphs[0]


def found(function, *args):
    """(matches, misses) over the whole graph, and the graph."""
    module = graph_of(function, *args)
    view = GraphView(module)
    results = [RULE.recognise(view, node) for node in module.graph.nodes]
    return [r for r in results if isinstance(r, Match)], [r for r in results if isinstance(r, Miss)], module


def splice(module, match):
    for item in bind(match):
        with module.graph.inserting_after(match.node):
            new = module.graph.call_function(item.target, item.args, dict(item.kwargs))
        match.node.replace_all_uses_with(new)
    # inputs of the call are defined before the node it replaces, so the order stays valid
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def operands(dtype=torch.float32, adapter=None, layout="nk"):
    g = torch.Generator().manual_seed(3)
    adapter = adapter or dtype

    def draw(*shape, to):
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(to).requires_grad_()

    w = draw(*((N, K) if layout == "nk" else (K, N)), to=dtype)
    return draw(2, 5, K, to=dtype), w, draw(N, to=dtype), draw(R, K, to=adapter), draw(N, R, to=adapter)


def plain(x, w, bias, a, b):
    return (F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * 2.0).to(x.dtype)


def fp32_adapter(x, w, bias, a, b):
    base = F.linear(x, w)
    wide = x.to(a.dtype)
    return (base + F.linear(F.linear(wide, a), b) * 0.5).to(base.dtype)


def unscaled(x, w, bias, a, b):
    return F.linear(F.linear(x, a), b) * 1.0 + F.linear(x, w)


def early_scale(x, w, bias, a, b):
    return F.linear(x, w) + 3.0 * F.linear(F.linear(x, a) / 2, b)


def conv1d(x, w, bias, a, b):
    base = torch.addmm(bias, x.view(-1, x.size(-1)), w).view(x.size()[:-1] + (N,))
    return (base + F.linear(F.linear(x, a), b) * 2.0).to(x.dtype)


CASES = {
    "plain": (plain, 2.0, "nk", torch.float32, None),
    "bf16": (plain, 2.0, "nk", torch.bfloat16, None),
    "fp32 adapter": (fp32_adapter, 0.5, "nk", torch.bfloat16, torch.float32),
    "unscaled": (unscaled, 1.0, "nk", torch.float32, None),
    "early scale": (early_scale, 1.5, "nk", torch.float32, None),
    "conv1d": (conv1d, 2.0, "kn", torch.float32, None),
}


@pytest.mark.parametrize("name", CASES)
def test_found_once_and_computes_the_same(name):
    function, scale, layout, dtype, adapter = CASES[name]
    args = operands(dtype, adapter, layout)
    matches, misses, module = found(function, *args)
    assert len(matches) == 1 and not misses
    match = matches[0]
    assert match.inputs["scale"] == scale and match.attrs["layout"] == layout
    assert match.attrs["out_dtype"] is dtype and match.attrs["adapter_dtype"] is (adapter or dtype)
    assert match.inputs["xa"] is None
    used = [a for a in args if function in (plain, conv1d) or a is not args[2]]
    expected = function(*args)
    module = splice(module, match)
    calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target is lora_linear]
    assert len(calls) == 1 and not any("linear" in str(n.target) for n in module.graph.nodes if n not in calls)
    order = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    by_data = {n.name: n.meta["example_value"] for n in module.graph.nodes if n.op == "placeholder"}
    feed = [
        next(a for a in args if a.shape == by_data[name].shape and a.dtype == by_data[name].dtype) for name in order
    ]
    result = module(*feed)[0]
    tight = 2e-6 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(result, expected, atol=tight, rtol=tight)
    grads = torch.autograd.grad(result.float().square().sum(), used)
    for got, want in zip(grads, torch.autograd.grad(expected.float().square().sum(), used)):
        assert (got.double() - want.double()).norm() <= max(10 * tight, 1e-5) * want.double().norm()


def test_dropout_gives_the_adapter_its_own_input():
    def function(x, w, bias, a, b):
        return F.linear(x, w) + F.linear(F.linear(F.dropout(x, 0.3, True), a), b) * 2.0

    matches, misses, _ = found(function, *operands())
    assert len(matches) == 1 and not misses
    assert "dropout" in matches[0].inputs["xa"].name and matches[0].inputs["xa"] not in matches[0].nodes


def test_a_cast_that_others_read_stays():
    def function(x, w, bias, a, b):
        wide = x.to(a.dtype)
        return (F.linear(x, w) + F.linear(F.linear(wide, a), b) * 2.0).to(x.dtype), wide.exp()

    matches, misses, _ = found(function, *operands(torch.bfloat16, torch.float32))
    assert len(matches) == 1 and not misses
    assert matches[0].inputs["xa"] is None


def outside(x, w, bias, a, b):
    t = F.linear(x, a)
    return F.linear(x, w) + F.linear(t, b) * 2.0, t.exp()


def adapter_bias(x, w, bias, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a, bias[:R]), b) * 2.0


def wide_sum(x, w, bias, a, b):
    return F.linear(x, w) + F.linear(F.linear(x.to(a.dtype), a), b) * 2.0


def full_rank(x, w, bias, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, w), torch.ones(N, N)) * 2.0


MISSES = {
    "read outside": (outside, None, None, "read outside"),
    "first bias": (adapter_bias, None, None, "first product has a bias"),
    "fp32 sum": (wide_sum, torch.bfloat16, torch.float32, "the sum stays torch.float32"),
    "full rank": (full_rank, None, None, "not below"),
}


@pytest.mark.parametrize("name", MISSES)
def test_left_alone_with_a_reason(name):
    function, dtype, adapter, reason = MISSES[name]
    matches, misses, _ = found(function, *operands(dtype or torch.float32, adapter))
    assert not matches and [reason in m.reason for m in misses] == [True]


def test_what_is_no_adapter_is_not_mentioned():
    def parallel_block(x, w, bias, a, b):
        h = F.linear(x, w)
        return h + F.linear(F.silu(F.linear(x, a)), b), x + 1

    def unrelated(x, w, bias, a, b):
        return F.linear(x, w) + F.linear(F.linear(x.exp(), a), b)

    for function in (parallel_block, unrelated):
        matches, misses, _ = found(function, *operands())
        assert not matches and not misses


def two(x, w, bias, a, b):
    y = F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0
    return y + F.linear(F.linear(x, a * 2), b * 0.5) * 3.0


def three_wide(x, w, bias, a, b):
    wide = x.to(a.dtype)
    y = F.linear(x, w, bias) + F.linear(F.linear(wide, a), b) * 0.0
    y = y + F.linear(F.linear(wide, a * 2), b, torch.ones_like(b[:, 0])) * 3.0
    return (y + F.linear(F.linear(wide, a.cos()), b.sin()) * 0.5).to(x.dtype)


def own_bias(x, w, bias, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a), b, bias) * 2.0


@pytest.mark.parametrize("function, dtype, adapter", [
    (two, torch.float32, None), (two, torch.bfloat16, None), (three_wide, torch.bfloat16, torch.float32), (own_bias, torch.float32, None),
], ids=["two", "two bf16", "three fp32", "own bias"])  # fmt: skip
def test_several_adapters_and_their_biases_are_one_call(function, dtype, adapter):
    args = operands(dtype, adapter)
    matches, misses, module = found(function, *args)
    assert len(matches) == 1 and not misses
    expected = function(*args)
    order = [next(a for a in args if a.shape == n.meta["example_value"].shape and a.dtype == n.meta["example_value"].dtype)
             for n in module.graph.nodes if n.op == "placeholder"]  # fmt: skip
    result = splice(module, matches[0])(*order)[0]
    tight = 4e-6 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(result, expected, atol=tight, rtol=tight)
    grads, wanted = (torch.autograd.grad(y.float().square().sum(), order, allow_unused=True) for y in (result, expected))
    for got, want in zip(grads, wanted):
        assert (got.double() - want.double()).norm() <= 10 * tight * want.double().norm()


def test_adapters_with_dropouts_of_their_own_are_not_one():
    def function(x, w, bias, a, b):
        y = F.linear(x, w) + F.linear(F.linear(F.dropout(x, 0.3), a), b) * 2.0
        return y + F.linear(F.linear(F.dropout(x, 0.3), a * 2), b) * 3.0

    matches, misses, _ = found(function, *operands())
    assert len(matches) == 1 and ["a dropout of its own" in m.reason for m in misses] == [True]


def test_a_scale_known_at_run_time():
    def function(x, w, bias, a, b, scale):
        return F.linear(x, w) + F.linear(F.linear(x, a), b) * scale

    args = operands()
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(function, backend=lambda m, _: graphs.append(m) or m.forward, fullgraph=True, dynamic=True)
    compiled(*args, 1.5)
    view = GraphView(graphs[0])
    matches = [m for m in (RULE.recognise(view, n) for n in view.nodes) if isinstance(m, Match)]
    assert len(matches) == 1 and matches[0].inputs["factor"] is not None
    torch._dynamo.reset()
    ours = torch.compile(function, backend="sloth", dynamic=True)
    for scale in (1.5, -0.25, 0.0):
        torch.testing.assert_close(ours(*args, scale), function(*args, scale), atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("adapter_fp32", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_peft_llama(adapter_fp32, dropout):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.train(), lora, autocast_adapter_dtype=adapter_fp32)
    matches, misses, _ = found(model, torch.arange(8)[None])
    assert len(matches) == 7 and not misses
    assert all((m.inputs["xa"] is not None) == (dropout > 0) for m in matches)
    assert all(m.attrs["adapter_dtype"] is (torch.float32 if adapter_fp32 else torch.bfloat16) for m in matches)


@pytest.mark.parametrize("sample", RULE.samples, ids=lambda s: s.name)
def test_samples_are_found(sample):
    matches, misses, _ = found(sample.function, *sample.arguments())
    assert len(matches) == 1 and not misses


def test_a_reason_is_given_once():
    def function(x, w, bias, a, b):
        wide = F.dropout(x.to(torch.float32), 0.3)
        y = F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0
        return (y + F.linear(F.linear(wide, a.float()), b.float()) * 3.0).to(x.dtype)

    matches, misses, _ = found(function, *operands(torch.bfloat16))
    assert len(matches) == 1 and len(misses) == 1
