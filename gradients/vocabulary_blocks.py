"""Cross-entropy of one token as row programs over blocks of the vocabulary, for a head whose weight is not trained.

With processed logits c_v = chain(z_v), label y and any number m near the greatest c_v, a block adds to

    S = sum_{v != y} e^(c_v - m)    and    A = sum_{v != y} W_v d S / d z_v,    d S / d z_v = e^(c_v - m) chain'(z_v),

as attention goes over its keys (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). With all blocks done,
e = e^(c_y - m) and Z = S + e give

    loss = -log(e / Z) = log(1 + e^x),    x = log S + m - c_y,
    d loss / d h = A / Z - S / Z chain'(z_y) W_y.

The label's term stays apart: p_y - 1 = -S / Z cancels nothing. The derivatives of the chain come from the reverse mode.
"""

from __future__ import annotations

import sympy as sp

from .bounds import bounds, span
from .functions import eq, gt, select, softplus
from .program import COLUMN, ROW, SCALAR, Input, Output, Program, Reduce, Stage, symbol
from .reverse import derive
from .vocabulary import Steps, constant, label_stages, logit_stages, ordered, with_gradient

LAG = 40.0
"""What m may be below the greatest c_v: 2^31 times e^40 is far from fp32's greatest number."""


def greatest(dtype: str, steps: Steps, narrow: float) -> float | None:
    """What no processed logit is above, where none is more than ``narrow`` below that: m needs no maximum then."""
    stages, c = logit_stages(dtype, steps)
    low, high = span(c, bounds(Program((Input("z", ROW, dtype),), stages, (Output("c", c.name),))))
    return high if high - low <= narrow else None


def block_program(dtype: str, steps: Steps = (), m: float | None = None) -> Program:
    """One block of one token. ``dtype``: how z is stored; ``steps``: pairs of an expression in z and its rounding.

    Inputs: z [t, v], label [t] counted from the block's first lane, v, and what the blocks before gave: s0, zy0 and m0 [t] in fp32.
    Outputs: d_z = d S / d z, 0 at the label; s = S; zy, the label's logit once its block has been; m, and k = e^(m0 - m), what A is to
    be multiplied by first. With ``m``, a number, there are no m0, m and k.
    """
    label, v = symbol("label"), symbol("v")
    chain, c = logit_stages(dtype, steps)
    own, state = eq(v, label), ["s0", "zy0"]
    shift: sp.Expr = symbol("m")
    reference: tuple[Stage, ...] = ()
    if m is None:
        top, before, state = symbol("top"), symbol("m0"), [*state, "m0"]
        reference = (
            Stage("top", Reduce("max", c), detached=True),                # S and A are what they are whatever m is
            Stage("m", select(gt(top, before + constant(LAG)), top, before), detached=True),
        )
    else:
        shift = constant(m)
    inputs = (
        Input("z", ROW, dtype), Input("label", SCALAR, "i64", differentiable=False),
        Input("v", COLUMN, "i64", differentiable=False, role="index"), *(Input(n, SCALAR, differentiable=False) for n in state),
    )  # fmt: skip
    part = Stage("part", Reduce("sum", select(own, 0, sp.exp(c - shift))))
    made = with_gradient(Program(inputs, (*chain, *reference, part), (Output("part", "part"),)))
    found: sp.Expr = symbol("s0")
    names = ["s", "zy"]
    stages = [*made.stages, Stage("here", Reduce("sum", select(own, symbol("z"), 0))), Stage("zy", symbol("zy0") + symbol("here"))]
    if m is None:
        stages.append(Stage("k", sp.exp(symbol("m0") - shift)))
        found, names = found * symbol("k"), [*names, "m", "k"]
    stages.append(Stage("s", found + symbol("part")))
    gradient = next(o for o in made.outputs if o.name == "d_z")
    return Program(inputs, tuple(stages), (gradient, *(Output(n, n) for n in names)))


def closing_program(dtype: str, steps: Steps = (), m: float | None = None, ignore_index: int = -100) -> Program:
    """Loss and gradient of one token, all blocks done.

    Inputs: a [t, d] = A and w [t, d] = W_y, label [t], and the blocks' s, zy and m [t] (``m``: a number in its place). Outputs: loss [t]
    and d_h [t, d], both 0 where the label is ignored.
    """
    label, s, away, whole = symbol("label"), symbol("s"), symbol("away"), symbol("whole")
    chain, c = label_stages(dtype, steps)
    back = derive(Program((Input("zy", SCALAR, dtype),), chain, (Output("c", c.name),)), ["zy"])
    ignored = eq(label, ignore_index)
    stages = [
        *chain,
        Stage("away", (symbol("m") if m is None else constant(m)) - c),     # exact where the label is the greatest
        Stage("x", sp.log(s) + away),
        Stage("loss", select(ignored, 0, softplus(symbol("x")))),
        Stage("whole", s + sp.exp(-away)),
        Stage("g_c", -s / whole),                                         # p_y - 1
        *(stage for stage in back.stages if stage.name not in {known.name for known in chain}),
        Stage("d_h", select(ignored, 0, symbol("a") / whole + symbol("d_zy") * symbol("w"))),
    ]
    scalars = ("zy", "s") if m is not None else ("zy", "s", "m")
    inputs = (
        Input("a", ROW), Input("w", ROW, dtype), Input("label", SCALAR, "i64", differentiable=False), *(Input(n, SCALAR) for n in scalars),
    )  # fmt: skip
    return Program(inputs, ordered(stages, {i.name for i in inputs}), (Output("loss", "loss"), Output("d_h", "d_h")))
