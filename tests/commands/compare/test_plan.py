from pathlib import Path
from typing import Any

import pytest

from lightning_lambdapo.commands.compare.plan import (
    ESTIMATOR,
    candidates,
    parse_estimators,
    parse_tuning,
    parse_variation,
    plan_arms,
    plan_runs,
)
from lightning_lambdapo.runs.files import load_yaml

WEIGHTING = "model.algorithm.weighting=confidence,agreement,lambdarank,uniform"
TEMPERATURE = "model.algorithm.temperature=group_std,0.1,1"
SCORE = "model.init_args.algorithm.score=mean,sum"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1,2.5,x", [1, 2.5, "x"]),
        ("a=true,null", [True, None]),
        ("a=1e-4,1", [1e-4, 1]),
        ("a=[1, 2],{b: 3, c: 4}", [[1, 2], {"b": 3, "c": 4}]),
        ("a='x,y',z", ["x,y", "z"]),
        ("a=b=1,c", ["b=1", "c"]),
    ],
)
def test_values_are_yaml(text: str, values: list[Any]) -> None:
    assert parse_variation(text) == [{"a": value} for value in values]


def test_keys_that_change_together() -> None:
    assert parse_variation("a+b.c=1+[2, 3],4+5") == [{"a": 1, "b.c": [2, 3]}, {"a": 4, "b.c": 5}]
    assert parse_variation("a=1+2,3") == [{"a": "1+2"}, {"a": 3}], "one key: a plus is part of the value"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "written key=value,value, not 'a'"),
        ("=1,2", "written key=value,value"),
        ("a=1", "at least two values"),
        ("a+b=1+2,3", "changes 2 keys together and needs as many values, got '3'"),
    ],
)
def test_mistakes_in_a_variation(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variation(text)


def test_arms_that_could_not_differ_stand_once() -> None:
    variations = [parse_variation(text) for text in (WEIGHTING, TEMPERATURE, SCORE)]
    arms = plan_arms(["lambda", "grpo", "dr_grpo", "rloo"], variations)
    assert len(arms) == 3 * 3 * 2 + 1 + 3
    assert len({arm.slug for arm in arms}) == len(arms)
    by_label = {arm.label: arm.settings for arm in arms}
    assert by_label["grpo"] == {"model.algorithm.estimator": "grpo"}
    assert by_label["uniform"] == {"model.algorithm.estimator": "lambda", "model.algorithm.weighting": "uniform"}
    assert by_label["agreement temperature=0.1 score=sum"] == {
        "model.algorithm.estimator": "lambda",
        "model.algorithm.weighting": "agreement",
        "model.algorithm.temperature": 0.1,
        "model.init_args.algorithm.score": "sum",
    }


def test_other_settings_apply_to_baselines_too() -> None:
    arms = plan_arms(["lambda", "grpo"], [parse_variation("model.rollout.group_size+data.batch_size=4+32,16+8")])
    assert [arm.label for arm in arms] == [
        f"{name} group_size={group} batch_size={batch}"
        for name in ("lambda", "grpo")
        for group, batch in ((4, 32), (16, 8))
    ]
    # The temperature of sampling is not that of the pairs.
    arms = plan_arms(["grpo"], [parse_variation("model.rollout.sampling.temperature=0.5,1")])
    assert len(arms) == 2


def test_arms_of_one_short_label_are_all_kept() -> None:
    text = "o={class_path: a.W, init_args: {lr: 1e-4}},{class_path: a.W, init_args: {lr: 1e-5}},{class_path: a.S}"
    arms = plan_arms([], [parse_variation(text)])
    assert [arm.settings["o"].get("init_args") for arm in arms] == [{"lr": "1e-4"}, {"lr": "1e-5"}, None]
    assert len({arm.label for arm in arms}) == len({arm.slug for arm in arms}) == 3
    assert len(plan_arms([], [parse_variation("a=0.1234567,0.1234568")])) == 2


def test_labels_tell_keys_of_one_name_apart() -> None:
    arms = plan_arms([], [parse_variation("model.rewards.0.weight=1,2"), parse_variation("model.rewards.1.weight=0,1")])
    assert arms[1].label == "0.weight=1 1.weight=1"


def test_without_estimators_the_base_decides() -> None:
    arms = plan_arms([], [parse_variation("model.algorithm.kl_coef=0,0.01")])
    assert [arm.settings for arm in arms] == [{"model.algorithm.kl_coef": 0}, {"model.algorithm.kl_coef": 0.01}]


def test_runs_go_seed_by_seed(tmp_path: Path) -> None:
    runs = plan_runs(plan_arms(["lambda", "grpo"], []), [1, 2], tmp_path)
    assert [(run.arm.label, run.seed) for run in runs] == [("lambda", 1), ("grpo", 1), ("lambda", 2), ("grpo", 2)]
    assert len({run.directory for run in runs}) == 4


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        load_yaml(tmp_path / "none.yaml")
    for text, message in {"a: [": "cannot be read", "- a": "not a mapping"}.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_yaml(tmp_path / "bad.yaml")


def test_functions_of_the_users_own_as_arms() -> None:
    arms = plan_arms(["lambda", "grpo", "my_package.mine"], [parse_variation(SCORE), parse_variation(TEMPERATURE)])
    own = [arm for arm in arms if arm.settings[ESTIMATOR] == "my_package.mine"]
    assert [arm.label for arm in own] == ["my_package.mine score=mean", "my_package.mine score=sum"]
    assert len([arm for arm in arms if arm.settings[ESTIMATOR] == "grpo"]) == 1
    shapes = parse_variation(f"{ESTIMATOR}=grpo,{{class_path: my_package.Mine, init_args: {{power: 2}}}}")
    assert [arm.label for arm in plan_arms([], [shapes])] == ["grpo", "Mine"]
    mapped = plan_arms(parse_estimators("lambda, {class_path: my_package.Mine, init_args: {a: 1, b: [2, 3]}}"), [])
    assert [arm.label for arm in mapped] == ["lambda", "Mine"]
    assert mapped[1].settings[ESTIMATOR]["init_args"] == {"a": 1, "b": [2, 3]}


def test_each_arm_tunes_what_it_uses() -> None:
    arms = plan_arms(["lambda", "grpo"], [])
    rates = parse_tuning("model.optimizer.init_args.lr=1e-4,1e-3")
    temperatures = parse_tuning("model.algorithm.temperature=group_std,0.1")
    pairwise, baseline = (candidates(arm, [rates, temperatures]) for arm in arms)
    assert [each.label for each in pairwise] == [
        *("lr=0.0001 temperature=group_std", "lr=0.0001 temperature=0.1"),
        *("lr=0.001 temperature=group_std", "lr=0.001 temperature=0.1"),
    ]
    assert [each.tuned for each in baseline] == [
        {"model.optimizer.init_args.lr": 1e-4},
        {"model.optimizer.init_args.lr": 1e-3},
    ]
    assert [each.tuned for each in candidates(arms[1], [temperatures])] == [{}]
    for twice in ("a=1,1", "a=1,1.0", "a=1e-4,0.0001", "a+b=1+2,1+2.0"):
        with pytest.raises(ValueError, match="names a value twice"):
            parse_tuning(twice)


def test_arguments_of_an_own_estimator_are_not_settings_of_the_pairs() -> None:
    """Even if they have the same names."""
    own = "model.algorithm.estimator.init_args"
    names = parse_variation(f"{own}.weighting=uniform,linear")
    temperatures = parse_variation("model.algorithm.temperature=0.1,1")
    assert len(plan_arms([], [names, temperatures])) == 4
    weightings = parse_variation("model.algorithm.weighting=uniform,agreement")
    assert len(plan_arms([], [weightings, parse_variation(f"{own}.temperature=0.1,1")])) == 4
    rewards = parse_variation("model.rewards.0.init_args.estimator=a,b")
    assert len(plan_arms([], [rewards, temperatures])) == 4


def test_arguments_of_an_own_estimator_are_those_of_its_arms() -> None:
    powers = parse_variation("model.algorithm.estimator.init_args.power=1,2")
    arms = plan_arms(["lambda", "my.function", {"class_path": "my.Power"}], [powers])
    assert [arm.label for arm in arms] == ["lambda", "my.function", "Power power=1", "Power power=2"]
    assert len(plan_arms([], [powers])) == 2, "the base's estimator has it"
