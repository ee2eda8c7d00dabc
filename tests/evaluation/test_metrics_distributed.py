"""Metrics merged over two ranks against one process that saw everything; run as a script, this file is one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_lambdapo
from lightning_lambdapo.evaluation.metrics import GroupDiagnostics, MajorityAtK, PassAtK, SemanticDensity
from lightning_lambdapo.functional import lambda_advantages

GROUPS, SPLIT = 13, 9
TEXTS = ["4 apples and 5 pears #### 9", "\\boxed{3}", "two pears", "unheard"]
SOLUTIONS = ["4 apples, then 5 pears #### 9", "a step \\boxed{3}", "two red pears", None]


def measure(groups: slice, texts: slice) -> dict[str, Any]:
    """Every metric over a share of the data, as plain numbers."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 3, (GROUPS, 6), generator=generator).double()
    rewards[SPLIT:] = 1.0  # only the first rank has ordered pairs
    scores = torch.randn(GROUPS, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 50, (GROUPS, 6), generator=generator)
    valid = torch.rand(GROUPS, 6, generator=generator) < 0.8
    advantages = lambda_advantages(rewards, scores, valid=valid)
    correct = torch.rand(GROUPS, 4, generator=generator) < 0.4
    votes = [[["1", "2", None][(b * i) % 3] for i in range(4)] for b in range(GROUPS)]

    diagnostics, density, silent = GroupDiagnostics("confidence"), SemanticDensity(), SemanticDensity()
    pass_at, majority_at = PassAtK(2), MajorityAtK(3)
    diagnostics.update(*(tensor[groups] for tensor in (rewards, scores, advantages, lengths, valid)))
    pass_at.update(correct[groups])
    majority_at.update(votes[groups], correct[groups])
    density.update(TEXTS[texts], SOLUTIONS[texts])
    silent.update(TEXTS[texts], [None] * len(TEXTS[texts]))
    return {
        "diagnostics": {name: value.item() for name, value in diagnostics.compute().items()},
        "density": {name: value.item() for name, value in density.compute().items()},
        "silent": silent.compute(),
        "pass": pass_at.compute().item(),
        "majority": majority_at.compute().item(),
    }


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    root = Path(lightning_lambdapo.__file__).parents[1]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][1] + outputs[1][1]
    merged = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert merged[0] == merged[1]
    alone = measure(slice(None), slice(None))
    assert merged[0].keys() == alone.keys()
    for name, values in alone.items():
        assert merged[0][name] == pytest.approx(values, abs=1e-6), name
    assert alone["silent"] == {}
    assert len(alone["diagnostics"]) == 10
    assert len(alone["density"]) == 3


if __name__ == "__main__":
    this_rank = int(sys.argv[1])
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=this_rank, world_size=2)
    # Shares of unlike size; the second rank has no text with a reference.
    shares = [(slice(SPLIT), slice(3)), (slice(SPLIT, None), slice(3, None))]
    print(json.dumps(measure(*shares[this_rank])))
    torch.distributed.destroy_process_group()
