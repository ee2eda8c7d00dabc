"""Final answers in text: finding them, and comparing those that are plain numbers, letters or equal strings."""

import re
from fractions import Fraction
from typing import Literal

AnswerFormat = Literal["auto", "boxed", "hash", "tag", "letter"]

_MAX_DIGITS = 64
_MAX_LENGTH = 512
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_HASH = re.compile(r"####[ \t]*([^\n]*)")
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)+\s*:?\s*([^\n]+)", re.IGNORECASE)
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus right after a digit, a letter or a closing bracket is a subtraction.
_LAST_NUMBER = re.compile(rf"(?:(?<![\w)\]}}.])-\s?)?\$?(?:{_NUMBER})(?:\s?/\s?\d+)?%?")
_PLAIN = re.compile(rf"(?P<sign>[+-]?)\$?(?P<top>{_NUMBER})(?:/(?P<bottom>\d+))?(?P<percent>%?)")
_FRACTION = re.compile(r"(?P<sign>-?)\\frac(?:\{(?P<a>-?\d+)\}\{(?P<b>\d+)\}|(?P<c>\d)(?P<d>\d))(?P<percent>%?)")
_UNIT = re.compile(r"(?<=[\d%])\s*(?:[A-Za-z][A-Za-z.\s]*|\^\\circ|\\circ|°)$")
_LETTER = re.compile(r"\(?\s*([A-J])\s*(?:[).:,]|$|\s)")
_LOOSE_LETTER = re.compile(r"\(([A-J])\)|(?:^|\s)\(?([A-J])\)?[.]?\s*$", re.MULTILINE)


def boxed_content(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces; None where there is none.

    Example:
        >>> boxed_content(r"so \boxed{1} or rather \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for index in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[start + 7 : index]
        start = text.rfind("\\boxed{", 0, start)
    return None


def extract_answer(text: str, answer_format: AnswerFormat = "auto") -> str | None:
    r"""The final answer of a completion, or None.

    ``"boxed"``, ``"hash"`` and ``"tag"`` read the last ``\boxed{...}``, ``#### ...`` or ``<answer>...</answer>``;
    ``"letter"`` a multiple-choice letter A to J; ``"auto"`` whichever of the three markers comes last, else what
    follows "answer is", else the last number.

    Example:
        >>> extract_answer("She has 3 + 4 = 7 apples.\n#### 7")
        '7'
    """
    if answer_format == "letter":
        return _extract_letter(text)
    found = {
        "boxed": (text.rfind("\\boxed{"), boxed_content(text)),
        "hash": _last(_HASH, text),
        "tag": _last(_TAG, text),
    }
    if answer_format != "auto":
        content = found[answer_format][1]
        return content.strip() or None if content is not None else None
    marked = [(place, content) for place, content in found.values() if content is not None and content.strip()]
    if marked:
        return max(marked)[1].strip()
    phrase = _last(_PHRASE, text)[1]
    if phrase is not None and (tail := phrase.split(". ")[0].strip().rstrip(".")):
        number = _LAST_NUMBER.search(tail)
        return tail if number is None or "\\" in tail or "$" in tail.strip("$ ") else number[0]
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def is_letter(answer: str) -> bool:
    """True for a multiple-choice gold answer: a letter A to J, bare or in parentheses."""
    return re.fullmatch(r"\(?[A-J]\)?", answer.strip()) is not None


def normalise(answer: str) -> str:
    r"""An answer without what changes its looks alone: dollar signs, LaTeX spacing, text commands, a final full stop.

    Example:
        >>> normalise(r"$\dfrac{1}{2}\,\text{ cm}$.")
        '\\frac{1}{2} cm'
    """
    text = answer.strip().rstrip(".").strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing):
            text = text[len(opening) : len(text) - len(closing)]
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\left|\\right|\\[!,;:]|\{,\}(?=\d)", lambda m: "," if m[0] == "{,}" else "", text)
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\\ ", " ").replace("~", " ")
    return re.sub(r"\s+", " ", text).strip()


def parse_number(answer: str) -> tuple[Fraction, bool] | None:
    r"""A plain number, exactly, and whether it was written as a percentage; None for anything else.

    Thousands separators, decimals, fractions (``3/4``, ``\frac{3}{4}``), a currency sign, a percent sign and trailing
    words ("18 dollars") are understood. More than 64 digits are not a number.

    Example:
        >>> parse_number("$1,250.50"), parse_number(r"\frac12"), parse_number("x + 1")
        ((Fraction(2501, 2), False), (Fraction(1, 2), False), None)
    """
    text = normalise(answer)
    if len(text) > _MAX_LENGTH or sum(map(str.isdigit, text)) > _MAX_DIGITS:
        return None
    text = _UNIT.sub("", text.removeprefix("+").replace("- ", "-")).replace(" /", "/").replace("/ ", "/").strip()
    text = re.sub(r"\s+%$", "%", text)
    if match := _FRACTION.fullmatch(text):
        value = Fraction(int(match["a"] or match["c"]), int(match["b"] or match["d"]) or 1)
        usable = int(match["b"] or match["d"]) != 0
    elif match := _PLAIN.fullmatch(text.replace("$-", "-$")):
        usable = int(match["bottom"] or 1) != 0
        value = Fraction(match["top"].replace(",", "")) / (int(match["bottom"] or 1) or 1)
    else:
        return None
    return ((-value if match["sign"] == "-" else value), bool(match["percent"])) if usable else None


def same_number(first: tuple[Fraction, bool], second: tuple[Fraction, bool]) -> bool:
    """Equal values; where one side alone is a percentage, 50% is both 50 and 1/2."""
    if first[0] == second[0]:
        return True
    if first[1] == second[1]:
        return False
    percentage, plain = (first, second) if first[1] else (second, first)
    return percentage[0] == 100 * plain[0]


def canonical(answer: str) -> str:
    r"""One spelling per value: ``0.50``, ``1/2`` and ``\frac12`` are all ``1/2``.

    Example:
        >>> canonical("0.50"), canonical(r"\frac{1}{2}"), canonical("$x = 3$")
        ('1/2', '1/2', 'x=3')
    """
    number = parse_number(answer)
    return str(number[0]) if number is not None else normalise(answer).replace(" ", "").lower()


def is_bomb(answer: str) -> bool:
    """True for expressions that are refused unseen: very long ones, many digits, power towers, great factorials.

    Example:
        >>> is_bomb("9^{9^{9^{9}}}"), is_bomb("x^{2}+y^{2}")
        (True, False)
    """
    if len(answer) > _MAX_LENGTH or re.search(rf"\d{{{_MAX_DIGITS + 1},}}", answer):
        return True
    powers = answer.replace("**", "^")
    if re.search(r"\^[\s{(]*[^\s{}()^+*/=,-]*[\s})]*\^|\^\s*[{(][^{}()]*\^", powers):
        return True
    if any(int(number) > 999 for number in re.findall(r"\^[\s{(-]*(\d+)", powers)):
        return True
    return "!!" in answer or any(int(number) > 99 for number in re.findall(r"(\d+)\s*[)}]*!", answer))


def _last(pattern: re.Pattern[str], text: str) -> tuple[int, str | None]:
    match = None
    for match in pattern.finditer(text):  # noqa: B007
        pass
    return (-1, None) if match is None else (match.start(), match[1])


def _extract_letter(text: str) -> str | None:
    marked = max((text.rfind("\\boxed{"), boxed_content(text)), _last(_HASH, text), _last(_TAG, text), key=lambda x: x[0])
    for content in (marked[1], _last(_PHRASE, text)[1]):
        if content is not None and (match := _LETTER.match(normalise(content).lstrip("*$ "))):
            return match[1]
    loose = list(_LOOSE_LETTER.finditer(text))
    return (loose[-1][1] or loose[-1][2]) if loose else None
