"""``torch.compile(model, backend="sloth", options={...})``: the options, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .catalogue import names
from .errors import OptionError

VERIFY = ("first", "always", "off")
REST = ("eager", "inductor")


@dataclass(frozen=True)
class Options:
    """verify: when plans are checked against float64 truth ("first": each distinct plan once in a process, "always": at every compilation,
    "off"). rest: who runs the nodes that are left alone. disable: names of rules not to use. cuda_graphs: whether training steps whose
    shapes repeat are recorded and replayed as CUDA graphs; without a CUDA device they run ordinarily."""

    verify: str = "first"
    rest: str = "eager"
    disable: frozenset[str] = frozenset()
    cuda_graphs: bool = False

    @staticmethod
    def of(given: Mapping[str, Any] | None) -> Options:
        """Checked options. Raises ``OptionError`` naming the option and the allowed values."""
        given = dict(given or {})
        unknown = sorted(set(given) - {"verify", "rest", "disable", "cuda_graphs"})
        if unknown:
            raise OptionError(f"unknown sloth option {unknown[0]!r}: the options are verify, rest, disable, cuda_graphs")
        verify = _one_of("verify", given.get("verify", "first"), VERIFY)
        rest = _one_of("rest", given.get("rest", "eager"), REST)
        disable = given.get("disable", ())
        disable = (disable,) if isinstance(disable, str) else disable
        try:
            chosen = frozenset(disable)
        except TypeError:
            raise OptionError(f"sloth option disable={disable!r}: it takes rule names, any of {', '.join(names())}") from None
        for name in sorted(map(str, chosen - set(names()))):
            raise OptionError(f"sloth option disable={name!r} is not a rule: the rules are {', '.join(names())}")
        graphs = given.get("cuda_graphs", False)
        if not isinstance(graphs, bool):
            raise OptionError(f"sloth option cuda_graphs={graphs!r} is not allowed: it takes True, False")
        if graphs and rest == "inductor":
            raise OptionError("sloth option cuda_graphs=True is not allowed with rest='inductor': it takes rest='eager'")
        return Options(verify, rest, chosen, graphs)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise OptionError(f"sloth option {name}={value!r} is not allowed: it takes {', '.join(map(repr, allowed))}")
    return value
