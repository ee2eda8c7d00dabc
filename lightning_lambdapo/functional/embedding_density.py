"""Semantic density by meaning: greedy matching of contextual token embeddings, as in BERTScore."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lambdapo.functional.masking import outside_autocast
from lightning_lambdapo.functional.semantic_density import check_beta


class EmbeddingDensityScore(NamedTuple):
    """Precision, recall and F of each trace, ``(N,)`` each, in [0, 1]."""

    precision: Tensor
    recall: Tensor
    f: Tensor


def embedding_density(
    generated: Tensor,
    generated_mask: Tensor,
    reference: Tensor,
    reference_mask: Tensor,
    *,
    beta: float = 1.0,
    generated_weights: Tensor | None = None,
    reference_weights: Tensor | None = None,
) -> EmbeddingDensityScore:
    r"""Precision, recall and F of traces against references, from the embeddings of their tokens.

    Each token is matched with the most similar one of the other side:

    .. math::
        p = \frac{1}{|x|} \sum_{x_i} \max_{y_j} \cos^+(x_i, y_j), \quad
        r = \frac{1}{|y|} \sum_{y_j} \max_{x_i} \cos^+(x_i, y_j), \quad
        F_\beta = \frac{(1 + \beta^2)\, p r}{\beta^2 p + r}

    for the trace's tokens x and the reference's y. A negative cosine counts as 0, so that all three are in [0, 1].
    BERTScore keeps negative cosines. With weights, both means are weighted:
    :math:`p = \sum_i w_i \max_j \cos^+(x_i, y_j) / \sum_i w_i`, and the recall in the same way.

    Args:
        generated: ``(N, S, D)`` float, token embeddings of the traces, of any length.
        generated_mask: ``(N, S)`` bool, True where a token counts. Values elsewhere, NaN included, have no effect.
        reference: ``(N, R, D)`` float, token embeddings of each trace's own reference.
        reference_mask: ``(N, R)`` bool.
        beta: weight of recall against precision, above 0.
        generated_weights: ``(N, S)`` float, how much each token counts, at least 0. None counts each as 1.
        reference_weights: ``(N, R)`` float.

    Returns:
        Precision, recall, F: ``(N,)`` each, float64 where an embedding is, else float32. All 0 where a side is empty,
        or has no weight.

    Raises:
        ValueError: shapes that do not match, beta that is not a finite number above 0.

    Example:
        >>> generated = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> reference = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
        >>> embedding_density(
        ...     generated, torch.tensor([[True, True]]), reference, torch.tensor([[True, False]])
        ... )
        EmbeddingDensityScore(precision=tensor([0.5000]), recall=tensor([1.]), f=tensor([0.6667]))

    Source: BERTScore, Zhang et al. 2020, arXiv 1904.09675, without its rescaling.
    """
    check_beta(beta)
    _check_shapes(generated, generated_mask, reference, reference_mask)
    _check_weights(generated_mask, generated_weights, reference_mask, reference_weights)
    dtype = torch.promote_types(torch.promote_types(generated.dtype, reference.dtype), torch.float32)
    if 0 in generated.shape or 0 in reference.shape:
        return EmbeddingDensityScore(*generated.new_zeros(3, len(generated), dtype=dtype))
    with outside_autocast(generated):
        cosines = _directions(generated, generated_mask, dtype) @ _directions(reference, reference_mask, dtype).mT
    # Masked-out tokens have cosine 0 with everything. No cosine is below 0, so they change no maximum.
    cosines = cosines.clamp(0, 1)
    precision = _mean(cosines.amax(2), generated_mask, generated_weights)
    recall = _mean(cosines.amax(1), reference_mask, reference_weights)
    share = 1 / (1 + (1 / beta) * (1 / beta))  # beta^2 / (1 + beta^2), without a square that overflows
    mixed = share * precision + (1 - share) * recall
    f = torch.where(mixed == 0, 0.0, precision * recall / mixed).clamp(max=1)  # NaN stays NaN
    return EmbeddingDensityScore(precision, recall, f)


def _mean(values: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted mean of each row over the tokens that count. Values of the others are 0 already."""
    if weights is None:
        return values.sum(1) / mask.sum(1).clamp(min=1)
    kept = torch.where(mask, weights, 0).to(values.dtype)
    total = kept.sum(1)
    # A row of NaN embeddings stays NaN, and a row without weight is 0.
    mean: Tensor = (kept * values).sum(1) / torch.where(total == 0, 1, total)
    return mean.clamp(max=1)


def _directions(embeddings: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings scaled to length 1, or to 0 where masked out."""
    kept = torch.where(mask.unsqueeze(-1), embeddings, 0).to(dtype)
    kept = kept / kept.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)  # no square overflows
    directions: Tensor = kept / kept.norm(dim=-1, keepdim=True).clamp(min=1)
    return directions


def _check_shapes(generated: Tensor, generated_mask: Tensor, reference: Tensor, reference_mask: Tensor) -> None:
    fits = (
        generated.ndim == reference.ndim == 3
        and (len(generated), generated.shape[2]) == (len(reference), reference.shape[2])
        and generated_mask.shape == generated.shape[:2]
        and reference_mask.shape == reference.shape[:2]
    )
    if not fits:
        shapes = [tuple(tensor.shape) for tensor in (generated, generated_mask, reference, reference_mask)]
        raise ValueError(
            "`generated`, `generated_mask`, `reference`, `reference_mask` must have shapes (N, S, D), (N, S), "
            f"(N, R, D), (N, R), got {', '.join(map(str, shapes))}."
        )
    if generated_mask.dtype != torch.bool or reference_mask.dtype != torch.bool:
        raise ValueError(f"The masks must be bool, got {generated_mask.dtype} and {reference_mask.dtype}.")


def _check_weights(
    generated_mask: Tensor, generated_weights: Tensor | None, reference_mask: Tensor, reference_weights: Tensor | None
) -> None:
    sides = {"generated": (generated_mask, generated_weights), "reference": (reference_mask, reference_weights)}
    for name, (mask, weights) in sides.items():
        if weights is not None and weights.shape != mask.shape:
            raise ValueError(
                f"`{name}_weights` must have the shape of `{name}_mask`, {tuple(mask.shape)}, got "
                f"{tuple(weights.shape)}."
            )
