"""Compiles the kernels of representative plans and those of attention for one GPU target, on a machine that needs no GPU:
``compile_for.py cuda 90 32``, or with ``0/2`` behind it only every other form's plans, with ``1/2`` the others'.

Prints one JSON line for each kernel: whose it is ("rows", "heads", "tiles", "thin", "packed", "sums", "segments", "moved",
"four bits", "rescaled" or "scores"), its name, whether it compiled, bytes of shared memory and how many it may have, and the error's text.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
import triton
from compile_scores import kernels
from contract import case
from forms import FORMS
from slothc.gradients.plan import Pass
from slothc.kernels import (
    cache,
    column_sums,
    column_sums_kernel,
    four_bit,
    four_bit_kernel,
    joined,
    joined_kernel,
    moved,
    moved_kernel,
    packed,
    packed_kernel,
    rescaled,
    rescaled_kernel,
    segments,
    segments_kernel,
    thin,
    thin_kernel,
    triton_arguments,
    triton_pieces,
    triton_source,
    vocab_blocks,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTER = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "i64": "*i64", "i32": "*i32", "bool": "*i1"}
LOOPS = ("rms_norm", "add_norm", "layer_norm", "softmax", "largest", "chained", "total")
SMALL, HOPPER = 48 * 1024, 227 * 1024                                     # bytes of shared memory that a program may have
SHORT = ("scalars", "rope of learned angles", "by_sequence")              # some operands have row axes of size 1 only


def plans() -> Iterator[tuple[str, Pass, triton_arguments.Groups, bool, int]]:
    """(name, pass, merged row axes, loop kernel?, blocks that hold a row) for every kernel."""
    for f in FORMS:
        c = case(f.function, f.draw(torch.bfloat16), f.fixed)
        for label, p in zip(("forward", "backward"), c.passes()):
            apart = tuple((a,) for a in range(len(p.axes)))
            yield f"{f.name} {label}", p, apart, False, 1
            if f.name in SHORT:
                yield f"{f.name} {label}, one row axis", p, apart[:1], False, 1
            if f.name in LOOPS:
                yield f"{f.name} {label}, long rows", p, (sum(apart, ()),), True, 1
                if triton_source.splits(p):
                    yield f"{f.name} {label}, in blocks", p, apart, False, 2


def heads() -> Iterator[tuple[str, Pass, triton_arguments.Groups, bool, int]]:
    """A frozen head's: blocks of logits with a maximum and without one, and what comes after them."""
    for chain in ("bf16; cast fp32", "bf16; div 30.0 bf16; tanh bf16; mul 30.0 bf16", "fp32"):
        for loop, pieces in ((False, 1), (False, 2), (True, 1)):
            yield f"block of {chain}{', long' * loop}", vocab_blocks.block_plan(chain), ((0,),), loop, pieces
        yield f"closing of {chain}", vocab_blocks.closing_plan(chain, -100), ((0,),), False, 1


def signature(p: Pass, kernel: Any) -> dict[str, str]:
    """The type of each argument of the kernel."""
    types = {f"in{t}": POINTER[o.dtype] for t, o in enumerate(p.reads)} | {f"out{t}": POINTER[o.dtype] for t, o in enumerate(p.writes)}
    found = {}
    for name in kernel.arg_names:
        if name.startswith(("BLOCK_", "EVEN_")) or name in ("WIDE", "STAGES"):
            found[name] = "constexpr"
        elif name.startswith(("sum_", "part_")):
            found[name] = "*fp32"
        else:
            found[name] = types.get(name, "i32")
    return found


def planned(name: str, p: Pass, groups: triton_arguments.Groups, loop: bool, pieces: int, target: GPUTarget) -> dict[str, Any]:
    kernel = cache.load("compile_for", triton_source.source(p, groups, loop, pieces=pieces, nvidia=target.backend == "cuda")).kernel
    lanes = dict(zip(triton_pieces.block_names(pieces), (1024 if loop else 64, 16)))
    values = {"BLOCK_R": 1 if loop else 2, **lanes, "WIDE": "layer_norm" in name, "STAGES": 3}
    values |= {"EVEN_R": pieces == 1, "EVEN_L": pieces == 1}
    return built(name, kernel, signature(p, kernel), values, {"num_warps": 4}, SMALL, target)


def tiles() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """joined and summed: both layouts of a weight, both dtypes of the low-rank factors, few and many columns of them, a bias and none."""
    blocks = {"BLOCK_M": joined.BLOCK_M, "BLOCK_N": joined.BLOCK_N, "BLOCK_K": joined.BLOCK_K, "GROUP": joined.GROUP, "PROGRAMS": 132}
    m, n, k = joined.BLOCK_M, joined.BLOCK_N, joined.BLOCK_K
    one, many = joined_kernel.joined, joined_kernel.summed
    cases = ((one, True, "bf16", 16), (one, False, "fp32", joined.CHUNK), (many, False, "bf16", 32), (many, False, "fp32", joined.CHUNK))
    for kernel, nk, factors, rank in cases:
        values = {**blocks, "RANK": rank, "ONCE": rank <= joined.FETCHED, **({"NK": nk, "BIAS": nk} if "NK" in kernel.arg_names else {})}
        shapes = {"x": (m, k), "w": (n, k) if nk else (k, n), "y": (m, n // 2)}
        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys("ab", POINTER[factors]) | {"c": POINTER["bf16"], "alpha": "fp32"}
        types |= {a: f"tensordesc<bf16{list(shapes[a[0]])}>" for a in kernel.arg_names if a.rstrip("012") in shapes}
        types = {a: "constexpr" if a in values else types[a] for a in kernel.arg_names}
        name = f"{kernel.__name__} {'nk' if nk else 'kn'} {factors} {rank}"
        yield name, kernel, types, values, {"num_warps": 8, "num_stages": joined.STAGES}, HOPPER


def thin_products(backend: str, arch: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """thin: both products of three gradients, and one of each, with factors in both dtypes; and the sum of their parts."""
    for factors in ("bf16", "fp32"):
        for count, across, down, rank in ((3, True, True, 16), (1, True, False, thin.WIDEST), (1, False, True, thin.WIDEST)):
            block_m = thin.BLOCK_M if rank < thin.WIDEST else thin.BLOCK_M // 2
            values = {"COUNT": count, "ACROSS": across, "DOWN": down, "RANK": rank, "BLOCK_M": block_m, "BLOCK_N": thin.BLOCK_N}
            values |= {"STAGES": thin.STAGES if backend == "cuda" else 1, "sd_r" if across else "sd_n": 1}
            types = dict.fromkeys(thin_kernel.thin.arg_names, "i32") | {"u": "*fp32", "d": "*fp32", "t": POINTER[factors]}
            types |= {f"{a}{k}": POINTER[factors if a == "b" else "bf16"] for a in "gb" for k in range(3)}
            types |= dict.fromkeys(values, "constexpr")
            name = f"thin of {count} {factors}{' across' * across}{' down' * down}"
            yield name, thin_kernel.thin, types, values, {"num_warps": thin.WARPS}, HOPPER if backend == "cuda" else 64 * 1024
        values = {"COUNT": 3, "TURNED": False, "BLOCK": thin.BLOCK, "PARTS": thin.PARTS, "WAITS": arch == "90"}
        types = dict.fromkeys(thin_kernel.add.arg_names, "i32") | {"u": "*fp32", "d": "*fp32"} | dict.fromkeys(("s0", "s1", "s2"), "fp32")
        types |= dict.fromkeys(("across", "down"), POINTER[factors]) | dict.fromkeys(values, "constexpr")
        yield f"add {factors}", thin_kernel.add, types, values, {"num_warps": 4}, SMALL


def packing() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    pack, scaled = packed_kernel.pack, packed_kernel.scaled
    types = {"v": "*fp32", "high": "*i16", "low": "*u8", "TOTAL": "i32", "BLOCK": "constexpr"}
    yield "pack", pack, types, {"BLOCK": packed.BLOCK}, {"num_warps": 4}, SMALL
    types = {"high": "*i16", "low": "*u8", "by": "*fp32", "out": "*bf16", "TOTAL": "i32", "WIDTH": "i32", "EACH": "constexpr"}
    types["BLOCK"] = "constexpr"
    yield "scaled", scaled, types, {"EACH": True, "BLOCK": packed.BLOCK}, {"num_warps": 4}, SMALL


def partial_sums(arch: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    for out, rows in (("bf16", 256), ("fp32", 1024)):
        values = {"COUNT": column_sums.COUNT, "BLOCK_P": rows, "BLOCK_L": column_sums.LANES, "WAITS": arch == "90"}
        values |= {"step0": 1, "stride0": 1}
        types = dict.fromkeys(column_sums_kernel.column_sums.arg_names, "i32") | dict.fromkeys(("p0", "p1", "p2", "p3"), "*fp32")
        types |= dict.fromkeys(("y0", "y1", "y2", "y3"), POINTER[out]) | dict.fromkeys(values, "constexpr")
        yield f"column sums {out}", column_sums_kernel.column_sums, types, values, {"num_warps": rows * column_sums.LANES // 1024}, SMALL


def segment_sums() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """count, place and total: both widths of an index, one that counts from the end."""
    tables = dict.fromkeys(("counts", "sums", "order"), "*i32") | {"rows": "*fp32", "out": "*bf16"}
    wholes = {"LENGTH": segments.LENGTH, "MINE": segments.MINE, "OTHERS": segments.OTHERS, "BLOCK": segments.BLOCK, "ROWS": 4}
    for kernel in (segments_kernel.count, segments_kernel.place, segments_kernel.total):
        for index, signed in (("*i64", True), ("*i32", False)) if "index" in kernel.arg_names else (("", False),):
            known = wholes | {"SIGNED": signed, "STAGES": segments.STAGES}
            known |= {"BLOCK": segments.TILE // 4} if kernel is segments_kernel.total else {}
            values = {a: v for a, v in known.items() if a in kernel.arg_names}
            types = {a: "constexpr" if a in values else index if a == "index" else tables.get(a, "i32") for a in kernel.arg_names}
            yield f"{kernel.__name__} {index}", kernel, types, values, {"num_warps": 4}, SMALL


def moving() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    for index in ("*i64", "*i32"):
        types = {"rows": "*bf16", "index": index, "out": "*bf16", "N": "i32", "WIDTH": "i32", "ROWS": "constexpr", "BLOCK": "constexpr"}
        yield f"move {index}", moved_kernel.move, types, {"ROWS": 4, "BLOCK": moved.WIDEST}, {"num_warps": 4}, SMALL


def four_bits() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    for nested, scales in ((True, "*u8"), (False, "*fp32")):
        types = {"q": "*u8", "s": scales, "s2": "*fp32", "code": "*fp32", "offset": "*fp32", "table": "*fp32", "w": "*bf16", "BYTES": "i32"}
        values = {"HALF": 32, "SHARED": four_bit.NESTED, "NESTED": nested, "BLOCKS": four_bit.PROGRAM // 32}
        options = {"num_warps": 1, "enable_fp_fusion": False}
        yield f"whole {scales}", four_bit_kernel.whole, types | dict.fromkeys(values, "constexpr"), values, options, SMALL


def rescaling() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    types = {"a": "*fp32", "by": "*fp32", "WIDTH": "i32", "BLOCK": "constexpr"}
    yield "rescale", rescaled_kernel.rescale, types, {"BLOCK": rescaled.BLOCK}, {"num_warps": 4}, SMALL


def built(
    name: str, kernel: Any, types: dict[str, str], values: dict[str, Any], options: dict[str, Any], limit: int, target: GPUTarget
) -> dict[str, Any]:
    """``limit``: bytes of shared memory that it may take."""
    constants = {(k,): values[n] for k, n in enumerate(kernel.arg_names) if n in values}
    even = {n for n in types if types[n].startswith("*") or n.startswith("s")}
    even |= {"N0", "N1", "N2", "CHUNK", "R"} if kernel is thin_kernel.thin else set()
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(kernel.arg_names) if n in even and n not in values}
    try:
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=target, options=options)
    except Exception as error:
        return {"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[-2000:]}
    binary = "hsaco" if target.backend == "hip" else "cubin"
    return {"name": name, "ok": binary in made.asm, "shared": made.metadata.shared, "limit": limit}


def main(backend: str, arch: str, warp: str, part: str = "0/1") -> None:
    torch.set_num_threads(1)
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    mine, parts = map(int, part.split("/"))
    for plan in (p for k, p in enumerate(plans()) if k // 2 % parts == mine):
        print(json.dumps({"of": "rows", **planned(*plan, target)}), flush=True)
    for plan in (p for k, p in enumerate(heads()) if k % parts == mine):
        print(json.dumps({"of": "heads", **planned(*plan, target)}), flush=True)
    for kernel in tiles() if arch == "90" else ():                         # they need Hopper's copy engine
        print(json.dumps({"of": "tiles", **built(*kernel, target)}), flush=True)
    for kernel in thin_products(backend, arch) if arch not in ("75", "80") else ():   # Turing's take the library, Ampere's are as Hopper's
        print(json.dumps({"of": "thin", **built(*kernel, target)}), flush=True)
    for kernel in partial_sums(arch):
        print(json.dumps({"of": "sums", **built(*kernel, target)}), flush=True)
    for kernel in packing():
        print(json.dumps({"of": "packed", **built(*kernel, target)}), flush=True)
    for kernel in segment_sums():
        print(json.dumps({"of": "segments", **built(*kernel, target)}), flush=True)
    for kernel in moving():
        print(json.dumps({"of": "moved", **built(*kernel, target)}), flush=True)
    for kernel in four_bits():
        print(json.dumps({"of": "four bits", **built(*kernel, target)}), flush=True)
    for kernel in rescaling():
        print(json.dumps({"of": "rescaled", **built(*kernel, target)}), flush=True)
    for kernel in kernels(arch):
        print(json.dumps({"of": "scores", **built(*kernel, target)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
