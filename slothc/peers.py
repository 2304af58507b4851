"""What the systems that patch one model class at a time patch, as read from their packages by ``bench/coverage.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("peers.json")


@dataclass(frozen=True)
class Peer:
    """``models``: model type -> the rules whose operations the package replaces there."""

    name: str
    package: str
    version: str
    models: Mapping[str, tuple[str, ...]]

    def most(self, row: Mapping[str, Any]) -> tuple[float, int] | None:
        """(share of the bytes, operations counted) that it replaces at most in a row of ``slothc coverage``: every operation of the rules
        that it patches there. None for a model that it does not patch."""
        kinds = self.models.get(row["name"])
        if kinds is None:
            return None
        shares, counts = row.get("shares", {}), row.get("counts", {})
        return sum(shares.get(k, 0.0) for k in kinds), sum(counts.get(k, 0) for k in kinds)


@cache
def peers() -> tuple[Peer, ...]:
    """Every peer in the stored file."""
    read = json.loads(FILE.read_text())
    return tuple(Peer(n, p["package"], p["version"], {m: tuple(k) for m, k in p["models"].items()}) for n, p in read.items())
