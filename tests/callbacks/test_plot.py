"""Curves of metrics and their picture, and the throughput beside them."""

import json
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from small import Rows, module, trainer

from lightning_lambdapo import RewardPlot, Throughput


def test_throughput_and_curves(base: str, tmp_path: Path) -> None:
    plot = RewardPlot(every_n_rollouts=2, metrics=("train/reward", "val/reward", "train/nothing"))
    run = trainer(tmp_path, callbacks=[plot, Throughput()], logger=CSVLogger(tmp_path), limit_val_batches=1.0)
    run.fit(module(base), Rows(batch_size=4))
    assert run.callback_metrics["train/tokens_per_second"] > 0
    curves = plot.state_dict()["curves"]
    assert [step for step, _ in curves["train/reward"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["val/reward"]] == [4]
    again = RewardPlot()
    again.load_state_dict(json.loads(json.dumps(plot.state_dict())))
    assert again.state_dict() == plot.state_dict()
    assert (tmp_path / "lightning_logs" / "version_0" / "reward.png").read_bytes().startswith(b"\x89PNG")
