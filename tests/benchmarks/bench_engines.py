"""Tokens per second of the rollout engines, in turn: `grouped`, `hf` and, where it is installed, `vllm`.

    python tests/benchmarks/bench_engines.py [--json FILE]

One rollout of 4 GSM8K prompts x 8 of at most 96 new tokens, by a model with a LoRA adapter, in float32 on a CPU and in
bfloat16 on a GPU. The first rollout of each process warms up: it probes, compiles and delivers. The second is measured.
"""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measuring import Result, answer, in_turn, options, prepared_model, rendered, report

ENGINES = ["grouped", "hf", "vllm"]
PROMPTS, GROUP, LENGTH = 4, 8, 96


def measure(model: str, prompts: Path | None, name: str) -> Result:
    """Seconds and tokens of a rollout of one engine."""
    import torch

    from lightning_lambdapo import AdapterConfig, PolicyConfig, RolloutConfig, SamplingConfig
    from lightning_lambdapo.config import PerformanceConfig
    from lightning_lambdapo.data import PromptCollator, PromptTemplate
    from lightning_lambdapo.policy.loading import load_policy, load_tokenizer
    from lightning_lambdapo.policy.model import causal_lm
    from lightning_lambdapo.rollout.build import build_engine
    from lightning_lambdapo.rollout.sampling import row_uniforms

    on_gpu = torch.cuda.is_available()
    config = PolicyConfig(model, dtype="bfloat16" if on_gpu else "float32")
    policy: Any = load_policy(config, AdapterConfig(r=16))
    policy.to("cuda" if on_gpu else "cpu")
    tokenizer = load_tokenizer(config)
    rows = [{"prompt": text} for text in rendered(tokenizer, prompts, PROMPTS)]
    batch = PromptCollator(tokenizer, PromptTemplate(chat=False))(rows)
    batch = batch._replace(
        input_ids=batch.input_ids.to(policy.device), attention_mask=batch.attention_mask.to(policy.device)
    )
    rollout_config = RolloutConfig(engine=name, max_new_tokens=LENGTH)  # type: ignore[arg-type]
    engine = build_engine(causal_lm(policy), tokenizer, config, rollout_config, PerformanceConfig())
    found: Result = {}
    for step in range(2):
        uniforms = row_uniforms(
            seed=0,
            stage="train",
            step=step,
            prompt_ids=list(range(PROMPTS)),
            occurrences=[0] * PROMPTS,
            num_samples=GROUP,
            length=LENGTH,
        )
        with torch.no_grad():
            if engine.has_own_weights and engine.version < 0:
                engine.sync(policy, 1)
            start = time.perf_counter()
            rollout = engine.generate(causal_lm(policy), batch, sampling=SamplingConfig(), uniforms=uniforms)
            tokens = int(rollout.lengths.sum())
        found = {"seconds": time.perf_counter() - start, "tokens": tokens, "threads": torch.get_num_threads()}
    engine.close()
    return found


def main() -> None:
    """Measure, print, write."""
    arguments = options(__doc__).parse_args()
    if arguments.measure:
        answer(measure(arguments.model, arguments.prompts, json.loads(arguments.measure)["engine"]))
        return
    engines = [name for name in ENGINES if name != "vllm" or find_spec("vllm") is not None]
    with prepared_model(arguments):
        results = in_turn(__file__, [{"engine": name} for name in engines], arguments)
    rows = [
        {
            "engine": name,
            "tokens/s": found["tokens"] / found["seconds"],
            "seconds": found["seconds"],
            "tokens": found["tokens"],
            "peak GB": found["peak_rss_gb"],
        }
        for name, found in zip(engines, results, strict=True)
    ]
    rates = {row["engine"]: row["tokens/s"] for row in rows}
    report("One rollout of 4 prompts x 8, at most 96 new tokens", rows, rates, arguments)


if __name__ == "__main__":
    main()
