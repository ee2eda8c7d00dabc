"""The formulas: tensors in, tensors out. The semantic density also takes lists of tokens. Imports only torch."""

from lightning_lambdapo.functional.advantages import (
    group_advantages,
    lambda_advantages,
    pairwise_weights,
    sequence_scores,
)
from lightning_lambdapo.functional.embedding_density import EmbeddingDensityScore, embedding_density
from lightning_lambdapo.functional.importance import ImportanceStatistics, importance_weights
from lightning_lambdapo.functional.logprobs import chunked_logprobs, logprobs_from_logits
from lightning_lambdapo.functional.losses import LossOutput, policy_loss
from lightning_lambdapo.functional.masking import completion_mask, masked_mean, masked_sum
from lightning_lambdapo.functional.semantic_density import (
    SemanticDensityScore,
    reasoning_trace,
    semantic_density,
    tokenize,
)
from lightning_lambdapo.functional.token_weights import TokenWeights

__all__ = [
    "EmbeddingDensityScore",
    "ImportanceStatistics",
    "LossOutput",
    "SemanticDensityScore",
    "TokenWeights",
    "chunked_logprobs",
    "completion_mask",
    "embedding_density",
    "group_advantages",
    "importance_weights",
    "lambda_advantages",
    "logprobs_from_logits",
    "masked_mean",
    "masked_sum",
    "pairwise_weights",
    "policy_loss",
    "reasoning_trace",
    "semantic_density",
    "sequence_scores",
    "tokenize",
]
