"""Functions of the user's own: how they are found, what they may return, and what is said of mistakes."""

import math
import sys
from pathlib import Path
from typing import Any

import own_functions
import pytest
import torch

from lightning_lambdapo.config import AlgorithmConfig
from lightning_lambdapo.functional import LossOutput, policy_loss
from lightning_lambdapo.functional.own_functions import (
    find_function,
    function_name,
    own_advantages,
    own_loss,
    plain_function,
)

REWARDS = torch.tensor([[1.0, 0.0, 2.0], [math.nan, 3.0, 5.0]])
VALID = torch.tensor([[True, True, True], [False, True, True]])
SCALED: dict[str, Any] = {"class_path": "own_functions.Scaled", "init_args": {"factor": 3.0, "baseline": 1.0}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("own_functions.Doubled", [[2.0, 0.0, 4.0], [0.0, 6.0, 10.0]]),
        (SCALED, [[0.0, -3.0, 3.0], [0.0, 6.0, 12.0]]),
        (own_functions.Scaled(1.0), [[1.0, 0.0, 2.0], [0.0, 3.0, 5.0]]),
        (lambda _r, s, _v: s, [[0.1, 0.2, 0.3], [0.0, 0.5, 0.6]]),
        (lambda r, *_: r.sum(1, keepdim=True) - r, [[2.0, 3.0, 1.0], [0.0, 5.0, 3.0]]),  # invalid rewards are 0
        (lambda _r, _s, v: v.long(), [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]),
    ],
)
def test_advantages_of_each_kind(given: Any, expected: list[list[float]]) -> None:
    function = AlgorithmConfig(estimator=given).own_estimator
    assert function is not None
    confidence = torch.tensor([[0.1, 0.2, 0.3], [math.inf, 0.5, 0.6]])
    torch.testing.assert_close(own_advantages(function, REWARDS, confidence, VALID), torch.tensor(expected))


def test_built_in_names_are_no_functions() -> None:
    assert AlgorithmConfig().own_estimator is None
    assert AlgorithmConfig(estimator="rloo").own_estimator is None
    assert AlgorithmConfig().own_loss is None


@pytest.mark.parametrize(
    ("setting", "given", "message"),
    [
        ("estimator", "ppo", "`algorithm.estimator` must be one of lambda, grpo, dr_grpo, rloo, or the import path"),
        ("loss", "ppo", "`algorithm.loss` must be one of clipped, or the import path"),
        (
            "estimator",
            "no_such.place",
            "'no_such.place', and there is no module 'no_such'. Install its package, or put",
        ),
        ("estimator", "own_functions.grop", "own_functions has no 'grop'. Did you mean grpo?"),
        ("estimator", "own_functions.NUMBER", "is own_functions.NUMBER, which is float and cannot be called"),
        ("estimator", "own-functions.x", "which is no import path"),
        ("estimator", "own_functions.Scaled", r"class own_functions.Scaled, which cannot be built with init_args {}"),
        ("estimator", {**SCALED, "init_args": {"factor": 0}}, "cannot be built .*: ValueError: factor is 0"),
        ("estimator", "own_functions.Silent", "class own_functions.Silent, whose objects cannot be called"),
        ("estimator", {"class_path": "own_functions.grpo"}, "is 'own_functions.grpo', which is no class"),
        ("estimator", {"class": "x"}, "as a mapping has a class_path and perhaps init_args, got {'class': 'x'}"),
        ("estimator", lambda rewards: rewards, r"\(rewards\), which does not fit its call: too many positional"),
        ("loss", own_functions.grpo, r"does not fit its call: .*receives logprobs, old_logprobs.*\*\*others"),
        ("loss", 3, "is 3, which is int and cannot be called"),
    ],
)
def test_mistakes_are_found_with_the_settings(setting: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**{setting: given})


def test_a_module_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="importing needs_more failed: No module named 'nothing_of_this_name'"):
        AlgorithmConfig(estimator="needs_more.mine")
    with pytest.raises(ValueError, match="importing breaks failed: ZeroDivisionError"):
        AlgorithmConfig(loss="breaks.mine")
    assert "breaks" not in sys.modules


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda r, *_: r.mean(1),
            r"lambda> must return one .* shape \(2, 3\) or \(6,\), got a tensor of shape \(2,\)",
        ),
        (lambda r, *_: r.T, r"got a tensor of shape \(3, 2\)"),
        (lambda *_: None, "got None"),
        (lambda r, *_: r / (r - r), "lambda> returned inf for completion 0 of group 0, whose rewards are .1.0, 0.0"),
    ],
)
def test_advantages_of_the_wrong_kind_name_the_function(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own_advantages(function, REWARDS, torch.zeros(2, 3), VALID)


def test_what_a_function_raises_names_it() -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own") as raised:
        own_advantages(fails, REWARDS, torch.zeros(2, 3), VALID)
    assert raised.value.__notes__ == [f"This was raised in the estimator {function_name(fails)}."]
    with pytest.raises(TypeError, match="its own") as raised:
        own_loss(fails)(**arguments())
    assert raised.value.__notes__ == [f"This was raised in the loss {function_name(fails)}."]


def test_an_estimator_may_change_what_it_gets_and_computes_no_gradient() -> None:
    rewards, valid = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    confidence = torch.zeros(1, 2)

    def in_place(own_rewards: torch.Tensor, own_confidence: torch.Tensor, own_valid: torch.Tensor) -> torch.Tensor:
        own_confidence += 1
        own_valid[:] = False
        return own_rewards.mul_(2)

    found = own_advantages(in_place, rewards, confidence, valid)
    assert found.tolist() == [[2.0, 0.0]]
    assert not found.requires_grad
    assert (rewards.tolist(), confidence.tolist(), valid.tolist()) == ([[1.0, 0.0]], [[0.0, 0.0]], [[True, True]])


def arguments() -> dict[str, Any]:
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs.detach() - 0.1,
        "ref_logprobs": logprobs.detach() + 0.2,
        "advantages": torch.tensor([1.0, -0.5]),
        "mask": torch.tensor([[True, True], [True, False]]),
        "token_count": 4,
    }


def test_a_scalar_loss_has_the_statistics_of_the_built_in_one() -> None:
    given = arguments()
    found = own_loss(own_functions.reinforce)(**given)
    assert found.loss.item() == pytest.approx((1 + 2 - 0.25) / 4)
    known = policy_loss(**given)
    assert known.mean_kl is not None
    assert found.mean_kl == known.mean_kl
    assert found.ratio_max == known.ratio_max == pytest.approx(math.exp(0.1))
    assert found.clip_fraction == 0
    far = given | {"old_logprobs": given["old_logprobs"] - 1}
    assert policy_loss(**far).clip_fraction > 0
    assert own_loss(own_functions.reinforce)(**far).clip_fraction == 0, "it clips nothing"
    whole = own_loss(own_functions.clipped)(**given)
    assert isinstance(whole, LossOutput)
    assert whole.loss == known.loss


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logprobs, **_: logprobs, r"must return a scalar tensor or a LossOutput, got .* \(2, 2\)"),
        (lambda **_: 0.5, "got 0.5"),
        (lambda logprobs, **_: logprobs.detach().sum(), "without a gradient, so nothing would be learnt"),
        (lambda logprobs, **_: (logprobs * math.nan).sum(), "returned nan from finite log-probabilities"),
    ],
)
def test_a_loss_of_the_wrong_kind_names_the_function(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"The loss .*<lambda> .*{message}"):
        own_loss(function)(**arguments())


def test_a_loss_without_gradient_is_right_where_there_is_none() -> None:
    given = arguments()
    given["logprobs"] = given["logprobs"].detach()
    assert own_loss(own_functions.reinforce)(**given).loss.isfinite()


def test_a_diverged_model_is_not_the_loss_functions_fault() -> None:
    given = arguments()
    given["logprobs"] = (given["logprobs"].detach() * math.nan).requires_grad_()
    assert own_loss(own_functions.reinforce)(**given).loss.isnan(), "the update is skipped, as with the built-in loss"


def test_functions_as_plain_data() -> None:
    assert plain_function(own_functions.grpo) == "own_functions.grpo"
    assert plain_function(SCALED) == SCALED
    for unsaved in (lambda r, *_: r, own_functions.Scaled(1.0)):
        noted = plain_function(unsaved)
        assert isinstance(noted, dict)
        with pytest.raises(ValueError, match=r"`x` was .*, given in Python, .* not saved. Give it again"):
            find_function("x", noted, ())
