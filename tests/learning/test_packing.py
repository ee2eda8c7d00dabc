"""Prompts shared in packed rows, and every other switch of the learning pass: the gradient stays what it was."""

from typing import Any, cast
from weakref import WeakSet

import pytest
import tiny
import torch
from gradients import EVERYTHING, GROUP, MAX_NEW_TOKENS, TEMPERATURE, by_hand, learn, make, slow_gradient
from torch import Tensor
from where import DEVICE

from lightning_lambdapo.config import AdapterConfig, AlgorithmConfig, PerformanceConfig, PolicyConfig
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.learning.packing import plan_micro_batches
from lightning_lambdapo.learning.updates import plan_updates
from lightning_lambdapo.policy import attention
from lightning_lambdapo.policy.attention import PackedRow
from lightning_lambdapo.policy.loading import load_policy
from lightning_lambdapo.policy.model import Policy


@pytest.mark.parametrize("max_tokens", [1, 18, 25, 40, EVERYTHING])
def test_packed_micro_batches_hold_each_prompt_once(max_tokens: int) -> None:
    _, batch, rollout, _, _ = make()
    rows = torch.tensor([0, 2, 3, 5, 6, 7, 10, 11])
    plan = plan_micro_batches(batch, rollout, rows, max_tokens=max_tokens)
    assert sorted(row for each in plan for row in each.rows.tolist()) == rows.tolist()
    sizes = [each.input_ids.numel() for each in plan]
    assert sizes == sorted(sizes, reverse=True)
    for each in plan:
        assert each.input_ids.numel() <= max_tokens or len(each.rows) == 1
        assert each.attention_mask.all()
        ids, positions, targets = each.input_ids[0].tolist(), each.position_ids[0].tolist(), each.targets.tolist()
        predictors = each.predictors.tolist()
        offset = place = 0
        seen: list[int] = []
        for index, row in enumerate(each.rows.tolist()):
            prompt = batch.input_ids[row // GROUP][batch.attention_mask[row // GROUP]].tolist()
            completion = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
            if row // GROUP not in seen:
                seen.append(row // GROUP)
                assert ids[offset : offset + len(prompt)] == prompt
                assert positions[offset : offset + len(prompt)] == list(range(len(prompt)))
                offset += len(prompt)
                last = offset - 1
            inputs = len(completion) - 1  # the last token predicts nothing
            assert ids[offset : offset + inputs] == completion[:-1]
            assert positions[offset : offset + inputs] == list(range(len(prompt), len(prompt) + inputs))
            assert targets[place : place + inputs + 1] == completion
            assert predictors[place : place + inputs + 1] == [last, *range(offset, offset + inputs)]
            assert each.completion_mask[index].tolist() == [
                place < len(completion) for place in range(each.completion_mask.shape[1])
            ]
            offset += inputs
            place += inputs + 1
        assert offset == len(ids)
        assert place == len(targets)
    assert {1: 8, EVERYTHING: 1}.get(max_tokens, len(plan)) == len(plan)


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "mistral"])
def test_shared_prompts_and_padded_rows_have_one_gradient(
    monkeypatch: pytest.MonkeyPatch, architecture: str, as_on_cuda: bool
) -> None:
    """Also under sliding windows of 6 tokens and soft-capped logits, with and without a KL term.

    As on CUDA: lengths are rounded up, and no mask is made where no window needs one.
    """
    case = make(architecture=architecture)
    if as_on_cuda:
        monkeypatch.setattr(attention, "bucket", lambda _: 8)
        monkeypatch.setattr(attention, "needs_mask", lambda *_: False)
    reference = tiny.model(architecture, seed=1, dtype=torch.float64)
    cases: list[dict[str, Any]] = [{}, {"reference": reference, "kl_coef": 0.3}]
    for settings in cases:
        expected, wanted = learn(*case, share_prompts=False, recompute_logits=True, **settings)
        for max_tokens in (EVERYTHING, 40):
            found, statistics = learn(*case, max_tokens=max_tokens, chunk_size=7, **settings)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            assert statistics == pytest.approx(wanted, rel=1e-6, abs=1e-6)
        assert expected.abs().max() > 1e-3
    if architecture == "llama":
        torch.testing.assert_close(learn(*case)[0], slow_gradient(*case, "token"), rtol=0, atol=1e-10)


def adapted(path: Any, **settings: Any) -> Policy:
    """A tiny policy whose adapter does something, in train mode."""
    if not (path / "config.json").exists():
        tiny.model("llama").save_pretrained(path)
    performance = PerformanceConfig(
        **{name: settings.pop(name) for name in ("fused_lora", "onednn") if name in settings}
    )
    policy = load_policy(PolicyConfig(str(path), **settings), AdapterConfig(r=4), performance=performance)
    tiny.shake(policy, 0.1)
    return cast(Policy, cast(Any, policy).to(DEVICE).train())


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("base", [{}, {"quantization": "nf4"}, {"dtype": "float64"}])
def test_every_switch_keeps_the_gradient_of_an_adapter(tmp_path: Any, base: dict[str, Any], kl_coef: float) -> None:
    _, batch, rollout, advantages, valid = make(torch.float32)
    slow: dict[str, Any] = {"share_prompts": False, "recompute_logits": True}
    plain = adapted(tmp_path, fused_lora=False, onednn=False, **base)
    expected, _ = learn(plain, batch, rollout, advantages, valid, kl_coef=kl_coef, **slow)
    switches: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"onednn": True}, {}),
        ({"onednn": True}, slow),
        ({"fused_lora": False, "onednn": False}, {"share_prompts": False}),
        ({"fused_lora": False, "onednn": False}, {"recompute_logits": True, "max_tokens": 40, "chunk_size": 5}),
    ]
    for policy_settings, settings in switches:
        policy = adapted(tmp_path, **policy_settings, **base)
        found, _ = learn(policy, batch, rollout, advantages, valid, kl_coef=kl_coef, **settings)
        assert found.shape == expected.shape
        # float64: the model's norms still round to float32, and gradients with them
        tolerance = 1e-6 if base.get("dtype") == "float64" else 1e-5
        assert (found - expected).norm() / expected.norm() < tolerance, (policy_settings, settings)
    assert expected.norm() > 1e-2


def test_recomputed_activations_see_the_same_attention(tmp_path: Any) -> None:
    _, batch, rollout, advantages, valid = make(torch.float32)
    expected, _ = learn(adapted(tmp_path), batch, rollout, advantages, valid)
    found, _ = learn(adapted(tmp_path, gradient_checkpointing=True), batch, rollout, advantages, valid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    case = make()
    assert any(parameter.requires_grad for parameter in case[0].get_output_embeddings().parameters())
    found, _ = learn(*case, recompute_logits=False)
    torch.testing.assert_close(found, slow_gradient(*case, "token"), rtol=0, atol=1e-10)


def test_an_attention_that_cannot_branch_gets_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    expected = slow_gradient(*case, "token")
    attend = PackedRow.attend

    def wrong(self: PackedRow, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(self, query * 2, *args, **kwargs)

    monkeypatch.setattr(PackedRow, "attend", wrong)
    with pytest.warns(UserWarning, match="cannot share prompts in the learning pass .log-probabilities differ by"):
        learner = Learner(
            case[0],
            None,
            algorithm=AlgorithmConfig(),
            temperature=TEMPERATURE,
            max_new_tokens=MAX_NEW_TOKENS,
            max_tokens=EVERYTHING,
            chunk_size=100,
            optimizer=by_hand(),
        )
    assert not learner.scorer.share_prompts
    found, _ = learn(*case, share_prompts=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_masks_die_with_their_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a micro-batch is learned from, no other one holds masks."""
    rows: WeakSet[PackedRow] = WeakSet()
    holding: list[int] = []
    attend = PackedRow.attend

    def observed(self: PackedRow, *arguments: Any) -> Tensor:
        rows.add(self)
        out = attend(self, *arguments)
        holding.append(sum(bool(row._masks) for row in rows))
        return out

    case = make(architecture="mistral")
    monkeypatch.setattr(PackedRow, "attend", observed)
    learn(*case, max_tokens=25)
    assert len(holding) > 6
    assert max(holding) == 1


def test_no_token_is_processed_twice_or_in_vain() -> None:
    _, batch, rollout, advantages, valid = make()
    (update,) = plan_updates(batch, rollout, advantages, valid, algorithm=AlgorithmConfig(), mini_batches=1)
    moving = valid & (advantages != 0)
    prompts = int(batch.attention_mask.sum())
    completions = int((rollout.lengths[moving] - 1).sum())  # a last token predicts nothing
    assert [each.input_ids.numel() for each in update.micro_batches(max_tokens=EVERYTHING, share_prompts=True)] == [
        prompts + completions
    ]
