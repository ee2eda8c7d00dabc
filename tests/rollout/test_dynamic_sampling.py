from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from small import Outputs, Rows, fit, module, trainer
from torch import Tensor

from lightning_lambdapo import RolloutConfig
from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.functional.advantages import rewards_differ
from lightning_lambdapo.rewards import Reward, RewardInputs
from lightning_lambdapo.rollout.dynamic_sampling import collect_groups


def scores(total: Tensor, valid: Tensor | None = None) -> RewardOutcome:
    return RewardOutcome(
        total, {"own": total * 2}, torch.ones_like(total, dtype=torch.bool) if valid is None else valid
    )


def test_groups_without_signal() -> None:
    total = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [False] * 3, [True, False, True], [True, False, False]])
    assert rewards_differ(total, valid).tolist() == [False, True, False, False, False]


def collect(flat: set[int], count: int, reserve: int) -> tuple[list[int], dict[str, float], list[list[int]], Any]:
    """Prompts ``flat`` have equal rewards; ids, lengths and streams say which prompt a row is of."""
    batch = tiny.batch([[3 + index] * (1 + index % 3) for index in range(count)], prompt_ids=list(range(count)))
    asked: list[list[int]] = []

    def complete(chosen: PromptBatch, uniforms: Tensor) -> Rollout | None:
        ids = chosen.prompt_ids.tolist()
        asked.append(ids)
        assert uniforms[:, 0].tolist() == [float(each) for each in ids for _ in range(2)]
        if not ids:
            return None
        width = 1 + max(ids)  # rounds of unlike width
        mask = torch.arange(width) <= torch.tensor(ids).repeat_interleave(2)[:, None]
        numbers = torch.tensor(ids, dtype=torch.float32).repeat_interleave(2)[:, None] * mask
        texts = [f"{each}/{row}" for each in ids for row in range(2)]
        return Rollout(numbers.long(), mask, numbers, numbers, ~mask[:, -1], texts)

    def judge(chosen: PromptBatch, rollout: Rollout) -> RewardOutcome:
        ids = chosen.prompt_ids.tolist()
        return scores(torch.tensor([[float(each), float(each) + (each not in flat)] for each in ids]))

    tally = Tally()
    uniforms = torch.arange(count, dtype=torch.float64).repeat_interleave(2)[:, None].expand(-1, 40)
    found, rollout, judged = collect_groups(batch, uniforms, reserve, complete=complete, judge=judge, tally=tally)
    ids = found.prompt_ids.tolist()
    assert found.prompts == [batch.prompts[each] for each in ids]
    assert [row[mask].tolist() for row, mask in zip(found.input_ids, found.attention_mask, strict=True)] == [
        [3 + each] * (1 + each % 3) for each in ids
    ]
    assert rollout.texts == [f"{each}/{row}" for each in ids for row in range(2)]
    assert rollout.lengths.tolist() == [each + 1 for each in ids for _ in range(2)]
    assert rollout.sampling_logprobs[:, 0].tolist() == [float(each) for each in ids for _ in range(2)]
    assert judged.total[:, 0].tolist() == [float(each) for each in ids]
    assert judged.parts["own"][:, 0].tolist() == [2.0 * each for each in ids]
    return ids, tally.reduce(), asked, judged


def tokens(*prompts: int) -> int:
    """Of both completions of each of these prompts; those of prompt n have n + 1 tokens."""
    return 2 * sum(prompt + 1 for prompt in prompts)


def test_off_by_default_and_then_nothing_is_counted() -> None:
    ids, statistics, asked, _ = collect({0, 1, 2}, count=4, reserve=0)
    assert (ids, asked, statistics) == ([0, 1, 2, 3], [[0, 1, 2, 3]], {"rollout_tokens": tokens(0, 1, 2, 3)})


def test_reserve_prompts_take_the_places_in_order() -> None:
    ids, statistics, asked, _ = collect({1, 3}, count=7, reserve=3)
    assert ids == [0, 4, 2, 5]
    assert asked == [[0, 1, 2, 3], [4, 5]]
    assert statistics == {
        "replaced_groups": 2.0,
        "discarded_tokens": tokens(1, 3),
        "rollout_tokens": tokens(0, 1, 2, 3, 4, 5),
    }


def test_a_replacement_without_signal_is_replaced_in_turn() -> None:
    ids, statistics, asked, _ = collect({0, 2, 3}, count=6, reserve=4)
    assert asked == [[0, 1], [2], [3], [4]]
    assert ids == [4, 1]
    assert statistics == {
        "replaced_groups": 3.0,
        "discarded_tokens": tokens(0, 2, 3),
        "rollout_tokens": tokens(0, 1, 2, 3, 4),
    }


def test_the_reserve_is_the_cap() -> None:
    ids, statistics, asked, judged = collect({0, 1, 2, 3, 4}, count=5, reserve=2)
    assert asked == [[0, 1, 2], [3, 4]]
    assert ids == [3, 4, 2]
    assert statistics["replaced_groups"] == 2
    assert not rewards_differ(judged.total, judged.valid).any()


def test_nothing_to_replace() -> None:
    ids, statistics, asked, _ = collect(set(), count=3, reserve=1)
    assert (ids, asked) == ([0, 1], [[0, 1]])
    assert statistics == {"replaced_groups": 0.0, "discarded_tokens": 0.0, "rollout_tokens": tokens(0, 1)}


class OnlyOdd(Reward):
    """Sets rows apart for prompts of odd place alone."""

    name = "odd"

    def __call__(self, inputs: RewardInputs) -> list[float]:
        places = list(dict.fromkeys(inputs.prompts))
        return [
            float(len(text) % 3) if index % 2 and len(prompt) % 2 else 0.0
            for index, (prompt, text) in enumerate(zip(inputs.prompts, inputs.completions, strict=True))
        ] or [float(len(places))]


def test_a_step_trains_on_what_is_left(base: str, tmp_path: Path) -> None:
    """Rollouts are those that the same prompts have without dynamic sampling, and the batch is that of the log."""
    plain, dynamic = Outputs(), Outputs()
    fit(tmp_path, module(base, rewards=[OnlyOdd()], optimizer=frozen), callbacks=[plain])
    steps = fit(
        tmp_path,
        module(
            base,
            rewards=[OnlyOdd()],
            optimizer=frozen,
            rollout=RolloutConfig(group_size=4, max_new_tokens=8, reserve_prompts=2),
        ),
        callbacks=[dynamic],
    )
    assert len(plain.steps) == len(dynamic.steps)
    replaced = 0.0
    for whole, step, logged in zip(plain.steps, dynamic.steps, steps, strict=True):
        prompts = step["batch"].prompt_ids.tolist()
        assert len(prompts) == 2
        assert step["advantages"].shape == (8,)
        everyone = whole["batch"].prompt_ids.tolist()
        for place, prompt in enumerate(prompts):
            there = everyone.index(prompt)
            assert step["rollout"].texts[4 * place : 4 * place + 4] == whole["rollout"].texts[4 * there : 4 * there + 4]
        replaced += logged["train/replaced_groups"]
    assert replaced > 0


def frozen(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def test_a_batch_may_not_be_all_reserve(base: str, tmp_path: Path) -> None:
    model = module(base, rollout=RolloutConfig(group_size=4, max_new_tokens=8, reserve_prompts=4))
    with pytest.raises(ValueError, match=r"`rollout.reserve_prompts` is 4, and a batch has 4 prompts"):
        trainer(tmp_path).fit(model, Rows(batch_size=4))
