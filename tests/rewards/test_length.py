"""The soft overlong punishment, worked by hand."""

import pytest

from lightning_lambdapo.rewards import LengthPenalty, RewardInputs


def judge(reward: LengthPenalty, lengths: list[int]) -> list[float | None]:
    count = len(lengths)
    return reward(
        RewardInputs(
            ["?"] * count, ["x"] * count, [None] * count, [None] * count, lengths, [False] * count, [{}] * count
        )
    )


def test_the_three_pieces() -> None:
    # free up to 16384 - 4096 = 12288; at 13312, 1024 of 4096 are used; at 16384 all
    lengths = [0, 1, 12288, 12289, 13312, 14336, 16383, 16384, 16385, 99999]
    expected = [0.0, 0.0, 0.0, -1 / 4096, -0.25, -0.5, -4095 / 4096, -1.0, -1.0, -1.0]
    assert judge(LengthPenalty(max_length=16384, buffer=4096), lengths) == expected


def test_a_buffer_as_long_as_the_maximum_punishes_from_the_first_token() -> None:
    assert judge(LengthPenalty(max_length=4, buffer=4), [0, 1, 2, 4, 5]) == [0.0, -0.25, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(("max_length", "buffer"), [(100, 0), (100, 101), (100, -1), (0, 0), (-5, 1)])
def test_bad_settings_are_errors(max_length: int, buffer: int) -> None:
    with pytest.raises(ValueError, match=rf"`buffer` must be from 1 to `max_length` \({max_length}\), got {buffer}"):
        LengthPenalty(max_length=max_length, buffer=buffer)
