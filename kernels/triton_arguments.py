"""What a generated kernel takes: the operands that it reads, and the integers of each access to them."""

from __future__ import annotations

from slothc.gradients.geometry import Access
from slothc.gradients.plan import Lookup, Pass

Groups = tuple[tuple[int, ...], ...]


def arguments(p: Pass, groups: Groups) -> list[tuple[str, int, str]]:
    """The integer arguments for accesses, in order: (argument, number of the access, what: "offset", "lane" or the group's number)."""
    found: list[tuple[str, int, str]] = []
    for number, (label, access) in enumerate(_accesses(p)):
        if access is None:
            continue
        if number < len(p.loads) and (lookup := p.reads[access.tensor].lookup) is not None:
            found += _table_arguments(p, groups, label, number, access, lookup)
            continue
        if any(f.const != 0 for f in access.index):
            found.append((f"o_{label}", number, "offset"))
        for g, axes in enumerate(groups):
            if any(p.axes[a].name in access.axes for a in axes):
                found.append((f"s_{label}_{g}", number, str(g)))
        if p.lane.name in access.axes:
            found.append((f"l_{label}", number, "lane"))
    return found


def tensors(p: Pass) -> list[int]:
    """The operands that a kernel of the pass reads, tables' indices among them."""
    read = {a.tensor for a in p.loads if a}
    return sorted(read | {lookup.index for t in read if (lookup := p.reads[t].lookup) is not None})


def _table_arguments(p: Pass, groups: Groups, label: str, number: int, access: Access, lookup: Lookup) -> list[tuple[str, int, str]]:
    """The arguments of a table's access: the index's (``j_...``), then those of the other dimensions."""
    rank, d = len(p.reads[lookup.index].shape) if not lookup.along else 1, lookup.dim
    which = access.index if lookup.along else access.index[d : d + rank]
    parts = {"j_": which, "": (*access.index[:d], *access.index[d + rank :])}
    found = [(f"g_{label}", number, "step"), (f"c_{label}", number, "count")]
    for prefix, forms in parts.items():
        axes = {a for f in forms for a in f.axes}
        of = "index " if prefix else ""
        if any(f.const != 0 for f in forms):
            found.append((f"o_{prefix}{label}", number, of + "offset"))
        strides = [g for g, mine in enumerate(groups) if any(p.axes[a].name in axes for a in mine)]
        found += [(f"s_{prefix}{label}_{g}", number, of + str(g)) for g in strides]
        if p.lane.name in axes:
            found.append((f"l_{prefix}{label}", number, of + "lane"))
    return found


def _accesses(p: Pass) -> list[tuple[str, Access | None]]:
    """Every access with the label its arguments carry: inputs by name, then outputs; sums over rows have none."""
    found: list[tuple[str, Access | None]] = [(i.name, a) for i, a in zip(p.program.inputs, p.loads)]
    for o, a in zip(p.program.outputs, p.stores):
        found.append((o.name if o.name not in p.program.input else f"out_{o.name}", None if o.over_rows else a))
    return found
