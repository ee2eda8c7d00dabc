r"""Exact comparison of short answers: cleaned strings, and numbers as fractions. No floats, no evaluation.

What cannot be decided here goes to math-verify (:mod:`lightning_lambdapo.rewards.verifier.pool`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

_MAX_DIGITS = 64
_MAX_DEPTH = 20
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|qquad|quad)(?![A-Za-z])|\\[!,;:> ()\[\]]|[$~€£¥₹`]")
_GAP = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_COMMA_SPACE = re.compile(r"(?<=\d),(?:\\[!,;: ]){1,4}")
_SPACED_GAP = re.compile(r"(?<!\w)(?<!\d,)\s+|\s+(?!\w)")  # of 32, 349, which is no 32,349
_SPACED_LIST = re.compile(r"[-+]?\d[\d.]*(?:, ?[-+]?\d[\d.]*)*, \d{3}(?:,? ?[-+]?\d[\d.]*)*[.,;]?", re.ASCII)
_GROUPING = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3})")
_CHARACTERS = str.maketrans(
    "\u2212\u2013\u2010\u2011\uff0d\u2044\u00a0\u202f\u2009\uff05"
    + "".join(chr(zero + n) for zero in (0xFF10, 0x660) for n in range(10)),
    "-----/   %" + "0123456789" * 2,
)
_FIELD = re.compile(r"\\mathbb\s([A-Z])(?![A-Za-z])")
_STYLE = re.compile(
    r"\\(?:text)?color\s?\{[A-Za-z!\d]{1,20}\}|\\(?:bf|bfseries|bm|boldsymbol|pmb|[lL]arge|LARGE|[hH]uge|small)(?![A-Za-z])\s?"
)
_BOLD = re.compile(r"(?<![\w)])\*\*([^*\s](?:[^*\n]{0,80}[^*\s])?)\*\*(?![\w(])")
_BRACED = re.compile(r"\{([^{},\\]*)\}")
_NEGATIVE = re.compile(r"(?:minus|negative) (?=[\d.])")
_SEPARATOR = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s?\{\s?[,;]\s?\}")
_RELATIONS = str.maketrans({"\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u221e": "\\infty "})
_TEXT = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = str.maketrans(_SUPERSCRIPTS, "0123456789-")
_ROOT = re.compile(r"\u221a\s?(\d+|[A-Za-z]|\([^()]*\))")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])|\u03c0")
_EMPTY = re.compile(r"\\varnothing(?![A-Za-z])|\u2205")
_UPRIGHT = re.compile(  # e and i, which some set upright as constants
    r"\\(?:mathrm|mathit|mathsf|text|textrm|textup|operatorname|rm)\s{0,4}(?:\{\s{0,4}([ei])\s{0,4}\}|([ei])(?![A-Za-z]))"
    r"|\{\\rm\s{1,4}([ei])\s{0,4}\}|\\imath(?![A-Za-z])"
)
_HTML = re.compile(r"</?(?:b|strong|i|em|u|code|p|span|div|br|mark|center)(?: [^<>\n]{0,60})?/?>", re.IGNORECASE)
_ALIGNED = re.compile(
    r"(?:[ \t]?&){1,8}[ \t]?(?=[=<>]|\\(?:[lg]e|[lg]eq|neq?|approx|in)(?![A-Za-z]))|(?<=[=<>])(?:[ \t]?&){1,8}(?!\w)"
)

_DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_QUANTITY = re.compile(
    rf"""(?P<sign>[+-]?)
    (?:(?P<whole>\d+)(?:[ ](?=\d+/\d)|(?=\\frac)))?
    (?:\\frac[ ]?(?:\{{(?P<top>-?(?:{_DIGITS}))\}}\{{(?P<bottom>{_DIGITS})\}}|(?P<top_digit>\d)[ ]?(?P<bottom_digit>\d))
      |(?P<over>{_DIGITS})/(?P<under>{_DIGITS})
      |(?P<plain>{_DIGITS})(?:[eE](?P<exponent>[+-]?\d{{1,2}})
        |[ ]?(?:\\times|\\cdot|\u00d7|\*)[ ]?10\^(?:\{{(?P<power>[+-]?\d{{1,2}})\}}|(?P<power_digit>\d))
        |\\overline\{{(?P<recurring>\d+)\}})?)
    (?P<percent>[ ]?(?:%|percent|percentage|pct)(?![A-Za-z]))?
    (?P<unit>\D.*|[ ].*)?""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)

_UNIT_NAMES = (
    "mm millimeter millimetre/cm centimeter centimetre/m meter metre/km kilometer kilometre/in inch inches/"
    "ft foot feet/yd yard/mi mile/mg milligram/g gram/kg kilogram/lb pound/oz ounce/ml milliliter millilitre/"
    "l liter litre/s sec second/min minute/h hr hour/day/week/month/year/degree deg/celsius/fahrenheit/cent/dollar usd/"
    "mph/kph"
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
_DEGREE = re.compile(
    r"(?:\^?\{?\\(?:circ|degree)\}?|°|\bdegrees?(?= (?:[CF]\b|(?i:celsius|fahrenheit))))"
    r"(?:\s?(?:(?P<celsius>C\b|(?i:celsius))|(?P<fahrenheit>F\b|(?i:fahrenheit))))?|\u2103|\u2109"
)
_ASSIGNED = re.compile(r"^[A-Za-z]=(?=[^=]+$)")
_ASSIGNED_FIRST = re.compile(r"[A-Za-z]=")
_POWER = re.compile(r"(?<=[A-Za-z])\^\{?[23]\}?")  # of a unit, never of the number
_FIRST_POWER = re.compile(r"[A-Za-z]+\^\{?([23])")
_SPEED = re.compile(r"(?<![A-Za-z])(?:miles?|(km|kilomet(?:er|re)s?))(?: per |/)h(?:r|our)?(?![A-Za-z])", re.IGNORECASE)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)+", re.ASCII)
_NUMERAL = re.compile(r"\(?(\d[\dA-Za-z]*)\)?_(?:\{(\d\d?)\}|(\d\d?))", re.ASCII)
_LISTED = re.compile(r"\\?\{(?:[^<>=|:\\]|\\(?![lg][et]|in|mid))*\}")
_ORDERED = re.compile(r"[(\[].*,.*[)\]]")
_BRACKETED = re.compile(r"(?<![A-Za-z])([(\[])(?=[^()\[\],]*,)[^()\[\]]*([)\]])")
_CLOSED_INFINITY = re.compile(r"\[[-+]?\\infty ?,|,[-+]?\\infty ?\]")
_ARITHMETIC = re.compile(r"(?:[\d\s.,+\-*/^(){}%:\u00d7\u00f7]|\\(?:times|cdot|div|frac)(?![A-Za-z]))+")
_APPROXIMATELY = re.compile(r"\\(?:approx|thickapprox|simeq)(?![A-Za-z])|\u2248")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its percent sign, unit and number of decimals.

    Attributes:
        value: the number. Of a percentage, the number before the sign.
        percent: whether it is a percentage.
        unit: canonical name of a measuring unit. Empty for none, and for words such as "eggs".
        decimals: digits after the point of a decimal, None for a ratio.
    """

    value: Fraction
    percent: bool = False
    unit: str = ""
    decimals: int | None = 0


def latex(text: str) -> str:
    r"""A text with superscripts, roots, pi, relations and the empty set as LaTeX writes them.

    The constants e and i lose their upright type, and rows of aligned maths their marks. Tags such as <b> go.

    Example:
        >>> latex("2*pi*r\u00b2"), latex("\u221a5"), latex("10\u207b\u00b3")
        ('2*\\pi *r^{2}', '\\sqrt{5}', '10^{-3}')
        >>> latex(r"\mathrm{e}^{2\pi\mathrm{i}}"), latex("x &= 3")
        ('e^{2\\pi i}', 'x= 3')
    """
    text = _SEPARATOR.sub(", ", _STYLE.sub("", _FIELD.sub(r"\\mathbb{\1}", _HTML.sub(" ", text))))
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1]}}}", text)
    text = _EMPTY.sub(r"\\emptyset ", _PI.sub(r"\\pi ", text)).translate(_RELATIONS)
    return _ALIGNED.sub("", _UPRIGHT.sub(_italic, text))


def clean(text: str) -> str:
    r"""A text without LaTeX spacing, dollar signs, text commands, needless blanks and final punctuation.

    Example:
        >>> clean(r"$ \left( 1,\, \dfrac{1}{2} \right) $."), clean(r"\text{ 18  dollars }")
        ('(1,\\frac{1}{2})', '18 dollars')
    """
    text = latex(text).translate(_CHARACTERS)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\{([,:])\}|\\([%$])", r"\1\2", text)
    for _ in range(3):  # nested \text{\textbf{...}}
        text = _WRAPPED.sub(r" \1 ", text)
    text = " ".join(_NOISE.sub(" ", _COMMA_SPACE.sub(",", _BOLD.sub(r"\1", text))).split())
    text = _NEGATIVE.sub("-", text) if _NEGATIVE.match(text) else text
    gap = _SPACED_GAP if _SPACED_LIST.fullmatch(text) else _GAP
    text = gap.sub("", text).lstrip('*_"“ ').rstrip('*_"”.,;: ')
    braced = _BRACED.fullmatch(text)
    return braced[1] if braced else text


def quantity(text: str) -> Quantity | None:
    r"""Read a cleaned text as an exact number. None where it is not one.

    Plain and grouped integers, decimals, ``0.1\overline{6}``, ``1.5e3``, ``1.5 \times 10^3``, ``a/b``, ``\frac{a}{b}``,
    mixed numbers, percentages, scales ("2 million"), and any of these before a unit or a few words ("18 dollars a
    day").

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
    decimals = len(group["plain"].partition(".")[2]) if bottom is None else None
    if group["recurring"]:
        if decimals is None or "." not in group["plain"]:
            return None
        period = Fraction(int(group["recurring"]), 10 ** len(group["recurring"]) - 1)
        value, decimals = _decimal(group["plain"]) + period / 10**decimals, None
    elif bottom is None:
        exponent = int(group["exponent"] or group["power"] or group["power_digit"] or 0)
        value = _decimal(group["plain"]) * Fraction(10) ** exponent
    elif _decimal(bottom) == 0:
        return None
    else:
        value = _decimal(top) / _decimal(bottom) + int(group["whole"] or 0)
    value = -value if group["sign"] == "-" else value
    return Quantity(value * scale, percent=bool(group["percent"]), unit=name, decimals=decimals)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are equal.

    A percentage also equals its number without the sign, and its value (10% = 10 = 0.1). A ratio also equals its
    decimal rounded to six or more places, if three or more digits of it are significant. Units are compared where both
    sides name a known one. They are not converted.

    Example:
        >>> same_quantity(quantity("1/2"), quantity("50%")), same_quantity(quantity("3 cm"), quantity("3 km"))
        (True, False)
    """
    units = {gold.unit, answer.unit}
    if len(units) > 1 and "" not in units and units not in ({"degree", "celsius"}, {"degree", "fahrenheit"}):
        return False
    if gold.value == answer.value or _rounds_to(gold, answer) or _rounds_to(answer, gold):
        return True
    if gold.percent == answer.percent:
        return False
    share, number = (gold, answer) if gold.percent else (answer, gold)
    return share.value == 100 * number.value


def notation(cleaned: str) -> tuple[Fraction | str, ...] | None:
    r"""Read a cleaned ratio, such as 2:3:5, or a numeral with its base, such as ``1011_2``. None where it is neither.

    A ratio is divided by its first term. If a term is 0 or written like 05, it may be a time of day and is kept as it
    is.

    Example:
        >>> notation("6:8") == notation("3:4"), notation("9:05") == notation("18:10"), notation("1011_{2}")
        (True, False, (Fraction(11, 1),))
    """
    if _RATIO.fullmatch(cleaned):
        terms = [Fraction(term) for term in cleaned.split(":")]
        as_it_is = not all(terms) or re.search(r"(?:^|:)0\d", cleaned)
        return (cleaned,) if as_it_is else tuple(term / terms[0] for term in terms)
    numeral = _NUMERAL.fullmatch(cleaned)
    try:
        return (Fraction(int(numeral[1], int(numeral[2] or numeral[3]))),) if numeral else None
    except ValueError:  # no such base, or no such digit in it
        return None


def bracketing(cleaned: str) -> str:
    r"""Whether a cleaned answer is a ``"set"`` given by its elements, or ``"ordered"``: a tuple or interval.

    Example:
        >>> [bracketing(text) for text in (r"\{1,2\}", "(1,2)", r"\{x|x>2\}", "(x+1)(x-1)")]
        ['set', 'ordered', '', '']
    """
    return "set" if _LISTED.fullmatch(cleaned) else "ordered" if _ORDERED.fullmatch(cleaned) else ""


def unlike(gold: str, answer: str) -> bool:
    r"""Whether the brackets of two cleaned answers show that they differ, which math-verify does not see.

    A set is no tuple, (3,-1) is not [3,-1], and an interval that ends before infinity is not one that ends with it.

    Example:
        >>> unlike("(3,-1)", "[3,-1]"), unlike(r"[4,\infty)", r"[4,\infty]"), unlike("[0,1)", "[0,1)")
        (True, True, False)
    """
    if {bracketing(gold), bracketing(answer)} == {"set", "ordered"}:
        return True
    if bool(_CLOSED_INFINITY.search(gold)) != bool(_CLOSED_INFINITY.search(answer)):
        return True
    if "\\cup" in gold + answer or "\\cap" in gold + answer:
        return False  # one union has several spellings: [0,1) with [1,2] is [0,1] with (1,2]
    brackets = [sorted(_BRACKETED.findall(side.rpartition("=")[2])) for side in (gold, answer)]
    return len(brackets[0]) == len(brackets[1]) and brackets[0] != brackets[1]


def without_approximation(gold: str, answer: str) -> str:
    r"""The side of "exact \approx rounded" that is to be compared: the rounded one where the gold answer is rounded.

    Example:
        >>> [without_approximation(gold, r"\frac{10}{3} \approx 3.33") for gold in ("3.33", r"\frac{10}{3}", "3")]
        ['3.33', '\\frac{10}{3}', '\\frac{10}{3}']
        >>> without_approximation("3.33", r"\approx 3.33")
        '3.33'
    """
    sides = [side.strip() for side in _APPROXIMATELY.split(answer)]
    if len(sides) != 2 or not sides[1]:
        return answer
    if not sides[0]:
        return sides[1]
    wanted, rounded = quantity(clean(gold)), quantity(clean(sides[1]))
    alike = wanted is not None and rounded is not None and wanted.decimals == rounded.decimals is not None
    return sides[1] if alike else sides[0]


def canonical(text: str) -> str:
    r"""One spelling for all exact spellings of an answer, for voting. A calculation votes as its result.

    Example:
        >>> [canonical(text) for text in ("0.5", "x = 1/2", r"$\frac12$", "50%", " Blue. ", "1/4 + 1/4 = 0.5")]
        ['1/2', '1/2', '1/2', '50', 'blue', '1/2']
    """
    cleaned = _result(clean(text))
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
    """Whether symbolic evaluation may take forever: long numbers, large exponents, power towers, factorials, nesting.

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


def _italic(match: re.Match[str]) -> str:
    """The letter of an upright constant, apart from letters beside it."""
    letter = match[1] or match[2] or match[3] or "i"
    before, after = match.string[match.start() - 1 : match.start()], match.string[match.end() : match.end() + 1]
    return " " * before.isalpha() + letter + " " * after.isalpha()


def _result(cleaned: str) -> str:
    """The result of a cleaned calculation, such as 68+5=73 or x=68+5=73. Everything else is returned as it is."""
    sides = cleaned.split("=")[1 if _ASSIGNED_FIRST.match(cleaned) else 0 :]
    if len(sides) < 2 or not all(map(_ARITHMETIC.fullmatch, sides)):
        return cleaned
    return next((side for side in (sides[-1], sides[0]) if quantity(side)), cleaned)


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
    near = abs(ratio.value - decimal.value) <= abs(ratio.value) / 1000  # 0.000000 is no rounded value of anything
    return near and round(ratio.value, decimal.decimals) == decimal.value


def _degrees(match: re.Match[str]) -> str:
    if match["celsius"] or match[0] == "\u2103":
        return " celsius"
    return " fahrenheit" if match["fahrenheit"] or match[0] == "\u2109" else " degrees"


def _read_unit(tail: str, *, spaced: bool) -> tuple[int, str] | None:
    """Scale and canonical unit of what follows a number. None where it is not a unit or a few plain words."""
    spaced = spaced or tail.startswith(" ")
    tail = _SPEED.sub(lambda match: "kph" if match[1] else "mph", _DEGREE.sub(_degrees, tail)).strip()
    power = _FIRST_POWER.match(tail)
    tail = _POWER.sub("", tail)
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
    name = known[0] if known else None
    return scale, name + (power[1] if power else "") if name else ""
