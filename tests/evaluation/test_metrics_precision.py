"""Metrics are exact under every precision: plugins cast whole modules, and change the default type of new tensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small import ROWS, Rows, module, trainer
from torch import nn

from lightning_lambdapo import EvaluationConfig, LambdaPOModule, RolloutConfig, SamplingConfig
from lightning_lambdapo.config import AlgorithmConfig
from lightning_lambdapo.datatypes import Rollout
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.evaluation.evaluator import Evaluation
from lightning_lambdapo.evaluation.judging import judge_rollout
from lightning_lambdapo.learning.training_log import TrainingLog
from lightning_lambdapo.metrics import GroupDiagnostics, MajorityAtK, PassAtK, SemanticDensity
from lightning_lambdapo.rewards import AccuracyReward, Reward, RewardInputs

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to bfloat16": lambda each: each.to(torch.bfloat16),
    "to float16": lambda each: each.to(torch.float16),
    "half": lambda each: each.half(),
    "bfloat16": lambda each: each.bfloat16(),
    "float": lambda each: each.float(),
    "double": lambda each: each.double(),
    "type": lambda each: each.type(torch.float16),
}


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """What Lightning's ``HalfPrecision`` does while a step runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", CASTS)
def test_a_thousand_right_prompts_are_all_right(cast: str, default: torch.dtype) -> None:
    metrics = nn.ModuleDict({"pass": PassAtK(1), "majority": MajorityAtK(1), "density": SemanticDensity()})
    holder = CASTS[cast](nn.ModuleList([metrics, nn.Linear(1, 1)]))
    passed, majority, density = (metrics[name] for name in ("pass", "majority", "density"))
    for turn in range(2):
        if turn:
            passed.reset(), majority.reset(), density.reset()  # type: ignore[operator]
            CASTS[cast](holder)
        with default_type(default):
            for _ in range(1000):
                passed.update(torch.ones(1, 1, dtype=torch.bool))  # type: ignore[operator]
                majority.update([["7"]], torch.ones(1, 1, dtype=torch.bool))  # type: ignore[operator]
            density.update(["a b c"] * 1000, ["a b c d"] * 1000)  # type: ignore[operator]
            assert passed.compute().item() == 1.0  # type: ignore[operator]
            assert majority.compute().item() == 1.0  # type: ignore[operator]
            found = {name: value.item() for name, value in density.compute().items()}  # type: ignore[operator]
        assert found == {"precision": 1.0, "recall": 0.75, "f": pytest.approx(6 / 7, abs=1e-7)}


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", CASTS)
def test_diagnostics_of_many_groups(cast: str, default: torch.dtype) -> None:
    """Of 300 groups of 3, numbers worked by hand, none of which a 16-bit type can hold."""
    metric = GroupDiagnostics("confidence", temperature=1.0)
    CASTS[cast](nn.ModuleList([metric]))
    with default_type(default):
        for group in range(300):
            metric.update(
                rewards=torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float32),
                scores=torch.tensor([[0.0, -1.0, 4.0] if group % 3 else [0.0, 1.0, 4.0]], dtype=torch.float32),
                advantages=torch.tensor([[0.1, 0.2, 0.03]], dtype=torch.float32),
                lengths=torch.tensor([[1, 2, 3]]),
                valid=torch.ones(1, 3, dtype=torch.bool),
            )
        found = {name: value.item() for name, value in metric.compute().items()}
    # The confidences differ by 1, 4 and 5, or by 1, 4 and 3. All sigmoids but those of 1 are outside of [0.05, 0.95].
    assert found["weight_extreme_share"] == pytest.approx(4 / 6, rel=1e-7)
    assert found["group_auc"] == pytest.approx(200 / 600, rel=1e-7)
    assert found["group_sum"] == pytest.approx(0.33, rel=1e-6)
    assert found["equal_reward_share"] == 0.0
    # One group's correlation is that of all. The deviations are -0.01, 0.09, -0.08 and -1, 0, 1.
    assert found["advantage_length_correlation"] == pytest.approx(-0.07 / math.sqrt(0.0146 * 2), rel=1e-6)
    low, high = 1 / (1 + math.e**5), 1 / (1 + math.e**-5)
    assert found["weight_q05"] == pytest.approx(low, abs=6e-4)
    assert found["weight_q95"] == pytest.approx(high, abs=6e-4)


def test_states_go_where_their_module_goes_and_keep_their_types() -> None:
    metric = GroupDiagnostics("confidence")
    types = {name: getattr(metric, name).dtype for name in metric._defaults}
    nn.ModuleList([metric]).to("meta", torch.bfloat16)
    assert metric.device.type == "meta"
    assert {name: getattr(metric, name).dtype for name in metric._defaults} == types
    assert {getattr(metric, name).device.type for name in metric._defaults} == {"meta"}
    asked: Any = PassAtK(1).set_dtype(torch.float32)
    assert asked.total.dtype == torch.float32


class Right(Reward):
    """An accuracy of 1 for every completion."""

    def __init__(self) -> None:
        super().__init__(1.0, "accuracy")

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        return [1.0] * len(inputs.completions)


class Many(Rows):
    """A thousand problems."""

    def setup(self, stage: str) -> None:
        self._rows = {"val": [ROWS[index % 16] | {"prompt_id": index} for index in range(1000)]}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_validation_in_16_bits_counts_a_thousand_prompts(base: str, tmp_path: Path, precision: Any) -> None:
    evaluation = EvaluationConfig(num_samples=2, k=[1, 2], sampling=SamplingConfig(temperature=1.0), max_new_tokens=1)
    model: LambdaPOModule = module(
        base, rewards=[Right()], validation=evaluation, rollout=RolloutConfig(engine="hf", max_new_tokens=1)
    )
    run = trainer(tmp_path, precision=precision, limit_val_batches=1.0)
    found = run.validate(model, Many(batch_size=100), verbose=False)[0]
    assert found["val/pass_at_1"] == found["val/pass_at_2"] == found["val/avg_at_2"] == found["val/reward"] == 1.0
    assert next(model.policy.parameters()).dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float16)
    assert all(metric.total.dtype == torch.float64 for metric in model.modules() if isinstance(metric, PassAtK))


def test_a_step_under_another_default_type_logs_the_same() -> None:
    """``TrainingLog`` and ``Evaluation`` as the module holds them, cast and uncast."""
    batch = tiny.batch([[3], [4]])._replace(answers=["7", "7"], references=["a b c d", "b c"])
    generator = torch.Generator().manual_seed(2)
    logprobs = -torch.rand(6, 3, generator=generator)
    mask = torch.tensor([[True, True, row % 2 == 0] for row in range(6)])
    rollout = Rollout(
        completion_ids=torch.full(mask.shape, 5),
        completion_mask=mask,
        sampling_logprobs=logprobs,
        entropy=logprobs.square(),
        truncated=torch.tensor([row == 0 for row in range(6)]),
        texts=["a b", "c #### 7", "#### 7", "so 8", "b c", "c b 7"],
    )
    rewards = [AccuracyReward()]
    config = EvaluationConfig(num_samples=3, k=[1, 3], sampling=SamplingConfig(temperature=1.0))

    def logged(dtype: torch.dtype) -> dict[str, float]:
        log, evaluation = TrainingLog(AlgorithmConfig(), rewards), Evaluation(config, rewards)
        nn.ModuleList([log, evaluation]).to(dtype)
        with default_type(dtype):
            judged = judge_rollout(rewards, batch, rollout)
            tally = Tally()
            for _ in range(100):
                evaluation.update(batch, rollout, judged)
                log.update(batch, rollout, judged, logprobs.sum(-1).view(2, 3), logprobs[:, 0], tally)
            return log.finish(tally) | {f"val/{name}": value for name, value in evaluation.compute().items()}

    expected = logged(torch.float32)
    assert {"weight_q50", "group_auc", "density_f", "val/pass_at_3", "val/maj_at_3", "val/density_f"} <= expected.keys()
    assert logged(torch.bfloat16) == expected
    assert logged(torch.float16) == expected
