"""Rewards that tests name by their import path, as a command line or a configuration does."""

from typing import Any

from lightning_lambdapo.rewards import Reward, RewardInputs

NO_REWARD = [1.0]


def lambda_free_reward(completions: list[str], shade: list[int], **columns: Any) -> list[float]:
    """A plain function that wants a column of the data."""
    assert len(completions) == len(shade)
    assert {"prompts", "answers", "references", "completion_lengths", "truncated"} <= columns.keys()
    return [float(len(set(text))) for text in completions]


def brief(completions: list[str], limit: list[int]) -> list[float]:
    """Whether a completion is shorter than its row\'s limit."""
    return [float(len(text) < most) for text, most in zip(completions, limit, strict=True)]


def counted(completion_lengths: list[int]) -> list[float]:
    """A completion\'s length in tokens."""
    return [float(length) for length in completion_lengths]


def cut(**columns: list[Any]) -> list[float]:
    """Whether any completion is truncated."""
    return [float(True in columns["truncated"]) for _ in columns["completions"]]


class Long(Reward):
    """Whether a completion has more than 3 tokens."""

    def __init__(self) -> None:
        super().__init__(1.0, "Long")

    def __call__(self, inputs: RewardInputs) -> list[float]:
        return [float(length > 3) for length in inputs.completion_lengths]
