"""A causal language model out of parts, and what a reader of its parts would count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attentions import Attention, BySoftmax
from .losses import Loss, shifted_labels
from .mlps import ByHand, Mlp
from .norms import ByVectorNorm, Norm
from .rotations import Rotation, rolled

VOCABULARY, INNER = 64, 40
Residual = Callable[["Block", Tensor], Tensor]


def plain(block: Block, x: Tensor) -> Tensor:
    x = x + block.attention(block.first(x))
    return x + block.mlp(block.second(x))


@dataclass(frozen=True)
class Spelling:
    """The parts of a model. ``rotation`` None: positions are learned. ``residual``: how a block's parts are put together, ``norms`` how
    often that calls a norm. ``adapter``: what stands for the MLP's last linear."""

    norm: type[Norm] = ByVectorNorm
    rotation: Rotation | None = rolled
    mlp: type[Mlp] = ByHand
    attention: type[Attention] = BySoftmax
    loss: Loss = shifted_labels
    residual: Residual = plain
    norms: int = 2
    layers: int = 1
    width: int = 32
    adapter: Callable[[int, int], nn.Module] | None = None

    def counts(self, dtype: torch.dtype = torch.float32) -> Counter[str]:
        """What a reader would count: the blocks' norms and the last one, two rotated tensors and one MLP a block, the loss. ``dtype``:
        attention that is written out is counted in fp32 alone, in 16 bits it is left as it is.
        """
        total = Counter({"cross_entropy": 1})
        for _ in range(self.layers * self.norms + 1):
            total += self.norm.counts
        for _ in range(self.layers):
            total += self.mlp.counts + (self.attention.counts if dtype == torch.float32 else Counter())
            total += Counter({"rope": 2 if self.rotation else 0, "lora_linear": 1 if self.adapter else 0})
        return total


class Block(nn.Module):
    """Attention and an MLP with a norm each, and two more for residuals that want them."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.residual = spelling.residual
        self.first, self.second, self.third, self.fourth = (spelling.norm(spelling.width) for _ in range(4))
        self.attention = spelling.attention(spelling.width, spelling.rotation)
        self.mlp = spelling.mlp(spelling.width, INNER)
        if spelling.adapter:
            self.mlp.down = spelling.adapter(INNER, spelling.width)
        self.scales = nn.Parameter(1 + 0.1 * torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self, x)


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class OddModel(nn.Module):
    """``model(input_ids, labels)``, both [batch, tokens]. ``broken``: the loss is in a later graph than the head."""

    def __init__(self, spelling: Spelling, broken: bool = False) -> None:
        super().__init__()
        self.spelling, self.broken = spelling, broken
        self.embedding = nn.Embedding(VOCABULARY, spelling.width)
        self.blocks = nn.ModuleList(Block(spelling) for _ in range(spelling.layers))
        self.last = spelling.norm(spelling.width)
        self.head = nn.Linear(spelling.width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.last(x))
        if self.broken:
            torch._dynamo.graph_break()
        return Output(self.spelling.loss(logits, labels), logits)


def batch(seed: int = 0, size: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    """Keyword arguments of one step; a quarter of the labels do not count."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (size, tokens), generator=made)
    labels = torch.where(torch.rand(size, tokens, generator=made) < 0.25, -100, ids)
    return {"input_ids": ids, "labels": labels}
