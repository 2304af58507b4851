"""Where in the user's source a node comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)(?:\n {4}(?P<text>.*))?')
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")      # Dynamo's name for the rest of a function behind a graph break
_ROOTS = ("site-packages/", "dist-packages/", "/src/")


def location(node: fx.Node) -> str:
    """``transformers/models/llama/modeling_llama.py:114 in forward``, or the node's name where there is no stack.

    The last frame that is not torch's own says it best.
    """
    return place(node)[0]


def place(node: fx.Node) -> tuple[str, str]:
    """``location``, and the text of that line of source; no text where there is none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return node.name, ""
    at, text = innermost((file, line, function, text.strip()) for file, line, function, text in frames)
    return at, text


def innermost(frames: Iterable[tuple[str, int | str, str, str]]) -> tuple[str, str]:
    """Of (file, line, function, text) from the outermost call on: where the last that is not torch's own is, and its text."""
    places = [(short_path(file), line, function, text) for file, line, function, text in frames]
    theirs = [p for p in places if not p[0].startswith("torch/")]
    path, line, function, text = (theirs or places)[-1]
    return f"{path}:{line} in " + _RESUMED.sub(r"\1", function), text


def short_path(path: str) -> str:
    """The path inside its package, or the last two parts of it."""
    for root in _ROOTS:
        if root in path:
            return path.rsplit(root, 1)[1]
    return "/".join(path.split("/")[-2:])
