"""Attention found in captured graphs, replaced, compared with eager: masks, heads, dynamic sizes, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slothc.patterns.attention import RULE
from slothc.patterns.rule import Match, Sample
from torch import fx, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

import slothc.bind.masks
from slothc.bind.attention import Attention, announce, bind, describe, describe_mask
from slothc.view import GraphView

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "use_cache": False, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "gemma3_text": (Gemma3TextConfig, {"sliding_window": 6, "layer_types": LAYERS}),
}


class Splicer:
    """A backend that does what the driver will: recognise, bind, replace. Keeps what it found."""

    def __init__(self, announcing: bool = False) -> None:
        self.matches: list[Match] = []
        self.words: list[str] = []
        self.masks: list[str] = []
        self.calls: list[Any] = []
        self.left: list[int] = []
        self.renamed: dict[fx.Node, fx.Node] = {}
        self.announcing = announcing

    def __call__(self, graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.splice(graph, GraphView(graph))
        self.left.append(sum(node.op not in ("placeholder", "output") for node in graph.graph.nodes))
        return graph.forward

    def splice(self, module: fx.GraphModule, view: GraphView) -> None:
        for caller, child in view.child_modules():
            inner = view.child(caller, child)
            self.outer(module, view, caller, child, inner)
            self.splice(child, inner)
        found = [match for match in (RULE.recognise(view, node) for node in view.nodes) if match]
        self.matches += found
        self.words += [describe(match) for match in found]
        for match in found:
            for new in bind(match):
                self.replace(module, new)
        cones = {node for match in found if match.attrs["cone"] for node in match.attrs["cone"].nodes}
        cones |= {node for match in found for node in match.nodes}
        module.graph.eliminate_dead_code(lambda node: node not in cones)
        module.recompile()

    def outer(
        self, module: fx.GraphModule, view: GraphView, caller: fx.Node, child: fx.GraphModule, inner: GraphView
    ) -> None:
        masks = {m.inputs["mask"] for m in (RULE.recognise(inner, node) for node in inner.nodes) if m}
        inputs = [node for node in child.graph.nodes if node.op == "placeholder"]
        passed = [arg for arg in caller.args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
        for node, arg in zip(inputs, passed, strict=True):
            if node in masks and getattr(arg.target, "__name__", "") != "sloth_mask":
                self.masks.append(describe_mask(view, arg))
                for new in announce(view, arg) if self.announcing else ():
                    self.replace(module, new)

    def replace(self, module: fx.GraphModule, new: Any) -> None:
        self.calls.append(new.target)
        args = fx.map_arg(new.args, lambda node: self.renamed.get(node, node))
        with module.graph.inserting_before(new.node):
            node = self.renamed[new.node] = module.graph.call_function(new.target, args, dict(new.kwargs))
        node.meta = dict(new.node.meta)
        new.node.replace_all_uses_with(node)
        module.graph.erase_node(new.node)

    @property
    def judged(self) -> set[str]:
        return {type(call.judge).__name__ for call in self.calls if isinstance(call, Attention)}


@pytest.fixture
def classified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that masks turned out to be at run time, one for each time a mask was looked at."""
    kinds: list[str] = []
    classify = slothc.bind.masks.classify

    def counted(*args: Any) -> Any:
        kind = classify(*args)
        kinds.append(kind.name)
        return kind

    monkeypatch.setattr(slothc.bind.masks, "classify", counted)
    return kinds


def build(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    make, options = CONFIGS[name]
    config = make(**{**SMALL, **options, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def step(model: Callable[..., Any], parameters: list[nn.Parameter], inputs: dict[str, Any]) -> torch.Tensor:
    """Loss and all gradients of one forward and backward, in one vector."""
    loss = model(**inputs).loss
    return torch.cat([t.detach().flatten() for t in (loss, *torch.autograd.grad(loss, parameters))])


def batch(length: int = 12, kind: str = "plain", seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(seed))
    flags = torch.ones(2, length, dtype=torch.long)
    if kind == "right":
        flags[0, -3:] = 0
    if kind == "left":
        flags[1, :2] = 0
    inputs = {"input_ids": ids, "labels": ids.masked_fill(flags == 0, -100)}
    if kind in ("ones", "right", "left"):
        inputs["attention_mask"] = flags
    if kind in ("packed", "counting"):
        split = 5 if kind == "packed" else length
        inputs["position_ids"] = torch.cat([torch.arange(split), torch.arange(length - split)]).repeat(2, 1)
    return inputs


def close(ours: torch.Tensor, eager: torch.Tensor) -> None:
    assert float((ours - eager).norm()) <= 1e-6 * float(eager.norm())


def run(name: str, *batches: dict[str, torch.Tensor], **changes: Any) -> Splicer:
    """Compare a spliced model with eager on each batch."""
    torch._dynamo.reset()
    model, splicer = build(name, **changes), Splicer()
    compiled, parameters = torch.compile(model, backend=splicer), list(model.parameters())
    for inputs in batches:
        close(step(compiled, parameters, inputs), step(model, parameters, inputs))
    return splicer


PLAIN = {
    "llama": ["causal", "causal"],
    "qwen3": ["causal", "causal"],
    "mistral": ["sliding_window", "sliding_window"],
    "gemma3_text": ["sliding_window", "causal"],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_masks_of_sizes_are_looked_at_once(name: str, classified: list[str]) -> None:
    splicer = run(name, batch(), batch(seed=1), batch(seed=2))
    assert splicer.words == PLAIN[name]
    assert [match.attrs["repeats"] for match in splicer.matches] == [2, 2]
    assert classified == list(dict.fromkeys(PLAIN[name]))
    assert splicer.judged == {"SizeMask"}


def test_a_mask_that_is_causal_leaves_the_graph() -> None:
    graphs: list[int] = []
    torch._dynamo.reset()
    model, splicer = build("llama"), Splicer()

    def count(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(sum(node.op not in ("placeholder", "output") for node in graph.graph.nodes))
        return splicer(graph, inputs)

    torch.compile(model, backend=count)(**batch())
    mask_nodes, repeat_nodes = len(splicer.matches[0].attrs["cone"].nodes), 12
    shared = 3  # position_ids, read by the rotation as well
    assert graphs[0] - splicer.left[0] >= mask_nodes - shared + repeat_nodes - 2


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_a_window_longer_than_the_sequence_is_causal(name: str, classified: list[str]) -> None:
    splicer = run(name, batch(6), batch(12))
    assert splicer.words[:2] == ["causal", "causal"]
    assert classified.count("sliding_window") == 1


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_length(name: str) -> None:
    splicer = run(name, *(batch(length, seed=length) for length in (12, 9, 5, 17, 9)))
    assert len(splicer.matches) == 4  # one graph for the first length, one for all others


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_padding(name: str) -> None:
    assert run(name, *(batch(kind=kind) for kind in ("ones", "right", "left"))).words == ["padding", "padding"]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_packed_documents(name: str) -> None:
    batches = (batch(kind="packed"), batch(kind="counting"), batch(kind="packed", seed=1))
    assert run(name, *batches).words == ["packed", "packed"]


def test_padding_that_comes_and_goes(classified: list[str]) -> None:
    """One graph, batches with and without padding: all-ones flags are known by their contents from then on."""
    kinds = ["ones", "right", "ones", "left", "ones", "ones"]
    splicer = run("llama", *(batch(kind=kind, seed=i) for i, kind in enumerate(kinds)))
    assert len(splicer.matches) == 2 and splicer.judged == {"DataMask"}
    assert classified == ["causal", "other", "other"]


def test_flags_rewritten_in_place() -> None:
    """The same tensors again, with other contents: in place, and behind autograd's back."""
    torch._dynamo.reset()
    model = build("llama")
    compiled, parameters = torch.compile(model, backend=Splicer()), list(model.parameters())
    inputs = batch(kind="ones")
    flags = inputs["attention_mask"]
    for value, write in ((1, flags), (0, flags), (1, flags.data), (0, flags.data), (0, flags.numpy())):
        write[0, -4:] = value
        close(step(compiled, parameters, inputs), step(model, parameters, inputs))


def test_masks_die_with_the_flags() -> None:
    torch._dynamo.reset()
    model, splicer = build("llama"), Splicer()
    inputs = batch(kind="right")
    torch.compile(model, backend=splicer)(**inputs)
    judge = splicer.calls[0].judge
    assert len(judge._readings) == 1
    del inputs
    assert not judge._readings


@pytest.mark.parametrize(
    ("name", "kind", "announcing"),
    [
        ("gemma3_text", "plain", True),
        ("llama", "plain", False),
        ("llama", "ones", True),
        ("gemma3_text", "right", False),
    ],
)
def test_layers_under_checkpointing(name: str, kind: str, announcing: bool, classified: list[str]) -> None:
    torch._dynamo.reset()
    model = build(name, num_hidden_layers=4, **({"layer_types": LAYERS * 2} if name != "llama" else {}))
    splicer = Splicer(announcing)
    model.gradient_checkpointing_enable()
    compiled, parameters = torch.compile(model, backend=splicer), list(model.parameters())
    masks = len(set(PLAIN[name]))
    for i in range(3):
        inputs = batch(kind=kind, seed=i)
        close(step(compiled, parameters, inputs), step(model, parameters, inputs))
    assert len(splicer.matches) == 4
    assert set(splicer.masks) == (set(PLAIN[name]) if kind == "plain" else {"padding"})
    once = announcing and kind == "plain"
    assert len(classified) == (masks if once else 3 * 2 * masks)  # else once a forward and once a recomputation


def test_autocast(classified: list[str]) -> None:
    torch._dynamo.reset()
    model = build("llama")
    compiled, parameters = torch.compile(model, backend=Splicer()), list(model.parameters())
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = step(compiled, parameters, inputs), step(model, parameters, inputs)
    truth = step(model.double(), parameters, inputs)
    assert float((ours - truth).norm()) <= 1.10 * float((eager - truth).norm()) + 1e-4 * float(truth.norm())
    assert classified == ["causal"]


# Hand-written attention: what must and what must not be recognised.


def capture(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[list[Match], Splicer]:
    """Splice a function and compare it with eager: value and gradients."""
    torch._dynamo.reset()
    splicer = Splicer()
    compiled = torch.compile(function, backend=splicer, fullgraph=True, dynamic=dynamic)
    wrt = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    ours, eager = compiled(*args), function(*args)
    gradient = torch.randn(eager.shape, dtype=eager.dtype, generator=torch.Generator().manual_seed(0))
    pairs = zip(*([out.detach(), *torch.autograd.grad(out, wrt, gradient)] for out in (ours, eager)))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
    return splicer.matches, splicer


def heads(*counts: int, length: int = 6, dim: int = 8, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, length, dim, generator=generator, dtype=dtype).requires_grad_() for n in counts]


SPELLINGS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "expand, reshape": lambda x, n: x[:, :, None].expand(-1, -1, n, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]),
    "expand, flatten": lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2),
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, 1),
    "torch.repeat_interleave": lambda x, n: torch.repeat_interleave(x, repeats=n, dim=1),
    "stack": lambda x, n: torch.stack([x] * n, 2).flatten(1, 2),
    "stack, contiguous": lambda x, n: torch.stack([x] * n, dim=2).reshape(x.shape[0], -1, *x.shape[2:]).contiguous(),
    "repeat": lambda x, n: x[:, :, None].repeat(1, 1, n, 1, 1).flatten(1, 2),
    "length first": lambda x, n: x.transpose(1, 2).contiguous().repeat_interleave(n, 2).transpose(1, 2),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_repeated_heads(spelling: str, dynamic: bool) -> None:
    repeat = SPELLINGS[spelling]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, repeat(k, 3), repeat(v, 3), is_causal=True)

    matches, splicer = capture(attend, *heads(6, 2, 2), dynamic=dynamic)
    assert [m.attrs["repeats"] for m in matches] == [3] and splicer.words == ["causal"]
    assert splicer.calls[0].enable_gqa and len(matches[0].nodes) > 2


def test_one_key_head_expanded() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1))

    matches, splicer = capture(attend, *heads(4, 1, 1))
    assert [m.attrs["repeats"] for m in matches] == [4] and splicer.words == ["none"]


NOT_REPEATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tiled": lambda x: x.repeat(1, 2, 1, 1),
    "tiled by cat": lambda x: torch.cat([x, x], 1),
    "stacked before": lambda x: torch.stack([x, x], 1).flatten(1, 2),
    "flipped": lambda x: x.repeat_interleave(2, 1).flip(1),
    "scaled": lambda x: x.repeat_interleave(2, 1) * 1.5,
    "one value only": lambda x: x.repeat_interleave(2, 1).relu(),
}


@pytest.mark.parametrize("spelling", NOT_REPEATED)
def test_what_is_not_a_repetition(spelling: str) -> None:
    repeat = NOT_REPEATED[spelling]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v))

    matches, splicer = capture(attend, *heads(4, 2, 2))
    assert [m.attrs["repeats"] for m in matches] == [1] and not splicer.calls


def test_lengths_that_happen_to_agree() -> None:
    """A repetition count that is a size, equal to n here by chance, is none."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        k, v = (t[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k[:, :4], v[:, :4])

    matches, _ = capture(attend, *heads(4, 2, 2), torch.zeros(3), dynamic=True)
    assert [m.attrs["repeats"] for m in matches] == [1]


def index(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(q.shape[2])
    return i[:, None], i[None, :]


def float_mask(q: torch.Tensor) -> torch.Tensor:
    return torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)


def strict(q: torch.Tensor) -> torch.Tensor:
    i, j = index(q)
    return (j < i) | (i == 0)


MASKS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "tril of ones": ("causal", lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()),
    "additive triu": ("causal", float_mask),
    "greater or equal": ("causal", lambda q: torch.ge(*index(q))),
    "not greater": ("causal", lambda q: ~(index(q)[1] > index(q)[0])),
    "new_ones of an activation": ("causal", lambda q: q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()),
    "everything": ("none", lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)),
    "window": ("sliding_window", lambda q: (index(q)[1] <= index(q)[0]) & (index(q)[0] - index(q)[1] < 3)),
    "strictly causal": ("other", strict),
    "off by one": ("other", lambda q: index(q)[1] <= index(q)[0] + 1),
    "an extra column": ("other", lambda q: (index(q)[1] <= index(q)[0]) | (index(q)[1] == q.shape[2] - 1)),
    "chunks": ("other", lambda q: (index(q)[1] <= index(q)[0]) & (index(q)[1] // 4 == index(q)[0] // 4)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_what_the_mask_computes_decides(name: str, dynamic: bool, classified: list[str]) -> None:
    word, mask = MASKS[name]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q))

    _, splicer = capture(attend, *heads(2, 2, 2), dynamic=dynamic)
    assert splicer.words == [word] and classified == [word]


def test_learned_random_and_rewritten_masks_are_left() -> None:
    def learned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.tril())

    def rewritten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        mask[:, 0] = True
        mask[5, 1] = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def random(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.rand(6, 6) < 0.5)

    bias = torch.zeros(6, 6, requires_grad=True)
    for function, extra in ((learned, (bias,)), (rewritten, ())):
        matches, splicer = capture(function, *heads(2, 2, 2), *extra)
        assert not splicer.calls and matches[0].attrs["kept"] and splicer.words == ["other"]
    splicer = Splicer()
    torch._dynamo.reset()
    torch.compile(random, backend=splicer)(*heads(2, 2, 2))
    assert not splicer.calls


def test_a_mask_given_by_the_user(classified: list[str]) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        once = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.scaled_dot_product_attention(once, k, v, attn_mask=mask)

    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    shifted = causal | torch.eye(6, dtype=torch.bool).roll(1, 1)
    for mask, word in ((causal, "causal"), (shifted, "other")):
        classified.clear()
        capture(attend, *heads(2, 2, 2), mask)
        assert classified == [word]


@pytest.mark.parametrize("sample", RULE.samples, ids=lambda sample: sample.name)
def test_samples(sample: Sample) -> None:
    matches, _ = capture(sample.function, *sample.arguments())
    assert [match.rule for match in matches] == ["attention"]
