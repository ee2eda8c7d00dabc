"""What the fuzz tests share: how many examples, and texts that are made of the readers' own syntax.

``LAMBDAPO_FUZZ_EXAMPLES=2000`` looks at that many random examples per test in place of the same few every time.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import settings
from hypothesis import strategies as st

_EXAMPLES = os.environ.get("LAMBDAPO_FUZZ_EXAMPLES")
_SECONDS = 8.0  # 100 kB take at most one; a quadratic search takes minutes

_PIECES = (
    *"{}()[]\\^_$%&#*=+-/.,:;!<>'\" \n\t~`|ABCJabcjxyk0123456789",
    *("\\boxed{", "\\fbox {", "\\frac", "\\dfrac", "\\text{", "\\textbf{", "\\left(", "\\right)", "\\{", "\\}", "\\%"),
    *("\\$", "\\,", "\\pi", "\\circ", "{,}", "####", "#####", "#### ", "<answer>", "</answer>", "<think>", "</think>"),
    *("</", "the answer is ", "**Answer:** ", "answer to that = ", "option ", " because ", "(C)", "(c) ", "B.", "x="),
    *("1,234", "1 000", "2 1/2", "-3/4", "0.50", "1.5e3", "1e99", "1e-99", "50%", " percent", " million", " dozen"),
    *("cm", " eggs", " dollars", "per day", "^2", "²", "9" * 70, "10^", "**", "no solution", "Blue"),
    # other scripts' digits, letters whose case is odd, combining and invisible characters, halves of pairs
    *("\u0663", "\uff15", "\u00bd", "\u0130", "\u0131", "\u212a", "\u017f", "\u00df", "\ufb01", "\u0301", "\u200f"),
    *("\u202e", "\u200b", "\u00a0", "\u2028", "\u2212", "\u2044", "\u00b0", "\x00", "\x1c", "\x85", "\ufeff"),
    *("\ud800", "\udfff", "\U0001f600", "\U0001d7d8"),
)


def fuzz(examples: int) -> settings:
    """The same ``examples`` on every run, of whatever length of time."""
    return settings(
        max_examples=int(_EXAMPLES or examples), derandomize=_EXAMPLES is None, deadline=None, database=None
    )


def texts(max_size: int = 24) -> st.SearchStrategy[str]:
    """Texts of up to ``max_size`` pieces of syntax and arbitrary characters, lone surrogates included."""
    anything = st.characters(exclude_categories=())
    piece = st.one_of(st.sampled_from(_PIECES), st.sampled_from(_PIECES), anything)
    return st.lists(piece, max_size=max_size).map("".join)


def hostile_texts() -> list[str]:
    """Texts of about 100 kB that ask for backtracking."""
    repeated = [
        *("(", "{", "}", "[", "$", "*", "^", "\\", "#", "<", " ", "\n", "1", "a", "A", "-", ",", ".", "/", "\u0301"),
        *(
            "\\boxed{",
            "\\fbox {",
            "{\\boxed{",
            "\\boxed{a} ",
            "\\text{",
            "\\text ",
            "\\frac{1",
            "\\frac1",
            "\\frac{1}{2",
        ),
        *("1,", "1,111", ",111", "1 ", "1 1/", "1 000 ", "1.", "1/", "-1", "1e", "9^{", "(9!)"),
        *("#### ", "####\n", "#### 1\n", "####\t</", "<answer>", "</answer>", "<answer></answer>", "<think>"),
        *(
            "the answer is ",
            "answer to ",
            "answer to a",
            "answer: ",
            "answer **",
            "answer is (C) ",
            "the answer is 1, ",
        ),
        *("(C) ", "(C", "option ", "A. ", "x=", "ab ", "ab-", "ab'", "5 eggs ", " per day", "\u00a0", "\\left "),
    ]
    # 20,000 of each, in at most 100 kB
    texts = [(piece * min(20_000, 100_000 // len(piece))) for piece in repeated]
    closed = ["\\boxed{" * 12_000 + "1" + "}" * 12_000, "\\fbox{" * 12_000 + "1" + "}" * 12_000]
    inner = "#### " + closed[0]
    return [
        *texts,
        *closed,
        inner,
        "1" + ",111" * 25_000 + "1",
        "1" * 50_000 + " " + "1" * 50_000,
        "\\boxed" + " " * 100_000,
    ]


@contextmanager
def quick(what: str) -> Iterator[None]:
    """Fail where the block takes too much of the processor's time."""
    start = time.process_time()
    yield
    taken = time.process_time() - start
    assert taken < _SECONDS, f"{what} took {taken:.1f} s"
