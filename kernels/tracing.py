"""Whether somebody is tracing: then an operation must be one node, not what it does."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

_TRACERS = (FakeTensor, FunctionalTensor)


def traced(*values: Any) -> bool:
    """Whether Dynamo reads the caller, or a value is a tracer's. Not ``torch.compiler.is_compiling()``: that holds for all that a backend
    does, the check of its own kernels on real numbers too.
    """
    return torch.compiler.is_dynamo_compiling() or any(isinstance(v, _TRACERS) for v in values)
