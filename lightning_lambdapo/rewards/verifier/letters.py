"""Find the option of a multiple-choice question that a text chooses."""

import re
from collections.abc import Iterable, Iterator

_LETTER_START = re.compile(
    r"(?:(?i:option|choice|answer)\W{0,4})?(?:\(\s?([A-Ja-j])\s?\)|([A-J])(?!\w)|([A-Ja-j])(?:[.):]|$))"
)
_OPTION_START = re.compile(r"\(\s?([A-Ja-j])\s?\)(?!\s?[-+*/^=,<>])|([A-J])(?:[.)](?:\s|$)|$)")
_MARKS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s{0,4}\{|[$*_{}`]|\\[(\[\])]")
_SEVERAL = re.compile(r"\(?[A-J]\)?(?:\s?[,&/]\s?|,?\s(?:and|or)\s)\(?[A-J]\)?(?:[\s.,]?$|\s?[,&/]|\s(?:and|or)\s)")
_OPTION = re.compile(r"\(([A-J])\)")
_OPTION_LINE = re.compile(r"^[ \t*]{0,4}(?:(?:Option|Choice) )?([A-J])[.):]\*{0,2}[ \t]", re.MULTILINE)
_LAST = re.compile(r"(?:^|[\s*:(])([A-J])\)?[\s.*]*$")
_AND = r"(?:[,&/]|,?\s?\b(?:and|or|nor)\b)"
_LISTED = re.compile(rf"(?<![A-Za-z'])\(?([A-J])[\s)*]{{0,4}}{_AND}[\s(*]{{0,4}}(?:(?:or|and|maybe)\s)?[\s(*]{{0,4}}\Z")
_GOES_ON = re.compile(rf"[)*\s]{{0,3}}{_AND}[\s(*]{{0,4}}[A-J](?![\w'])[)*.]{{0,3}}(?:\s*$|\s?{_AND})", re.MULTILINE)

_VARIABLE = re.compile(r"\)?\s{0,4}(?:[=<>+*/^-]|\\(?![)\]]))")
_NAME = r"(?i:option|choice|answer choice|answer)s?"
_RIGHT = r"(?i:correct|right|best|true|appropriate|accurate|suitable)"
_START = r"(?:^|[.,:;]\s|\b(?i:so|that|hence|thus|therefore|only)\s)"
_SIGNS = r"[\s*_(:$]"
_CHOSEN = re.compile(
    # Option C is correct, (C) is the right answer, so C must be correct
    rf"(?:(?:\b{_NAME}{_SIGNS}{{1,4}}|\((?=[A-Ja-j]\)))([A-Ja-j])|{_START}\**([A-J]))(?![\w'])[\s*_).:]{{0,4}}"
    r"\b(?:is|(?:must|would|has to) be|seems(?: to be)?|looks)\s"
    r"(?:(?:therefore|thus|hence|clearly|indeed|also|the|only|most)\s){0,3}"
    rf"(?:{_RIGHT}|answer)\b(?!-|\s(?:angle|triangle))"
    # the correct option is C, the best choice: (C)
    rf"|\b(?:{_RIGHT}|final|only|chosen)\s(?i:option|choice)\s?(?:is|:){_SIGNS}{{0,6}}"
    rf"(?:{_NAME}{_SIGNS}{{1,4}})?([A-J])(?![\w'])"
    # I choose C, we select option (C)
    rf"|\b(?i:choose|select|pick|go with){_SIGNS}{{1,4}}(?:{_NAME}{_SIGNS}{{1,4}})?([A-J])(?![\w'])",
    re.MULTILINE,
)


def final_letter_of(marked: Iterable[tuple[int, int, str]], text: str) -> str | None:
    """As :func:`~lightning_lambdapo.rewards.verifier.extraction.final_letter`, of a text and its marked answers.

    Args:
        marked: position, rank and content of the marked answers.
        text: the text, without what it says is wrong.
    """
    letters = [
        (start, rank, letter, content[:256]) for start, rank, content in marked if (letter := leading_letter(content))
    ]
    letters += ((start, 0, letter, letter) for start, letter in chosen_letters(text))
    if letters:
        *_, letter, content = max(letters)
        return None if _SEVERAL.match(_unmarked(content)) else letter
    options = list(_OPTION.finditer(text))
    if options:
        return None if _is_listed(text, options[-1].start(), options[-1][1]) else options[-1][1]
    return trailing_letter(text) or only_option(text)


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
    for match in _CHOSEN.finditer(text):
        index = match.lastindex or 0
        bare = strict and index in (2, 4)
        if bare and (last_digit > match.end() or _VARIABLE.match(text, match.end(index))):
            continue
        if not _is_listed(text, match.start(index), match[index]) and not _goes_on(text, match.end(index)):
            yield match.start(), match[index].upper()


def trailing_letter(text: str) -> str | None:
    r"""The capital letter A to J alone at the end of a text. None where it is the last of several.

    Example:
        >>> trailing_letter("It must be\nB."), trailing_letter("... hence (C)"), trailing_letter("WEB")
        ('B', 'C', None)
        >>> trailing_letter(r"so \(\text{D}\)."), trailing_letter("either A or D")
        ('D', None)
    """
    tail = _MARKS.sub(" ", text[-64:])
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


def _unmarked(content: str) -> str:
    """The start of a marked answer, without commands and signs around letters."""
    return " ".join(_MARKS.sub(" ", content[:256]).split())


def _is_listed(text: str, start: int, letter: str) -> bool:
    """Whether the letter that starts here is the last of several, as in (A) or (D)."""
    listed = _LISTED.search(text[max(start - 24, 0) : start])
    return listed is not None and listed[1] != letter


def _goes_on(text: str, end: int) -> bool:
    """Whether more letters follow the one that ends here."""
    return _GOES_ON.match(text, end, end + 40) is not None
