"""Adapters beside a base that is held in four bits: the contract, one rounding, and no whole weight kept."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
from processor import NATIVE_BF16
from torch import Tensor, fx, nn

from slothc import four_bit
from slothc.capture import captured
from slothc.four_bit import FROZEN
from slothc.recordable import obstacle
from slothc.spellings import target_name
from slothc.taught import as_it_stands

bnb = pytest.importorskip("bitsandbytes")
LIBRARYS = {"gemm_4bit", "bitsandbytes.gemm_4bit", "autograd_function_apply"}      # the product by one call, without a gradient, traced


def held(name: str = "llama", dtype: torch.dtype = torch.bfloat16, nested: bool = True, **config: Any) -> nn.Module:
    """A tiny model whose linears but the head are in NF4, as transformers loads it for QLoRA."""
    made = tm.model(name, dtype, **config)
    for path, module in [(n, m) for n, m in made.named_modules() if type(m) is nn.Linear and m is not made.get_output_embeddings()]:
        parent, _, own = path.rpartition(".")
        setattr(made.get_submodule(parent), own, in_four_bits(module, nested))
    made.is_loaded_in_4bit = True
    return made


def in_four_bits(linear: nn.Linear, nested: bool = True) -> nn.Module:
    weight, bias = linear.weight.data, linear.bias
    made = bnb.nn.Linear4bit(*weight.shape[::-1], bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=made)
    made.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
    return made.to(weight.device)


def truth(model: nn.Module, **inputs: Any) -> tm.Step:
    """The step in float64 with the weights that the four bits stand for."""
    whole = copy.deepcopy(model)
    whole.gradient_checkpointing_disable()
    for path, module in [(n, m) for n, m in whole.named_modules() if isinstance(m, bnb.nn.Linear4bit)]:
        parent, _, own = path.rpartition(".")
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight = nn.Parameter(bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state), requires_grad=False)
        linear.bias = module.bias
        setattr(whole.get_submodule(parent), own, linear)
    return tm.truth(whole, **inputs)


def as_near(ours: tm.Step, model: nn.Module) -> None:
    """The contract, for one batch in bf16."""
    eager, true = tm.step(model, **tm.batch()), truth(model, **tm.batch())
    assert tm.distance(ours, true) <= 1.10 * tm.distance(eager, true) + tm.TINY[torch.bfloat16]


@contextmanager
def kept() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of floating-point matrices that are saved for a backward inside the block."""
    shapes: list[tuple[int, ...]] = []

    def note(t: Tensor) -> Tensor:
        shapes.extend([tuple(t.shape)] if t.is_floating_point() and t.dim() == 2 else [])
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield shapes


@pytest.mark.parametrize(
    "dtype, fp32, nested", [(torch.float32, False, True), (torch.bfloat16, False, False), (torch.bfloat16, True, True)],
    ids=["fp32", "bf16", "bf16, fp32 adapters"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_contract(name: str, dtype: torch.dtype, fp32: bool, nested: bool) -> None:
    model = tm.adapted(held(name, dtype, nested), fp32=fp32)
    weights = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")
        draws = [tm.batch(seed=s) for s in range(5)]
        ours, eager, true = ([run(x) for x in draws] for run in (
            lambda x: tm.step(model, fast, **x), lambda x: tm.step(model, **x), lambda x: truth(model, **x)
        ))  # fmt: skip
        with kept() as shapes:
            fast(**draws[0])
    mean = lambda found: (sum(tm.distance(f, t) ** 2 for f, t in zip(found, true)) / len(true)) ** 0.5  # noqa: E731
    assert mean(ours) <= 1.10 * mean(eager) + tm.TINY[dtype]
    assert tm.counted(graphs)["lora_linear"] == 14 and not graphs[0].dropped
    assert not weights & set(shapes)


def test_a_dropout_before_the_adapter_and_linears_without_one() -> None:
    """The other linears stay the library's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.2)
    model = get_peft_model(held(shallow=True), settings, autocast_adapter_dtype=False)
    weights = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")

        def seeded(f: Any) -> tm.Step:
            torch.manual_seed(5)
            return tm.step(model, f, **tm.batch())

        ours, eager = seeded(fast), seeded(model)
        with kept() as shapes:
            fast(**tm.batch())
    assert tm.distance(ours, eager) < 2e-2 and not weights & set(shapes)
    assert tm.counted(graphs)["lora_linear"] == 2
    names = [target_name(n) for n in graphs[0].found.view.graph_module.graph.nodes if n.op == "call_function"]
    assert sum(n in LIBRARYS for n in names) == 5 and not [n for n in names if "whole" in n]


def test_a_linear_without_an_adapter_in_a_block_of_those_with_one() -> None:
    """q and v adapted: k reads what they read, and its weight, which is not trained, is held like theirs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(held(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    with tm.watched() as graphs:
        ours = tm.step(model, torch.compile(model, backend="sloth"), **tm.batch())
    as_near(ours, model)
    readers = [[(r.linear.rank, r.linear.held is not None) for r in b.readers] for b in graphs[0].blocks if b.region]
    assert ([(4, True), (0, True), (4, True)] in readers) == NATIVE_BF16 and not graphs[0].dropped


def prepared(checkpoints: bool = False, dropout: float = 0.0, **config: Any) -> nn.Module:
    """PEFT's recipe: norms, embedding and head in fp32, and so the hidden states; to be run under autocast."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(0)
    made = prepare_model_for_kbit_training(held(**config), checkpoints, {"use_reentrant": False})
    made = get_peft_model(made, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return made.train()


@contextmanager
def autocast(as_on_a_gpu: bool = False) -> Iterator[None]:
    """``as_on_a_gpu``: PEFT asks for a GPU's autocast, and where that is on it leaves widening to the sum."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", as_on_a_gpu)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("checkpoints, as_on_a_gpu", [(False, False), (True, False), (False, True)], ids=["", "checkpoints", "as on a GPU"])
def test_hidden_states_in_fp32_under_autocast(checkpoints: bool, as_on_a_gpu: bool) -> None:
    """All adapters are summed with their bases before rounding, though each is widened by itself in the model."""
    model = prepared(checkpoints)

    def cast(run: Any, **inputs: Any) -> tm.Step:
        with autocast(as_on_a_gpu):
            return tm.step(model, run, **inputs)

    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")
        draws = [tm.batch(seed=s) for s in range(5)]
        ours, eager, true = ([run(x) for x in draws] for run in (
            lambda x: cast(fast, **x), lambda x: cast(None, **x), lambda x: truth(model, **x)
        ))  # fmt: skip
    mean = lambda found: (sum(tm.distance(f, t) ** 2 for f, t in zip(found, true)) / len(true)) ** 0.5  # noqa: E731
    assert mean(ours) <= 1.10 * mean(eager) + tm.TINY[torch.bfloat16]
    assert tm.counted(graphs)["lora_linear"] == 14 and tm.counted(graphs)["attention"] == 2 and not any(g.dropped for g in graphs)


def test_a_dropout_under_autocast() -> None:
    model = prepared(dropout=0.2, shallow=True)
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")

        def seeded(f: Any) -> tm.Step:
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16):
                return tm.step(model, f, **tm.batch())

        assert tm.distance(seeded(fast), seeded(None)) < 2e-2
    assert tm.counted(graphs)["lora_linear"] == 7 and not graphs[0].dropped


@pytest.mark.parametrize("options, autocast", [({"disable": ["lora_linear"]}, True), ({}, False)], ids=["without the rule", "no autocast"])
def test_sums_that_nothing_takes_in_stay_in_fp32(options: dict[str, Any], autocast: bool) -> None:
    """Without autocast an adapter is computed in fp32, which a sum in 16 bits would lose."""
    model = prepared(shallow=True)
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth", options=options)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, eager = tm.step(model, fast, **tm.batch()), tm.step(model, **tm.batch())
    assert not tm.counted(graphs)["lora_linear"] and tm.distance(ours, eager) < (2e-2 if autocast else 2e-3)
    sums = [n for n in graphs[0].found.view.graph_module.graph.nodes if n.target is operator.add and len(n.all_input_nodes) == 2]
    assert not [n for n in sums if n.meta["example_value"].dtype is torch.bfloat16]


def test_lengths_that_change() -> None:
    """The second length makes a graph of symbolic sizes, which takes in as much as the first."""
    model = tm.adapted(held())
    with tm.watched() as graphs:
        fast = torch.compile(model, backend="sloth")
        for size, length in ((2, 16), (3, 12), (2, 20)):
            ours, eager = (tm.step(model, run, **tm.batch(size, length)) for run in (fast, model))
            true = truth(model, **tm.batch(size, length))
            assert tm.distance(ours, true) <= 1.10 * tm.distance(eager, true) + tm.TINY[torch.bfloat16]
    assert [tm.counted([g])["lora_linear"] for g in graphs] == [14, 14]


def test_under_a_checkpoint() -> None:
    model = tm.adapted(held())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with tm.watched() as graphs:
        ours = tm.step(model, torch.compile(model, backend="sloth"), **tm.batch())
    assert tm.counted(graphs)["lora_linear"] == 14
    as_near(ours, model)


def calls(backend: Callable[..., Any]) -> Counter[str]:
    """What Dynamo hands the backend of a model in four bits with adapters."""
    seen: Counter[str] = Counter()

    def record(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.update(target_name(n) for n in module.graph.nodes if n.op == "call_function")
        return module.forward

    torch._dynamo.reset()
    tm.step(model := tm.adapted(held(shallow=True)), torch.compile(model, backend=backend(record)), **tm.batch())
    return Counter({k: n for k, n in seen.items() if k in LIBRARYS})


def test_the_product_is_one_call_for_sloth_alone() -> None:
    """One of the seven reads what no gradient is wanted for in the first layer."""
    ours, others = calls(as_it_stands), calls(lambda record: record)
    assert ours["gemm_4bit"] == others["autograd_function_apply"] >= 4
    assert not ours["autograd_function_apply"] and not others["gemm_4bit"]


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested scales"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_the_one_call_is_the_librarys_function(biased: bool, nested: bool) -> None:
    """Left where it is: the same numbers, with a gradient for the bias, and for no rows."""
    linear = in_four_bits(nn.Linear(64, 32, bias=biased), nested)
    if biased:
        linear.bias.requires_grad_()
    run = torch.compile(lambda x: linear(x), backend="sloth")
    for rows in (5, 0):
        x = torch.randn(rows, 64).requires_grad_()
        leaves = [x, *([linear.bias] if biased else [])]
        (y, ours), (z, eager) = ((r, torch.autograd.grad(r.sum(), leaves, allow_unused=True)) for r in (run(x), linear(x)))
        assert torch.equal(y, z) and all(torch.equal(a, b) for a, b in zip(ours, eager) if b is not None)


class Doubled(torch.autograd.Function):
    """The library's product with a gradient that is not its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(q, s)
        return torch.ops.bitsandbytes.gemm_4bit.default(x, q, [32, 64], s, 64, "nf4")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, s = ctx.saved_tensors
        return 2 * g @ torch.ops.bitsandbytes.dequantize_4bit.default(q, s, 64, "nf4", [32, 64], g.dtype), None, None


def test_another_gradient_is_not_taken_for_the_products() -> None:
    q, state = bnb.functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)

    def adapted(x: Tensor) -> Tensor:
        return (Doubled.apply(x, q, state.absmax) + F.linear(F.linear(x, a), b)).square().sum()

    x = torch.randn(2, 5, 64)
    with tm.watched() as graphs:
        ours, eager = (gradient(f, x) for f in (torch.compile(adapted, backend="sloth"), adapted))
    assert not tm.counted(graphs)["lora_linear"]
    torch.testing.assert_close(ours, eager)


def gradient(f: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def test_a_recording_reads_the_weight_where_it_is() -> None:
    """CUDA graphs: what a weight is held in is not copied for each replay, and nothing of the library is in the way."""
    model = tm.adapted(held(shallow=True))
    with tm.watched() as graphs:
        torch.compile(model, backend="sloth")(**tm.batch())
    module = graphs[0].found.view.graph_module
    inputs = [n for n in module.graph.nodes if n.op == "placeholder" and n.users]
    state = [n for n in inputs if "quant_state" in n.name or packed(n)]
    assert len(state) == 7 * 5 and all(n.meta.get(FROZEN) for n in state)
    assert obstacle(module, torch.device("cpu")) is None


def test_other_operations_of_the_library_are_not_recorded() -> None:
    """What they do behind the stream's back is not known."""
    quantised = captured(lambda x: torch.ops.bitsandbytes.quantize_4bit.default(x, 64, "nf4", torch.uint8)[0], [torch.randn(32, 64)])
    assert "the library bitsandbytes" in str(obstacle(quantised, torch.device("cpu")))


def packed(node: Any) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dtype is torch.uint8


def test_sizes_that_do_not_fit_are_refused() -> None:
    form = four_bit.FourBit((32, 64), 64, "nf4", False, torch.float32)
    q, state = bnb.functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    torch.testing.assert_close(form.whole(q, state.absmax), bnb.functional.dequantize_4bit(q, state), rtol=0, atol=0)
    for wrong in ((q[:64], state.absmax), (q, state.absmax[:3])):
        with pytest.raises(ValueError, match="in four bits"):
            form.whole(*wrong)


def test_a_head_in_four_bits_is_the_library_s() -> None:
    model = held(shallow=True)
    model.lm_head = in_four_bits(model.lm_head)
    model = tm.adapted(model)
    with tm.watched() as graphs:
        ours = tm.step(model, torch.compile(model, backend="sloth"), **tm.batch())
    assert not tm.counted(graphs)["cross_entropy"]
    as_near(ours, model)
