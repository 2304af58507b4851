"""``requires_grad_()`` on a value inside a graph, as transformers' checkpointing calls it on the embedding's result.

Dynamo traces it, and once all is traced drops the whole frame where a result depends on it, because AOTAutograd would forget it; and so
for every function that calls that frame. A graph of sloth's runs as it stands, so that nothing is forgotten: it keeps the call, and the
model is one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

CHECK = "_check_requires_grad_intermediate_outputs"      # torch 2.13's; a torch without it breaks the graph at the call


def keeps_made_leaves(backend: T) -> T:
    """Mark a backend whose graphs run as they stand, so that Dynamo leaves such calls in them. Not where Inductor is asked for behind it;
    for other backends Dynamo does what it did.
    """
    backend.runs_as_it_stands = True                                      # type: ignore[attr-defined]
    _teach()
    return backend


def _teach() -> None:
    from torch._dynamo.output_graph import OutputGraph

    check = getattr(OutputGraph, CHECK, None)
    if check is None or getattr(check, "of_sloth", False):
        return

    @wraps(check)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _marked(getattr(self, "compiler_fn", None)):
            check(self, *args, **kwargs)

    checked.of_sloth = True                                               # type: ignore[attr-defined]
    setattr(OutputGraph, CHECK, checked)


def _marked(compiler: Any) -> bool:
    """Whether the compiler is ``torch.compile``'s around a marked backend, without Inductor behind it."""
    if not getattr(getattr(compiler, "compiler_fn", None), "runs_as_it_stands", False):
        return False
    kwargs = getattr(compiler, "kwargs", None) or {}
    return {"rest": "eager", **(kwargs.get("options") or {}), **kwargs}["rest"] == "eager"
