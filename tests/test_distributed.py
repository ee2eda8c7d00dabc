"""Two gloo processes train the same run as one."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_run
import pytest
import torch


def run_on_two(strategy: str, adapter: str, base: str, output: Path) -> dict[str, Any]:
    """Run the script with a deadline at which the whole process group is killed."""
    command = [sys.executable, distributed_run.__file__, strategy, adapter, base, str(output)]
    root = Path(distributed_run.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    log = output.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-3000:]
    found: dict[str, Any] = torch.load(output, weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "adapter"), [("ddp", "lora"), ("ddp", "full"), ("fsdp", "full"), ("fsdp", "lora")]
)
def test_two_processes_train_the_same_run_as_one(base: str, tmp_path: Path, strategy: str, adapter: str) -> None:
    """The same prompts, rollouts, statistics and weights, with ranks that finish at different times."""
    distributed_run.train("one", adapter, base, str(tmp_path / "one.pt"))
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    two = run_on_two(strategy, adapter, base, tmp_path / "two.pt")
    assert len(one["steps"]) == len(two["steps"]) == 5
    for step, (alone, together) in enumerate(zip(one["steps"], two["steps"], strict=True)):
        assert alone.keys() == together.keys()
        # Whole-number statistics are equal to the bit: the very same tokens were drawn.
        for name in ("train/completion_length", "train/truncated", "train/reward"):
            assert alone[name] == pytest.approx(together[name], rel=1e-6), (step, name)
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5), step
    assert "val/reward" in one["steps"][-1]
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=0, atol=1e-5)
