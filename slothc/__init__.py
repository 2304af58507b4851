"""sloth: ``torch.compile(model, backend="sloth")`` makes fine-tuning of any causal language model fast and small."""

import os as _os

# From a checkout, ``slothc.kernels`` lives beside this folder, not in it: add the parent to the package's search path.
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "kernels")):
    __path__.append(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))

from .backend import register, sloth  # noqa: E402
from .explain import explain  # noqa: E402
from .report import Report  # noqa: E402
from .version import __version__  # noqa: E402

register()

__all__ = ["Report", "__version__", "explain", "sloth"]
