"""Find the option of a multiple-choice question that a text chooses."""

import re
from collections.abc import Iterable, Iterator

_LETTER_START = re.compile(
    r"(?:(?i:option|choice|answer)\W{0,4})?(?:\(\s?([A-Ja-j])\s?\)|([A-J])(?!\w)|([A-Ja-j])(?:[.):]|$))"
)
_OPTION_START = re.compile(r"\(\s?([A-Ja-j])\s?\)(?!\s?[-+*/^=,<>])|([A-J])(?:[.)](?:\s|$)|$)")
_MARKS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s{0,4}\{|[$*_{}`]|\\[(\[\])]")
_NO_VERB = r"(?!(?:is|are|was|has|have|gives?|would|can|does)\b)"
_JOINER = r"(?:and/or|and|or else|or|as well as|plus|then|maybe|possibly|perhaps|probably)"
_LETTER = r"(?:(?i:option|choice)\s)?[\"'\u201c]?\(?[A-J]\)?[\"'\u201d]?"
_SEVERAL = re.compile(  # "C and D", "(C) (D)", "C, or maybe D", "option C or option D"; "(C) 15 or (D) 16"
    rf"(?!\(?[A-J][.)]{{1,2}}\s[A-J](?![.)\w])){_LETTER}[.)]?(?:\s?(?:[,;&/+|]|\\\\|\\q?quad)\s?|\s|(?<=\))(?=\())\(?(?:{_JOINER}\s){{0,3}}"
    rf"{_LETTER}(?:[\s.,)]{{0,2}}$|\s?[,;&/+]|\s{_JOINER}\s)"
    rf"|\(?[A-J]\)?[.)]?\s[^()]{{1,120}}?\s(?:or|and)\s\(?[A-J]\)(?=\s{_NO_VERB}|$)"
)
_OPTION = re.compile(r"\(([A-J])\)")
_OPTION_LINE = re.compile(r"^[ \t*]{0,4}(?:(?:Option|Choice) )?([A-J])[.):]\*{0,2}[ \t]", re.MULTILINE)
_LAST = re.compile(r"(?:^|[\s*:(\uff1a]|(?<=[\u3001-\u9fff])(?<!\u4e0d\u662f))([A-J])\)?[\s.*\u3002]*$")
_FIRST = re.compile(r"[\s*]{0,4}\(?([A-J])(?:\)[.:]?|[.:])?[ \t*]{0,4}(?:\n|,\s(?:because|since|as)\b)")
_AND = r"(?:[,&/]|,?\s?\b(?:and|or|nor)\b)"
_LISTED = re.compile(
    rf"(?<![A-Za-z'])\(?([A-J])[\s)*]{{0,4}}{_AND}[\s(*]{{0,4}}(?:{_JOINER}\s)?[\s(*]{{0,4}}\Z"
    rf"|\(([A-J])\)(?:\s{{0,3}}\(?|(?:\s{_NO_VERB}[^\s().]{{1,20}}){{1,4}}\s(?:or|and)\s\(?)\Z"
    r"|(?:\n|[A-J][.;]\s)[ \t*]{0,3}([A-J])(?:[.;]\s|\n)\s{0,2}\Z"
)
_GOES_ON = re.compile(rf"[)*\s]{{0,3}}{_AND}[\s(*]{{0,4}}[A-J](?![\w'])[)*.]{{0,3}}(?:\s*$|\s?{_AND})", re.MULTILINE)

_VARIABLE = re.compile(r"\)?\s{0,4}(?:[=<>+*/^-]|\\(?![)\]]))")
_NAME = r"(?i:option|choice|answer choice|answer)s?"
_RIGHT = r"(?i:correct|right|best|true|appropriate|accurate|suitable)"
_CALLED = (  # a plain "correct" may judge one of several statements
    r"(?:(?P<judged>(?i:correct|right|true)\b(?!\s(?:option|choice|answer|one)\b))|(?:correct|right|true|answer)\b|"
    r"(?:best|most \w{1,20})(?=\s(?:option|choice|answer|one|fit|description|explanation|estimate|statement)\b"
    r"|\s(?:because|since|as)\b|[.,;!*]|\s*$))"
)
_OTHERS = re.compile(
    r"(?:\bif (?:we|you|I|one)|(?<!\bI )(?<!\bwe )\b(?:would|could|might|may)|"
    r"\b(?:students|people|many|some|who|they))\s(?:[a-z]{1,12}\s)?\Z",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|assuming|assume|seems that|thought)\s(?:that\s)?\W?(?:option\s|choice\s)?\W{0,2}\Z", re.IGNORECASE
)
_CONCLUDED = re.compile(
    r"\b(?:so|therefore|thus|hence|actually|but|no|wrong)\b[,.]?\s(?:option\s|choice\s)?\W{0,2}\Z", re.IGNORECASE
)
_START = r"(?:^|[.,:;]\s|\b(?i:so|that|hence|thus|therefore|only)\s)"
_SIGNS = r"[\s*_(:$]"
_CHOSEN = re.compile(
    # Option C is correct, (C) is the right answer, so C must be correct
    rf"(?:(?:\b{_NAME}{_SIGNS}{{1,4}}|\((?=[A-Ja-j]\)))([A-Ja-j])|{_START}\**([A-J]))(?![\w'])[\s*_).:]{{0,4}}"
    r"\b(?:is|(?:must|would|has to) be|seems(?: to be)?|looks)\s"
    r"(?:(?:therefore|thus|hence|clearly|indeed|the|only)\s){0,3}"
    rf"{_CALLED}(?!-|\s(?:angle|triangle))"
    # the correct option is C, the best choice: (C)
    rf"|\b(?:{_RIGHT}|final|only|chosen)\s(?i:option|choice)\s?(?:is|:){_SIGNS}{{0,6}}"
    rf"(?:{_NAME}{_SIGNS}{{1,4}})?([A-J])(?![\w'])"
    # I choose C, we select option (C)
    rf"|\b(?i:choose|select|pick|go with){_SIGNS}{{1,4}}(?:{_NAME}{_SIGNS}{{1,4}})?([A-J])(?![\w'])",
    re.MULTILINE,
)


def final_letter_of(
    marked: Iterable[tuple[int, int, str]], told: Iterable[tuple[int, int, str]], text: str
) -> str | None:
    """As :func:`~lightning_lambdapo.rewards.verifier.extraction.final_letter`, of a text and its marked answers.

    Args:
        marked: position, rank and content of the answers in boxes, tags and lines with ``####``.
        told: the same of "the answer is ...".
        text: the text, without what it says is wrong.
    """
    letters = _lettered(marked)
    chosen = [] if letters else [(start, 0, letter, letter) for start, letter in chosen_letters(text)]
    letters += _lettered(told) + chosen
    if letters:
        *_, letter, content = max(letters)
        return None if _several(content) else letter
    options = list(_OPTION.finditer(text))
    first = first_letter(text)
    if options and not first:
        return None if _is_listed(text, options[-1].start(), options[-1][1]) else options[-1][1]
    return first or trailing_letter(text) or only_option(text)


def leading_letter(content: str, *, strict: bool = False) -> str | None:
    r"""The option letter, A to J, that a marked answer starts with.

    Args:
        content: the content of the mark.
        strict: accept only what cannot be a word or a variable: ``(C)``, ``C)``, ``C.`` or the letter alone, and no
            first one of several.

    Example:
        >>> leading_letter("(C) 15"), leading_letter(r"\textbf{b}"), leading_letter("15")
        ('C', 'B', None)
        >>> leading_letter("A cat"), leading_letter("A cat", strict=True)
        ('A', None)
    """
    if strict and _several(content):
        return None
    match = (_OPTION_START if strict else _LETTER_START).match(_unmarked(content))
    return next(letter for letter in match.groups() if letter).upper() if match else None


def chosen_letters(text: str, *, strict: bool = False) -> Iterator[tuple[int, str]]:
    """Position and letter of every sentence that chooses one option.

    Args:
        text: the text, without what it says is wrong.
        strict: omit a bare letter that may be a variable: one with a number somewhere after it.

    Example:
        >>> list(chosen_letters("Option A is wrong. Option C is correct.")), list(chosen_letters("A and C is right"))
        ([(19, 'C')], [])
        >>> list(chosen_letters("We choose C = 3.", strict=True)), list(chosen_letters("I choose C.", strict=True))
        ([], [(2, 'C')])
    """
    last_digit = max((digit.start() for digit in re.finditer(r"\d", text)), default=-1) if strict else -1
    judged: list[tuple[int, str, str]] = []
    for match in _CHOSEN.finditer(text):
        index = next(index for index in (1, 2, 4, 5) if match[index])
        bare = strict and index in (2, 5)
        if bare and (last_digit > match.end() or _VARIABLE.match(text, match.end(index))):
            continue
        if index == 5 and _OTHERS.search(text, max(match.start() - 40, 0), match.start()):
            continue
        if not _is_listed(text, match.start(index), match[index]) and not _goes_on(text, match.end(index)):
            if match["judged"]:
                judged.append(
                    (match.start(), match[index].upper(), text[max(match.start() - 24, 0) : match.start(index)])
                )
            else:
                yield match.start(), match[index].upper()
    judged = [each for each in judged if not _SUPPOSED.search(each[2])]
    if len({letter for _, letter, _ in judged}) == 1 or (judged and _CONCLUDED.search(judged[-1][2])):
        yield judged[-1][:2]


def first_letter(text: str) -> str | None:
    r"""The capital letter A to J that a text starts with, alone on its line or before a reason. None where one ends it.

    Example:
        >>> first_letter("**C**\n\nNo other (A) fits."), first_letter("(C), because (A) is small")
        ('C', 'C')
        >>> first_letter("C\n\nNo, B."), first_letter("A cat")
        (None, None)
    """
    first = _FIRST.match(text)
    if first is None or _OPTION_LINE.search(text, first.end()) or _LAST.search(_tail(text)):
        return None
    return first[1]


def trailing_letter(text: str) -> str | None:
    r"""The capital letter A to J alone at the end of a text. None where it is the last of several.

    Example:
        >>> trailing_letter("It must be\nB."), trailing_letter("... hence (C)"), trailing_letter("WEB")
        ('B', 'C', None)
        >>> trailing_letter(r"so \(\text{D}\)."), trailing_letter("either A or D")
        ('D', None)
    """
    tail = _tail(text)
    match = _LAST.search(tail)
    return match[1] if match and not _is_listed(tail, match.start(1), match[1]) else None


def only_option(text: str) -> str | None:
    r"""The letter of the option that lines of a text start with, where it is the only one.

    Example:
        >>> only_option("C. spiral cleavage"), only_option("It is\nB) 12, since ..."), only_option("A. 1\nB. 2")
        ('C', 'B', None)
    """
    letters = {match[1] for match in _OPTION_LINE.finditer(text)}
    return letters.pop() if len(letters) == 1 else None


def _lettered(marked: Iterable[tuple[int, int, str]]) -> list[tuple[int, int, str, str]]:
    """Position, rank, letter and start of the marked answers that have a letter."""
    return [
        (start, rank, letter, content[:256]) for start, rank, content in marked if (letter := leading_letter(content))
    ]


def _several(content: str) -> bool:
    """Whether a marked answer gives several letters."""
    lines = [match[1] for match in _OPTION_LINE.finditer(content)]
    return (len(lines) > 1 and lines == sorted(set(lines))) or _SEVERAL.match(_unmarked(content)) is not None


def _tail(text: str) -> str:
    return _MARKS.sub(" ", text[-64:])


def _unmarked(content: str) -> str:
    """The start of a marked answer, without commands and signs around letters."""
    return " ".join(_MARKS.sub(" ", content[:256]).split())


def _is_listed(text: str, start: int, letter: str) -> bool:
    """Whether the letter that starts here is the last of several, as in (A) or (D)."""
    listed = _LISTED.search("\n" * (start < 80) + text[max(start - 80, 0) : start])
    return listed is not None and letter not in listed.groups()


def _goes_on(text: str, end: int) -> bool:
    """Whether more letters follow the one that ends here."""
    return _GOES_ON.match(text, end, end + 40) is not None
