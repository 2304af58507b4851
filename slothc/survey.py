"""``slothc coverage``: many models, each measured in a side process that may die without taking the others along."""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .version import __version__

Row = dict[str, Any]
CHILD = (sys.executable, "-m", "slothc.survey_child")
MODELS = 16          # that one process measures before a fresh one takes over: compiled code is never freed
GRACE = 5.0          # seconds for a killed process to be gone
FAILURES = ("crash", "off")
_DIED = {"sloth": "crash", "explain": "crash", "truth": "no truth", "eager": "eager fails", "do-nothing backend": "no capture"}


class Died(Exception):
    """The side process ended. ``args[0]`` says how."""


class Worker:
    """One side process, started when the first job comes."""

    def __init__(self, command: Sequence[str] = CHILD) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.noise: Any = None
        self.done = 0

    def measure(self, job: dict[str, Any], timeout: float) -> Row:
        """The row of one job. A process that dies or takes longer than ``timeout`` seconds is a row that says so."""
        started, stage = time.perf_counter(), "start"
        row: Row = {"name": job["name"]}
        try:
            for line in self._answers(job, started + timeout):
                if "row" in line:
                    row = line["row"]
                    break
                stage = line["stage"]
        except queue.Empty:
            row |= {"status": "timeout", "stage": stage, "reason": f"not done after {timeout:.0f} s, in the stage {stage!r}"}
            self.stop()
        except Died as error:
            row |= {"status": _DIED.get(stage, "not built"), "stage": stage, "reason": f"in the stage {stage!r} {error}"}
            self.stop()
        self.done += 1
        if self.done >= MODELS:
            self.stop()
        return row | {"seconds": round(time.perf_counter() - started, 2)}

    def _answers(self, job: dict[str, Any], deadline: float) -> Any:
        process = self.process or self._start()
        try:
            print(json.dumps(job), file=process.stdin, flush=True)
        except OSError:
            raise Died(self._epitaph(process)) from None
        while True:
            text = self.lines.get(timeout=max(deadline - time.perf_counter(), 0.01))
            if text is None:
                raise Died(self._epitaph(process))
            yield json.loads(text)

    def _start(self) -> subprocess.Popen[str]:
        folder = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (folder, os.environ.get("PYTHONPATH")) if p)
        self.noise, self.lines, self.done = tempfile.TemporaryFile("w+", errors="replace"), queue.Queue(), 0
        process = self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise, text=True,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
            start_new_session=True,                                         # Ctrl-C is for the survey, not for a model being measured
        )
        threading.Thread(target=_read, args=(process, self.lines), daemon=True).start()
        return process

    def _epitaph(self, process: subprocess.Popen[str]) -> str:
        """How the process ended, and the last thing it said."""
        code = process.wait()
        self.noise.seek(0)
        said = [line.strip() for line in self.noise.read()[-4000:].splitlines() if line.strip()]
        how = f"the process was ended by signal {-code}" if code < 0 else f"the process ended with exit code {code}"
        return how + (f": {said[-1][:200]}" if said else "")

    def interrupt(self) -> None:
        """End the process from another thread; the one that waits for it finds it dead."""
        process = self.process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """End the process; the next job starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdin:
                try:
                    self.process.stdin.close()
                except OSError:
                    pass
            self.noise.close()
        self.process, self.done = None, 0


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def survey(
    names: Sequence[str], peft: str | None = None, dtype: str = "fp32", jobs: int = 2, timeout: float = 300.0,
    progress: Callable[[Row], None] = lambda _: None, command: Sequence[str] = CHILD, device: str = "cpu",
) -> list[Row]:
    """One row for each name, in the order of ``names``; ``jobs`` side processes at a time. ``progress`` is called with each row as it
    comes, from the thread that waited for it: after a KeyboardInterrupt, those are the rows there are."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    rows: dict[str, Row] = {}
    workers = [Worker(command) for _ in range(min(jobs, len(names)))]
    over = threading.Event()

    def serve(worker: Worker) -> None:
        while not over.is_set():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            row = worker.measure({"name": name, "peft": peft, "dtype": dtype, "device": device}, timeout)
            if over.is_set():
                break
            rows[name] = row
            progress(row)
        worker.stop()

    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in workers]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        over.set()
        for worker in workers:
            worker.interrupt()
        for thread in threads:
            thread.join(GRACE)
    return [rows[name] for name in names]


def failed(rows: Sequence[Row]) -> list[Row]:
    """Those that run in eager and, under sloth, crash, are not done in time or break the contract."""
    return [r for r in rows if r["status"] in FAILURES or (r["status"] == "timeout" and r["stage"] in ("sloth", "explain"))]


def median_coverage(rows: Sequence[Row]) -> float | None:
    """Over the models that ran under sloth."""
    shares = [r["coverage"] for r in rows if r.get("coverage") is not None]
    return statistics.median(shares) if shares else None


def document(rows: Sequence[Row], settings: dict[str, Any], asked: int | None = None) -> dict[str, Any]:
    """Everything that was measured, as ``--json`` writes it. ``asked``: how many models were to be measured; where there are fewer rows,
    ``unfinished`` is that number."""
    totals = {status: sum(r["status"] == status for r in rows) for status in sorted({r["status"] for r in rows})}
    made = {"versions": versions(), "settings": settings, "totals": totals, "median_coverage": median_coverage(rows), "models": list(rows)}
    return made if asked is None or asked == len(rows) else {**made, "unfinished": asked}


def versions() -> dict[str, str]:
    """What decides a row besides its settings."""
    return {"slothc": __version__, **{p: version(p) for p in ("torch", "transformers")}}


def measured(path: Path, settings: dict[str, Any]) -> list[Row]:
    """The rows of a file that ``--json`` wrote with the same settings and versions; none where there is no such file."""
    if not path.is_file():
        return []
    whole = json.loads(path.read_text())
    same = whole["settings"] == settings and whole["versions"] == versions()
    return list(whole["models"]) if same else []
