"""Where in the user's source a node comes from."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_ROOTS = ("site-packages/", "dist-packages/", "/src/")


def location(node: fx.Node) -> str:
    """``transformers/models/llama/modeling_llama.py:114 in forward``, or the node's name where there is no stack.

    The last frame that is not torch's own says it best.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return node.name
    places = [(short_path(file), line, function) for file, line, function in frames]
    theirs = [place for place in places if not place[0].startswith("torch/")]
    path, line, function = (theirs or places)[-1]
    return f"{path}:{line} in {function}"


def short_path(path: str) -> str:
    """The path inside its package, or the last two parts of it."""
    for root in _ROOTS:
        if root in path:
            return path.rsplit(root, 1)[1]
    return "/".join(path.split("/")[-2:])
