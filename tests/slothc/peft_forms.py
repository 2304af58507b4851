"""The forms that PEFT gives a model: each a function from a tiny base model to the adapted one, no adapter at its zero start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import tiny_models as tm
import torch
from torch import nn

FRESH = ("lora_B", "lora_embedding_A", "lora_embedding_B", "hada_", "lokr_", "vera_lambda", "ia3", "lora_E", "oft_")


def woken(model: Any, seed: int = 5) -> Any:
    """``model`` in train mode, with everything that PEFT starts at a constant moved away from it."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in FRESH):
                p.add_((torch.randn(p.shape, generator=made) * 0.05).to(p))
    return model.train()


def _lora(base: nn.Module, fp32: bool = False, **settings: Any) -> Any:
    torch.manual_seed(3)
    given = {"r": 8, "task_type": "CAUSAL_LM", "target_modules": tm.TARGETS.get(base.config.model_type, "all-linear"), **settings}
    return woken(peft.get_peft_model(base, peft.LoraConfig(**given), autocast_adapter_dtype=fp32))


def _two(base: nn.Module) -> Any:
    """Two adapters of different rank and scale on every linear, the first one active."""
    dtype, targets = base.dtype, tm.TARGETS.get(base.config.model_type, "all-linear")
    model = _lora(base)
    model.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM"))
    return woken(model, seed=6).to(dtype)


def _both(base: nn.Module) -> Any:
    model = _two(base)
    model.base_model.set_adapter(["default", "second"])
    return model


def _second(base: nn.Module) -> Any:
    model = _two(base)
    model.set_adapter("second")
    return model


def _unmerged(base: nn.Module) -> Any:
    model = _lora(base)
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def _place(base: nn.Module, module: nn.Module) -> str:
    """The last part of a module's name, as PEFT's targets are written."""
    return next(n for n, m in base.named_modules() if m is module).rsplit(".", 1)[-1]


def _embedding(base: nn.Module) -> Any:
    return _lora(base, target_modules=[_place(base, base.get_input_embeddings()), *_linears(base)])


def _head(base: nn.Module) -> Any:
    return _lora(base, target_modules=[_place(base, base.get_output_embeddings()), *_linears(base)])


def _saved(base: nn.Module) -> Any:
    """The head and the last norm are trained whole, beside the adapters."""
    head = _place(base, base.get_output_embeddings())
    norms = [n for n, m in base.named_modules() if "Norm" in type(m).__name__ and not any(part.isdigit() for part in n.split("."))]
    return _lora(base, modules_to_save=[head, *(n.rsplit(".", 1)[-1] for n in norms[-1:])])


def _linears(base: nn.Module) -> list[str]:
    """The names of two linears of each layer."""
    wanted = tm.TARGETS.get(base.config.model_type)
    head = base.get_output_embeddings()
    names = [n.rsplit(".", 1)[-1] for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]
    known = [n for n in dict.fromkeys(names) if n in wanted] if isinstance(wanted, list) else list(dict.fromkeys(names))
    return known[:2]


def _virtual(kind: type[Any], **settings: Any) -> Callable[[nn.Module], Any]:
    def make(base: nn.Module) -> Any:
        torch.manual_seed(3)
        chosen = kind(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings)
        return peft.get_peft_model(base, chosen, autocast_adapter_dtype=False).train()

    return make


def _other(kind: type[Any], **settings: Any) -> Callable[[nn.Module], Any]:
    def make(base: nn.Module) -> Any:
        torch.manual_seed(3)
        chosen = {"target_modules": _linears(base), **settings}
        return woken(peft.get_peft_model(base, kind(task_type="CAUSAL_LM", **chosen), autocast_adapter_dtype=False))

    return make


def _ia3(base: nn.Module) -> Any:
    names = _linears(base)
    return _other(peft.IA3Config, target_modules=names, feedforward_modules=names[-1:])(base)


def _adalora(base: nn.Module) -> Any:
    model = _other(peft.AdaLoraConfig, init_r=8, target_r=4, total_step=100)(base)
    for name, p in model.named_parameters():
        if "ranknum" in name:           # a count, which PEFT lets be trained
            p.requires_grad_(False)
    return model


LORA: dict[str, Callable[[nn.Module], Any]] = {
    "lora": _lora,
    "dropout": lambda base: _lora(base, lora_dropout=0.3),
    "bias all": lambda base: _lora(base, bias="all"),
    "bias lora_only": lambda base: _lora(base, bias="lora_only"),
    "lora_bias": lambda base: _lora(base, lora_bias=True),
    "rslora": lambda base: _lora(base, use_rslora=True),
    "fp32": lambda base: _lora(base, fp32=True),
    "fp32 dropout": lambda base: _lora(base, fp32=True, lora_dropout=0.3),
    "two active": _both,
    "second active": _second,
    "unmerged": _unmerged,
    "dora": lambda base: _lora(base, use_dora=True, target_modules=_linears(base)[:1], layers_to_transform=[0]),
    "embedding": _embedding,
    "lm_head": _head,
    "modules_to_save": _saved,
}
OTHER: dict[str, Callable[[nn.Module], Any]] = {
    "prompt": _virtual(peft.PromptTuningConfig),
    "prefix": _virtual(peft.PrefixTuningConfig),
    "p-tuning": _virtual(peft.PromptEncoderConfig, encoder_hidden_size=16),
    "ia3": _ia3,
    "loha": _other(peft.LoHaConfig, r=4),
    "lokr": _other(peft.LoKrConfig, r=4),
    "vera": _other(peft.VeraConfig, r=8),
    "adalora": _adalora,
    "oft": _other(peft.OFTConfig, r=0, oft_block_size=8),
}
FORMS = {**LORA, **OTHER}
