"""``python -m slothc``: the same as the ``slothc`` command."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
