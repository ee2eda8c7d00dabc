"""Forms of a final answer."""

import pytest

from lightning_lambdapo.rewards import FormatReward, RewardInputs
from lightning_lambdapo.rewards.formatting import Style


def judge(reward: FormatReward, text: str) -> float | None:
    return reward(RewardInputs(["?"], [text], [None], [None], [1], [False], [{}]))[0]


CASES: list[tuple[Style, str, float]] = [
    ("boxed", r"so \boxed{18}", 1.0),
    ("boxed", r"so \boxed{\frac{1}{2}} then", 1.0),
    ("boxed", r"\boxed{18} or \boxed{19}", 0.0),
    ("boxed", r"\boxed{ }", 0.0),
    ("boxed", r"\boxed{18", 0.0),
    ("boxed", "#### 18", 0.0),
    ("boxed", r"so $\boxed 9$", 1.0),
    ("boxed", r"\boxed\frac12", 1.0),
    ("boxed", r"\boxed {18}", 1.0),
    ("boxed", r"with \boxed around it: \boxed{18}", 1.0),
    ("boxed", r"\boxed 9 or \boxed{10}", 0.0),
    ("boxed", r"\boxed 9 and \boxed 10", 0.0),
    ("boxed", r"\boxed, as asked", 0.0),
    ("boxed", r"\boxed", 0.0),
    ("boxed", r"<think>\boxed{17}?</think> \boxed{18}", 1.0),
    ("boxed", r"<think>\boxed{17}</think> so 17", 0.0),
    ("boxed", r"<think>\boxed{18}", 0.0),
    ("hash", "<think>\n#### 17\n</think>\n#### 18", 1.0),
    ("hash", "<think>\n#### 18", 0.0),
    ("tag", "<think><answer>18</answer>", 0.0),
    ("tag", "<think>18</think><answer>18</answer>", 1.0),
    ("hash", "9 * 2 = 18\n#### 18", 1.0),
    ("hash", "#### 18", 1.0),
    ("hash", "9 * 2 = 18 #### 18", 0.0),
    ("hash", "so\n####", 0.0),
    ("hash", "so\n#### \n18", 0.0),
    ("hash", "#### 17\n#### 18", 0.0),
    ("hash", "##### 18", 0.0),
    ("hash", r"\boxed{18}", 0.0),
    ("tag", "so <answer>18</answer>", 1.0),
    ("tag", "<answer> </answer>", 0.0),
    ("tag", "</answer>18<answer>", 0.0),
    ("tag", "<answer>1</answer><answer>2</answer>", 0.0),
    ("tag", "<answer>18", 0.0),
    ("think_answer", "<think>9 * 2</think>\n<answer>18</answer>\n", 1.0),
    ("think_answer", "<think>9 * 2</think> so <answer>18</answer>", 0.0),
    ("think_answer", "well <think>9 * 2</think><answer>18</answer>", 0.0),
    ("think_answer", "<think>9 * 2</think><answer>18</answer> yes", 0.0),
    ("think_answer", "<think></think><answer>18</answer>", 0.0),
    ("think_answer", "<think>9 * 2</think><answer></answer>", 0.0),
    ("think_answer", "<answer>18</answer><think>9 * 2</think>", 0.0),
    ("think_answer", "<think>a<answer>b</think>c</answer>", 0.0),
    ("think_answer", "<answer>18</answer>", 0.0),
]


@pytest.mark.parametrize(("style", "text", "expected"), CASES)
def test_styles(style: Style, text: str, expected: float) -> None:
    assert judge(FormatReward(style=style), text) == expected


def test_a_pattern_takes_the_place_of_the_style() -> None:
    reward = FormatReward(pattern=r"^Result: \d+$", name="result", weight=2.0)
    assert [judge(reward, text) for text in ("Result: 12", r"\boxed{12}", "Result: x")] == [1.0, 0.0, 0.0]
    assert (reward.name, reward.weight) == ("result", 2.0)


def test_a_pattern_is_not_searched_for_in_an_endless_text() -> None:
    reward = FormatReward(pattern="a")
    assert [judge(reward, "a" * 100_000), judge(reward, "a" * 100_001)] == [1.0, 0.0]


def test_bad_settings_are_errors() -> None:
    with pytest.raises(ValueError, match=r"`pattern` '\(' is not a regular expression: .*position 0"):
        FormatReward(pattern="(")
    with pytest.raises(ValueError, match="`style` must be one of boxed, hash, tag, think_answer, got 'xml'"):
        FormatReward(style="xml")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("style", "prompt", "completion", "value"),
    [
        ("think_answer", "9 * 2 = ?<assistant><think>\n", "9 + 9</think><answer>18</answer>", 1.0),
        ("think_answer", "9 * 2 = ?<assistant><think>", "</think><answer>18</answer>", 0.0),
        ("think_answer", "9 * 2 = ?<assistant><think>", "<think>9 + 9</think><answer>18</answer>", 1.0),
        ("think_answer", "9 * 2 = ?<assistant><think>", "9 + 9</think><answer>18</answer> yes", 0.0),
        ("think_answer", "<think> and then answer. 9 * 2 = ?", "9 + 9</think><answer>18</answer>", 0.0),
        ("tag", "9 * 2 = ? <answer>", "18</answer>", 1.0),
        ("tag", "9 * 2 = ? <answer>", "18", 0.0),
        ("boxed", r"9 * 2 = \boxed{", "18}", 1.0),
        ("hash", "9 * 2 = ?\nEnd with a line that begins with ####", "9 + 9\n#### 18", 1.0),
    ],
)
def test_a_form_that_the_prompt_opens(style: Style, prompt: str, completion: str, value: float) -> None:
    inputs = RewardInputs([prompt], [completion], [None], [None], [1], [False], [{}])
    assert FormatReward(style=style)(inputs) == [value]


@pytest.mark.parametrize("pattern", [r"\A<think>.+</think>", r"\A[^<]+</think>"])
def test_a_pattern_that_the_prompt_opens_or_that_reckons_with_it(pattern: str) -> None:
    inputs = RewardInputs(["?<think>\n"], ["so</think> 18"], [None], [None], [1], [False], [{}])
    assert FormatReward(pattern=pattern.replace(".+", r"[\s\S]+"))(inputs) == [1.0]
