"""When tokens get weights against the mismatch of sampler and learning pass, and what is logged about it."""

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_lambdapo.config import AlgorithmConfig
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.functional.importance import Correction, ImportanceStatistics


def correction_in_use(
    algorithm: AlgorithmConfig, policy: nn.Module, strategy: Strategy, *, exact_sampler: bool
) -> Correction | None:
    """What ``algorithm.importance_correction`` means in this run. None for no correction.

    Args:
        algorithm: ``"auto"`` truncates unless sampler and learning pass agree to float32's rounding.
        policy: the policy that is trained.
        strategy: its precision plugin says how the run computes.
        exact_sampler: the engine's log-probabilities are those of the learning pass, to rounding.
    """
    setting = algorithm.importance_correction
    if setting == "auto":
        return None if exact_sampler and computes_in_float32(policy, strategy) else "truncate"
    return None if setting == "none" else setting


def computes_in_float32(policy: nn.Module, strategy: Strategy) -> bool:
    """True if no product of the policy is rounded to fewer bits than float32 has.

    Weights of 16 or 8 bits, autocast, and products in TF32 or bfloat16 are rounded. Weights in 4 bits (``uint8``) are
    not by themselves, because they are multiplied in the type of the other weights.
    """
    plain = all(weight.dtype.itemsize >= 4 or weight.dtype == torch.uint8 for weight in policy.parameters())
    return plain and strategy.precision_plugin.precision in ("32-true", "64-true") and not _rounds_products()


def tally_importance(tally: Tally, statistics: ImportanceStatistics) -> None:
    """Tally the sums of one micro-batch. The logged quotients are over all micro-batches and ranks."""
    names = ImportanceStatistics.__slots__
    values = torch.stack([getattr(statistics, name).double() for name in names]).tolist()
    sums = dict(zip(names, values, strict=True))
    tally.ratio("importance_ratio_mean", sums["ratio_sum"], sums["finite"])
    tally.ratio("importance_capped_share", sums["capped"], sums["count"])
    tally.ratio("importance_kl", sums["kl_sum"], sums["kl_tokens"])
    tally.effective_share("importance_ess", sums["weight_sum"], sums["weight_square_sum"], sums["count"])
    if sums["finite"]:
        tally.maximum("importance_ratio_max", statistics.ratio_max)


def _rounds_products() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set for some backends and not for others, so at least one of them rounds
        return True
