"""The epoch that training stopped in. Lightning counts it as over, so that resuming would omit the rest of it."""

from collections.abc import Mapping
from typing import Any


def reopen(checkpoint: Mapping[str, Any]) -> None:
    """Let a run resume in the middle of the epoch that it stopped in, as from a checkpoint of its last step.

    ``max_steps``, ``max_time`` or an early stop may end training before its epoch is over. Lightning then ends the
    epoch, and a checkpoint that is saved after that says so. A resumed run would begin the next epoch, or end at once
    because ``max_epochs`` is reached.

    Args:
        checkpoint: Lightning's entries. Its loops' progress is changed in place. Other checkpoints stay as they are.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if not loops:
        return
    epoch, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    step = batches["current"]
    is_whole = batches["is_last_batch"] or step["ready"] == 0
    is_between_steps = step["ready"] == step["started"] == step["processed"] == step["completed"]
    if is_whole or not is_between_steps or epoch["current"]["processed"] < epoch["current"]["ready"]:
        return
    for counts in (epoch["current"], epoch["total"]):
        counts["processed"] = counts["completed"] = counts["ready"] - 1
    for counts in (batches["current"], batches["total"]):  # a step's own checkpoint is saved before the step is counted
        counts["completed"] -= 1
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
