"""Generated source as readable files in a private folder, loaded as modules."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def folder() -> Path:
    """``$SLOTH_CACHE_DIR``, or ``sloth`` in the user's cache folder: owned by the user, mode 0700.

    A folder that somebody else owns or can write to is not trusted; a fresh temporary one is used in its place.
    """
    base = os.environ.get("SLOTH_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "sloth"
    )
    path = Path(base)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
        mine = not hasattr(os, "getuid") or (info.st_uid == os.getuid() and stat.S_ISDIR(info.st_mode))
        if mine and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return Path(_private())


_temporary: list[str] = []


def _private() -> str:
    if not _temporary:
        _temporary.append(tempfile.mkdtemp(prefix="sloth-"))
    return _temporary[0]


def load(name: str, source: str) -> ModuleType:
    """The module whose text is ``source``; written once, atomically, under a name that holds its hash."""
    full = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    key = f"_sloth_generated.{full}"
    if key in sys.modules:
        return sys.modules[key]
    path = folder() / f"{full}.py"
    if not path.exists() or path.read_text() != source:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as f:
            f.write(source)
        os.replace(temporary, path)                                       # many processes may start at once
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[key] = module
    return module
