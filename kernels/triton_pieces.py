"""A row in several blocks side by side: the lines of a tile kernel, written once for every block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce

# what two blocks' reductions are combined by
COMBINED = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"}


def power_of_two(n: int) -> int:
    """The least that is not below n: what a block's size must be."""
    return 1 << max(0, (n - 1).bit_length())


def block_names(pieces: int) -> tuple[str, ...]:
    """The kernel's constants for the lanes of its blocks."""
    return ("BLOCK_L", *(f"BLOCK_L{k}" for k in range(1, pieces)))


def in_pieces(lines: Iterable[str], lanewise: set[str], reduced: Mapping[str, str], pieces: int) -> Iterator[str]:
    """The lines of a tile kernel with each that is about lanes once for every block; reductions of the blocks are combined."""
    about = re.compile(rf"\b({'|'.join(sorted(lanewise, key=len, reverse=True))}|BLOCK_L)\b")

    def of(line: str, k: int) -> str:
        return about.sub(lambda m: (m[0] if k == 0 else f"{m[0]}{k}") if m[0] == "BLOCK_L" else f"{m[0]}_{k}", line)

    starts = ["tl.program_id(1) * BLOCK_L", *(" + ".join(block_names(k)) for k in range(1, pieces))]
    for line in lines:
        body = line.lstrip()
        name = body.split(" = ")[0]
        if not about.search(line):
            yield line
        elif name in reduced:
            pad, text = line[: len(line) - len(body)], body.removeprefix(f"{name} = ")
            yield f"{pad}{name} = {reduce(lambda a, b: reduced[name].format(a, b), (of(text, k) for k in range(pieces)))}"
        elif name == "lane" and "tl.arange" in body:
            yield from (of(line.replace(starts[0], "@"), k).replace("@", starts[k]) for k in range(pieces))
        else:
            yield from (of(line, k) for k in range(pieces))
