"""Generated kernels compile for GPUs that this machine does not have, down to their machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for.py")
# every plan for one device of each maker; between them, the older two of NVIDIA's see each once more
TARGETS = [("cuda", "75", "32", "0/2"), ("cuda", "80", "32", "1/2"), ("cuda", "90", "32", "0/1"), ("hip", "gfx942", "64", "0/1")]
LEAST = {
    "0/1": {"rows": 50, "scores": 7, "thin": 8, "packed": 2, "segments": 5, "heads": 12, "sums": 2, "rescaled": 1, "four bits": 2},
    "0/2": {"rows": 25, "scores": 5, "heads": 6}, "1/2": {"rows": 25, "scores": 5, "heads": 6},
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[1])
def test_every_kernel_compiles(target: tuple[str, str, str, str], tmp_path: Path) -> None:
    """In a process of its own: the interpreter of the other tests would take the compiler's place."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT), *target], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    for of, least in LEAST[target[3]].items():
        assert len([k for k in kernels if k["of"] == of]) >= least
    assert not [k for k in kernels if not k["ok"]]
    assert not [k for k in kernels if k["shared"] > k["limit"]]
