"""The command line: what it prints, and its exit codes for wrong input."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from slothc import cli, cli_rule, cli_target, tiny
from slothc.catalogue import rules
from slothc.cli_app import group

RULES = [rule.name for rule in rules()]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(group, list(arguments), catch_exceptions=False)


def test_help_lists_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("explain", "derive", "check", "demo"):
        assert command in result.output


def test_explain_prints_counts_and_writes_files(tmp_path: Path) -> None:
    result = invoke("explain", "llama", "--peft", "lora", "--seq", "16", "--json", str(tmp_path / "r.json"),
                    "--html", str(tmp_path / "r.html"))  # fmt: skip
    assert result.exit_code == 0, result.output
    for rule, count in {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "lora_linear": 14, "cross_entropy": 1}.items():
        assert any(line.split()[:2] == [rule, str(count)] for line in result.output.splitlines()), (rule, result.output)
    assert json.loads((tmp_path / "r.json").read_text())["counts"]["rms_norm"] == 5
    assert "rms_norm" in (tmp_path / "r.html").read_text()


def test_explain_takes_a_directory(tmp_path: Path) -> None:
    tiny.tiny_config("qwen3").save_pretrained(tmp_path)
    model, inputs = cli_target.build(str(tmp_path), size="tiny", batch=3, seq=8, peft=None, dtype="fp32")
    assert model.config.model_type == "qwen3"
    assert inputs["input_ids"].shape == inputs["labels"].shape == (3, 8)
    assert next(model.parameters()).dtype == torch.float32


def test_explain_builds_a_decoder_from_its_own_config() -> None:
    """musicgen's config is of several models, its heads read a sequence each."""
    result = invoke("explain", "musicgen", "--size", "tiny")
    assert result.exit_code == 0, result.output
    assert "layer_norm" in result.output


def test_full_size_takes_no_memory() -> None:
    model, inputs = cli_target.build("llama", size="full", batch=1, seq=64, peft="lora", dtype="bf16")
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) > 5e9
    assert inputs["input_ids"].is_meta


@pytest.mark.parametrize("arguments", [
    ("explain", "no-such-model"), ("explain", "llama", "--size", "huge"), ("explain", "llama", "--dtype", "int8"),
    ("explain", "llama", "--seq", "1"), ("derive", "no_such_rule"), ("check", "no_such_rule"),
    ("derive", "rms_norm", "--sample", "none"), ("demo", "--backend", "other"), ("demo", "--steps", "0"),
])  # fmt: skip
def test_wrong_input_is_a_usage_error_that_names_it(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert arguments[-1] in result.output


def test_unknown_names_come_with_the_known_ones(tmp_path: Path) -> None:
    assert "qwen3" in invoke("explain", "no-such-model").output
    assert "config.json" in invoke("explain", str(tmp_path)).output
    assert all(name in invoke("derive", "no_such_rule").output for name in RULES)
    assert "gemma" in invoke("derive", "rms_norm", "--sample", "none").output


@pytest.mark.parametrize("rule", ["rms_norm", "rope", "gated_mlp", "layer_norm", "cross_entropy"])
def test_derive_prints_formula_backward_and_triton(rule: str) -> None:
    output = invoke("derive", rule).output
    assert "d_" in output and "saved" in output
    assert "@triton.jit" in output and "tl.store" in output


def test_derive_of_matrices_prints_gradients_and_code() -> None:
    output = invoke("derive", "lora_linear").output
    assert "dA = s B' G' X" in output
    assert "def backward(" in output


def test_every_sample_can_be_derived() -> None:
    for rule in rules():
        for sample in rule.samples:
            found = cli_rule.lifted(rule, sample)
            assert found, (rule.name, sample.name, found.reasons)


@pytest.mark.parametrize("rule", RULES)
def test_check_passes_for_every_sample(rule: str) -> None:
    result = invoke("check", rule)
    assert result.exit_code == 0, result.output
    assert "float64 autograd" in result.output
    assert "WRONG" not in result.output


def test_check_fails_when_a_witness_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from slothc import cli_check

    monkeypatch.setattr(cli_check, "SYMBOLIC", -1.0)
    result = invoke("check", "gated_mlp")
    assert result.exit_code == 1
    assert "WRONG" in result.output


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def without_click(name: str, *rest: Any, **more: Any) -> Any:
        if name == "click":
            raise ModuleNotFoundError("No module named 'click'", name="click")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "slothc.cli_app")
    monkeypatch.setattr(builtins, "__import__", without_click)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "slothc[cli]" in capsys.readouterr().err


FAMILIES = """llama qwen3 gemma2 gemma3_text phi3 glm4 cohere2 olmo2 gpt_oss nanochat llama4_text deepseek_v3 mixtral
stablelm gptj starcoder2 granite falcon_h1"""


@pytest.mark.parametrize("name", FAMILIES.split())
def test_small_configs_build_and_train(name: str) -> None:
    model, inputs = cli_target.build(name, size="tiny", batch=1, seq=8, peft=None, dtype="fp32")
    assert sum(p.numel() for p in model.parameters()) < 3e6
    assert torch.isfinite(model(**inputs).loss)


def test_shrinking_keeps_what_decides_the_graph() -> None:
    from transformers import AutoConfig

    big = AutoConfig.for_model("gemma2")
    small = tiny.shrink(big)
    assert type(small) is type(big)
    for field in ("hidden_activation", "final_logit_softcapping", "attn_logit_softcapping", "tie_word_embeddings"):
        assert getattr(small, field) == getattr(big, field)
    assert set(small.layer_types) == set(big.layer_types)
    assert small.hidden_size == tiny.WIDTH and not small.use_cache


def test_an_unknown_model_type_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model type .nope.*llama"):
        tiny.tiny_config("nope")
