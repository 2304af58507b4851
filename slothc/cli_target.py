"""From what a user types to a model and one step's inputs: a config, built small or at full size without memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from . import tiny

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LENGTH = {"tiny": 32, "full": 2048}


def load_config(target: str) -> PreTrainedConfig:
    """The config of a directory or a model type's defaults. Anything else is a usage error with the allowed values."""
    from transformers import AutoConfig

    if (Path(target) / "config.json").is_file():
        return AutoConfig.from_pretrained(target)
    if Path(target).is_dir():
        raise click.BadParameter(f"the directory {target!r} has no config.json", param_hint="TARGET")
    if target not in tiny.config_names():
        known = f"a directory with a config.json nor one of the model types {', '.join(tiny.config_names())}"
        raise click.BadParameter(f"{target!r} is neither {known}", param_hint="TARGET")
    return AutoConfig.for_model(target)


def build(target: str, *, size: str, batch: int, seq: int | None, peft: str | None, dtype: str,
          ) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(model in train mode, keyword arguments of one step with labels) for what was typed.

    ``tiny`` is on the CPU with seeded random weights. ``full`` is on the meta device: shapes only, no memory.
    """
    from .survey_child import inputs

    config, device = load_config(target), torch.device("meta" if size == "full" else "cpu")
    model = _model(config, size, device, DTYPES[dtype])
    given = inputs(model, 0, batch, min(seq or _LENGTH[size], _longest(model.config)))
    if peft == "lora":
        model = _with_lora(model)
    return model.train(), {name: t.to(device) for name, t in given.items()}


def _model(config: PreTrainedConfig, size: str, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    try:
        chosen = tiny.causal_config(config)
        chosen = tiny.shrink(chosen) if size == "tiny" else chosen
        chosen.use_cache = False
        with device:
            return tiny.causal_class(config.model_type)._from_config(chosen, dtype=dtype)
    except (ValueError, ImportError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise click.ClickException(f"transformers cannot build {config.model_type!r} here: {error}") from error


def _with_lora(model: torch.nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapters)


def _longest(config: PreTrainedConfig) -> int:
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30)
