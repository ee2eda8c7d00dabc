from typing import Any

import pytest
import tiny
import torch
from gradients import EVERYTHING, GROUP, MAX_NEW_TOKENS, TEMPERATURE, by_hand, learn, make, row_logprobs, slow_gradient

from lightning_lambdapo.config import AdapterConfig, AlgorithmConfig
from lightning_lambdapo.datatypes import Rollout
from lightning_lambdapo.learning import updates as updates_module
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.learning.packing import plan_micro_batches
from lightning_lambdapo.learning.updates import plan_updates
from lightning_lambdapo.policy.reference import frozen_reference


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("max_tokens", [EVERYTHING, 60, 1])
def test_gradient_is_that_of_single_unpadded_rows(aggregation: str, max_tokens: int) -> None:
    case = make()
    expected = slow_gradient(*case, aggregation)
    found, _ = learn(*case, aggregation=aggregation, max_tokens=max_tokens, chunk_size=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_gradient_with_kl_covers_rows_of_zero_advantage(aggregation: str) -> None:
    model, batch, rollout, advantages, valid = make()
    reference = tiny.model("llama", seed=1, dtype=torch.float64)
    expected = slow_gradient(model, batch, rollout, advantages, valid, aggregation, reference, 0.3)
    for max_tokens in (EVERYTHING, 40):
        settings: dict[str, Any] = {"aggregation": aggregation, "kl_coef": 0.3, "max_tokens": max_tokens}
        found, _ = learn(model, batch, rollout, advantages, valid, reference=reference, **settings)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_float32_gradient_does_not_depend_on_splitting_or_padding() -> None:
    model, batch, rollout, advantages, valid = make(torch.float32)
    whole, _ = learn(model, batch, rollout, advantages, valid)
    split, _ = learn(model, batch, rollout, advantages, valid, max_tokens=30, chunk_size=3)
    wider = batch._replace(
        input_ids=torch.nn.functional.pad(batch.input_ids, (7, 0)),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (7, 0)),
    )
    padded, _ = learn(model, wider, rollout, advantages, valid)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(padded, whole, rtol=0, atol=1e-6)


def test_junk_in_masked_positions_changes_nothing() -> None:
    model, batch, rollout, advantages, valid = make()
    expected, statistics = learn(model, batch, rollout, advantages, valid)
    junk = torch.randint_like(rollout.completion_ids, 49)
    dirty = Rollout(
        completion_ids=torch.where(rollout.completion_mask, rollout.completion_ids, junk),
        completion_mask=rollout.completion_mask,
        sampling_logprobs=torch.where(rollout.completion_mask, rollout.sampling_logprobs, torch.nan),
        entropy=rollout.entropy,
        truncated=rollout.truncated,
        texts=rollout.texts,
    )
    ids = torch.where(batch.attention_mask, batch.input_ids, torch.randint_like(batch.input_ids, 49))
    advantages = torch.where(valid, advantages, torch.nan)  # an invalid row's advantage is never read
    found, dirty_statistics = learn(model, batch._replace(input_ids=ids), dirty, advantages, valid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert statistics == pytest.approx(dirty_statistics)


def test_rows_of_zero_advantage_are_not_scored_but_counted() -> None:
    _, batch, rollout, advantages, valid = make()
    settings = AlgorithmConfig()
    (update,) = plan_updates(batch, rollout, advantages, valid, algorithm=settings, mini_batches=1)
    assert update.rows.tolist() == [0, 1, 3, 4, 5, 6, 8, 10, 11]
    assert update.token_count == int(rollout.lengths[valid].sum())
    assert update.row_count == 11
    assert update.learns
    logged = AlgorithmConfig(log_kl=True)
    (update,) = plan_updates(batch, rollout, advantages * 0, valid, algorithm=logged, mini_batches=1)
    assert update.rows.tolist() == [*range(9), 10, 11]
    assert not update.learns


def test_mini_batches_split_by_prompt() -> None:
    _, batch, rollout, advantages, valid = make()
    updates = plan_updates(batch, rollout, advantages, valid, algorithm=AlgorithmConfig(), mini_batches=3)
    rows = [update.rows.tolist() for update in updates]
    assert rows == [[0, 1, 3], [4, 5, 6], [8, 10, 11]]
    assert [update.row_count for update in updates] == [4, 4, 3]
    lengths = rollout.lengths * valid
    assert [update.token_count for update in updates] == lengths.view(3, 4).sum(-1).tolist()


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, [[0, 1, 3, 4, 5, 6], [8, 10, 11]]), (1, [[0, 1, 3], [4, 5, 6, 8, 10, 11]])]
)
def test_mini_batches_go_by_place_in_the_global_batch(
    monkeypatch: pytest.MonkeyPatch, rank: int, expected: list[list[int]]
) -> None:
    """Prompts 0, 1, 2 of two ranks are at places 0, 2, 4 and 1, 3, 5. Each half is one update."""
    _, batch, rollout, advantages, valid = make()
    monkeypatch.setattr(updates_module, "world_size", lambda: 2)
    monkeypatch.setattr(updates_module, "rank", lambda: rank)
    monkeypatch.setattr(updates_module, "gather_objects", lambda local: [local, [(100, 10, 1, 0), (200, 20, 0, 3)]])
    updates = plan_updates(batch, rollout, advantages, valid, algorithm=AlgorithmConfig(), mini_batches=2)
    rows = [update.rows.tolist() for update in updates]
    assert rows == expected
    counts = (rollout.lengths * valid).view(3, 4).sum(-1).tolist()
    first = sum(counts[:2]) if rank == 0 else counts[0]
    assert [update.token_count for update in updates] == [first + 100, sum(counts) - first + 200]
    assert [update.row_count for update in updates] == ([18, 23] if rank == 0 else [14, 27])
    assert [update.finite for update in updates] == [True, False]


@pytest.mark.parametrize("max_tokens", [1, 25, 60, EVERYTHING])
def test_padded_micro_batches_keep_to_their_budget(max_tokens: int) -> None:
    _, batch, rollout, _, _ = make()
    rows = torch.tensor([0, 2, 3, 5, 6, 7, 10, 11])
    plan = plan_micro_batches(batch, rollout, rows, max_tokens=max_tokens, share_prompts=False)
    assert sorted(row for each in plan for row in each.rows.tolist()) == rows.tolist()
    for each in plan:
        assert each.input_ids.numel() <= max_tokens or len(each.rows) == 1
        for index, row in enumerate(each.rows.tolist()):
            prompt = batch.input_ids[row // GROUP][batch.attention_mask[row // GROUP]].tolist()
            completion = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
            mask = each.attention_mask[index]
            assert each.input_ids[index][mask].tolist() == prompt + completion
            assert each.position_ids[index][mask].tolist() == list(range(len(prompt + completion)))
            width = each.completion_mask.shape[1]
            assert each.input_ids[index, -width:][each.completion_mask[index]].tolist() == completion
    assert {1: 8, EVERYTHING: 1}.get(max_tokens, len(plan)) == len(plan)


def test_off_policy_ratio_and_clipping() -> None:
    """With old log-probs 0.5 below the present ones every ratio is exp(0.5), clipped where the advantage is above 0."""
    model, batch, rollout, advantages, valid = make()
    old = torch.zeros_like(rollout.sampling_logprobs)
    with torch.no_grad():
        for row in range(12):
            logprobs = row_logprobs(model, batch, rollout, row)
            old[row, : len(logprobs)] = logprobs - 0.5
    found, statistics = learn(model, batch, rollout, advantages, valid, old_logprobs=old, max_tokens=50)
    ratio = torch.tensor(0.5, dtype=torch.float64).exp()
    kept = torch.where(advantages > 0, 0.0, advantages * ratio)
    expected = slow_gradient(model, batch, rollout, kept, valid, "token")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    clipped = rollout.lengths[valid & (advantages > 0)].sum() / rollout.lengths[valid].sum()
    assert statistics["clip_fraction"] == pytest.approx(clipped.item())
    assert statistics["ratio_max"] == pytest.approx(ratio.item())
    surrogate = torch.where(advantages > 0, advantages * 1.2, advantages * ratio) * rollout.lengths * valid
    assert statistics["loss"] == pytest.approx(-surrogate.sum().item() / int(rollout.lengths[valid].sum()))


def test_adapter_reference_is_scored_without_the_adapter(tmp_path: Any) -> None:
    from lightning_lambdapo.config import PolicyConfig
    from lightning_lambdapo.policy.loading import load_policy

    tiny.model("llama").save_pretrained(tmp_path)
    policy = load_policy(PolicyConfig(str(tmp_path)), AdapterConfig(r=4))
    model, batch, rollout, advantages, valid = make(torch.float32)
    _, statistics = learn(policy, batch, rollout, advantages, valid, kl_coef=0.1)
    assert statistics["kl"] == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    _, statistics = learn(policy, batch, rollout, advantages, valid, kl_coef=0.1)
    total = 0.0
    with torch.no_grad():
        for row in [row for row in range(12) if valid[row]]:
            d = row_logprobs(model, batch, rollout, row) - row_logprobs(policy, batch, rollout, row)  # type: ignore[arg-type]
            total += (d.exp() - d - 1).sum().item()
    assert statistics["kl"] == pytest.approx(total / int(rollout.lengths[valid].sum()), rel=1e-3)
    assert statistics["kl"] > 1e-3


def test_frozen_copy_scores_the_same_before_and_after_an_update() -> None:
    model, batch, rollout, _, _ = make(torch.float32)
    reference = frozen_reference(model)
    assert reference is not None
    learner = Learner(
        model,
        reference,
        algorithm=AlgorithmConfig(kl_coef=0.1),
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
        max_tokens=EVERYTHING,
        chunk_size=100,
        optimizer=by_hand(),
    )
    (micro_batch,) = plan_micro_batches(batch, rollout, torch.arange(12), max_tokens=EVERYTHING)
    before = learner.ref_logprobs(micro_batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(learner.ref_logprobs(micro_batch), before)
    assert not torch.allclose(learner.scorer(micro_batch), before)
