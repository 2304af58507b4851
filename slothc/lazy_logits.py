"""Logits that are made when somebody looks at them.

A ``LazyLogits`` stands for chain(hidden W^T + b), with an adapted head chain(hidden W^T + b + s low up^T): it knows its shape, dtype and
device, and makes itself, once, with the operations the graph had, when a value is used. Autograd passes through it, built or not.

- ``requires_grad``, ``grad_fn`` and ``is_leaf`` are those of a result of the graph; ``grad_fn`` is this class's own.
- Metadata never builds it, nor does ``repr`` of more than ``PRINTED`` elements. Casts, scales, tanh, detach, views and
  slices give another ``LazyLogits``; losses, logsumexp, argmax and gathers go chunk by chunk (``lazy_functions``).
  Anything else builds it.
- A parameter that an optimizer changed in the meantime would give other logits than eager kept: then building raises
  ``StaleLogits``.
- Copies, pickles and ``torch.save`` hold a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from slothc.gradients.vocabulary import Chain
from slothc.kernels.binding import DTYPE
from slothc.kernels.vocab_chain import Adapter
from slothc.kernels.vocab_chain import logits as build_logits

PRINTED = 4096


class StaleLogits(RuntimeError):
    """The logits are asked for after something they are made of was changed in place."""


@dataclass(frozen=True)
class Recipe:
    """hidden [..., D], weight [V, D], bias [V] or None; ``normalised``: the dtype of a log_softmax at the end. ``low`` [..., r], ``up``
    [V, r] and ``scale``: of an adapted head.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    chain: Chain
    normalised: torch.dtype | None = None
    low: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.low, self.up

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.inputs if t is not None)

    @property
    def adapter(self) -> Adapter | None:
        return None if self.low is None or self.up is None else (self.low, self.up, self.scale)

    def tokens(self, step: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What changes where ``step`` is done to the leading dimensions."""
        return {"hidden": step(self.hidden), "low": None if self.low is None else step(self.low)}

    def classes(self, at: slice) -> dict[str, Any]:
        """What changes where the vocabulary is sliced."""
        return {name: None if t is None else t[at] for name, t in (("weight", self.weight), ("bias", self.bias), ("up", self.up))}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.normalised or DTYPE[self.chain.result]

    def build(self) -> Tensor:
        """The tensor itself, by the operations that the graph had."""
        with torch.enable_grad():
            z = build_logits(self.hidden, self.weight, self.bias, self.chain, self.adapter)
            return z if self.normalised is None else torch.log_softmax(z, -1, dtype=self.normalised)

    def detached(self) -> Recipe:
        """The same values, apart from autograd."""
        bias, low, up = (None if t is None else t.detach() for t in (self.bias, self.low, self.up))
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias, low=low, up=up)


@dataclass(frozen=True)
class _Origin:
    """The lazy tensor that another came from: ``step`` does the same to real ones; ``view``: they share memory."""

    parent: LazyLogits
    step: Callable[[Tensor], Tensor]
    view: bool


class LazyLogits(Tensor):
    """See the module. Made by ``lazy_logits``; ``materialize()`` builds it."""

    _recipe: Recipe
    _origin: _Origin | None
    _real: Tensor | None
    _versions: tuple[int | None, ...]
    _late: bool
    _real_version: int

    @staticmethod
    def _make(recipe: Recipe, origin: _Origin | None) -> LazyLogits:
        """The wrapper, without a place in the autograd graph."""
        made = Tensor._make_wrapper_subclass(LazyLogits, recipe.shape, dtype=recipe.dtype, device=recipe.hidden.device)
        made._recipe, made._origin, made._real, made._real_version = recipe, origin, None, 0
        made._versions = tuple(map(_version, recipe.tensors))
        made._late = origin is not None and not origin.parent.materialized and origin.parent.stale
        return made

    @staticmethod
    def of(recipe: Recipe, origin: _Origin | None = None) -> LazyLogits:
        """The lazy tensor of ``recipe``. Outside grad mode it has no gradient, as any result there."""
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in recipe.tensors):
            return LazyLogits._make(recipe.detached(), origin)
        return _Node.apply(*recipe.inputs, recipe, origin)

    @property
    def recipe(self) -> Recipe:
        return self._recipe

    @property
    def materialized(self) -> bool:
        """Whether the logits exist."""
        return self._real is not None

    def materialize(self) -> Tensor:
        """The real tensor, with eager's values and gradients; built at the first call. Raises ``StaleLogits``."""
        if self._real is None:
            self._real = self._build()
            self._real_version = _version(self._real) or 0
        return self._real

    def _build(self) -> Tensor:
        origin = self._origin
        if origin is not None and origin.parent._real is not None:
            unchanged = (_version(origin.parent._real) or 0) == origin.parent._real_version
            if origin.view or unchanged:
                with torch.set_grad_enabled(any(t.requires_grad for t in self._recipe.tensors)):
                    return origin.step(origin.parent._real)
        self.check()
        return self._recipe.build()

    @property
    def stale(self) -> bool:
        """Whether what the logits are made of has been written to since."""
        return self._late or tuple(map(_version, self._recipe.tensors)) != self._versions

    def check(self) -> None:
        """Raises ``StaleLogits`` if unbuilt logits can no longer be what they were."""
        if self._real is None and self.stale:
            raise StaleLogits(
                "these logits were not used before the weight or hidden states they are made of were changed in place "
                "(by an optimizer step?). Use them earlier, or keep outputs.logits.materialize()"
            )

    def _materialize_shared(self) -> Tensor:
        """The real tensor as part of the memory of what it is a view of: for writing."""
        if self._real is None and self._origin is not None and self._origin.view:
            self._origin.parent._materialize_shared()
        return self.materialize()

    def derive(self, step: Callable[[Tensor], Tensor], *, view: bool, **changes: Any) -> LazyLogits:
        """Another lazy tensor: this one's recipe with ``changes``; ``step`` does the same to a real tensor."""
        return LazyLogits.of(replace(self._recipe, **changes), _Origin(self, step, view))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # mypy drops keyword names of dunders
        if self._real is not None or (self.numel() <= PRINTED and not self.stale):
            return repr(self.materialize())
        grad = f", grad_fn=<{type(self.grad_fn).__name__}>" if self.grad_fn is not None else ""
        return f"LazyLogits(..., size={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'{grad})"

    @classmethod
    @torch.compiler.disable  # a compiler that meets one runs this code: it cannot trace it
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from . import lazy_functions

        return lazy_functions.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a plain function, without cls
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            lazy = args[0]
            return LazyLogits._make(lazy._recipe.detached(), _Origin(lazy, torch.Tensor.detach, True))

        def real(value: Any) -> Any:
            return value.materialize().detach() if isinstance(value, LazyLogits) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


class _Node(torch.autograd.Function):
    """The place of unbuilt logits in the autograd graph, for what reaches them below Python (a custom Function)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> LazyLogits:
        *_, recipe, origin = inputs
        ctx.recipe = recipe
        return LazyLogits._make(recipe, origin)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        wanted = [t for t, needed in zip(recipe.inputs, ctx.needs_input_grad) if needed and t is not None]
        found = iter(torch.autograd.grad(recipe.build(), wanted, upstream, create_graph=torch.is_grad_enabled()))
        return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None, None)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def lazy_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, chain: str | None = None, adapter: Adapter | None = None
) -> Tensor:
    """chain(hidden W^T + b), [..., V], not built yet. hidden [..., D], weight [V, D], bias [V] or None; ``adapter``: low [..., r],
    up [V, r] and s, for s low up^T beside the linear.

    ``chain``: the text of a ``gradients.vocabulary.Chain`` (default: nothing, in hidden's dtype). For tensors that are
    not plain (fake ones, while another compiler traces) and on the meta device it is the ordinary result.
    """
    from slothc.kernels.vocab import NAMES

    low, up, scale = adapter or (None, None, 1.0)
    made = Chain.parse(chain if chain is not None else NAMES[hidden.dtype])
    recipe = Recipe(hidden, weight, bias, made, low=low, up=up, scale=scale)
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in recipe.tensors)
    if not plain or torch.compiler.is_dynamo_compiling():
        return build_logits(hidden, weight, bias, recipe.chain, adapter)
    return LazyLogits.of(recipe)
