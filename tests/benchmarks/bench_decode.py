"""The grouped decoder against transformers' generate, and against what the machine could do at best.

    python tests/benchmarks/bench_decode.py [--json FILE] [--switches]

Prompts x group x tokens with no early end. `generate` is transformers as it comes, sampling by multinomial from a
model with peft's own adapter layers; the grouped decoder draws by inverse CDF and merges the adapter. The roofline of a
decoding step is the larger of (weights + mean cache) / copy bandwidth and FLOPs / GEMM rate, both measured in the same
process just before: the rate is that of `torch.mm` on 2048 x 2048 float32; `oneDNN` is that of its kernels.

`--switches` measures something else: one rollout of 4 GSM8K prompts x 8 of at most 96 tokens with the decoder's
switches off one at a time, and how many of its rows then have other tokens (float32 rounds differently in products of
other shapes).
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

from measuring import (
    Result,
    answer,
    best_time,
    blank_batch,
    gemm_rates,
    in_turn,
    options,
    prepared_model,
    rendered,
    report,
)

#: prompts, rollouts per prompt, prompt length, new tokens
CASES = [(1, 1, 128, 64), (1, 8, 128, 64), (1, 32, 128, 64), (4, 8, 128, 64), (4, 8, 512, 64), (4, 8, 32, 128)]

#: What `--switches` measures.
SWITCHES: dict[str, dict[str, Any]] = {
    "all on": {},
    "prompts computed and stored per row": {"performance": {"share_prompts_in_rollouts": False}},
    "ended rows stay": {"performance": {"compaction": False}},
    "adapter not merged": {"performance": {"merge_adapter": False}},
    "one prompt at a time": {"rollout": {"max_live_tokens": 1}},
    "transformers' generate, our sampler": {"rollout": {"engine": "hf"}},
}


def measure(model: str, prompts: Path | None, case: Result) -> Result:
    """Seconds of one rollout of each case, and of the steps that a roofline allows."""
    import torch
    from transformers import GenerationConfig

    from lightning_lambdapo import AdapterConfig, PolicyConfig
    from lightning_lambdapo.config import PerformanceConfig, SamplingConfig
    from lightning_lambdapo.policy.loading import load_policy, load_tokenizer
    from lightning_lambdapo.policy.model import causal_lm
    from lightning_lambdapo.rollout import GroupedEngine
    from lightning_lambdapo.rollout.sampling import row_uniforms

    stock = case["side"] == "generate"
    config = PolicyConfig(model=model)
    performance = PerformanceConfig(fused_lora=not stock, onednn=False if stock else None)
    policy = causal_lm(load_policy(config, AdapterConfig(r=16), performance=performance))
    engine = GroupedEngine(load_tokenizer(config), (10**9,), 0)  # no token ends a row

    @torch.no_grad()
    def run(count: int, group: int, width: int, length: int) -> float:
        ids = torch.arange(count * width).remainder(policy.config.vocab_size).view(count, width)
        uniforms = row_uniforms(
            seed=0,
            stage="train",
            step=0,
            prompt_ids=list(range(count)),
            occurrences=[0] * count,
            num_samples=group,
            length=length,
        )
        batch = blank_batch(ids, torch.ones_like(ids, dtype=torch.bool))
        settings: Any = {
            "do_sample": True,
            "num_return_sequences": group,
            "max_new_tokens": length,
            "eos_token_id": 10**9,
        }
        generation = GenerationConfig(pad_token_id=0, top_k=0, **settings)
        start = time.perf_counter()
        if stock:
            cast(Any, policy).generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
        else:
            engine.generate(policy, batch, sampling=SamplingConfig(), uniforms=uniforms)
        return time.perf_counter() - start

    run(1, 2, 16, 4)
    speed = gemm_rates() | {"copy_gb_s": copy_rate()}
    found: Result = dict(speed)
    for index, (count, group, width, length) in enumerate(case["cases"]):
        first, seconds = run(count, group, width, 2), run(count, group, width, length)
        best = roofline(policy, [count, group, width, length], speed)
        for name, value in {"seconds": seconds, "step_ms": (seconds - first) / (length - 2) * 1e3, **best}.items():
            found[f"{name} {index}"] = value
    return found


def measure_switches(model: str, prompts: Path | None) -> Result:
    """Seconds of one rollout under each switch, and how many of its rows have other tokens than with all on."""
    import torch

    from lightning_lambdapo import AdapterConfig, PolicyConfig, RolloutConfig
    from lightning_lambdapo.config import PerformanceConfig, SamplingConfig
    from lightning_lambdapo.data import PromptCollator, PromptTemplate
    from lightning_lambdapo.policy.loading import eos_token_ids, load_policy, load_tokenizer
    from lightning_lambdapo.policy.model import causal_lm
    from lightning_lambdapo.rollout import GroupedEngine, HFEngine
    from lightning_lambdapo.rollout.sampling import row_uniforms

    config = PolicyConfig(model=model)
    policy, tokenizer = causal_lm(load_policy(config, AdapterConfig(r=16))), load_tokenizer(config)
    rows = [{"prompt": text} for text in rendered(tokenizer, prompts, 4)]
    batch = PromptCollator(tokenizer, PromptTemplate(chat=False))(rows)
    ids = batch.prompt_ids.tolist()
    found: Result = {}
    expected: list[list[int]] = []
    for index, settings in enumerate(SWITCHES.values()):
        arguments = tokenizer, eos_token_ids(policy, tokenizer), 0
        rollout_config = RolloutConfig(**settings.get("rollout", {}))
        performance = PerformanceConfig(**settings.get("performance", {}))
        grouped = rollout_config.engine == "grouped"
        engine = GroupedEngine(*arguments, rollout_config, performance) if grouped else HFEngine(*arguments)
        for length in (2, 96):  # the first one probes
            uniforms = row_uniforms(
                seed=0, stage="train", step=0, prompt_ids=ids, occurrences=[0] * 4, num_samples=8, length=length
            )
            start = time.perf_counter()
            with torch.no_grad():
                rollout = engine.generate(policy, batch, sampling=SamplingConfig(), uniforms=uniforms)
            found[f"seconds {index}"] = time.perf_counter() - start
        tokens = [row[mask].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
        expected = expected or tokens
        found[f"rows {index}"] = sum(ours != theirs for ours, theirs in zip(tokens, expected, strict=True))
        found["tokens"] = sum(map(len, expected))
    return found


def copy_rate() -> float:
    """GB/s of a copy, reading and writing, on this machine and these threads."""
    import torch

    block = torch.randn(50_000_000)
    target = torch.empty_like(block)
    return 2 * block.nbytes / 1e9 / best_time(lambda: target.copy_(block))


def roofline(model: Any, case: list[int], speed: Result) -> Result:
    """Shortest possible decoding step of these rows, in milliseconds."""
    count, group, width, length = case
    rows = count * group
    config = model.config
    # Tied embeddings count once, as the output head that reads them.
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    cache = (count * width + rows * length / 2) * per_token
    scores = 4 * rows * (width + length / 2) * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    gflops = (2 * weights * rows + scores) / 1e9
    read = (4 * weights + cache) / 1e9 / speed["copy_gb_s"]
    fastest = max(speed["gemm_gflops"], speed["onednn_gflops"])
    return {
        "roofline_ms": max(read, gflops / speed["gemm_gflops"]) * 1e3,
        "roofline_onednn_ms": max(read, gflops / fastest) * 1e3,
    }


def report_switches(found: Result, arguments: argparse.Namespace) -> None:
    """Print and write what the switches are worth."""
    rows = [
        {"": name, "seconds": found[f"seconds {index}"], "rows of 32 with other tokens": found[f"rows {index}"]}
        for index, name in enumerate(SWITCHES)
    ]
    title = (
        f"One rollout of 4 prompts x 8, at most 96 new tokens ({found['tokens']} in all), switches off one at a time"
    )
    report(title, rows, {}, arguments)


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__)
    parser.add_argument("--switches", action="store_true", help="measure the decoder's switches instead")
    arguments = parser.parse_args()
    if arguments.measure:
        case = json.loads(arguments.measure)
        switches = case["side"] == "switches"
        result = measure_switches if switches else partial(measure, case=case)
        answer(result(arguments.model, arguments.prompts))
        return
    with prepared_model(arguments):
        if arguments.switches:
            (found,) = in_turn(__file__, [{"side": "switches"}], arguments)
            report_switches(found, arguments)
            return
        sides = [{"side": side, "cases": CASES} for side in ("grouped", "generate")]
        ours, theirs = in_turn(__file__, sides, arguments)
    rows = [
        {
            "prompts x group": f"{count} x {group}",
            "prompt": width,
            "new": length,
            "tokens/s": count * group * length / ours[f"seconds {index}"],
            "generate": count * group * length / theirs[f"seconds {index}"],
            "ratio": theirs[f"seconds {index}"] / ours[f"seconds {index}"],
            "step ms": ours[f"step_ms {index}"],
            "roofline ms": ours[f"roofline_ms {index}"],
            "of roofline": ours[f"roofline_ms {index}"] / ours[f"step_ms {index}"],
            "of oneDNN's": ours[f"roofline_onednn_ms {index}"] / ours[f"step_ms {index}"],
        }
        for index, (count, group, width, length) in enumerate(CASES)
    ]
    main_case = rows[CASES.index((4, 8, 128, 64))]
    summary = {
        "ratio_generate": main_case["ratio"],
        "share_of_roofline": main_case["of roofline"],
        "share_of_onednn_roofline": main_case["of oneDNN's"],
    } | {name: ours[name] for name in ("gemm_gflops", "onednn_gflops", "copy_gb_s")}
    report("Decoding: tokens/s of the whole rollout, milliseconds of one step", rows, summary, arguments)


if __name__ == "__main__":
    main()
