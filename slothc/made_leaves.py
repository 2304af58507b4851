"""``requires_grad_()`` on a value inside a graph, as transformers' checkpointing calls it on the embedding's result.

Dynamo traces it, and once all is traced drops the whole frame where a result depends on it, because AOTAutograd would forget it; and so
for every function that calls that frame. A graph of sloth's runs as it stands, so that nothing is forgotten: it keeps the call, and the
model is one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

CHECK = "_check_requires_grad_intermediate_outputs"      # torch 2.13's; a torch without it breaks the graph at the call


def teach(marked: Callable[[Any], bool]) -> None:
    """Have Dynamo leave such calls in the graphs of compilers that are ``marked``, once."""
    from torch._dynamo.output_graph import OutputGraph

    check = getattr(OutputGraph, CHECK, None)
    if check is None or getattr(check, "of_sloth", False):
        return

    @wraps(check)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if not marked(getattr(self, "compiler_fn", None)):
            check(self, *args, **kwargs)

    checked.of_sloth = True                                               # type: ignore[attr-defined]
    setattr(OutputGraph, CHECK, checked)
