r"""Read "the answer is ...": what comes before the value, the value itself, and where it ends."""

import re
from collections.abc import Iterator

from lightning_lambdapo.rewards.verifier.denials import DENIED_FOLLOWING, REFUTED, denied_before, without_denied
from lightning_lambdapo.rewards.verifier.likeness import same_number
from lightning_lambdapo.rewards.verifier.mathematics import Span, inside, spans, values

_VERB = (
    r"\b(?:(?:we|I) (?:get|find|obtain) is|is|are|equals|becomes|(?:turns|comes|works) out to(?: be)?|"
    r"(?:will|would|must|should|has to) be)\b"
)
_PHRASE = re.compile(
    rf"\banswers?\b[*_]{{0,2}}(?:(?:\sto\s[^.\n:]{{0,60}}?)?[ \t]{{0,4}}(?:[:=]|{_VERB})"
    rf"|\s(?:for|of|in)\s[^.\n:]{{1,60}}?\s{_VERB})"
    r"|^[ \t]{0,4}(?:\#{1,6}[ \t]{0,4}|\*\*|__)(?:the )?(?:final |correct )?answer[*_:]{0,4}[ \t]{0,4}$",
    re.IGNORECASE | re.MULTILINE,
)
_WINDOW = 600
_NOT_ITS_OWN = re.compile(  # a wrong answer is, the student's answer is, if the answer is, some would say the answer is
    r"(?:\b(?:wrong|incorrect|mistaken|tempting|student['\u2019]s|initial|previous)\s"
    r"|\b(?:if|suppose|assum(?:e|ing)|(?:(?:some|many|you|people|students)\s(?:[a-z]{1,12}\s){0,2}|one\s(?:might|may|could)\s)(?:say|think|believe|guess)"
    r"|(?:thought|guessed|assumed|believed))\s(?:that\s)?(?:the\s)?(?:final\s|correct\s)?)\Z",
    re.IGNORECASE,
)
_HEDGE = r"(?:or\s(?:[-$]{0,2}\d[\d.,/]*%?|[A-J])\)|(?:possibly|maybe|perhaps)\b|if\b[^()\n]{1,40}\)\s(?:or|and)\b)"
_COULD_BE = r"(?:could|might|may)\s(?:also\s|well\s)?be\s[-$(\\]{0,3}\d"
_ALSO = re.compile(r"(.*\S)\s\(or\s(\S{1,20})\)")
_RETRACTED = re.compile(
    r"[^.\n]{0,40}?[.!?]?(?:[ \t]{1,3}|\n|\s{1,3}(?=wait|hmm|oops|sorry|actually|correction))"
    r"(?:(?:wait|hmm|oops|sorry|actually)[,.!\u2014-]{1,3}\s)?"
    r"(?:no\s?[,.!:\u2014-]|that(?:'s|\u2019s| is) (?:wrong|not right|incorrect)|correction:|i made a mistake)"
    r"(?=(?:[^\n]{0,60}?(?:\bis|'s|\u2019s|\bbe|[:=,\u2014-]))?\s{0,2}[*$\\(]{0,3}-?(?:\d|[A-HJ]\b))",
    re.IGNORECASE,
)

# What may come before the value. Adverbs come before words as well, the rest only before numbers, maths and letters.
_ADVERB = (
    "therefore|thus|hence|consequently|accordingly|then|so|now|indeed|simply|clearly|obviously|evidently|apparently|"
    "certainly|definitely|actually|finally|ultimately|really|surely|probably|likely|presumably|maybe|perhaps|"
    "in fact|of course|again"
)
_NAMED = (
    "number|integer|value|fraction|decimal|point|pair|ordered pair|triple|interval|set|expression|equation|inequality|"
    "function|polynomial|matrix|vector|ratio|sum|product|letter|option|choice"
)
_BEFORE_VALUES = (
    "exactly|precisely|approximately|approx\\.?|about|around|roughly|just|only|also|still|always|"
    "equal to|equals|equivalent to|identical to|none other than|nothing but|a total of|going to be|(?:easily )?"
    "(?:found|calculated|computed|determined|seen|known|shown|estimated) to be|"
    "(?:given|represented|expressed|described) (?:by|as)|(?:computed|calculated|written|simplified) (?:as|to)|"
    "as follows|the following|in the (?:interval|set|range)|"
    f"(?:the |an? )?(?:correct |exact |positive |negative |real |whole )?(?:{_NAMED})s?|"
    r"all (?:real |positive )?(?:numbers |values |integers )?(?:of )?\$?[a-z]?\$? ?(?:such that|with|where|satisfying)|"
    r"\((?:in|as|after|rounded|to|approximately)\b[^()\d]{0,40}\)"
)
_SKIPPED = re.compile(
    r"[\s:*_~]{1,40}|<<[^<>\n]{0,80}>>|```[A-Za-z]{0,12}[ \t]{0,4}(?=\n)|`|<(?!/)[A-Za-z][^<>\n]{0,60}>|"
    r"\\(?:q?quad(?![A-Za-z])|[,;:! ])|\\approx(?![A-Za-z])|=(?!=)|"
    r"[\u2248}\"'\u201c\u2018\u2192\u21d2\u2705\u2714\ufe0f]"
)
_BULLET = re.compile(r"(?:\#{1,6}|>|[-+\u2022\u00b7]|\d{1,2}[.)](?=[ \t]{1,4}[-+\d$\\(*_`<\u2212]))[ \t]{1,4}")
_STEPS = re.compile(
    r"\n[ \t]{0,4}1[.)][ \t](?=[^\n]{0,400}?(?<![\\A-Za-z])[a-z]{3})[^\n]{0,400}\n"
    r"(?:[^\n]{0,400}\n){0,8}?[ \t]{0,4}2[.)][ \t]"
)
_ADVERBS = re.compile(rf"(?:,\s)?(?:{_ADVERB})(?=[\s:,*_$\\<`])[\s:,]{{0,9}}", re.IGNORECASE)
_OPENERS = re.compile(rf"(?:{_BEFORE_VALUES})(?=[\s:,*_$\\<`(])[\s:,]{{0,9}}", re.IGNORECASE)
_MOST_SKIPPED = 16

_VALUE_START = re.compile(
    r"[-+\d.$\\(\[{|\u20ac\u00a3\u00a5\u2212\u221a\u03c0\u221e]"
    r"|[A-Za-z](?:_\w|\([a-z]\))?\s{0,2}(?:[=<>\u2264\u2265]|\\[lg]e)|(?!I\s[a-z])[A-J](?![\w'])|[a-z](?![\w'])(?!\s[a-z]{2})"
)
_BLOCK = re.compile(r"\$[ \t]{0,4}\n([^$\n]{1,200})\n[ \t]{0,4}\$")
_ITEM = re.compile(r"\s{0,4}\n[ \t]{0,4}(?:[-+*\u2022\u00b7]|\d{1,2}[.)])[ \t]{1,4}(?=[-+\d$\\(\u2212]|[A-Za-z]\s?=)")
_LISTED = re.compile(r"\n[ \t]{0,4}(?:[-+*\u2022\u00b7]|\d{1,2}[.)])[ \t]{1,4}\Z")

_NOT = r"(?:(?:and|but)\s)?(?:(?:definitely|certainly|clearly)\s)?(?:not|never|hardly|by no means)\b"
_END = re.compile(rf"\n|[.](?:\s|$)|\u3002|</|,?\s(?:which|because|since|where|when)\b|[,;(\u2013\u2014]\s?\(?{_NOT}")
_CLAUSE = r"(?:it|this|that|these|we|I|you|he|she|they|there|the|so|thus|hence|therefore|as|but|making|meaning|giving)"
_EXPLAINED = re.compile(
    rf"\?(?=\s)|,?\s[(\[]?(?:{_NOT}|(?:rather than|instead of|(?<!well )as(?! well as \(?[A-J]\b)|unlike|so|after|"
    rf"obtained|rounded|but(?! (?:it|this|that|I) {_COULD_BE})|while|whereas|by|i\.e|that is|namely|"
    r"using|via|given|from|thus|hence|therefore)\b)"
    rf"|[,;]\s(?:and\s)?{_CLAUSE}\b(?!(?:\s(?:it|this|that|I))?\s{_COULD_BE})|,\s[^,\s]{{1,20}}\s(?:is|are|was|were|isn't|cannot)\b"
    rf"|;\s(?=[A-Za-z]{{2}})|\s[-\u2013\u2014]{{1,2}}\s(?!or\b|{_HEDGE})(?=[a-z]{{2}})|\s\u2014\s(?!or\b|{_HEDGE})"
    rf"|\s[(\[](?!mod\b|\\|{_HEDGE})(?=[^()\[\]]{{0,200}}(?<![\\A-Za-z])[A-Za-z]?[a-z]{{2}})"
    r"|(?<=\d)\s\((?=[^()\n]{1,40}[\u00d7*+=/])"
)
_REFUTED = re.compile(REFUTED)
_CORRECTED = re.compile(
    r"\b(?:but|rather|instead|it is|it's)\b[\s,:]{0,4}(?:(?:it is|it's|rather|is)\s)?", re.IGNORECASE
)
_ANNOUNCED = re.compile(
    r"(?:easily |then |now )?(?:as follows|the following|found|obtained|computed|calculated|derived|determined|reached|"
    r"given|shown|below|above|let(?:'s| us| me)|first,|to (?:find|solve|get|see)|we (?:need|first|know|can|start|want))"
    r"(?!\w)",
    re.IGNORECASE,
)
_COMMENTED = re.compile(
    r"(?:(?:not|very|quite|easily|now|also|indeed|both)\s)*(?:clear|obvious|easy|simple|trivial|hard|difficult|correct|"
    r"incorrect|wrong|right|verified|confirmed|checked|unique|reasonable|plausible|unclear|what|how|why|that)"
    r"(?:\s(?:to|that|from|in|of|by|if|since|as|we|and)\b.*)?",
    re.IGNORECASE | re.DOTALL,
)
_COPULA = re.compile(r"(?:\b(?:is|are|was|equals|be|has|have|gives?|gets?|makes|contains|needs|costs?)\s|=)[\s*_]{0,4}")
_PLAIN_VALUE = re.compile(r"[-\u2212]?[$€£¥]?(?:\d|\.\d)|\\\(|\$")
_WORDS = 6


def phrases(text: str) -> Iterator[tuple[int, str]]:
    """Position and value of every "the answer is ..." that has a value. Several values have commas between.

    A value is a number, maths, a letter, or up to six words. ``"the answer is not 75 but 73"`` gives 73. A phrase that
    only announces a value gives "": the value follows somewhere. One that neither has nor announces a value is omitted.

    Example:
        >>> list(phrases("The answer is therefore exactly 73 (since 68 + 5 = 73)."))
        [(4, '73')]
        >>> list(phrases("The answer is easy to find. The answer is found as follows: add."))
        [(32, '')]
    """
    for match in _PHRASE.finditer(text):
        if _NOT_ITS_OWN.search(text, max(match.start() - 60, 0), match.start()):
            continue
        rest = text[match.end() : match.end() + _WINDOW]
        value = _corrected(rest) if denied_before(text, match.start()) else _value(rest)
        if value is not None:
            yield match.start(), value


def _value(rest: str) -> str | None:
    """The value at the start of a text. "" where one is announced, None where there is none."""
    start = _skip(rest, 0, _ADVERBS)
    opened = _skip(rest, start, _OPENERS)
    steps = _STEPS.search(rest)
    if steps and steps.start() <= opened:
        return ""
    if _VALUE_START.match(rest, opened):
        end = _line_end(rest, opened)
        refuted = _REFUTED.match(rest, end)
        if refuted:
            return _corrected(rest[refuted.end() :])
        return "" if _RETRACTED.match(rest, end) else _read(rest, opened)
    denied = DENIED_FOLLOWING.match(rest, start)
    if denied and _VALUE_START.match(rest, denied.end()):
        return _corrected(rest[denied.end() :])
    if _ANNOUNCED.match(rest, start):
        return ""
    return _in_words(rest, start)


def _in_words(rest: str, start: int) -> str | None:
    """The value that a sentence gives in words, or at its end. None without one, and where the sentence denies it."""
    end = _END.search(rest, start)
    content = rest[start : end.start() if end else None].strip(" \t*_`")
    if not content or content.endswith("?") or _COMMENTED.fullmatch(content):
        return None
    value = _said(content) or (content if len(content.split()) <= _WORDS else None)
    told = without_denied(content) if value else content
    if told == content:
        return value
    return _said(told) or _corrected(rest[rest.index(content, start) + told.rindex("\0") :])


def _corrected(rest: str) -> str | None:
    """The value that a line gives in place of a denied one, such as the 73 of "75 but 73". None without one."""
    line = rest.partition("\n")[0]
    corrected = _CORRECTED.search(line)
    return _value(line[corrected.end() :]) if corrected else None


def _skip(rest: str, start: int, words: re.Pattern[str]) -> int:
    """Where the value may start: after white space, marks and these words."""
    for _ in range(_MOST_SKIPPED):
        skipped = _SKIPPED.match(rest, start) or words.match(rest, start) or _ADVERBS.match(rest, start)
        if skipped is None and rest[:start].rstrip(" \t").endswith("\n"):
            skipped = _BULLET.match(rest, start)
        if skipped is None:
            break
        start = skipped.end()
    return start


def _read(rest: str, start: int) -> str | None:
    """The value that starts here: displayed maths, the items of a list, or a part of the line."""
    block = _BLOCK.match(rest, start)
    if block:
        return block[1].strip() or None
    display = next((span for span in spans(rest) if span.start == start and _displayed(rest, span)), None)
    if display:
        return ", ".join(values(rest, display)) or None
    end = _line_end(rest, start)
    items = [rest[start:end]]
    while _LISTED.search(rest, max(start - 12, 0), start) and (item := _ITEM.match(rest, end)):
        start, end = item.end(), _line_end(rest, item.end())
        items.append(rest[start:end])
    quotes = "\"'\u201d\u2019" if rest[max(start - 1, 0)] in "\"'\u201c\u2018" else ""
    items = [_alone(_closed(_result(item.strip(" \t*_`").rstrip(quotes + ".")))) for item in items]
    return ", ".join(item for item in items if item) or None


def _displayed(rest: str, span: Span) -> bool:
    """Whether maths has a line or more of its own."""
    return not rest.startswith(("$", "\\("), span.start) or rest.startswith("$$", span.start)


def _line_end(rest: str, start: int) -> int:
    """Where a value ends that starts here: with its line, its sentence, or before an explanation."""
    ends = [found.start() for found in (_END.search(rest, start + 1), _EXPLAINED.search(rest, start + 1)) if found]
    return min([*ends, len(rest)])


def _result(value: str) -> str:
    """What comes out of a calculation in words, such as the 50% of "6 men / 12 men * 100% = 50%"."""
    before, equals, after = value.rpartition("=")
    worded = equals and before[:1].isdigit() and re.search(r"[a-z]{3}", value)
    after = after.rpartition(">>")[2].strip(" *_")  # 6*8=<<6*8=48>>48
    return after if worded and _PLAIN_VALUE.match(after) else value


def _closed(value: str) -> str:
    """Without a brace that a command around the whole phrase leaves at the end."""
    while value.endswith("}") and value.count("}") - value.count("\\}") > value.count("{") - value.count("\\{"):
        value = value[:-1].rstrip()
    return value


def _alone(value: str) -> str:
    """Without an equal value in brackets, as in "3/4 (or 0.75)"."""
    also = _ALSO.fullmatch(value)
    return also[1] if also and same_number(also[1], also[2]) else value


def _said(content: str) -> str | None:
    """The value at the end of a short sentence, such as the 34 of "the largest n is 34". None without one."""
    found = spans(content)
    for copula in reversed(list(_COPULA.finditer(content))):
        if not inside(found, copula.start()) and _PLAIN_VALUE.match(content, copula.end()):
            return _read(content, copula.end())
    return None
