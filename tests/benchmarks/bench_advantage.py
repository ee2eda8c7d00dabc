"""What the lambda advantage costs, as a share of a training step, for groups of up to 256.

    python tests/benchmarks/bench_advantage.py [--json FILE]

16 groups. The step is that of the built-in tiny policy (arithmetic, 16 new tokens, one thread per `--threads`), the
fastest step this package has: any other policy makes the share smaller.
"""

import json
from pathlib import Path
from typing import Any

from measuring import Result, answer, best_time, in_turn, options, report, time_last_step


def reward(completions: list[str], **_: Any) -> list[float]:
    """Costs nothing, and sets the rows of a group apart."""
    return [float(len(text) % 5) for text in completions]


GROUPS, SIZES = 16, [8, 16, 64, 256]


def measure(model: str | None, prompts: Path | None, case: Result) -> Result:
    """Seconds of the advantage and of a step with groups of one size."""
    import torch

    from lightning_lambdapo import LambdaPOModule, PolicyConfig, RolloutConfig
    from lightning_lambdapo.functional import lambda_advantages

    size = case["size"]
    torch.manual_seed(0)
    rewards, scores = torch.rand(GROUPS, size), torch.randn(GROUPS, size)
    seconds = best_time(lambda: lambda_advantages(rewards, scores), 20)

    module = LambdaPOModule(
        PolicyConfig(model="builtin:arithmetic"),
        rollout=RolloutConfig(group_size=size, max_new_tokens=16),
        rewards=[reward],
        seed=0,
    )
    rows = [{"prompt": f"{index + 1}+{index + 2}+3="} for index in range(GROUPS)]
    return {"advantage_ms": seconds * 1e3, "step_ms": time_last_step(module, rows, 3) * 1e3}


def main() -> None:
    """Measure, print, write."""
    arguments = options(__doc__).parse_args()
    if arguments.measure:
        answer(measure(arguments.model, arguments.prompts, json.loads(arguments.measure)))
        return
    results = in_turn(__file__, [{"size": size} for size in SIZES], arguments)
    rows = [
        {
            "group": size,
            "advantage ms": found["advantage_ms"],
            "step ms": found["step_ms"],
            "share %": 100 * found["advantage_ms"] / found["step_ms"],
        }
        for size, found in zip(SIZES, results, strict=True)
    ]
    summary = {f"share_percent_at_{row['group']}": row["share %"] for row in rows}
    report("The lambda advantage of 16 groups, and a whole step of the tiny policy", rows, summary, arguments)


if __name__ == "__main__":
    main()
