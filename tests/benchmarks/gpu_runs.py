"""The part of ``gpu_check`` that trains: precisions, repeats, resume, QLoRA of a 4B-shaped model, memory."""

import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
from gpu_measuring import Bench, Parts, logged, module, our_warnings, weights

from lightning_lambdapo import AdapterConfig, LambdaPOModule, PolicyConfig, RolloutConfig

_SHOWN = (
    "accuracy",
    "reward",
    "entropy",
    "sampling_drift",
    "sampling_drift_max",
    "clip_fraction",
    "ratio_max",
    "grad_norm",
    "skipped_updates",
)


def runs(bench: Bench) -> None:
    """Whole runs in each precision; twice the same bits, and resumed with the same bits."""
    steps = 30 if bench.cuda else 2
    lora: dict[str, Any] = {"lora": AdapterConfig(r=8), "updates_per_rollout": 4}
    for name, precision, settings in (
        ("full", "32-true", {}),
        ("full", "bf16-mixed", {}),
        ("full", "16-mixed", {}),
        ("lora, 4 updates", "bf16-mixed", lora),
    ):
        if precision == "16-mixed" and not bench.cuda:
            continue  # its scaler is CUDA's
        with bench.attempt("runs", what=name, precision=precision):
            with our_warnings("share prompts", "memory") as told:
                model = module(optimizer=lambda p: torch.optim.AdamW(p, lr=2e-4), **settings)
                updates = steps * model.updates_per_rollout
                (trainer, _), seconds = bench.clock(bench.fit, model, updates, precision=precision)
            values = logged(trainer)
            shown = {key: values[key] for key in _SHOWN if key in values}
            bench.say("runs", what=name, precision=precision, seconds=round(seconds, 1), **shown, warnings=told)
    short = 6 if bench.cuda else 2
    for deterministic in (False, True):
        with bench.attempt("repeat", deterministic=deterministic):
            _repeat(bench, short, deterministic)
        torch.use_deterministic_algorithms(False)
    if bench.cuda:
        with bench.attempt("8-bit optimizer"):
            _eight_bit(bench)


def _repeat(bench: Bench, steps: int, deterministic: bool) -> None:
    whole, again, half, rest = (module() for _ in range(4))
    _, seconds = bench.clock(bench.fit, whole, steps, deterministic=deterministic)
    bench.fit(again, steps, deterministic=deterministic)
    _, root = bench.fit(half, steps // 2, every=1, deterministic=deterministic)
    bench.fit(rest, steps, every=1, ckpt=str(root / "last.ckpt"), deterministic=deterministic)
    bench.say(
        "repeat",
        deterministic=deterministic,
        same_bits_again=torch.equal(weights(whole), weights(again)),
        same_bits_resumed=torch.equal(weights(whole), weights(rest)),
        seconds=round(seconds, 2),
    )


def _eight_bit(bench: Bench) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return _adamw_8_bit(parameters, 1e-3)

    whole, half, rest = (module(lora=AdapterConfig(r=64), optimizer=optimizer) for _ in range(3))
    bench.fit(whole, 4, precision="bf16-mixed")
    _, root = bench.fit(half, 2, every=1, precision="bf16-mixed")
    bench.fit(rest, 4, every=1, ckpt=str(root / "last.ckpt"), precision="bf16-mixed")
    difference = (weights(whole) - weights(rest)).abs().max().item()
    bench.say("8-bit optimizer", resumed_difference=difference, moved=weights(whole).norm().item())


def _adamw_8_bit(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """bitsandbytes' optimizer, which needs a GPU."""
    import bitsandbytes

    optim: Any = bitsandbytes.optim
    made: torch.optim.Optimizer = optim.AdamW8bit([each for each in parameters if each.requires_grad], lr=lr)
    return made


def qlora(bench: Bench) -> None:
    """Two steps of NF4 QLoRA on a random model of 4B's shape, with seconds and peaks of each part."""
    directory = Path(tempfile.mkdtemp())
    model = bench.model("4B")
    _, saving = bench.clock(model.save_pretrained, directory)
    tiny.tokenizer().save_pretrained(directory)
    del model
    gc.collect()
    bench.peak(reset=True)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return _adamw_8_bit(parameters, 2e-5) if bench.cuda else torch.optim.AdamW(parameters, lr=2e-5)

    def even(completions: list[str]) -> list[float]:  # the random model's tokens are no text
        return [float(row % 2) for row in range(len(completions))]

    tokens = 192 if bench.cuda else 5
    trained = module(
        policy=PolicyConfig(str(directory), dtype="bfloat16", quantization="nf4", gradient_checkpointing=True),
        lora=AdapterConfig(r=32, alpha=64),
        rollout=RolloutConfig(group_size=8, max_new_tokens=tokens),
        rewards=[even],
        optimizer=optimizer,
        max_tokens_per_micro_batch=8192,
        logprob_chunk_size=512,
    )
    parts = Parts(bench)
    try:
        with our_warnings("grouped", "share", "memory") as told:
            trainer, _ = bench.fit(trained, 2, precision="bf16-mixed", batch_size=8, callbacks=[parts])
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    values = logged(trainer)
    bench.say(
        "qlora",
        saving_seconds=round(saving, 1),
        rows=64,
        tokens=tokens,
        rollout_seconds_peak=parts.found["rollout"],
        learning_seconds_peak=parts.found["learning"],
        tokens_per_second=round(64 * tokens / max(parts.found["rollout"][-1][0], 1e-3)),
        drift=values.get("sampling_drift"),
        drift_max=values.get("sampling_drift_max"),
        grad_norm=values.get("grad_norm"),
        warnings=told,
    )


def memory(bench: Bench) -> None:
    """Out of memory: the same weights with a part of the memory that a free run takes. On a CPU only the free run."""
    free, parts, retries, told = _crowded(bench)
    used = max(found[0] for _, found in parts.found["learning"])
    bench.say("memory", what="free", retries=retries, parts=parts.found, warnings=told)
    for share in (0.7, 0.4) if bench.cuda else ():
        with bench.attempt("memory", share=share):
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share * used * 2**30 / total)
            try:
                tight, parts, retries, told = _crowded(bench)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            difference = (weights(free) - weights(tight)).abs().max().item()
            bench.say(
                "memory",
                share=share,
                limit_gib=round(share * used, 2),
                retries=retries,
                parts=parts.found,
                warnings=told,
                difference=difference,
            )


def _crowded(bench: Bench) -> tuple[LambdaPOModule, Parts, float, list[str]]:
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
    size = 64 if bench.cuda else 2
    rollout = RolloutConfig(group_size=size, max_new_tokens=24, max_live_tokens=2**14)
    model, parts = module(rollout=rollout, max_tokens_per_micro_batch=2**16), Parts(bench)
    with our_warnings("memory") as told:
        trainer, _ = bench.fit(model, 2, batch_size=size, callbacks=[parts])
    return model, parts, logged(trainer).get("memory_retries", -1.0), told
