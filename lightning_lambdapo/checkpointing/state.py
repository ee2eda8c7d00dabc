"""What a checkpoint contains: the trained tensors, the step counters, and nothing that needs unpickling.

A checkpoint has the tensors with ``requires_grad``: an adapter, or all weights under full fine-tuning. Frozen weights
come from elsewhere. Sharded checkpoints have everything, because no rank may omit a tensor from its shard.

Between two training steps a checkpoint is exact. A checkpoint saved inside a step (by an exception or a callback) is
exact before the step's first update, because resuming repeats the step from its start. After that update it is marked
as inexact, and resuming from it warns.
"""

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from lightning_lambdapo.checkpointing import fingerprint, pending_validation, stopped_epoch
from lightning_lambdapo.checkpointing import optimizer as optimizers
from lightning_lambdapo.checkpointing.files import IN_SHARDS, CheckpointError, Shapes, naming, read_header
from lightning_lambdapo.checkpointing.release_0_1 import upgraded
from lightning_lambdapo.config import AdapterConfig
from lightning_lambdapo.distributed.fsdp1 import flattens, plain_name
from lightning_lambdapo.distributed.lightning_internals import attached_trainer, built_by_cli, mend_epochs
from lightning_lambdapo.distributed.parallel import saves_shards
from lightning_lambdapo.distributed.seeding import STREAMS
from lightning_lambdapo.functional.own_functions import function_name, plain_function

CHECKPOINT_KEY = "lambdapo"
CHECKPOINT_VERSION = 1
GIVEN_IN_PYTHON = "made in Python with"  # in a warning
_UNAVERAGED = "current_model_state"  # beside the averages of Lightning's WeightAveraging, which are the state_dict
_NUMBERS = (
    "max_grad_norm",
    "updates_per_rollout",
    "epochs_per_rollout",
    "max_tokens_per_micro_batch",
    "logprob_chunk_size",
    "max_skipped_updates",
    "seed",
)


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        rollout_step: number of finished training steps.
        skipped_updates: updates that were skipped because something was not finite.
        skipped_in_a_row: skipped updates since the last one that was made.
        updates_in_step: updates of the current training step that have begun.
        pending_validation: the run resumed from a checkpoint that was saved before the end of a validation.
        streams: generation of the rows' random streams. A run of release 0.1 keeps its own when it is resumed.
        policy: fingerprint of the policy that training starts from. Empty until the policy is built.
        optimizer: description of the optimizer. Empty until it is built.
        live_objects: arguments of the module that a checkpoint cannot have, and what they are.
        resumed_optimizer: that of the checkpoint, until the optimizer that is to go on from it is built.
    """

    rollout_step: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    updates_in_step: int = 0
    pending_validation: bool = False
    streams: int = STREAMS
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    live_objects: dict[str, str] = dataclasses.field(default_factory=dict)
    resumed_optimizer: dict[str, Any] | None = None


def save(module: LightningModule, state: RunState, checkpoint: dict[str, Any], *, seed: int) -> None:
    """Save what is trained, and what resuming needs. All of it loads with ``weights_only=True``.

    Args:
        module: the module to save.
        state: its counters.
        checkpoint: Lightning's entries, changed in place.
        seed: seed of the sampling streams.
    """
    trainer = attached_trainer(module)
    unfinished = _unfinished_batches(checkpoint)
    updates = state.updates_in_step if unfinished else 0
    checkpoint[CHECKPOINT_KEY] = {
        "version": CHECKPOINT_VERSION,
        "rollout_step": state.rollout_step,
        "skipped_updates": state.skipped_updates,
        "skipped_in_a_row": state.skipped_in_a_row,
        "updates_in_unfinished_step": updates,
        "seed": seed,
        "streams": state.streams,
        "policy": state.policy,
        "owes_validation": trainer is not None
        and pending_validation.is_pending(trainer, so_far=state.pending_validation),
    }
    if state.optimizer:
        checkpoint[CHECKPOINT_KEY]["optimizer"] = state.optimizer
    if state.live_objects:
        checkpoint[CHECKPOINT_KEY]["given_in_python"] = state.live_objects
    if rewards := {each.name: found for each in getattr(module, "rewards", []) if (found := each.checkpoint_state())}:
        checkpoint[CHECKPOINT_KEY]["rewards"] = rewards
    if not updates:  # the step will be repeated from its start
        _give_back(checkpoint, unfinished)
    if trainer is None or not saves_shards(trainer.strategy):
        trainable = trainable_tensors(module)
        for entry in {"state_dict", _UNAVERAGED} & checkpoint.keys():
            checkpoint[entry] = {k: v for k, v in checkpoint[entry].items() if k in trainable}


def load(module: LightningModule, state: RunState, checkpoint: dict[str, Any], *, seed: int) -> None:
    """Check that the checkpoint belongs to this policy, and load its counters.

    Args:
        module: its policy is built.
        state: its counters, changed in place.
        checkpoint: Lightning's entries. If they have averages, frozen tensors are added, which WeightAveraging needs.
        seed: seed of the sampling streams.

    Raises:
        CheckpointError: another program, an incompatible version, or a run with another policy wrote it.
    """
    if "state_dict" in checkpoint:  # sharding strategies have checked, loaded and removed it
        check(module, checkpoint, {name: value.shape for name, value in checkpoint["state_dict"].items()})
        if _UNAVERAGED in checkpoint:
            checkpoint["state_dict"] = module.state_dict() | checkpoint["state_dict"]
    own = checkpoint[CHECKPOINT_KEY]
    state.rollout_step = own["rollout_step"]
    state.skipped_updates = own["skipped_updates"]
    state.skipped_in_a_row = own.get("skipped_in_a_row", 0)
    state.streams = own.get("streams", 1)
    for reward in getattr(module, "rewards", []):
        if found := own.get("rewards", {}).get(reward.name):
            reward.load_checkpoint_state(found)
    trainer = attached_trainer(module)
    if trainer is None:  # load_from_checkpoint has just built the module
        _warn_of_defaults(own.get("given_in_python") or {}, state.live_objects)
        return
    mend_epochs(checkpoint)
    if trainer.state.fn == "fit":
        stopped_epoch.reopen(checkpoint)
    state.pending_validation = trainer.state.fn == "fit" and own.get("owes_validation", False)
    if own["seed"] != seed:
        warnings.warn(
            f"The checkpoint's run sampled with seed {own['seed']}, this one with {seed}. Training continues, but not "
            "as the uninterrupted run would have.",
            stacklevel=3,
        )
    updates = own.get("updates_in_unfinished_step", 0)
    if updates:
        warnings.warn(
            f"The checkpoint was saved inside a training step, when {updates} of its updates had begun. Training "
            "continues with the next batch, but not as the uninterrupted run would have.",
            stacklevel=3,
        )


def check(module: LightningModule, checkpoint: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse a checkpoint that the module cannot resume from.

    Args:
        module: its policy is built.
        checkpoint: its entries.
        shapes: shapes of its weights, by name.

    Raises:
        CheckpointError: it does not fit. The message says why.
    """
    own = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(own, dict):
        raise CheckpointError("this is not a checkpoint of LambdaPOModule, because it has no entry 'lambdapo'.")
    if own.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"it has format version {own.get('version')}, this release reads {CHECKPOINT_VERSION}. Use the release "
            "that wrote it."
        )
    trainable = trainable_tensors(module)
    known = {plain_name(name) for name, _ in module.named_parameters()}
    extra = [name for name in checkpoint.get("state_dict", ()) if name not in known and ".lora_" in name]
    missing = [name for name in trainable if name not in shapes]
    other = [name for name, value in trainable.items() if name in shapes and shapes[name] != value.shape]
    trainer = attached_trainer(module)
    if trainer is not None and flattens(trainer.strategy):
        other = []
    if missing or other or extra:
        raise CheckpointError(
            f"it is for another policy: {len(missing)} trainable tensors are missing ({', '.join(missing[:2])}), "
            f"{len(other)} have another shape ({', '.join(other[:2])}) and {len(extra)} have no place "
            f"({', '.join(extra[:2])}). Build the module with the `policy` and `lora` settings of the run that "
            "wrote it."
        )
    current = getattr(module, "run_state", None)
    if isinstance(current, RunState):
        fingerprint.compare(own.get("policy") or {}, current.policy, checkpoint.get("hyper_parameters") or {})
    trainer = attached_trainer(module)
    if isinstance(current, RunState) and trainer is not None and trainer.state.fn == "fit":
        current.resumed_optimizer = optimizers.noted(checkpoint, own)
        if trainer.strategy.restore_checkpoint_after_setup:
            _compare_optimizers(current)


def note_optimizer(module: LightningModule, state: RunState, optimizer: Optimizer) -> None:
    """Note the optimizer for checkpoints, and compare it with the one of the checkpoint that the run resumes from.

    Args:
        module: it has built the optimizer, and no schedule yet.
        state: its counters, changed in place.
        optimizer: a new one.

    Raises:
        CheckpointError: it cannot go on from the checkpoint.
    """
    state.optimizer = optimizers.describe(optimizer)
    trainer = attached_trainer(module)
    if trainer is None or trainer.ckpt_path is None:
        state.resumed_optimizer = None
        return
    with naming(trainer.ckpt_path):
        _compare_optimizers(state)


def _compare_optimizers(state: RunState) -> None:
    saved, state.resumed_optimizer = state.resumed_optimizer, None
    if saved is not None:
        state.optimizer = optimizers.compare(saved, state.optimizer)


@contextmanager
def settings_of_this_release(path: Path, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Check a checkpoint file, and give the arguments with which Lightning is to load it.

    If some settings of its hyper-parameters have moved since release 0.1, these are written to a temporary file as this
    release has them, and that file takes their place.

    Args:
        path: the checkpoint.
        arguments: the user's.

    Raises:
        CheckpointError: the file is missing, damaged or in shards, its hyper-parameters are no settings, or
            ``arguments`` replaces the adapter's by other ones.
    """
    found = upgraded(arguments)
    if path.is_dir():
        raise CheckpointError(IN_SHARDS)
    if found.get("weights_only") is False or found.get("hparams_file") is not None:
        yield found
        return
    entries, _ = read_header(path)
    settings = entries.get("hyper_parameters") or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"its hyper-parameters are {type(settings).__name__}, not a mapping.")
    own = entries.get(CHECKPOINT_KEY)
    fingerprint.compare_given((isinstance(own, dict) and own.get("policy")) or {}, settings, found)
    new = upgraded(settings)
    if new == settings:
        yield found
        return
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "hparams.yaml"
        file.write_text(yaml.safe_dump(new, sort_keys=False), encoding="utf-8")
        yield found | {"hparams_file": str(file)}


def plain_settings(module: Any) -> dict[str, Any]:
    """Settings of a module as plain data. Live objects (rewards, factories, peft's configurations) are omitted."""
    configs = {
        "policy": module.policy_config,
        "lora": module.lora,
        "rollout": module.rollout_config,
        "validation": module.validation_config,
        "algorithm": module.algorithm,
        "performance": module.performance,
    }
    if not isinstance(module.lora, AdapterConfig):
        del configs["lora"]
    return {name: getattr(module, name) for name in _NUMBERS} | {
        name: _plain_config(config) for name, config in configs.items()
    }


def _plain_config(config: Any) -> dict[str, Any]:
    """A settings dataclass as plain data, with functions as their import paths."""
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    return {
        name: _plain_config(value)
        if dataclasses.is_dataclass(value)
        else plain_function(value)
        if callable(value)
        else copy.deepcopy(value)
        for name, value in values.items()
    }


def live_objects(**given: Any) -> dict[str, str]:
    """The arguments of a module that its checkpoints cannot have, and what each one is.

    There are none under the command line, which saves class paths and arguments.

    Args:
        given: the arguments by name. None is a default.
    """
    if built_by_cli():
        return {}
    lists = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    return {name: ", ".join(map(function_name, lists[name])) for name, value in given.items() if value is not None}


def _warn_of_defaults(saved: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Warn of defaults in place of what a checkpoint's run had."""
    missing = [name for name in saved if name not in given]
    if missing:
        warnings.warn(
            f"The checkpoint's run was {GIVEN_IN_PYTHON} {', '.join(f'`{name}` ({saved[name]})' for name in missing)}, "
            "which a checkpoint does not have. The module has the defaults in their place. Give them again: "
            f"load_from_checkpoint(path, {', '.join(f'{name}=...' for name in missing)}).",
            stacklevel=6,
        )


def check_keys(module: LightningModule, keys: Any, *, strict: bool) -> Any:
    """Missing and unexpected keys of a state dict. Frozen tensors do not count, because they come from elsewhere.

    Raises:
        RuntimeError: ``strict`` is True and there are such keys.
    """
    trainable = trainable_tensors(module)
    missing = [name for name in keys.missing_keys if name in trainable]
    if strict and (missing or keys.unexpected_keys):
        raise RuntimeError(f"Missing keys: {missing}. Unexpected keys: {keys.unexpected_keys}.")
    return _IncompatibleKeys(missing, keys.unexpected_keys)


def trainable_tensors(module: LightningModule) -> dict[str, Tensor]:
    """Parameters that are trained, by name."""
    return {plain_name(name): value for name, value in module.named_parameters() if value.requires_grad}


def _unfinished_batches(checkpoint: Mapping[str, Any]) -> int:
    """1 for a checkpoint saved inside a training step, 0 for one saved between two."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = fit_loop.get("epoch_loop.batch_progress", {}).get("current")
    return 0 if progress is None else int(progress["ready"] - progress["processed"])


def _give_back(checkpoint: Mapping[str, Any], batches: int) -> None:
    """Let training data and the loggers' step resume that many batches earlier."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    for position in fit_loop.get("state_dict", {}).get("combined_loader") or []:
        if "batches" in position:
            position["batches"] -= batches
    counts = fit_loop.get("epoch_loop.state_dict", {})
    if "_batches_that_stepped" in counts:  # Lightning adds one when it resumes, for a finished step
        counts["_batches_that_stepped"] -= batches
