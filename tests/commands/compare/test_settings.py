"""Settings by dotted keys: in a configuration, and on a command line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lambdapo.commands.compare.plan import Arm, Run
from lightning_lambdapo.commands.compare.runs import prepare
from lightning_lambdapo.commands.compare.settings import given_besides, same_key, with_options, with_settings


def test_settings_find_their_place() -> None:
    base: dict[str, Any] = {
        "trainer": {"max_steps": 1},
        "model": {"class_path": "M", "init_args": {"algorithm": {"score": "mean"}, "rewards": [{"class_path": "R"}]}},
        "data": {"class_path": "D"},
    }
    config = with_settings(
        base,
        {
            "model.algorithm.score": "sum",
            "model.init_args.algorithm.weighting": "uniform",
            "model.rollout.group_size": 4,
            "model.rewards.0.weight": 0.5,
            "data.seed": 3,
            "trainer.max_steps": 2,
            "seed_everything": 7,
        },
    )
    assert config == {
        "trainer": {"max_steps": 2},
        "model": {
            "class_path": "M",
            "init_args": {
                "algorithm": {"score": "sum", "weighting": "uniform"},
                "rewards": [{"class_path": "R", "init_args": {"weight": 0.5}}],
                "rollout": {"group_size": 4},
            },
        },
        "data": {"class_path": "D", "init_args": {"seed": 3}},
        "seed_everything": 7,
    }
    assert base["trainer"] == {"max_steps": 1}
    assert base["model"]["init_args"]["algorithm"] == {"score": "mean"}
    assert with_settings({"model": {"init_args": {"a": 1}}}, {"model.a": 2}) == {"model": {"init_args": {"a": 2}}}
    assert with_settings({"sizes": [1, 2]}, {"sizes.1": 5}) == {"sizes": [1, 5]}


@pytest.mark.parametrize("key", ["model.rewards.1.weight", "model.rewards.first.weight", "model.rewards.1"])
def test_settings_that_have_no_place(key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' asks for '.*' of a list of 1"):
        with_settings({"model": {"init_args": {"rewards": [{"class_path": "R"}]}}}, {key: 1})
    with pytest.raises(ValueError, match="leads through 3"):
        with_settings({"a": 3}, {"a.b": 1})


def test_options_that_give_the_place_of_a_setting() -> None:
    base = {"model": {"init_args": {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1, "eps": 2}}}}}
    sgd = "{class_path: SGD, init_args: {momentum: 0.9}}"
    sgd_class = {"class_path": "SGD", "init_args": {"momentum": 0.9}}
    arguments = ["--trainer.max_steps", "4", f"--model.optimizer={sgd}", "--model.optimizer.init_args.nesterov=true"]
    found, others = with_options(base, arguments, ["model.optimizer.init_args.lr"])
    assert found == {"model": {"init_args": {"optimizer": sgd_class}}}
    assert others == ["--trainer.max_steps", "4", "--model.optimizer.init_args.nesterov=true"]
    assert base["model"]["init_args"]["optimizer"]["class_path"] == "AdamW"
    # in two words, and beside a flag
    found, others = with_options(base, ["--flag", "--model.optimizer", sgd], ["model.optimizer.lr"])
    assert (found["model"]["init_args"]["optimizer"], others) == (sgd_class, ["--flag"])
    # options of other settings, and a mapping that does not replace its place, stay as they are
    for option in (f"--model.optimizer={sgd}", "--model.rollout={group_size: 4}", "--model.rollout.group_size=4"):
        assert with_options(base, [option], ["model.rollout.max_new_tokens"]) == (base, [option])


def test_an_option_keeps_the_arguments_that_its_class_takes_as_well() -> None:
    """As jsonargparse does where nothing is varied: an option that names the same class changes what it says."""
    earlier = {"lr": 1, "betas": [0.9, 0.95], "weight_decay": 0.0}
    adamw = {"class_path": "torch.optim.AdamW", "init_args": earlier}
    base = {"model": {"class_path": "M", "init_args": {"optimizer": adamw, "policy": {"model": "x", "dtype": "y"}}}}
    for given, expected in {
        "{class_path: torch.optim.AdamW, init_args: {eps: 2}}": {**earlier, "eps": 2},
        "{class_path: AdamW, init_args: {lr: 3}}": {**earlier, "lr": 3},
        "{class_path: torch.optim.SGD, init_args: {momentum: 2}}": {"lr": 1, "weight_decay": 0.0, "momentum": 2},
        "{class_path: torch.optim.SGD}": {"lr": 1, "weight_decay": 0.0},
        "{class_path: no.such.Optimizer, init_args: {a: 2}}": {"a": 2},
    }.items():
        found, others = with_options(base, [f"--model.optimizer={given}"], ["model.optimizer.init_args.lr"])
        assert found["model"]["init_args"]["optimizer"]["init_args"] == expected, given
        assert others == []
    inner = "{class_path: torch.optim.SGD, init_args: {lr: 5}}"
    option = f"--model={{class_path: M, init_args: {{policy: {{dtype: z}}, optimizer: {inner}}}}}"
    found, _ = with_options(base, [option], ["model.optimizer.init_args.lr"])
    assert found["model"]["init_args"] == {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 5, "weight_decay": 0.0}},
        "policy": {"model": "x", "dtype": "z"},
    }
    # arguments without their class are those of the command line's own
    data = "--data={class_path: lightning_lambdapo.LambdaPODataModule, init_args: {batch_size: 4}}"
    found, _ = with_options({"data": {"batch_size": 2, "val": {"limit": 3}, "unknown": 1}}, [data], ["data.seed"])
    assert found["data"]["init_args"] == {"batch_size": 4, "val": {"limit": 3}}


ADAMW = "torch.optim.AdamW"


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([f"--model.optimizer.class_path={ADAMW}"], None),
        (["--model.optimizer.class_path", ADAMW], None),
        ([f"--model.optimizer={ADAMW}"], None),
        ([f"--model.optimizer={ADAMW}", "--model.optimizer.init_args={eps: 2}"], {"eps": 2}),
        ([f"--model.optimizer={ADAMW}", "--model.optimizer.init_args", "{eps: 2}"], {"eps": 2}),
    ],
)
def test_a_class_may_be_given_in_each_form_of_the_command_line(options: list[str], arguments: Any) -> None:
    key = "model.optimizer.init_args.lr"
    before = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 3, "lr": 4}}
    for base, earlier in (({}, {}), ({"model": {"optimizer": before}}, {"lr": 4})):
        assert not given_besides(key, options)
        found, others = with_options(base, options, [key])
        optimizer = found["model"]["optimizer"]
        assert (optimizer["class_path"], others) == (ADAMW, [])
        if arguments is not None:
            assert optimizer["init_args"] == {**earlier, **arguments}
        assert with_options(base, options, ["model.seed"]) == (base, options), "nothing in it is varied"


def test_what_is_no_class_stays_an_option() -> None:
    key = "model.optimizer.lr"
    for value in ("null", "None", "3", "optimizer.yaml", "own_functions.adamw", ""):
        option = f"--model.optimizer={value}"
        assert with_options({}, [option], [key]) == ({}, [option])
        assert given_besides(key, [option])
    # a class that is itself varied, arguments that are, and the class of a list's last item
    for name in ("optimizer", "optimizer.class_path"):
        assert given_besides("model.optimizer.class_path", [f"--model.{name}={ADAMW}"])
    assert given_besides(key, ["--model.optimizer.init_args={lr: 3}"])
    rewards = {"model": {"rewards": [{"class_path": "A"}]}}
    option = "--model.rewards.class_path=B"
    assert with_options(rewards, [option], ["model.rewards.0.weight"]) == (rewards, [option])
    assert given_besides("model.rewards.0.weight", ["--model.rewards=B"])


def test_arguments_are_merged_whatever_the_file_has() -> None:
    option = "--model.lora.init_args={r: 2}"
    for before, expected in {
        "a.B": {"class_path": "a.B", "init_args": {"r": 2}},
        "{r: 1, alpha: 3}": {"r": 2, "alpha": 3},
        "{class_path: a.B, init_args: {r: 1, alpha: 3}}": {"class_path": "a.B", "init_args": {"r": 2, "alpha": 3}},
    }.items():
        found, others = with_options({"model": {"lora": yaml.safe_load(before)}}, [option], ["model.lora.alpha"])
        assert (found["model"]["lora"], others) == (expected, [])


def test_options_that_append_the_item_of_a_setting() -> None:
    key = "trainer.callbacks.1.init_args.size"
    for before in ({"callbacks": ["A"]}, {"callbacks": "A"}):
        found, others = with_options({"trainer": before}, ["--trainer.callbacks+={class_path: B}"], [key])
        assert (found, others) == ({"trainer": {"callbacks": ["A", {"class_path": "B"}]}}, [])
    found, others = with_options({}, ["--trainer.callbacks+=A", "--trainer.callbacks+", "[B, C]"], [key])
    assert (found, others) == ({"trainer": {"callbacks": ["A", "B", "C"]}}, [])
    found, others = with_options({"trainer": {"callbacks": ["A"]}}, ["--trainer.callbacks=[B, C]"], [key])
    assert (found, others) == ({"trainer": {"callbacks": ["B", "C"]}}, [])
    option = "--trainer.callbacks+=B"
    assert with_options({}, [option], ["trainer.max_steps"]) == ({}, [option])


def test_an_appended_item_gives_no_other_a_value() -> None:
    key = "trainer.callbacks.0.size"
    for item in ("b.C", "{class_path: b.C}", "[{class_path: b.C}]"):
        assert not given_besides(key, [f"--trainer.callbacks+={item}"])
        assert not given_besides(key, ["--trainer.callbacks+", item])
        for whole in ("trainer.callbacks", "trainer"):
            assert given_besides(whole, [f"--trainer.callbacks+={item}"]), "the list itself is varied"
    assert given_besides(key, ["--trainer.callbacks=[b.C]"])
    assert given_besides(key, ["--x=1", "--trainer.callbacks.0.init_args.size", "3"])
    assert not given_besides(key, ["--trainer.callbacks.0.name=3"])


def test_same_key() -> None:
    assert same_key("model.algorithm.score", "model.init_args.algorithm.score")
    assert same_key("model.rewards.1.weight", "model.rewards"), "the one holds the other"
    assert same_key("model.rewards", "model.rewards.1.weight")
    assert not same_key("model.rewards", "model.rollout")


def test_a_run_varies_what_an_option_brings(tmp_path: Path) -> None:
    run = Run(Arm("a", {"model.optimizer.init_args.lr": 0.5}, {"trainer.callbacks.0.init_args.size": 3}), 1, tmp_path)
    base = {"trainer": {}, "model": {"init_args": {"optimizer": {"class_path": "AdamW"}, "policy": {"model": "x"}}}}
    options = ["--model.optimizer={class_path: SGD}", "--trainer.callbacks+={class_path: B}"]
    command = prepare(run, base, [*options, "--x=1"])
    assert command == ["fit", f"--config={tmp_path / 'config.yaml'}", "--x=1", "--ckpt_path=last"]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"] == {"class_path": "SGD", "init_args": {"lr": 0.5}}
    assert config["trainer"]["callbacks"] == [{"class_path": "B", "init_args": {"size": 3}}]
    # a part that each run sets itself is still refused
    data = "--data={class_path: lightning_lambdapo.LambdaPODataModule, init_args: {seed: 3}}"
    with pytest.raises(ValueError, match=r"`compare` sets data\.seed"):
        prepare(Run(Arm("a", {"data.batch_size": 4}), 1, tmp_path), base, [data])
