"""Who may import whom, what is in the wheel, and that nothing tracked names a machine or a registry."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gradients", "kernels", "patterns", "slothc")
FORBIDDEN = {
    "gradients": r"(torch|triton|networkx|numpy|transformers)(\.|$)|slothc\.(?!gradients(\.|$))",
    "patterns": r"triton(\.|$)|slothc\.(?!gradients(\.|$)|patterns(\.|$))",
    "kernels": r"slothc\.(?!gradients(\.|$)|kernels(\.|$))",
    "slothc": r"$^",
}
BARE = re.compile(r"(kernels|patterns|gradients)(\.|$)")


def files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that ``path`` imports, at any depth."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (*(() if parts[0] == "slothc" else ("slothc",)), *parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield node.lineno, module
            if module in ("slothc", ""):
                yield from ((node.lineno, f"{module}.{a.name}") for a in node.names)


def test_relative_imports_resolve_to_their_package() -> None:
    found = {name for _, name in imports(ROOT / "gradients" / "plan.py")}
    assert {"slothc.gradients.geometry", "slothc.gradients.program"} <= found


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_arrows(folder: str) -> None:
    assert files(folder)
    forbidden = re.compile(FORBIDDEN[folder])
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(folder)
        for line, name in imports(path)
        if name != "slothc" and forbidden.match(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_bare_names() -> None:
    """A bare ``kernels`` is Hugging Face's package, which transformers imports."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in (*FOLDERS, "tests", "bench")
        for path in files(folder)
        for line, name in imports(path)
        if BARE.match(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_arrows_catch_offenders() -> None:
    for folder, name in [
        ("gradients", "torch.fx"),
        ("gradients", "slothc.kernels.x"),
        ("patterns", "slothc.kernels"),
        ("patterns", "slothc.lift"),
        ("kernels", "slothc.patterns.rule"),
        ("kernels", "slothc.backend"),
    ]:
        assert re.match(FORBIDDEN[folder], name), (folder, name)
    for folder, name in [
        ("gradients", "sympy"),
        ("patterns", "slothc.gradients"),
        ("kernels", "slothc.gradients.plan"),
        ("kernels", "triton"),
    ]:
        assert not re.match(FORBIDDEN[folder], name), (folder, name)
    assert BARE.match("kernels") and not BARE.match("slothc.kernels")


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / n for n in listed.split("\0") if n and (ROOT / n).is_file()]


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    home = re.compile(r"(?<![\w.$}])/(work|root|home|Users|mnt|srv)/\w")
    registry = re.compile(
        r"(?i)(index-url|extra-index|https?://[^\s)>\"']*(pypi|artifactory|nexus|simple/|files\.pythonhosted))"
    )
    wrong = []
    for path in _tracked():
        if path.suffix in (".png", ".ico", ".safetensors", ".lock") or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if home.search(line) or registry.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}")
    assert not wrong, "\n".join(wrong)


def test_a_checkout_imports_every_folder_under_slothc() -> None:
    for name in ("slothc.gradients.program", "slothc.patterns.rule"):
        module = importlib.import_module(name)
        assert Path(module.__file__ or "").resolve().is_relative_to(ROOT)
    code = "import slothc, importlib.util as u; print(u.find_spec('slothc.kernels').submodule_search_locations[0])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(shown).resolve() == ROOT / "kernels"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
        else:
            (source / name).write_text("")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No module named pip" in done.stderr:
        pytest.skip("pip is absent")
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_every_module_and_no_bare_name(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"slothc"}
    assert "slothc/kernels/__init__.py" not in names
    expected = {
        str(p.relative_to(ROOT)) if f == "slothc" else f"slothc/{p.relative_to(ROOT)}"
        for f in FOLDERS
        for p in files(f)
    }
    assert not expected - names, f"not packaged: {sorted(expected - names)}"


def test_the_entry_point_resolves(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    for group, line in (
        ("torch_dynamo_backends", "sloth = slothc.backend:sloth"),
        ("console_scripts", "slothc = slothc.cli:main"),
    ):
        assert f"[{group}]" in text and line in text
        module, name = line.split(" = ")[1].split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_wheel_works_away_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import slothc.gradients.reverse as r; print(r.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert shown.returncode == 0, shown.stderr
    assert str(tmp_path) in shown.stdout.splitlines()[0]
