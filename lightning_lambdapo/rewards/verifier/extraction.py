r"""Find the final answer in a text.

All searches take time linear in the text (bounded quantifiers, one pass over braces), because completions are
untrusted input.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

AnswerFormat = Literal["auto", "boxed", "hash", "tag", "letter"]

_BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\[{}]|[{}]")
_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_PHRASE = re.compile(
    r"\banswer\b[*_]{0,2}(?: to [^.\n:]{0,60}?)?[ \t]{0,4}"
    r"(?::|=|\b(?:is|are|equals|will be|would be)\b)[\s:*_]{0,20}",
    re.IGNORECASE,
)
_PHRASE_END = re.compile(r"\n|[.](?:\s|$)|</|,?\s(?:which|because|since|where|when)\b")
_VALUE_START = re.compile(r"[-+\d.$\\(\[{€£¥]|[A-Za-z]\s{0,2}[=<>]")
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-\u2212])?"
    r"(?:\\[dt]?frac\s?\{-?\d+\}\s?\{\d+\}|\d+\s\d+/\d+|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?:\s?\\?%)?"
)
_LETTER_START = re.compile(
    r"(?:(?i:option|choice|answer)\W{0,4})?(?:\(\s?([A-Ja-j])\s?\)|([A-J])(?!\w)|([A-Ja-j])(?:[.):]|$))"
)
_OPTION_START = re.compile(r"\(\s?([A-Ja-j])\s?\)(?!\s?[-+*/^=,<>])|([A-J])(?:[.)](?:\s|$)|$)")
_LETTER_MARKS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s{0,4}\{|[$*_{}`]|\\[(\[\])]")
_OPTION = re.compile(r"\(([A-J])\)")
_SEVERAL = re.compile(r"\(?[A-J]\)?(?:\s?[,&/]\s?|,?\s(?:and|or)\s)\(?[A-J]\)?(?:[\s.,]?$|\s?[,&/]|\s(?:and|or)\s)")
_OPTION_LINE = re.compile(r"^[ \t*]{0,4}([A-J])[.):]\*{0,2}[ \t]", re.MULTILINE)
_LAST_LETTER = re.compile(r"(?:^|[\s*:(])([A-J])\)?[\s.*]*$")
_PHRASE_WORDS = 6


def final_answer(text: str, answer_format: AnswerFormat = "auto") -> str | None:
    r"""The final answer that a text gives, as it is written there; None without one.

    ``"boxed"``, ``"hash"`` and ``"tag"`` take the last ``\boxed{...}``, ``#### ...`` or ``<answer>...</answer>``.
    ``"auto"`` takes whichever of these and of "the answer is ..." comes last, else the last number. ``"letter"`` takes
    the letter of a multiple-choice option.

    Example:
        >>> final_answer(r"Half of it, so \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> final_answer("She sells 9 eggs for $2 each. The answer is $18. Done.")
        '$18'
    """
    if answer_format == "letter":
        return final_letter(text)
    answer = marked_answer(text, answer_format)
    return last_number(text) if answer is None and answer_format == "auto" else answer


def marked_answer(text: str, answer_format: AnswerFormat = "auto", *, phrases: bool = True) -> str | None:
    r"""The content of the last mark of a final answer; None without one.

    Args:
        text: a completion or a worked solution.
        answer_format: which marks count; all in ``"auto"`` and ``"letter"``.
        phrases: whether "the answer is ..." is a mark in ``"auto"``.

    Example:
        >>> marked_answer("9 * 2 = 18\n#### 18"), marked_answer("The answer is 18.", phrases=False)
        ('18', None)
    """
    _, content = max(_marked(text, answer_format, phrases=phrases), default=(0, None))
    return content and max(_marked(content, "boxed"), default=(0, content))[1]


def last_number(text: str) -> str | None:
    """The last number of a text, a fraction or percentage included; None without one.

    Example:
        >>> last_number("from 10 to -1,250.5, or 3/4"), last_number("none")
        ('3/4', None)
    """
    number = None
    for match in _NUMBER.finditer(text):
        number = match
    return number.group() if number else None


def final_letter(text: str) -> str | None:
    r"""The option letter, A to J, that a text chooses; None without one.

    It is the letter of the last marked answer that has one, else the last ``(C)``, else a bare letter at the end, else
    the only option that a line starts with. A mark with several letters, such as "B and C", chooses none.

    Example:
        >>> final_letter(r"(A) is too small, so \boxed{\text{(C)}}"), final_letter("It must be\nB."), final_letter("12")
        ('C', 'B', None)
    """
    marked = ((start, leading_letter(content), content) for start, content in _marked(text, "auto"))
    letters = [(start, letter, content[:256]) for start, letter, content in marked if letter]
    if letters:
        _, letter, content = max(letters)
        return None if _SEVERAL.match(_unmarked(content)) else letter
    options: list[str] = _OPTION.findall(text)
    return options[-1] if options else trailing_letter(text) or only_option(text)


def leading_letter(content: str, *, strict: bool = False) -> str | None:
    r"""The option letter, A to J, that a marked answer starts with.

    Args:
        content: the content of the mark.
        strict: accept only what cannot be a word or a variable: ``(C)``, ``C)``, ``C.`` or the letter alone.

    Example:
        >>> leading_letter("(C) 15"), leading_letter(r"\textbf{b}"), leading_letter("15")
        ('C', 'B', None)
        >>> leading_letter("A cat"), leading_letter("A cat", strict=True)
        ('A', None)
    """
    match = (_OPTION_START if strict else _LETTER_START).match(_unmarked(content))
    return next(letter for letter in match.groups() if letter).upper() if match else None


def _unmarked(content: str) -> str:
    """The start of a marked answer, without commands and signs around letters."""
    return " ".join(_LETTER_MARKS.sub(" ", content[:256]).split())


def trailing_letter(text: str) -> str | None:
    r"""The capital letter A to J that stands alone at the end of a text.

    Example:
        >>> trailing_letter("It must be\nB."), trailing_letter("... hence (C)"), trailing_letter("WEB")
        ('B', 'C', None)
    """
    match = _LAST_LETTER.search(text[-64:])
    return match[1] if match else None


def only_option(text: str) -> str | None:
    r"""The letter of the option that lines of a text start with, where it is the only one.

    Example:
        >>> only_option("C. spiral cleavage"), only_option("It is\nB) 12, since ..."), only_option("A. 1\nB. 2")
        ('C', 'B', None)
    """
    letters = {match[1] for match in _OPTION_LINE.finditer(text)}
    return letters.pop() if len(letters) == 1 else None


def boxed(text: str) -> list[tuple[int, str]]:
    r"""Position and content of every ``\boxed{...}`` with balanced braces, in the order in which they close.

    Example:
        >>> boxed(r"\boxed{1} or \boxed{\frac{1}{2}} or \boxed{3")
        [(0, '1'), (13, '\\frac{1}{2}')]
    """
    return list(iter_boxed(text))


def iter_boxed(text: str) -> Iterator[tuple[int, str]]:
    """Like :func:`boxed`, but one at a time, because the contents of deeply nested boxes add up."""
    opened: list[re.Match[str]] = []
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace == "}" and opened:
            start = opened.pop()
            if len(start.group()) > 1:
                yield start.start(), text[start.end() : match.start()].strip()
        elif brace == "{" or len(brace) > 2:
            opened.append(match)


def hashed(text: str) -> list[tuple[int, str]]:
    r"""Position and content of every ``#### ...``.

    Example:
        >>> hashed("9 * 2 = 18\n#### 18")
        [(11, '18')]
    """
    return [(match.start(), match[1].partition("</")[0].strip()) for match in _HASH.finditer(text)]


def tagged(text: str) -> list[tuple[int, str]]:
    """Position and content of the last ``<answer>...</answer>``, as a list of at most one.

    Example:
        >>> tagged("<answer>1</answer> no, <answer> 2 </answer>")
        [(23, '2')]
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return [] if start < 0 else [(start, text[start + len("<answer>") : end].strip())]


def _phrases(text: str) -> list[tuple[int, str]]:
    """Position and content of every "the answer is ..." that names a value or at most six words."""
    found = []
    for match in _PHRASE.finditer(text):
        rest = text[match.end() : match.end() + 600]
        end = _PHRASE_END.search(rest)
        content = (rest[: end.start()] if end else rest).strip(" \t*_")
        if _VALUE_START.match(content) or 0 < len(content.split()) <= _PHRASE_WORDS:
            found.append((match.start(), content))
    return found


def _marked(text: str, answer_format: AnswerFormat, *, phrases: bool = True) -> Iterator[tuple[int, str]]:
    """Position and content of the marked answers that are not empty."""
    every: list[Callable[[str], Iterable[tuple[int, str]]]] = [iter_boxed, hashed, tagged]
    every += [_phrases] * phrases
    finders = {"boxed": every[:1], "hash": every[1:2], "tag": every[2:3]}.get(answer_format, every)
    return ((start, content) for finder in finders for start, content in finder(text) if content)
