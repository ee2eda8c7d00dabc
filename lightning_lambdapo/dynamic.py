"""Dynamic sampling: groups whose rewards are all equal teach nothing, and give way to reserve prompts (DAPO)."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from lightning_lambdapo.datatypes import PromptBatch, Rollout, Scores
from lightning_lambdapo.parallel import gather_objects
from lightning_lambdapo.tally import Tally


def without_signal(scores: Scores) -> Tensor:
    """Mark groups in which all valid rewards are equal, or there are fewer than two: ``(B,)`` bool."""
    infinity = torch.inf
    highest = scores.total.masked_fill(~scores.valid, -infinity).amax(-1)
    lowest = scores.total.masked_fill(~scores.valid, infinity).amin(-1)
    return highest <= lowest


def collect_groups(
    batch: PromptBatch,
    uniforms: Tensor,
    reserve: int,
    *,
    complete: Callable[[PromptBatch, Tensor], Rollout | None],
    judge: Callable[[PromptBatch, Rollout], Scores],
    tally: Tally,
) -> tuple[PromptBatch, Rollout, Scores]:
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

    def groups(indices: list[int]) -> tuple[PromptBatch, Rollout, Scores] | None:
        chosen = batch.select(indices)
        rollout = complete(chosen, uniforms.unflatten(0, (-1, group_size))[indices].flatten(0, 1))
        if rollout is None:
            return None
        tally.total("rollout_tokens", int(rollout.lengths.sum()))
        return chosen, rollout, judge(chosen, rollout)

    current = cast(tuple[PromptBatch, Rollout, Scores], groups(places))
    if not reserve:
        return current
    replaced = discarded = 0
    while True:
        wanted = without_signal(current[2]).nonzero().flatten().tolist()[: len(waiting)]
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
    old: tuple[PromptBatch, Rollout, Scores], new: tuple[PromptBatch, Rollout, Scores], places: list[int]
) -> tuple[PromptBatch, Rollout, Scores]:
    """Put the groups of ``new`` at these places of ``old``."""
    count, group_size = old[2].total.shape
    order = list(range(count))
    for index, place in enumerate(places):
        order[place] = count + index
    rows = [group * group_size + sample for group in order for sample in range(group_size)]
    return old[0].join(new[0]).select(order), old[1].join(new[1]).select(rows), old[2].join(new[2]).select(order)
