"""How long is a training step, and how much memory does it take? Every system in a process of its own, side by side.

    python bench/train.py --model llama8b --systems eager,inductor,liger,sloth
    python bench/train.py --model tiny --device cpu --batch 2 --seq 64 --systems eager,sloth     # shows that it runs

Random weights: speed and memory do not depend on them. bf16, AdamW, batches of random tokens. The table and its JSON
and plot are left in bench/out. A system that is missing, crashes or runs out of memory or time is a row that says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import isolate
import systems
import tables


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems.add_model_arguments(parser)
    parser.add_argument("--systems", default="eager,inductor,liger,sloth", help=f"of {', '.join(systems.SYSTEMS)}")
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--ckpt", action="store_true", help="activation checkpointing (Unsloth: its offloading one)")
    parser.add_argument("--adapter-dtype", choices=["base", "fp32"], default="base")
    parser.add_argument("--base", choices=["bf16", "nf4"], default="bf16", help="how the weights under the adapters are held")
    parser.add_argument("--prepared", action="store_true", help="a base in four bits as PEFT's prepare_model_for_kbit_training leaves it")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast, as a Trainer's bf16=True (Unsloth's always has it)")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one system")
    parser.add_argument("--profile", action="store_true", help="one more step under the profiler: its top GPU kernels")
    parser.add_argument("--out", type=Path, default=tables.OUT)
    parser.add_argument("--name", help="of the files in --out")
    parser.add_argument("--saved", help=argparse.SUPPRESS)
    parser.add_argument("--child-result", help=argparse.SUPPRESS)
    found = parser.parse_args()
    unknown = set(found.systems.split(",")) - {*systems.SYSTEMS, "save"}
    if unknown:
        parser.error(f"unknown system {', '.join(sorted(unknown))}; known: {', '.join(systems.SYSTEMS)}")
    if found.prepared and found.base != "nf4":
        parser.error("--prepared is for --base nf4")
    return found


def main() -> None:
    a = arguments()
    if a.child_result:
        isolate.leave(a.child_result, lambda: save(a) if a.systems == "save" else measure(a.systems, a))
        return
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        saved = ["--saved", folder] if "unsloth" in a.systems.split(",") else []
        if saved:
            isolate.each(["save"], lambda s: isolate.child(__file__, [*given, "--systems", s, *saved], a.timeout))
        results = isolate.each(
            a.systems.split(","), lambda s: isolate.child(__file__, [*given, "--systems", s, *saved], a.timeout)
        )
    report(a, results)


def save(a: argparse.Namespace) -> isolate.Result:
    """Unsloth only loads models from disk: leave it the seeded one, with a word-level tokenizer that it insists on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = systems.base_model(a.model, a.device, layers=a.layers, attn=a.attn)
    model.save_pretrained(a.saved)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {text: i for i, text in enumerate(special.values())}
    words |= {f"w{i}": i for i in range(len(words), model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(a.saved)
    return {}


def build(system: str, a: argparse.Namespace) -> Any:
    if system == "unsloth":
        return unsloth_model(a)
    if system == "liger":
        systems.patch_liger(a.model)
    model = systems.base_model(a.model, a.device, layers=a.layers, attn=a.attn)
    if a.base == "nf4":
        model = systems.in_four_bits(model)
    if a.prepared:
        model = systems.prepared(model, checkpointing=a.ckpt)
    if a.mode == "lora":
        model = systems.with_adapters(model, a.model, fp32=a.adapter_dtype == "fp32")
    if a.ckpt:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def unsloth_model(a: argparse.Namespace) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        a.saved,
        max_seq_length=a.seq,
        dtype=torch.bfloat16,
        load_in_4bit=a.base == "nf4",
        device_map={"": 0},
        full_finetuning=a.mode == "full",
    )
    if a.mode == "full":
        return model.train()
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=systems.TARGETS,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=0,
        use_gradient_checkpointing="unsloth" if a.ckpt else False,
    )
    return systems.seeded_adapters(model).train()


def measure(system: str, a: argparse.Namespace) -> isolate.Result:
    """Train and return times (ms), memory (GiB), losses and the environment."""
    if system == "unsloth":
        import unsloth  # noqa: F401  has to come before torch and transformers
    import torch

    model = build(system, a)
    step_model = systems.compiled(system, model, a.sloth_options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    data = systems.batches(model.config.vocab_size, a.batch, a.seq, a.device)

    def step(i: int) -> torch.Tensor:
        ids = data[i % len(data)]
        with torch.autocast(a.device, torch.bfloat16, enabled=a.autocast or system == "unsloth"):
            loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    began = time.perf_counter()
    losses = [float(step(0))]
    first = time.perf_counter() - began
    losses += [float(step(i)) for i in range(1, a.warmup - 1)]
    before = fresh_peak(a.device)                      # before a CUDA graph is recorded: it allocates what replays use
    losses += [float(step(i)) for i in range(max(1, a.warmup - 1), a.warmup)]
    numbers = iter(range(a.warmup, a.warmup + a.steps))
    times = [timed(lambda: losses.append(step(next(numbers))), a.device) for _ in range(a.steps)]
    result = {
        **spread(times, a.batch * a.seq),
        "first_step_s": first,
        "peak_gib": peak_gib(a.device, before),
        "reserved_gib": reserved_gib(a.device),
        "trained": sum(p.numel() for p in trained),
        "adapters": str(trained[0].dtype),
        "losses": [float(loss) for loss in losses],
        "environment": systems.environment(a.device),
    }
    return {**result, **({"profile": profile(lambda: step(0))} if a.profile and a.device == "cuda" else {})}


def spread(times: list[float], tokens: int) -> isolate.Result:
    """Median, least and greatest time of a step (ms), and tokens per second at the median."""
    return {
        "ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "tokens_per_s": tokens / statistics.median(times) * 1e3,
    }


def timed(work: Callable[[], object], device: str) -> float:
    """Milliseconds: by events on the GPU, by the clock on the CPU."""
    import torch

    if device == "cpu":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def fresh_peak(device: str) -> int:
    """Begin to watch the GPU's memory anew; bytes that CUDA graphs recorded earlier use in a replay without allocating them."""
    if device != "cuda":
        return 0
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pools = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in pools)


def peak_gib(device: str, before: int) -> float:
    """What was allocated at most since ``fresh_peak``, which found ``before``; of the whole process on the CPU."""
    if device == "cuda":
        import torch

        return (torch.cuda.max_memory_allocated() + before) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reserved_gib(device: str) -> float:
    """What the allocator held of the GPU at most since then, with what lies between the pieces that are in use; 0 on the CPU."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0


def profile(step: Callable[[], object], top: int = 25) -> list[tuple[str, float, int]]:
    """(kernel, ms in one step, launches), the longest first, after a row for the total."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    cuda = [
        e
        for e in found.key_averages()
        if e.device_type == torch.autograd.DeviceType.CUDA and e.self_device_time_total > 0
    ]
    rows = sorted(((e.key, e.self_device_time_total / 1e3, e.count) for e in cuda), key=lambda row: -row[1])
    return [("all kernels", sum(row[1] for row in rows), sum(row[2] for row in rows)), *rows[:top]]


def report(a: argparse.Namespace, results: dict[str, isolate.Result]) -> None:
    title = (
        f"{a.model}, {a.mode}{' + checkpointing' if a.ckpt else ''}, {a.batch} x {a.seq} tokens, attention {a.attn}, "
        f"adapters {a.adapter_dtype}, base {a.base}{' (prepared)' if a.prepared else ''}{', autocast' if a.autocast else ''}, {a.device}"
    )
    named = {"ckpt": a.ckpt, a.base: a.base != "bf16", "prepared": a.prepared, "autocast": a.autocast}
    marks = [a.mode, *(mark for mark, on in named.items() if on)]
    name = a.name or f"train-{a.model}-{'-'.join(marks)}-{a.batch}x{a.seq}"
    text = f"### {title}\n\n" + tables.markdown(
        ["system", "ms/step", "min - max", "tokens/s", "peak GiB", "reserved", "first step (s)", "loss of steps 1, 2, 3"],
        [row(system, result) for system, result in results.items()],
    )
    ran = {system: r for system, r in results.items() if "error" not in r}
    if ran:
        text += "\n\n" + ", ".join(f"{k} {v}" for k, v in next(iter(ran.values()))["environment"].items())
    for system, r in ran.items():
        if "profile" in r:
            rows = [(f"`{key[:100]}`", f"{ms:.2f}", count) for key, ms, count in r["profile"]]
            text += f"\n\n#### {system}: GPU kernels of one step\n\n" + tables.markdown(
                ["kernel", "ms", "launches"], rows
            )
    settings = {k: str(v) for k, v in vars(a).items()}
    tables.write(
        a.out,
        name,
        text,
        {"title": title, "settings": settings, "results": results},
        (lambda figure: draw(figure, title, ran)) if ran else None,
    )


def row(system: str, r: isolate.Result) -> list[str]:
    if "error" in r:
        return [system, r["error"].replace("|", "/"), "", "", "", "", "", ""]
    return [
        system,
        f"{r['ms']:.1f}",
        f"{r['min_ms']:.1f} - {r['max_ms']:.1f}",
        f"{r['tokens_per_s']:,.0f}",
        f"{r['peak_gib']:.2f}",
        f"{r['reserved_gib']:.2f}",
        f"{r['first_step_s']:.1f}",
        ", ".join(f"{loss:.4f}" for loss in r["losses"][:3]),
    ]


def draw(figure: Any, title: str, ran: dict[str, isolate.Result]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(ran)[::-1]
    colours = ["tab:green" if name.startswith("sloth") else "0.7" for name in names]
    for axis, key, label in ((left, "ms", "ms per step"), (right, "peak_gib", "peak GiB")):
        bars = axis.barh(names, [ran[name][key] for name in names], color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
    figure.suptitle(title)


if __name__ == "__main__":
    main()
