"""Training: curves next to eager's, and the contexts in which people run models."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tm
import torch
from torch import Tensor, nn

from slothc.errors import RegionDropped


def curve(run: Any, owner: nn.Module, steps: int = 30) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in owner.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for k in range(steps):
        loss = run(**tm.batch(seed=k % 3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_thirty_steps_follow_eager_at_rounding_level(lora: bool) -> None:
    first, second = tm.model("llama", lora=lora), tm.model("llama", lora=lora)
    eager, ours = curve(first, first), curve(torch.compile(second, backend="sloth"), second)
    assert eager[-1] < eager[0] - 0.1
    assert max(abs(a - b) for a, b in zip(ours, eager)) < 5e-5


def test_no_grad_inference_mode_and_eval() -> None:
    owner, inputs = tm.model("llama", lora=True, shallow=True), tm.batch()
    compiled = torch.compile(owner, backend="sloth")
    for training in (True, False):
        owner.train(training)
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                ours, eager = compiled(**inputs), owner(**inputs)
                torch.testing.assert_close(ours.loss, eager.loss, rtol=1e-5, atol=1e-6)
                assert ours.loss.requires_grad == eager.loss.requires_grad
                assert ours.logits.requires_grad == eager.logits.requires_grad
                torch.testing.assert_close(ours.logits + 0, eager.logits, rtol=1e-4, atol=1e-5)
    owner.train()
    assert tm.distance(tm.step(owner, compiled, **inputs), tm.step(owner, **inputs)) < 1e-5


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_autocast_over_fp32_parameters(name: str, lora: bool) -> None:
    owner, inputs = tm.model(name, lora=lora), tm.batch()
    compiled = torch.compile(owner, backend="sloth")

    def step(run: Any) -> tm.Step:
        for p in owner.parameters():
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            outputs = run(**inputs)
        outputs.loss.backward()
        return tm.Step(outputs.loss.detach(), {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None})

    with tm.watched() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        ours = step(compiled)
    eager, true = step(owner), tm.truth(owner, **inputs)
    assert ours.loss.dtype == eager.loss.dtype
    assert {n: g.dtype for n, g in ours.gradients.items()} == {n: g.dtype for n, g in eager.gradients.items()}
    assert tm.distance(ours, true) <= 1.10 * tm.distance(eager, true) + tm.TINY[torch.bfloat16]
    expected = {"llama": (5, 2), "qwen3": (9, 2), "gemma2": (9, 0)}[name]
    found = tm.counted(graphs)
    assert (found["rms_norm"], found["attention"]) == expected
    assert (found["rope"], found["gated_mlp"], found["cross_entropy"], found["lora_linear"]) == (4, 2, 1, 14 if lora else 0)


def test_frozen_and_unfrozen_parameters_between_steps() -> None:
    owner, inputs = tm.model("llama"), tm.batch()
    compiled = torch.compile(owner, backend="sloth")
    states = [lambda n: True, lambda n: "norm" in n, lambda n: "layers.1" in n, lambda n: "embed" in n or "lm_head" in n, lambda n: True]
    for wanted in states:
        for n, p in owner.named_parameters():
            p.requires_grad_(wanted(n))
        ours, eager = tm.step(owner, compiled, **inputs), tm.step(owner, **inputs)
        assert set(ours.gradients) == set(eager.gradients) != set()
        assert tm.distance(ours, eager) < 1e-5


def test_two_models_share_what_was_learned_and_nothing_else() -> None:
    first, second, inputs = tm.model("llama", seed=0), tm.model("llama", seed=1), tm.batch()
    one, two = torch.compile(first, backend="sloth"), torch.compile(second, backend="sloth")
    for _ in range(2):
        assert tm.distance(tm.step(first, one, **inputs), tm.step(first, **inputs)) < 1e-5
        assert tm.distance(tm.step(second, two, **inputs), tm.step(second, **inputs)) < 1e-5


def test_models_that_differ_in_a_constant() -> None:
    inputs = tm.batch()
    for eps in (1e-6, 1e-2, 1e-1):  # Dynamo may turn the constant into an input
        owner = tm.model("llama", rms_norm_eps=eps)
        assert tm.distance(tm.step(owner, torch.compile(owner, backend="sloth"), **inputs), tm.step(owner, **inputs)) < 1e-5


def test_threads() -> None:
    owners, inputs = [tm.model("llama", seed=k) for k in range(3)], tm.batch()
    eager = [float(o(**inputs).loss) for o in owners]
    compiled = [torch.compile(o, backend="sloth") for o in owners]
    found: dict[int, float] = {}

    def work(k: int) -> None:
        for _ in range(2):
            loss = compiled[k](**inputs).loss
            loss.backward()
        found[k] = float(loss.detach())

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [found[k] for k in range(3)] == pytest.approx(eager, rel=1e-5)


def test_backward_twice_through_one_graph() -> None:
    owner, inputs = tm.model("llama", lora=True), tm.batch()

    def twice(run: Any) -> dict[str, Tensor]:
        for p in owner.parameters():
            p.grad = None
        loss = run(**inputs).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}

    ours, eager = twice(torch.compile(owner, backend="sloth")), twice(owner)
    zero = torch.zeros(())
    assert tm.distance(tm.Step(zero, ours), tm.Step(zero, eager)) < 1e-5


def test_backward_twice_without_retaining_raises_as_eager_does() -> None:
    owner, inputs = tm.model("llama"), tm.batch()
    loss = torch.compile(owner, backend="sloth")(**inputs).loss
    loss.backward()
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|already been freed"):
        loss.backward()


def test_gradient_accumulation_and_num_items_in_batch() -> None:
    owner, parts = tm.model("llama"), [tm.batch(seed=k) for k in range(3)]
    items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in parts)

    def accumulate(run: Any, count: Any) -> tm.Step:
        for p in owner.parameters():
            p.grad = None
        total = torch.zeros(())
        for inputs in parts:
            loss = run(**inputs, num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        return tm.Step(total, {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None})

    compiled = torch.compile(owner, backend="sloth")
    for count in (items, torch.tensor(items)):
        with tm.watched() as graphs:
            ours = accumulate(compiled, count)
        eager = accumulate(owner, count)
        assert torch.allclose(ours.loss, eager.loss, rtol=1e-5) and tm.distance(ours, eager) < 1e-5
        assert tm.counted(graphs[:1])["cross_entropy"] == 1


def test_generate_with_a_model_compiled_in_place() -> None:
    owner = tm.model("llama").eval()
    owner.generation_config.eos_token_id = owner.generation_config.pad_token_id = None
    ids = tm.batch()["input_ids"]
    expected = owner.generate(ids, max_new_tokens=4, do_sample=False)
    owner.compile(backend="sloth")
    assert torch.equal(owner.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_generate_through_a_compiled_wrapper() -> None:
    owner = tm.model("llama").eval()
    owner.generation_config.eos_token_id = owner.generation_config.pad_token_id = None
    ids = tm.batch()["input_ids"]
    expected = owner.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.compile(owner, backend="sloth").generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_padding_and_position_ids() -> None:
    owner, inputs = tm.model("llama"), tm.batch(3, 16)
    mask = torch.ones(3, 16, dtype=torch.int64)
    mask[0, :5], mask[2, 12:] = 0, 0
    packed = torch.cat([torch.arange(6), torch.arange(10)]).expand(3, 16).contiguous()
    for more in ({"attention_mask": mask}, {"position_ids": packed}, {"attention_mask": torch.ones_like(mask)}):
        compiled = torch.compile(owner, backend="sloth")
        assert tm.distance(tm.step(owner, compiled, **inputs, **more), tm.step(owner, **inputs, **more)) < 1e-5


def test_inputs_embeds_with_a_gradient() -> None:
    owner, inputs = tm.model("llama"), tm.batch()
    embedded = owner.get_input_embeddings()(inputs["input_ids"]).detach()
    found = []
    for run in (torch.compile(owner, backend="sloth"), owner):
        x = embedded.clone().requires_grad_()
        run(inputs_embeds=x, labels=inputs["labels"]).loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def test_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def train(compile_it: bool) -> tuple[list[float], dict[str, Tensor]]:
        owner = tm.model("llama", lora=True)
        if compile_it:
            owner.compile(backend="sloth")
        data = [{k: v[0] for k, v in tm.batch(1, 16, seed=k).items()} for k in range(8)]
        settings = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(owner, settings, train_dataset=data)
        trainer.train()
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], {n: p.detach() for n, p in owner.named_parameters()}

    with tm.watched() as graphs:
        ours, tuned = train(True)
    eager, expected = train(False)
    assert tm.counted(graphs[:1])["lora_linear"] == 14
    assert ours == pytest.approx(eager, abs=1e-4)
    for (_, a), b in zip(tuned.items(), expected.values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_deepcopy_and_state_dict_of_a_model_compiled_in_place(tmp_path: Path) -> None:
    owner, inputs = tm.model("llama"), tm.batch()
    keys = list(owner.state_dict())
    owner.compile(backend="sloth")
    outputs = owner(**inputs)
    outputs.loss.backward()
    assert list(owner.state_dict()) == keys
    torch.save({"loss": outputs.loss, "logits": outputs.logits}, tmp_path / "outputs.pt")
    read = torch.load(tmp_path / "outputs.pt")
    assert read["logits"].shape == (2, 16, 256)
