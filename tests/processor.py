"""Tests of what only some processors do."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels.products import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = pytest.mark.skipif(not native(DEVICE, torch.bfloat16), reason="this processor has no products of bf16")
BF16 = pytest.param(torch.bfloat16, marks=NATIVE, id="torch.bfloat16")
