"""What surrounds a model: the contexts people run models in. Each item runs an architecture in a dtype under the contract."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tm
import torch
import whole
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BF16 = torch.bfloat16
BACKEND = "sloth"        # the zoo tries what fails again with a backend that does nothing


def compiled(owner: nn.Module, **more: Any) -> Any:
    return torch.compile(owner, backend=BACKEND, **more)


def gradients(owner: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def cleared(owner: nn.Module) -> None:
    for p in owner.parameters():
        p.grad = None


class Cast(nn.Module):
    """A model that turns autocast on by itself; ``dtype`` None: not at all."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.inner, self.dtype, self.config = inner, dtype, inner.config

    def forward(self, **inputs: Any) -> Any:
        if self.dtype is None:
            return self.inner(**inputs)
        with torch.autocast("cpu", self.dtype):
            return self.inner(**inputs)


def autocast_outside(name: str, dtype: torch.dtype) -> None:
    """Over fp32 parameters and over bf16 ones."""
    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        cleared(owner)
        with torch.autocast("cpu", BF16):
            loss = run(**tm.batch(seed=draw)).loss
        loss.backward()
        return tm.Step(loss.detach(), gradients(owner))

    owner = whole.shallow(name, dtype)
    whole.contract(owner, compiled(owner), BF16, step, whole.plain)


def autocast_inside(name: str, dtype: torch.dtype) -> None:
    owner = Cast(whole.shallow(name, dtype), BF16)

    def exact(wide: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        wide.dtype = None
        return whole.plain(wide, run, draw)

    whole.contract(owner, compiled(owner), BF16, exact=exact)


def scaler(name: str, dtype: torch.dtype) -> None:
    """Loss scaling, with fp16 autocast over fp32 parameters."""
    half = torch.float16 if dtype == torch.float32 else dtype

    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        cleared(owner)
        scale = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = torch.optim.SGD(owner.parameters(), lr=0.0)
        with torch.autocast("cpu", half):
            loss = run(**tm.batch(seed=draw)).loss
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        scale.step(optimizer)
        scale.update()
        return tm.Step(loss.detach(), gradients(owner))

    owner = whole.shallow(name, dtype)
    whole.contract(owner, compiled(owner), torch.float16, step, whole.plain)


def accumulation(name: str, dtype: torch.dtype) -> None:
    """Three batches of different lengths before the gradients are read, the loss divided by the number of items of all."""
    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        cleared(owner)
        total = torch.zeros(())
        for k, length in enumerate((16, 12, 16)):
            loss = run(**tm.batch(2, length, seed=10 * draw + k), num_items_in_batch=60).loss
            loss.backward()
            total = total + loss.detach()
        return tm.Step(total, gradients(owner))

    owner = whole.shallow(name, dtype)
    whole.contract(owner, compiled(owner), dtype, step)


def _recomputed(owner: Any, dtype: torch.dtype, reentrant: bool) -> None:
    """Under checkpointing, gradients are those of float64 without it: what is recomputed has the forward's masks."""
    base = getattr(owner, "get_base_model", lambda: owner)()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:
        base.disable_input_require_grads()                                 # cuts the graph into many small ones: see test_checkpoint

    def exact(wide: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        getattr(wide, "get_base_model", lambda: wide)().gradient_checkpointing_disable()
        return whole.plain(wide, run, draw)

    graphs = whole.contract(owner, compiled(owner), dtype, exact=exact)
    assert sum(tm.counted(graphs).values()) > 0


def checkpointing(name: str, dtype: torch.dtype) -> None:
    """Adapters with dropout."""
    _recomputed(tm.adapted(whole.shallow(name, dtype), dropout=0.3).train(), dtype, reentrant=False)


def checkpointing_reentrant(name: str, dtype: torch.dtype) -> None:
    _recomputed(whole.shallow(name, dtype, attention_dropout=0.2, attn_pdrop=0.2), dtype, reentrant=True)


def _near(ours: Tensor, eager: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    """The contract for one value."""
    assert ours.shape == eager.shape and ours.dtype == eager.dtype
    off, reference = (float((t.double() - true).norm() / true.norm()) for t in (ours, eager))
    assert off <= 1.10 * reference + tm.TINY[dtype]


def modes(name: str, dtype: torch.dtype) -> None:
    """no_grad, inference_mode, eval, and back to training: values, what requires a gradient, then a step."""
    owner, inputs = whole.shallow(name, dtype), tm.batch(4, 16)
    run = compiled(owner)
    with whole.widened(owner) as wide:
        true = wide(**inputs)
    for training in (True, False):
        owner.train(training)
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                ours, eager = run(**inputs), owner(**inputs)
                assert [t.requires_grad for t in (ours.loss, ours.logits)] == [t.requires_grad for t in (eager.loss, eager.logits)]
                _near(ours.loss.detach(), eager.loss.detach(), true.loss.detach(), dtype)
                _near(ours.logits.detach() + 0, eager.logits.detach(), true.logits.detach(), dtype)
    owner.train()
    whole.contract(owner, run, dtype)


def generation(name: str, dtype: torch.dtype) -> None:
    """A model compiled in place generates eager's tokens with both caches, from prompts padded on the left."""
    owner = whole.shallow(name, torch.float32).to(dtype).eval()
    owner.generation_config.pad_token_id, owner.generation_config.eos_token_id = 0, None
    ids = tm.batch(2, 8)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    plain = copy.deepcopy(owner)
    owner.compile(backend=BACKEND)
    for cache in ("dynamic", "static"):
        settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "cache_implementation": cache}
        more = {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
        ours, eager = owner.generate(**inputs, **settings, **more), plain.generate(**inputs, **settings, **more)
        with whole.widened(plain) as wide:
            true = wide(**inputs).logits[:, -1]
        _near(ours.logits[0], eager.logits[0], true, dtype)
        if dtype == torch.float32:
            assert torch.equal(ours.sequences, eager.sequences)


def _batches(more: dict[str, Any]) -> whole.Step:
    return lambda owner, run, draw: tm.step(owner, run, **tm.batch(3, 16, seed=draw), **more)


def padding(name: str, dtype: torch.dtype) -> None:
    """On the left, on the right, and a mask that hides nothing."""
    mask = torch.ones(3, 16, dtype=torch.int64)
    mask[0, :5], mask[2, 12:] = 0, 0
    owner = whole.shallow(name, dtype)

    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        inputs = tm.batch(3, 16, seed=draw)
        inputs["labels"][mask == 0] = -100
        return tm.step(owner, run, **inputs, attention_mask=mask if draw else torch.ones_like(mask))

    whole.contract(owner, compiled(owner), dtype, step)


def packed(name: str, dtype: torch.dtype) -> None:
    """Two documents in each row, told apart by their positions."""
    positions = torch.cat([torch.arange(6), torch.arange(10)]).expand(3, 16).contiguous()
    owner = whole.shallow(name, dtype)
    whole.contract(owner, compiled(owner), dtype, _batches({"position_ids": positions}))


def embeds(name: str, dtype: torch.dtype) -> None:
    """``inputs_embeds`` in place of ids; the gradient that they get is compared too."""
    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        cleared(owner)
        inputs = tm.batch(seed=draw)
        made = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(draw)).to(owner.dtype).requires_grad_()
        loss = run(inputs_embeds=made, labels=inputs["labels"]).loss
        loss.backward()
        return tm.Step(loss.detach(), {**gradients(owner), "inputs_embeds": made.grad})

    owner = whole.shallow(name, dtype)
    whole.contract(owner, compiled(owner), dtype, step)


def tied(name: str, dtype: torch.dtype) -> None:
    """Head and embedding are one parameter, trained, with the layers frozen or not."""
    owner = whole.shallow(name, dtype, tie_word_embeddings=True)
    owner.tie_weights()
    head, embedding = owner.get_output_embeddings(), owner.get_input_embeddings()
    assert head.weight is embedding.weight
    run = compiled(owner)
    whole.contract(owner, run, dtype)
    for p in owner.parameters():
        p.requires_grad_(p is embedding.weight)
    whole.contract(owner, run, dtype)
    assert head.weight is embedding.weight and bool(embedding.weight.grad.any())


def frozen(name: str, dtype: torch.dtype) -> None:
    """Parameters frozen and unfrozen between steps of one compiled model."""
    owner = whole.shallow(name, dtype)
    run, names = compiled(owner), [n for n, _ in owner.named_parameters()]
    for wanted in (lambda n: True, lambda n: "norm" in n or "ln" in n, lambda n: n in names[len(names) // 2 :], lambda n: True):
        for n, p in owner.named_parameters():
            p.requires_grad_(wanted(n))
        whole.contract(owner, run, dtype)


def retained(name: str, dtype: torch.dtype) -> None:
    """Two backward passes through one graph, then a third one, refused as eager does."""
    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        cleared(owner)
        loss = run(**tm.batch(seed=draw)).loss
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match=r"backward through the graph a second time|already been freed"):
            loss.backward()
        return tm.Step(loss.detach(), gradients(owner))

    owner = whole.shallow(name, dtype)
    whole.contract(owner, compiled(owner), dtype, step)


def double_backward(name: str, dtype: torch.dtype) -> None:
    """A gradient of a gradient: refused with a message, or eager's."""
    owner = whole.shallow(name, dtype)

    def penalty(run: Callable[..., Any]) -> list[Tensor]:
        trained = [p for p in owner.parameters() if p.requires_grad]
        first = torch.autograd.grad(run(**tm.batch()).loss, trained, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first if g is not None), trained, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(second, trained)]

    with sdpa_kernel(SDPBackend.MATH):                                     # eager's other one has no second derivative itself
        expected = penalty(owner)
        try:
            ours = penalty(compiled(owner))
        except RuntimeError as error:
            assert "differentiated once" in str(error), error
            return
    for a, b in zip(ours, expected):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


def hooks(name: str, dtype: torch.dtype) -> None:
    """Forward hooks that change a value, backward hooks that see gradients, hooks on parameters."""
    owner = whole.shallow(name, dtype)
    seen: dict[str, Tensor] = {}
    modules = [m for m in owner.modules() if isinstance(m, nn.Linear)] or [owner.get_output_embeddings()]
    modules[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    modules[-1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    next(owner.parameters()).register_hook(lambda g: g * 2)
    last = [p for p in owner.parameters() if p.requires_grad][-1]
    last.register_post_accumulate_grad_hook(lambda p: seen.update(last=p.grad.clone()))

    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        return whole.plain(owner, run, draw)

    def exact(wide: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        found = whole.plain(wide, run, draw)
        first = next(n for n, _ in wide.named_parameters())
        return tm.Step(found.loss, {n: g * 2 if n == first and not had else g for n, g in found.gradients.items()})

    had = bool(getattr(next(copy.deepcopy(owner).parameters()), "_backward_hooks", None))
    whole.contract(owner, compiled(owner), dtype, step, exact)
    assert torch.equal(seen["last"], last.grad)


def state(name: str, dtype: torch.dtype) -> None:
    """A model compiled in place: the same state_dict, one that loads, copies and pickles that are models of their own."""
    owner = whole.shallow(name, dtype)
    keys, values = list(owner.state_dict()), {k: v.clone() for k, v in owner.state_dict().items()}
    owner.compile(backend=BACKEND)
    first = whole.plain(owner, owner, 0)
    assert list(owner.state_dict()) == keys and all(torch.equal(v, values[k]) for k, v in owner.state_dict().items())
    cleared(owner)
    saved = io.BytesIO()
    torch.save(owner, saved)
    saved.seek(0)
    others = [copy.deepcopy(owner), pickle.loads(pickle.dumps(owner)), torch.load(saved, weights_only=False)]
    others[0].compile(backend=BACKEND)
    for other in others:
        assert list(other.state_dict()) == keys
        with torch.no_grad():
            next(owner.parameters()).add_(1.0)
            next(owner.parameters()).sub_(1.0)
            next(other.parameters()).copy_(values[next(n for n, _ in other.named_parameters())])
        again = whole.plain(other, other, 0)
        assert tm.distance(again, first) < {torch.float32: 1e-5, BF16: 2e-2}[dtype]
    owner.load_state_dict(values)
    whole.contract(owner, owner, dtype)


class Within(nn.Module):
    """Runs ``owner`` with one of its parts compiled."""

    def __init__(self, owner: nn.Module, part: nn.Module) -> None:
        super().__init__()
        self.owner, self.part, self.config = [owner], part, owner.config

    def __call__(self, **inputs: Any) -> Any:
        self.part.compile(backend=BACKEND)
        try:
            return self.owner[0](**inputs)
        finally:
            self.part._compiled_call_impl = None


def submodule(name: str, dtype: torch.dtype) -> None:
    """``torch.compile`` on the decoder without its head, and on one layer."""
    owner = whole.shallow(name, dtype)
    layer = next(m for m in owner.modules() if isinstance(m, nn.ModuleList))[0]
    decoder = next(m for m in owner.modules() if any(isinstance(c, nn.ModuleList) for c in m.children()))   # OPT calls past its base_model
    for part in (decoder, layer):
        torch._dynamo.reset()
        graphs = whole.contract(owner, Within(owner, part), dtype)
        assert sum(tm.counted(graphs).values()) > 0


def two_models(name: str, dtype: torch.dtype) -> None:
    """Forwards of two models before either backward."""
    first, second = whole.shallow(name, dtype), tm.model(name, dtype, seed=1, shallow=True, **whole.SETTINGS.get(name, {}))
    runs = {id(first): compiled(first), id(second): compiled(second)}

    def step(owner: Any, run: Callable[..., Any], draw: int) -> tm.Step:
        other = second if owner is first else first
        cleared(owner)
        loss = run(**tm.batch(seed=draw)).loss
        if owner in (first, second) and run is runs[id(owner)]:
            runs[id(other)](**tm.batch(seed=draw + 1)).loss.backward()
        loss.backward()
        return tm.Step(loss.detach(), gradients(owner))

    for owner in (first, second):
        whole.contract(owner, runs[id(owner)], dtype, step)


def threads(name: str, dtype: torch.dtype) -> None:
    """One compiled model for each of two threads."""
    owners = [tm.model(name, dtype, seed=k, **whole.SETTINGS.get(name, {})) for k in range(2)]
    runs, found = [compiled(o) for o in owners], {}

    def work(k: int) -> None:
        for draw in range(whole.DRAWS):
            found[k, draw] = whole.plain(owners[k], runs[k], draw)

    started = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in started:
        t.start()
    for t in started:
        t.join()
    for k, owner in enumerate(owners):
        with whole.widened(owner) as wide:
            true = whole.steps(wide, wide)
        assert not whole.broken([found[k, draw] for draw in range(whole.DRAWS)], whole.steps(owner, owner), true, dtype)


ITEMS: dict[str, Callable[[str, torch.dtype], None]] = {
    f.__name__: f
    for f in (
        autocast_outside, autocast_inside, scaler, accumulation, checkpointing, checkpointing_reentrant, modes, generation, padding, packed,
        embeds, tied, frozen, retained, double_backward, hooks, state, submodule, two_models, threads,
    )
}  # fmt: skip
