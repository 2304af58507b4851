"""``slothc coverage``: side processes, what they measure, and what survives one that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from processor import DEVICE

from slothc import cli_coverage, survey, survey_child, survey_choices, survey_judge
from slothc.cli_app import group
from slothc.survey_page import MEANINGS, page

# A side process whose models do as they are called.
FAKE = """
import json, os, sys, time
print("not a row", file=sys.stderr, flush=True)
for job in map(json.loads, sys.stdin):
    stage, what = job["name"].split("-")
    print(json.dumps({"stage": stage}), flush=True)
    if what == "dies":
        print("Fatal: out of luck", file=sys.stderr, flush=True)
        os.abort()
    if what == "leaves":
        os._exit(3)
    if what == "hangs":
        time.sleep(60)
    print(json.dumps({"row": {"name": job["name"], "status": "ok", "reason": "", "process": os.getpid()}}), flush=True)
"""


# ``slothc coverage`` over models that the fake process makes up.
INTERRUPTED = """
import sys
from pathlib import Path
from slothc import cli_coverage, survey
fake = Path(__file__).with_name("fake.py")
fake.write_text({fake!r})
cli_coverage._chosen = lambda *_: {names!r}
measure = survey.survey
cli_coverage.survey = lambda *a, **k: measure(*a, **k, command=(sys.executable, str(fake)))
cli_coverage.coverage(["--all", *sys.argv[1:]])
"""


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(group, ["coverage", *arguments], catch_exceptions=False)


@pytest.fixture
def fake(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return (sys.executable, str(path))


class Page(HTMLParser):
    """What a page would load, its rows, and whether its tags are closed in order."""

    VOID = ("meta", "input", "br", "link", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [str(v) for k, v in attrs if k == "src" or (k == "href" and not str(v).startswith("#"))]
        if tag == "tbody":
            self.rows.append(str(given.get("id", "")))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_two_models_end_to_end(tmp_path: Path) -> None:
    result = invoke("llama", "gpt2", "--jobs", "1", "--json", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html"))
    assert result.exit_code == 0, result.output
    assert "2 of 2 run and hold the contract" in result.output

    whole = json.loads((tmp_path / "c.json").read_text())
    llama, gpt2 = whole["models"]
    assert (llama["name"], gpt2["name"], whole["totals"]) == ("llama", "gpt2", {"ok": 2})
    assert {"rms_norm": 5, "rope": 4, "gated_mlp": 2, "cross_entropy": 1, "attention": 2}.items() <= llama["counts"].items()
    assert gpt2["counts"]["layer_norm"] == 5
    assert llama["coverage"] >= 0.95
    for row in (llama, gpt2):
        assert (row["truth"], row["holds"], row["dropped"]) == ("float64", True, [])
        assert 0 < row["errors"]["gradients"]["eager"] < 1e-5 and 0 < row["errors"]["gradients"]["sloth"] < 1e-5
        assert row["compile_s"] > 0 and row["compile_nothing_s"] > 0
        assert row["graphs"] == row["graphs_nothing"]

    text = (tmp_path / "c.html").read_text()
    parsed = Page(text)
    assert (parsed.loads, parsed.rows, parsed.open) == ([], ["m-llama", "m-gpt2"], [])
    assert "<svg" in text and "rms_norm 5" in text and "modeling_llama.py" in text
    assert "model.loss_type" in text and "hidden_states.pow(2).mean(-1, keepdim=True)" in text and "w * x * rsqrt(" in text
    assert sum(llama["shares"].values()) == pytest.approx(llama["coverage"], abs=0.02)


def test_lora_in_bf16() -> None:
    row = survey_child.measure("llama", "lora", "bf16")
    assert (row["status"], row["counts"]["lora_linear"]) == ("ok", 14), row["reason"]


@pytest.mark.parametrize(("name", "status", "words"), [
    ("sloth-dies", "crash", "signal 6: Fatal: out of luck"), ("sloth-leaves", "crash", "exit code 3"),
    ("eager-dies", "eager fails", "signal 6"), ("build-dies", "not built", "signal 6"),
    ("sloth-hangs", "timeout", "not done after 1 s, in the stage 'sloth'"),
])  # fmt: skip
def test_a_process_that_dies_is_a_row(fake: tuple[str, ...], name: str, status: str, words: str) -> None:
    before, dead, after = survey.survey(["sloth-runs", name, "eager-runs"], jobs=1, timeout=1, command=fake)
    assert (dead["name"], dead["status"]) == (name, status)
    assert words in dead["reason"]
    assert before["status"] == after["status"] == "ok"
    assert before["process"] != after["process"]
    assert [r["name"] for r in survey.failed([before, dead, after])] == [name] * name.startswith("sloth")
    assert MEANINGS[status] in page(survey.document([before, dead], {"peft": None, "dtype": "fp32"}))


def test_an_exception_under_sloth_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(owner: Any, run: Any, *rest: Any) -> Any:
        if run is not owner:
            raise RuntimeError("no luck\nat all")
        return ours(owner, run, *rest)

    ours = survey_child.step
    monkeypatch.setattr(survey_child, "step", step)
    row = survey_child.measure("llama", None, "fp32")
    assert (row["status"], row["reason"]) == ("crash", "RuntimeError: no luck at all")


def test_a_failure_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "llama", "status": "crash", "reason": "RuntimeError: [no] luck" + " at all" * 50, "graphs": 7, "coverage": 0.5}]
    monkeypatch.setattr(cli_coverage, "survey", lambda names, progress, **settings: progress(rows[0]))
    result = invoke("llama")
    assert result.exit_code == 1
    assert "[no] luck" in result.output and "crash: llama" in result.output
    assert "graphs" in result.output and "50.0%" in result.output and "…" in result.output


def _values(loss: float, weight: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "w": torch.tensor([1.0, weight])}


def test_the_contract() -> None:
    true, eager = [_values(2.0, 1.0)] * 2, [_values(2.0, 1.001)] * 2
    assert survey_judge.judge(true, eager, [_values(2.0, 1.00109)] * 2, torch.float32)["holds"]
    wrong = survey_judge.judge(true, eager, [_values(2.0, 1.0012)] * 2, torch.float32)
    assert (wrong["status"], wrong["holds"]) == ("off", False) and wrong["share"] > 1
    assert "gradients:" in wrong["reason"] and "w:" not in wrong["reason"]
    assert survey_judge.judge(true, eager, [_values(2.01, 1.001)] * 2, torch.float32)["reason"].startswith("loss:")
    assert survey_judge.judge(true, eager, [_values(2.0, float("nan"))] * 2, torch.float32)["status"] == "off"
    lost = survey_judge.judge(true, eager, [{"loss": torch.tensor(2.0)}] * 2, torch.float32)
    assert lost["status"] == "off" and "w" in lost["reason"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_before_an_interruption_is_written(tmp_path: Path, stop: signal.Signals) -> None:
    """A terminal's Ctrl-C reaches every process of its group: the model that is being measured is no crash."""
    files = tmp_path / "c.json", tmp_path / "c.html"
    (tmp_path / "run.py").write_text(INTERRUPTED.format(fake=FAKE, names=["eager-runs", "sloth-hangs", "eager-leaves"]))
    command = [sys.executable, str(tmp_path / "run.py"), "--jobs", "1", "--json", str(files[0]), "--html", str(files[1])]
    heard = signal.signal(stop, signal.SIG_DFL)                             # a test run in the background may have been told to ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(stop, heard)
    assert process.stderr is not None
    for line in process.stderr:
        if "1/3 eager-runs: ok" in line:
            break
    os.killpg(process.pid, stop)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped after 1 of 3" in err and "1 of 1 run and hold" in out
    whole = json.loads(files[0].read_text())
    assert ([m["name"] for m in whole["models"]], whole["unfinished"]) == (["eager-runs"], 3)
    assert "Stopped after 1 of 3 models" in files[1].read_text()


def test_resume_measures_only_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def measure(names: list[str], progress: Any, **settings: Any) -> None:
        asked.append(list(names))
        for name in names:
            progress({"name": name, "status": "ok", "reason": "", "coverage": 0.5 + 0.1 * len(asked)})

    monkeypatch.setattr(cli_coverage, "survey", measure)
    file = str(tmp_path / "c.json")
    for arguments in (("llama",), ("gpt2", "llama", "--resume"), ("gpt2", "llama", "--resume", "--dtype", "bf16"), ("gpt2",)):
        assert invoke(*arguments, "--json", file).exit_code == 0
    assert asked == [["llama"], ["gpt2"], ["gpt2", "llama"], ["gpt2"]]
    assert invoke("llama", "--resume").exit_code == 2


def test_no_gradient_is_a_zero_one() -> None:
    loss, zero = {"loss": torch.tensor(2.0)}, {"loss": torch.tensor(2.0), "w": torch.zeros(2)}
    ran = [_values(2.0, 1.0), zero]
    assert survey_judge.judge([_values(2.0, 1.0), loss], ran, ran, torch.float32)["holds"]
    wrong = [_values(2.0, 1.0), _values(2.0, 1e-3)]
    assert not survey_judge.judge([_values(2.0, 1.0), loss], ran, wrong, torch.float32)["holds"]


def test_more_draws_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_over_five(true: list[Any], eager: list[Any], ours: list[Any], dtype: torch.dtype) -> dict[str, Any]:
        judged.append((len(true), len(eager), len(ours)))
        return {"status": "off", "reason": "", "errors": {}} if len(true) == 5 else survey_judge.judge(true, eager, ours, dtype)

    judged: list[tuple[int, ...]] = []
    monkeypatch.setattr(survey_child, "judge", off_over_five)
    row = survey_child.measure("llama", None, "fp32", report=False)
    assert (row["status"], row["draws"], judged) == ("ok", 25, [(5, 5, 5), (25, 25, 25)])


@pytest.mark.parametrize(("mine", "dtype", "status", "draws"), [
    (0, "bf16", "off", 25), (2, "bf16", "ok", 23), (4, "bf16", "off", 25), (25, "bf16", "off", 25), (2, "fp32", "off", 25),
])  # fmt: skip
def test_draws_in_which_a_choice_turned_say_nothing(
    monkeypatch: pytest.MonkeyPatch, mine: int, dtype: str, status: str, draws: int
) -> None:
    """Of experts, say, in 16 bits. If more of sloth's turned than chance explains, they say that something is wrong."""
    def off_with_all(true: list[Any], eager: list[Any], ours: list[Any], dtype: torch.dtype) -> dict[str, Any]:
        found = survey_judge.judge(true, eager, ours, dtype)
        return found | ({"status": "off"} if len(true) in (5, 25) else {})

    flags = [[False] * 25, [k < mine for k in range(25)]]
    monkeypatch.setattr(survey_child, "judge", off_with_all)
    monkeypatch.setattr(survey_child, "turned", lambda made, true: flags.pop(0))
    row = survey_child.measure("llama", None, dtype, report=False)
    assert (row["status"], row["draws"]) == (status, draws)
    assert row.get("turned") == ({"eager": 0, "sloth": mine} if dtype == "bf16" else None)
    assert ("llama" in cli_coverage.summary([row]).partition("not counting")[2]) == (status == "ok")


def test_choices_are_seen_in_eager_and_in_what_is_compiled() -> None:
    def route(scores: torch.Tensor) -> torch.Tensor:
        weights, experts = scores.softmax(-1).topk(2, dim=-1)
        return weights.sum() + scores[experts.argmax(-1)].sum()

    torch._dynamo.reset()
    compiled, scores = torch.compile(route, backend="sloth"), torch.randn(6, 8)
    compiled(scores)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    made = []
    for run, given in ((route, scores), (compiled, scores), (compiled, scores.flip(-1))):
        with survey_choices.Choices() as seen:
            run(given)
        made.append(seen.made)
    assert [len(m) for m in made] == [2, 2, 2] and torch._dynamo.utils.counters["frames"]["total"] == frames
    assert survey_choices.turned(made[1:], made[:1] * 2) == [False, True]
    assert survey_choices.turned([made[0], []], [made[0], made[0]]) == [False, True]


@pytest.mark.parametrize(("arguments", "words"), [
    (("lama",), "unknown model type 'lama'; did you mean llama"), (("zzzzzz",), "known are"), ((), "--all"),
    (("llama", "--all"), "--all alone"), (("llama", "--dtype", "int8"), "'fp32', 'bf16'"), (("llama", "--jobs", "0"), "jobs"),
    (("llama", "--json", "no/such/folder/c.json"), "does not exist"),
    pytest.param(("llama", "--device", "cuda"), "no CUDA device", marks=pytest.mark.skipif(DEVICE == "cuda", reason="there is one")),
])  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.replace("│", " ").split())
