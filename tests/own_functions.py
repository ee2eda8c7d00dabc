"""Estimators and losses that tests name by their import path, as a command line or a configuration does."""

from typing import Any

from torch import Tensor

from lightning_lambdapo.functional import LossOutput, group_advantages, policy_loss

NUMBER = 3.0


def grpo(rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """The built-in baseline under another name."""
    return group_advantages(rewards, estimator="grpo", valid=valid)


class Scaled:
    """The reward, less a baseline, times a number."""

    def __init__(self, factor: float, baseline: float = 0.0) -> None:
        if factor == 0:
            raise ValueError("factor is 0")
        self.factor = factor
        self.baseline = baseline

    def __call__(self, rewards: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
        return (self.factor * (rewards - self.baseline)).flatten()


class Doubled(Scaled):
    """One that needs no arguments."""

    def __init__(self) -> None:
        super().__init__(2.0)


class Silent:
    """Nothing to call, and what it does would be noticed."""

    def __init__(self) -> None:
        raise AssertionError("built before it was checked")


def reinforce(logprobs: Tensor, advantages: Tensor, mask: Tensor, token_count: int, **others: Any) -> Tensor:
    """Advantage times log-probability, as a scalar."""
    return -(logprobs * advantages[:, None]).where(mask, 0.0).sum() / token_count


def likelihood(logprobs: Tensor, mask: Tensor, token_count: int, **others: Any) -> Tensor:
    """Whatever the advantage is."""
    return -logprobs.where(mask, 0.0).sum() / token_count


def clipped(**arguments: Any) -> LossOutput:
    """The built-in loss under another name."""
    return policy_loss(**arguments)
