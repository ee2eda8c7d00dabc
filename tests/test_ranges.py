"""Every number in the settings has a range, and what is outside is refused when the settings are made."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import LoraConfig
from small import Digits, Rows, module, trainer

from lightning_lambdapo import (
    AdapterConfig,
    AlgorithmConfig,
    CompletionsLogger,
    DataSource,
    EvaluationConfig,
    LambdaPODataModule,
    LambdaPOModule,
    PolicyConfig,
    RewardPlot,
    RolloutCheckpoint,
    RolloutConfig,
    SamplingConfig,
)
from lightning_lambdapo.callbacks import TrainingConsole
from lightning_lambdapo.config import PerformanceConfig
from lightning_lambdapo.policy.loading import load_policy
from lightning_lambdapo.rewards import AccuracyReward, LengthPenalty, SemanticDensityReward

#: Classes with their required arguments.
OWNERS: list[tuple[Any, dict[str, Any]]] = [
    (AdapterConfig, {}),
    (SamplingConfig, {}),
    (RolloutConfig, {}),
    (EvaluationConfig, {"sampling": SamplingConfig(1.0)}),
    (AlgorithmConfig, {}),
    (PerformanceConfig, {}),
    (DataSource, {"preset": "arithmetic"}),
    (LambdaPODataModule, {}),
    (LambdaPOModule, {}),
    (AccuracyReward, {}),
    (LengthPenalty, {"max_length": 9, "buffer": 3}),
    (SemanticDensityReward, {}),
    (CompletionsLogger, {}),
    (RewardPlot, {}),
    (TrainingConsole, {}),
    (RolloutCheckpoint, {}),
]
#: Checked where all rewards are known, and by Lightning.
ELSEWHERE = {"weight", "save_top_k"}
MAY_BE_ZERO = {
    *("dropout", "temperature", "top_k", "min_p", "reserve_prompts", "clip_low", "clip_high", "kl_coef"),
    *("decoding_weights_gb", "seed", "num_workers", "max_skipped_updates", "table_every_n_rollouts"),
}
MAY_BE_NEGATIVE = {"seed", "layer"}
MAY_BE_INFINITE = {"importance_cap", "max_grad_norm"}


def numbers() -> Iterator[tuple[Any, dict[str, Any], str, bool]]:
    """Each number's owner, the owner's other arguments, its name, and whether it is a whole number."""
    for owner, others in OWNERS:
        hints = get_type_hints(owner if dataclasses.is_dataclass(owner) else owner.__init__)
        for name, hint in hints.items():
            kinds = get_args(hint) or (hint,)
            if name not in ELSEWHERE and get_origin(hint) is not list and (int in kinds or float in kinds):
                yield owner, others, name, float not in kinds and name != "alpha"


NUMBERS = list(numbers())


@pytest.mark.parametrize(("owner", "others", "name", "whole"), NUMBERS, ids=lambda value: str(value)[-40:])
def test_numbers_outside_their_range_are_refused(
    base: str, owner: Any, others: dict[str, Any], name: str, whole: bool
) -> None:
    if owner is LambdaPOModule:
        others = {"policy": PolicyConfig(base)}
    bad: list[float] = [math.nan, -math.inf]
    bad += [] if name in MAY_BE_NEGATIVE else [-1]
    bad += [] if name in MAY_BE_ZERO | MAY_BE_NEGATIVE else [0]
    bad += [] if name in MAY_BE_INFINITE else [math.inf]
    bad += [2**70, 2.5] if whole else []
    for value in bad:
        with pytest.raises(ValueError, match=r"must|maps|lists?|are for|no effect"):
            owner(**{**others, name: value})


def test_all_kinds_of_numbers_are_walked() -> None:
    names = {name for _, _, name, _ in NUMBERS}
    assert len(NUMBERS) > 40
    assert {"max_grad_norm", "r", "alpha", "dropout", "seed", "logprob_chunk_size", "max_prompt_length"} <= names


@pytest.mark.parametrize("value", [0, 0.0, -1.0])
def test_a_norm_that_trains_nothing_or_ascends(base: str, value: float) -> None:
    with pytest.raises(
        ValueError, match=rf"`max_grad_norm` must be above 0, or null, which does not clip, got {value}\."
    ):
        module(base, max_grad_norm=value)
    assert module(base, max_grad_norm=None).max_grad_norm is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, r"`lora.alpha` must be a finite number above 0 .*got 0\."),
        ({"dropout": 1.0}, r"`lora.dropout` must be in \[0, 1\), because 1 drops everything, got 1.0\."),
        ({"r": 0}, r"`lora.r` must be at least 1, got 0\."),
        ({"target_modules": []}, "`lora.target_modules` is empty"),
        ({"options": {"rank_pattern": {"q_proj": 0}}}, "`lora.options.rank_pattern.q_proj` must be at least 1, got 0"),
        (
            {"options": {"alpha_pattern": {"q_proj": 0}}},
            "`lora.options.alpha_pattern.q_proj` must be a finite number above 0",
        ),
    ],
)
def test_adapters_that_train_nothing(base: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**settings)
    if "target_modules" in settings:
        return
    names = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    own = {names.get(name, name): value for name, value in {**settings, **settings.get("options", {})}.items()}
    own.pop("options", None)
    lora = LoraConfig(task_type="CAUSAL_LM")
    for name, value in own.items():
        setattr(lora, name, value)  # peft's own constructor refuses some of them
    with pytest.raises(ValueError, match=message):
        module(base, lora=lora)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # what peft says of it
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
@pytest.mark.parametrize(
    ("lora", "setting", "name"),
    [
        (AdapterConfig(target_modules=["q_proj", "v_porj"]), "target_modules", "v_porj"),
        (LoraConfig(target_modules=["q_proj", "v_porj"], task_type="CAUSAL_LM"), "target_modules", "v_porj"),
        (AdapterConfig(target_modules=["q_proj", ""]), "target_modules", ""),
        (AdapterConfig(options={"exclude_modules": ["v_prj"]}), "exclude_modules", "v_prj"),
        (AdapterConfig(options={"exclude_modules": ["v_proj", "k_prj"]}), "exclude_modules", "k_prj"),
        (AdapterConfig(options={"rank_pattern": {"q_porj": 4}}), "rank_pattern", "q_porj"),
        (AdapterConfig(options={"alpha_pattern": {"q_porj": 4}}), "alpha_pattern", "q_porj"),
        (
            AdapterConfig(target_modules=["q_proj"], options={"modules_to_save": ["lm_haed"]}),
            "modules_to_save",
            "lm_haed",
        ),
    ],
)
def test_one_mistaken_name_of_several(base: str, lora: Any, setting: str, name: str) -> None:
    message = f"`lora` has the name '{name}' in `{setting}`, and there is no such layer.* called .*q_proj.*v_proj"
    with pytest.raises(ValueError, match=message):
        load_policy(PolicyConfig(base), lora)


def test_a_layer_that_is_not_there(base: str) -> None:
    lora = AdapterConfig(target_modules=["q_proj"], options={"layers_to_transform": [0, 99]})
    with pytest.raises(ValueError, match=r"the number 99 in `layers_to_transform`, .* layers are 0 to 1\."):
        load_policy(PolicyConfig(base), lora)


def test_weights_that_are_all_zero(base: str, tmp_path: Path) -> None:
    """With nothing else that trains."""
    with pytest.raises(ValueError, match=r"All weights of `rewards` are 0 \(digits\), .* change nothing\. Give one"):
        trainer(tmp_path).fit(module(base, rewards=[Digits(0.0)]), Rows(batch_size=4))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=1)
    run.validate(module(base, rewards=[Digits(0.0)]), Rows(batch_size=4), verbose=False)
    run.fit(module(base, rewards=[Digits(0.0)], algorithm={"kl_coef": 0.1}), Rows(batch_size=4))


@pytest.mark.parametrize(
    "lora",
    [
        AdapterConfig(),
        AdapterConfig(target_modules=["q_proj"], options={"exclude_modules": ["layers.0.self_attn.q_proj"]}),
        AdapterConfig(target_modules=["q_proj"], options={"layers_to_transform": [0, 1]}),
        AdapterConfig(target_modules=["q_proj"], options={"layers_to_transform": 1}),
        AdapterConfig(target_modules=["q_proj", "model.layers.0.mlp.down_proj"]),
        AdapterConfig(target_modules=r".*\.[qv]_proj", options={"rank_pattern": {"layers.0.self_attn.q_proj": 4}}),
        AdapterConfig(target_modules=["q_proj"], options={"modules_to_save": ["lm_head"], "alpha_pattern": {"q.*": 3}}),
    ],
)
def test_names_that_are_there(base: str, lora: AdapterConfig) -> None:
    assert load_policy(PolicyConfig(base), lora).peft_config["default"] is not None


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_the_largest_seeds_train(base: str, tmp_path: Path, seed: int) -> None:
    trainer(tmp_path, max_steps=1).fit(module(base, seed=seed), Rows(batch_size=4, seed=seed))
    assert torch.is_grad_enabled()


GSPO = {"importance_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}


def test_ratios_of_sequences_that_are_never_clipped(base: str) -> None:
    wide = AlgorithmConfig(importance_level="sequence")
    with pytest.warns(UserWarning, match=r"clip_low = 0.2 and clip_high = 0.2 hardly ever clips.*3.0e-4.*4.0e-4"):
        module(base, algorithm=wide, updates_per_rollout=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(base, algorithm=AlgorithmConfig(**GSPO), updates_per_rollout=2)  # type: ignore[arg-type]
        module(base, algorithm=AlgorithmConfig(), updates_per_rollout=2)
        module(base, algorithm=wide)  # one update has a ratio of 1 in any case
