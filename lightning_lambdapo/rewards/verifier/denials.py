r"""Read what a text says is wrong: "not 75", "I don't think it is 75", "anything but (B)", "75? No".

A denial is an opener ("not", "hardly", "I doubt"), a few fillers ("really", "to be", "the answer is") and the value.
Two openers in a row cancel each other out: "cannot be anything but 73" says 73.
"""

import re

__all__ = ["DENIED_FOLLOWING", "REFUTED", "denied_before", "without_denied"]

_SAY = "say|think|claim|believe|feel|assume|suppose|expect|imagine|conclude|state|call|choose|pick|select"
_OPENER = (
    r"(?:n['\u2019]t|\b(?:(?<!\bor )(?<!\bif )not|never|cannot|neither|nor|hardly|scarcely|rather than|instead of|"
    r"no way|by no means|unlikely|impossible|improbable|doubtful|(?:I|we)(?:\s[a-z]{3,12})? doubt|"
    r"rul(?:es? out|ed out|ing out)|eliminate[sd]?|(?:any|some)thing (?:but|except|other than)|"
    r"(?:all|everything) (?:but|except)(?!\s[*_]{0,2}[$\d\\-])|"
    rf"(?:false|untrue|wrong|incorrect|a mistake)(?=\s(?:that|to (?:answer|{_SAY}))\b)))\b"
)
_FILLER = (
    r"(?:(?:it|this|that|there)(?:['\u2019]s)?|its|(?:to )?be(?:en|ing)?|is|are|was|"
    rf"(?:(?:I|we|you) )?(?:would|could|can|may|might|must|should|(?:to )?(?:{_SAY})s?)|"
    r"(?:say|think|choos|pick|select)ing|(?:seem|appear|look|turn)s?(?: out| like)?|"
    r"to answer|(?:have|has|need|going|supposed|meant) to be|"
    r"(?:the case|true|right|correct|possible|accurate)(?= (?:that|to)\b)|"
    r"even|ever|just|quite|in fact|at all|of course|for|go with|equal(?: to)?|options?|choices?|letters?|"
    r"the(?: (?:correct|right|true|final|best))?|"
    r"(?:answer|value|result|solution|number|total)s?"
    r"(?:(?: to| of| for)(?: (?:the|this|that))? [A-Za-z]{1,12}(?= is\b))?|"
    r"(?!(?:on|mere|sole|app|imp|supp|multip|unlike|hard|scarce)ly\b)[a-z]{2,12}ly)\b"
)
_GAP = r"(?:[ \t*_]|\n(?=(?-i:[a-z]))){1,4}"
_ASIDE = r",\s(?:in|of|as|by|at|on|after|however|indeed|I|[a-z]{3,12}ly)\b[a-z' ]{0,30},"
_FILLERS = rf"(?:{_GAP}{_FILLER}|{_ASIDE}){{0,8}}"

# The opener of a denial and its fillers, without the value. The group "twice" is that of a denial that is denied.
_DENIAL = rf"(?>{_OPENER}{_FILLERS}(?P<twice>{_GAP}{_OPENER}{_FILLERS})?)"
#: What asks whether a value is right and says no.
REFUTED = (
    r"\?[\s*_]{1,4}(?i:(?:no|nope)(?=[\s*_]{0,2}(?:[,.:;!\u2013\u2014-]|$)|\s(?:it|that|wait|because)\b)|wrong\b|incorrect\b|"
    r"(?:I |we )(?:doubt it|(?:do not|don['\u2019]t) think so)\b)"
)

_NUMBER = r"[$€£]?[-\u2212]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?"
_MATHS = r"\$[^$\n]{1,80}\$|\\\([^\n]{1,80}?\\\)"
_LETTER = r"\(?[A-J]\)?(?![\w'(])"
_DENIED = re.compile(
    rf"(?i:{_DENIAL})[\s*_=:\"'\u201c`]{{1,4}}"
    rf"(?P<value>{_NUMBER}(?:,?\s(?:or|nor)\s{_NUMBER}){{0,9}}|{_MATHS}"
    rf"|{_LETTER}(?:(?:\s?[,/]\s?|,?\s(?:or|nor|and)\s){_LETTER}){{0,9}})"
)
#: A denial up to what it denies.
DENIED_FOLLOWING = re.compile(rf"{_DENIAL}[\s*_]{{1,4}}", re.IGNORECASE)
_LONGEST_DENIAL = 160
_DENIED_AFTER = re.compile(
    r"(?<![A-Za-z\\])\(?[A-J]\)?(?:,?\s(?:and|or)\s\(?[A-J]\)?)?"
    r"(?=[*_]{0,2}\s(?:cannot|can['\u2019]t|does(?: not|n['\u2019]t)|can hardly|"
    r"(?:is|are|seems|looks)\s?(?:not|n['\u2019]t|never|hardly|unlikely|doubtful|by no means|anything but|"
    r"(?:clearly |also )?(?:wrong|incorrect|false|impossible|ruled out|too))\b))"
    rf"|(?:(?<![A-Za-z\\])\(?[A-J]\)?|(?<![\d.,])\d[\d,]{{0,30}}(?:\.\d{{1,30}})?|{_MATHS})(?=[*_]{{0,2}}{REFUTED})"
)


def without_denied(text: str) -> str:
    r"""A text with what it says is wrong blanked out, by characters that are part of no answer.

    Example:
        >>> without_denied("It is 73, not 75.").replace("\0", "-")
        'It is 73, not --.'
        >>> without_denied("I don't think it's 75. It cannot be anything but 73.").replace("\0", "-")
        "I don't think it's --. It cannot be anything but 73."
    """
    text = _DENIED.sub(_blanked, text)
    return _DENIED_AFTER.sub(lambda match: "\0" * len(match[0]), text)


def denied_before(text: str, end: int) -> bool:
    """Whether what starts at a position is denied by what is right before it.

    Example:
        >>> denied_before("I doubt that the 75", 17), denied_before("There is no doubt that the 75", 27)
        (True, False)
    """
    before = text[max(end - _LONGEST_DENIAL, 0) : end]
    return any(match.end() == len(before) and not match["twice"] for match in DENIED_FOLLOWING.finditer(before))


def _blanked(match: re.Match[str]) -> str:
    """A denial with its value blanked out, unless it is denied itself."""
    kept = match[0] if match["twice"] else match[0][: -len(match["value"])]
    return kept + "\0" * (len(match[0]) - len(kept))
