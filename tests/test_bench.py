"""The benchmark scripts run, on the CPU and small, and say so when a system cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(BENCH / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def module(name: str) -> Any:
    """A script of bench/ as a module."""
    spec = spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_train_compares_systems_and_reports_failures(tmp_path: Path) -> None:
    run = script("train.py", "--model", "tiny", "--layers", "1", "--device", "cpu", "--batch", "1", "--seq", "16",
                 "--systems", "eager,sloth,liger", "--steps", "2", "--warmup", "2", "--out", str(tmp_path),
                 "--name", "t")  # fmt: skip
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "t.json").read_text())["results"]
    assert (tmp_path / "t.png").exists() and (tmp_path / "t.md").read_text() == run.stdout
    assert results["eager"]["losses"] == pytest.approx(results["sloth"]["losses"], abs=0.02)
    assert results["eager"]["ms"] > 0 and results["sloth"]["peak_gib"] > 0
    assert "liger_kernel" in results["liger"]["error"]
    assert "| liger | ModuleNotFoundError" in run.stdout


def test_a_system_that_takes_too_long_is_a_row(tmp_path: Path) -> None:
    run = script("train.py", "--model", "tiny", "--device", "cpu", "--systems", "eager", "--timeout", "0.2",
                 "--out", str(tmp_path), "--name", "t")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "| eager | not finished after 0 s" in run.stdout


def test_thin_products_are_measured_beside_the_librarys() -> None:
    pytest.importorskip("triton")
    run = script("thin.py", "--device", "cpu", "--tokens", "16", "--factors", "fp32", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    assert [line.split(" | ")[0] for line in run.stdout.splitlines()[2:5]] == ["| both, q, k, v", "| across, q, k, v", "| along, q, k, v"]
    assert len(run.stdout.splitlines()) == 14


def test_sums_by_an_index_are_measured_beside_pytorchs() -> None:
    pytest.importorskip("triton")
    run = script("segments.py", "--device", "cpu", "--scale", "4096", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2 + 8


def test_unknown_systems_are_refused_by_name() -> None:
    run = script("train.py", "--systems", "eager,magic")
    assert run.returncode == 2
    assert "unknown system magic; known: eager" in run.stderr
    assert "unknown run magic; known: fp32" in script("curve.py", "--runs", "magic").stderr


def test_lora_learns_as_in_fp32(tmp_path: Path) -> None:
    """Eager rounds the base's output before it adds the adapter's, and learns less; sloth rounds their sum once.

    With fp32 adapters too: ``test_acceptance`` trains both, without a process for each.
    """
    run = script("curve.py", "--tiny", "--out", str(tmp_path), "--runs", "fp32;eager;sloth")
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "lora-curve-tiny.json").read_text())["results"]
    truth = results["fp32"]["losses"]
    distance = {name: max(abs(a - b) for a, b in zip(r["losses"], truth)) for name, r in results.items()}
    assert distance["eager"] > 0.03 and distance["sloth"] < 0.015


def test_kernel_rates_are_printed() -> None:
    command = [sys.executable, "-m", "pytest", str(BENCH / "kernels.py"), "-k", "rms_norm and not inductor",
               "-p", "no:cacheprovider", "-p", "no:xdist"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = ("| operation | pass | eager | sloth |", "| rms_norm 64 x 128 | forward |", "| add + rms_norm 64 x 256 | backward |")
    for row in ("limits: copy", *rows):
        assert row in run.stdout


def test_the_gpu_script_explains_itself_and_refuses_a_machine_without_one() -> None:
    assert "-s  an archive" in subprocess.run([BENCH / "gpu.sh", "-h"], capture_output=True, text=True).stdout
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([BENCH / "gpu.sh"], capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr


LIGER = '''
def apply_liger_kernel_to_a(rope: bool = True, rms_norm: bool = True, swiglu: bool = False, cross_entropy: bool = False,
                            fused_linear_cross_entropy: bool = True, model=None):
    if rope:
        raise NotImplementedError("not for this one")
    if rms_norm:
        modeling.RMSNorm = LigerRMSNorm
    if swiglu:
        modeling.MLP = LigerMLP
    if fused_linear_cross_entropy:
        modeling.forward = fused
    if model is not None:
        pass

def apply_liger_kernel_to_b(rms_norm: bool = True, layer_norm: bool = True, geglu: bool = True):
    if layer_norm and model is None:
        nn.LayerNorm = LigerLayerNorm
    if geglu:
        logger.warning_once("nothing happens")
    apply_liger_kernel_to_a(rope=False, rms_norm=rms_norm)

MODEL_TYPE_TO_APPLY_LIGER_FN = {"a": apply_liger_kernel_to_a, "b_text": apply_liger_kernel_to_b, "b": apply_liger_kernel_to_b}
'''
UNSLOTH = {
    "unsloth/models/loader.py": '''
class Loader:
    def load(model_type):
        if model_type == "a":
            dispatch_model = FastA
        elif model_type == "b":
            if old:
                raise ImportError
            dispatch_model = FastB if model_type == "b" else FastC
        elif model_type == "c":
            pass
''',
    "unsloth/models/a.py": '''
def attention(q, k):
    return fast_rope_embedding(q, k)
def layer(x):
    return attention(fast_rms_layernorm(x))
class FastA:
    def pre_patch():
        Layer.forward = layer
''',
    "unsloth/models/b.py": "class FastB(FastA):\n    def post(): head.forward = fast_cross_entropy_loss\n",
}


def test_what_peers_patch_is_read_from_their_source(tmp_path: Path) -> None:
    peers = module("peers")
    assert peers.liger(LIGER) == {"a": ["cross_entropy", "rms_norm"], "b_text": ["layer_norm", "rms_norm"], "b": ["layer_norm", "rms_norm"]}
    assert peers.unsloth(UNSLOTH) == {"a": ["rms_norm", "rope"], "b": ["cross_entropy", "rms_norm", "rope"]}
    with zipfile.ZipFile(tmp_path / "liger_kernel-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(peers.LIGER, LIGER)
    with pytest.raises(FileNotFoundError, match="pip download --no-deps"):
        peers.read(tmp_path)
    with zipfile.ZipFile(tmp_path / "unsloth-3.4-py3-none-any.whl", "w") as wheel:
        for name, text in UNSLOTH.items():
            wheel.writestr(name, text)
    found = peers.read(tmp_path)
    assert (found["liger"]["version"], found["unsloth"]["version"]) == ("1.2", "3.4")
    stored = json.loads(module("coverage").store(found))
    assert stored == found


def test_the_stored_peers_are_those_of_the_packages() -> None:
    from slothc.peers import peers

    liger, unsloth = peers()
    assert set(unsloth.models) == {"llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3"}
    assert {"llama", "gemma2", "qwen3_moe", "phi3", "gpt_oss"} < set(liger.models) and len(liger.models) > 40
    assert set(liger.models["llama"]) == {"rms_norm", "rope", "gated_mlp", "cross_entropy"}
    assert "rope" not in liger.models["deepseek_v3"]
    row = {"name": "llama", "shares": {"rms_norm": 0.4, "rope": 0.3, "rowwise": 0.1}, "counts": {"rms_norm": 5, "rope": 4, "rowwise": 2}}
    assert liger.most(row) == (pytest.approx(0.7), 9) and liger.most({"name": "mamba"}) is None


def test_the_coverage_table_is_made_from_what_was_measured(tmp_path: Path) -> None:
    rows = [
        {"name": "llama", "status": "ok", "coverage": 0.9, "shares": {"rms_norm": 0.5, "rope": 0.2}, "counts": {"rms_norm": 5, "rope": 4}},
        {"name": "mamba", "status": "ok", "coverage": 0.7, "shares": {"rms_norm": 0.5}, "counts": {"rms_norm": 3, "layer_norm": 1}},
        {"name": "new", "status": "off", "coverage": 0.8, "shares": {}, "counts": {"rms_norm": 7}},
    ]
    versions = {"slothc": "9", "torch": "2", "transformers": "5"}
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"versions": versions, "settings": {"dtype": "fp32", "peft": None}, "models": rows}))
    run = script("coverage.py", "--json", str(path))
    assert run.returncode == 0, run.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if line.startswith("|")]
    assert lines[2] == ["sloth 9", "2", "70.0%", "80.0%", "9", "4", "0", "0"]
    assert lines[3][1:] == ["1", "0.0%", "70.0%", "5", "4", "0", "0"]
    assert "3 architectures of transformers 5" in run.stdout
    coverage = module("coverage")
    text = coverage.into(f"before {coverage.BEGIN} old {coverage.END} after", "new")
    assert text == f"before {coverage.BEGIN}\nnew\n{coverage.END} after"
    with pytest.raises(ValueError, match="marks"):
        coverage.into("no marks", "new")
