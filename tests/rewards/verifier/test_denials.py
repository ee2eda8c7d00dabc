"""Values that a text denies with words between the denial and the value, and values that it gives all the same."""

from collections.abc import Iterator

import pytest

from lightning_lambdapo.rewards import AccuracyReward, RewardInputs


@pytest.fixture(scope="module")
def reward() -> Iterator[AccuracyReward]:
    judge = AccuracyReward(deadline=60.0)
    yield judge
    judge.close()


def judged(reward: AccuracyReward, gold: str, text: str) -> float | None:
    return reward(RewardInputs(["?"], [text], [gold], [None], [1], [False], [{}]))[0]


#: {} is the gold answer, a number or a letter
DENIED = [
    "I don't think it's {}.", "I do not believe that the correct answer is {}.", "We would not say that it is {}.",
    "I can't believe it's {}.", "I don't think that {} is the answer.", "I don't think it's **{}**.",
    "The answer does not appear to be {}.", "The answer doesn't seem to be {}.", "It doesn't look like it is {}.",
    "The answer cannot possibly be {}.", "The answer couldn't be {}.", "The answer isn't actually {}.",
    "The answer is not really {}", "The answer is not necessarily {}", "The answer is not, in fact, {}.",
    "It is not, after all, {}.", "It does not have to be {}.", "It turns out not to be {}.",
    "The answer is by no means {}", "The answer is hardly {}", "It can hardly be {}.", "It could scarcely be {}.",
    "It is unlikely to be {}.", "It seems unlikely that the answer is {}.", "It is impossible that it is {}.",
    "I doubt it is {}.", "I highly doubt it's {}", "I doubt that the answer is {}", "Answer: We doubt it is {}.",
    "Answer: I don't think it is {}.", "There is no way it is {}.", "It is neither 71 nor is it {}.",
    "It is not the case that it is {}.", "It is not true that the answer is {}.", "It is false that the answer is {}.",
    "It is wrong to say it is {}.", "It would be a mistake to think that it is {}.",
    "The answer is anything but {}", "The answer may be anything except {}.", "It is something other than {}.",
    "I don't think the answer is {}.", "I don't think the answer to this question is {}.",
    "The answer is most likely not {}.", "The answer is {}? No.", "Is it {}? No, that is too much.",
    "Is it {}? I don't think so.", "I don't think it\nis {}.",
]  # fmt: skip
DENIED_LETTERS = [
    "All but B.", "All except (B).", "Everything except option B.", "I don't think option B is correct.",
    "I doubt (B) is correct.", "(B) is hardly right.", "(B) is unlikely to be right.", "I would not pick B.",
    "We cannot choose (B).", "I don't think it's A or B.", "The answer is B? No, it is C.", "Is it (B)? No, it is (C).",
]  # fmt: skip

#: {} is the gold answer, a number or the letter B. D stands for 75, E for 76
GIVEN = [
    "The answer is not D but {}", "The answer is not really D but {}.", "The answer is not, in fact, D but {}.",
    "It isn't actually D but {}", "It isn't D, it's {}", "It is not D or E but {}.", "Instead of D it is {}",
    "I don't think it's D. The answer is {}.", "I don't think the answer is D, it's {}.",
    "I don't think it is D, I think it is {}.", "I don't think so, it is {}.", "I doubt it is D. It is {}.",
    "The answer is anything but D; it is {}.", "The answer is {}, hardly D.", "The answer is {}, by no means D",
    "The answer is D? No, it is {}.", "Is it D? No. It is {}.", "The answer is {}? Yes.",
    "It cannot be anything but {}", "It could not possibly be anything other than {}.", "It is none other than {}.",
    "It is not unlikely that the answer is {}.", "It is not wrong to say it is {}", "It is not only {}",
    "There is no doubt that the answer is {}.", "Without a doubt it is {}.", "I do not doubt that it is {}.",
    "No doubt the answer is {}", "Whether it is even or not the answer is {}.", "If not, it is {}.",
    "That is not correct\nThe answer is {}.", "That is not right. The answer is {}.", "Not really. It is {}.",
    "It can't be denied that the answer is {}.", "I'm not sure, but the answer is {}.",
    "It's impossible to get D, so it is {}.", "Don't forget the answer is {}", "Is it D? No doubt. It is {}.",
]  # fmt: skip
GIVEN_NUMBERS = ["She sold all but 73.", "It is 73; I don't think it is 75.", "Add 5 except on day 2, so 73"]
GIVEN_LETTERS = ["All of them are prime except B", "I don't think D is right. Option B is correct.", "I don't. B"]


@pytest.mark.parametrize("gold", ["73", "B"])
@pytest.mark.parametrize("line", DENIED)
def test_what_is_denied_is_no_answer(reward: AccuracyReward, line: str, gold: str) -> None:
    text = line.format(gold)
    assert judged(reward, gold, text) == 0.0
    assert reward.vote(text) in {None, "71"}


@pytest.mark.parametrize("text", DENIED_LETTERS)
def test_letters_that_are_denied_choose_nothing(reward: AccuracyReward, text: str) -> None:
    assert judged(reward, "B", text) == 0.0
    assert reward.vote(text) == ("C" if "C" in text else None)


@pytest.mark.parametrize("gold", ["73", "B"])
@pytest.mark.parametrize("line", GIVEN)
def test_what_is_given_beside_a_denial_counts(reward: AccuracyReward, line: str, gold: str) -> None:
    other, third = ("75", "76") if gold == "73" else ("D", "E")
    text = line.replace("Don't", "~").replace("D", other).replace("E", third).replace("~", "Don't").format(gold)
    assert judged(reward, gold, text) == 1.0
    assert judged(reward, other, text) == 0.0
    assert reward.vote(text) == gold


@pytest.mark.parametrize(
    ("text", "gold"), [*((text, "73") for text in GIVEN_NUMBERS), *((text, "B") for text in GIVEN_LETTERS)]
)
def test_numbers_and_letters_that_look_denied_and_are_not(reward: AccuracyReward, text: str, gold: str) -> None:
    assert judged(reward, gold, text) == 1.0


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        ("I don't think the answer is blue.", "blue", 0.0), ("I doubt that the answer is blue.", "blue", 0.0),
        ("The answer is anything but blue.", "blue", 0.0),
        ("I don't think the answer is red, it is blue.", "blue", 1.0),
        ("I don't think it is $\\sqrt{7}$.", "\\sqrt{7}", 0.0), ("It is hardly \\(7\\) but \\(9\\).", "9", 1.0),
        ("The answer is not possible.", "not possible", 1.0), ("It's not 73 or 74.", "74", 0.0),
    ],
)  # fmt: skip
def test_words_and_maths(reward: AccuracyReward, text: str, gold: str, verdict: float) -> None:
    assert judged(reward, gold, text) == verdict
