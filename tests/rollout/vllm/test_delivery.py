"""A delivery that fails without a word ends the run, and the error says which weights were decoded instead."""

from pathlib import Path
from typing import Any

import pytest
from served import write_model
from small import ROWS, Rows, module, trainer

from lightning_lambdapo import AdapterConfig, LambdaPOModule, RolloutConfig
from lightning_lambdapo.engine_settings import VLLMConfig
from lightning_lambdapo.rollout.delivery import DeliveryError
from lightning_lambdapo.rollout.vllm.engine import VLLMEngine


def settings(**options: Any) -> dict[str, Any]:
    rollout = RolloutConfig(group_size=4, max_new_tokens=32, engine="vllm", vllm=VLLMConfig(options=options))
    return {"rollout": rollout}


class LongPrompts(Rows):
    """All begin with the same words, as under a system prompt."""

    def setup(self, stage: str) -> None:
        same = "a text that stands before every question, so that it is cached; "
        self._rows = {"train": [{**row, "prompt": same + str(row["prompt"])} for row in ROWS]}


def failure(tmp_path: Path, model: LambdaPOModule, data: type[Rows] = Rows) -> tuple[int, str]:
    """How many steps a run makes before delivery is found to have failed, and the message."""
    with pytest.raises(DeliveryError) as caught:
        trainer(tmp_path, max_epochs=3).fit(model, data(batch_size=4))
    return model.rollout_step, str(caught.value)


def test_the_base_without_its_adapter(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = VLLMEngine._deliver_adapter

    def forgotten(self: VLLMEngine, policy: Any) -> None:
        deliver(self, policy)
        self._adapter = None

    monkeypatch.setattr(VLLMEngine, "_deliver_adapter", forgotten)
    model = module(served, lora=AdapterConfig(r=4), **settings())
    steps, message = failure(tmp_path, model)
    assert steps == 1  # at first the adapter does nothing; the second rollout is convicted
    assert "the base model without the adapter or the weights before the last update" in message


def test_the_base_after_several_updates(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = VLLMEngine._deliver_adapter

    def forgotten(self: VLLMEngine, policy: Any) -> None:
        deliver(self, policy)
        if self._deliveries > 3:
            self._adapter = None

    monkeypatch.setattr(VLLMEngine, "_deliver_adapter", forgotten)
    model = module(served, lora=AdapterConfig(r=4), **settings())
    steps, message = failure(tmp_path, model)
    assert steps == 3
    assert "from the base model without the adapter, and not" in message


@pytest.mark.parametrize("lora", [AdapterConfig(r=4), None], ids=["lora", "full"])
def test_an_old_version(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: AdapterConfig | None
) -> None:
    sync = VLLMEngine.sync

    def skipped(self: VLLMEngine, policy: Any, version: int) -> None:
        if version != 3:
            sync(self, policy, version)

    monkeypatch.setattr(VLLMEngine, "sync", skipped)
    model = module(served, lora=lora, **settings())
    steps, message = failure(tmp_path, model)
    assert steps == 2
    assert "from the weights before the last update, and not from version 3" in message


@pytest.mark.parametrize("forgets", [True, False])
def test_prompts_cached_under_old_weights(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    model = module(served, **settings(block_size=32, enable_prefix_caching=True))
    if forgets:
        trainer(tmp_path, max_epochs=1).fit(model, LongPrompts(batch_size=4))
        assert model.sampler.delivery.evidence["prompts"].square > 0.1
        assert model.sampler.delivery.evidence["prompts"].share < 0.01
        return
    monkeypatch.setattr(VLLMEngine, "_forget_prompts", lambda _: None)
    steps, message = failure(tmp_path, model, LongPrompts)
    assert steps == 1
    assert "prompts that were cached under the weights before the last update" in message


def test_another_base(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_model(tmp_path / "other", rope_theta=77.0)
    monkeypatch.setattr("lightning_lambdapo.rollout.vllm.engine.base_directory", lambda *_: (other, None))
    model = module(served, lora=AdapterConfig(r=4), **settings())
    steps, message = failure(tmp_path, model)
    assert steps == 0
    assert "It computes another model" in message
