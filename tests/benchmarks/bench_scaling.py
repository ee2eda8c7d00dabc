"""How time and memory of a step grow with group size, completion length and number of prompts.

    python tests/benchmarks/bench_scaling.py [--json FILE]

Each is doubled twice from 2 prompts x 4 rollouts x 32 tokens; exponents are fitted by least squares in logarithms, of
step time against total completion tokens. Memory is the growth of peak RSS over that of the loaded model.
"""

import json
import math
from typing import Any

from bench_step import measure_ours
from measuring import Result, answer, in_turn, options, prepared_model, report

BASE = {"prompts": 2, "group": 4, "max_new_tokens": 32}
FACTORS = [1, 2, 4]


def exponent(sizes: list[float], values: list[float]) -> float:
    """Least-squares slope of log(values) over log(sizes)."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Measure, print, write."""
    arguments = options(__doc__).parse_args()
    if arguments.measure:
        case = json.loads(arguments.measure)
        answer(measure_ours(arguments.model, arguments.prompts, case | {"threads": arguments.threads}))
        return
    cases: list[dict[str, Any]] = [BASE]
    cases += [BASE | {name: BASE[name] * factor} for name in BASE for factor in FACTORS[1:]]
    with prepared_model(arguments):
        results = in_turn(__file__, cases, arguments)
    rows = [
        case | {"tokens": found["tokens"], "step s": found["step_s"], "peak RSS GB": found["peak_rss_gb"]}
        for case, found in zip(cases, results, strict=True)
    ]
    summary: Result = {}
    for index, name in enumerate(BASE):
        chosen = [rows[0], *rows[1 + 2 * index : 3 + 2 * index]]
        summary[f"time_exponent_{name}"] = exponent([r["tokens"] for r in chosen], [r["step s"] for r in chosen])
        summary[f"memory_exponent_{name}"] = exponent([r["tokens"] for r in chosen], [r["peak RSS GB"] for r in chosen])
    summary["time_exponent"] = exponent([r["tokens"] for r in rows], [r["step s"] for r in rows])
    report("Growth of a step", rows, summary, arguments)


if __name__ == "__main__":
    main()
