"""The learning pass: useful FLOP/s over the machine's GEMM rate, wasted tokens, and peak memory.

    python tests/benchmarks/bench_learn.py [--json FILE]

One update of LoRA r=16 on 4 prompts x 8 completions, micro-batches of at most 1024 tokens. Useful are the products
that a gradient through frozen weights needs (forward and with respect to the input: 4 FLOPs per weight and token) for
each prompt token once, each completion token once, and the output head at completion tokens alone. Adapter, attention,
norms and recomputation count as nothing. Memory is the process' peak over that before the update.
"""

import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from measuring import Result, answer, best_time, blank_batch, gemm_rates, in_turn, options, prepared_model, report

PROMPTS, GROUP, PROMPT = [150, 120, 90, 140], 8, 128
SHARES: list[tuple[str, dict[str, Any]]] = [
    ("everything on", {}),
    ("rows padded, prompts repeated", {"share_prompts_in_learning": False}),
    ("logits computed twice", {"recompute_logits": True}),
    ("adapter by peft", {"fused_lora": False}),
    ("no oneDNN", {"onednn": False}),
]


def measure(model: str, prompts: Path | None, case: Result) -> Result:
    """Seconds and FLOP/s of one update."""
    import torch
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from lightning_lambdapo import AdapterConfig, AlgorithmConfig, PolicyConfig
    from lightning_lambdapo.config import PerformanceConfig
    from lightning_lambdapo.datatypes import Rollout
    from lightning_lambdapo.learning.learner import Learner
    from lightning_lambdapo.learning.updates import plan_updates
    from lightning_lambdapo.policy.loading import load_policy

    length = case["length"]
    performance = PerformanceConfig(**case.get("off", {}))
    policy: Any = load_policy(PolicyConfig(model=model), AdapterConfig(r=16), performance=performance).train()
    if "vocabulary" in case:
        policy.get_base_model().resize_token_embeddings(case["vocabulary"], mean_resizing=False)
        policy.requires_grad_(False)
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_("lora_" in name)
    torch.manual_seed(0)
    vocabulary = policy.get_base_model().config.vocab_size
    sizes, rows = case.get("prompts", PROMPTS), len(case.get("prompts", PROMPTS)) * GROUP
    width = max(sizes)
    mask = torch.tensor([[column >= width - size for column in range(width)] for size in sizes])
    count = len(sizes)
    batch = blank_batch(torch.randint(vocabulary, (count, width)), mask)
    # Lengths spread evenly from a third of `length` to all of it, as where some rows end early.
    lengths = torch.linspace(length / 3, length, rows).round().long()[torch.randperm(rows)]
    kept = torch.arange(length) < lengths[:, None]
    zeros = torch.zeros(rows, length)
    rollout = Rollout(torch.randint(vocabulary, (rows, length)), kept, zeros, zeros, ~kept[:, -1], [""] * rows)
    advantages = torch.linspace(-1, 1, rows) + 0.01
    settings = AlgorithmConfig()
    by_hand = SimpleNamespace(strategy=SingleDeviceStrategy("cpu"), backward=torch.Tensor.backward)
    learner = Learner(
        policy,
        None,
        algorithm=settings,
        temperature=1.0,
        max_new_tokens=length,
        max_tokens=case.get("budget", 1024),
        chunk_size=256,
        performance=performance,
        optimizer=cast(Any, by_hand),
    )

    def update() -> int:
        (planned,) = plan_updates(
            batch,
            rollout,
            advantages,
            torch.ones(rows, dtype=torch.bool),
            algorithm=settings,
            mini_batches=1,
        )
        learner.accumulate(planned)
        return sum(each.input_ids.numel() for each in learner.micro_batches(planned))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    processed = update()
    seconds = best_time(update, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    linear = sum(p.numel() for name, p in policy.named_parameters() if ".layers." in name and "base_layer" in name)
    head = policy.get_base_model().get_output_embeddings().weight.numel()
    needed = sum(sizes) + int((lengths - 1).sum())
    useful = 4 * linear * needed + 4 * head * int(lengths.sum())
    return {
        "seconds": seconds,
        "tokens_per_needed": processed / needed,
        "gflops": useful / seconds / 1e9,
        "memory_gb": peak - before,
    } | gemm_rates()


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__)
    arguments = parser.parse_args()
    if arguments.measure:
        answer(measure(arguments.model, arguments.prompts, json.loads(arguments.measure)))
        return
    cases: list[Result] = [{"name": name, "length": 96, "off": off} for name, off in SHARES]
    one = {"prompts": [PROMPT], "budget": 10**9}
    cases += [{"name": f"memory: 1 x 8, {length} tokens", "length": length} | one for length in (32, 64, 128)]
    cases += [
        {"name": f"memory: 1 x 8, 64 tokens, vocabulary {size}", "length": 64, "vocabulary": size} | one
        for size in (98304, 196608)
    ]
    with prepared_model(arguments):
        results = in_turn(__file__, cases, arguments)
    rows = [
        {
            "": case["name"],
            "seconds": found["seconds"],
            "tokens / needed": found["tokens_per_needed"],
            "useful GFLOP/s": found["gflops"],
            "of torch.mm": found["gflops"] / found["gemm_gflops"],
            "of oneDNN": found["gflops"] / found["onednn_gflops"],
            "memory GB": found["memory_gb"],
        }
        for case, found in zip(cases, results, strict=True)
    ]
    summary = {
        "share_of_gemm": rows[0]["of torch.mm"],
        "share_of_onednn_gemm": rows[0]["of oneDNN"],
        "share_of_gemm_without_onednn": rows[len(SHARES) - 1]["of torch.mm"],
        "tokens_per_needed": rows[0]["tokens / needed"],
    }
    report("Learning pass: 4 prompts x 8 completions of 32 to 96 tokens", rows, summary, arguments)


if __name__ == "__main__":
    main()
