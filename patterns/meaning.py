"""The canonical meaning of a graph node, whatever its torch spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

Arg = fx.Node | int | float | bool | None


@dataclass(frozen=True)
class Op:
    """What a node computes.

    ``kind`` is one of

    - ``pointwise`` (``params["fn"]``: add, mul, silu, ...; ``args``: nodes and numbers, broadcast against each other), ``cast``,
      ``identity`` (contiguous, dropout with p=0, * 1.0: ``args[0]`` is the value),
    - ``reduce`` (``fn``: sum, mean, max, var, norm ...; ``dims``, ``keepdim``), ``norm`` (F.rms_norm, F.layer_norm: args x, weight, bias;
      ``fn``, ``eps``), ``softmax`` (``dim``; ``fn``: softmax or log_softmax),
    - views: ``reshape``, ``permute`` (``dims``), ``expand``, ``index`` (``items``: int, slice, None or Ellipsis-free per dim),
      ``cat`` (``dim``), ``stack`` (``dim``), ``split`` (``dim``, ``sizes``), ``item`` (``number`` of a tuple), ``repeat_interleave``,
    - ``linear`` (args x, weight, bias; ``params["layout"]`` is "nk" for weight [out, in], "kn" for [in, out]), ``matmul``, ``sdpa``,
      ``cross_entropy``, ``dropout`` (p > 0), ``embedding``, ``whole`` (a frozen weight from what it is held in; ``form``: how),
    - ``input`` (placeholders, attributes) and ``opaque`` for everything else.
    """

    kind: str
    args: tuple[Any, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)


class View(Protocol):
    """What a rule may ask about a graph; the driver provides it."""

    def op(self, node: fx.Node) -> Op:
        """The node's canonical meaning."""
        ...

    def value(self, node: fx.Node) -> torch.Tensor:
        """The node's example value: a tensor whose shape, dtype, device and requires_grad describe it."""
        ...

    def source(self, node: Any) -> Any:
        """The first value behind identities and casts that keep the dtype."""
        ...

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read this one's value (not dead code)."""
        ...

    def location(self, node: fx.Node) -> str:
        """file:line of the user's source that made the node, or the node's name."""
        ...
