"""bitsandbytes' product with a weight in four bits, as one call of the graph.

Dynamo traces an autograd function anew wherever it is called, forward and backward: for a model in four bits that is half of the time that
compiling it takes, and the call says as much. It runs the library's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

LIBRARY, NAME, PARAMETERS = "bitsandbytes.autograd._functions", "MatMul4Bit", ("ctx", "A", "B", "out", "bias", "quant_state")
OUT = PARAMETERS.index("out") - 1


@torch._dynamo.allow_in_graph
def gemm_4bit(
    x: Tensor, q: Tensor, bias: Tensor | None, shape: Sequence[int], blocksize: int, kind: str, dtype: torch.dtype, scales: Tensor,
    nested: tuple[Tensor, Tensor, int, torch.dtype] | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = x W' + b, [..., N], by the library's autograd function: x [..., K], W [N, K] = ``shape`` of ``dtype`` is held in q and its
    ``scales``, one for each ``blocksize`` values; those may be ``nested``, held in eight bits with (scales, code, blocksize, dtype) of
    their own and an ``offset``.
    """
    from bitsandbytes.autograd._functions import MatMul4Bit
    from bitsandbytes.functional import QuantState

    of_scales = None
    if nested is not None:
        absmax, code, size, own = nested
        of_scales = QuantState(absmax, code=code, blocksize=size, dtype=own)
    state = QuantState(
        scales, torch.Size(shape), blocksize=blocksize, quant_type=kind, dtype=dtype, offset=offset, state2=of_scales
    )  # fmt: skip
    y: Tensor = MatMul4Bit.apply(x, q, None, bias, state)
    return y


def _one_call(x: Tensor, q: Tensor, out: None, bias: Tensor | None, state: Any) -> Tensor:
    """What Dynamo traces in the place of the function."""
    given = (x, q, bias, tuple(state.shape), state.blocksize, state.quant_type, state.dtype, state.absmax)
    if state.state2 is None:
        return gemm_4bit(*given)
    s = state.state2
    return gemm_4bit(*given, (s.absmax, s.code, s.blocksize, s.dtype), state.offset)


def teach(marked: Callable[[Any], bool]) -> None:
    """Have Dynamo leave the call in the graphs of compilers that are ``marked``, once."""
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.misc import AutogradFunctionVariable

    apply = getattr(AutogradFunctionVariable, "call_apply", None)
    if apply is None or getattr(apply, "of_sloth", False):
        return

    @wraps(apply)
    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or not _is_product(self.fn_cls, args) or not marked(getattr(tx.output, "compiler_fn", None)):
            return apply(self, tx, args, kwargs)
        return VariableTracker.build(tx, _one_call).call_function(tx, args, {})

    call_apply.of_sloth = True                                            # type: ignore[attr-defined]
    setattr(AutogradFunctionVariable, "call_apply", call_apply)           # noqa: B010


def _is_product(function: Any, args: Sequence[Any]) -> bool:
    """The library's function as it is known here, into a result of its own."""
    if (function.__module__, function.__name__) != (LIBRARY, NAME) or len(args) != len(PARAMETERS) - 1:
        return False
    code = function.forward.__code__
    out = args[OUT]
    return code.co_varnames[: code.co_argcount] == PARAMETERS and out.is_python_constant() and out.as_python_constant() is None
