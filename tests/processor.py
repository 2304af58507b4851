"""What only some processors do."""

from __future__ import annotations

import torch
from slothc.kernels.products import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE_BF16 = native(DEVICE, torch.bfloat16)            # where it is not, bf16 linears form no blocks
