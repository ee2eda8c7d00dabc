"""Ray Train runs the training of one process: on two workers, after a kill, after a stop, and in shards."""

import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from comparing import assert_same, assert_same_run
from lightning.pytorch import Callback, LightningModule, Trainer
from small import Digits

import lightning_lambdapo
from lightning_lambdapo import distributed
from lightning_lambdapo.callbacks import RayReport, finished_rollouts
from lightning_lambdapo.distributed import ray_train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

README = Path(distributed.__file__).with_name("README.md")
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with two processors on this machine, whose workers find the tests."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train.torch")
    paths = [str(TESTS), str(Path(lightning_lambdapo.__file__).parents[1])]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    nice = {"worker_niceness": 0}  # Ray lets its workers wait for all other work of the machine, 15 by default
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables}, _system_config=nice)
    yield ray
    ray.shutdown()


class Registered(Callback):
    """Waits at the start of a step until Ray has taken note of every report, which it does every two seconds."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        import ray.train

        if finished_rollouts(trainer) + 1 == self.step:
            ray.train.get_all_reported_checkpoints()


def loop(config: dict[str, Any]) -> None:
    """What each worker calls. Only the first attempt dies."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    torch.set_num_threads(1)
    options = dict(config["options"])
    death, own = options.pop("death", None), options.pop("trainer", {})
    strategy = {"ddp": RayDDPStrategy, "shards": ray_train.RayModelParallelStrategy}[config["strategy"]]()
    callbacks: list[Callback] = [RayReport(every_n_rollouts=config["every"])]
    with ray_train.resume_path() as path:
        if path is not None:
            death = None
        elif death is not None:
            callbacks.append(Registered(int(death.split()[1])))
        fitting.train(
            Path(config["directory"]),
            config["base"],
            how="ddp",
            resume=path,
            death=death,
            callbacks=callbacks,
            trainer={"strategy": strategy, "plugins": [RayLightningEnvironment()], "devices": "auto"} | own,
            **options,
        )


def train(
    directory: Path, base: str, *, strategy: str = "ddp", every: int = 2, failures: int = 0, **options: Any
) -> Any:
    """The run of :func:`fitting.train` on two workers. Gives back Ray's result."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = {"directory": str(directory), "base": base, "strategy": strategy, "every": every}
    return TorchTrainer(
        loop,
        train_loop_config=config | {"options": {"rewards": [Digits()], "kind": "lora64"} | options},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="run", storage_path=str(directory / "ray"), failure_config=FailureConfig(max_failures=failures)
        ),
    ).fit()


def reported(result: Any) -> dict[int, Path]:
    """The checkpoints that Ray keeps, by the number of finished rollouts that was reported with each."""
    return {metrics["step"]: Path(kept.path) / "checkpoint.ckpt" for kept, metrics in result.best_checkpoints}


@pytest.fixture(scope="module")
def whole(ray: Any, base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run on two workers without an interruption."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, train(directory, base)


def test_two_workers_train_the_run_of_one_process(whole: tuple[Path, Any], base: str, tmp_path: Path) -> None:
    directory, result = whole
    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", kind="lora64", rewards=[Digits()])
    assert_same(one, directory, tolerance=1e-6)
    assert result.error is None


def test_every_second_rollout_is_reported(whole: tuple[Path, Any]) -> None:
    directory, result = whole
    assert sorted(reported(result)) == [2, 4, 6, 8, 10, 12]
    logged = fitting.metrics(directory)
    for _, metrics in result.best_checkpoints:
        assert metrics["train/reward"] == pytest.approx(logged[metrics["step"] - 1, "train/reward"])
        assert metrics["epoch"] == (metrics["step"] - 1) // fitting.STEPS_PER_EPOCH
    for step, path in reported(result).items():
        entries = torch.load(path, weights_only=True)
        assert entries["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == step
    assert Path(result.checkpoint.path) / "checkpoint.ckpt" == reported(result)[12]


def test_a_killed_worker_is_resumed(whole: tuple[Path, Any], base: str, tmp_path: Path) -> None:
    result = train(tmp_path, base, failures=1, death="update 8 SIGKILL 1")
    assert_same_run(whole[0], tmp_path, 6)
    assert sorted(reported(result)) == [2, 4, 6, 8, 10, 12]


def test_a_stopped_run_is_resumed(whole: tuple[Path, Any], base: str, tmp_path: Path) -> None:
    """It ends after five rollouts, which is no multiple of two, and is reported nevertheless."""
    stopped = train(tmp_path, base, trainer={"max_steps": 10})
    assert sorted(reported(stopped)) == [2, 4, 5]
    train(tmp_path, base)
    assert_same_run(whole[0], tmp_path, 5)


def test_shards_are_reported_whole_and_resumed(ray: Any, base: str, tmp_path: Path) -> None:
    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", kind="lora64", rewards=[Digits()])
    two = tmp_path / "two"
    result = train(two, base, strategy="shards", every=3, failures=1, death="learning 8 SIGKILL 1")
    assert sorted(reported(result)) == [3, 6, 9, 12]
    for path in reported(result).values():
        assert {file.name for file in path.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}
    found = fitting.completions(two, 1)
    assert {record["step"] for record in found} == set(range(7, 13))
    expected = [record["completion"] for record in fitting.completions(one) if record["step"] > 6]
    assert [record["completion"] for record in found] == expected
    weights = torch.load(two / "weights.pt", weights_only=True)
    for name, value in torch.load(one / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def test_the_example_runs(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its judge, whose processes a worker starts outside of its main thread."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    storage = f"RunConfig(storage_path={str(tmp_path / 'ray')!r}, "
    (tmp_path / "example.py").write_text(code.replace("RunConfig(", storage))
    names = runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    metrics = names["result"].metrics
    assert metrics["step"] == 3
    assert 0.0 <= metrics["train/reward"] <= 1.0
    assert metrics["train/accuracy"] > 0.0
    assert "checkpoint" in capsys.readouterr().out
