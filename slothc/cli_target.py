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
    config = load_config(target)
    if size == "tiny":
        config = tiny.shrink(config)
    config.use_cache = False
    model = _model(config, torch.device("meta" if size == "full" else "cpu"), DTYPES[dtype])
    if peft == "lora":
        model = _with_lora(model)
    length = min(seq or _LENGTH[size], _longest(config))
    shape = (batch, length)
    ids = torch.empty(shape, dtype=torch.int64, device="meta")
    if size == "tiny":
        ids = torch.randint(5, min(200, _vocabulary(config)), shape, generator=torch.Generator().manual_seed(0))
    return model.train(), {"input_ids": ids, "labels": ids.clone()}


def _model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, ImportError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise click.ClickException(f"transformers cannot build {config.model_type!r} here: {error}") from error


def _with_lora(model: torch.nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapters)


def _longest(config: PreTrainedConfig) -> int:
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30)


def _vocabulary(config: PreTrainedConfig) -> int:
    return int(config.get_text_config().vocab_size)
