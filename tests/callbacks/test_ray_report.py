"""What is said to Ray Train, and what is refused, with a stand-in for Ray."""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from small import fit, module

from lightning_lambdapo.callbacks import RayReport
from lightning_lambdapo.distributed.parallel import is_sharded, replicates, saves_shards
from lightning_lambdapo.distributed.ray_train import RayModelParallelStrategy, prepare_trainer, resume_path


class Kept:
    """A checkpoint in Ray's storage."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def from_directory(cls, path: str) -> "Kept":
        return cls(path)

    @contextmanager
    def as_directory(self) -> Any:
        yield self.path


class Ray:
    """What this package uses of Ray, on a machine with one of ``size`` workers."""

    def __init__(self) -> None:
        self.size = 1
        self.last: Kept | None = None
        self.reports: list[tuple[dict[str, Any], str | None, int]] = []

    def report(self, metrics: dict[str, Any], checkpoint: Kept | None = None) -> None:
        assert checkpoint is not None
        entries = torch.load(Path(checkpoint.path) / "checkpoint.ckpt", weights_only=True)
        self.reports.append((metrics, checkpoint.path, entries["global_step"]))

    def get_world_size(self) -> int:
        return self.size

    def get_local_world_size(self) -> int:
        return 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    """A stand-in for Ray whose strategy and environment are those of one process."""
    stand_in = Ray()
    names: dict[str, dict[str, Any]] = {
        "ray": {},
        "ray.train": {
            "Checkpoint": Kept,
            "report": stand_in.report,
            "get_context": lambda: stand_in,
            "get_checkpoint": lambda: stand_in.last,
        },
        "ray.train.torch": {"get_device": lambda: torch.device("cpu", 1)},
        "ray.train.lightning": {
            "RayDDPStrategy": SingleDeviceStrategy,
            "RayFSDPStrategy": SingleDeviceStrategy,
            "RayLightningEnvironment": type(None),
        },
    }
    for name, values in names.items():
        found: Any = ModuleType(name)
        vars(found).update(values)
        monkeypatch.setitem(sys.modules, name, found)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, found)
    return stand_in


def test_reports_count_rollouts_and_include_the_last(ray: Ray, base: str, tmp_path: Path) -> None:
    """Four rollouts are an epoch. Of seven, each third one is reported, and then the end."""
    model = module(base, updates_per_rollout=2)
    steps = fit(tmp_path, model, max_epochs=2, max_steps=14, callbacks=[RayReport(every_n_rollouts=3)])
    assert [metrics["step"] for metrics, _, _ in ray.reports] == [3, 6, 7]
    assert [metrics["epoch"] for metrics, _, _ in ray.reports] == [0, 1, 1]
    assert [updates for _, _, updates in ray.reports] == [6, 12, 14]
    for metrics, path, _ in ray.reports:
        assert metrics["train/reward"] == steps[metrics["step"] - 1]["train/reward"]
        assert path is not None
        assert not Path(path).exists(), "Ray has its copy"


def test_nothing_is_reported_twice(ray: Ray, base: str, tmp_path: Path) -> None:
    fit(tmp_path, module(base), callbacks=[RayReport(every_n_rollouts=2)])
    assert [metrics["step"] for metrics, _, _ in ray.reports] == [2, 4]


def test_checkpoints_are_written_where_the_user_says(ray: Ray, base: str, tmp_path: Path) -> None:
    fit(tmp_path, module(base), callbacks=[RayReport(every_n_rollouts=4, directory=tmp_path)])
    assert [Path(str(path)).parent for _, path, _ in ray.reports] == [tmp_path]


@pytest.mark.parametrize("count", [0, 1.5])
def test_the_cadence_is_a_whole_number(count: Any) -> None:
    with pytest.raises(ValueError, match="every_n_rollouts"):
        RayReport(every_n_rollouts=count)


def test_a_new_run_starts_anew_and_another_resumes(ray: Ray) -> None:
    with resume_path() as path:
        assert path is None
    ray.last = Kept("/kept/checkpoint_3")
    with resume_path() as path:
        assert path == "/kept/checkpoint_3/checkpoint.ckpt"


def test_the_sharding_strategy_takes_ranks_and_device_from_ray(ray: Ray) -> None:
    ray.size = 6
    strategy = RayModelParallelStrategy()
    assert isinstance(strategy, ModelParallelStrategy)
    assert vars(strategy)["_data_parallel_size"] == 6
    assert vars(strategy)["_tensor_parallel_size"] == 1
    assert strategy.root_device == torch.device("cpu", 1)
    assert is_sharded(strategy)
    assert not replicates(strategy)
    assert saves_shards(strategy)
    assert not saves_shards(RayModelParallelStrategy(save_distributed_checkpoint=False))


class Trained:
    """A trainer with a strategy."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy


def test_shards_on_several_machines_need_a_shared_directory(ray: Ray, tmp_path: Path) -> None:
    ray.size = 2
    shards: Any = Trained(RayModelParallelStrategy())
    whole: Any = Trained(RayModelParallelStrategy(save_distributed_checkpoint=False))
    model: Any = None
    with pytest.raises(ValueError, match="to a directory that all machines share"):
        RayReport(1).setup(shards, model, "fit")
    RayReport(1, directory=tmp_path).setup(shards, model, "fit")
    RayReport(1).setup(whole, model, "fit")


def test_a_trainer_of_its_own_processes_is_refused(ray: Ray) -> None:
    own: Any = Trained(ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"strategy=ModelParallelStrategy\) does not train on Ray's workers"):
        prepare_trainer(own)
    unaware: Any = Trained(RayModelParallelStrategy())
    unaware.strategy.cluster_environment = Ray()
    with pytest.raises(ValueError, match="environment is Ray, which does not know Ray's ranks"):
        prepare_trainer(unaware)
    fitting: Any = Trained(RayModelParallelStrategy())
    assert prepare_trainer(fitting) is fitting
