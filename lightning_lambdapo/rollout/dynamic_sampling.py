"""Dynamic sampling: groups whose rewards are all equal teach nothing, and give way to reserve prompts (DAPO)."""

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
    """Sample and judge a batch; reserve prompts take the places of groups without signal, as far as they go.

    The first ``B - reserve`` prompts are sampled. Then, in rounds, groups without signal are replaced in order by the
    next reserve prompts, and those in turn, until every group has signal or the reserve is used up. ``tally`` gets
    ``rollout_tokens``, all that were sampled, and with a reserve ``replaced_groups``, how many were, and
    ``discarded_tokens``, what they had cost. A collective where ``reserve`` is above 0.

    Args:
        batch: ``B`` prompts.
        uniforms: ``(B * G, T)`` streams of all their rows.
        reserve: how many of them are held back.
        complete: samples the groups of some prompts; None for none of them. All ranks call it equally often.
        judge: rewards completions.
        tally: takes the counts.

    Returns:
        The prompts trained on, ``B - reserve`` of them, their rollout and its scores.
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
