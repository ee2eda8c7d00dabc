"""One optimizer step against TRL's GRPOTrainer: same model, adapter, prompts and settings, in turn.

    python tests/benchmarks/bench_step.py [--max-new-tokens 96] [--json FILE] [--ablate]

SmolLM2-135M-Instruct, LoRA r=16 on all linear layers, 4 prompts x 8 rollouts, no KL term. A process per measurement,
one short step (8 new tokens) to warm up, then one step that counts. TRL generates the 32 completions together and
learns from 8 at a time; ours learns from micro-batches of at most 1024 tokens, or 1536 for more than 128 new ones.
`--ablate` also measures each of our optimisations switched off.
"""

import json
import time
from pathlib import Path
from typing import Any

from measuring import Result, answer, in_turn, options, prepared_model, rendered, report, time_last_step

PROMPTS, GROUP, WARM_UP = 4, 8, 8
#: What `--ablate` switches off, as settings of rollout and performance.
OPTIMISATIONS: dict[str, dict[str, Any]] = {
    "decoder: prompts stored once": {"performance": {"share_prompts_in_rollouts": False}},
    "decoder: ended rows leave": {"performance": {"compaction": False}},
    "decoder: merged adapter": {"performance": {"merge_adapter": False}},
    "decoder: whole engine (generate instead)": {"rollout": {"engine": "hf"}},
    "learning: prompts shared in packed rows": {"performance": {"share_prompts_in_learning": False}},
    "learning: logits used once": {"performance": {"recompute_logits": True}},
    "both: adapter fused with its base": {"performance": {"fused_lora": False}},
    "both: oneDNN": {"performance": {"onednn": False}},
}


def reward(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing and sets the rows of every group apart."""
    return [float(len(text) % 17) for text in completions]


def measure_ours(model: str, prompts: Path | None, case: Result) -> Result:
    """Generation, whole step and tokens of one step of this package."""
    import dataclasses

    import torch

    from lightning_lambdapo import AdapterConfig, LambdaPOModule, PolicyConfig, RolloutConfig
    from lightning_lambdapo.config import PerformanceConfig

    off = case.get("off", {})
    length = case["max_new_tokens"]

    class Timed(LambdaPOModule):
        generation = 0.0

        def build_engine(self, model: Any) -> Any:
            engine: Any = super().build_engine(model)
            generate = engine.generate

            def timed(*arguments: Any, **settings: Any) -> Any:
                start = time.perf_counter()
                rollout = generate(*arguments, **settings)
                self.generation = time.perf_counter() - start
                self.tokens = int(rollout.completion_mask.sum())
                return rollout

            engine.generate = timed
            return engine

    module = Timed(
        PolicyConfig(model=model),
        lora=AdapterConfig(r=16, alpha=32),
        rollout=RolloutConfig(group_size=case.get("group", GROUP), max_new_tokens=WARM_UP, **off.get("rollout", {})),
        rewards=[reward],
        seed=0,
        max_tokens_per_micro_batch=1024 if length <= 128 else 1536,
        logprob_chunk_size=256,
        performance=PerformanceConfig(**off.get("performance", {})),
    )
    rows = [{"prompt": text} for text in rendered(module.tokenizer, prompts, case.get("prompts", PROMPTS))]

    def lengthen() -> None:
        module.rollout_config = dataclasses.replace(module.rollout_config, max_new_tokens=length)

    assert torch.get_num_threads() == case["threads"]
    seconds = time_last_step(module, rows, 2, after=lengthen)
    return {"step_s": seconds, "generation_s": module.generation, "tokens": module.tokens}


def measure_trl(model: str, prompts: Path | None, case: Result) -> Result:
    """The same of TRL's GRPOTrainer."""
    import importlib
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    trl: Any = importlib.import_module("trl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: Result = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found["step_s"] = time.perf_counter() - self.start
            set_length(case["max_new_tokens"])

    def generate(inputs: Any) -> Any:
        start = time.perf_counter()
        output = inner(inputs)
        found["generation_s"] = time.perf_counter() - start
        found["tokens"] = int(output["completion_mask"].sum())
        return output

    def set_length(length: int) -> None:
        trainer.max_completion_length = length
        trainer.generation_kwargs["max_new_tokens"] = length
        trainer.generation_config.max_new_tokens = length

    with tempfile.TemporaryDirectory() as directory:
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=directory,
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=PROMPTS * GROUP // 8,
                num_generations=GROUP,
                max_completion_length=case["max_new_tokens"],
                temperature=1.0,
                beta=0.0,
                learning_rate=1e-5,
                gradient_checkpointing=False,
                max_steps=2,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                seed=0,
            ),
            train_dataset=Dataset.from_dict({"prompt": rendered(tokenizer, prompts, PROMPTS)}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        inner, trainer._generate_and_score_completions = trainer._generate_and_score_completions, generate
        set_length(WARM_UP)
        trainer.train()
    return found


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--ablate", action="store_true", help="also measure each optimisation switched off")
    parser.add_argument("--ours-only", action="store_true", help="omit TRL")
    arguments = parser.parse_args()
    if arguments.measure:
        case = json.loads(arguments.measure)
        measure = measure_ours if case["side"] == "ours" else measure_trl
        answer(measure(arguments.model, arguments.prompts, case | {"threads": arguments.threads}))
        return
    common = {"max_new_tokens": arguments.max_new_tokens}
    cases = [{"side": "ours"} | common]
    names = ["lightning-lambdapo"]
    if not arguments.ours_only:
        cases.append({"side": "trl"} | common)
        names.append("TRL GRPOTrainer")
    if arguments.ablate:
        cases += [{"side": "ours", "off": off} | common for off in OPTIMISATIONS.values()]
        names += [f"without {name}" for name in OPTIMISATIONS]
    with prepared_model(arguments):
        results = in_turn(__file__, cases, arguments)
    rows = [
        {
            "": name,
            "tokens/s": found["tokens"] / found["step_s"],
            "step s": found["step_s"],
            "generation s": found["generation_s"],
            "learning s": found["step_s"] - found["generation_s"],
            "tokens": found["tokens"],
            "peak RSS GB": found["peak_rss_gb"],
        }
        for name, found in zip(names, results, strict=True)
    ]
    summary: Result = {"max_new_tokens": arguments.max_new_tokens}
    if not arguments.ours_only:
        summary["ratio_tokens_per_s"] = rows[0]["tokens/s"] / rows[1]["tokens/s"]
        summary["ratio_peak_rss"] = rows[0]["peak RSS GB"] / rows[1]["peak RSS GB"]
    title = f"One step: {PROMPTS} prompts x {GROUP} rollouts of at most {arguments.max_new_tokens} tokens, LoRA r=16"
    report(title, rows, summary, arguments)


if __name__ == "__main__":
    main()
