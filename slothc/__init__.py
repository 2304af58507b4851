"""sloth: ``torch.compile(model, backend="sloth")`` makes fine-tuning of any causal language model fast and small."""

import os as _os

# From a checkout, ``slothc.kernels`` lives beside this folder, not in it: add the parent to the package's search path.
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "kernels")):
    __path__.append(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))

from .backend import register, sloth
from .explain import explain
from .report import Report
from .version import __version__

register()

__all__ = ["Report", "__version__", "explain", "sloth"]
