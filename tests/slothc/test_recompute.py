"""A checkpoint as one autograd function: the gradients, errors, random numbers and memory of PyTorch's, without its hooks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from slothc import checkpointing, recompute
from slothc.bind import masks
from slothc.unneeded import without_unneeded


def body_of(f: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(f)


def both(f: Callable[..., Any], *args: Any, fit: bool = True, **kwargs: Any) -> tuple[Any, Any]:
    """What the checkpoint of ``f`` and PyTorch's give."""
    body = body_of(f)
    assert recompute.fits(body, {**kwargs, "use_reentrant": False}, args) == fit
    return checkpointing.checkpointed(body, *args, **kwargs), checkpoint(f, *args, use_reentrant=False, **kwargs)


def layer(x: Tensor, w: Tensor, flags: Tensor) -> tuple[Tensor, Tensor, None]:
    h = F.silu(x @ w) * flags
    return h + x, h.argmax(-1), None


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True), torch.ones(4)


def test_results_and_gradients() -> None:
    x, w, flags = drawn()
    (y, index, none), (z, other, _) = both(layer, x, w, flags)
    assert none is None and torch.equal(index, other) and not index.requires_grad and torch.equal(y, z)
    for wanted in ([x, w], [w], [x]):
        for ours, true in zip(*(torch.autograd.grad(v.square().sum(), wanted, retain_graph=True) for v in (y, z))):
            assert torch.equal(ours, true)


def test_second_derivatives() -> None:
    x, w, flags = drawn()
    found = []
    for y, *_ in both(layer, x, w, flags):
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [x, w]))
    for ours, true in zip(*found):
        torch.testing.assert_close(ours, true)


def test_backward_twice() -> None:
    x, w, flags = drawn()
    y = both(layer, x, w, flags)[0][0].sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


@pytest.mark.parametrize("which", [0, 2])
def test_arguments_that_were_written_to(which: int) -> None:
    args = drawn()
    y = both(layer, *args)[0][0].sum()
    with torch.no_grad():
        args[which].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_argument_that_comes_back_and_a_result_that_nobody_reads() -> None:
    x, w, _ = drawn()
    (same, view, unread), (z, _, _) = both(lambda x, w: (x, x[1:], x @ w), x, w)
    assert torch.equal(torch.autograd.grad(same.sum() + view.sum(), x)[0], 1.0 + F.pad(torch.ones(2, 4), (0, 0, 1, 0)))
    assert torch.equal(z, x) and unread.requires_grad


def test_what_is_cut_off_inside_has_no_gradient_outside() -> None:
    """A result that is detached, or an argument without a gradient, is that outside too: routing, statistics, masks."""
    w = nn.Parameter(torch.randn(4, 4))

    def body(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        h = F.silu(x @ w)
        return h * mask, h.detach() * 2.0, mask, h.argmax(-1)

    def model(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = checkpoint(body, x, mask, use_reentrant=False)
        return results

    torch._dynamo.reset()
    x, mask = torch.randn(3, 4, requires_grad=True), torch.ones(3, 4)
    found, true = (f(x, mask) for f in (torch.compile(model, backend="sloth"), model))
    assert [r.requires_grad for r in found] == [r.requires_grad for r in true] == [True, False, False, False]
    ours, eager = (torch.autograd.grad((r[0] * r[1]).sum(), [x, w]) for r in (found, true))
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b)


def test_random_numbers_and_autocast_are_the_forwards() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (F.dropout(x @ w, 0.5, True),)

    x, w, _ = drawn()
    found = []
    for run in (checkpointing.checkpointed, lambda body, *args: body(*args)):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            (y,) = run(body_of(f), x, w)
        after = torch.rand(1)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, w])
        found.append((y, after, *gradients, torch.rand(1)))
    assert found[0][0].dtype is torch.bfloat16
    for ours, true in zip(*found):
        assert torch.equal(ours, true)


def test_what_stays_with_pytorch() -> None:
    x, w, _ = drawn()
    held = body_of(lambda x: (x + 1,))
    held.register_parameter("p", nn.Parameter(torch.ones(4)))
    with held.graph.inserting_before(list(held.graph.nodes)[-1]):
        held.graph.get_attr("p")
    written = body_of(lambda x, w: (x.view(-1).mul_(2.0), w + 1))
    for body, args in ((held, (x,)), (written, (x, w)), (body_of(lambda x: x + 1), (x,)), (body_of(lambda x: ((x, x),)), (x,))):
        assert not recompute.fits(body, {}, args)
    sums = body_of(lambda x: (torch.ops.aten.mul.Tensor(x, x).add_(1.0),))
    assert recompute.fits(sums, {}, (x,))                                  # what it writes to is its own
    views = (lambda x: (torch.ops.aten.view.default(x, [12]).add_(1.0),), lambda x: (torch.ops.aten.view(x, [12]).add_(1.0),))
    for view in (*views, lambda x: (x[0].add_(1.0),), lambda x: (x.mul(1.0).add_(1.0),)):
        assert not recompute.fits(body_of(view), {}, (x,))                 # of torch's functions it is not known
    fresh = body_of(lambda x: (torch.empty_like(x) + x,))
    assert recompute.fits(fresh, {}, (x,)) and not recompute.fits(fresh, {"debug": True}, (x,))
    assert not recompute.fits(fresh, {}, (x.to("meta"),))
    y, z = both(lambda x, w: (x @ w,), x, w, fit=False, determinism_check="none")
    assert torch.equal(y[0], z[0])


def test_nothing_outlives_the_backward() -> None:
    x, w, flags = drawn()
    y = both(layer, x, w, flags)[0][0].sum()
    ref = weakref.ref(flags)
    y.backward()
    del flags
    gc.collect()
    assert ref() is None and y.grad_fn is not None


def test_hooks_on_saved_tensors_see_the_activations() -> None:
    x, w, flags = drawn()
    seen: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = checkpointing.checkpointed(body_of(layer), x, w, flags)[0].sum()
    assert [id(t) for t in seen] == [id(x), id(w)]
    y.backward()
    assert x.grad is not None


@pytest.mark.parametrize("lora", [True, False])
def test_a_model_checkpoints_without_pythons_hooks(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the last product of each layer is made once, though the layer runs twice."""
    owner = tm.model("llama")
    model = tm.adapted(owner) if lora else owner
    owner.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        owner.disable_input_require_grads()
    inputs = tm.batch()
    eager = tm.step(model, **inputs)
    bodies: list[fx.GraphModule] = []

    def seen(body: fx.GraphModule) -> fx.GraphModule:
        bodies.append(body)
        return without_unneeded(body)

    monkeypatch.setattr(recompute, "without_unneeded", seen)
    monkeypatch.setattr(checkpointing, "checkpoint", None)
    assert tm.distance(tm.step(model, torch.compile(model, backend="sloth"), **inputs), eager) < 1e-5
    assert len(bodies) == 2
    for body in bodies:
        assert "_unneeded" not in body.code and without_unneeded(body).code.count("_unneeded(") == 1


def test_experts_write_to_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tm.model("mixtral", shallow=True)
    owner.gradient_checkpointing_enable({"use_reentrant": False})
    eager = tm.step(owner, **tm.batch())
    monkeypatch.setattr(checkpointing, "checkpoint", None)
    assert tm.distance(tm.step(owner, torch.compile(owner, backend="sloth"), **tm.batch()), eager) < 1e-5


def product(x: Tensor) -> Tensor:
    return x * 2


product.unneeded = lambda x: torch.empty_like(x)                           # type: ignore[attr-defined]
fx.wrap("product")


@pytest.mark.parametrize("f, left_out", [
    (lambda x: (product(x) + x,), True), (lambda x: (product(x).view(-1).to(torch.float64),), True), (lambda x: (x + 1,), False),
    (lambda x: (product(x) * x,), False), (lambda x: (product(x).add_(x),), False), (lambda x: (product(x).exp() + x,), False),
    (lambda x: (product(product(x)),), True),
    (lambda x: (x[product(x).to(torch.int64)],), False), (lambda x: (torch.stack((product(x), x)),), False),
])  # fmt: skip
def test_what_a_gradient_reads_is_made_again(f: Callable[[Tensor], Any], left_out: bool) -> None:
    body = body_of(f)
    found = [n.target for n in without_unneeded(body).graph.nodes if n.target in (product, product.unneeded)]  # type: ignore[attr-defined]
    assert found[-1:] == ([product.unneeded] if left_out else found[-1:] and [product])  # type: ignore[attr-defined]
    assert all(t is product for t in found[:-1]) and (left_out or without_unneeded(body) is body)


def test_masks_are_looked_at_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tm.model("llama")
    owner.gradient_checkpointing_enable({"use_reentrant": False})
    fast = torch.compile(owner, backend="sloth")
    inputs = tm.batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    tm.step(owner, fast, **inputs, attention_mask=mask)
    looked: list[int] = []
    classify = masks.classify
    monkeypatch.setattr(masks, "classify", lambda *a: looked.append(1) or classify(*a))
    for _ in range(2):
        tm.step(owner, fast, **inputs, attention_mask=mask.clone())
    assert len(looked) <= 2
