"""The systems that are compared and the models they train: the same weights, adapters and batches for each."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # slothc, when it isn't installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_DISABLE_AUTO_UPDATES", "1")

SYSTEMS = ("eager", "dynamo-eager", "inductor", "liger", "unsloth", "sloth", "sloth-graphs")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS_OF = {
    "nanochat_d32": "all-linear",
    "starcoder2_3b": "all-linear",
    "falcon_h1_1b": [*TARGETS, "in_proj"],  # PEFT refuses a mixer's out_proj
}
_LLAMA3 = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# (transformers config class, what differs from its defaults)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama8b": ("LlamaConfig", {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "llama1b": (
        "LlamaConfig",
        {
            **_LLAMA3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_8b": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
        },
    ),
    "gemma2_2b": ("Gemma2Config", {}),
    "moe3b": (  # 16 experts, two of them for each token
        "MixtralConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 1536,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 8192,
            "sliding_window": None,
        },
    ),
    "cohere2_4b": (  # Command R7B, half as deep
        "Cohere2Config",
        {
            "vocab_size": 256000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
    "nanochat_d32": (
        "NanoChatConfig",
        {
            "vocab_size": 65536,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 2048,
        },
    ),
    "starcoder2_3b": (
        "Starcoder2Config",
        {
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "apertus_4b": (  # Apertus 8B, half as deep
        "ApertusConfig",
        {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 21504,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 65536,
        },
    ),
    "falcon_h1_1b": (  # Falcon-H1-1.5B
        "FalconH1Config",
        {
            "vocab_size": 65536,
            "hidden_size": 2048,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "mamba_d_state": 256,
            "max_position_embeddings": 8192,
        },
    ),
    "tiny": (
        "LlamaConfig",
        {
            "vocab_size": 1024,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "initializer_range": 0.1,  # outputs near 1, as in a wide model: what curve.py shows depends on it
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
    ),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained: shared by the scripts that train a whole model."""
    parser.add_argument("--model", choices=SHAPES, default="llama1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--attn", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument(
        "--sloth-options", type=json.loads, default={}, metavar="JSON", help='such as {"rest": "inductor"}'
    )


def config(name: str, layers: int | None = None) -> Any:
    import transformers

    kind, fields = SHAPES[name]
    made = getattr(transformers, kind)(**fields, **_TOKENS, use_cache=False)
    if layers:
        made.num_hidden_layers = layers
        if getattr(made, "layer_types", None):
            made.layer_types = made.layer_types[:layers]
    return made


def base_model(name: str, device: str, *, layers: int | None = None, attn: str = "sdpa") -> Any:
    """A seeded bf16 model, built on its device: the same weights in every process on the same device."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(name, layers), dtype=torch.bfloat16, attn_implementation=attn)
    return model.train()


def in_four_bits(model: Any) -> Any:
    """Every linear but the head in NF4 with its scales in eight bits, as ``BitsAndBytesConfig`` loads it for QLoRA."""
    import bitsandbytes as bnb
    import torch

    for name, module in [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear]:
        if module is model.get_output_embeddings():
            continue
        weight = module.weight.data
        made = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)
        made.bias = module.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made.to(weight.device))
    model.is_loaded_in_4bit = True                     # PEFT then takes its layers for such a base
    return model


def prepared(model: Any, *, checkpointing: bool) -> Any:
    """As PEFT's recipe for QLoRA leaves it: what is not in four bits is in fp32 and frozen."""
    from peft import prepare_model_for_kbit_training

    options = {"use_reentrant": False}
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=options)


def with_adapters(model: Any, name: str, *, fp32: bool) -> Any:
    """LoRA r=16 on all linears of a layer, values seeded by name. ``fp32`` keeps adapters wider than the base."""
    from peft import LoraConfig, get_peft_model

    targets = TARGETS_OF.get(name, TARGETS)
    adapters = LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
    return seeded_adapters(get_peft_model(model, adapters, autocast_adapter_dtype=fp32))


def seeded_adapters(model: Any) -> Any:
    """Give every lora_A the values that its name decides, so that building them in another order is the same."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name[name.index("layers.") :].encode()))
                bound = 1 / math.sqrt(parameter.shape[1])
                values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(values)
    return model


def patch_liger(name: str) -> None:
    """Liger replaces the classes of one architecture, before the model is built."""
    import liger_kernel.transformers as liger

    family = SHAPES[name][0].removesuffix("Config").lower()
    getattr(liger, f"apply_liger_kernel_to_{family}")()


def compiled(system: str, model: Any, sloth_options: dict[str, Any]) -> Callable[..., Any]:
    """What a step calls: the model itself, or its compiled form."""
    import torch

    if system == "inductor":
        return torch.compile(model)
    if system == "dynamo-eager":
        return torch.compile(model, backend="eager")
    if system in ("sloth", "sloth-graphs"):
        import slothc  # noqa: F401  registers the backend in a checkout that isn't installed

        options = {**sloth_options, "cuda_graphs": True} if system == "sloth-graphs" else sloth_options
        return torch.compile(model, backend="sloth", options=options)
    return model


def batches(vocabulary: int, batch: int, seq: int, device: str, count: int = 4) -> list[Any]:
    import torch

    generator = torch.Generator(device=device).manual_seed(1)
    return [torch.randint(4, vocabulary, (batch, seq), device=device, generator=generator) for _ in range(count)]


def environment(device: str) -> dict[str, str]:
    """Versions and device, to be kept beside every figure."""
    import importlib.metadata
    import platform

    import torch

    cpu = f"CPU, {torch.get_num_threads()} threads"
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "transformers", "peft", "liger-kernel", "unsloth", "cut-cross-entropy", "bitsandbytes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
