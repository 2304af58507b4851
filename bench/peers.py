"""Which model types the peers' packages patch, and what in them: read from their source, which is neither imported nor run."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LIGER = "liger_kernel/transformers/monkey_patch.py"
UNSLOTH = "unsloth/models/"
PACKAGES = {"liger": "liger-kernel", "unsloth": "unsloth"}
# The argument of Liger's functions -> what sloth calls it.
ARGUMENTS = {
    "rms_norm": "rms_norm", "layer_norm": "layer_norm", "rope": "rope", "swiglu": "gated_mlp", "geglu": "gated_mlp",
    "relu_squared": "rowwise", "cross_entropy": "cross_entropy", "fused_linear_cross_entropy": "cross_entropy",
}  # fmt: skip
# Unsloth's kernels -> what sloth calls it.
KERNELS = {
    "fast_rms_layernorm": "rms_norm", "fast_layernorm": "layer_norm", "fast_rope_embedding": "rope", "apply_lora_mlp_swiglu": "gated_mlp",
    "apply_lora_mlp_geglu_approx": "gated_mlp", "apply_lora_qkv": "lora_linear", "apply_lora_o": "lora_linear",
    "fast_cross_entropy_loss": "cross_entropy", "unsloth_fused_ce_loss": "cross_entropy",
}  # fmt: skip
Kinds = dict[str, list[str]]


def read(wheels: Path | None) -> dict[str, Any]:
    """For each peer its package, version and ``models``: model type -> kinds. From the wheels in a folder, or what is installed."""
    found = {}
    for peer, package in PACKAGES.items():
        version, sources = _wheel(wheels, package) if wheels else _installed(package)
        models = liger(sources[LIGER]) if peer == "liger" else unsloth(sources)
        found[peer] = {"package": package, "version": version, "models": models}
    return found


def _wanted(path: str) -> bool:
    return path == LIGER or (path.startswith(UNSLOTH) and path.count("/") == 2 and path.endswith(".py"))


def _wheel(folder: Path, package: str) -> tuple[str, dict[str, str]]:
    paths = sorted(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    if not paths:
        raise FileNotFoundError(f"no wheel of {package} in {folder}: pip download --no-deps -d {folder} {package}")
    with zipfile.ZipFile(paths[-1]) as wheel:
        return paths[-1].name.split("-")[1], {n: wheel.read(n).decode() for n in wheel.namelist() if _wanted(n)}


def _installed(package: str) -> tuple[str, dict[str, str]]:
    files = importlib.metadata.files(package) or ()
    return importlib.metadata.version(package), {str(f): f.read_text() for f in files if _wanted(str(f))}


def liger(source: str) -> Kinds:
    """The entries of MODEL_TYPE_TO_APPLY_LIGER_FN, each with what its function patches when it is called without arguments."""
    tree = ast.parse(source)
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    (table,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "MODEL_TYPE_TO_APPLY_LIGER_FN")
    assert isinstance(table, ast.Dict)
    kinds = {name: {ARGUMENTS[a] for a in _patched(name, functions) if a in ARGUMENTS} for name in map(ast.unparse, table.values)}
    return {ast.literal_eval(k): sorted(kinds[ast.unparse(v)]) for k, v in zip(table.keys, table.values) if k}


def _patched(name: str, functions: Mapping[str, ast.FunctionDef]) -> set[str]:
    """The arguments that are on by default and do something, there or in the function of the text model that they are passed to."""
    body, args = functions[name].body, functions[name].args
    on = {a.arg for a, d in zip(args.args[len(args.args) - len(args.defaults) :], args.defaults) if ast.unparse(d) == "True"}
    acts = {ast.unparse(n.test).split(" ")[0] for n in body if isinstance(n, ast.If) and not all(map(_idle, n.body))}
    for call in (n.value for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)):
        other = ast.unparse(call.func)
        if other in functions and other.startswith("apply_liger_kernel_to"):
            given = {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}
            acts |= {given[a] for a in _patched(other, functions) if a in given}
    return on & acts


def _idle(statement: ast.stmt) -> bool:
    """Whether it patches nothing: a raise, or a line for the log."""
    return isinstance(statement, ast.Raise) or (isinstance(statement, ast.Expr) and "logger." in ast.unparse(statement))


def unsloth(sources: Mapping[str, str]) -> Kinds:
    """The model types that the loader has a class for, each with the kernels that the class and its bases come to by name."""
    loader = ast.parse(sources[f"{UNSLOTH}loader.py"])
    known: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path, text in sources.items():
        if path.startswith(UNSLOTH):
            for node in ast.parse(text).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    known.setdefault(node.name, set()).update(_names(node))
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = [ast.unparse(b) for b in node.bases]
    return {kind: _kernels(made, known) for kind, made in _dispatched(loader)}


def _dispatched(loader: ast.Module) -> Iterable[tuple[str, str]]:
    """(model type, class) of each ``if model_type == "x": dispatch_model = FastXModel``."""
    for node in ast.walk(loader):
        if isinstance(node, ast.If) and (kind := re.fullmatch(r"model_type == '(\w+)'", ast.unparse(node.test))):
            for statement in node.body:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "dispatch_model":
                    made = re.match(r"\w+", ast.unparse(statement.value))
                    if made:
                        yield kind[1], made[0]


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _kernels(start: str, known: Mapping[str, set[str]]) -> list[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += known.get(name, ())
    return sorted({KERNELS[n] for n in seen if n in KERNELS})
