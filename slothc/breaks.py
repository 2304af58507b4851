"""Why Dynamo stopped in the middle of a model, and what in the user's code makes it go on."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .view_location import innermost

TRACE = "TORCH_LOGS=graph_breaks shows the calls that lead there"
SCALARS = "keep it a tensor (torch.where in place of if), or set torch._dynamo.config.capture_scalar_outputs = True"
BRANCHES = "use torch.where or torch.cond, or decide outside forward"

# (Dynamo's type of break, a word of its text, the cause, the remedy); the first that fits counts
CAUSES = (
    ("logging.Logger method", "loss_type", "a logger line about `loss_type`", 'set model.loss_type = "ForCausalLM" before compiling'),
    ("logging.Logger method", "", "a logger line",
     "log outside forward, or add the method to torch._dynamo.config.ignore_logging_functions"),
    ("Dynamic shape operator", "nonzero", "nonzero, or a boolean mask as index: the size depends on values",
     "multiply by the mask or use torch.where; for experts model.set_experts_implementation(\"grouped_mm\") where the model has it; or set "
     "torch._dynamo.config.capture_dynamic_output_shape_ops = True"),
    ("Dynamic shape operator", "", "an operation whose size depends on values",
     "use one of fixed size, or set torch._dynamo.config.capture_dynamic_output_shape_ops = True"),
    ("Data-dependent branching", "", "a branch that depends on a tensor's values", BRANCHES),
    ("generic_jump", "", "a branch that depends on a tensor's values", BRANCHES),
    ("Data-dependent assertion", "", "an assert on a tensor's values", "check the inputs outside forward, or use torch._check"),
    ("Data dependent operator", "", "a number read from a tensor (.item(), .tolist(), int())", SCALARS),
    ("Unsupported Tensor.item() call", "", "a number read from a tensor (.item())", SCALARS),
    ("Tensor.tolist()", "", "numbers read from a tensor (.tolist())", SCALARS),
    ("Tensor.numpy()", "", "a tensor handed to numpy", "use torch operations"),
    ("Attempted to call function marked as skipped", "manual_seed", "the random seed is set in forward (torch.manual_seed)",
     "seed before the call, or draw from a torch.Generator made outside forward"),
    ("Attempted to call function marked as skipped", "warn", "a Python warning", "warn outside forward, or before compiling"),
    ("Attempted to call function marked as skipped", "", "a function that Dynamo does not trace",
     "call it outside forward, or register it with torch.library.custom_op"),
    ("Attempted to inline function marked as skipped", "", "a function that Dynamo does not trace",
     "call it outside forward, or register it with torch.library.custom_op"),
    ("Unsupported python_type() call", "persistent", "a tensor is assigned to a buffer in forward",
     "use a local name (x = self.buffer.to(...)), and move the model before compiling"),
    ("Failed to set tensor attribute", "", "an attribute of a tensor is set in forward", "keep the value in a local name"),
    ("Failed to trace builtin operator", "print", "print", "print outside forward, or under torch.compiler.is_compiling()"),
    ("Call to `torch._dynamo.graph_break()`", "", "a call of torch._dynamo.graph_break()", "remove it"),
    ("Skip calling `torch.compiler.disable()`d", "", "a function that torch.compiler.disable() excludes", "remove the decorator"),
    ("Skip inlining `torch.compiler.disable()`d", "", "a function that torch.compiler.disable() excludes", "remove the decorator"),
    ("Unsupported Tensor.requires_grad_() call", "", "a tensor is made a leaf in forward (requires_grad_)",
     "model.disable_input_require_grads() where a hook of transformers does it: checkpoints with use_reentrant=False do not need it"),
    ("Module-level backwards hooks", "", "a backward hook on a module", "register hooks on tensors or parameters"),
    ("Dynamo recompile limit exceeded", "", "recompiled too often", "mark what changes with torch._dynamo.mark_dynamic"),
)  # fmt: skip
FOLLOWING = "step_unsupported"      # Dynamo's word for giving up the statement that leads to another break


@dataclass(frozen=True)
class Break:
    """One place where the captured graph ends: ``cause`` in a few words, ``remedy`` in the user's code, where, and that line of source."""

    cause: str
    remedy: str
    location: str = ""
    line: str = ""

    def __str__(self) -> str:
        at = f" at {self.location}" if self.location else ""
        return f"{self.cause}{at}; remedy: {self.remedy}"


def explained(reason: str, stack: Iterable[traceback.FrameSummary]) -> Break:
    """The break that Dynamo describes by ``reason``, its first line being the type."""
    kind = reason.strip().splitlines()[0] if reason.strip() else "unknown"
    frames = [(f.filename, f.lineno or 0, f.name, (f.line or "").strip()) for f in stack]
    location, line = innermost(frames) if frames else ("", "")
    for type_, word, cause, remedy in CAUSES:
        if kind.startswith(type_) and word in reason:
            return Break(cause, remedy, location, line)
    hint = re.search(r"^\s*Hint: (.+)$", reason, re.MULTILINE)
    return Break(kind, hint[1].rstrip(".") if hint and "Dynamo bug" not in hint[1] else TRACE, location, line)


def count(reasons: Iterable[Any]) -> dict[Break, int]:
    """Each break of ``torch._dynamo``'s list once, and how often. Dynamo comes to one as often as it has callers to give up first: only
    what it says in the function itself counts."""
    found = Counter[Break]()
    for given in reasons:
        if given.reason.strip().startswith(FOLLOWING):
            continue
        stack = list(given.user_stack)
        found[explained(given.reason, stack)] += len(stack) == 1
    return {b: max(n, 1) for b, n in found.items()}
