"""Counts of what was done in this process, so that doing it twice can be seen."""

from __future__ import annotations

from collections import Counter

counts: Counter[str] = Counter()      # "graphs", "lifted", "derived", "checked", "recorded", "replayed", "unreplayed"
