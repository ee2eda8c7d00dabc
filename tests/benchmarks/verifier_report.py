"""How often the accuracy reward is right about two answers, on fixed tables written by hand.

    python tests/benchmarks/verifier_report.py [--gsm8k FILE ...] [--json FILE]

The tables in ``tests/rewards/verifier`` hold a gold answer, an answer, and whether they are equivalent. Both were
written before the verifier had seen them. Some of its faults on ``verifier_pairs.tsv`` were mended afterwards;
``verifier_pairs_held_out.tsv`` was written after that, and nothing was mended for it. Whether answers are equivalent is
a matter of mathematics, with these conventions:

- A unit may be missing in an answer; units are converted; words that only name what is counted do not matter.
- A percentage is its value (25% = 0.25). Dropping the sign (25% and 25) is debatable, and not in the tables.
- The point is the decimal mark; commas and blanks group three digits. A rounded decimal is not the exact number;
  roundings to six or more places, which the reward accepts, are not in the tables.
- A list without brackets has no order, a tuple has; ``(a, b)`` may be an interval. A ratio equals its quotient.
- "x = 5" equals "5", but not "y = 5"; a calculation equals its result where it is right.
- Words are compared regardless of case. A gold answer from A to J is an option, of which only the letter counts.

Precision is the share of accepted pairs that are equivalent, recall the share of equivalent pairs that are accepted.
Beside the reward are two plain judges: equality of the strings without case, blanks, dollar signs and final full
stop, and math-verify with its own defaults on ``\\boxed{...}``, which is also what the reward gets to see. With
``--gsm8k``, the gold solutions of these files are judged against their own answers.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_lambdapo.data.sources import DataSource, load_rows
from lightning_lambdapo.rewards import AccuracyReward, RewardInputs
from lightning_lambdapo.rewards.verifier.pool import MathVerifier, Verdict

_TABLES = Path(__file__).parents[1] / "rewards" / "verifier"
TABLES = [_TABLES / f"verifier_pairs{name}.tsv" for name in ("", "_held_out")]


@dataclass(frozen=True)
class Pair:
    """One row of a table."""

    category: str
    gold: str
    answer: str
    equivalent: bool


@dataclass(frozen=True)
class Tally:
    """What became of some pairs."""

    pairs: int
    equivalent: int
    accepted: int
    both: int

    @property
    def precision(self) -> float | None:
        """Share of the accepted pairs that are equivalent; None where none is."""
        return self.both / self.accepted if self.accepted else None

    @property
    def recall(self) -> float | None:
        """Share of the equivalent pairs that are accepted; None where none is."""
        return self.both / self.equivalent if self.equivalent else None


class CountingVerifier(MathVerifier):
    """Counts the pairs that the reward sends to math-verify."""

    sent = 0

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """As the base class."""
        self.sent += len(pairs)
        return super().verify(pairs)


def read_pairs(path: Path) -> list[Pair]:
    """Read a table."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    if header != "category\tequivalent\tgold\tanswer":
        raise ValueError(f"{path} has the columns {header!r}.")
    rows = [line.split("\t") for line in lines]
    return [Pair(category, gold, answer, {"yes": True, "no": False}[truth]) for category, truth, gold, answer in rows]


def judge(completions: Sequence[str], golds: Sequence[str]) -> tuple[list[bool], int]:
    """The reward's verdicts, and how many distinct pairs went to math-verify."""
    count = len(completions)
    inputs = RewardInputs(
        prompts=["?"] * count,
        completions=list(completions),
        answers=list(golds),
        references=[None] * count,
        completion_lengths=[1] * count,
        truncated=[False] * count,
        columns=[{}] * count,
    )
    reward = AccuracyReward()
    reward.verifier = verifier = CountingVerifier(deadline=60.0)
    try:
        verdicts = reward(inputs)
    finally:
        reward.close()
    if None in verdicts:
        raise RuntimeError("Some pairs were not judged in time; is the machine busy?")
    return [verdict == 1.0 for verdict in verdicts], verifier.sent


def judge_pairs(pairs: Sequence[Pair]) -> tuple[list[bool], int]:
    r"""The reward's verdicts on answers in ``\boxed{...}``, and how many distinct pairs went to math-verify."""
    return judge([rf"so \boxed{{{pair.answer}}}" for pair in pairs], [pair.gold for pair in pairs])


def string_match(pairs: Sequence[Pair]) -> list[bool]:
    """Whether the strings are equal but for case, blanks, dollar signs and a final full stop."""

    def plain(text: str) -> str:
        return "".join(text.replace("$", "").split()).removesuffix(".").casefold()

    return [plain(pair.gold) == plain(pair.answer) for pair in pairs]


def math_verify_alone(pairs: Sequence[Pair]) -> list[bool]:
    """math-verify's verdicts with its own defaults. It evaluates text: only for tables that one trusts."""
    from math_verify import parse, verify

    def read(text: str) -> Any:
        return parse(rf"\boxed{{{text}}}")

    logging.disable(logging.CRITICAL)
    try:
        return [bool(verify(read(pair.gold), read(pair.answer))) for pair in pairs]
    finally:
        logging.disable(logging.NOTSET)


def tally(pairs: Sequence[Pair], verdicts: Sequence[bool]) -> Tally:
    """Count."""
    both = sum(pair.equivalent and verdict for pair, verdict in zip(pairs, verdicts, strict=True))
    return Tally(len(pairs), sum(pair.equivalent for pair in pairs), sum(verdicts), both)


def by_category(pairs: Sequence[Pair], verdicts: Sequence[bool]) -> dict[str, Tally]:
    """One tally for each category, in their order, then one for all."""
    found = {}
    for category in dict.fromkeys(pair.category for pair in pairs):
        rows = [row for row, pair in enumerate(pairs) if pair.category == category]
        found[category] = tally([pairs[row] for row in rows], [verdicts[row] for row in rows])
    return found | {"all": tally(pairs, verdicts)}


def markdown(pairs: Sequence[Pair], judges: dict[str, list[bool]]) -> list[str]:
    """Precision and recall by category, a column pair for each judge."""
    found = {name: by_category(pairs, verdicts) for name, verdicts in judges.items()}
    columns = ["category", "pairs", *(f"{name}: {share}" for name in judges for share in ("precision", "recall"))]
    lines = [" | ".join(columns), " | ".join(["---", *["---:"] * (len(columns) - 1)])]
    for category, count in next(iter(found.values())).items():
        shares = [share for of in found.values() for share in (of[category].precision, of[category].recall)]
        lines.append(" | ".join([category, str(count.pairs), *("-" if x is None else f"{x:.1%}" for x in shares)]))
    return [f"| {line} |" for line in lines]


def disagreements(pairs: Sequence[Pair], verdicts: Sequence[bool]) -> list[str]:
    """The pairs that a judge is wrong about."""
    return [
        f"- {pair.category}: `{pair.gold}` and `{pair.answer}` are {'accepted' if verdict else 'refused'}"
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict != pair.equivalent
    ]


def gsm8k(paths: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """The gold solutions of GSM8K, through the preset, against their own answers."""
    rows = [row for path in paths for row in load_rows(DataSource(preset="gsm8k", path=path, limit=limit))]
    verdicts, sent = judge([row["reference"] for row in rows], [row["answer"] for row in rows])
    wrong = [row["reference"] for row, verdict in zip(rows, verdicts, strict=True) if not verdict]
    return {"rows": len(rows), "right": sum(verdicts), "sent": sent, "wrong": wrong}


def report(path: Path) -> dict[str, Any]:
    """Judge a table, and print what came out."""
    pairs = read_pairs(path)
    ours, sent = judge_pairs(pairs)
    judges = {"ours": ours, "string match": string_match(pairs), "math-verify": math_verify_alone(pairs)}
    wrong = disagreements(pairs, ours)
    print(f"\n{path.name}\n")
    print("\n".join(markdown(pairs, judges)))
    print(f"\n{sent} of {len(pairs)} verdicts of ours needed math-verify; {len(wrong)} are wrong:\n")
    print("\n".join(wrong))
    tallies = {name: asdict(tally(pairs, verdicts)) for name, verdicts in judges.items()}
    return tallies | {"sent": sent, "wrong": wrong}


def main(arguments: list[str] | None = None) -> None:
    """Judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", nargs="+", default=[], help="JSONL files of GSM8K")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    result = {path.stem: report(path) for path in TABLES}
    if options.gsm8k:
        result["gsm8k"] = found = gsm8k(options.gsm8k)
        share = found["right"] / found["rows"]
        print(f"\nGSM8K: {found['right']} of {found['rows']} gold solutions score 1.0 ({share:.2%});", end=" ")
        print(f"{found['sent']} verdicts needed math-verify.")
        print("\n\n".join(found["wrong"]))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
