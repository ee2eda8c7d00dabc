"""The published table of answer pairs: its form, every verdict on it, and the numbers that are made of them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import verifier_report
from verifier_report import Pair, Tally

from lightning_lambdapo.rewards.verifier.pool import MathVerifier

CATEGORIES = {
    "fractions", "decimals", "percent", "units", "intervals", "sets", "tuples", "thousands", "spacing", "text",
    "plus-minus", "radicals", "exponents", "scientific", "pi", "algebra", "equations", "matrices", "letters", "signs",
    "marks", "complex", "ratios and bases",
}  # fmt: skip

# Every verdict that is wrong, by table. A verdict that changes, for better or worse, changes this list and the README.
REFUSED_THOUGH_EQUIVALENT = [
    {
        ("1 m", "100 cm"),  # units are compared, not converted
        ("2 hours", "120 minutes"),
        ("1:2", "1 to 2"),  # a range is written like this too
    },
    {
        (r"\dfrac{ a }{ b }", r"\frac ab"),  # LaTeX arguments without braces, other than digits
        ("FF_{16}", "255"),  # only numerals that start with a digit have a base: a_{16} is a variable
    },
]
ACCEPTED_THOUGH_DIFFERENT = [
    {
        (r"\$5", "5 cents"),  # currency signs are dropped, as signs of mathematics
        ("on", "no"),  # words of two letters may be products of variables
    },
    {
        ("14 square meters", "14 cubic meters"),  # words before a unit are taken for what is counted
    },
]


def test_the_table_is_well_formed() -> None:
    tables = [verifier_report.read_pairs(path) for path in verifier_report.TABLES]
    assert [len(table) for table in tables] == [399, 144]
    for table in tables:
        assert {pair.category for pair in table} == CATEGORIES
        assert all(len({p.equivalent for p in table if p.category == category}) == 2 for category in CATEGORIES)
        assert 0.45 < sum(pair.equivalent for pair in table) / len(table) < 0.55
    for category, count in Counter(pair.category for pair in tables[0]).items():
        assert count >= 10, category
    pairs = [(pair.gold, pair.answer) for table in tables for pair in table]
    assert len(set(pairs)) == len(pairs)
    assert all(gold != answer and gold == gold.strip() and answer == answer.strip() for gold, answer in pairs)


@pytest.mark.parametrize("index", [0, 1])
def test_every_verdict_is_the_published_one(index: int) -> None:
    pairs = verifier_report.read_pairs(verifier_report.TABLES[index])
    verdicts, sent = verifier_report.judge_pairs(pairs)
    wrong = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict != pair.equivalent]
    assert {(pair.gold, pair.answer) for pair, verdict in wrong if not verdict} == REFUSED_THOUGH_EQUIVALENT[index]
    assert {(pair.gold, pair.answer) for pair, verdict in wrong if verdict} == ACCEPTED_THOUGH_DIFFERENT[index]
    found = verifier_report.tally(pairs, verdicts)
    assert (found.precision, found.recall) == [(203 / 205, 203 / 206), (73 / 74, 73 / 75)][index]
    assert sent < 0.6 * len(pairs)


def test_precision_and_recall_are_what_their_names_say() -> None:
    pairs = [Pair("a", "1", "1.0", True), Pair("a", "1", "2", False), Pair("b", "2", "2.0", True)]
    assert verifier_report.tally(pairs, [True, True, False]) == Tally(pairs=3, equivalent=2, accepted=2, both=1)
    found = verifier_report.by_category(pairs, [True, True, False])
    assert list(found) == ["a", "b", "all"]
    assert (found["a"].precision, found["a"].recall) == (0.5, 1.0)
    assert (found["b"].precision, found["b"].recall) == (None, 0.0)
    assert verifier_report.markdown(pairs, {"ours": [True, True, False]}) == [
        "| category | pairs | ours: precision | ours: recall |",
        "| --- | ---: | ---: | ---: |",
        "| a | 2 | 50.0% | 100.0% |",
        "| b | 1 | - | 0.0% |",
        "| all | 3 | 50.0% | 50.0% |",
    ]
    assert verifier_report.disagreements(pairs, [True, True, False]) == [
        "- a: `1` and `2` are accepted",
        "- b: `2` and `2.0` are refused",
    ]


def test_the_plain_judges() -> None:
    pairs = [Pair("a", "The cat", "$the cat$.", True), Pair("a", "1/2", "0.5", True), Pair("a", "1", "2", False)]
    assert verifier_report.string_match(pairs) == [True, False, False]
    assert verifier_report.math_verify_alone(pairs[1:]) == [True, False]


def test_the_report_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, problems, written = (tmp_path / name for name in ("pairs.tsv", "problems.jsonl", "report.json"))
    table.write_text("category\tequivalent\tgold\tanswer\nx\tyes\t1/2\t0.5\nx\tno\t$5$\t5.0\nx\tyes\tx+1\t1+x\n")
    problems.write_text(json.dumps({"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}) + "\n")
    monkeypatch.setattr(verifier_report, "TABLES", [table])
    monkeypatch.setattr(verifier_report, "math_verify_alone", lambda pairs: [True] * len(pairs))
    verifier_report.main(["--gsm8k", str(problems), "--json", str(written)])
    printed = capsys.readouterr().out
    assert "| x | 3 | 66.7% | 100.0% |" in printed
    assert "1 of 3 verdicts of ours needed math-verify; 1 are wrong:\n\n- x: `$5$` and `5.0` are accepted" in printed
    assert "1 of 1 gold solutions score 1.0 (100.00%); 0 verdicts needed math-verify" in printed
    assert json.loads(written.read_text())["pairs"]["ours"] == {"pairs": 3, "equivalent": 2, "accepted": 3, "both": 2}


def test_gold_solutions_of_gsm8k_are_right(shared_data: Path) -> None:
    found = verifier_report.gsm8k([str(shared_data / f"gsm8k_{split}.jsonl") for split in ("train", "test")])
    assert found["rows"] == 8792
    assert found["right"] >= 0.999 * found["rows"], found["wrong"]
    assert found["sent"] == 0


def test_a_symbol_i_is_the_imaginary_unit_where_that_makes_answers_equal() -> None:
    with MathVerifier(deadline=60.0) as verifier:
        verdicts = verifier.verify(
            [("i^2", "-1"), ("z=3i", "3i"), ("z=3i, z=4i", "z=5i, z=6i"), ("i>3", "i>4"), ("(i,2)", "(i,3)"),
             (r"\sum_{i=1}^3 i", "6"), (r"\frac{1\pm i}{2}", r"\frac{1-i}{2}, \frac{1+i}{2}"), (r"\pm 1 \pm 2", "3")]
        )  # fmt: skip
    assert [str(verdict) for verdict in verdicts] == [
        "equal", "equal", "different", "different", "different", "equal", "equal", "different",
    ]  # fmt: skip
