"""What an engine must know of a run's settings, rewards and model, whoever has built it."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

from lightning.pytorch import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.config import RolloutConfig
from lightning_lambdapo.distributed.lightning_internals import attached_trainer
from lightning_lambdapo.policy.loading import check_vocabulary, turn_end
from lightning_lambdapo.policy.model import Policy
from lightning_lambdapo.rewards import Reward
from lightning_lambdapo.rollout.completion_text import CompletionText, special_tokens, tag_pairs
from lightning_lambdapo.rollout.engine import RolloutEngine


class _Run(Protocol):
    """What is read of the module."""

    rollout_config: RolloutConfig
    policy: Policy
    rewards: list[Reward]
    tokenizer: PreTrainedTokenizerBase

    @property
    def causal_lm(self) -> PreTrainedModel: ...


def prepare_engine(engine: RolloutEngine, run: _Run) -> RolloutEngine:
    """Tell an engine what ends a completion, and which special tokens rewards see.

    Args:
        engine: as the module's hook has built it. It is changed in place.
        run: the module, before its weights are sharded.

    Returns:
        The same engine.

    Raises:
        ValueError: the tokenizer has tokens that the model has no embedding for, or a stop token is not one of them.

    Warns:
        UserWarning: the chat template ends a turn with a token that does not end a completion.
    """
    tokenizer, config = run.tokenizer, run.rollout_config
    engine.check(run.policy)
    check_vocabulary(run.causal_lm, tokenizer, config.stop_token_ids)
    ends = {*engine.eos_ids, *config.stop_token_ids}
    hidden = {*engine.eos_ids, engine.pad_id}
    kept = kept_tokens(tokenizer, run.rewards, config.keep_special_tokens, config.stop_token_ids) - hidden
    engine.eos_ids = tuple(sorted(ends))
    engine.text = CompletionText(tokenizer, kept, config.stop_strings)
    end = turn_end(tokenizer) if _uses_chat(run) else None
    if end is not None and end[0] not in ends and not any(each in end[1] for each in config.stop_strings):
        warnings.warn(
            f"The chat template ends a turn with {end[1]!r} (token {end[0]}), which does not end a completion: the "
            f"end-of-sequence tokens are {', '.join(map(str, engine.eos_ids))}. A base model's files are often like "
            f"that. Set `rollout.stop_token_ids: [{end[0]}]` to end completions there.",
            stacklevel=2,
        )
    return engine


def _uses_chat(run: _Run) -> bool:
    """False if the DataModule's prompts are plain although the tokenizer has a chat template."""
    data = getattr(attached_trainer(cast(LightningModule, run)), "datamodule", None)
    return getattr(getattr(data, "template", None), "chat", None) is not False


def kept_tokens(
    tokenizer: PreTrainedTokenizerBase, rewards: Iterable[Reward], keep: bool | None, stop_ids: Sequence[int]
) -> set[int]:
    """Special tokens whose text stays in completions, see ``rollout.keep_special_tokens``."""
    pairs, special = tag_pairs(tokenizer), special_tokens(tokenizer)
    if keep is False:
        return set()
    if keep:
        return special.keys() - (set(stop_ids) - pairs.keys())
    verdicts = [(index, reward.reads_token(token)) for reward in rewards for index, token in special.items()]
    return {index for index, reads in verdicts if reads or (reads is None and index in pairs)}
