"""``slothc derive``: formula, derived backward, saved values and generated code of a rule, for one of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click

from slothc.gradients.matrix import lora_plan
from slothc.gradients.plan import Pass, Plan
from slothc.gradients.pretty import describe, formula
from slothc.gradients.vocabulary import Chain, gradient_program, loss_program, row_pass, with_gradient
from slothc.patterns.rule import Match

from .cli_rule import lifted, named, sample_of

VOCABULARY = 32000


def derivation(name: str, sample_name: str | None = None) -> str:
    """The text that ``slothc derive`` prints."""
    rule = named(name)
    sample = sample_of(rule, sample_name)
    others = ", ".join(repr(s.name) for s in rule.samples if s is not sample)
    found = lifted(rule, sample)
    if not found:
        reasons = "; ".join(found.reasons) or "no reason is recorded"
        raise click.ClickException(f"the sample {sample.name!r} of {rule.name} is not matched: {reasons}")
    head = f"{rule.name}: {rule.math}\nsample {sample.name!r}" + (f" (others: {others})" if others else "")
    sections = [text for plan in found.plans for text in _row(plan)]
    sections += [text for match in found.matches[:1] for text in _STRUCTURAL[rule.name](match)]
    return "\n\n".join([head, *sections])


def _section(title: str, text: str) -> str:
    return f"{title}\n{'-' * len(title)}\n{text.strip()}"


def _row(plan: Plan) -> Iterator[str]:
    yield describe(plan)
    yield _section("Triton, forward", _triton(plan.forward))
    if plan.backward is not None:
        yield _section("Triton, backward", _triton(plan.backward))


def _triton(step: Pass) -> str:
    from slothc.kernels.rowwise import source

    return source(step)


def _lora(match: Match) -> Iterator[str]:
    from slothc.kernels.lowrank_program import straight

    shared = match.inputs["xa"] is None
    layout = match.attrs["layout"]
    plan = lora_plan(layout, match.inputs["bias"] is not None, shared)
    yield plan.text()
    wanted = tuple(name for name in ("X", "Xa", "A", "B") if name != "Xa" or not shared)
    title = "PyTorch, generated (products run in the device's matrix library; base and bias frozen)"
    yield _section(title, straight(layout, shared, wanted, False).source)


def _cross_entropy(match: Match) -> Iterator[str]:
    attrs = match.attrs
    chain = Chain.parse(attrs["chain"])
    loss = loss_program(chain.dtype, chain.exprs, vocab=VOCABULARY, ignore_index=attrs["ignore_index"],
                        smoothing=attrs["label_smoothing"])  # fmt: skip
    yield _section("one token, z its logits (a tile of hidden @ weight.T, never stored whole)", formula(loss))
    yield _section("gradient of the logits; hidden's and weight's are its products", formula(gradient_program(loss)))
    yield "saved: the gradients themselves, made in the forward tile by tile and scaled in the backward"
    both = _triton(row_pass(with_gradient(loss), VOCABULARY))
    yield _section(f"Triton, loss and gradient of a tile of rows (vocabulary of {VOCABULARY})", both)


def _attention(match: Match) -> Iterator[str]:
    from slothc.bind.attention import describe as mask_of

    yield ("Nothing is derived here. The mask is recognised by what it computes, repeated heads by where elements\n"
           "come from; PyTorch's scaled_dot_product_attention is called without them and has its own backward.")
    yield f"mask of this sample: {mask_of(match)}\nhead repeats left out: {match.attrs['repeats']}"


_STRUCTURAL: dict[str, Callable[[Match], Iterator[str]]] = {
    "lora_linear": _lora, "cross_entropy": _cross_entropy, "attention": _attention,
}  # fmt: skip
