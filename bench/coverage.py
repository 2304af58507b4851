#!/usr/bin/env python3
"""The README's coverage table: how many causal LMs each system serves, and how much of them.

    python bench/coverage.py                              # measures every causal LM of transformers: half an hour on two cores
    python bench/coverage.py --json coverage.json         # what `slothc coverage --all --json coverage.json` measured
    python bench/coverage.py --json coverage.json --readme          # and puts the table into the README
    python bench/coverage.py --peers DIR                  # reads what the peers patch from their wheels in DIR again

sloth's figures are measured. A peer's are the most that it can reach: a model type that its package patches counts as served, and every
operation of the kinds that it patches there as replaced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # slothc, when it isn't installed

import peers as packages
import tables

from slothc.peers import FILE, Peer, peers

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- coverage table: written by bench/coverage.py --readme -->", "<!-- end of the coverage table -->"
KINDS = {"norms": ("rms_norm", "layer_norm"), "rotations": ("rope",), "gated activations": ("gated_mlp",), "losses": ("cross_entropy",)}
HEAD = ("system", "served", "median coverage", "of those served", *KINDS)
Row = Mapping[str, Any]


def table(whole: Mapping[str, Any], known: Sequence[Peer]) -> str:
    """The table for what ``slothc coverage --json`` wrote."""
    rows = whole["models"]
    mine = {r["name"]: r["coverage"] for r in rows if r["status"] == "ok"}
    versions = whole["versions"]
    lines = [_line(f"sloth {versions['slothc']}", rows, mine, lambda r, k: r["counts"].get(k, 0) if r["name"] in mine else 0)]
    for peer in known:
        theirs = {r["name"]: found[0] for r in rows if (found := peer.most(r)) is not None}
        lines.append(_line(f"{peer.package} {peer.version}", rows, theirs, _patched(peer)))
    under = f"{len(rows)} architectures of transformers {versions['transformers']}, {whole['settings']['dtype']}, torch {versions['torch']}"
    return tables.markdown(HEAD, lines) + f"\n\n{under}."


def _patched(peer: Peer) -> Callable[[Row, str], int]:
    return lambda r, kind: r.get("counts", {}).get(kind, 0) if kind in peer.models.get(r["name"], ()) else 0


def _line(system: str, rows: Sequence[Row], served: Mapping[str, float], count: Callable[[Row, str], int]) -> list[str]:
    """``served``: name -> coverage. The first median is over every architecture, one that is not served counting 0."""
    every = median([served.get(r["name"], 0.0) for r in rows]) if rows else 0.0
    own = f"{median(served.values()):.1%}" if served else "–"
    totals = [str(sum(count(r, k) for r in rows for k in kinds)) for kinds in KINDS.values()]
    return [system, str(len(served)), f"{every:.1%}", own, *totals]


def into(text: str, made: str) -> str:
    """``text`` with what stands between its two marks replaced. Raises ValueError where the marks are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"the marks {BEGIN} and {END} are not there")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{made}\n" + text[text.index(END) :]


def store(found: Mapping[str, Any]) -> str:
    """peers.json, one model type a line."""
    made = [
        f' {json.dumps(name)}: {{"package": {json.dumps(p["package"])}, "version": {json.dumps(p["version"])}, "models": {{\n'
        + ",\n".join(f"  {json.dumps(m)}: {json.dumps(kinds)}" for m, kinds in sorted(p["models"].items())) + "\n }}"
        for name, p in found.items()
    ]  # fmt: skip
    return "{\n" + ",\n".join(made) + "\n}\n"


def measure(path: Path, jobs: int) -> None:
    """Run ``slothc coverage --all``. Models that fail are rows of the table, and no error here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "slothc", "coverage", "--all", "--jobs", str(jobs), "--resume", "--json", str(path)]
    if subprocess.run(command, cwd=ROOT).returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} did not finish")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="what slothc coverage --all --json wrote; without it, that is run")
    parser.add_argument("--jobs", type=int, default=2, help="side processes")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder with the wheels of liger-kernel and unsloth")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    given = parser.parse_args(arguments)
    if given.peers:
        FILE.write_text(store(packages.read(given.peers)))
        peers.cache_clear()
        print(f"{FILE.name}: " + ", ".join(f"{p.package} {p.version} patches {len(p.models)} model types" for p in peers()))
        if given.json is None:
            return
    path = given.json or tables.OUT / "coverage.json"
    if given.json is None:
        measure(path, given.jobs)
    made = table(json.loads(path.read_text()), peers())
    print(made)
    if given.readme:
        readme = ROOT / "README.md"
        readme.write_text(into(readme.read_text(), made))


if __name__ == "__main__":
    main()
