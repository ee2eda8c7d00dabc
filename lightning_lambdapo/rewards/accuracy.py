"""The accuracy reward: is the final answer right?"""

from collections.abc import Sequence
from typing import get_args

from lightning_lambdapo.rewards.answers import (
    AnswerFormat,
    canonical,
    extract_answer,
    is_bomb,
    is_letter,
    normalise,
    parse_number,
    same_number,
)
from lightning_lambdapo.rewards.base import Reward, RewardInputs
from lightning_lambdapo.rewards.verifier import MathVerifier

_ENOUGH = 20


class AccuracyReward(Reward):
    r"""1 where the completion's final answer is the gold answer, 0 where it is not, None without a gold answer.

    Answers are compared as strings, then exactly as numbers and fractions, and only then symbolically by math-verify, in
    a worker process that is killed at the deadline; what fails there, or is an obvious bomb, scores 0 and is counted. A
    gold answer that is one letter A to J is multiple choice. Gold answers may be whole solutions that end in ``####``
    or ``\boxed{}``.

    Args:
        weight: coefficient in the total.
        name: key in logs.
        answer_format: where the final answer stands: ``"auto"``, ``"boxed"``, ``"hash"``, ``"tag"``, ``"letter"``; see
            :func:`~lightning_lambdapo.rewards.answers.extract_answer`.
        deadline: seconds that math-verify may take for one row.
        workers: verifying processes.
        max_failure_rate: once 20 rows were verified symbolically, a greater share of failures is an error.

    Raises:
        RuntimeError: too many symbolic verifications failed.
    """

    requires = ("answers",)

    def __init__(
        self,
        weight: float = 1.0,
        name: str = "accuracy",
        answer_format: AnswerFormat = "auto",
        deadline: float = 5.0,
        workers: int = 1,
        max_failure_rate: float = 0.5,
    ) -> None:
        super().__init__(weight, name)
        if answer_format not in get_args(AnswerFormat):
            raise ValueError(f"`answer_format` must be one of {', '.join(get_args(AnswerFormat))}; got {answer_format!r}.")
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"`max_failure_rate` must be in [0, 1], got {max_failure_rate}.")
        self.answer_format = answer_format
        self.max_failure_rate = max_failure_rate
        self.verifier = MathVerifier(workers=workers, deadline=deadline)
        self._failed_now = self._verified_now = 0
        self._failed = self._verified = 0

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        """Judge every row."""
        rewards: list[float | None] = [None] * len(inputs.completions)
        undecided: dict[tuple[str, str], list[int]] = {}
        for row, (completion, answer) in enumerate(zip(inputs.completions, inputs.answers, strict=True)):
            if answer is None:
                continue
            gold, found = _gold(answer), self._extract(completion, answer)
            verdict = False if found is None else _compare(gold, found)
            rewards[row] = float(verdict or False)
            if verdict is None and found is not None:
                undecided.setdefault((normalise(gold), normalise(found)), []).append(row)
        failed = 0
        sound = [pair for pair in undecided if not is_bomb(pair[1])]
        verdicts = dict(zip(sound, self.verifier.verify(sound), strict=True)) if sound else {}
        for pair, rows in undecided.items():
            verdict = verdicts.get(pair)
            failed += len(rows) if verdict is None else 0
            for row in rows:
                rewards[row] = float(verdict or False)
        self._count(failed, sum(map(len, undecided.values())))
        return rewards

    def vote(self, completion: str) -> str | None:
        """The final answer in a canonical spelling."""
        found = extract_answer(completion, self.answer_format)
        return None if found is None else canonical(found)

    def statistics(self) -> dict[str, float]:
        """``verifier_failure_share`` of the last call: of the rows judged symbolically, those that failed."""
        return {"verifier_failure_share": self._failed_now / self._verified_now} if self._verified_now else {}

    def close(self) -> None:
        """Stop the verifying processes."""
        self.verifier.close()

    def _extract(self, completion: str, answer: str) -> str | None:
        letter = self.answer_format == "auto" and is_letter(answer)
        return extract_answer(completion, "letter" if letter else self.answer_format)

    def _count(self, failed: int, verified: int) -> None:
        self._failed_now, self._verified_now = failed, verified
        self._failed += failed
        self._verified += verified
        if self._verified >= _ENOUGH and self._failed > self.max_failure_rate * self._verified:
            raise RuntimeError(
                f"{self._failed} of {self._verified} symbolic verifications failed or ran out of time, more than "
                f"max_failure_rate = {self.max_failure_rate}; the rewards would be noise. Raise `deadline`, add "
                "`workers`, or ask for plainer answers in the prompt."
            )


def _gold(answer: str) -> str:
    """The final answer of a gold entry that may be a whole solution."""
    if "####" in answer or "\\boxed{" in answer:
        return extract_answer(answer) or answer
    return answer.strip("()") if is_letter(answer.strip()) else answer


def _compare(gold: str, found: str) -> bool | None:
    """True or False where strings or exact numbers decide it; None where it takes algebra."""
    if canonical(gold) == canonical(found) or is_letter(gold):
        return canonical(gold) == canonical(found)
    numbers = parse_number(gold), parse_number(found)
    if numbers[0] is not None and numbers[1] is not None:
        return same_number(numbers[0], numbers[1])
    return None
