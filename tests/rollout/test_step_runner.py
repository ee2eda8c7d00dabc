"""Records of decoding steps, and the memory that they share."""

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from lightning_lambdapo.rollout.step_runner import StepRunner


class Pooled:
    """As CUDA graphs do, records share a pool, which ends with the last of them and takes no record any more."""

    def __init__(self) -> None:
        self.recorded = 0
        self.pool = 0
        self.alive = {0: 0}
        self.ended: set[int] = set()

    def warm_up(self, step: Callable[[], None]) -> None:
        step()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        if self.pool in self.ended:
            raise RuntimeError("use_count > 0")
        self.recorded += 1
        replay = partial(step)
        self.alive[self.pool] += 1
        weakref.finalize(replay, self._end, self.pool)
        return replay

    def _end(self, pool: int) -> None:
        self.alive[pool] -= 1
        if not self.alive[pool]:
            self.ended.add(pool)

    def forget(self) -> None:
        self.pool += 1
        self.alive[self.pool] = 0


def test_steps_are_recorded_again_when_storage_has_moved() -> None:
    """A warning is an error here: nothing falls back to steps without a graph."""
    store = SimpleNamespace(version=1, shape="shape", begin_step=lambda: None)
    steps: list[int] = []
    capture = Pooled()
    runner = StepRunner(cast(Any, store), lambda: steps.append(store.version), capture)
    for store.version in (1, 2, 3):
        for _ in range(4):
            runner()
    assert steps == [1] * 4 + [2] * 4 + [3] * 4
    assert capture.recorded == 3
    assert runner.capture is capture
