"""Losses of logits [batch, tokens, vocabulary] with labels [batch, tokens], -100 for a token that does not count."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def shifted_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def shifted_labels(logits: Tensor, labels: Tensor) -> Tensor:
    target = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), target.reshape(-1))


def transposed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def gathered(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-probability of the right token, picked out by ``gather``."""
    chosen, counted = labels.clamp_min(0), labels != -100
    found = F.log_softmax(logits.float(), dim=-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return -(found * counted).sum() / counted.sum()


def normalised(logits: Tensor, labels: Tensor) -> Tensor:
    """logsumexp minus the right token's logit."""
    chosen, counted = labels.clamp(min=0)[..., None], labels.ne(-100)
    wide = logits.float()
    each = torch.logsumexp(wide, dim=-1) - torch.gather(wide, -1, chosen)[..., 0]
    return torch.where(counted, each, torch.zeros_like(each)).sum() / counted.sum()


def negative_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(torch.log_softmax(logits.float(), -1).view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-100)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """A sum, divided by the number of tokens that count in the whole batch."""
    return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), labels.view(-1), reduction="sum") / labels.ne(-100).sum()


def with_z(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared logarithm of the partition function keeps it near one."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    return loss + 1e-3 * torch.logsumexp(logits.float(), dim=-1).square().mean()


def capped(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_labels(15.0 * torch.tanh(logits / 15.0), labels)


def each_token(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.sum() / labels.ne(-100).sum()


LOSSES: tuple[Loss, ...] = (
    shifted_logits, shifted_labels, transposed, gathered, normalised, negative_likelihood, smoothed, summed, with_z, capped, each_token,
)  # fmt: skip
