"""Options that name a part of a setting: null, texts that look like YAML, and items of lists."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from jsonargparse import Namespace
from named_rewards import brief, cut

from lightning_lambdapo import LambdaPODataModule, LambdaPOModule
from lightning_lambdapo.commands import main as program

LORA = "--model.lora={class_path: lightning_lambdapo.AdapterConfig}"


class Parsing(program.LambdaPOCLI):
    """Parses, and builds nothing."""

    found: Namespace

    def instantiate_classes(self) -> None:
        Parsing.found = self.config[self.subcommand]

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parsed(*arguments: str, command: str = "fit") -> Namespace:
    """What the parser makes of a command line."""
    program._run(Parsing, [command, "--seed_everything=1", *arguments])
    return Parsing.found


def at(config: Any, key: str) -> Any:
    """The value at a dotted key that may omit ``init_args``."""
    for part in key.split("."):
        if isinstance(config, list):
            config = config[int(part)]
        elif part not in config and "init_args" in config:
            config = config["init_args"][part]
        else:
            config = config[part]
    return config


def optional_keys(owner: Any, prefix: str) -> Iterator[str]:
    """Keys of everything below ``prefix`` that may be None."""
    hints = get_type_hints(owner if dataclasses.is_dataclass(owner) else owner.__init__)
    for name, hint in hints.items():
        kinds = get_args(hint) or (hint,)
        inner = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if name == "return":
            continue
        if inner:
            yield from optional_keys(inner[0], f"{prefix}.{name}")
        elif NoneType in kinds:
            yield f"{prefix}.{name}"


def test_null_is_none_for_every_optional_setting(base: str) -> None:
    keys = [*optional_keys(LambdaPOModule, "model"), *optional_keys(LambdaPODataModule, "data")]
    nested = [key for key in keys if key.count(".") > 1]
    assert len(nested) > 40
    assert {"model.policy.revision", "data.template.system", "data.val.limit", "model.performance.merge_adapter"} <= {
        *nested
    }
    found = parsed(f"--model.policy.model={base}", LORA, *(f"--{key}=null" for key in keys))
    assert {key: at(found, key) for key in keys} == dict.fromkeys(keys)


@pytest.mark.parametrize("null", ["null", "~"])
def test_null_replaces_what_a_file_says(base: str, tmp_path: Path, null: str) -> None:
    file = tmp_path / "settings.yaml"
    settings: dict[str, Any] = {
        "model": {"policy": {"model": base, "revision": "main"}, "performance": {"merge_adapter": True}},
        "data": {"train": {"preset": "arithmetic", "limit": 3}, "template": {"system": "Think."}},
    }
    file.write_text(yaml.safe_dump(settings))
    keys = ["model.policy.revision", "model.performance.merge_adapter", "data.train.limit", "data.template.system"]
    found = parsed(f"--config={file}")
    assert [at(found, key) for key in keys] == ["main", True, 3, "Think."]
    found = parsed(f"--config={file}", *(f"--{key}={null}" for key in keys))
    assert [at(found, key) for key in keys] == [None] * 4
    assert at(found, "model.policy.model") == base


def test_null_inside_a_mapping(base: str) -> None:
    found = parsed(
        f"--model.policy={{model: {base}, adapter: null}}",
        "--model.rollout.sampling={temperature: 0.5}",
        "--data.train={preset: gsm8k, limit: null}",
    )
    assert at(found, "model.policy.adapter") is None
    assert at(found, "data.train.limit") is None
    assert at(found, "model.rollout.sampling.temperature") == 0.5


@pytest.mark.parametrize(
    "text",
    ["Note: be brief.", "[INST]", "{think}", "007", "1.0", "yes", "it's {a: 'b'}", "two\nlines: x", "null and void"],
)
def test_a_text_stays_as_it_was_given(base: str, text: str) -> None:
    found = parsed(f"--model.policy.model={base}", f"--data.template.system={text}")
    assert at(found, "data.template.system") == text


def test_names_that_are_digits(base: str) -> None:
    found = parsed(f"--model.policy={{model: {base}}}", "--model.policy.revision=1234567", "--data.train.path=2024")
    assert at(found, "model.policy.revision") == "1234567"
    assert at(found, "data.train.path") == "2024"


TWO = "--model.rewards=[lightning_lambdapo.rewards.AccuracyReward, lightning_lambdapo.rewards.FormatReward]"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("inside", ["", "init_args."])
def test_a_number_chooses_an_item(base: str, command: str, inside: str) -> None:
    found = parsed(
        f"--model.policy.model={base}",
        TWO,
        f"--model.rewards.0.{inside}weight=0.25",
        f"--model.rewards.1.{inside}weight=0",
        "--model.validation={num_samples: 8, k: [1, 2, 4]}",
        "--model.validation.k.1=3",
        "--trainer.callbacks=[lightning_lambdapo.CompletionsLogger, lightning_lambdapo.RolloutCheckpoint]",
        f"--trainer.callbacks.1.{inside}every_n_rollouts=7",
        command=command,
    )
    assert [at(found, f"model.rewards.{index}.weight") for index in (0, 1)] == [0.25, 0.0]
    assert at(found, "model.validation.k") == [1, 3, 4]
    assert at(found, "trainer.callbacks.1.every_n_rollouts") == 7


def test_an_item_is_replaced(base: str) -> None:
    short = "{class_path: lightning_lambdapo.rewards.LengthPenalty, init_args: {max_length: 9, buffer: 3}}"
    found = parsed(
        f"--model.policy.model={base}",
        TWO,
        f"--model.rewards.0={short}",
        "--model.rewards.weight=0.5",
    )
    assert at(found, "model.rewards.0.class_path").endswith("LengthPenalty")
    assert at(found, "model.rewards.1.class_path").endswith("FormatReward")
    assert at(found, "model.rewards.1.weight") == 0.5, "without a number the last one, as before"


def test_an_item_that_is_not_there(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(f"--model.policy.model={base}", TWO, "--model.rewards.2.weight=1")
    assert stop.value.code == 2
    assert "`model.rewards.2`: The list has no item 2: the last one is number 1." in capsys.readouterr().err


@pytest.mark.parametrize("place", ["rewards.0.", "rewards.0.init_args."])
@pytest.mark.parametrize("start", ["=[named_rewards.brief, named_rewards.Long]", "+=named_rewards.brief"])
def test_a_plain_function_among_the_rewards_gets_a_weight(base: str, place: str, start: str) -> None:
    options = [f"--model.{place}weight=0.5", f"--model.{place}name=short"]
    found = parsed(f"--model.policy.model={base}", f"--model.rewards{start}", *options)
    reward = at(found, "model.rewards.0")
    assert reward.class_path == "lightning_lambdapo.rewards.FunctionReward"
    assert (reward.init_args.function, reward.init_args.weight, reward.init_args.name) == (brief, 0.5, "short")
    assert len(at(found, "model.rewards")) == (1 if "+" in start else 2)
    others = parsed(
        f"--model.policy.model={base}", "--model.rewards=[small.Digits]", "--model.rewards+=named_rewards.cut"
    )
    assert at(others, "model.rewards.1") is cut, "as it was given, where it has no arguments"


def test_a_plain_function_that_is_the_last_reward(base: str) -> None:
    rewards = "--model.rewards=[lightning_lambdapo.rewards.AccuracyReward, named_rewards.brief]"
    found = parsed(
        f"--model.policy.model={base}", rewards, "--model.rewards.weight=0.5", "--model.rewards.timeout=null"
    )
    arguments = at(found, "model.rewards.1").init_args
    assert (arguments.function, arguments.weight, arguments.timeout) == (brief, 0.5, None)
    assert at(found, "model.rewards.0.weight") == 1


OWN = "{class_path: own_functions.Scaled, init_args: {factor: 3.0, baseline: 1.0}}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["init_args.factor=2"], {"factor": 2, "baseline": 1.0}),
        (["factor=1e-1", "init_args.baseline=null"], {"factor": 0.1, "baseline": None}),
        (["init_args.size.deep=2"], {"factor": 3.0, "baseline": 1.0, "size": {"deep": 2}}),
        (["init_args={factor: 2}"], {"factor": 2, "baseline": 1.0}),
        (["={class_path: own_functions.Scaled, init_args: {factor: 2}}"], {"factor": 2, "baseline": 1.0}),
        (["={class_path: own_functions.Doubled}"], None),
        (["class_path=own_functions.Doubled"], None),
        (["={class_path: own_functions.Doubled}", "init_args.factor=5"], {"factor": 5}),
    ],
)
@pytest.mark.parametrize("setting", ["estimator", "loss"])
def test_arguments_of_a_class_of_the_users_own(setting: str, options: list[str], expected: Any, tmp_path: Path) -> None:
    """In a file and on the command line, in the same way as those of an optimizer."""
    (tmp_path / "config.yaml").write_text(f"model: {{init_args: {{algorithm: {{{setting}: {OWN}}}}}}}\n")
    place = f"--model.algorithm.{setting}"
    changes = [place + ("" if each.startswith("=") else ".") + each for each in options]
    for start in ([f"--config={tmp_path / 'config.yaml'}"], [f"{place}={OWN}"]):
        found = at(parsed(*start, "--model.policy.model=x", *changes), f"model.algorithm.{setting}")
        assert found.get("init_args") == expected
    for name in ("grpo", "own_functions.grpo"):
        found = parsed(f"{place}={OWN}", "--model.policy.model=x", f"{place}={name}")
        assert at(found, f"model.algorithm.{setting}") == name
