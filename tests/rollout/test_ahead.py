"""The next rollout is sampled while the policy learns from this one."""

import threading
from pathlib import Path
from typing import Any, cast

import fitting
import pytest
import torch
from copies import CopyEngine, CopyModule
from small import ROWS, Digits, Rows, module, trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_lambdapo import AdapterConfig, CompletionsLogger, PromptCollator, RolloutConfig
from lightning_lambdapo.engine_settings import VLLMServerConfig
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.rollout.delivery import DeliveryError


class AheadEngine(CopyEngine):
    """Notes which version each rollout came from, and says when it begins one."""

    max_staleness = 1
    begun: threading.Event
    versions: list[int]

    def generate(self, *arguments: Any, **settings: Any) -> Any:
        self.versions.append(self.version)
        self.begun.set()
        return super().generate(*arguments, **settings)


class AheadModule(CopyModule):
    staleness = 1

    def build_engine(self, model: PreTrainedModel) -> AheadEngine:
        engine = AheadEngine(self.tokenizer, (1,), 0)
        engine.max_staleness, engine.begun, engine.versions = self.staleness, threading.Event(), []
        engine.broken = self.broken
        return engine


def made(base: str, *, rate: float = 1e-2, staleness: int = 1, broken: str | None = None) -> AheadModule:
    plain = module(base, rollout=RolloutConfig(group_size=4, max_new_tokens=24), lora=AdapterConfig(r=4))
    model = AheadModule(
        **{**plain.hparams, "rewards": [Digits()], "optimizer": lambda p: torch.optim.AdamW(p, lr=rate)}
    )
    model.staleness, model.broken = staleness, broken
    return model


def fit(path: Path, model: AheadModule, **settings: Any) -> list[dict[str, Any]]:
    from lightning.pytorch.loggers import CSVLogger

    settings = {"max_epochs": 2, "logger": CSVLogger(path), "callbacks": [CompletionsLogger()]} | settings
    trainer(path, **settings).fit(model, Rows(batch_size=4))
    return fitting.completions(path)


def test_each_rollout_comes_from_the_weights_before_the_last_update(base: str, tmp_path: Path) -> None:
    """But for the first of an epoch, because the order of the next epoch is not known."""
    model = made(base)
    fit(tmp_path, model)
    engine: Any = model.engine
    assert engine.versions == [1, 1, 2, 3, 5, 5, 6, 7]
    assert model.sampler.delivery.version == 8
    assert model.rollout_step == 8


def test_learning_does_not_wait(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(base)
    seen: list[bool] = []
    step = Learner.step

    def observed(learner: Learner, update: Any) -> None:
        engine: Any = model.engine
        if len(seen) % 4 < 3:  # in an epoch's last step nothing follows
            seen.append(engine.begun.wait(100))
        else:
            seen.append(True)
        engine.begun.clear()
        step(learner, update)

    def cleared(sampler: Any, **settings: Any) -> None:
        model.engine.begun.clear()  # type: ignore[attr-defined]
        ahead(sampler, **settings)

    from lightning_lambdapo.rollout.sampler import RolloutSampler

    ahead = RolloutSampler._sample_ahead
    monkeypatch.setattr(RolloutSampler, "_sample_ahead", cleared)
    monkeypatch.setattr(Learner, "step", observed)
    fit(tmp_path, model)
    assert seen == [True] * 8


def test_without_updates_it_is_the_same_run(base: str, tmp_path: Path) -> None:
    """The same prompts, seeds and tokens in the same steps."""
    ahead = fit(tmp_path / "ahead", made(base, rate=0.0))
    waiting = fit(tmp_path / "waiting", made(base, rate=0.0, staleness=0))
    assert ahead == waiting
    assert len(ahead) == 8 * 16


def test_the_first_rollout_of_each_epoch_is_that_of_a_run_that_waits(base: str, tmp_path: Path) -> None:
    ahead, waiting = (fit(tmp_path / str(kind), made(base, staleness=kind)) for kind in (1, 0))
    first = [record for record in ahead if record["step"] == 1]
    assert first == [record for record in waiting if record["step"] == 1]
    assert ahead != waiting


@pytest.mark.parametrize("broken", ["previous", "base"])
def test_a_failed_delivery_is_found_all_the_same(base: str, tmp_path: Path, broken: str) -> None:
    with pytest.raises(DeliveryError):
        fit(tmp_path, made(base, broken=broken))


def test_nothing_is_sampled_after_the_last_step(base: str, tmp_path: Path) -> None:
    model = made(base)
    fit(tmp_path, model, max_steps=2)
    assert len(model.engine.versions) == 2  # type: ignore[attr-defined]


def test_validation_waits_for_what_is_being_sampled(base: str, tmp_path: Path) -> None:
    """It needs other weights, and its own rollouts are of the current ones."""
    model = made(base)
    fit(tmp_path, model, limit_val_batches=1, val_check_interval=1)
    engine: Any = model.engine
    # A training step's own rollout and the one that it begins, then validation's: v2 begins the third step's.
    assert engine.versions[:7] == [1, 1, 2, 2, 3, 3, 4]
    assert model.sampler.delivery.evidence["previous"].square > 0


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_data_that_does_not_tell_what_follows_is_refused(base: str, tmp_path: Path) -> None:
    model = made(base)
    data: Any = DataLoader(cast(Any, ROWS), batch_size=4, collate_fn=PromptCollator(model.tokenizer))
    with pytest.raises(ValueError, match="Use `LambdaPODataModule`, or set max_staleness to 0"):
        trainer(tmp_path).fit(model, data)


def test_not_with_dynamic_sampling() -> None:
    servers = VLLMServerConfig(urls=["http://a:1"], max_staleness=1)
    with pytest.raises(ValueError, match="which prompts replace others is not known"):
        RolloutConfig(engine="vllm_server", servers=servers, reserve_prompts=2)
    with pytest.raises(ValueError, match="max_staleness"):
        VLLMServerConfig(urls=["http://a:1"], max_staleness=2)
