"""Right or wrong, on a table written by hand, and what happens when it cannot be told."""

import copy
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lightning_lambdapo.rewards import AccuracyReward, RewardInputs
from lightning_lambdapo.rewards.verifier.pool import Verdict


def rows(completions: Sequence[str], answers: Sequence[str | None]) -> RewardInputs:
    count = len(completions)
    return RewardInputs(
        prompts=["?"] * count,
        completions=list(completions),
        answers=list(answers),
        references=[None] * count,
        completion_lengths=[1] * count,
        truncated=[False] * count,
        columns=[{}] * count,
    )


@pytest.fixture(scope="module")
def reward() -> Iterator[AccuracyReward]:
    judge = AccuracyReward(deadline=60.0)
    yield judge
    judge.close()


EQUAL = [
    # numbers, decided exactly
    ("18", "18"), ("18", "18."), ("18", "$18.00"), ("18", "18 dollars"), ("18", r"\$18"), ("14.0", "14"),
    ("14", "14.000"), ("1000", "1,000"), ("1,234,567", "1234567"), ("-5", "\u22125"), ("-5", "$-5$"), ("0.5", "1/2"),
    ("0.5", r"\frac{1}{2}"), (r"\frac12", r"\dfrac{1}{2}"), ("2/4", "1/2"), ("2.5", "2 1/2"),
    (r"2\frac{1}{2}", "5/2"), ("50%", "50"), ("50", "50%"), ("0.5", "50%"), (r"50\%", "1/2"),
    ("5,000,000", "5 million"), ("12", "12 cm"), ("12 cm", "12"), (r"12\text{ cm}", "12 centimeters"),
    ("90", r"90^\circ"), ("1/3", "0.333333"), ("007", "7"), ("0", "-0"), ("100", "1e2"),
    # strings
    ("blue", "Blue"), (r"\text{blue}", "blue."), ("no solution", "No  solution"), ("(1,2)", "$(1,\\, 2)$"),
    ("x+1", "x + 1"), (r"\left[0,1\right)", "[0, 1)"),
    # algebra, decided by math-verify
    (r"\sqrt{8}", r"2\sqrt{2}"), ("(x+1)^2", "x^2+2x+1"), (r"\frac{\pi}{2}", r"\pi/2"), ("2^{10}", "1024"),
    ("x=5", "5"), ("5", "x = 5"), (r"\{1,2,3\}", r"\{3, 2, 1\}"), ("1,2,3", "3, 2, 1"),
    (r"(-\infty,3]", r"(-\infty, 3 ]"), ("x>3", "3<x"), ("5!", "120"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\left(\frac{1}{2},3\right)", "(0.5, 3)"), ("2**10", "1024"), ("18", "9*2 = 18"), (r"\pm 1", "-1, 1"),
    ("1+2i", "2i+1"), (r"(-\infty,0)\cup(0,\infty)", r"(0,\infty)\cup(-\infty,0)"), (r"e^{x^2}", r"e^{x \cdot x}"),
]  # fmt: skip

DIFFERENT = [
    ("18", "1800"), ("0.5", "50"), ("5000%", "50%"), ("blue", "lube"), ("18", "18!"), ("2", "2^3"),
    ("18", "17"), ("18", "-18"), ("18", "180"), ("18", "1.8"), ("18", "18x"), ("18", "18 or 19"), ("1000", "1,00"),
    ("1/2", "2"), ("1/2", "-1/2"), ("1/3", "0.33"), ("1/3", "0.333334"), ("50%", "5%"), ("50%", "0.05"),
    ("50%", "5000%"), ("10%", "1000%"), ("12 cm", "12 km"), ("18 dollars", "18 cents"), ("5", "5 million"),
    ("2", "2 thirds"), ("18", "eighteen"), ("18", "blue"), ("blue", "red"), ("north", "thorn"), ("true", "false"),
    ("no solution", "one solution"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), (r"\{1,2\}", r"\{1,3\}"),
    (r"\{1,2\}", r"\{1,2,3\}"), ("[2,3)", "(2,3]"), ("x+1", "x+2"), ("x+1", "y+1"), ("x>3", "x<3"),
    (r"\sqrt{8}", r"\sqrt{2}"), (r"\pi", "3.14"), ("x=5", "x=6"), ("x^2", "x^3"), ("(-\\infty,3]", "(-\\infty,3)"),
    ("18", "{"), ("5", "5xy"), (r"\frac{1}{2}", r"\frac{1}{0}"),
]  # fmt: skip


def test_the_tables_are_as_large_as_they_are_said_to_be() -> None:
    assert len(EQUAL) >= 40
    assert len(DIFFERENT) >= 40


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_answers(reward: AccuracyReward, gold: str, answer: str) -> None:
    assert reward(rows([rf"so \boxed{{{answer}}}"], [gold])) == [1.0]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers(reward: AccuracyReward, gold: str, answer: str) -> None:
    assert reward(rows([f"so #### {answer}"], [gold])) == [0.0]


def test_no_gold_answer_is_not_applicable_and_no_answer_is_wrong(reward: AccuracyReward) -> None:
    assert reward(rows(["18", "18", "18", "none", ""], [None, " ", "18", "18", "18"])) == [None, None, 1.0, 0.0, 0.0]


def test_gold_answers_may_be_worked_solutions(reward: AccuracyReward) -> None:
    golds = ["9 * 2 = 18\n#### 18", r"It is 3, so \boxed{18}.", "<answer>18</answer>"]
    assert reward(rows(["#### 18"] * 3 + ["#### 3"] * 3, golds * 2)) == [1.0] * 3 + [0.0] * 3


def test_a_completion_that_is_the_answer_and_nothing_else(reward: AccuracyReward) -> None:
    """The last number of a list is not its answer."""
    gold = "1,2,2,3,7"
    completions = ["1,2,2,3,7", " 1,2,2,3,7\n", "2,1,2,3,7", "1,2,3,7", "7", "1,2,2,3,7,7", "3+4=7,7+1=8", "8"]
    golds = [gold] * 6 + ["3+4=7,7+1=8"] * 2
    assert reward(rows(completions, golds)) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert AccuracyReward(answer_format="boxed")(rows([gold], [gold])) == [0.0]


def test_letters(reward: AccuracyReward) -> None:
    completions = ["The answer is (C) 15.", r"\boxed{B}", "C", "#### 3", "The answer is c) 15"]
    assert reward(rows(completions, ["C", "C", "(C)", "C", "C"])) == [1.0, 0.0, 1.0, 0.0, 1.0]
    letters = AccuracyReward(answer_format="letter")
    assert letters(rows(["The answer is (C).", "#### D"], ["(C) 15 apples", "C"])) == [1.0, 0.0]
    with pytest.raises(ValueError, match="needs gold answers from A to J, got '15'"):
        letters(rows(["C"], ["15"]))


def test_an_explicit_format_is_required_of_the_completion() -> None:
    completions = ["The answer is 18", r"\boxed{18}", "#### 18", "<answer>18</answer>"]
    golds = ["1 + 17 = 18\n#### 18"] * 4
    assert AccuracyReward(answer_format="boxed")(rows(completions, golds)) == [0.0, 1.0, 0.0, 0.0]
    assert AccuracyReward(answer_format="hash")(rows(completions, golds)) == [0.0, 0.0, 1.0, 0.0]
    assert AccuracyReward(answer_format="tag")(rows(completions, golds)) == [0.0, 0.0, 0.0, 1.0]


def test_what_is_too_costly_is_wrong_and_counted_and_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = AccuracyReward()
    monkeypatch.setattr(reward.verifier, "verify", lambda pairs: pytest.fail(f"sent {pairs}"))
    bombs = [
        "9^{9^{9^{9}}}", "9**9**9**9", "10^{1000000}", "x+" * 300 + "1", "1" * 65 + "+0", "1" * 2**20 + "x",
        r"\frac{" * 41 + "1" + "}{2}" * 41, r"\sqrt{" * 41 + "2" + "}" * 41, r"\sqrt{" * 60 + "2}",
        "(" * 41 + "x" + ")" * 41, r"\frac{" * 100_000 + "1", "}" * 41 + "[" * 41,
        "99999!", "(100000)!", "100,000!", "1{,}000{,}000!", "9!!", "{9!}!",
    ]  # fmt: skip
    answers = [rf"<answer>{bomb}</answer>" for bomb in bombs] + ["<answer>18</answer>"] * 2
    assert reward(rows(answers, ["18"] * 20)) == [0.0] * 18 + [1.0] * 2
    assert reward.statistics() == {"refused_share": 0.9}
    assert reward(rows([r"\boxed{18}"], ["18"])) == [1.0]
    assert reward.statistics() == {}


def test_each_distinct_question_is_asked_once_and_fills_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = AccuracyReward()
    asked: list[tuple[str, str]] = []

    def verify(pairs: list[tuple[str, str]]) -> list[Verdict]:
        asked.extend(pairs)
        return [{"a+b": Verdict.EQUAL, "b+c": Verdict.DIFFERENT}.get(answer, Verdict.FAILED) for _, answer in pairs]

    monkeypatch.setattr(reward.verifier, "verify", verify)
    answers = ["a+b", "b+c", "c+d", "c+d", "x+y", "a+b"]
    got = reward(rows([rf"\boxed{{{answer}}}" for answer in answers], ["x+y"] * 6))
    assert got == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert asked == [("x+y", "a+b"), ("x+y", "b+c"), ("x+y", "c+d")]
    assert reward.statistics() == {"verifier_failure_share": 0.4}  # c+d twice, of five that were no equal strings


def test_no_verdict_makes_a_row_invalid_and_only_equal_makes_it_right(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = AccuracyReward()
    monkeypatch.setattr(reward.verifier, "verify", lambda _: list(Verdict))
    answers = ["a+1", "a+2", "a+3", "a+4", "a+5", "a+5"]
    assert len(Verdict) == 5
    assert reward(rows([rf"\boxed{{{answer}}}" for answer in answers], ["x+y"] * 6)) == [1.0, 0.0, 0.0, 0.0, None, None]
    assert reward.statistics() == pytest.approx(
        {"verifier_failure_share": 4 / 6, "verifier_timeout_share": 1 / 6, "verifier_undecided_share": 2 / 6}
    )


@pytest.mark.parametrize("verdict", [Verdict.FAILED, Verdict.TIMEOUT, Verdict.UNDECIDED])
def test_every_kind_of_failure_counts_against_the_limit(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> None:
    reward = AccuracyReward()
    monkeypatch.setattr(reward.verifier, "verify", lambda pairs: [verdict] * len(pairs))
    with pytest.raises(RuntimeError, match="20 of 20 answers"):
        reward(rows([rf"\boxed{{a+{n}}}" for n in range(20)], ["x+y"] * 20))


@pytest.mark.parametrize(
    "text", ["\x00", "\ud800", "x\x00+\ud800", r"\sqrt{" * 39 + "2" + "}" * 39, r"\sqrt" * 90 + "2"]
)
def test_odd_characters_and_depths_get_a_verdict(reward: AccuracyReward, text: str) -> None:
    assert reward(rows([rf"\boxed{{{text}}}", r"\boxed{2\sqrt{2}}"], [r"\sqrt{8}"] * 2)) == [0.0, 1.0]


def test_words_are_no_business_of_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = AccuracyReward()
    monkeypatch.setattr(reward.verifier, "verify", lambda pairs: pytest.fail(f"sent {pairs}"))
    completions = [rf"\boxed{{{answer}}}" for answer in ("eighteen", "infinity", "the blue one")]
    assert reward(rows(completions, ["18", "18", "blue"])) == [0.0] * 3


def test_too_many_failures_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def distinct(first: int, count: int) -> RewardInputs:
        return rows([rf"\boxed{{a+{n}}}" for n in range(first, first + count)], ["x+y"] * count)

    reward = AccuracyReward(max_failure_rate=0.5)
    monkeypatch.setattr(reward.verifier, "verify", lambda pairs: [Verdict.FAILED] * len(pairs))
    reward(distinct(0, 10))
    monkeypatch.setattr(reward.verifier, "verify", lambda pairs: [Verdict.DIFFERENT] * len(pairs))
    reward(distinct(10, 10))  # 10 of 20 is not above a half
    monkeypatch.setattr(reward.verifier, "verify", lambda pairs: [Verdict.FAILED] * len(pairs))
    with pytest.raises(RuntimeError, match=r"11 of 21 answers.*max_failure_rate"):
        reward(distinct(20, 1))
    few = AccuracyReward()
    monkeypatch.setattr(few.verifier, "verify", lambda pairs: [Verdict.FAILED] * len(pairs))
    assert few(distinct(0, 19)) == [0.0] * 19  # too few to judge


def test_a_hanging_row_costs_its_deadline_and_its_neighbours_nothing() -> None:
    # (10^9)! is not caught by the caps: 1000000000 is written as a power.
    reward = AccuracyReward(deadline=1.0)
    inputs = rows([r"\boxed{(10^9)!}", r"\boxed{2\sqrt{2}}"], [r"\sqrt{8}"] * 2)
    try:
        assert reward(inputs) == [0.0, 1.0]
        assert reward.statistics() == {"verifier_failure_share": 0.5, "verifier_timeout_share": 0.5}
    finally:
        reward.close()


def test_votes() -> None:
    reward = AccuracyReward()
    assert {reward.vote(text) for text in ("0.5", r"\boxed{1/2}", r"The answer is $\frac12$.", "#### .50")} == {"1/2"}
    assert {reward.vote(text) for text in ("The answer is (C) 15", r"\boxed{C}", "so (C)", "15 apples, so\nC.")} == {
        "C"
    }
    assert reward.vote("The answer is 15") == "15"
    assert reward.vote(r"\boxed{(1, 2)}") == "(1,2)"
    assert reward.vote("nothing") is None
    assert AccuracyReward(answer_format="hash").vote("The answer is 18") is None
    assert AccuracyReward(answer_format="letter").vote("(B)") == "B"


def test_copies_judge_too(reward: AccuracyReward) -> None:
    inputs = rows([r"\boxed{2\sqrt{2}}"], [r"\sqrt{8}"])
    assert reward(inputs) == [1.0]
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):  # noqa: S301
        assert twin(inputs) == [1.0]
        assert twin.verifier._pool[0].process.pid != reward.verifier._pool[0].process.pid
        twin.close()


def test_bad_settings_are_errors() -> None:
    with pytest.raises(ValueError, match="`answer_format` must be one of auto, boxed"):
        AccuracyReward(answer_format="latex")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`max_failure_rate`.*got 0"):
        AccuracyReward(max_failure_rate=0)
    with pytest.raises(ValueError, match=r"`deadline`.*got 0"):
        AccuracyReward(deadline=0)
    with pytest.raises(ValueError, match=r"`workers`.*got 0"):
        AccuracyReward(workers=0)


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
def test_gsm8k_solutions_are_right_and_each_others_wrong(shared_data: Path, name: str) -> None:
    lines = (shared_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    finals = [solution.rpartition("####")[2].strip() for solution in solutions]
    reward = AccuracyReward()
    for golds in (solutions, finals):
        verdicts = reward(rows(solutions, golds))
        assert sum(verdict or 0.0 for verdict in verdicts) >= 0.999 * len(solutions)
    others = solutions[1:] + solutions[:1]
    numbers = [float(final.replace(",", "")) for final in finals]
    equal = [float(a == b) for a, b in zip(numbers, numbers[1:] + numbers[:1], strict=True)]
    assert reward(rows(solutions, others)) == equal
    assert reward.statistics() == {}


@pytest.mark.parametrize("name", ["mawps_singleop", "mawps_multiarith"])
def test_mawps_targets(shared_data: Path, name: str) -> None:
    lines = (shared_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    targets = [json.loads(line)["target"] for line in lines]
    completions = [f"so there are {target:g} left." for target in targets]
    reward = AccuracyReward()
    assert reward(rows(completions, [str(target) for target in targets])) == [1.0] * len(targets)
    assert reward(rows(completions, [str(target + 1) for target in targets])) == [0.0] * len(targets)
