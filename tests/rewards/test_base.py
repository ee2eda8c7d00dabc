"""Functions as rewards, and the combination of several, against tables worked by hand."""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch

from lightning_lambdapo.rewards import FunctionReward, Reward, RewardInputs, as_rewards
from lightning_lambdapo.rewards.judging import judge

NAN = math.nan


def rows(count: int, columns: list[dict[str, Any]] | None = None) -> RewardInputs:
    return RewardInputs(
        prompts=[f"p{n}" for n in range(count)],
        completions=[f"c{n}" for n in range(count)],
        answers=[f"a{n}" for n in range(count)],
        references=[None] * count,
        completion_lengths=list(range(count)),
        truncated=[False] * count,
        columns=columns or [{} for _ in range(count)],
    )


class Fixed(Reward):
    """Says what it was told to."""

    def __init__(self, values: Any, weight: float = 1.0, name: str = "fixed") -> None:
        super().__init__(weight, name)
        self.values = values

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        if isinstance(self.values, BaseException):
            raise self.values
        return self.values  # type: ignore[no-any-return]


def same(tensor: torch.Tensor, expected: list[list[float]]) -> bool:
    return torch.equal(tensor.nan_to_num(-99.0), torch.tensor(expected).nan_to_num(-99.0))


# values of two rewards (weights 2 and -0.5) for one group of three, total, validity
COMBINATIONS = [
    ([1.0, 0.0, 3.0], [4.0, 2.0, 0.0], [0.0, -1.0, 6.0], [True, True, True]),
    ([1.0, 0.0, 3.0], [None, None, None], [2.0, 0.0, 6.0], [True, True, True]),
    ([None, None, None], [4.0, 2.0, 0.0], [-2.0, -1.0, 0.0], [True, True, True]),
    ([1.0, None, 3.0], [4.0, 2.0, 0.0], [0.0, 0.0, 6.0], [True, False, True]),
    ([1.0, None, 3.0], [None, None, None], [2.0, 0.0, 6.0], [True, False, True]),
    ([1.0, None, 3.0], [None, 2.0, 0.0], [0.0, 0.0, 6.0], [False, False, True]),
    ([1.0, None, None], [None, 2.0, None], [0.0, 0.0, 0.0], [False, False, False]),
    ([None, None, None], [None, None, None], [0.0, 0.0, 0.0], [False, False, False]),
]


@pytest.mark.parametrize(("first", "second", "total", "valid"), COMBINATIONS)
def test_none_rules(
    first: list[float | None], second: list[float | None], total: list[float], valid: list[bool]
) -> None:
    scores = judge([Fixed(first, 2.0, "a"), Fixed(second, -0.5, "b")], rows(3), group_size=3)
    assert scores.total.tolist() == [total]
    assert scores.valid.tolist() == [valid]
    assert same(scores.parts["a"], [[NAN if value is None else value for value in first]])
    assert same(scores.parts["b"], [[NAN if value is None else value for value in second]])
    assert (scores.total.dtype, scores.parts["a"].dtype, scores.valid.dtype) == (
        torch.float32,
        torch.float32,
        torch.bool,
    )


def test_groups_do_not_touch_each_other() -> None:
    first = Fixed([1.0, 2.0, None, None, None, 5.0], 1.0, "a")
    second = Fixed([None, None, 3.0, 4.0, 1.0, 1.0], 10.0, "b")
    scores = judge([first, second], rows(6), group_size=2)
    assert scores.total.tolist() == [[1.0, 2.0], [30.0, 40.0], [0.0, 15.0]]
    assert scores.valid.tolist() == [[True, True], [True, True], [False, True]]


def test_a_reward_of_weight_zero_is_reported_and_adds_nothing() -> None:
    scores = judge([Fixed([1.0, 2.0], 1.0, "a"), Fixed([7.0, 9.0], 0.0, "b")], rows(2), group_size=2)
    assert scores.total.tolist() == [[1.0, 2.0]]
    assert scores.parts["b"].tolist() == [[7.0, 9.0]]


def test_sums_are_taken_in_double_precision() -> None:
    # in float32, 2^24 + 1 is 2^24 already, and the 1 would be lost
    parts = [Fixed([2.0**24], 1.0, "a"), Fixed([1.0], 1.0, "b"), Fixed([-(2.0**24)], 1.0, "c")]
    assert judge(parts, rows(1), group_size=1).total.tolist() == [[1.0]]


def test_no_rows_at_all() -> None:
    assert judge([Fixed([])], rows(0), group_size=4).total.shape == (0, 4)


@pytest.mark.parametrize(
    "values", [[True, 1, 0.5], (1, 1.0, 0.5), torch.tensor([1.0, 1.0, 0.5]), [torch.tensor(1), 1, Fraction(1, 2)]]
)
def test_kinds_of_numbers(values: Any) -> None:
    assert judge([Fixed(values)], rows(3), group_size=3).total.tolist() == [[1.0, 1.0, 0.5]]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, math.nan], ValueError, r"The reward 'fixed' returned nan for row 1\. .*'c1'"),
        ([math.inf, 1.0], ValueError, r"'fixed' returned inf for row 0\. .*'c0'"),
        ([1.0, -math.inf], ValueError, r"'fixed' returned -inf for row 1"),
        ([1.0, 1e39], ValueError, r"'fixed' returned 1e\+39 for row 1"),
        ([10**400, 1.0], ValueError, r"'fixed' returned 1000.* for row 0"),
        ([torch.tensor(math.nan), 1.0], ValueError, r"'fixed' returned nan for row 0"),
        ([1.0], ValueError, "'fixed' returned 1 values for 2 completions"),
        ([1.0] * 3, ValueError, "'fixed' returned 3 values for 2 completions"),
        ([1.0, "1"], TypeError, r"'fixed' returned '1' \(str\) for row 1.*'c1'"),
        ([1.0, [1.0]], TypeError, r"'fixed' returned \[1.0\] \(list\) for row 1"),
        ([1.0, 1j], TypeError, r"\(complex\) for row 1"),
        (torch.ones(2, 1), TypeError, r"\(list\) for row 0"),
        (torch.tensor(1.0), TypeError, "must return a list of numbers, got float"),
        (None, TypeError, "must return a list of numbers, got NoneType"),
        ("11", TypeError, "must return a list of numbers, got str"),
        ({0: 1.0, 1: 1.0}, TypeError, "must return a list of numbers, got dict"),
        (ZeroDivisionError("by nothing"), RuntimeError, "The reward 'fixed' raised ZeroDivisionError: by nothing"),
    ],
)
def test_bad_returns_name_the_reward_and_the_row(values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        judge([Fixed([0.0, 0.0], name="good"), Fixed(values)], rows(2), group_size=2)
    if isinstance(values, Exception):
        assert caught.value.__cause__ is values


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
def test_interrupts_pass_through(interrupt: BaseException) -> None:
    with pytest.raises(type(interrupt)):
        judge([Fixed(interrupt)], rows(1), group_size=1)


def test_long_completions_are_shortened_in_messages() -> None:
    inputs = rows(1)
    inputs.completions[0] = "x" * 500
    with pytest.raises(ValueError, match=r"'x{80}\.\.\.'"):
        judge([Fixed([math.nan])], inputs, group_size=1)


def test_a_total_beyond_float32_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit float32"):
        judge([Fixed([1e30], weight=1e30)], rows(1), group_size=1)


@pytest.mark.parametrize("group_size", [0, 2, 4, -3])
def test_group_size_must_divide(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"`group_size` must divide .*\(3\), got {group_size}"):
        judge([Fixed([1.0] * 3)], rows(3), group_size=group_size)


def test_a_function_gets_what_it_asks_for() -> None:
    def judge(completions: list[str], level: list[int | None], answers: list[str], extra: str = "unset") -> list[float]:
        seen.append((completions, level, answers, extra))
        return [1.0] * len(completions)

    seen: list[Any] = []
    inputs = rows(3, [{"level": 3, "other": "x"}, {}, {"level": 5}])
    assert FunctionReward(judge)(inputs) == [1.0] * 3
    assert seen == [(["c0", "c1", "c2"], [3, None, 5], ["a0", "a1", "a2"], "unset")]


def test_a_function_with_keywords_gets_everything() -> None:
    def judge(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0] * len(given["prompts"])

    seen: dict[str, Any] = {}
    FunctionReward(judge)(rows(2, [{"level": 3}, {"other": "x"}]))
    assert seen == {
        "prompts": ["p0", "p1"],
        "completions": ["c0", "c1"],
        "answers": ["a0", "a1"],
        "references": [None, None],
        "completion_lengths": [0, 1],
        "truncated": [False, False],
        "level": [3, None],
        "other": [None, "x"],
    }


def test_a_function_cannot_change_the_rows_of_the_next_reward() -> None:
    def greedy(completions: list[str]) -> list[float]:
        completions.clear()
        return [1.0, 1.0]

    inputs = rows(2)
    assert judge([FunctionReward(greedy), Fixed([0.0, 0.0])], inputs, group_size=2).total.tolist() == [[1.0, 1.0]]
    assert inputs.completions == ["c0", "c1"]


def test_a_column_that_hides_an_argument_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"columns named \['answers'\]"):
        FunctionReward(lambda **_: [1.0], name="one")(rows(1, [{"answers": "1"}]))


def test_an_argument_that_is_no_column_is_an_error() -> None:
    def judge(completions: list[str], solution: list[str]) -> list[float]:
        return [1.0]

    with pytest.raises(
        TypeError, match=r"'judge' takes \['solution'\], which is no column of the data\. There are .*'level'"
    ):
        FunctionReward(judge)(rows(1, [{"level": 1}]))


def test_names_of_functions() -> None:
    def judge(completions: list[str], bonus: float = 0.0) -> list[float]:
        return [bonus] * len(completions)

    more = functools.partial(judge, bonus=2.0)
    assert FunctionReward(judge).name == "judge"
    assert FunctionReward(more, name="more")(rows(1)) == [2.0]
    nameless: list[Callable[..., Any]] = [more, lambda **_: [1.0]]
    for function in nameless:
        with pytest.raises(ValueError, match=r"has no name of its own.*name="):
            as_rewards([function])


def test_functions_that_cannot_be_called_so() -> None:
    async def later(completions: list[str]) -> list[float]:
        return [1.0]

    def positional(completions: list[str], /) -> list[float]:
        return [1.0]

    with pytest.raises(TypeError, match="asynchronous"):
        FunctionReward(later)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'positional' must take its arguments by name\. \['completions'\]"):
        FunctionReward(positional)


def test_as_rewards_wraps_and_keeps_order() -> None:
    def judge(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    fixed = Fixed([1.0])
    first, second = as_rewards([judge, fixed])
    assert isinstance(first, FunctionReward)
    assert (first.name, first.weight) == ("judge", 1.0)
    assert second is fixed


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([], ValueError, "`rewards` is empty"),
        ([Fixed([], name="a"), Fixed([], name="b"), Fixed([], name="a")], ValueError, r"unique names.*\['a'\]"),
        ([Fixed([], weight=math.nan)], ValueError, "weight of the reward 'fixed' must be a finite number, got nan"),
        ([Fixed([], weight=-math.inf)], ValueError, "got -inf"),
        ([Fixed([], weight="1")], ValueError, "got '1'"),  # type: ignore[arg-type]
        ([Fixed], TypeError, "must be a Reward object or a function, got <class"),
        (["accuracy"], TypeError, "must be a Reward object or a function, got 'accuracy'"),
        (Fixed([]), TypeError, "must be a list of rewards"),
        ("accuracy", TypeError, "must be a list of rewards"),
    ],
)
def test_bad_lists_of_rewards(rewards: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_rewards(rewards)
