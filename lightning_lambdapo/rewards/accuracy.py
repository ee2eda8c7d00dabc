"""Whether the final answer is right."""

import re
from collections import Counter
from typing import get_args

from lightning_lambdapo.functional.ranges import check_whole
from lightning_lambdapo.rewards.base import Reward, RewardInputs
from lightning_lambdapo.rewards.verifier.exact import (
    canonical,
    clean,
    is_text,
    latex,
    notation,
    quantity,
    same_quantity,
    too_costly,
    unlike,
    without_approximation,
)
from lightning_lambdapo.rewards.verifier.extraction import (
    AnswerFormat,
    final_answer,
    final_letter,
    leading_letter,
    marked_answer,
    unmarked_answer,
    unmarked_letter,
)
from lightning_lambdapo.rewards.verifier.likeness import as_tuples, says_more
from lightning_lambdapo.rewards.verifier.pool import MathVerifier, Verdict

_MAX_CHARACTERS = 512
_MIN_VERIFICATIONS = 20
_FAILURES = (Verdict.FAILED, Verdict.TIMEOUT, Verdict.UNDECIDED)
_GOLD_LETTER = re.compile(r"\(?([A-J])\)?")
_WORD = re.compile(r"[^\W\d_]{4}|[A-Z][a-z]{2}")


class AccuracyReward(Reward):
    r"""1 where the completion's final answer equals the gold answer, else 0. None where the data has no answer.

    :func:`~lightning_lambdapo.rewards.verifier.extraction.final_answer` finds the final answer. It is compared as a
    cleaned string, then as an exact number (grouped digits, decimals, percentages, fractions, units, ratios). If
    neither decides, math-verify compares it in a worker process, and is killed at the deadline. Gold answers may be
    worked solutions that end in ``#### N``, ``\boxed{N}`` or ``<answer>N</answer>``.

    Answers that cannot be judged safely (over 512 characters, numbers over 64 digits, exponents over four digits, power
    towers, factorials of large numbers, brackets nested over 20 deep) count as wrong. So do those on which math-verify
    fails or uses up its deadline. If the time for the whole batch ends before a row is compared, the row is not
    applicable (see :class:`~lightning_lambdapo.rewards.verifier.pool.MathVerifier`). Only a verdict that depends on a
    timeout may differ between two runs on the same machine.

    Args:
        weight: coefficient in the total.
        name: key in logs. Accuracy, pass@k and maj@k are computed from the part called ``accuracy``.
        answer_format: how the final answer is marked: ``"boxed"``, ``"hash"`` (``#### x``), ``"tag"``
            (``<answer>x</answer>``), ``"letter"`` (multiple choice, A to J), or ``"auto"``: the last of those marks or
            of "the answer is x", else the last number or maths. A letter where the gold answer is one. What is in
            ``<think>...</think>``, or after a ``<think>`` that is not closed, is no answer.
        deadline: CPU seconds that math-verify gets for one answer.
        workers: math-verify processes.
        max_failure_rate: largest share of verifications that may fail, time out or stay undecided, checked from 20 on.

    Raises:
        ValueError: a setting out of range.
        RuntimeError: when called, if more verifications failed than ``max_failure_rate`` allows.

    Example:
        >>> reward = AccuracyReward()
        >>> inputs = RewardInputs(
        ...     prompts=["6 * 3 = ?"] * 3, completions=["The answer is 18.", "#### 17", "18.00"],
        ...     answers=["18", "18", None], references=[None] * 3, completion_lengths=[5, 3, 3], truncated=[False] * 3,
        ...     columns=[{}] * 3)
        >>> reward(inputs)
        [1.0, 0.0, None]
        >>> reward.vote("so it is 0.5"), reward.vote(r"\boxed{\frac{1}{2}}")
        ('1/2', '1/2')
    """

    requires = ("answers",)
    timeout = None  # the verifier has its own deadline for each row

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
            raise ValueError(
                f"`answer_format` must be one of {', '.join(get_args(AnswerFormat))}, got {answer_format!r}."
            )
        check_whole("workers", workers, 1)
        if not 0 < max_failure_rate <= 1:
            raise ValueError(f"`max_failure_rate` must be above 0 and at most 1, got {max_failure_rate}.")
        self.answer_format = answer_format
        self.max_failure_rate = max_failure_rate
        self.verifier = MathVerifier(workers=workers, deadline=deadline)
        self._verified = 0
        self._failed = 0
        self._statistics: dict[str, float] = {}

    def reads_token(self, token: str) -> bool:
        """It reads those that mark an answer."""
        return token in ("<answer>", "</answer>", "####", "\\boxed{")

    def __call__(self, inputs: RewardInputs) -> list[float | None]:
        """Judge every row."""
        verdicts: list[float | None] = []
        refused = 0
        hard: dict[tuple[str, str], list[int]] = {}  # distinct pairs for math-verify, and their rows
        for row, (completion, gold) in enumerate(zip(inputs.completions, inputs.answers, strict=True)):
            if gold is None or not str(gold).strip():
                verdicts.append(None)
                continue
            gold_answer, answer = self._answers(str(gold), completion)
            verdict = False if answer is None else _cheap_verdict(gold_answer, answer)
            if verdict is None and answer is not None:
                if _refused(gold_answer) or _refused(answer):
                    refused += 1
                else:
                    hard.setdefault((latex(gold_answer), latex(answer)), []).append(row)
            verdicts.append(float(verdict or False))
        self._statistics = {"refused_share": refused / len(verdicts)} if refused else {}
        self._verify(hard, verdicts)
        return verdicts

    def vote(self, completion: str) -> str | None:
        """The final answer in a canonical form: one spelling for all exact spellings of a number.

        A percentage votes as its number, and an option such as ``(C) 15`` as its letter.
        """
        if self.answer_format == "letter":
            return final_letter(completion)
        answer = marked_answer(completion, self.answer_format)
        if self.answer_format == "auto":
            letter = unmarked_letter(completion) if answer is None else leading_letter(answer, strict=True)
            answer = letter or answer or unmarked_answer(completion)
        return canonical(answer[:_MAX_CHARACTERS]) or None if answer else None

    def statistics(self) -> dict[str, float]:
        """Shares of the last call.

        ``verifier_failure_share`` is the share of failures among the rows that went to math-verify, if any did.
        Failures include timeouts and undecided rows, whose own shares are ``verifier_timeout_share`` and
        ``verifier_undecided_share``, if there were any. ``refused_share`` is the share of all rows whose answer was
        too long or too costly to judge, if there were any.
        """
        return dict(self._statistics)

    def close(self) -> None:
        """Stop the worker processes. The next call starts new ones."""
        self.verifier.close()

    def _answers(self, gold: str, completion: str) -> tuple[str, str | None]:
        """The bare gold answer, and the completion's final answer to compare with it."""
        if self.answer_format == "letter":
            letter = leading_letter(gold) or final_letter(gold)
            if letter is None:
                raise ValueError(f'answer_format="letter" needs gold answers from A to J, got {gold!r}.')
            return letter, final_letter(completion)
        gold = marked_answer(gold, phrases=False) or gold
        option = _GOLD_LETTER.fullmatch(clean(gold)) if self.answer_format == "auto" else None
        if option:
            return option[1], final_letter(completion)
        if self.answer_format == "auto" and completion.strip() == gold.strip():
            return gold, gold  # also a list, of which the last number alone would be taken
        answer = final_answer(completion, self.answer_format)
        if answer is None or max(len(gold), len(answer)) > _MAX_CHARACTERS:
            return gold, answer
        return as_tuples(gold, without_approximation(gold, answer))

    def _verify(self, hard: dict[tuple[str, str], list[int]], verdicts: list[float | None]) -> None:
        """Fill in the verdicts that only math-verify can give."""
        if not hard:
            return
        counts: Counter[Verdict] = Counter()
        for rows, verdict in zip(hard.values(), self.verifier.verify(list(hard)), strict=True):
            self._verified += 1
            self._failed += verdict in _FAILURES
            counts[verdict] += len(rows)
            for row in rows:
                verdicts[row] = None if verdict is Verdict.UNDECIDED else float(verdict is Verdict.EQUAL)
        self._statistics["verifier_failure_share"] = sum(counts[verdict] for verdict in _FAILURES) / counts.total()
        for verdict in (Verdict.TIMEOUT, Verdict.UNDECIDED):
            if counts[verdict]:
                self._statistics[f"verifier_{verdict}_share"] = counts[verdict] / counts.total()
        if self._verified >= _MIN_VERIFICATIONS and self._failed > self.max_failure_rate * self._verified:
            raise RuntimeError(
                f"math-verify failed, timed out or stayed undecided on {self._failed} of {self._verified} answers, "
                f"more than `max_failure_rate` = {self.max_failure_rate} allows. Look at the gold answers, or raise "
                f"`deadline` ({self.verifier.deadline} s) or `max_failure_rate`."
            )


def _cheap_verdict(gold: str, answer: str) -> bool | None:
    """Compare as strings, as exact numbers and by kind. None where none of these decides."""
    same = gold.strip() == answer.strip()
    if same or max(len(gold), len(answer)) > _MAX_CHARACTERS:
        return same or None
    changed = says_more(gold, answer)
    gold, answer = clean(gold), clean(answer)
    if gold == answer or changed or not answer:
        return bool(answer) and not changed
    wordy = is_text(gold), is_text(answer)
    words = gold.casefold(), answer.casefold()
    if all(wordy) and (words[0] == words[1] or _WORD.search(gold + " " + answer)):
        # math-verify would multiply the letters: "north" = "thorn"
        plural = gold.split()[-1].islower() and words[0].removesuffix("s") == words[1].removesuffix("s")
        return plural or words[0] == words[1]
    written = notation(gold), notation(answer)
    if written[0] and written[1]:
        return written[0] == written[1]
    numbers = quantity(gold), quantity(answer)
    if numbers[0] and numbers[1]:
        return same_quantity(numbers[0], numbers[1])
    return False if unlike(gold, answer) or (any(numbers) and any(wordy)) else None


def _refused(text: str) -> bool:
    return len(text) > _MAX_CHARACTERS or too_costly(latex(text))
