r"""Find the final answer in a text.

All searches take time linear in the text (bounded quantifiers, one pass over braces), because completions are
untrusted input.
"""

import re
from collections.abc import Iterator
from typing import Literal

from lightning_lambdapo.rewards.verifier.denials import without_denied
from lightning_lambdapo.rewards.verifier.letters import (
    chosen_letters,
    final_letter_of,
    first_letter,
    leading_letter,
    only_option,
    trailing_letter,
)
from lightning_lambdapo.rewards.verifier.likeness import same_number
from lightning_lambdapo.rewards.verifier.marks import boxed, hashed, iter_boxed, last_box, spoken, tagged
from lightning_lambdapo.rewards.verifier.mathematics import Span, has_value, spans, values
from lightning_lambdapo.rewards.verifier.phrases import phrases

__all__ = [
    "AnswerFormat",
    "boxed",
    "final_answer",
    "final_letter",
    "hashed",
    "iter_boxed",
    "last_number",
    "leading_letter",
    "marked_answer",
    "only_option",
    "tagged",
    "trailing_letter",
    "unmarked_answer",
    "unmarked_letter",
]

AnswerFormat = Literal["auto", "boxed", "hash", "tag", "letter"]

_MINUS = r"[-\u2010\u2011\u2013\u2212\uff0d]"
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.])(?!(?<=\d\s)\u2013){_MINUS}(?![\s$€£¥]|\\\$)"
    rf"|(?:\A|(?<=[=:(*])|(?<=[=:]\s)|(?<=\b(?:is|of|at)\s)){_MINUS}\\?[$€£¥]|(?<==){_MINUS}\s(?=\d)|(?<==\s){_MINUS}\s(?=\d))?"
    r"(?:\\[dt]?frac\s?\{-?\d+\}\s?\{\d+\}|\d+\s\d+/\d+|\d+(?::\d+){1,4}"
    r"|(?:\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?:\s?\\?%|\s?[\u00d7*]\s?10\^\{?-?\d{1,3}\}?)?"
)
_HEADING = re.compile(r"[*_]{0,2}(?:the )?(?:final |correct )?answer[*_:]{0,4}", re.IGNORECASE)
_TITLE = re.compile(  # of a part of the text: "Step 2: add", "3. Total cost", "Explanation"
    r"[*_]{0,2}(?:(?:step|part|case)\s\d|(?:verif|explan|solution|check|note|reason|approach|method|analysis|calculat|"
    r"conclu|summary|result|proof|given|interpret|understand|simplif|setup)[a-z]*[\s*_:]{0,4}(?:\Z|:)"
    r"|\d{1,2}[.)]\s{1,3}[*_]{0,2}[A-Za-z]{2})",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"(?<!\d\s)(?<!\d)\b(?:minus|negative)\s\Z", re.IGNORECASE)
_GROUP = re.compile(r"[(\[{]\s?-?\d[\d.]{0,20}(?:,(?:\s|(?!\d{3}(?!\d)))-?\d[\d.]{0,20}){1,9}\s?[)\]}]")
_LABEL = re.compile(
    r"\b(?:week|day|month|year|step|part|case|problem|question|stage|round|room|group|team|page|phase|item|row|level)\s\Z",
    re.IGNORECASE,
)
_BEFORE_PEER = re.compile(
    r"(?<![\w/.,:)\]}=+*-])(?<![-+*/=\u00d7]\s)(?<!of\s)(?<!the\s)(?<!than\s)(?<!both\s)(?<!equation\s)(?<!part\s)"
    r"(-?\d[\d.,/]{0,20}%?),?\s(?:and|or)\s(?:[a-z]\s?=\s?)?\Z"
)
_TERM_BEFORE = re.compile(  # x > 2, y = 2x + 7
    r"(?<![A-Za-z])[A-Za-z]\s?(?:[<>]=?|[\u2264\u2265\u2260])\s?\Z"
    r"|(?<![\w^])(?:[a-z]\s?=\s?)?-?\d{0,9}[xyznt](?:\^\d)?\s[-+]\s\Z"
)
_PERCENT = re.compile(r"\s?(?:\\?%|percent\b|pct\b)")
_CLOSING = re.compile(r"[\s.,;:!*_\"'\u201d)\]}<>/|`-]*")
_BETWEEN = re.compile(r"\s{0,3}(?:[,;]|,?\s?\b(?:and|or)\b)\s{0,3}")
_ALIKE = re.compile(r"\s*([A-Za-z](?:_(?:\w|\{[^{}]{0,9}\}))?)\s*=")
_UNIT = re.compile(r"\s*(?:\\(?:text|mathrm|textrm|mbox)\s?\{[^{}]{0,40}\}\s*(?:\^\{?\d\}?)?|\\?%)\s*")
_TOLD = re.compile(r"\b(?:is|are|be|equals?|becomes?|gives?|get|obtain)[\s:]{1,3}\Z")
_IN_MATHS = re.compile(r"\\(?:sqrt|binom|log|ln)|[\^\u221a\u03c0\u221e]|(?<![A-Za-z])(?:ln|log|sqrt|sin|cos|tan|exp)\(")
_BOLD = re.compile(r"(?<![\w*])\*\*(?![\s*])([^*\n]{1,120})\*\*(?![\w*])(?!\s{0,2}:)")
_GOES_ON = re.compile(  # to another value
    r"[.?!:]\s|[=\u2192|,;:]|\b(?:is|are|was|were|will|gives?|gets?|got|makes|earn(?:s|ing)|pays?|costs?|equals?|takes?|total|has|have|holds?|"
    r"we|he|she|it|they|so)\b"
)
_LONGEST_TOKEN = 80


def final_answer(text: str, answer_format: AnswerFormat = "auto") -> str | None:
    r"""The final answer that a text gives, as it is written there. None without one.

    ``"boxed"``, ``"hash"`` and ``"tag"`` take the last ``\boxed{...}``, ``#### ...`` or ``<answer>...</answer>``.
    ``"auto"`` takes whichever of these and of "the answer is ..." comes last, else the last number or maths, such as
    ``$\sqrt{2}$``. ``"letter"`` takes the letter of a multiple-choice option. Several boxes that are one answer become
    one, with commas. What is in ``<think>...</think>``, or after a ``<think>`` that is not closed, is no answer.

    Example:
        >>> final_answer(r"Half of it, so \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> final_answer("She sells 9 eggs for $2 each. The answer is $18. Done.")
        '$18'
        >>> final_answer(r"The side has length $\sqrt{7}$."), final_answer(r"The roots are \boxed{3} and \boxed{8}.")
        ('\\sqrt{7}', '3, 8')
    """
    if answer_format == "letter":
        return final_letter(text)
    answer = marked_answer(text, answer_format)
    return unmarked_answer(text) if answer is None and answer_format == "auto" else answer


def marked_answer(text: str, answer_format: AnswerFormat = "auto", *, phrases: bool = True) -> str | None:
    r"""The content of the last mark of a final answer. None without one.

    Args:
        text: a completion or a worked solution.
        answer_format: which marks count. All in ``"auto"`` and ``"letter"``.
        phrases: whether "the answer is ..." is a mark in ``"auto"``. Where it only announces the answer, as in "the
            answer is found as follows", the answer is the last number or maths of what follows.

    Example:
        >>> marked_answer("9 * 2 = 18\n#### 18"), marked_answer("The answer is 18.", phrases=False)
        ('18', None)
    """
    text = spoken(text)
    announced = -1
    best: tuple[int, int, str] | None = None
    for start, rank, content in _marked(text, answer_format, with_phrases=phrases):
        if not content:
            announced = max(announced, start)
        elif best is None or (start, rank, content) > best:
            best = start, rank, content
    if announced > (best[0] if best else -1):
        following = unmarked_answer(text[announced:])
        if following is not None:
            return following
    return _inner(best[2]) if best else None


def unmarked_answer(text: str) -> str | None:
    r"""The last number or maths of a text that has no marks. None without one.

    Maths counts whole: the answer of ``$(2,-3)$`` is no -3. What the text says is wrong, as in "not 75", is no answer.

    Example:
        >>> unmarked_answer("so $x^2 = 49$ gives $x = 7$."), unmarked_answer("It is 73, not 75.")
        ('x = 7', '73')
        >>> unmarked_answer("It isn't 73.")
    """
    text = without_denied(spoken(text))
    text = _bold_value(text) or text
    found = spans(text)
    number = attached = None
    index = 0
    for match in _NUMBER.finditer(text):
        while index < len(found) and found[index].end <= match.start():
            index += 1
        if index == len(found) or match.start() < found[index].start:
            before, after = text[max(match.start() - 1, 0) : match.start()], text[match.end() : match.end() + 1]
            if not _is_letter(before) and before not in ("^", "_"):
                number = match
            elif not _is_letter(after):
                attached = match
    last = _last_of_value(text, found)
    if last is None and number is None:
        last = _last_of_value(text, found, closing=True)
    if last is not None and (number is None or number.start() < found[last].start):
        return _with_peers(text, found, last)
    number = number or attached
    return _whole(text, number) if number else None


def last_number(text: str) -> str | None:
    """The last number of a text, a fraction or percentage included. None without one.

    Example:
        >>> last_number("from 10 to -1,250.5, or 3/4"), last_number("none")
        ('3/4', None)
    """
    number = None
    for match in _NUMBER.finditer(text):
        number = match
    return number.group() if number else None


def final_letter(text: str) -> str | None:
    r"""The option letter, A to J, that a text chooses. None without one.

    It is the letter of the last marked answer or sentence ("option C is correct") that has one, else the last ``(C)``,
    else a bare letter at the end, else the only option that a line starts with. Several letters, such as "B and C",
    choose none, nor does a letter that the text says is wrong.

    Example:
        >>> final_letter(r"(A) is too small, so \boxed{\text{(C)}}"), final_letter("It must be\nB."), final_letter("12")
        ('C', 'B', None)
        >>> final_letter("The answer isn't D."), final_letter("It could be (A) or (D).")
        (None, None)
    """
    text = spoken(text)
    told = ((start, 0, content) for start, content in phrases(text))
    return final_letter_of(_marked(text, "auto", with_phrases=False), told, without_denied(text))


def unmarked_letter(text: str) -> str | None:
    r"""The option letter that a text without marks chooses beyond doubt, for voting. None without one.

    Example:
        >>> unmarked_letter("Option C is correct."), unmarked_letter("15 apples, so\nC."), unmarked_letter("(A) or (D)")
        ('C', 'C', None)
    """
    text = without_denied(spoken(text))
    chosen = max(chosen_letters(text, strict=True), default=None)
    return chosen[1] if chosen else first_letter(text) or trailing_letter(text) or only_option(text)


def _marked(text: str, answer_format: AnswerFormat, *, with_phrases: bool = True) -> Iterator[tuple[int, int, str]]:
    """Position, rank and content of the marked answers. Of several at one position, the higher rank counts.

    An empty content is a phrase that announces the answer.
    """
    if answer_format not in ("hash", "tag"):
        yield from ((start, 0, content) for start, content in iter_boxed(text) if content)
        joined = last_box(text)
        if joined:
            yield joined[0], 1, joined[1]
    if answer_format not in ("boxed", "tag"):
        headings = answer_format != "hash"
        for start, content in hashed(text):
            if content and not (headings and (_HEADING.fullmatch(content) or _TITLE.match(content))):
                yield start, 0, content
    if answer_format not in ("boxed", "hash"):
        yield from ((start, 0, content) for start, content in tagged(text) if content)
    if with_phrases and answer_format in ("auto", "letter"):
        yield from ((start, 0, content) for start, content in phrases(text))


def _bold_value(text: str) -> str | None:
    """What is bold in the last sentence, if it is one value: of "She has **5 eggs** for 2 days" it is 5 eggs."""
    line = text.rstrip().rpartition("\n")[2]
    bold = [match for match in _BOLD.finditer(line) if re.search(r"\d", match[1])]
    if len(bold) != 1 or bold[0][1].rstrip().endswith(":"):
        return None
    numbered = re.match(r".*\d", line[bold[0].end() :])
    return None if numbered and _GOES_ON.search(numbered[0]) else bold[0][1]


def _inner(content: str) -> str:
    """The answer that a mark holds: a box, or what a sentence says, as in <answer>The answer is 73.</answer>."""
    box = last_box(content)
    told = [value for _, value in phrases(content) if value]
    return box[1] if box else told[-1] if told else content


def _last_of_value(text: str, found: list[Span], *, closing: bool = False) -> int | None:
    """Which maths is the last that has a value of its own. None where none has. At the end, expressions count too."""
    for index in range(len(found) - 1, -1, -1):
        span = found[index]
        content = text[span.inside : span.outside]
        after_number = text[max(span.start - 9, 0) : span.start].rstrip()[-1:] in set("0123456789$)}]")
        if content.lstrip().startswith("^") or (after_number and _UNIT.fullmatch(content)):
            continue  # of a unit
        last = closing or (index == len(found) - 1 and _CLOSING.fullmatch(text, span.end) is not None)
        told = last and _TOLD.search(text, max(span.start - 16, 0), span.start) is not None
        if told or any(has_value(value, closing=last) for value in values(text, span)):
            return index
    return None


def _with_peers(text: str, found: list[Span], last: int) -> str:
    """The value of maths, and of what is listed before it: "$x=3$ or $x=8$"."""
    first, worded = last, False
    while first > 0:
        gap = text[found[first - 1].end : found[first].start]
        content = text[found[first - 1].inside : found[first - 1].outside]
        if not _BETWEEN.fullmatch(gap) or not has_value(content, closing=False):
            break
        worded = worded or gap.strip(" \n,;") != ""
        first -= 1
    parts = [value for span in found[first : last + 1] for value in values(text, span)]
    names = {name[1] if name else "" for name in map(_ALIKE.match, parts)}
    if len(names) > 1 and not worded:
        parts = values(text, found[last])
    percent = _PERCENT.match(text, found[last].end)
    if percent and len(parts) == 1:
        return text[text.find(parts[0], found[last].inside) : percent.end()]
    return ", ".join(dict.fromkeys(parts))


def _whole(text: str, number: re.Match[str]) -> str:
    r"""A number with what belongs to it: the answer of "x > 2", "\sqrt{7}" or "(2, 3)" is not its last number."""
    around = max(number.start() - _LONGEST_TOKEN, 0)
    for group in _GROUP.finditer(text, around, number.end() + _LONGEST_TOKEN):
        if group.start() < number.start() < group.end():
            return group.group()
    start, end = number.start(), number.end()
    while start > around and not text[start - 1].isspace():
        start -= 1
    while end < min(number.end() + _LONGEST_TOKEN, len(text)) and not text[end].isspace():
        end += 1
    token = text[start:end].strip(".,;:!?*").rpartition("=")[2]
    if _IN_MATHS.search(token):
        return token
    term = _TERM_BEFORE.search(text, max(number.start() - 24, 0), number.start())
    if term:
        return term.group() + number.group()
    peer = _BEFORE_PEER.search(text, around, number.start())
    if (
        peer
        and not re.match(r"\s?=", text[number.end() : number.end() + 2])
        and not same_number(peer[1], number.group())
    ):
        return f"{peer[1].rstrip('.,')}, {number.group()}"
    if ":" in number.group() and _LABEL.search(text, max(number.start() - 14, 0), number.start()):
        return number.group().rpartition(":")[2]  # Week 3:210 pages
    negative = _NEGATIVE.search(text, max(number.start() - 12, 0), number.start())
    return f"-{number.group()}" if negative else number.group()


def _is_letter(character: str) -> bool:
    """Whether a character is a letter of a word. Chinese and Japanese have no blanks before numbers."""
    return character.isalpha() and character < "\u2e80"
