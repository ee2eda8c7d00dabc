"""Problems for tiny policies, with rewards of three shapes: right or wrong, dense, and a few levels."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_lambdapo.data.sources import arithmetic_prompt, arithmetic_solution

Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """A kind of problem, and demonstrations of it that are often wrong, so that the first policy is sometimes right.

    Attributes:
        problem: draws a prompt, its answer and a worked reference solution.
        demonstration: draws a prompt and a solution with slips. ``None`` for tasks of models that exist already.
    """

    problem: Callable[[random.Random], Row]
    demonstration: Callable[[random.Random], tuple[str, str]] | None


def accuracy(completions: Sequence[str], answers: Sequence[str | None], **columns: Any) -> list[float | None]:
    r"""1 where the completion is the answer, but for white space around it. For answers that are no mathematics.

    Example:
        >>> accuracy(["1,2,2\n", "2,1,2", "2"], ["1,2,2", "1,2,2", None])
        [1.0, 0.0, None]
    """
    return [
        None if answer is None else float(completion.strip() == answer)
        for completion, answer in zip(completions, answers, strict=True)
    ]


def steps_right(completions: Sequence[str], references: Sequence[str | None], **columns: Any) -> list[float | None]:
    """Reward of a few levels: the share of the reference's steps that the completion has in the same places.

    Steps are separated by commas and end at a semicolon. A completion with more steps is judged by its first ones.

    Example:
        >>> steps_right(["1+2=3,3+3=7;7", "1+2=3"], ["1+2=3,3+3=6;6", None])
        [0.5, None]
    """
    return [
        None if reference is None else _share(completion.partition(";")[0], reference.partition(";")[0])
        for completion, reference in zip(completions, references, strict=True)
    ]


def _share(steps: str, wanted: str) -> float:
    places = wanted.split(",")
    return sum(step == right for step, right in zip(steps.split(","), places, strict=False)) / len(places)


def _sums(
    *error_rates: float,
    terms: range = range(1, 20),
    shown: range = range(1, 20),
    slips: Sequence[int] = (-3, -2, -1, 1, 2, 3),
    all_steps: bool = False,
) -> Task:
    """Sums of ``terms`` with written-out steps, one for each error rate. Demonstrations are of the terms ``shown``.

    The answer is the sum, or ``all_steps``.
    """
    count = len(error_rates) + 1

    def problem(generator: random.Random) -> Row:
        drawn = [generator.randint(terms[0], terms[-1]) for _ in range(count)]
        solution = arithmetic_solution(*drawn)
        return {
            "prompt": arithmetic_prompt(*drawn),
            "answer": solution if all_steps else str(sum(drawn)),
            "reference": solution,
        }

    def demonstration(generator: random.Random) -> tuple[str, str]:
        drawn = [generator.randint(shown[0], shown[-1]) for _ in range(count)]
        rates = iter(error_rates)

        def slip() -> int:
            return generator.choice(slips) if generator.random() < next(rates) else 0

        return arithmetic_prompt(*drawn), arithmetic_solution(*drawn, slip=slip)

    return Task(problem, demonstration)


def _last_digits(count: int, error_rate: float) -> Task:
    """Sums of digits of which each step keeps the last digit: ``7+5=2+9=1``. The answer is all steps."""

    def digits(generator: random.Random) -> list[int]:
        return [generator.randint(0, 9) for _ in range(count)]

    def solution(drawn: Sequence[int], slip: Callable[[], int] = lambda: 0) -> str:
        text, running = str(drawn[0]), drawn[0]
        for digit in drawn[1:]:
            running = (running + digit + slip()) % 10
            text += f"+{digit}={running}"
        return text

    def problem(generator: random.Random) -> Row:
        drawn = digits(generator)
        right = solution(drawn)
        return {"prompt": arithmetic_prompt(*drawn), "answer": right, "reference": right}

    def demonstration(generator: random.Random) -> tuple[str, str]:
        drawn = digits(generator)
        slipped = solution(drawn, lambda: generator.randint(1, 9) if generator.random() < error_rate else 0)
        return arithmetic_prompt(*drawn), slipped

    return Task(problem, demonstration)


def _sorting(count: int, error_rate: float) -> Task:
    def digits(generator: random.Random) -> list[str]:
        return [str(generator.randint(0, 9)) for _ in range(count)]

    def problem(generator: random.Random) -> Row:
        drawn = digits(generator)
        solution = ",".join(sorted(drawn))
        return {"prompt": ",".join(drawn) + "=", "answer": solution, "reference": solution}

    def demonstration(generator: random.Random) -> tuple[str, str]:
        drawn = digits(generator)
        slipped = [
            str(generator.randint(0, 9)) if generator.random() < error_rate else digit for digit in sorted(drawn)
        ]
        return ",".join(drawn) + "=", ",".join(slipped)

    return Task(problem, demonstration)


#: ``sums``: three terms, the task of the quickstart, right or wrong. ``sorting``: eight digits, for a dense reward such
#: as :class:`~lightning_lambdapo.rewards.SemanticDensityReward`. ``chain``: four terms, for :func:`steps_right`.
#: Three whose policies are hardly ever right, with :func:`accuracy`: ``rough_sums``: four digits, right if all three
#: steps are. ``last_digits``: six steps, likewise. ``long_sorting``: ten digits.
#: ``large_sums``: larger terms than those of the demonstrations, which the policy often copies wrongly.
#: ``misled``: sums of which nine in ten demonstrations are wrong in the same way, so that the policy is sure and wrong.
#: ``short_sorting``: four digits. Problems alone, for a small language model.
TASKS = {
    "sums": _sums(0.35, 0.35),
    "sorting": _sorting(8, 0.35),
    "chain": _sums(0.3, 0.3, 0.3),
    "large_sums": _sums(0.35, 0.35, terms=range(10, 31), all_steps=True),
    "rough_sums": _sums(0.8, 0.8, 0.8, terms=range(1, 10), shown=range(1, 10), all_steps=True),
    "long_sorting": _sorting(10, 0.55),
    "last_digits": _last_digits(7, 0.45),
    "misled": _sums(0.0, 0.9, slips=(10,)),
    "short_sorting": replace(_sorting(4, 0.0), demonstration=None),
}


def task_rows(name: str, count: int, *, seed: int = 0) -> list[Row]:
    """Different problems of a task, in a random order.

    Raises:
        ValueError: unknown task, or more problems than it has.
    """
    if name not in TASKS:
        raise ValueError(f"There are the tasks {', '.join(TASKS)}; got {name!r}.")
    generator = random.Random(seed)  # noqa: S311
    rows: dict[str, Row] = {}
    for _ in range(100 * count):
        row = TASKS[name].problem(generator)
        rows.setdefault(row["prompt"], row)
        if len(rows) == count:
            return list(rows.values())
    raise ValueError(f"The task {name} has fewer than {count} different problems.")
