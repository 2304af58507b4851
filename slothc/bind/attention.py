"""Attention calls with masks by name and grouped heads, in place of materialised masks and repeated heads."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from slothc.kernels.attention import Kind, additive, attention, blind, classify, written_out
from slothc.kernels.scores_written import scored
from slothc.patterns.mask import Cone, Facts, as_function, find
from slothc.patterns.rule import Match

from .masks import GIVEN, Announced, DataMask, SizeMask, Verdict, observable
from .proof import attended
from .replacement import Replacement

LARGEST_TRIAL = 1 << 27  # mask elements: larger ones that depend on data are not tried out at compile time

Judge = Callable[..., Verdict]
_judges: weakref.WeakKeyDictionary[fx.Node, dict[bool, Judge | None]] = weakref.WeakKeyDictionary()
_trials: weakref.WeakKeyDictionary[fx.Node, dict[bool, Trial]] = weakref.WeakKeyDictionary()


class Attention:
    """``(q, k, v, *leaves) -> out``: the call that stands for one ``scaled_dot_product_attention`` node.

    ``judge`` says what the mask is, given its sizes and data; without one, the leaves are the mask as the graph
    computes it (or none), or the steps of a mask that is written out.
    """

    def __init__(self, judge: Judge | None, sizes: int, attrs: dict[str, Any]) -> None:
        self.__name__ = self.__qualname__ = "sloth_attention"
        self.judge, self.sizes = judge, sizes
        self.dropout_p, self.scale = attrs["dropout_p"], attrs["scale"]
        self.enable_gqa = attrs["enable_gqa"] or attrs["repeats"] > 1
        self.k_swapped, self.v_swapped, self.k_turned = attrs["k_swapped"], attrs["v_swapped"], attrs["k_turned"]
        self.steps = attrs["steps"]
        self.given = Kind("causal" if attrs["is_causal"] else "none")

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *leaves: Any) -> torch.Tensor:
        k = self._keys(k)
        v = v.transpose(1, 2) if self.v_swapped else v
        verdict = self._verdict(leaves, q.shape[-2], k.shape[-2])
        mask, kind = verdict.mask, verdict.kind
        if self.steps and not kind.plain:
            parts = leaves if self.judge is None else (mask,)
            mask = additive(self.steps, parts, q.dtype)
            if not observable(q, mask) or bool(blind(mask)):
                return written_out(q, k, v, self.steps, parts, self.scale)
        return attention(q, k, v, mask, kind, self.dropout_p, self.scale, self.enable_gqa)

    def _keys(self, k: torch.Tensor) -> torch.Tensor:
        return k.transpose(1, 2) if self.k_swapped else k.transpose(2, 3) if self.k_turned else k

    def _verdict(self, leaves: tuple[Any, ...], q_len: int, kv_len: int) -> Verdict:
        if self.judge is not None:
            return self.judge(self, leaves[: self.sizes], leaves[self.sizes :], q_len, kv_len)
        mask = leaves[0] if leaves else None
        return Verdict(self.given if mask is None else Kind("other"), mask)


class Scored(Attention):
    """``(q, k, v, sinks, *leaves) -> out``: written-out attention that no library's kernel does, by ``kernels.scores``."""

    def __init__(self, judge: Judge | None, sizes: int, attrs: dict[str, Any]) -> None:
        super().__init__(judge, sizes, attrs)
        self.__name__ = self.__qualname__ = "sloth_scores"
        self.chain, self.dtype, self.swapped = attrs["chain"], attrs["dtype"], attrs["out_swapped"]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any, *leaves: Any) -> torch.Tensor:  # type: ignore[override]
        k, v = self._keys(k), v.transpose(1, 2) if self.v_swapped else v
        q, k, v = (t.to(self.dtype) for t in (q, k, v))                       # what autocast does before each product
        sinks = None if sinks is None else sinks.reshape(-1)
        verdict = self._verdict(leaves, q.shape[-2], k.shape[-2])
        name = verdict.kind.name
        if name != "other":
            window = verdict.kind.window or 0
            return attended(q, k, v, None, sinks, chain=self.chain, kind=name, window=window, swapped=self.swapped)
        run = partial(attended, q, k, v, sinks=sinks, chain=self.chain, kind="none", swapped=self.swapped)
        parts = leaves if self.judge is None else (verdict.mask,)
        if len(self.steps) == 1:
            (kind, value), (part,) = self.steps[0], parts
            return run(mask=~part if kind == "drop" else part, fill=value)
        wide = torch.promote_types(self.dtype, torch.float32)
        mask = additive(self.steps, parts, wide)
        if not observable(q, mask) or bool(blind(mask)):
            return scored(q, k, v, self.steps, parts, self.chain, sinks)
        return run(mask=mask)


def bind(match: Match) -> list[Replacement]:
    """The call that replaces the match's node; none where there is nothing to gain.

    Matches with the same mask share its evaluation. The mask's nodes are left to die with their last reader.
    """
    judge = _judge(match)
    inputs, attrs = match.inputs, dict(match.attrs)
    if judge is None and attrs["repeats"] == 1 and attrs["steps"] is None:
        return []
    leaves = (*inputs["sizes"], *inputs["data"]) if judge is not None else inputs["masks"]
    if judge is not None and attrs["steps"]:                              # what a judge gives is true where a key is seen
        attrs["steps"] = tuple(("keep" if kind == "drop" else kind, value) for kind, value in attrs["steps"])
    if not attrs["library"]:
        scored = Scored(judge, len(inputs["sizes"]), attrs)
        return [Replacement(match.node, scored, (inputs["q"], inputs["k"], inputs["v"], inputs["sinks"], *leaves), {})]
    call = Attention(judge, len(inputs["sizes"]), attrs)
    return [Replacement(match.node, call, (inputs["q"], inputs["k"], inputs["v"], *leaves), {})]


def announce(view: Facts, mask: fx.Node) -> list[Replacement]:
    """For a mask that child graphs read (layers under gradient checkpointing): they then need not look at its elements.

    ``mask`` is the node of the outer graph whose value is passed. Only masks of sizes alone can be announced; for
    others, and where this is not called, the first layer of each forward (and of each recomputation) looks.
    """
    cone = find(view, mask)
    if not isinstance(cone, Cone) or cone.data or mask.op == "placeholder":
        return []
    return [Replacement(mask, Announced(as_function(cone)), cone.sizes, {})]


def describe(match: Match) -> str:
    """What the match's mask is, at the traced sizes: none, causal, sliding_window, packed, padding or other.

    Masks of sizes alone are evaluated on the CPU. Those that depend on integer inputs are tried with flags all set and
    some clear (padding), and with positions that run on and positions that start again (packed).
    """
    if not match.inputs["masks"]:
        return "causal" if match.attrs["is_causal"] else "none"
    cone: Cone | None = match.attrs["cone"]
    return "other" if cone is None else _trial(cone).word


def describe_mask(view: Facts, mask: fx.Node) -> str:
    """``describe`` for a mask by its node: the outer graph's, where the attention that reads it is in a child graph."""
    cone = find(view, mask)
    return _trial(cone).word if isinstance(cone, Cone) else "other"


@dataclass(frozen=True)
class Trial:
    """What trying a mask out on made-up data found: its kind in words; whether it can turn out to need no tensor."""

    word: str
    hopeful: bool


def _judge(match: Match) -> Judge | None:
    """What evaluates the match's mask at run time, shared by all matches with it. None: the graph computes the mask."""
    cone: Cone | None = match.attrs["cone"]
    if cone is None:
        return None
    known = _judges.setdefault(cone.root, {})
    if cone.inverted not in known:
        if not cone.data:
            known[cone.inverted] = SizeMask(as_function(cone))
        else:
            given = cone.root in cone.data and not cone.inverted
            known[cone.inverted] = (GIVEN if given else DataMask(as_function(cone))) if _trial(cone).hopeful else None
    return known[cone.inverted]


def _trial(cone: Cone) -> Trial:
    known = _trials.setdefault(cone.root, {})
    if cone.inverted not in known:
        with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
            known[cone.inverted] = _try_out(cone)
    return known[cone.inverted]


def _try_out(cone: Cone) -> Trial:
    try:
        size = torch.Size(_hint(tuple(cone.examples[cone.root].shape))).numel()
        if cone.root in cone.data or (cone.data and size > LARGEST_TRIAL):
            return Trial("other", True)
        function, sizes = as_function(cone, torch.device("cpu")), [_hint(cone.examples[size]) for size in cone.sizes]
        if not cone.data:
            return Trial(_kind(function(*sizes)).name, True)
        return _try_data(cone, lambda *data: function(*sizes, *data))
    except (RuntimeError, IndexError, TypeError, ValueError):  # made-up data that the model's arithmetic does not take
        return Trial("other", False)


def _try_data(cone: Cone, mask: Callable[..., torch.Tensor]) -> Trial:
    """``mask(*data)`` on data that a plain mask may come from; then on data that shows what else it depends on.

    A diagonal (a window of 1) is no starting point: positions that all start again give one, and hiding more of it
    shows nothing.
    """
    dynamic = any(isinstance(cone.examples[size], torch.SymInt) for size in cone.sizes)
    found = [(data, mask(*data)) for data in _data(cone)]
    kinds = [_kind(base) for _, base in found]
    hopeful = any(kind.plain or (dynamic and kind.name == "sliding_window") for kind in kinds)
    for (data, base), kind in zip(found, kinds):
        if base.dtype != torch.bool or not (kind.plain or (kind.window or 0) > 1):
            continue
        for i, leaf in enumerate(data):
            if leaf.dim() == 2 and leaf.shape[0] and leaf.shape[1] == base.shape[-1] >= 4:
                word = _word(base, leaf, partial(_with, mask, data, i))
                if word is not None:
                    return Trial(word, hopeful)
    return Trial("other", hopeful)


def _with(
    mask: Callable[..., torch.Tensor], data: tuple[torch.Tensor, ...], i: int, leaf: torch.Tensor
) -> torch.Tensor:
    return mask(*data[:i], leaf, *data[i + 1 :])


def _kind(mask: torch.Tensor) -> Kind:
    return classify(mask, mask.shape[-2] if mask.dim() > 1 else 1, mask.shape[-1])


def _word(base: torch.Tensor, leaf: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """padding: clearing a key's flag hides that key from every query whose own flag is set.

    packed: positions that start again hide what came before.
    """
    start, count = leaf.shape[1] // 2, torch.arange(leaf.shape[1])
    changed = leaf.clone()
    if bool((leaf == 1).all()):
        changed[0, start:] = 0
        expected, rows = base & (changed != 0)[:, None, None, :], start if base.shape[-2] > 1 else 1
        word = "padding"
    else:
        changed[:, start:] -= start
        document = count >= start
        expected, rows = base & (document[:, None] == document[None, :]), base.shape[-2]
        word = "packed"
    seen = mask(changed)
    same = torch.equal(*torch.broadcast_tensors(seen[..., :rows, :], expected[..., :rows, :]))
    return word if same and not torch.equal(*torch.broadcast_tensors(seen, base)) else None


def _data(cone: Cone) -> Iterator[tuple[torch.Tensor, ...]]:
    """Made-up data for the cone: each of the first four tensors all ones, or counting along its last dimension."""

    def choices(node: fx.Node) -> list[torch.Tensor]:
        example = cone.examples[node]
        ones = torch.ones(_hint(tuple(example.shape)), dtype=example.dtype)
        counts = example.dtype != torch.bool and ones.dim() > 0
        return [ones, ones.cumsum(-1, dtype=example.dtype) - 1] if counts else [ones]

    tried = [choices(node) for node in cone.data]
    return itertools.product(*tried[:4], *(choice[:1] for choice in tried[4:]))


def _hint(size: Any) -> Any:
    """The traced value of a size, or of a shape."""
    if isinstance(size, (tuple, list)):
        return tuple(_hint(item) for item in size)
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        if not size.node.has_hint():
            raise ValueError(f"size {size} has no traced value")
        return size.node.hint
    return size
