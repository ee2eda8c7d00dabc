"""What tests of the decoder share: the architectures, the switches, and each row's stream."""

from typing import Any

from torch import Tensor

from lightning_lambdapo.datatypes import PromptBatch
from lightning_lambdapo.rollout.sampling import row_uniforms

ARCHITECTURES = ["llama", "qwen3", "gemma3", "phi3", "gpt2", "mistral"]

SWITCHES: dict[str, dict[str, Any]] = {
    "all on": {},
    "prompts not shared": {"share_prompts_in_rollouts": False},
    "ended rows stay": {"compaction": False},
    "one group at a time": {"max_live_tokens": 1},
    "admission as rows end": {"max_live_tokens": 260},
    "admission, ended rows stay": {"max_live_tokens": 260, "compaction": False},
}


def streams(batch: PromptBatch, group_size: int, length: int, **key: int) -> Tensor:
    """The uniforms of a training step's rows."""
    settings = {"seed": 0, "step": 0} | key
    ids = batch.prompt_ids.tolist()
    return row_uniforms(
        stage="train", prompt_ids=ids, occurrences=[0] * len(ids), num_samples=group_size, length=length, **settings
    )
