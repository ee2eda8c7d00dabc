"""Everything that only a GPU can tell, the most telling first; under 8 minutes on one H100.

    PYTHONPATH=tests:tests/benchmarks python tests/benchmarks/gpu_check.py [--tiny] [--only NAME,NAME] [--seconds 450]

Every finding is a line of report.jsonl in ``--output`` (or the directory that ``OUT`` names) as soon as it is found.
``--tiny`` rehearses all of it on a CPU. The exit code is 1 if something failed.
"""

import argparse
import contextlib
import copy
import faulthandler
import gc
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

# Products can be deterministic. torch reads this once, at the first product, and not when deterministic=True comes
# later. The size is Hopper's default.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import gpu_runs
import tiny
import torch
from gpu_measuring import BF16, Bench, our_warnings
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.commands.main import grow_segments
from lightning_lambdapo.config import PerformanceConfig, RolloutConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.learning.packing import MicroBatch
from lightning_lambdapo.learning.scoring import CompletionScorer
from lightning_lambdapo.policy.attention import Layer, PackedRow
from lightning_lambdapo.policy.model import Policy, causal_lm
from lightning_lambdapo.rollout import GroupedEngine, HFEngine, RolloutEngine
from lightning_lambdapo.rollout.sampling import row_uniforms

_PACKAGES = (
    "lightning-lambdapo torch triton transformers peft lightning bitsandbytes torchmetrics jsonargparse numpy datasets"
)
_NEVER = 2**31  # no token has this id


def environment(bench: Bench) -> None:
    """What is installed."""
    found = {}
    for name in _PACKAGES.split():
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    device = torch.cuda.get_device_name() if bench.cuda else "cpu"
    cudnn = torch.backends.cudnn.version() if bench.cuda else None
    bench.say("environment", device=device, cudnn=cudnn, python=platform.python_version(), **found)
    if bench.cuda:
        with bench.attempt("environment", what="memory grows in place, as the command line asks for"):
            settings = torch.cuda.memory._snapshot()["allocator_settings"]
            bench.say("environment", expandable_segments=bool(settings["expandable_segments"]))


def attention(bench: Bench) -> None:
    """Which kernels the completions of packed rows get, with a mask and without one, and what a new shape costs."""
    shapes = [(8, 768, 200), (8, 763, 187), (8, 700, 140), (3, 4096, 200)] if bench.cuda else [(2, 9, 4)]
    for rows, length, past in shapes:
        for name, way in _ways(bench, rows, length, past).items():
            with bench.attempt("attention", rows=rows, length=length, past=past, way=name):
                _kernel(bench, way, rows=rows, length=length, past=past, way=name)


def _ways(bench: Bench, rows: int, length: int, past: int) -> dict[str, Callable[[], Tensor]]:
    """Attention of a group's completions after their prompt: with a mask, without one, and as the package does it."""
    heads, kv, dim = (32, 8, 128) if bench.cuda else (4, 2, 16)

    def states(batch: int, length: int) -> list[Tensor]:
        shapes = ((batch, count, length, dim) for count in (heads, kv, kv))
        return [torch.randn(shape, device=bench.device, dtype=BF16, requires_grad=True) for shape in shapes]

    sdpa: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
    _, k, v = states(rows, past + length)
    q = states(rows, length)[0]
    places = torch.arange(past + length, device=bench.device)
    seen = places <= places[past:, None]
    dense = torch.zeros_like(seen, dtype=BF16).masked_fill(~seen, -torch.inf)
    row = PackedRow([past], [[length] * rows], bench.device)
    query, key, value = states(1, past + rows * length)
    lower_right = causal_lower_right(length, past + length)
    return {
        "dense mask": lambda: sdpa(q, k, v, attn_mask=dense, scale=0.1, enable_gqa=True),
        "causal_lower_right": lambda: sdpa(q, k, v, attn_mask=lower_right, scale=0.1, enable_gqa=True),
        "packed row": lambda: row.attend(query, key, value, Layer(0, 0.1)),
    }


def _kernel(bench: Bench, function: Callable[[], Tensor], **what: Any) -> None:
    bench.peak(reset=True)
    times = []
    for _ in range(3):  # the first pays for plans
        out, forward = bench.clock(function)
        _, backward = bench.clock(out.sum().backward)
        times.append((round(1e3 * forward, 2), round(1e3 * backward, 2)))
    del out
    found = bench.peak()
    top = bench.trace(lambda: function().sum().backward())[1][:3] if bench.cuda else []
    bench.say(
        "attention",
        **what,
        ms_forward_backward_first=times[0],
        warm=times[2],
        peak_gib=found,
        kernels_ms=[[event.key[:70], round(event.self_device_time_total / 1e3, 2)] for event in top],
    )


def parity(bench: Bench) -> None:
    """The same tokens and gradients as on the CPU."""
    tokenizer = tiny.tokenizer()
    key: dict[str, Any] = {"seed": 0, "stage": "train", "step": 0, "occurrences": [0] * 4, "num_samples": 8}
    uniforms = row_uniforms(prompt_ids=range(4), length=40, **key)
    for architecture in ("llama", "gemma3", "qwen3", "mistral", "phi3")[: 5 if bench.cuda else 2]:
        for dtype in (torch.float64, torch.float32, BF16):
            with bench.attempt("parity", architecture=architecture, dtype=dtype):
                here = tiny.model(architecture, dtype=dtype).cpu()
                batch = tiny.batch(tiny.ragged_prompts(4))
                batch = Bench.moved(Bench(cuda=False, report=bench.report), batch)
                sides: list[tuple[PreTrainedModel, PromptBatch, RolloutConfig]] = [
                    (here, batch, RolloutConfig()),
                    (_on(copy.deepcopy(here), bench), bench.moved(batch), RolloutConfig(max_live_tokens=700)),
                ]
                found = []
                for model, prompts, config in sides:
                    engine = GroupedEngine(tokenizer, (1,), 0, config)
                    with our_warnings() as told, torch.no_grad():
                        rollout = engine.generate(model, prompts, sampling=SamplingConfig(), uniforms=uniforms)
                    found.append((rollout, told))
                first = found[0][0]
                width = min(rollout.completion_ids.shape[1] for rollout, _ in found)
                ids = [rollout.completion_ids[:, :width].cpu() for rollout, _ in found]
                gradients = [_gradient(model, prompts, first) for model, prompts, _ in sides]
                bench.say(
                    "parity",
                    architecture=architecture,
                    dtype=dtype,
                    rows_with_other_tokens=int((ids[0] != ids[1]).any(-1).sum()),
                    of=len(ids[0]),
                    gradient_relative_error=float((gradients[0] - gradients[1]).norm() / gradients[0].norm()),
                    warnings=[told for _, told in found],
                )


def _on(model: PreTrainedModel, bench: Bench) -> PreTrainedModel:
    moved: PreTrainedModel = cast(Any, model).to(bench.device)
    return moved


def _gradient(model: PreTrainedModel, batch: PromptBatch, rollout: Rollout) -> Tensor:
    """Of the sum of the log-probabilities of one rollout, wherever the model is."""
    device = batch.input_ids.device
    names = ("completion_ids", "completion_mask", "sampling_logprobs", "entropy", "truncated")
    moved = Rollout(**{name: getattr(rollout, name).to(device) for name in names}, texts=rollout.texts)
    rows = torch.arange(len(moved.completion_ids), device=device)
    CompletionScorer(model, temperature=1.0)(MicroBatch.packed(batch, moved, rows)).sum().backward()
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


def decoding(bench: Bench) -> None:
    """Tokens per second of both engines on a model of 1.7B's shape, and the launches and waits of a step."""
    prompts, group, length, tokens = (8, 8, 200, 192) if bench.cuda else (2, 2, 5, 6)
    batch = bench.prompts(prompts, length)
    key: dict[str, Any] = {"seed": 0, "stage": "train", "step": 0, "occurrences": [0] * prompts}
    uniforms = row_uniforms(prompt_ids=range(prompts), num_samples=group, length=tokens, **key)
    model: Policy = bench.model("1.7B")
    for what in ("full", "lora", "lora, autocast"):
        if what == "lora":
            adapter = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
            model = cast(Policy, get_peft_model(cast(PreTrainedModel, model), adapter).eval())
        lm = causal_lm(model)
        for name in ("grouped", "grouped, no graphs", "hf"):
            with bench.attempt("decoding", what=what, engine=name), torch.no_grad(), _context(bench, what):
                built = _endless_hf(tiny.tokenizer())
                if name != "hf":
                    performance = PerformanceConfig(cuda_graphs=None if name == "grouped" else False)
                    built = _Endless(tiny.tokenizer(), (_NEVER,), 0, performance=performance)
                with our_warnings() as told:
                    _generate(built, lm, batch, uniforms[:, : max(4, tokens // 16)])  # with the probe
                bench.peak(reset=True)
                _, seconds = bench.clock(_generate, built, lm, batch, uniforms)
                bench.say(
                    "decoding",
                    what=what,
                    engine=name,
                    rows=prompts * group,
                    tokens_per_second=round(prompts * group * tokens / seconds),
                    ms_per_step=round(1e3 * seconds / tokens, 2),
                    peak_gib=bench.peak(),
                    warnings=told,
                )
        if bench.cuda:
            with bench.attempt("profile", what=what), torch.no_grad(), _context(bench, what):
                _profile(bench, what, lm, batch, uniforms)


def _context(bench: Bench, what: str) -> contextlib.AbstractContextManager[Any]:
    if "autocast" not in what:
        return contextlib.nullcontext()
    return torch.autocast(bench.device.type, dtype=BF16, cache_enabled=False)


class _Endless(GroupedEngine):
    """Does not decode the random model's tokens, which are no text."""

    def finish(self, completion_ids: Tensor, logprobs: Tensor, entropy: Tensor | None) -> Rollout:
        mask = torch.ones_like(completion_ids, dtype=torch.bool)
        return Rollout(completion_ids, mask, logprobs, entropy, mask[:, 0], [""] * len(mask))


def _endless_hf(tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    engine = HFEngine(tokenizer, (_NEVER,), 0)
    setattr(engine, "finish", lambda *tensors: tensors)  # noqa: B010
    return engine


def _generate(engine: RolloutEngine, model: PreTrainedModel, batch: PromptBatch, uniforms: Tensor) -> object:
    return engine.generate(model, batch, sampling=SamplingConfig(), uniforms=uniforms)


def _profile(bench: Bench, what: str, lm: PreTrainedModel, batch: PromptBatch, uniforms: Tensor) -> None:
    steps = 32
    engine = _Endless(tiny.tokenizer(), (_NEVER,), 0)
    _generate(engine, lm, batch, uniforms[:, :2])
    events, on_device = bench.trace(lambda: _generate(engine, lm, batch, uniforms[:, :steps]))

    def per_step(*names: str) -> float:
        counts: list[int] = [event.count for event in events if any(name in event.key for name in names)]
        return round(sum(counts) / steps, 1)

    bench.say(
        "profile",
        what=what,
        launches_per_step=per_step("LaunchKernel", "GraphLaunch"),
        copies_per_step=per_step("cudaMemcpyAsync"),
        waits_per_step=per_step("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        gpu_busy_ms_per_step=round(sum(event.self_device_time_total for event in on_device) / 1e3 / steps, 2),
        top=[
            [event.key[:60], round(event.count / steps, 1), round(event.self_device_time_total / 1e3 / steps, 3)]
            for event in on_device[:6]
        ],
    )


#: Each check with the seconds that it needs. It is omitted if fewer remain.
CHECKS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "environment": (environment, 1),
    "attention": (attention, 20),
    "parity": (parity, 20),
    "runs": (gpu_runs.runs, 60),
    "decoding": (decoding, 100),
    "qlora": (gpu_runs.qlora, 110),
    "memory": (gpu_runs.memory, 15),
}


def check(bench: Bench, names: Sequence[str], seconds: float) -> None:
    """Run checks by name, as long as there is time."""
    for name in names:
        function, least = CHECKS[name]
        left = seconds - (time.monotonic() - bench.start)
        if bench.cuda and left < least:
            bench.say(name, omitted=f"{left:.0f} s are left, {least:.0f} s are needed")
            continue
        begun = time.monotonic()
        with bench.attempt(name):  # the next check may still tell something
            function(bench)
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
        bench.say(name, seconds=round(time.monotonic() - begun, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks that the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of checks, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--seconds", type=float, default=450.0, help="no check starts that would end later")
    parser.add_argument("--output", type=Path, help="directory of report.jsonl")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"--only names no check: {', '.join(unknown)}. There are {', '.join(CHECKS)}.")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device. --tiny rehearses the checks on the CPU.")
    output = options.output or Path(os.environ.get("OUT") or tempfile.mkdtemp())
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(cuda=not options.tiny, report=output / "report.jsonl")
    grow_segments()
    faulthandler.dump_traceback_later(options.seconds + 60, exit=True)  # shows where it hangs
    try:
        check(bench, names, options.seconds)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return int(bench.failures > 0)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.exit(main())
