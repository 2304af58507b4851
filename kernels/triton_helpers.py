"""What generated kernels call: functions that Triton has not, or that cost less where less is asked of them."""

from __future__ import annotations

import sympy as sp

from .expression import TRITON

HEADER = '''import triton
import triton.language as tl
'''

# name -> text; in the order in which they may call one another
HELPERS: dict[str, str] = {
    "_tanh": '''

@triton.jit
def _tanh(x):
    u = x * x
    small = x * tl.fma(u, tl.fma(u, tl.fma(u, tl.fma(u, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0), -1.0 / 3.0), 1.0)
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.2, small, tl.where(x < 0.0, -large, large))
''',
    # where the result is rounded to 16 bits: relative error 4e-6 from the first terms of the series below 0.2, 2e-6 above, where a
    # square of rsqrt stands for a division
    "_tanh16": '''

@triton.jit
def _tanh16(x):
    u = x * x
    small = x * tl.fma(u, tl.fma(u, 2.0 / 15.0, -1.0 / 3.0), 1.0)
    root = tl.rsqrt(1.0 + tl.exp2(2.8853900817779268 * x))
    return tl.where(u < 0.04, small, 1.0 - 2.0 * root * root)
''',
    "_tanh8": '''

@triton.jit
def _tanh8(x):
    return _tanh16(x)
''',
    "_log1p": '''

@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
''',
    "_softplus": '''

@triton.jit
def _softplus(x):
    return tl.where(x > 0.0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))
''',
    "_logsumexp": '''

@triton.jit
def _logsumexp(x, ok):
    x = tl.where(ok, x, -float('inf'))
    top = tl.max(x, axis=1)[:, None]
    base = tl.where(top == -float('inf'), 0.0, top)
    return base + tl.log(tl.sum(tl.exp(x - base), axis=1)[:, None])
''',
}

MOST_SUMS = 4         # in one reduction


def _sums(count: int, together: bool) -> str:
    """Sums over lanes of several blocks; ``together``: in one reduction, which threads wait for once."""
    a, b = ([f"{x}{k}" for k in range(count)] for x in "ab")
    if not together:
        return f'''

@triton.jit
def _sums{count}({", ".join(a)}):
    return {", ".join(f"tl.sum({x}, axis=1)[:, None]" for x in a)}
'''
    return f'''

@triton.jit
def _add{count}({", ".join(a + b)}):
    return {", ".join(f"{x} + {y}" for x, y in zip(a, b))}


@triton.jit
def _sums{count}({", ".join(a)}):
    {", ".join(a)} = tl.reduce(({", ".join(a)}), 1, _add{count})
    return {", ".join(f"{x}[:, None]" for x in a)}
'''


HELPERS |= {f"_sums{count}": _sums(count, False) for count in range(2, MOST_SUMS + 1)}   # an interpreter adds several one by one

# relative error 2^-11, a quarter of bfloat16's: one instruction from sm_75 on
NVIDIA: dict[str, str] = {
    "_tanh8": '''

@triton.jit
def _tanh8(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
''',
    **{f"_sums{count}": _sums(count, True) for count in range(2, MOST_SUMS + 1)},
}


class tanh8(sp.Function):
    """tanh to eight bits."""


DIALECT = {**TRITON, "tanh8": "_tanh8({0})"}


def module(body: str, nvidia: bool = False) -> str:
    """The text of a module with ``body`` and the functions that it calls. ``nvidia``: for devices from sm_75 on alone."""
    helpers = HELPERS | NVIDIA if nvidia else HELPERS
    needed: list[str] = []
    for helper in reversed(helpers):                                       # a later one may call an earlier one
        if f"{helper}(" in body + "".join(helpers[n] for n in needed):
            needed.insert(0, helper)
    return HEADER + "".join(helpers[n] for n in needed) + "\n\n" + body
