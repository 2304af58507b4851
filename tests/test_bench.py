"""The benchmark scripts run, on the CPU and small, and say so when a system cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_train_compares_systems_and_reports_failures(tmp_path: Path) -> None:
    run = script("train.py", "--model", "tiny", "--layers", "1", "--device", "cpu", "--batch", "1", "--seq", "16",
                 "--systems", "eager,sloth,unsloth", "--steps", "2", "--warmup", "2", "--out", str(tmp_path),
                 "--name", "t")  # fmt: skip
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "t.json").read_text())["results"]
    assert (tmp_path / "t.png").exists() and (tmp_path / "t.md").read_text() == run.stdout
    assert results["eager"]["losses"] == pytest.approx(results["sloth"]["losses"], abs=0.02)
    assert results["eager"]["ms"] > 0 and results["sloth"]["peak_gib"] > 0
    assert "unsloth" in results["unsloth"]["error"]
    assert "| unsloth | ModuleNotFoundError" in run.stdout


def test_a_system_that_takes_too_long_is_a_row(tmp_path: Path) -> None:
    run = script("train.py", "--model", "tiny", "--device", "cpu", "--systems", "eager", "--timeout", "0.2",
                 "--out", str(tmp_path), "--name", "t")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "| eager | not finished after 0 s" in run.stdout


def test_unknown_systems_are_refused_by_name() -> None:
    run = script("train.py", "--systems", "eager,magic")
    assert run.returncode == 2
    assert "unknown system magic; known: eager" in run.stderr
    assert "unknown run magic; known: fp32" in script("lora_curve.py", "--runs", "magic").stderr


def test_lora_learns_as_in_fp32(tmp_path: Path) -> None:
    """Eager rounds the base's output before it adds the adapter's, and learns less; sloth rounds their sum once."""
    run = script("lora_curve.py", "--tiny", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "lora-curve-tiny.json").read_text())["results"]
    truth = results["fp32"]["losses"]
    distance = {name: max(abs(a - b) for a, b in zip(r["losses"], truth)) for name, r in results.items()}
    assert distance["eager"] > 0.03 and distance["eager, fp32 adapters"] > 0.03
    assert distance["sloth"] < 0.015 and distance["sloth, fp32 adapters"] < 0.015


def test_kernel_rates_are_printed() -> None:
    command = [sys.executable, "-m", "pytest", str(BENCH / "kernels.py"), "-k", "rms_norm and forward and not inductor",
               "-p", "no:cacheprovider", "-p", "no:xdist"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    for row in ("| limit | copy |", "| rms_norm | eager | forward |", "| rms_norm | sloth | forward |"):
        assert row in run.stdout


def test_the_gpu_script_explains_itself_and_refuses_a_machine_without_one() -> None:
    assert "-s  an archive" in subprocess.run([BENCH / "gpu.sh", "-h"], capture_output=True, text=True).stdout
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([BENCH / "gpu.sh"], capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
