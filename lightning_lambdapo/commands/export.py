"""``lambdapo export``: save a trained policy for transformers or vLLM, as adapter or merged, with a model card."""

import argparse
import dataclasses
import importlib
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lambdapo.checkpointing import state
from lightning_lambdapo.checkpointing.files import naming, read_header
from lightning_lambdapo.checkpointing.release_0_1 import upgraded
from lightning_lambdapo.config import AdapterConfig, PolicyConfig, from_mapping
from lightning_lambdapo.functional.ranges import home_path
from lightning_lambdapo.module import LambdaPOModule
from lightning_lambdapo.policy.adapter import adapter_alone, place
from lightning_lambdapo.policy.adapter_options import share_adapted_weights
from lightning_lambdapo.policy.fingerprint import fingerprint
from lightning_lambdapo.policy.loading import load_tokenizer
from lightning_lambdapo.policy.model import Policy, causal_lm
from lightning_lambdapo.runs.files import (
    CHECKPOINTS,
    Record,
    RunFileError,
    find_run,
    load_yaml,
    read_config,
    section,
    unused_path,
)
from lightning_lambdapo.runs.model_card import cast_weights, publish

_OWN_CLASS = ("lightning_lambdapo.LambdaPOModule", "lightning_lambdapo.module.LambdaPOModule")


def main(args: list[str]) -> None:
    """Export a policy.

    Args:
        args: of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="lambdapo export",
        description="Write a trained policy for `from_pretrained` and vLLM, with tokenizer, generation settings and "
        "model card: the adapter if there is one, else the whole model.",
    )
    parser.add_argument("source", type=home_path, metavar="RUN_OR_CKPT", help="a run's directory, or a checkpoint file")
    parser.add_argument("--output", type=home_path, metavar="DIR", help="directory (default: export or merged, in run)")
    parser.add_argument("--merge", action="store_true", help="write the whole model, with the adapter merged into it")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the written weights (default: merged float32, else as trained)",
    )
    parser.add_argument("--config", type=home_path, metavar="FILE", help="settings in place of the run's config.yaml")
    options = parser.parse_args(args)
    console = Console(highlight=False)
    try:
        checkpoint = find_checkpoint(options.source)
        output = export(
            checkpoint, output=options.output, merge=options.merge, dtype=options.dtype, config=options.config
        )
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    console.print(Text.assemble("exported ", (str(checkpoint), "bold")), soft_wrap=True)
    console.print(Text.assemble("      to ", (str(output), "bold")), soft_wrap=True)
    for file in sorted(output.iterdir()):
        console.print(f"  {file.stat().st_size / 1e6:10.3f} MB  {file.name}")


def find_checkpoint(source: Path) -> Path:
    """The checkpoint to export: ``source`` itself, or the last one of the run at ``source``.

    Raises:
        RunFileError: there is none.
    """
    if source.suffix == ".ckpt":  # a file, or a directory of shards
        return source
    if source.is_file():
        raise RunFileError(f"{source} is neither a run's directory nor a checkpoint, whose name would end in .ckpt.")
    found = list(find_run(source, CHECKPOINTS).glob(CHECKPOINTS))
    last = [path for path in found if path.name.startswith("last")]
    return max(last or found, key=lambda path: path.stat().st_mtime)


def export(
    checkpoint: Path,
    *,
    output: Path | None = None,
    merge: bool = False,
    dtype: str | None = None,
    config: Path | None = None,
) -> Path:
    """Save the policy of a checkpoint.

    Args:
        checkpoint: a checkpoint file.
        output: directory to write to. None makes a new one in the run's directory.
        merge: merge the adapter into its base, in full precision.
        dtype: type of the written weights.
        config: a file with the settings of policy, adapter and data, in place of the run's.

    Returns:
        The directory.

    Raises:
        RunFileError: the directory is not empty.
        CheckpointError: the checkpoint cannot be used.
    """
    inside = [parent.parent for parent in checkpoint.parents if parent.name == "checkpoints"]
    run = inside[0] if inside else checkpoint.parent
    target = unused_path(run / ("merged" if merge else "export")) if output is None else output
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFileError(f"{target} exists and is not an empty directory. Nothing is overwritten. Give another one.")
    found = read_config(run) if config is None else load_yaml(config)
    with naming(checkpoint):
        entries, _ = read_header(checkpoint)
    settings: Record = upgraded(entries.get("hyper_parameters") or {})
    if config is not None:
        settings |= {name: value for name, value in section(found, "model").items() if name in ("policy", "lora")}
    alone = None if merge else _adapter_alone(checkpoint, entries, settings)
    if alone is None:
        module = _load(checkpoint, settings, found, merge=merge)
        alone = module.policy, module.tokenizer, module.rollout_step
    policy, tokenizer, steps = alone
    merged = merge and isinstance(policy, PeftModel)
    if merged:
        policy = merge_adapter(cast(PeftModel, policy))
    if dtype is not None:
        cast_weights(policy, getattr(torch, dtype))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        publish(
            policy,
            tokenizer,
            partial,
            settings=settings,
            config=found,
            run=run,
            steps=steps,
            merged=merged,
        )
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


@torch.no_grad()
def merge_adapter(policy: PeftModel) -> PreTrainedModel:
    """The base with the trained adapter merged into it, in float32 (or float64).

    The base may have a half type, which float32 represents exactly. It must not be quantised. If embedding and output
    head share their weights and one of them is adapted, each gets weights of its own.

    Raises:
        ValueError: peft cannot merge such an adapter.
    """
    if next(policy.parameters()).dtype != torch.float64:
        policy.float()
    _untie(causal_lm(policy))
    try:
        merged = cast(Any, policy).merge_and_unload(safe_merge=True, adapter_names=["default"])
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"The adapter cannot be merged: {error} Export it without --merge.") from error
    return cast(PreTrainedModel, merged)


def _untie(model: PreTrainedModel) -> None:
    """Let the adapted ends of a model no longer share their weights, as the adapted policy computes with two."""
    if share_adapted_weights(model):
        head = model.get_output_embeddings()
        layer = cast(Any, head.get_base_layer() if isinstance(head, BaseTunerLayer) else head)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False


def _load(checkpoint: Path, settings: Record, config: Record | None, *, merge: bool) -> LambdaPOModule:
    """The module of a checkpoint, with an unquantised base if the adapter is to be merged."""
    overrides: dict[str, Any] = {name: settings[name] for name in ("policy", "lora") if name in settings}
    policy: Any = settings.get("policy")
    if isinstance(policy, Mapping):
        held = from_mapping(PolicyConfig, policy)
        if merge and held.quantization is not None:
            # peft would merge into the 4-bit weights, where rounding loses the update.
            held = dataclasses.replace(held, quantization=None, dtype="float32")
        overrides["policy"] = dataclasses.asdict(dataclasses.replace(held, gradient_checkpointing=False))
    if isinstance(algorithm := settings.get("algorithm"), Mapping):  # nothing is learnt here, so none is imported
        overrides["algorithm"] = {name: value for name, value in algorithm.items() if name not in ("estimator", "loss")}
    _import_class(settings, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{state.GIVEN_IN_PYTHON}")  # an export needs none of it
        return LambdaPOModule.load_from_checkpoint(checkpoint, map_location="cpu", **overrides)


def _adapter_alone(
    checkpoint: Path, entries: Record, settings: Record
) -> tuple[Policy, PreTrainedTokenizerBase, int] | None:
    """Policy, tokenizer and rollout steps without the quantised base, which an adapter's export does not need.

    None if the policy has to be built: it is not quantised, or its adapter or class needs the base.
    """
    given, own = settings.get("policy"), settings.get("_class_path", _OWN_CLASS[0])
    if checkpoint.is_dir() or own not in _OWN_CLASS or not isinstance(given, Mapping):
        return None
    config = from_mapping(PolicyConfig, given)
    lora = settings.get("lora")
    adapter = from_mapping(AdapterConfig, lora) if isinstance(lora, Mapping) and "class_path" not in lora else None
    policy = None if lora is not None and adapter is None else adapter_alone(config, adapter)
    if policy is None:
        return None
    holder = LightningModule()
    holder.policy = policy
    holder.run_state = cast(Any, state.RunState(policy=fingerprint(policy)))
    tensors = entries.get("state_dict", {})
    with naming(checkpoint):
        state.check(holder, entries, {name: value.shape for name, value in tensors.items()})
    place(policy, tensors, "policy.")
    return policy, load_tokenizer(config), entries[state.CHECKPOINT_KEY]["rollout_step"]


def _import_class(settings: Record, config: Record | None) -> None:
    """Import the module's class if the run's own settings name it. A checkpoint alone imports nothing."""
    wanted = settings.get("_class_path")
    if config is not None and wanted is not None and wanted == (config.get("model") or {}).get("class_path"):
        importlib.import_module(wanted.rpartition(".")[0])
