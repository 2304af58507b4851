"""Acceptance 4: what ``explain`` counts, and that it computes nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny_models as tm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import slothc
from slothc.statistics import counts

LLAMA = {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "lora_linear": 14, "cross_entropy": 1, "attention": 2}


def test_4_counts_of_a_two_layer_lora_llama() -> None:
    report = slothc.explain(tm.model("llama", lora=True), **tm.batch())
    assert report.counts == LLAMA
    assert report.coverage >= 0.95
    assert (report.graphs, report.breaks) == (1, {})


def test_4_counts_of_a_two_layer_qwen3() -> None:
    report = slothc.explain(tm.model("qwen3"), **tm.batch())
    assert report.counts == {"rms_norm": 9, "rope": 4, "gated_mlp": 2, "cross_entropy": 1, "attention": 2}
    assert report.coverage >= 0.95


def _large() -> nn.Module:
    """Four of the thirty-two layers of a Llama-3.1-8B, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def test_4_explain_works_on_the_meta_device() -> None:
    ids = torch.zeros(2, 2048, dtype=torch.int64, device="meta")
    checked = counts["checked"]
    report = slothc.explain(_large(), input_ids=ids, labels=ids.clone())
    assert report.counts == {"rms_norm": 9, "rope": 8, "gated_mlp": 4, "cross_entropy": 1, "attention": 4}
    assert report.coverage >= 0.95
    assert counts["checked"] == checked


def test_4_explain_computes_nothing_and_changes_nothing() -> None:
    owner, inputs = tm.model("llama", lora=True, vocab_size=2048), tm.batch(4, 128)
    before = {n: p.clone() for n, p in owner.state_dict().items()}
    torch.manual_seed(5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        slothc.explain(owner, **inputs)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profiler.events())
    assert taken < 2 * 4 * 128 * 64 * 4  # bytes of two tensors of hidden states: a forward makes dozens, and the logits
    assert all(torch.equal(p, before[n]) for n, p in owner.state_dict().items())
    assert all(p.grad is None for p in owner.parameters())
    plain = tm.step(owner, **inputs)  # the model itself still runs as it was
    assert plain.loss.isfinite()


def test_explain_leaves_a_later_compilation_alone() -> None:
    owner, inputs = tm.model("llama"), tm.batch()
    slothc.explain(owner, **inputs)
    with tm.watched() as graphs:
        ours = tm.step(owner, torch.compile(owner, backend="sloth"), **inputs)
    assert tm.counted(graphs)["rms_norm"] == 5
    assert tm.distance(ours, tm.step(owner, **inputs)) < 1e-5


def test_explain_of_a_model_without_labels() -> None:
    report = slothc.explain(tm.model("llama"), tm.batch()["input_ids"])
    assert "cross_entropy" not in report.counts
    assert report.counts["rms_norm"] == 5


def test_explain_honours_disable() -> None:
    report = slothc.explain(tm.model("llama"), sloth_options={"disable": ["rope"]}, **tm.batch())
    assert "rope" not in report.counts
    assert report.counts["rms_norm"] == 5


def test_a_report_is_a_table_and_writes_json_and_html(tmp_path: Path) -> None:
    report = slothc.explain(tm.model("gpt_oss"), **tm.batch())
    text = str(report)
    for name, number in report.counts.items():
        assert any(line.split() == [name, str(number)] for line in text.splitlines())
    assert all(m.reason and m.location and m.rule for m in report.misses)
    assert "modeling_gpt_oss.py" in text
    report.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["counts"] == report.counts and read["coverage"] == report.coverage
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "rms_norm" in page


def test_a_graph_break_is_reported() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            torch._dynamo.graph_break()
            return self.norm(y)

    report = slothc.explain(Breaking(), torch.randn(2, 16))
    assert report.graphs == 2 and sum(report.breaks.values()) == 1
    assert report.counts == {"rms_norm": 2}


@pytest.mark.parametrize("seed", [0])
def test_explain_leaves_python_randomness_alone(seed: int) -> None:
    random.seed(seed)
    expected = random.random()
    random.seed(seed)
    slothc.explain(tm.model("llama"), **tm.batch())
    assert random.random() == expected


def test_what_is_not_covered_is_named_and_adds_up() -> None:
    report = slothc.explain(tm.model("falcon_h1"), **tm.batch())
    assert abs(sum(r.share for r in report.rest) - (1 - report.coverage)) < 1e-6
    first = report.rest[0]
    assert "falcon_h1" in first.location and first.operation and first.share == max(r.share for r in report.rest)
    assert first.operation in first.line or "." in first.operation
    assert all(r.why for r in report.rest)
    assert f"{first.operation} at {first.location} ({first.why})" in str(report)


def test_a_typical_report_is_ten_lines() -> None:
    assert all(len(str(slothc.explain(tm.model(name), **tm.batch())).splitlines()) <= 10 for name in ("llama", "qwen3", "gemma2", "gpt2"))


def test_bytes_by_rule_are_parts_of_the_coverage() -> None:
    report = slothc.explain(tm.model("llama", lora=True), **tm.batch())
    assert set(report.shares) <= {*LLAMA, "rowwise", "constant"} and report.shares["rms_norm"] > 0.1
    assert 0.9 * report.coverage < sum(report.shares.values()) <= report.coverage + 1e-9


def test_a_region_shows_the_source_before_and_the_formulas_after() -> None:
    regions = {r.name: r for r in slothc.explain(tm.model("llama", lora=True), **tm.batch()).regions}
    rope = regions["rope"]
    lines = {line: names for _, line, names in rope.before}
    assert lines["return torch.cat((-x2, x1), dim=-1)"] == "neg, cat"
    assert "q_embed = (q * cos) + (rotate_half(q) * sin)" in lines or "k_embed = (k * cos) + (rotate_half(k) * sin)" in lines
    assert all("modeling_llama.py:" in at or at.startswith("peft/") for at, *_ in rope.before)
    assert [line.split(" = ")[0] for line in rope.formula.splitlines()][-2:] == ["y", "y1"]        # the two halves; nothing is kept
    assert "d_x = " in rope.backward and rope.saved.startswith("operands: ") and "values" not in rope.saved
    assert rope.kernel.startswith("rowwise_") and rope.count > 1
    norm = next(r for r in slothc.explain(tm.model("llama"), **tm.batch()).regions if r.name == "rms_norm")
    assert "rsqrt(" in norm.formula and "keep_" not in norm.formula and "values: y1, v4" in norm.saved
    assert "chain" in regions["cross_entropy"].formula and "B'" in regions["lora_linear"].formula


class Odd(nn.Module):
    """One operation of each kind that no region takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Embedding(8, 16, sparse=True), nn.Parameter(torch.ones(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = torch.cumsum(x, dim=1)
        order = x.sum(-1).argsort(-1)
        x = torch.scatter(x, 1, order[..., None], 0.0)
        kept = torch.zeros_like(x)
        kept[ids > 5] = 1.0
        mask = (ids > 3) & (ids < 7)
        return torch.fft.rfft((x + kept).unflatten(-1, (4, 4))).abs().sum() + mask.sum()


def test_what_is_not_covered_says_why() -> None:
    reasons = {r.operation.split(".")[-1].rstrip("_"): r.why for r in slothc.explain(Odd(), torch.arange(8).view(2, 4)).rest}
    said = {
        "embedding": "table look-up", "cumsum": "a scan", "argsort": "orders or counts", "scatter": "addresses elements",
        "zeros_like": "written to in place", "and": "integer or boolean", "fft_rfft": "no formula for",
    }  # fmt: skip
    assert {name: words for name, words in said.items() if words not in reasons.get(name, "")} == {}, reasons
