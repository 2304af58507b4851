"""Triton's interpreter, which the tests run in, with less to do: it puts its functions in place of the language's once for a launch.

By itself it does so at every call of one ``@triton.jit`` function by another, a quarter of its time.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return                                                             # another Triton: as it is
    original, done = interpreter._patch_lang, set()

    def patch(function: Any) -> Any:
        seen = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if seen in done:
            return interpreter._LangPatchScope()                           # with nothing to take back
        scope = original(function)
        done.add(seen)
        take_back = scope.restore

        def restore() -> None:
            done.clear()
            take_back()

        scope.restore = restore
        return scope

    interpreter._patch_lang = patch
