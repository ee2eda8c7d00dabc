"""Any number of ranks train the same run: the same tokens, gradients, metrics and weights."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fitting
import pytest
import tiny
import torch
from comparing import assert_same, saved_weights
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from ranks import on_ranks, succeed
from small import Digits, Rows, module, trainer
from torch import Tensor

from lightning_lambdapo import AlgorithmConfig
from lightning_lambdapo.rewards import Reward, RewardInputs

pytestmark = pytest.mark.slow


class SomePrompts(Reward):
    """Share of digits for sums that start with 0 or 1, and the same for all completions of the others."""

    def __init__(self) -> None:
        super().__init__(1.0, "some")

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        return [
            sum(map(str.isdigit, text)) / max(len(text), 1) if prompt[0] in "01" else 0.25
            for prompt, text in zip(inputs.prompts, inputs.completions, strict=True)
        ]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With rate 1 and no clipping a step's change is the gradient itself."""
    return torch.optim.SGD(parameters, lr=1.0)


def one_step(max_grad_norm: float | None) -> dict[str, Any]:
    """A run of one update, whose change is its gradient."""
    return {
        "kind": "full64",
        "rewards": [Digits()],
        "optimizer": sgd,
        "lr_scheduler": None,
        "max_grad_norm": max_grad_norm,
        "updates_per_rollout": 1,
        "trainer": {"max_steps": 1, "limit_val_batches": 0},
    }


def counts(directory: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / f"counts-{rank}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("how", "kind", "reference"),
    [
        ("ddp", "lora64", False),
        ("ddp", "full64", True),
        ("fsdp", "lora64", True),
        ("fsdp", "full64", False),
        ("fsdp", "full64", True),
        ("fsdp1", "full", True),  # Lightning's precision plugin for it makes everything float32
        ("fsdp1", "lora", False),
    ],
)
def test_two_ranks_train_the_run_of_one(base: str, tmp_path: Path, how: str, kind: str, reference: bool) -> None:
    options: dict[str, Any] = {
        "kind": kind,
        "rewards": [SomePrompts()],
        "max_tokens_per_micro_batch": 40,
        "algorithm": AlgorithmConfig(kl_coef=0.1 if reference else 0.0),
    }
    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", **options)
    two = fitting.train_on_ranks(tmp_path / "two", base, 2, how=how, **options)
    assert_same(one, two, tolerance=1e-6 if kind.endswith("64") else 1e-4)
    each = [counts(two, rank)["micro_batches"] for rank in range(2)]
    together = list(zip(*each, strict=True)) if len(each[0]) == len(each[1]) else []
    assert len(each[0]) > 0
    if how == "ddp":
        if not reference:  # a KL term wants all rows
            assert any(0 in pair and max(pair) > 0 for pair in together), "a rank without rows never came up"
            assert any(first != second for first, second in together)
        updates = [value for (_, name), value in fitting.metrics(two).items() if name == "train/empty_updates"]
        learned = round(sum(2 * (1 - value) for value in updates))
        assert [counts(two, rank)["synced"] for rank in range(2)] == [learned, learned]
        assert sum(each[0]) > learned, "there were several micro-batches per update"
    elif how == "fsdp":
        gathers = counts(two, 0)["gathers"]
        assert set(gathers) == {3}, "two layers and the root, once per rollout and not once per token"


@pytest.mark.parametrize(("ranks", "nodes", "how"), [(4, 1, "ddp"), (2, 2, "ddp"), (2, 2, "fsdp")])
def test_more_ranks_and_more_machines(base: str, tmp_path: Path, ranks: int, nodes: int, how: str) -> None:
    options: dict[str, Any] = {"kind": "lora64", "rewards": [Digits()], "trainer": {"max_epochs": 1}}
    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", **options)
    more = fitting.train_on_ranks(
        tmp_path / "more", base, ranks, how=how, nodes=nodes, updates_per_rollout=2, **options
    )
    assert_same(one, more, tolerance=1e-6)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_gradient_is_that_of_one_process(base: str, tmp_path: Path, how: str) -> None:
    options = one_step(max_grad_norm=None)
    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", **options)
    two = fitting.train_on_ranks(tmp_path / "two", base, 2, how=how, **options)
    start = {name: value.double() for name, value in tiny_weights(base).items()}
    for name, value in saved_weights(one).items():
        before = start[name.removeprefix("policy.")]
        assert (before - value).abs().max() > 1e-6, name
        torch.testing.assert_close(before - saved_weights(two)[name], before - value, rtol=1e-6, atol=1e-9)


def tiny_weights(base: str) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    found: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(base).state_dict()
    return found


@pytest.mark.parametrize("how", ["fsdp", "fsdp1"])
def test_clipping_sees_the_norm_over_all_shards(base: str, tmp_path: Path, how: str) -> None:
    options = one_step(max_grad_norm=1e-3)
    two = fitting.train_on_ranks(tmp_path, base, 2, how=how, **options)
    start = tiny_weights(base)
    change = [start[name.removeprefix("policy.")].double() - value for name, value in saved_weights(two).items()]
    assert math.sqrt(sum(float(each.square().sum()) for each in change)) == pytest.approx(1e-3, rel=1e-3)
    assert fitting.metrics(two)[0, "train/grad_norm"] > 2e-3
    assert fitting.metrics(two)[0, "train/update_norm"] == pytest.approx(1e-3, rel=1e-3)


def test_quantised_weights_are_sharded_too(base: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "nf4", "rewards": [Digits()]}
    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", **options)
    two = fitting.train_on_ranks(tmp_path / "two", base, 2, how="fsdp", **options)
    assert_same(one, two, tolerance=1e-4)  # float32
    assert set(counts(two, 0)["gathers"]) == {3}


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    tiny.model("qwen3").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"kind": "full64", "rewards": [Digits()], "trainer": {"max_epochs": 1}}
    one = fitting.train_on_ranks(tmp_path / "one", str(tmp_path / "base"), 1, how="one", **options)
    two = fitting.train_on_ranks(tmp_path / "two", str(tmp_path / "base"), 2, how="fsdp", **options)
    assert not any("lm_head" in name for name in saved_weights(two))
    assert_same(one, two, tolerance=1e-6)


@pytest.mark.parametrize("kind", ["lora64", "full64"])
@pytest.mark.parametrize(
    ("first", "then"), [("ddp", "one"), ("one", "ddp"), ("fsdp", "one"), ("one", "fsdp"), ("shards", "shards-one")]
)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    base: str, tmp_path: Path, kind: str, first: str, then: str
) -> None:
    options: dict[str, Any] = {"kind": kind, "rewards": [Digits()]}
    whole = fitting.train_on_ranks(tmp_path / "whole", base, 1, how="one", **options)
    split = tmp_path / "split"
    six_rollouts = {"max_steps": 12}
    fitting.train_on_ranks(split, base, 1 if first == "one" else 2, how=first, trainer=six_rollouts, **options)
    checkpoint = fitting.checkpoint(split)
    assert checkpoint.is_dir() == (first == "shards")
    ranks = 1 if then in ("one", "shards-one") else 2
    fitting.train_on_ranks(
        split,
        base,
        ranks,
        how=then.removesuffix("-one") if ranks == 1 and first == "shards" else then,
        resume=str(checkpoint),
        **options,
    )
    found = fitting.completions(split, 1)
    assert {record["step"] for record in found} == set(range(7, 13))
    expected = [record for record in fitting.completions(whole) if record["step"] > 6]
    assert [record["completion"] for record in found] == [record["completion"] for record in expected]
    for name, value in saved_weights(whole).items():
        torch.testing.assert_close(saved_weights(split)[name], value, rtol=0, atol=1e-6)


def fit_from_the_command_line(arguments: list[str]) -> None:
    from lightning_lambdapo.commands.main import main

    main(["fit", *arguments])


@pytest.mark.parametrize("strategy", [fitting.FSDP1, ModelParallelStrategy])
def test_sharding_strategies_from_yaml(base: str, tmp_path: Path, strategy: type[Strategy]) -> None:
    layer = "transformers.models.llama.modeling_llama.LlamaDecoderLayer"
    settings = f"{{state_dict_type: sharded, auto_wrap_policy: [{layer}]}}"
    if strategy is ModelParallelStrategy:
        settings = "{data_parallel_size: 2, tensor_parallel_size: 1}"
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""
trainer:
  accelerator: cpu
  devices: 2
  max_steps: 2
  log_every_n_steps: 1
  default_root_dir: {tmp_path}
  enable_progress_bar: false
  strategy: {{class_path: {strategy.__module__}.{strategy.__qualname__}, init_args: {settings}}}
  callbacks: [{{class_path: lightning_lambdapo.RolloutCheckpoint, init_args: {{every_n_rollouts: 1}}}}]
model:
  policy: {{model: {base}}}
  rollout: {{group_size: 4, max_new_tokens: 8}}
data:
  train: {{preset: arithmetic, size: 16}}
  batch_size: 2
"""
    )
    succeed(on_ranks(2, fit_from_the_command_line, [f"--config={file}"], logs=tmp_path / "logs"))
    assert (fitting.checkpoint(tmp_path) / ".metadata").exists()
    assert "train/reward" in (fitting.version(tmp_path) / "metrics.csv").read_text()


def test_quantised_weights_cannot_be_flattened(base: str, tmp_path: Path) -> None:
    settings = fitting.policy_settings(base, "nf4")
    with pytest.raises(ValueError, match="FSDP1 flattens parameters, which quantised weights do not allow"):
        trainer(tmp_path, strategy=fitting.FSDP1()).fit(module(base, **settings), Rows(batch_size=4))
