"""Importance correction in the learning pass and in runs: when it is on, its gradient, its log, a biased sampler."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import fitting
import pytest
import tiny
import torch
from comparing import assert_same
from gradients import EVERYTHING, learn, make, row_logprobs, slow_gradient
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from ranks import on_ranks, succeed
from small import Digits, equal, fit, module, weights
from torch import Tensor
from transformers import PreTrainedModel
from where import DEVICE

from lightning_lambdapo import AlgorithmConfig, LambdaPOModule, PolicyConfig, RolloutConfig
from lightning_lambdapo.config import SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.learning.importance import correction_in_use
from lightning_lambdapo.rollout import GroupedEngine, HFEngine, RolloutEngine

KEYS = ("importance_ratio_mean", "importance_ratio_max", "importance_ess", "importance_capped_share", "importance_kl")
RATIO = 1.5


def bias(ids: Tensor) -> Tensor:
    """A log-ratio of scorer and sampler for each token: from -0.9 to 0.9, and another one for each id."""
    return 0.9 * torch.sin(ids.double() * 1.7)


def biased(rollout: Rollout) -> Rollout:
    """The rollout as a sampler would record it whose log-probabilities are off by :func:`bias`."""
    off = torch.where(rollout.completion_mask, bias(rollout.completion_ids), 0.0)
    return replace(rollout, sampling_logprobs=(rollout.sampling_logprobs - off).to(rollout.sampling_logprobs))


class BiasedEngine(GroupedEngine):
    """Samples as the grouped engine does, and records probabilities that are :data:`RATIO` times too small."""

    exact_logprobs = False

    def generate(
        self, model: PreTrainedModel, batch: PromptBatch, *, sampling: SamplingConfig, uniforms: Tensor
    ) -> Rollout:
        rollout = super().generate(model, batch, sampling=sampling, uniforms=uniforms)
        off = rollout.completion_mask * math.log(RATIO)
        return replace(rollout, sampling_logprobs=rollout.sampling_logprobs - off)


class BiasedModule(LambdaPOModule):
    """A module with that engine."""

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        return BiasedEngine(self.tokenizer, (1,), 0, self.rollout_config, self.performance)


# -- when it is on --------------------------------------------------------------------------------------------------


def strategy(precision: str) -> SingleDeviceStrategy:
    plugin = MixedPrecision(precision, DEVICE.type) if precision == "bf16-mixed" else None  # type: ignore[arg-type]
    return SingleDeviceStrategy(DEVICE, precision_plugin=plugin)


@pytest.mark.parametrize(
    ("setting", "precision", "dtype", "exact", "expected"),
    [
        ("auto", "32-true", torch.float32, True, None),
        ("auto", "32-true", torch.float64, True, None),
        ("auto", "32-true", torch.float32, False, "truncate"),  # an engine that is not ours
        ("auto", "bf16-mixed", torch.float32, True, "truncate"),
        ("auto", "32-true", torch.bfloat16, True, "truncate"),  # a base in 16 bits without autocast
        ("none", "bf16-mixed", torch.bfloat16, False, None),
        ("truncate", "32-true", torch.float32, True, "truncate"),
        ("mask", "32-true", torch.float32, True, "mask"),
    ],
)
def test_when_it_is_on(setting: Any, precision: str, dtype: torch.dtype, exact: bool, expected: str | None) -> None:
    algorithm = AlgorithmConfig(importance_correction=setting)
    policy = torch.nn.Linear(2, 2).to(dtype)
    assert correction_in_use(algorithm, policy, strategy(precision), exact_sampler=exact) == expected


def test_auto_sees_rounded_products() -> None:
    policy = torch.nn.Linear(2, 2)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert correction_in_use(AlgorithmConfig(), policy, strategy("32-true"), exact_sampler=True) == "truncate"
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_sees_weights_of_8_bits_and_not_the_storage_of_4() -> None:
    for dtype, expected in ((torch.int8, "truncate"), (torch.uint8, None)):
        policy = torch.nn.Linear(2, 2)
        policy.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False)
        assert correction_in_use(AlgorithmConfig(), policy, strategy("32-true"), exact_sampler=True) == expected


def test_an_engine_is_not_exact_unless_it_says_so() -> None:
    assert not RolloutEngine.exact_logprobs
    assert GroupedEngine.exact_logprobs
    assert HFEngine.exact_logprobs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_correction": "off"}, "`algorithm.importance_correction` must be one of auto, none, truncate"),
        ({"importance_correction_level": "row"}, "`algorithm.importance_correction_level` must be one of token"),
        ({"importance_cap": 0.5}, "`importance_cap` must be above 1, got 0.5"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**settings)


# -- gradient and statistics ----------------------------------------------------------------------------------------


def expected_weights(rollout: Rollout, correction: str, level: str, cap: float) -> Tensor:
    """Weights of the known bias, row by row."""
    found = torch.zeros(rollout.completion_ids.shape, dtype=torch.float64)
    for row, length in enumerate(rollout.lengths.tolist()):
        ratio = bias(rollout.completion_ids[row, :length]).exp()
        if level == "sequence":
            ratio = ratio.prod().expand(length)
        outside = (ratio > cap) | (ratio < 1 / cap)
        found[row, :length] = ratio.clamp(max=cap) if correction == "truncate" else torch.where(outside, 0.0, ratio)
    return found


@pytest.mark.parametrize(("correction", "level"), [("truncate", "token"), ("mask", "token"), ("truncate", "sequence")])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_gradient_and_log_are_those_of_the_known_ratio(correction: str, level: str, aggregation: str) -> None:
    """However the step is split, packed and padded. The KL term is as it was."""
    model, batch, rollout, advantages, valid = make()
    reference = tiny.model("llama", seed=1, dtype=torch.float64)
    known = expected_weights(rollout, correction, level, cap=1.5)
    expected = slow_gradient(model, batch, rollout, advantages, valid, aggregation, reference, 0.2, weights=known)
    settings: dict[str, Any] = {
        "importance_correction": correction,
        "importance_correction_level": level,
        "importance_cap": 1.5,
        "aggregation": aggregation,
        "kl_coef": 0.2,
    }
    logs = []
    for max_tokens, share_prompts in ((EVERYTHING, True), (40, True), (1, True), (50, False)):
        split: dict[str, Any] = {"max_tokens": max_tokens, "share_prompts": share_prompts}
        found, statistics = learn(
            model, batch, biased(rollout), advantages, valid, reference=reference, **split, **settings
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        logs.append({name: statistics[name] for name in KEYS})
    for log in logs[1:]:
        assert log == pytest.approx(logs[0], rel=1e-9)
    # The reference makes all valid rows count.
    places = rollout.completion_mask & valid[:, None]
    d = bias(rollout.completion_ids)[places]
    assert logs[0]["importance_kl"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-6)
    if level == "token":
        ratio, used = d.exp(), known[places]
    else:
        rows = [row for row in range(12) if valid[row]]
        sums = torch.stack([bias(rollout.completion_ids[row, : rollout.lengths[row]]).sum() for row in rows])
        ratio, used = sums.exp(), known[rows, 0]
    assert logs[0]["importance_ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-9)
    assert logs[0]["importance_ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-9)
    assert logs[0]["importance_capped_share"] == pytest.approx(((used - ratio).abs() > 1e-9).double().mean().item())
    share = used.sum() ** 2 / (len(used) * used.square().sum())
    assert logs[0]["importance_ess"] == pytest.approx(share.item(), rel=1e-9)
    assert 0 < logs[0]["importance_capped_share"] < 1
    assert logs[0]["importance_ess"] < 0.99


def test_off_policy_the_ratio_is_that_of_the_policy_before() -> None:
    """The present policy is 0.1 above the one before, whose distance from the sampler is the known one."""
    model, batch, rollout, advantages, valid = make()
    old = torch.zeros_like(rollout.sampling_logprobs)
    with torch.no_grad():
        for row in range(12):
            logprobs = row_logprobs(model, batch, rollout, row)
            old[row, : len(logprobs)] = logprobs - 0.1
    off = torch.where(rollout.completion_mask, bias(rollout.completion_ids), 0.0)
    sampled = replace(rollout, sampling_logprobs=old - off)
    settings: dict[str, Any] = {"importance_correction": "truncate", "importance_cap": 1.5}
    found, statistics = learn(model, batch, sampled, advantages, valid, old_logprobs=old, max_tokens=50, **settings)
    known = expected_weights(rollout, "truncate", "token", cap=1.5) * math.exp(0.1)
    expected = slow_gradient(model, batch, rollout, advantages, valid, "token", weights=known)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    scored = rollout.completion_mask & (valid & (advantages != 0))[:, None]
    assert statistics["importance_ratio_max"] == pytest.approx(off[scored].exp().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_changes_no_bit_in_float32_with_our_engines(dtype: torch.dtype) -> None:
    case = make(dtype)
    found, statistics = learn(*case, max_tokens=40)
    expected, without = learn(*case, max_tokens=40, importance_correction="none")
    assert torch.equal(found, expected)
    assert statistics == without
    assert not any(name.startswith("importance") for name in statistics)


class Before(Callback):
    """Keeps the weights before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = weights(pl_module)


# -- runs -----------------------------------------------------------------------------------------------------------


def test_a_float32_run_is_the_same_with_and_without(base: str, tmp_path: Path) -> None:
    ends, logs = [], []
    for setting in ("auto", "none"):
        model = module(base, algorithm=AlgorithmConfig(importance_correction=setting), updates_per_rollout=2)
        logs.append(fit(tmp_path, model, limit_train_batches=2))
        ends.append(weights(model))
    assert equal(*ends)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("updates", [1, 2])
def test_a_bf16_run_logs_the_statistics_and_learns(base: str, tmp_path: Path, updates: int) -> None:
    model = module(base, updates_per_rollout=updates, policy=PolicyConfig(base))
    steps = fit(tmp_path, model, precision="bf16-mixed", max_epochs=3)
    assert len(steps) == 12
    for step in steps:
        assert {f"train/{name}" for name in KEYS} <= step.keys()
        assert step["train/importance_ratio_mean"] == pytest.approx(1.0, abs=0.05)
        assert 1.0 <= step["train/importance_ratio_max"] < 2.0
        assert 0.99 < step["train/importance_ess"] <= 1.0
        assert step["train/importance_capped_share"] == 0.0
        assert 0.0 < step["train/importance_kl"] < 0.01
    assert sum(step["train/reward"] for step in steps[-3:]) > sum(step["train/reward"] for step in steps[:3]) + 0.3


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With rate 1 and no clipping a step's change is the gradient itself."""
    return torch.optim.SGD(parameters, lr=1.0)


def test_a_biased_sampler_is_seen_and_corrected(base: str, tmp_path: Path) -> None:
    """One step in float64. Advantages do not depend on what was recorded, so only the weights differ."""
    changes, logs = [], []
    for kind, correction in ((BiasedModule, "auto"), (BiasedModule, "none"), (LambdaPOModule, "auto")):
        settings: dict[str, Any] = {"estimator": "dr_grpo", "importance_correction": correction}
        model = kind(
            PolicyConfig(base, dtype="float64"),
            rollout=RolloutConfig(group_size=4, max_new_tokens=8),
            algorithm=AlgorithmConfig(**settings),
            rewards=[Digits()],
            optimizer=sgd,
            max_grad_norm=None,
            seed=3,
        )
        before = Before()
        (log,) = fit(tmp_path, model, precision="64-true", limit_train_batches=1, callbacks=[before])
        changes.append({name: value - before.weights[name] for name, value in weights(model).items()})
        logs.append(log)
    corrected, uncorrected, true = changes
    assert equal(uncorrected, true), "without a correction what was recorded changes no gradient"
    for name, change in true.items():  # transformers' norms round to float32 on the way
        torch.testing.assert_close(corrected[name], RATIO * change, rtol=0, atol=1e-7)
    assert max(change.abs().max().item() for change in true.values()) > 1e-3
    found = [logs[0][f"train/{name}"] for name in KEYS]
    assert found == pytest.approx([RATIO, RATIO, 1.0, 0.0, RATIO - 1 - math.log(RATIO)], rel=1e-6)
    for log in logs[1:]:
        assert not any("importance" in name for name in log)


def train_biased(directory: Path, base: str, **options: Any) -> None:
    """A run whose engine records log-probabilities that are off."""
    fitting.wrap(GroupedEngine, "generate", lambda original, *given, **named: biased(original(*given, **named)))
    fitting.train(directory, base, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("correction", "level"), [("truncate", "token"), ("mask", "sequence")])
def test_two_ranks_correct_as_one(base: str, tmp_path: Path, correction: Any, level: Any) -> None:
    algorithm = AlgorithmConfig(importance_correction=correction, importance_correction_level=level, importance_cap=1.5)
    options: dict[str, Any] = {
        "kind": "full64",
        "rewards": [Digits()],
        "algorithm": algorithm,
        "max_tokens_per_micro_batch": 40,
        "trainer": {"max_steps": 4, "limit_val_batches": 0},
    }
    for ranks, how in ((1, "one"), (2, "ddp")):
        (tmp_path / how).mkdir()
        started = on_ranks(ranks, train_biased, tmp_path / how, base, logs=tmp_path / how / "logs", how=how, **options)
        succeed(started)
    assert_same(tmp_path / "one", tmp_path / "ddp", tolerance=1e-6)
    logged = fitting.metrics(tmp_path / "ddp")
    assert {f"train/{name}" for name in KEYS} <= {name for _, name in logged}
    shares = [value for (_, name), value in logged.items() if name == "train/importance_ess"]
    assert max(shares) > 0, "not everything is masked"
    assert max(shares) < 1
