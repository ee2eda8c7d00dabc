"""Gradients of the learning pass on a tiny model, and the same gradients row by row."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import tiny
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel
from where import DEVICE

from lightning_lambdapo.config import AlgorithmConfig, PerformanceConfig, SamplingConfig
from lightning_lambdapo.datatypes import PromptBatch, Rollout
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.learning.updates import plan_updates
from lightning_lambdapo.policy.model import Policy
from lightning_lambdapo.rollout import GroupedEngine
from lightning_lambdapo.rollout.sampling import row_uniforms

TEMPERATURE, MAX_NEW_TOKENS, GROUP = 0.8, 14, 4
IDS = torch.tensor([[3, 9, 14, 22, 31], [4, 8, 15, 16, 23]], device=DEVICE)
EVERYTHING = 10**6


def make(
    dtype: torch.dtype = torch.float64, architecture: str = "llama"
) -> tuple[PreTrainedModel, PromptBatch, Rollout, Tensor, Tensor]:
    """A model, 3 ragged prompts with 4 completions each, advantages (two of them zero), and validity (one False)."""
    model = tiny.model(architecture, dtype=dtype)
    batch = tiny.batch(tiny.ragged_prompts(3, seed=5), extra=2)
    uniforms = row_uniforms(
        seed=0,
        stage="train",
        step=0,
        prompt_ids=[0, 1, 2],
        occurrences=[0, 0, 0],
        num_samples=GROUP,
        length=MAX_NEW_TOKENS,
    )
    with torch.no_grad():
        rollout = GroupedEngine(tiny.tokenizer(), (1, 5, 9), 0).generate(
            model, batch, sampling=SamplingConfig(temperature=TEMPERATURE), uniforms=uniforms
        )
    advantages = torch.linspace(-1, 1.3, 12, dtype=dtype, device=DEVICE)
    advantages[[2, 7, 9]] = 0.0
    valid = torch.ones(12, dtype=torch.bool, device=DEVICE)
    valid[9] = False
    assert rollout.lengths.unique().numel() > 2
    return model, batch, rollout, advantages, valid


def gradient(model: Policy) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_hand() -> Any:
    """In place of the optimizer where gradients alone are wanted."""
    return SimpleNamespace(strategy=SingleDeviceStrategy(DEVICE), backward=torch.Tensor.backward)


def learn(
    model: Policy,
    batch: PromptBatch,
    rollout: Rollout,
    advantages: Tensor,
    valid: Tensor,
    *,
    max_tokens: int = EVERYTHING,
    chunk_size: int = 1000,
    reference: PreTrainedModel | None = None,
    old_logprobs: Tensor | None = None,
    share_prompts: bool = True,
    recompute_logits: bool = False,
    **settings: Any,
) -> tuple[Tensor, dict[str, float]]:
    """One update by the learner: its gradient, and its statistics."""
    algorithm = AlgorithmConfig(**settings)
    tally = Tally()
    learner = Learner(
        model,
        reference,
        algorithm=algorithm,
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
        max_tokens=max_tokens,
        chunk_size=chunk_size,
        performance=PerformanceConfig(share_prompts_in_learning=share_prompts, recompute_logits=recompute_logits),
        tally=tally,
        optimizer=by_hand(),
    )
    assert learner.scorer.share_prompts == share_prompts
    (update,) = plan_updates(
        batch,
        rollout,
        advantages,
        valid,
        algorithm=algorithm,
        mini_batches=1,
    )
    model.zero_grad()
    learner.accumulate(replace(update, old_logprobs=old_logprobs))
    return gradient(model), tally.reduce()


def row_logprobs(model: PreTrainedModel, batch: PromptBatch, rollout: Rollout, row: int) -> Tensor:
    """Log-probabilities of one completion, alone and unpadded, from the model's own logits."""
    prompt = batch.input_ids[row // GROUP][batch.attention_mask[row // GROUP]].tolist()
    ids = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
    logits = model(torch.tensor([prompt + ids], device=DEVICE)).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids]


def slow_gradient(
    model: PreTrainedModel,
    batch: PromptBatch,
    rollout: Rollout,
    advantages: Tensor,
    valid: Tensor,
    aggregation: str,
    reference: PreTrainedModel | None = None,
    kl_coef: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """On-policy gradient row by row: with ratio 1 the surrogate's gradient is that of advantage times log-prob.

    ``weights`` are ``(N, T)``, of the tokens' surrogate terms.
    """
    model.zero_grad()
    rows = [row for row in range(12) if valid[row]]
    tokens = sum(int(rollout.lengths[row]) for row in rows)
    total = advantages.new_zeros(())
    for row in rows:
        logprobs = row_logprobs(model, batch, rollout, row)
        value = -advantages[row] * logprobs
        if weights is not None:
            value = value * weights[row, : len(logprobs)]
        if reference is not None:
            with torch.no_grad():
                ref = row_logprobs(reference, batch, rollout, row)
            d = ref - logprobs
            value = value + kl_coef * (d.exp() - d - 1)
        if aggregation == "token":
            total = total + value.sum() / tokens
        elif aggregation == "sequence":
            total = total + value.mean() / len(rows)
        else:
            total = total + value.sum() / (len(rows) * MAX_NEW_TOKENS)
    total.backward()
    return gradient(model)


def logits_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of ``IDS``, and the gradients of a weighted sum of them by parameter."""
    model.zero_grad()
    logits = cast(Any, model)(input_ids=IDS, use_cache=False).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=DEVICE).view_as(logits)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
