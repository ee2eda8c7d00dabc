r"""Exact comparison of short answers: cleaned strings, and numbers as fractions. No floats, no evaluation.

What cannot be decided here is left to math-verify (:mod:`lightning_lambdapo.rewards.verifier`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

_MAX_DIGITS = 64
_MAX_DEPTH = 20
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:left|right|displaystyle|qquad|quad)(?![A-Za-z])|\\[!,;:> ()\[\]]|[$~€£¥₹`]")
_GAP = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_GROUPING = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3})")
_CHARACTERS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2044": "/", "\u00a0": " ", "\u202f": " ", "\u2009": " "})
_TEXT = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")

_DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_QUANTITY = re.compile(
    rf"""(?P<sign>[+-]?)
    (?:(?P<whole>\d+)(?:[ ](?=\d+/\d)|(?=\\frac)))?
    (?:\\frac[ ]?(?:\{{(?P<top>-?(?:{_DIGITS}))\}}\{{(?P<bottom>{_DIGITS})\}}|(?P<top_digit>\d)[ ]?(?P<bottom_digit>\d))
      |(?P<over>{_DIGITS})/(?P<under>{_DIGITS})
      |(?P<plain>{_DIGITS})(?:[eE](?P<exponent>[+-]?\d{{1,2}}))?)
    (?P<percent>[ ]?(?:%|percent|percentage|pct)(?![A-Za-z]))?
    (?P<unit>\D.*|[ ].*)?""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)

_UNIT_NAMES = (
    "mm millimeter millimetre/cm centimeter centimetre/m meter metre/km kilometer kilometre/in inch inches/"
    "ft foot feet/yd yard/mi mile/mg milligram/g gram/kg kilogram/lb pound/oz ounce/ml milliliter millilitre/"
    "l liter litre/s sec second/min minute/h hr hour/day/week/month/year/degree deg/cent/dollar usd/mph/kph"
)
_UNITS = {name: names.split()[0] for names in _UNIT_NAMES.split("/") for name in names.split()}
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SMALL_WORDS = {"a", "an", "at", "by", "in", "is", "of", "on", "per", "to", "us"}
_NOT_UNITS = frozenset(
    re.findall(
        r"\w+",
        "pi sqrt sin cos tan log exp alpha beta gamma theta phi infinity infty and plus minus over half quarter "
        "quarters third thirds mod choose factorial not less more or squared cubed",
    )
)
_DEGREE = re.compile(r"\^?\{?\\(?:circ|degree)\}?|°")
_ASSIGNED = re.compile(r"^[A-Za-z]=(?=[^=]+$)")
_POWER = re.compile(r"(?<=[A-Za-z])(?:\^\{?[23]\}?|[²³])")  # of a unit, never of the number


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with what stands around it.

    Attributes:
        value: the number; of a percentage, the number before the sign.
        percent: whether it is a percentage.
        unit: canonical name of a measuring unit; empty for none, and for words such as "eggs".
        decimals: digits after the point of a decimal, None for a ratio.
    """

    value: Fraction
    percent: bool = False
    unit: str = ""
    decimals: int | None = 0


def clean(text: str) -> str:
    r"""A text without LaTeX spacing, dollar signs, text commands, needless blanks and final punctuation.

    Example:
        >>> clean(r"$ \left( 1,\, \dfrac{1}{2} \right) $."), clean(r"\text{ 18  dollars }")
        ('(1,\\frac{1}{2})', '18 dollars')
    """
    text = text.translate(_CHARACTERS)
    text = (
        re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    )
    for _ in range(3):  # nested \text{\textbf{...}}
        text = _WRAPPED.sub(r" \1 ", text)
    text = " ".join(_NOISE.sub(" ", text).split())
    return _GAP.sub("", text).lstrip('*_"“ ').rstrip('*_"”.,;: ')


def quantity(text: str) -> Quantity | None:
    r"""Read a cleaned text as an exact number; None where it is not one.

    Plain and grouped integers, decimals, ``1.5e3``, ``a/b``, ``\frac{a}{b}``, mixed numbers, percentages, scales ("2
    million"), and any of these before a unit or a few words ("18 dollars a day").

    Example:
        >>> quantity("1,200.50").value, quantity(r"-\frac12").value, quantity("18 dollars a day").value, quantity("5x")
        (Fraction(2401, 2), Fraction(-1, 2), Fraction(18, 1), None)
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > _MAX_DIGITS:
        return None
    group = match.groupdict()
    top = group["top"] or group["top_digit"] or group["over"]
    bottom = group["bottom"] or group["bottom_digit"] or group["under"]
    unit = _read_unit(group["unit"] or "", spaced=bool(group["percent"] or group["bottom"]))
    if unit is None:
        return None
    scale, name = unit
    if bottom is None:
        value = _decimal(group["plain"]) * Fraction(10) ** int(group["exponent"] or 0)
    elif _decimal(bottom) == 0:
        return None
    else:
        value = _decimal(top) / _decimal(bottom) + int(group["whole"] or 0)
    decimals = len(group["plain"].partition(".")[2]) if bottom is None else None
    value = -value if group["sign"] == "-" else value
    return Quantity(value * scale, percent=bool(group["percent"]), unit=name, decimals=decimals)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are equal.

    A percentage also equals its number without the sign, and its value (10% = 10 = 0.1). A ratio also equals its
    decimal rounded to six or more places. Units count where both sides name a known one; they are not converted.

    Example:
        >>> same_quantity(quantity("1/2"), quantity("50%")), same_quantity(quantity("3 cm"), quantity("3 km"))
        (True, False)
    """
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.value == answer.value or _rounds_to(gold, answer) or _rounds_to(answer, gold):
        return True
    if gold.percent == answer.percent:
        return False
    share, number = (gold, answer) if gold.percent else (answer, gold)
    return share.value == 100 * number.value


def canonical(text: str) -> str:
    r"""One spelling for all exact spellings of an answer, for voting.

    Example:
        >>> [canonical(text) for text in ("0.5", "x = 1/2", r"$\frac12$", "50%", " Blue. ")]
        ['1/2', '1/2', '1/2', '50', 'blue']
    """
    cleaned = clean(text)
    cleaned = clean(_ASSIGNED.sub("", cleaned)) if _ASSIGNED.match(cleaned) else cleaned  # x = **5** too
    number = quantity(cleaned)
    if number is not None:
        return str(number.value)
    return cleaned.casefold() if is_text(cleaned) else cleaned


def is_text(cleaned: str) -> bool:
    """Whether a cleaned answer is made of words, one of which has two letters or more.

    Example:
        >>> is_text("no solution"), is_text("x"), is_text("x+yz")
        (True, False, False)
    """
    return _TEXT.fullmatch(cleaned) is not None and max(map(len, re.split(r"[ '-]", cleaned))) >= 2


def too_costly(text: str) -> bool:
    """Whether symbolic evaluation may take for ever: long numbers, large exponents, power towers, factorials, nesting.

    Example:
        >>> too_costly("9^{9^{9}}"), too_costly("2^100000"), too_costly("e^{x^2} + 2^{10}")
        (True, True, False)
    """
    text = text.replace("**", "^")
    depths = list(accumulate(((character in "([{") - (character in ")]}") for character in text), initial=0))
    if max(depths) - min(depths) > _MAX_DEPTH or re.search(rf"\d{{{_MAX_DIGITS + 1}}}", text):
        return True
    if re.search(r"\d{5}[\s)}\]]*!|![\s)}\]]*!", _GROUPING.sub("", text)):
        return True
    return any(_costly_exponent(text, caret.end()) for caret in re.finditer(r"\^", text))


def _costly_exponent(text: str, start: int) -> bool:
    """Whether the exponent that starts here has five digits, or is itself a power or factorial of numbers."""
    match = re.compile(r"\s*[-+]?\s*").match(text, start)
    start = match.end() if match else start
    end, depth = start, 0
    while end < len(text):
        depth += (text[end] in "{(") - (text[end] in "})")
        if depth < 0 or (depth == 0 and not (text[end].isdigit() and text[end + 1 : end + 2].isdigit())):
            break
        end += 1
    exponent, rest = text[start : end + 1], text[end + 1 :].lstrip()
    if rest.startswith(("^", "!")) and re.search(r"\d", exponent):
        return True
    return re.search(r"\d{5}|\d[\s)}]*\^[\s{(]*-?\s*\d|\d[\s)}]*!", exponent.replace(",", "")) is not None


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip(".") or "0")


def _rounds_to(ratio: Quantity, decimal: Quantity) -> bool:
    if (
        ratio.decimals is not None
        or decimal.decimals is None
        or decimal.decimals < 6
        or ratio.percent != decimal.percent
    ):
        return False
    return round(ratio.value, decimal.decimals) == decimal.value


def _read_unit(tail: str, *, spaced: bool) -> tuple[int, str] | None:
    """Scale and canonical unit of what follows a number; None where it is not a unit or a few plain words."""
    spaced = spaced or tail.startswith(" ")
    tail = _POWER.sub("", _DEGREE.sub(" degrees", tail)).strip()
    if not tail:
        return 1, ""
    if not re.fullmatch(r"[^\W\d_]+(?:[ ./'-]+[^\W\d_]+)*", tail):
        return None
    words = [word for word in re.split(r"[ ./'-]+", tail.lower()) if word]
    scale = _SCALES.get(words[0], 1)
    words = words[1:] if scale > 1 else words
    known = [_UNITS.get(word) or _UNITS.get(word.removesuffix("s")) for word in words]
    for word, unit in zip(words, known, strict=True):
        plain = word in _SMALL_WORDS or (len(word) > 2 and word not in _NOT_UNITS and word not in _SCALES)
        if not (unit or (spaced and plain)):
            return None
    return scale, (known[0] or "") if known else ""
