"""Cross-entropy of one token as a row program over the lanes of the vocabulary.

With logit z_v, what the model makes of it c_v = chain(z_v), label y and smoothing e (Szegedy et al., arXiv:1512.00567,
as in ``torch.nn.functional.cross_entropy``):

    loss = logsumexp_v(c_v) - (1 - e) * c_y - e * mean_v(c_v),    c_y = sum_v [v = y] c_v,    0 where y is ignored.

The gradient by z comes from the reverse mode; nothing here knows that it is softmax minus one-hot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import sympy as sp

from .functions import absolute, clip, eq, relu, select, sigmoid, softplus
from .geometry import Access, Axis, Form, Size
from .plan import Lookup, Operand, Pass
from .program import COLUMN, DTYPES, ROW, SCALAR, Input, Output, Program, Reduce, Stage, symbol
from .reverse import derive

Steps = Sequence[tuple[sp.Expr, str]]
_WIDE = ("fp32", "fp64")

FUNCTIONS: dict[str, tuple[int, Callable[..., sp.Expr]]] = {
    "cast": (0, lambda z: z),
    "neg": (0, lambda z: -z),
    "tanh": (0, sp.tanh),
    "sigmoid": (0, sigmoid),
    "softplus": (0, softplus),
    "relu": (0, relu),
    "abs": (0, absolute),
    "exp": (0, sp.exp),
    "add": (1, lambda z, c: z + c),
    "sub": (1, lambda z, c: z - c),
    "rsub": (1, lambda z, c: c - z),
    "mul": (1, lambda z, c: z * c),
    "div": (1, lambda z, c: z / c),
    "clamp": (2, clip),
}
"""Steps of a chain by name: how many numbers each takes, and its value at the logit z."""


@dataclass(frozen=True)
class Step:
    """One thing the model does to a logit: function ``fn`` of ``FUNCTIONS`` with ``numbers``, rounded to ``dtype``."""

    fn: str
    numbers: tuple[float, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.fn not in FUNCTIONS:
            raise ValueError(f"logit function {self.fn!r} is not one of {', '.join(sorted(FUNCTIONS))}")
        if len(self.numbers) != FUNCTIONS[self.fn][0]:
            count = FUNCTIONS[self.fn][0]
            raise ValueError(f"logit function {self.fn!r} takes {count} numbers, not {len(self.numbers)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"logit dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def expr(self) -> sp.Expr:
        """The step's value as an expression in z."""
        return FUNCTIONS[self.fn][1](symbol("z"), *(constant(c) for c in self.numbers))

    def __str__(self) -> str:
        return " ".join((self.fn, *(repr(float(c)) for c in self.numbers), self.dtype))


@dataclass(frozen=True)
class Chain:
    """What a model does to its logits between the linear, which gives ``dtype``, and the loss.

    ``text`` names it in the arguments of an op.
    """

    dtype: str
    steps: tuple[Step, ...] = ()

    @property
    def text(self) -> str:
        return "; ".join((self.dtype, *map(str, self.steps)))

    @property
    def result(self) -> str:
        """The dtype after the last step."""
        return self.steps[-1].dtype if self.steps else self.dtype

    @property
    def exprs(self) -> Steps:
        return tuple((s.expr, s.dtype) for s in self.steps)

    def then(self, fn: str, *numbers: float, dtype: str | None = None) -> Chain:
        """This chain with one more step."""
        return Chain(self.dtype, (*self.steps, Step(fn, tuple(map(float, numbers)), dtype or self.result)))

    @staticmethod
    def parse(text: str) -> Chain:
        """The chain that ``text`` names. Raises ValueError."""
        dtype, *rest = (part.split() for part in text.split(";"))
        if len(dtype) != 1 or dtype[0] not in DTYPES:
            raise ValueError(f"chain {text!r} does not start with a dtype ({', '.join(DTYPES)})")
        return Chain(dtype[0], tuple(Step(fn, tuple(map(float, numbers)), last) for fn, *numbers, last in rest))


def constant(c: float) -> sp.Expr:
    return sp.Integer(int(c)) if float(c).is_integer() else sp.Float(repr(float(c)))


def logit_stages(dtype: str, steps: Steps) -> tuple[tuple[Stage, ...], sp.Expr]:
    """The processed logit: a stage for each rounding, and its final value. Rounding to fp32 changes nothing."""
    stages: list[Stage] = []
    value: sp.Expr = symbol("z")
    at = dtype
    for number, (expr, to) in enumerate(steps):
        value = sp.sympify(expr).xreplace({symbol("z"): value})
        if to not in _WIDE and not (value.is_Symbol and to == at):
            stages.append(Stage(f"c{number}", value, to))
            value = symbol(f"c{number}")
        at = to
    if not value.is_Symbol:
        stages.append(Stage("c", value))
        value = symbol("c")
    return tuple(stages), value


def label_stages(dtype: str, steps: Steps) -> tuple[tuple[Stage, ...], sp.Expr]:
    """The same for the label's logit ``zy``."""
    stages, value = logit_stages(dtype, steps)
    names = {symbol(n): symbol(f"{n}y") for n in ("z", *(s.name for s in stages))}
    return tuple(Stage(f"{s.name}y", s.expr.xreplace(names), s.dtype) for s in stages), value.xreplace(names)


def loss_program(
    dtype: str,
    steps: Steps = (),
    *,
    vocab: int = 0,
    ignore_index: int | None = -100,
    smoothing: float = 0.0,
    gathered: bool = False,
) -> Program:
    """The loss of one token. ``dtype``: how z is stored; ``steps``: pairs of an expression in z and its rounding.

    ``vocab`` is the number of lanes (needed when ``smoothing`` is not 0); ``ignore_index`` None ignores no label.
    Inputs: z [t, v], label [t], v. Output: loss [t] in fp32.

    ``gathered``: the label's logit is an input ``zy`` [t] of its own. The identity is "the sum over one lane is that
    lane", sum_v [v = y] f(z_v) = f(z_y), which needs 0 <= y < V; the gather's adjoint adds d_zy to d_z at y.
    """
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label smoothing must be between 0 and 1, got {smoothing}")
    label, v = symbol("label"), symbol("v")
    chain, c = logit_stages(dtype, steps)
    own, c_label = label_stages(dtype, steps) if gathered else ((), Reduce("sum", select(eq(v, label), c, 0)))
    stages = [*chain, *own, Stage("lse", Reduce("logsumexp", c)), Stage("picked", c_label)]
    loss = symbol("lse") - constant(1 - smoothing) * symbol("picked")
    if smoothing:
        if vocab < 1:
            raise ValueError("label smoothing needs the size of the vocabulary")
        stages.append(Stage("total", Reduce("sum", c)))
        loss -= constant(smoothing) * symbol("total") / vocab
    if ignore_index is not None:
        loss = select(eq(label, ignore_index), 0, loss)
    own_input = (Input("zy", SCALAR, dtype),) if gathered else ()
    number = Input("label", SCALAR, "i64", differentiable=False)
    inputs = (Input("z", ROW, dtype), *own_input, number, Input("v", COLUMN, "i64", differentiable=False, role="index"))
    return Program(inputs, (*stages, Stage("loss", loss)), (Output("loss", "loss"),)).pruned()


def normaliser_program(dtype: str, steps: Steps = ()) -> Program:
    """logsumexp over the vocabulary of a token's processed logits. Input: z [t, v]. Output: lse [t] in fp32."""
    chain, c = logit_stages(dtype, steps)
    return Program((Input("z", ROW, dtype),), (*chain, Stage("lse", Reduce("logsumexp", c))), (Output("lse", "lse"),))


def gradient_program(program: Program, *, seeded: bool = False) -> Program:
    """d output / d z by reverse mode, in z's dtype. ``seeded``: times the cotangent input g_<output>, else 1."""
    back = derive(program, [name for name in ("z", "zy") if name in program.input])
    if seeded:
        return back
    one = {symbol(f"g_{out.name}"): sp.Integer(1) for out in program.outputs}
    stages = tuple(_substituted(s, one) for s in back.stages)
    return Program(tuple(i for i in back.inputs if symbol(i.name) not in one), stages, back.outputs).pruned()


def with_gradient(program: Program) -> Program:
    """Output and its gradient by z in one program: z is read, reduced, and read again for the gradient."""
    back = gradient_program(program)
    known = {s.name for s in back.stages}
    stages = [*(s for s in program.stages if s.name not in known), *back.stages]
    inputs = {i.name: i for i in (*program.inputs, *back.inputs)}
    return Program(tuple(inputs.values()), ordered(stages, set(inputs)), (*program.outputs, *back.outputs)).pruned()


def _substituted(stage: Stage, known: dict[sp.Symbol, sp.Expr]) -> Stage:
    value = stage.value
    if isinstance(value, Reduce):
        return replace(stage, value=Reduce(value.op, value.body.xreplace(known)))
    return replace(stage, value=sp.sympify(value).xreplace(known))


def ordered(stages: list[Stage], known: set[str]) -> tuple[Stage, ...]:
    """The stages in an order in which each reads only earlier ones."""
    done: list[Stage] = []
    while stages:
        ready = [s for s in stages if {x.name for x in s.expr.free_symbols} <= known]
        done += ready
        known |= {s.name for s in ready}
        stages = [s for s in stages if s.name not in known]
    return tuple(done)


def row_pass(program: Program, lanes: Size, tables: Collection[str] = ()) -> Pass:
    """``program`` over tokens t and lanes v: tensors [t, v] and [t], in the order of its inputs and outputs.

    ``tables``: inputs [t, v] that are rows of a matrix [., v], those whose numbers [t] are the last operand.
    """
    tokens = sp.Symbol("T", integer=True, nonnegative=True)
    t, v = Form.axis("t"), Form.axis("v")

    def place(wide: bool, number: int, dtype: str) -> tuple[Access, Operand]:
        return Access(number, (t, v) if wide else (t,)), Operand((tokens, lanes) if wide else (tokens,), dtype)

    loads: list[Access | None] = []
    reads: list[Operand] = []
    for i in program.inputs:
        access, operand = place(i.kind.lanes, len(reads), i.dtype)
        loads.append(access if i.role == "data" else None)
        reads += [operand] if i.role == "data" else []
    if tables:
        found = Lookup(len(reads), 0)
        names = [i.name for i in program.inputs if i.role == "data"]
        reads = [*(replace(r, lookup=found) if n in tables else r for n, r in zip(names, reads)), Operand((tokens,), "i64")]
    placed = [place(program.out_kind(o).lanes, n, o.dtype) for n, o in enumerate(program.outputs)]
    axes, lane = (Axis("t", tokens),), Axis("v", lanes)
    stores, writes = tuple(a for a, _ in placed), tuple(w for _, w in placed)
    return Pass(program, axes, lane, tuple(loads), stores, tuple(reads), writes)
