"""Splicing what was found into the graph: check each distinct plan once, replace its nodes, drop what fails."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from slothc.kernels import rowwise_op
from slothc.kernels.sdpa import scaled_dot_product_attention
from slothc.patterns.rule import Match, Miss

from . import bind
from .batched import batched
from .blocks import Block, blocks
from .catalogue import CONSTANT
from .check import check
from .errors import RegionDropped, VerificationFailed
from .found import Found, Region, find
from .four_bit import four_bit, held
from .four_bit import restore as restore_four_bit
from .four_bit_sums import narrow_sums
from .four_bit_sums import restore as restore_sums
from .functional import functional, restore
from .narrowed import narrowed
from .options import Options
from .regions import behind, leaves
from .sizes import shape_of
from .statistics import counts
from .view import GraphView

_verdicts: dict[str, str | None] = {}


@dataclass
class Rewritten:
    """One graph after the rewrite: what was used, what was found and dropped, and the same for its child graphs."""

    found: Found
    used: list[Region | Match] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    dropped: list[Miss] = field(default_factory=list)
    children: list[Rewritten] = field(default_factory=list)

    def all(self) -> list[Rewritten]:
        return [self, *(x for c in self.children for x in c.all())]


def rewrite(module: fx.GraphModule, options: Options, run: bool = True, view: GraphView | None = None) -> Rewritten:
    """Rewrite ``module`` in place and report. ``run=False`` (explain) neither checks nor changes anything."""
    counts["graphs"] += 1
    view = GraphView(module) if view is None else view
    for simpler in (four_bit, narrowed, lambda v: narrow_sums(v, options), batched, functional):
        view = view.again() if simpler(view) else view
    result = Rewritten(find(view, options))
    for caller, child in view.child_modules():
        if not view.alive(caller):
            continue
        result.children.append(rewrite(child, options, run, view.child(caller, child)))
    items: list[Region | Match] = [*result.found.regions, *result.found.matches]
    joined = blocks(view, items) if run else []
    members = [m for b in joined for m in b.members]
    if run and options.verify != "off":
        _check_together(view, [*joined, *(i for i in items if i not in members)])
    for block in joined:
        if _usable(result, block, block.place, options):
            result.blocks.append(block)
            result.used += block.members
    for item in items:
        if item not in result.used and (not run or _usable(result, item, _place(item), options)):
            result.used.append(item)
    if run:
        _Splice(view).all(result)
    return result


def _place(item: Region | Match) -> fx.Node:
    return item.cone.sink if isinstance(item, Region) else item.node


def _usable(result: Rewritten, item: Region | Match | Block, node: fx.Node, options: Options) -> bool:
    """Whether the item passes its check; if not it is dropped with a warning."""
    try:
        _checked(result.found.view, item, options)
    except Exception as error:
        result.dropped.append(_drop(result.found.view, item.rule, node, error))
        return False
    return True


def _drop(view: GraphView, rule: str, node: fx.Node, error: Exception) -> Miss:
    text = str(error) if isinstance(error, VerificationFailed) else f"{type(error).__name__}: {error}".splitlines()[0]
    message = f"sloth leaves {rule} at {view.location(node)} to eager: {text}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RegionDropped, stacklevel=3)
    return Miss(rule, node, text)


_warned: set[str] = set()


def _checked(view: GraphView, item: Region | Match | Block, options: Options) -> None:
    """Check a rewrite, once for each distinct plan, dtype and device. Raises what the check raises."""
    job = _job(view, item)
    if job is None or options.verify == "off" or job.device.type == "meta":
        return
    if job.key not in _verdicts or options.verify == "always":
        _verdicts[job.key] = _judge(view, job)
    if _verdicts[job.key] is not None:
        raise VerificationFailed(_verdicts[job.key])


def _judge(view: GraphView, job: _Job) -> str | None:
    """What is wrong with a rewrite; None if nothing is. What it saves is nobody's business: a checkpoint around the model would run it."""
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            check(view, job.nodes, job.inputs, job.results, job.ours, job.resizable)
    except VerificationFailed as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _check_together(view: GraphView, items: list[Region | Match | Block]) -> None:
    """Check what is new side by side: on an accelerator a check mostly waits for its kernels to be compiled."""
    jobs: dict[str, _Job] = {}
    for item in items:
        job = _job(view, item)
        if job is not None and job.key not in _verdicts and job.device.type == "cuda":
            jobs.setdefault(job.key, job)
    if len(jobs) < 2:
        return
    autocast = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")

    def judge(job: _Job) -> str | None:
        with torch.cuda.device(job.device), torch.autocast("cuda", *autocast, cache_enabled=False):   # a thread has its own
            return _judge(view, job)

    devices = sorted({job.device.index or 0 for job in jobs.values()})
    with torch.random.fork_rng(devices=devices), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        _verdicts.update(zip(jobs, pool.map(judge, jobs.values())))


@dataclass(frozen=True)
class _Job:
    """One check: the original nodes, and the rewrite as a function of the same inputs."""

    key: str
    device: torch.device
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    results: tuple[fx.Node, ...]
    ours: Callable[..., Any]
    resizable: bool = True


def _job(view: GraphView, item: Region | Match | Block) -> _Job | None:
    if isinstance(item, Block):
        return _block_job(view, item)
    return _region_job(view, item) if isinstance(item, Region) else _match_job(view, item)


def _block_job(view: GraphView, block: Block) -> _Job:
    """All the block's results from what its call reads, and what the region reads besides: a tensor whose shape alone it takes."""
    block = block.checked
    given = list(dict.fromkeys((*block.operands, *(leaves(block.region.cone) if block.region else ()))))
    place = [given.index(n) for n in block.operands]
    nodes = {n for r in block.results for n in _between(r, given.__contains__)}
    device = view.value(block.x).device
    call = _moving(view, block.call(), block.operands, device)
    text = " ".join(f"{_widths(view, n)}{view.value(n).dtype}{view.needs_grad(n)}" for n in block.operands)
    key = f"{block.rule} {block.region.plan.key if block.region else ''} {block.linears} {text} {device}"
    return _Job(key, device, list(nodes), given, block.results, lambda *values: call(*(values[k] for k in place)))


def _region_job(view: GraphView, region: Region) -> _Job:
    inputs = leaves(region.cone)
    place = [inputs.index(n) for n in region.operands]
    device = view.value(region.cone.sink).device
    call = _moving(view, rowwise_op.call(region.plan), region.operands, device)
    return _Job(
        f"{region.plan.key} {device}", device, list(region.cone.nodes), inputs, region.cone.results,
        lambda *values: call(*(values[k] for k in place)),
    )  # fmt: skip


def _moving(view: GraphView, call: Callable[..., Any], operands: tuple[fx.Node, ...], device: torch.device) -> Callable[..., Any]:
    """``call``, given what is elsewhere on ``device``."""
    away = {k for k, n in enumerate(operands) if elsewhere(view, n, device)}
    return (lambda *values: call(*(v.to(device) if k in away else v for k, v in enumerate(values)))) if away else call


def elsewhere(view: GraphView, node: fx.Node, device: torch.device) -> bool:
    """Whether the node's value is a tensor on another device: one without dimensions on the CPU, which PyTorch's own operations take."""
    value = view.example(node)
    return isinstance(value, torch.Tensor) and value.device != device


def _match_job(view: GraphView, match: Match) -> _Job | None:
    """The match's main value, from the inputs of its own call; None where the graph is left as it is."""
    replacement = next((r for r in bind.calls(match) if r.node is match.node), None)
    if replacement is None:
        return None
    operands = {a for a in replacement.args if isinstance(a, fx.Node)}
    nodes = _between(match.node, lambda n: n in operands or isinstance(view.example(n), torch.SymFloat))    # a number is not drawn
    inputs = list(dict.fromkeys(n for x in sorted(nodes, key=lambda x: x.name) for n in x.all_input_nodes if n not in nodes))
    arguments, kwargs = replacement.args, dict(replacement.kwargs)

    def ours(*values: Any) -> Any:
        given = dict(zip(inputs, values))
        return replacement.target(*(given.get(a, a) if isinstance(a, fx.Node) else a for a in arguments), **kwargs)

    if match.rule == CONSTANT:
        return None                                                        # the same nodes, run elsewhere
    missing = [a for a in arguments if isinstance(a, fx.Node) and a not in inputs]
    value = view.value(match.node)
    tensors = [n for n in inputs if isinstance(view.example(n), torch.Tensor)]
    text = " ".join(f"{_widths(view, n)}{view.value(n).dtype}{view.needs_grad(n)}" for n in tensors)
    static = {k: v for k, v in match.attrs.items() if isinstance(v, int | float | str | bool | torch.dtype | None)}
    plain = [a for a in arguments if not isinstance(a, fx.Node)]
    kind = value.device.type
    autocast = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    key = f"{match.rule} {text} {static} {plain} {len(nodes)} {value.device} {autocast} {view.autocast(match.node)}"
    if missing:
        return None
    return _Job(key, value.device, list(nodes), inputs, (match.node,), ours, match.rule != "attention")


def _widths(view: GraphView, node: fx.Node) -> tuple[Any, ...]:
    """The sizes that tell one rewrite from another: all of a weight's, an activation's width; never a batch's or a sequence's."""
    shape = shape_of(view, node)
    if not view.value(node).is_floating_point():
        return (len(shape),)
    return shape if len(shape) <= 2 else shape[-1:]


def _between(node: fx.Node, ends: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes behind ``node`` up to those where it ``ends``, which are not among them; ``node`` included."""
    return behind(node, lambda n: not ends(n) and n.op not in ("placeholder", "get_attr"))


class _Splice:
    """Replaces nodes by calls. ``new`` maps replaced nodes to what took their place."""

    def __init__(self, view: GraphView) -> None:
        self.view, self.graph = view, view.graph_module.graph
        self.new: dict[fx.Node, fx.Node] = {}
        self.made: set[fx.Node] = set()
        self.effects = {n for n in view.nodes if view.has_effect(n)}

    def all(self, result: Rewritten) -> None:
        members = [m for b in result.blocks for m in b.members]
        alone = [i for i in result.used if i not in members]
        bound = [bind.calls(i) if isinstance(i, Match) else [] for i in alone]     # functions cut out of the graph as it still is
        for block in result.blocks:
            self.calls(block.place, block.call(), self._here(block.operands, block.x, block.place), block.results)
        for item, found in zip(alone, bound):
            if isinstance(item, Region):
                self.region(item)
            for r in (held(self.view, r) for r in found):
                self.replace(r.node, r.target, r.args, dict(r.kwargs))
        self._attention()
        restore_sums(self.graph)
        restore_four_bit(self.graph)
        for node in reversed(self.graph.nodes):
            if not node.users and node not in self.effects and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        restore(self.view, self.made)
        self.graph.lint()
        self.view.graph_module.recompile()

    def _current(self, args: Any) -> Any:
        return fx.map_arg(args, lambda n: self.new.get(n, n))

    def replace(self, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, self._current(args), self._current(kwargs))
        self._instead(node, made)

    def _instead(self, node: fx.Node, made: fx.Node) -> None:
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        self.new[node] = made
        self.made.add(made)

    def _attention(self) -> None:
        """What is left of attention keeps apart from the library's plans: what is around it may lay out gradients as eager does not."""
        for node in self.view.nodes:
            if node not in self.new and node.op == "call_function" and self.view.op(node).kind == "sdpa":
                node.target = scaled_dot_product_attention

    def region(self, region: Region) -> None:
        results, call = region.cone.results, rowwise_op.call(region.plan)
        place = results[-1]                                                # the first of its results: found.placeable
        operands = self._here(region.operands, region.cone.sink, place)
        if len(results) == 1:
            self.replace(place, call, operands, {})
        else:
            self.calls(place, call, operands, results)

    def _here(self, operands: tuple[fx.Node, ...], like: fx.Node, place: fx.Node) -> tuple[fx.Node, ...]:
        """The operands on the device that ``like`` is on, moved there before ``place`` where they are not."""
        device = self.view.value(like).device
        return tuple(self._moved(n, device, place) if elsewhere(self.view, n, device) else n for n in operands)

    def _moved(self, node: fx.Node, device: torch.device, place: fx.Node) -> fx.Node:
        with self.graph.inserting_before(place):
            made = self.graph.call_method("to", (self._current(node), device))
        made.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        self.made.add(made)
        return made

    def calls(self, place: fx.Node, call: Callable[..., Any], operands: tuple[fx.Node, ...], results: tuple[fx.Node, ...]) -> None:
        """One call before ``place`` whose values take the places of ``results``."""
        with self.graph.inserting_before(place):
            made = self.graph.call_function(call, self._current(operands))
            values = [self.graph.call_function(operator.getitem, (made, k)) for k in range(len(results))]
        self.made.add(made)
        for node, value in zip(results, values):
            self._instead(node, value)
