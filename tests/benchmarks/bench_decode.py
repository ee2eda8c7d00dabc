"""The grouped decoder against transformers' generate, and against what the machine could do at best.

    python tests/benchmarks/bench_decode.py [--json FILE]

Prompts x group x tokens with no early end, merged LoRA adapter. The roofline of a decoding step is the larger of
(weights + mean cache) / copy bandwidth and FLOPs / GEMM rate, both measured in the same process just before: the rate
is that of `torch.mm` on 2048 x 2048 float32; `oneDNN` is that of its kernels, where the decoder uses them.
"""

import json
import time
from pathlib import Path
from typing import Any

from measuring import Result, answer, best_time, blank_batch, in_turn, model_directory, options, rendered, report

#: prompts, rollouts per prompt, prompt length, new tokens
CASES = [(1, 1, 128, 64), (1, 8, 128, 64), (1, 32, 128, 64), (4, 8, 128, 64), (4, 8, 512, 64), (4, 8, 32, 128)]


def measure(model: str, prompts: Path | None, case: Result) -> Result:
    """Seconds of one rollout, and of the steps that a roofline allows."""
    import torch

    from lightning_lambdapo import AdapterConfig, PolicyConfig, RolloutConfig
    from lightning_lambdapo.policy import causal_lm, load_policy, load_tokenizer
    from lightning_lambdapo.rollout import GroupedEngine, HFEngine, SamplingConfig
    from lightning_lambdapo.rollout.sampling import row_uniforms

    count, group, width, length = case["case"]
    config = PolicyConfig(model=model)
    policy = load_policy(config, AdapterConfig(r=16))
    tokenizer = load_tokenizer(config)
    text = "".join(rendered(tokenizer, prompts, 16))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids.repeat(-(-count * width // len(ids)))[: count * width].view(count, width)
    batch = blank_batch(ids, torch.ones_like(ids, dtype=torch.bool))
    engine_type: Any = {"grouped": GroupedEngine, "generate": HFEngine}[case["side"]]
    arguments = [RolloutConfig(**case["off"])] if case.get("off") else []
    engine = engine_type(tokenizer, (10**9,), 0, *arguments)  # no token ends a row

    def run(new_tokens: int) -> float:
        uniforms = row_uniforms(
            seed=0,
            stage="train",
            step=0,
            prompt_ids=list(range(count)),
            occurrences=[0] * count,
            num_samples=group,
            length=new_tokens,
        )
        start = time.perf_counter()
        with torch.no_grad():
            engine.generate(causal_lm(policy), batch, sampling=SamplingConfig(), uniforms=uniforms)
        return time.perf_counter() - start

    run(4)
    first, seconds = run(2), run(length)
    return {"seconds": seconds, "step_ms": (seconds - first) / (length - 2) * 1e3} | roofline(
        causal_lm(policy), case["case"]
    )


def roofline(model: Any, case: list[int]) -> Result:
    """Shortest possible decoding step of these rows, in milliseconds."""
    import torch

    count, group, width, length = case
    rows = count * group
    config = model.config
    frozen = [p.numel() for name, p in model.named_parameters() if "lora_" not in name]
    weights = sum(frozen)  # tied embeddings: read once, by the output head
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    cache = (count * width + rows * length / 2) * per_token
    scores = 4 * rows * (width + length / 2) * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    flops = 2 * weights * rows + scores
    square = torch.randn(2048, 2048)
    other = torch.randn(2048, 2048)
    gemm = 2 * 2048**3 / best_time(lambda: square @ other)
    onednn = 2 * 2048**3 / best_time(lambda: torch.ops.mkldnn._linear_pointwise(square, other, None, "none", [], ""))
    block = torch.randn(50_000_000)
    target = torch.empty_like(block)
    bandwidth = 2 * block.nbytes / best_time(lambda: target.copy_(block))
    read = (4 * weights + cache) / bandwidth
    return {
        "roofline_ms": max(read, flops / gemm) * 1e3,
        "roofline_onednn_ms": max(read, flops / max(gemm, onednn)) * 1e3,
        "gemm_gflops": gemm / 1e9,
        "onednn_gflops": onednn / 1e9,
        "copy_gb_s": bandwidth / 1e9,
    }


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__)
    arguments = parser.parse_args()
    if arguments.measure:
        answer(measure(arguments.model, arguments.prompts, json.loads(arguments.measure)))
        return
    cases = [{"side": side, "case": case} for case in CASES for side in ("grouped", "generate")]
    arguments.model, cleanup = model_directory(arguments.model)
    try:
        results = in_turn(__file__, cases, arguments)
    finally:
        cleanup()
    rows = []
    for index, (count, group, width, length) in enumerate(CASES):
        ours, theirs = results[2 * index], results[2 * index + 1]
        rows.append(
            {
                "prompts x group": f"{count} x {group}",
                "prompt": width,
                "new": length,
                "tokens/s": count * group * length / ours["seconds"],
                "generate": count * group * length / theirs["seconds"],
                "ratio": theirs["seconds"] / ours["seconds"],
                "step ms": ours["step_ms"],
                "roofline ms": ours["roofline_ms"],
                "of roofline": ours["roofline_ms"] / ours["step_ms"],
                "of oneDNN's": ours["roofline_onednn_ms"] / ours["step_ms"],
            }
        )
    main_case = rows[CASES.index((4, 8, 128, 64))]
    summary = {
        "ratio_generate": main_case["ratio"],
        "share_of_roofline": main_case["of roofline"],
        "share_of_onednn_roofline": main_case["of oneDNN's"],
        "gemm_gflops": results[0]["gemm_gflops"],
        "onednn_gflops": results[0]["onednn_gflops"],
        "copy_gb_s": results[0]["copy_gb_s"],
    }
    report("Decoding: tokens/s of the whole rollout, milliseconds of one step", rows, summary, arguments)


if __name__ == "__main__":
    main()
