"""The named identities that tidy derived formulas, each with its side condition.

``before`` and ``after`` are expressions over the placeholders u, v, a, b. A sum or product ``before`` also matches
inside a longer one. sympy itself cancels x / x at construction, so a quotient never reaches these rules; what it cannot
know (the vocabulary functions are opaque to it) is here. sigmoid(x) (1 - sigmoid(x)) stays: it is the cheapest form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import sympy as sp

from .functions import absolute, clip, eq, ge, gt, maximum, minimum, relu, select, sigmoid, signum, softplus
from .program import Program, Reduce, Stage, symbol

u, v, a, b = sp.symbols("u v a b", real=True, cls=sp.Dummy)
PLACES = frozenset((u, v, a, b))
Env = Mapping[sp.Expr, sp.Expr]


def _always(env: Env) -> bool:
    return True


def _nonnegative(env: Env) -> bool:
    return bool(env[u].is_nonnegative)


def _nonzero(env: Env) -> bool:
    return bool(env[u].is_nonzero)


def _indicator(env: Env) -> bool:
    """Is u always 0 or 1?"""
    return isinstance(env[u], (gt, ge, eq))


@dataclass(frozen=True)
class Identity:
    """``before`` equals ``after`` wherever ``condition`` holds for what the placeholders stand for."""

    name: str
    before: sp.Expr
    after: sp.Expr
    condition: Callable[[Env], bool] = _always

    def apply(self, node: sp.Expr) -> sp.Expr | None:
        """``node`` rewritten, or None where the identity does not apply at its root."""
        whole = isinstance(self.before, (sp.Add, sp.Mul)) and self.before.func is node.func
        if whole:
            for env, rest in _subset(self.before.args, node.args, {}):
                if self.condition(env):
                    return node.func(self.after.xreplace(dict(env)), *rest)
            return None
        for env in _bind(self.before, node, {}):
            if self.condition(env):
                return self.after.xreplace(dict(env))
        return None


def _bind(pattern: sp.Expr, node: sp.Expr, env: Env) -> Iterator[Env]:
    """Every way to make ``pattern`` equal ``node`` by giving the placeholders values."""
    if pattern in PLACES:
        if env.get(pattern, node) == node:
            yield {**env, pattern: node}
    elif not pattern.args or not pattern.free_symbols:
        if pattern == node:
            yield env
    elif pattern.func is node.func and len(pattern.args) == len(node.args):
        if isinstance(pattern, (sp.Add, sp.Mul)):
            yield from (e for e, rest in _subset(pattern.args, node.args, env) if not rest)
        else:
            yield from _in_order(pattern.args, node.args, env)


def _in_order(patterns: tuple[sp.Expr, ...], nodes: tuple[sp.Expr, ...], env: Env) -> Iterator[Env]:
    if not patterns:
        yield env
        return
    for found in _bind(patterns[0], nodes[0], env):
        yield from _in_order(patterns[1:], nodes[1:], found)


def _subset(
    patterns: tuple[sp.Expr, ...], nodes: tuple[sp.Expr, ...], env: Env
) -> Iterator[tuple[Env, tuple[sp.Expr, ...]]]:
    """Every way to match all ``patterns`` with different ``nodes``, with the nodes that are left over."""
    if not patterns:
        yield env, nodes
        return
    for k, node in enumerate(nodes):
        for found in _bind(patterns[0], node, env):
            yield from _subset(patterns[1:], nodes[:k] + nodes[k + 1 :], found)


IDENTITIES: tuple[Identity, ...] = (
    Identity("|u| sign(u) = u", absolute(u) * signum(u), u),
    Identity("|u|^2 = u^2", absolute(u) ** 2, u**2),
    Identity("|u| = u for u >= 0", absolute(u), u, _nonnegative),
    Identity("sign(u)^2 = 1 for u != 0", signum(u) ** 2, sp.Integer(1), _nonzero),
    Identity("relu(u) [u > 0] = relu(u)", relu(u) * gt(u, 0), relu(u)),
    Identity("relu(u) = u for u >= 0", relu(u), u, _nonnegative),
    Identity("[.]^2 = [.]", u**2, u, _indicator),
    Identity("[u > v] [u >= v] = [u > v]", gt(u, v) * ge(u, v), gt(u, v)),
    Identity("u [c] of the same choice", select(u, v, v), v),
    Identity("c ? 1 : 0 = c for an indicator c", select(u, sp.Integer(1), sp.Integer(0)), u, _indicator),
    Identity("max(u, u) = u", maximum(u, u), u),
    Identity("min(u, u) = u", minimum(u, u), u),
    Identity("clip is idempotent", clip(clip(u, a, b), a, b), clip(u, a, b)),
    Identity("sigmoid(u) + sigmoid(-u) = 1", sigmoid(u) + sigmoid(-u), sp.Integer(1)),
    Identity("softplus(u) - softplus(-u) = u", softplus(u) - softplus(-u), u),
    Identity("sin^2 + cos^2 = 1", sp.sin(u) ** 2 + sp.cos(u) ** 2, sp.Integer(1)),
)


def factored(expr: sp.Add) -> sp.Expr:
    """``a c + b c = c (a + b)`` for factors c (with their powers) that every term has: always true."""
    terms = [sp.Mul.make_args(t) for t in expr.args]
    common = [f for f in terms[0] if not f.is_Number and all(f in t for t in terms[1:])]
    if not common:
        return expr
    rest = sp.Add(*[sp.Mul(*[f for f in t if f not in common]) for t in terms])
    return sp.Mul(*common, rest)


def tidy(expr: sp.Expr) -> sp.Expr:
    """``expr`` with the identities and common factors applied, leaves first; equal wherever ``expr`` is defined."""
    if not expr.args:
        return expr
    args = [tidy(x) for x in expr.args]
    node = expr if all(x is y for x, y in zip(args, expr.args, strict=True)) else expr.func(*args)
    for identity in IDENTITIES:
        found = identity.apply(node)
        if found is not None and found != node:
            return tidy(found)
    return factored(node) if isinstance(node, sp.Add) else node


def tidied(program: Program) -> Program:
    """``program`` with every equation tidied and written with the values already known by name.

    A stage r = u^(-1/2) turns a later u^(-3/2) into r^3, a stage e = exp(x - m) a later exp(x - m) into e.
    A rounded stage is not
    the value that its equation has, and a detached one not its derivative: they stand for nothing but themselves.
    """
    known: dict[sp.Expr, sp.Symbol] = {}
    stages: list[Stage] = []
    for s in program.stages:
        body = _reused(tidy(s.expr), known)
        stages.append(replace(s, value=Reduce(s.value.op, body) if isinstance(s.value, Reduce) else body))
        if s.dtype is None and not s.detached and not isinstance(s.value, Reduce) and sp.count_ops(body) > 0:
            known.setdefault(body, symbol(s.name))
    return Program(program.inputs, tuple(stages), program.outputs)


def _reused(expr: sp.Expr, known: Mapping[sp.Expr, sp.Symbol]) -> sp.Expr:
    roots = {
        e.base: (e.exp, r) for e, r in known.items() if e.is_Pow and e.exp in (sp.Rational(1, 2), -sp.Rational(1, 2))
    }

    def of_root(e: sp.Expr) -> sp.Expr:
        power, r = roots[e.base]
        return r ** (e.exp / power)

    expr = expr.xreplace({e: r for e, r in known.items()})
    return expr.replace(lambda e: e.is_Pow and e.base in roots and (e.exp * 2).is_odd, of_root) if roots else expr
