"""Run each system in a process of its own, so that none patches, caches or fragments what another one measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
SHOWN = {"ms": "ms a step", "peak_gib": "GiB"}


def child(script: str, arguments: Sequence[str], timeout: float) -> Result:
    """The JSON object that ``script --child-result FILE`` left, or ``{"error": why}`` if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log.txt")
        command = [sys.executable, script, *arguments, "--child-result", str(result)]
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {"error": f"not finished after {timeout:.0f} s", "log": _tail(log)}
        if result.exists():
            return json.loads(result.read_text())
        return {"error": _reason(code, log), "log": _tail(log)}


def leave(path: str, measure: Callable[[], Result]) -> None:
    """In the child: measure and leave the result for the parent. Out of memory is a result, too."""
    import torch

    try:
        result = measure()
    except torch.OutOfMemoryError:
        result = {"error": "out of memory"}
    Path(path).write_text(json.dumps(result))


def each(systems: Sequence[str], run: Callable[[str], Result]) -> dict[str, Result]:
    """One result per system, saying on stderr what is under way, what was measured and, with the log's end, what failed."""
    results: dict[str, Result] = {}
    for system in systems:
        began = time.time()
        print(f"{system} ...", end=" ", file=sys.stderr, flush=True)
        results[system] = run(system)
        error = results[system].get("error")
        found = "".join(f", {results[system][key]:.1f} {unit}" for key, unit in SHOWN.items() if key in results[system])
        print(f"{error or 'done'} ({time.time() - began:.0f} s{found})", file=sys.stderr, flush=True)
        if error and results[system].get("log"):
            print(results[system]["log"], file=sys.stderr, flush=True)
    return results


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by signal {-code}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines[-1].strip() if lines else f"exit code {code}")[:160]
