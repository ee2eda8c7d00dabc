"""A reward that ends its process once, importable by name in other processes."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from lightning_lambdapo.rewards import Reward, RewardInputs


class DiesOnce(Reward):
    """Share of digits; at its ``at``-th call the process is sent ``by``, and ``flag`` made, if it is not there yet."""

    def __init__(self, flag: str, at: int, by: str = "SIGKILL") -> None:
        super().__init__(1.0, "digits")
        self.flag = flag
        self.at = at
        self.by = by
        self.calls = 0

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        self.calls += 1
        if self.calls == self.at and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.Signals[self.by])
        return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in inputs.completions]
