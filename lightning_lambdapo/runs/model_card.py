"""Saving a trained policy with its generation settings and a model card."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lightning_lambdapo.config import AlgorithmConfig, EvaluationConfig, PolicyConfig, RolloutConfig, from_mapping
from lightning_lambdapo.data import PRESETS
from lightning_lambdapo.functional.own_functions import function_name
from lightning_lambdapo.policy.loading import BUILTIN, eos_token_ids, locate, save_policy
from lightning_lambdapo.policy.model import Policy, causal_lm
from lightning_lambdapo.runs.files import first_and_last, read_metrics, section
from lightning_lambdapo.runs.text import markdown_table

Settings = Mapping[str, Any]
T = TypeVar("T")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CURVES = {"reward": "train/reward", "accuracy": "train/accuracy", "density F": "train/density_f"}
_METHODS = {"lambda": "LambdaPO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO"}
_FUNCTIONS = {"estimator": "lambda", "loss": "clipped"}  # settings that may be functions, with their defaults
_SAME = ("top_p", "top_k", "min_p", "repetition_penalty")


def publish(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    settings: Settings,
    config: Settings | None,
    run: Path,
    steps: int,
    merged: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a policy for ``from_pretrained``, with tokenizer, generation settings and model card.

    Args:
        policy: the policy to save.
        tokenizer: saved with it.
        directory: directory to write to. It must not exist, or be empty.
        settings: the module's hyper-parameters. The card omits what they do not say.
        config: the run's ``config.yaml``, for the data. None if there is none.
        run: the run's directory, for its results.
        steps: number of finished rollout steps.
        merged: the weights are those of a base with its adapter merged in.
        weights: the policy's full state dict, if its own tensors are shards.
    """
    save_policy(policy, tokenizer, directory, weights=weights)
    generation_settings(policy, tokenizer, settings).save_pretrained(directory)
    kind = "merged" if merged else "adapter" if hasattr(policy, "peft_config") else "full"
    card = model_card(settings, config, read_metrics(run), steps=steps, kind=kind)
    (directory / "README.md").write_text(card, encoding="utf-8")


def generation_settings(policy: Policy, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> GenerationConfig:
    """The decoding settings of validation, as transformers and vLLM read them."""
    validation = _known(EvaluationConfig, settings, "validation")
    rollout = _known(RolloutConfig, settings, "rollout")
    model = causal_lm(policy)
    eos_ids = eos_token_ids(model, tokenizer)
    sampling = validation.sampling
    drawn: dict[str, Any] = {"do_sample": False, "repetition_penalty": sampling.repetition_penalty}
    if not sampling.greedy:
        same = {name: getattr(sampling, name) for name in _SAME}
        drawn = {"do_sample": True, "temperature": sampling.temperature, **same}
    return GenerationConfig(
        bos_token_id=getattr(model.generation_config, "bos_token_id", None),
        eos_token_id=sorted({*eos_ids, *rollout.stop_token_ids}),
        pad_token_id=eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        max_new_tokens=validation.max_new_tokens or rollout.max_new_tokens,
        **drawn,
    )


def model_card(
    settings: Settings, config: Settings | None, metrics: Sequence[Mapping[str, float]], *, steps: int, kind: str
) -> str:
    """The model card: front matter for the hub, how to load, how it was trained, results.

    Args:
        settings: the module's hyper-parameters.
        config: the run's ``config.yaml``.
        metrics: rows of its ``metrics.csv``.
        steps: number of finished rollout steps. Later rows do not count.
        kind: ``"adapter"``, ``"merged"`` or ``"full"``.
    """
    base = from_mapping(PolicyConfig, settings["policy"]) if isinstance(settings.get("policy"), Mapping) else None
    name = _base_name(base)
    chosen = dict(settings.get("algorithm") or {})
    # By name alone: functions of the user's own are not imported for the card.
    functions = {name: function_name(chosen.pop(name, default)) for name, default in _FUNCTIONS.items()}
    algorithm = from_mapping(AlgorithmConfig, chosen)
    method, own = _METHODS.get(functions["estimator"], functions["estimator"]), version("lightning-lambdapo")
    what = {
        "adapter": f"A LoRA adapter for {name}",
        "merged": f"{name} with a trained LoRA adapter merged into it",
        "full": f"{name} with all weights trained",
    }[kind]
    parts = [
        _front_matter(base, config, kind),
        f"# {name}, trained with {method}\n",
        f"{what}: reinforcement learning from verifiable rewards, by lightning-lambdapo {own}.\n",
        "## Loading\n",
        f"```python\n{_loading(base, kind)}\n```\n",
        "## Training\n",
        _table(("setting", "value"), [*_data_rows(config), *_training_rows(settings, algorithm, functions, steps)]),
        "## Results\n",
        _results([row for row in metrics if row.get("step", 0) < steps]),
    ]
    if kind == "merged" and base is not None and base.quantization:
        parts.insert(3, _MERGED_QLORA.format(quantization=base.quantization))
    return "\n".join(parts)


_MERGED_QLORA = (
    "The adapter was trained over a base quantised to {quantization}. It is merged into the unquantised base, so "
    "logits are those of training up to the quantisation error of the base.\n"
)


def _known(cls: type[T], settings: Settings, name: str) -> T:
    """A configuration from a module's hyper-parameters, or the defaults."""
    value = settings.get(name)
    return from_mapping(cls, value) if isinstance(value, Mapping) else cls()


def _front_matter(base: PolicyConfig | None, config: Settings | None, kind: str) -> str:
    entries: dict[str, Any] = {}
    if base is not None and _is_hub_id(base.model):
        entries["base_model"] = base.model
    entries["library_name"] = "peft" if kind == "adapter" else "transformers"
    entries["pipeline_tag"] = "text-generation"
    if dataset := _hub_dataset(section(config, "data").get("train")):
        entries["datasets"] = [dataset]
    entries["tags"] = ["lambdapo", "reinforcement-learning", "rlvr", *([] if kind == "full" else ["lora"])]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---\n"


def _base_name(base: PolicyConfig | None) -> str:
    if base is None:
        return "A causal language model"
    if base.model == BUILTIN:
        return "Built-in arithmetic policy"
    return base.model if _is_hub_id(base.model) else Path(base.model).name


def _is_hub_id(model: str) -> bool:
    return bool(_HUB_ID.fullmatch(model)) and not Path(model).exists()


def _hub_dataset(source: Any) -> str | None:
    """Hub id of a data source, if it has one. In the user's own DataModule a source may be anything."""
    if not isinstance(source, Mapping) or source.get("path") or source.get("task"):
        return None
    named: str | None = source.get("dataset")
    if named is None and source.get("preset") in PRESETS:
        named = PRESETS[source["preset"]].dataset
    return named if named is not None and _is_hub_id(named) else None


def _loading(base: PolicyConfig | None, kind: str) -> str:
    """Three lines of Python below their imports. `.` is the directory of the card."""
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained(".")  # this directory, or its name on the hub'
    if kind != "adapter":
        return f'{imports}\n\n{tokenizer}\nmodel = AutoModelForCausalLM.from_pretrained(".")'
    location, options = locate(base) if base is not None else ("BASE", {})
    arguments = ", ".join([repr(location), *(f"{key}={value!r}" for key, value in options.items())]).replace("'", '"')
    return (
        f"from peft import PeftModel\n{imports}\n\n{tokenizer}\n"
        f'base = AutoModelForCausalLM.from_pretrained({arguments})\nmodel = PeftModel.from_pretrained(base, ".")'
    )


def _data_rows(config: Settings | None) -> list[tuple[str, str]]:
    data = section(config, "data")
    rows = [(f"data, {split}", _source(data[split])) for split in ("train", "val") if data.get(split)]
    if "batch_size" in data:
        rows.append(("prompts per step and rank", str(data["batch_size"])))
    given = data.get("template")
    template = given if isinstance(given, Mapping) else {}
    if template.get("system"):
        rows.append(("system prompt", template["system"]))
    if template.get("user", "{prompt}") != "{prompt}":
        rows.append(("user's turn", template["user"]))
    return rows


def _source(source: Any) -> str:
    if not isinstance(source, Mapping):
        return Path(str(source)).name
    named = _hub_dataset(source) or Path(str(source.get("path") or source.get("dataset") or "")).name
    parts = [named or source.get("task") or source.get("preset"), source.get("config")]
    parts += [source.get("split") and f"split {source['split']}", source.get("limit") and f"first {source['limit']}"]
    return ", ".join(str(part) for part in parts if part)


def _training_rows(
    settings: Settings, algorithm: AlgorithmConfig, functions: Mapping[str, str], steps: int
) -> list[tuple[str, str]]:
    rollout = _known(RolloutConfig, settings, "rollout")
    rows = [(name, value) for name, value in functions.items() if name == "estimator" or value != _FUNCTIONS[name]]
    if functions["estimator"] == "lambda":
        names = ("weighting", "score", "temperature", "reduction", "center", "scale")
        rows.append(("pairwise advantage", _listed({name: getattr(algorithm, name) for name in names})))
    rows += [
        ("completions per prompt", str(rollout.group_size)),
        ("longest completion", f"{rollout.max_new_tokens} tokens"),
        ("sampling", _listed({name: getattr(rollout.sampling, name) for name in ("temperature", *_SAME)})),
    ]
    if rewards := settings.get("rewards"):
        rows.append(("rewards", "; ".join(map(_called, rewards))))
    lora = settings.get("lora")
    if lora:
        rows.append(("adapter", _listed({k: v for k, v in dict(lora.get("init_args", lora)).items() if v})))
    policy = settings.get("policy") or {}
    rows.append(("weights stored in", policy.get("quantization") or policy.get("dtype", "float32")))
    if settings.get("optimizer"):
        rows.append(("optimizer", _called(settings["optimizer"], "lr", "weight_decay")))
    rows += [
        ("rollout steps", str(steps)),
        ("updates per rollout", str(settings.get("updates_per_rollout", 1))),
        ("KL penalty", f"{algorithm.kl_coef} ({algorithm.kl_estimator})" if algorithm.kl_coef else "none"),
    ]
    return rows


def _called(thing: Any, *names: str) -> str:
    """The short name of a class, with its main arguments."""
    if not isinstance(thing, Mapping):
        return str(thing).rpartition(".")[2]
    arguments = thing.get("init_args") or {}
    kept = {name: arguments[name] for name in names or ("kind", "measure", "style", "weight") if name in arguments}
    return f"{_called(thing.get('class_path', ''))}{f' ({_listed(kept)})' if kept else ''}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _results(metrics: Sequence[Mapping[str, float]]) -> str:
    rows = []
    for name, key in _CURVES.items():
        ends = first_and_last([row[key] for row in metrics if key in row])
        if ends is not None:
            rows.append((name, f"{ends[0]:.3f}", f"{ends[1]:.3f}"))
    last: dict[str, float] = {}
    for row in metrics:
        last |= {key.removeprefix("val/"): value for key, value in row.items() if key.startswith("val/")}
    parts = []
    if rows:
        steps = [int(row["step"]) + 1 for row in metrics if any(name.startswith("train/") for name in row)]
        parts.append(
            "On the completions sampled in training, means over the first and the last tenth of the rollout steps "
            f"{min(steps)} to {max(steps)}:\n"
        )
        parts.append(_table(("", "first", "last"), rows))
    if last:
        shown = {key: value for key, value in last.items() if re.fullmatch(r"reward|accuracy|\w+_at_\d+", key)}
        parts.append("Last validation:\n")
        parts.append(_table(("", "value"), [(key, f"{value:.3f}") for key, value in shown.items()]))
    return "\n".join(parts) or "None were recorded.\n"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(headers, rows, numbers=False)) + "\n"


def cast_weights(policy: Policy, dtype: torch.dtype) -> None:
    """Change the type of the weights to save: the adapter's, or all of them."""
    adapted = hasattr(policy, "peft_config")
    for parameter in policy.parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or not adapted):
            parameter.data = parameter.data.to(dtype)
