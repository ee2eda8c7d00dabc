"""How often float32 rounding makes one and two ranks draw different tokens from the same weights.

Two ranks multiply matrices of half as many rows, which rounds differently; a token flips where two neighbours in
the cumulative distribution are closer than that. The learning rate is 0, so that one flip leads to no other.

    PYTHONPATH=tests python tests/benchmarks/bench_ranks.py [--model builtin:arithmetic] [--steps 20]
"""

import tempfile
from pathlib import Path
from typing import Any

import fitting
import torch
from measuring import Result, options, report
from ranks import on_ranks, succeed

from lightning_lambdapo import DataSource, LambdaPODataModule, PolicyConfig, RolloutConfig
from lightning_lambdapo.rewards import AccuracyReward


def no_learning(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


def sample(directory: Path, model: str, dtype: Any, prompts: int, steps: int) -> None:
    """Sample ``steps`` batches of ``prompts`` x 8 completions, over all ranks."""
    data = LambdaPODataModule(
        train=DataSource(preset="arithmetic"), batch_size=prompts // fitting.parallel_ranks(), max_prompt_length=64
    )
    fitting.train(
        directory,
        model,
        how="ddp" if fitting.parallel_ranks() > 1 else "one",
        data=data,
        every=10**6,
        validate=False,
        lora=None,
        policy=PolicyConfig(model, dtype=dtype),
        rollout=RolloutConfig(group_size=8, max_new_tokens=24),
        rewards=[AccuracyReward()],
        optimizer=no_learning,
        lr_scheduler=None,
        updates_per_rollout=1,
        trainer={"max_steps": steps},
    )


def flips(model: str, dtype: str, prompts: int, steps: int) -> Result:
    """Rows, and those of them whose completion is another on two ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for count in (1, 2):
            directory = Path(scratch) / str(count)
            arguments = (directory, model, dtype, prompts, steps)
            succeed(on_ranks(count, sample, *arguments, logs=directory / "logs", timeout=3000))
            found.append([record["completion"] for record in fitting.completions(directory)])
    differing = sum(first != second for first, second in zip(*found, strict=True))
    return {"model": Path(model).name, "dtype": dtype, "rows": len(found[0]), "other tokens": differing}


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model = arguments.model or "builtin:arithmetic"
    rows = [flips(model, dtype, 16, arguments.steps) for dtype in ("float32", "float64")]
    summary = {"flip_rate_float32": rows[0]["other tokens"] / rows[0]["rows"]}
    report("Completions on one and on two ranks", rows, summary, arguments)


if __name__ == "__main__":
    main()
