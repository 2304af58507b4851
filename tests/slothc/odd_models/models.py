"""Twenty models. Each name says what is odd about it; what ``Spelling`` is not told is as in ``Spelling()``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import attentions, losses, mlps, norms, residuals, rotations
from .assembled import OddModel, Spelling


class WithLora(nn.Module):
    """A linear with an adapter, by hand: bare parameters, and the scale between them."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.base = nn.Linear(n, m, bias=False).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(4, n) * n**-0.5), nn.Parameter(torch.randn(m, 4) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.down.mT * 2.0) @ self.up.T + self.base(x)


SPELLINGS: dict[str, Spelling] = {
    "lengths, complex numbers, glu": Spelling(norms.ByVectorNorm, rotations.complex_product, mlps.Glu),
    "normalize, a matrix for each pair, silu by hand": Spelling(norms.ByNormalize, rotations.by_matrix, mlps.ByHand,
                                                                attentions.ByExponentials, losses.gathered),
    "einsum everywhere": Spelling(norms.ByEinsum, rotations.by_matrix, mlps.Unflattened, attentions.WithoutRepeats, losses.normalised),
    "variance plus mean squared, stacked lanes": Spelling(norms.ByVariance, rotations.stacked, mlps.SquaredRelu, attentions.ByBaddbmm),
    "addcmul": Spelling(norms.ByAddcmul, rotations.one_cache, mlps.GeluByHand, loss=losses.negative_likelihood),
    "two passes, unbind": Spelling(norms.InTwoPasses, rotations.unbound, mlps.Softplus, loss=losses.smoothed),
    "scale in log space, roll": Spelling(norms.OfLogScale, rotations.rolled, mlps.Twice, loss=losses.summed),
    "one plus weight, opposite sense": Spelling(norms.OneMore, rotations.other_sense, mlps.Conditional, loss=losses.transposed),
    "no weight, partial": Spelling(norms.Weightless, rotations.partial, mlps.Glu, attentions.ByExponentials, losses.shifted_logits),
    "norm across a moved dimension": Spelling(norms.Across, rotations.for_each_head, mlps.ByHand, attentions.WithoutRepeats),
    "norms of groups": Spelling(norms.Grouped, rotations.stacked, mlps.Unflattened, loss=losses.with_z),
    "gated norms": Spelling(norms.Gated, rotations.other_sense, mlps.SquaredRelu, attentions.ByBaddbmm, losses.capped),
    "mean of magnitudes": Spelling(norms.OfMagnitudes, rotations.complex_product, mlps.Plain, loss=losses.each_token),
    "largest magnitude": Spelling(norms.OfLargest, rotations.rolled, mlps.Softplus, attentions.ByExponentials),
    "no rotation": Spelling(norms.ByVariance, None, mlps.Conditional, attentions.ByBaddbmm, losses.smoothed),
    "scaled residuals": Spelling(norms.ByNormalize, residual=residuals.scaled, layers=2),
    "parallel parts": Spelling(norms.InTwoPasses, rotations.one_cache, mlps.GeluByHand, residual=residuals.parallel),
    "sandwiched": Spelling(norms.ByEinsum, rotations.unbound, residual=residuals.sandwiched, norms=4, layers=2),
    "several streams": Spelling(norms.OneMore, rotations.partial, residual=residuals.several_streams, loss=losses.capped),
    "learned mixing, adapter by hand": Spelling(norms.OfLogScale, rotations.stacked, residual=residuals.in_turn, adapter=WithLora),
}  # fmt: skip


def odd(name: str, dtype: torch.dtype = torch.float32, broken: bool = False) -> OddModel:
    """A seeded model of that name."""
    torch.manual_seed(1)
    return OddModel(SPELLINGS[name], broken).to(dtype).train()
