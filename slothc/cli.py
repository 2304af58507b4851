"""Entry point of the ``slothc`` command. The commands themselves are in cli_app.py, which needs the ``cli`` extra."""

from __future__ import annotations

import sys

_EXTRAS = {"click": "cli", "rich": "cli", "jinja2": "cli", "transformers": "cli", "peft": "demo", "gguf": "demo", "matplotlib": "demo"}


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 something failed, 2 wrong usage or a missing package."""
    try:
        from .cli_app import group

        group(prog_name="slothc")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        print(f"slothc: the package {error.name!r} is missing: pip install 'slothc[{extra}]'", file=sys.stderr)
        sys.exit(2)
