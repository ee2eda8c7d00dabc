"""Dynamic sampling (DAPO): reserve prompts replace groups whose rewards are all equal, which teach nothing."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from lightning_lambdapo.datatypes import PromptBatch, RewardOutcome, Rollout
from lightning_lambdapo.distributed.parallel import gather_objects
from lightning_lambdapo.distributed.tally import Tally
from lightning_lambdapo.functional.advantages import rewards_differ


def collect_groups(
    batch: PromptBatch,
    uniforms: Tensor,
    reserve: int,
    *,
    complete: Callable[[PromptBatch, Tensor], Rollout | None],
    judge: Callable[[PromptBatch, Rollout], RewardOutcome],
    tally: Tally,
) -> tuple[PromptBatch, Rollout, RewardOutcome]:
    """Sample and judge a batch. Reserve prompts replace groups whose rewards are all equal.

    The first ``B - reserve`` prompts are sampled. Then, in rounds, the next reserve prompts replace groups without
    signal, in order. Replacements may be replaced too. The rounds end when every group has signal or the reserve is
    used up. ``tally`` gets ``rollout_tokens``, the number of tokens sampled. With a reserve it also gets
    ``replaced_groups`` and ``discarded_tokens``, the number of replaced groups and of their tokens. A collective if
    ``reserve`` is above 0.

    Args:
        batch: ``B`` prompts.
        uniforms: ``(B * G, T)`` streams of all their rows.
        reserve: how many of them are kept in reserve.
        complete: samples the groups of some prompts. Without prompts it returns None. All ranks call it equally often.
        judge: rewards completions.
        tally: receives the counts.

    Returns:
        The ``B - reserve`` prompts to train on, their rollout and its rewards.
    """
    group_size = len(uniforms) // len(batch.prompts)
    places = list(range(len(batch.prompts) - reserve))
    waiting = list(range(len(places), len(batch.prompts)))

    def groups(indices: list[int]) -> tuple[PromptBatch, Rollout, RewardOutcome] | None:
        chosen = batch.select(indices)
        rollout = complete(chosen, uniforms.unflatten(0, (-1, group_size))[indices].flatten(0, 1))
        if rollout is None:
            return None
        tally.total("rollout_tokens", int(rollout.lengths.sum()))
        return chosen, rollout, judge(chosen, rollout)

    current = cast(tuple[PromptBatch, Rollout, RewardOutcome], groups(places))
    if not reserve:
        return current
    replaced = discarded = 0
    while True:
        wanted = (~rewards_differ(current[2].total, current[2].valid)).nonzero().flatten().tolist()[: len(waiting)]
        if not any(gather_objects(bool(wanted))):
            break
        found = groups([waiting.pop(0) for _ in wanted])
        if found is not None:
            replaced += len(wanted)
            discarded += int(current[1].lengths.view(-1, group_size)[wanted].sum())
            current = _replace(current, found, wanted)
    tally.ratio("replaced_groups", float(replaced), 1.0)
    tally.ratio("discarded_tokens", float(discarded), 1.0)
    return current


def _replace(
    old: tuple[PromptBatch, Rollout, RewardOutcome], new: tuple[PromptBatch, Rollout, RewardOutcome], places: list[int]
) -> tuple[PromptBatch, Rollout, RewardOutcome]:
    """Put the groups of ``new`` at these places of ``old``."""
    count, group_size = old[2].total.shape
    order = list(range(count))
    for index, place in enumerate(places):
        order[place] = count + index
    rows = [group * group_size + sample for group in order for sample in range(group_size)]
    return old[0].join(new[0]).select(order), old[1].join(new[1]).select(rows), old[2].join(new[2]).select(order)
