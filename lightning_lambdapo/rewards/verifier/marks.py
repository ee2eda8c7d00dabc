r"""Find marked answers: ``\boxed{...}``, lines with ``####``, and ``<answer>`` tags."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

_GROUP = r"\{[^{}]{0,200}(?:\{[^{}]{0,200}\}[^{}]{0,200}){0,8}\}"
_PART = rf"\s{{0,2}}(?:{_GROUP}|[0-9A-Za-z])"
_TERM = (
    rf"\\[dtc]?frac(?![A-Za-z])(?:{_PART}){{2}}"
    rf"|\\sqrt(?![A-Za-z])(?:\[[^\[\]{{}}]{{0,20}}\])?{_PART}"
    r"|\\(?!(?:[dtc]?frac|sqrt|boxed|fbox|left|right|begin|end|q?quad|item|par)(?![A-Za-z]))"
    rf"[A-Za-z]{{1,20}}(?:\s?{_GROUP}){{0,2}}"
    rf"|(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|[\^_](?:{_GROUP}|[0-9A-Za-z])"
)
# What LaTeX boxes without braces, read as its author meant it: \boxed 12, \boxed -3, \boxed\frac12, \boxed x.
_BARE = rf"[-+]?\s?(?:(?:{_TERM})(?:{_TERM}|[A-Za-z](?![A-Za-z])){{0,6}}|[A-Za-z](?!\s?[A-Za-z]))(?:\s?\\?%)?"
_BRACES = re.compile(
    rf"\\(?:boxed|fbox)\s{{0,4}}\{{|\\(?:boxed|fbox)(?![A-Za-z])\s{{0,4}}(?P<bare>{_BARE})|\\[{{}}]|[{{}}]"
)
_BOXES = re.compile(rf"\\boxed(?:\s{{0,4}}\{{|(?![A-Za-z])\s{{0,4}}(?:{_BARE}))")
_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_THOUGHT = re.compile(r"<(/?)(?:think|thinking|thoughts?|reasoning)>", re.IGNORECASE)

_LOOSE = re.compile(
    r"\\(?:text|textbf|mathrm|mbox)\s?\{\s{0,4}(,?\s?(?:and|or)?)\s{0,4}\}"
    r"|\$|\\[()\[\],;:! ]|\\q?quad(?![A-Za-z])|[&~*]"
)
_VARIABLE = r"[A-Za-z](?:_(?:\w|\{\w{1,9}\}))?(?:\([A-Za-z]\))?"
_JOINT = re.compile(rf"(?:(?:[,;]|,?\s?\b(?:and|or)\b)\s?(?P<name>{_VARIABLE}\s?=)?)?")
_NAMED = re.compile(rf"(?<![\w\\])({_VARIABLE})\s{{0,2}}=[\s$]{{0,2}}\Z")
_NOTHING = re.compile(r"(?:\s|\n[ \t]{0,4}(?:[-+\u2022]|\d{1,2}[.)])|\\\\|[.,;])*")
_EQUATION = re.compile(rf"\s{{0,4}}({_VARIABLE})\s{{0,4}}=")
_LONGEST_JOINT = 60


def spoken(text: str) -> str:
    """What a text says outside its thoughts: after the last ``</think>``, and before a ``<think>`` that is not closed.

    ``<thinking>``, ``<thought>`` and ``<reasoning>`` count as well.

    Example:
        >>> spoken("<think>4 or 5?</think>It is 5."), spoken("<think>maybe 4"), spoken("It is 5.")
        ('It is 5.', '', 'It is 5.')
    """
    start, opened = 0, None
    for tag in _THOUGHT.finditer(text):
        if tag[1]:
            start, opened = tag.end(), None
        elif opened is None:
            opened = tag.start()
    return text[start:opened]


def boxed(text: str) -> list[tuple[int, str]]:
    r"""Position and content of every ``\boxed{...}`` with balanced braces, in the order in which they close.

    As in LaTeX, a number, a letter or a command may be boxed without braces.

    Example:
        >>> boxed(r"\boxed{1} or \boxed{\frac{1}{2}} or \boxed{3")
        [(0, '1'), (13, '\\frac{1}{2}')]
        >>> boxed(r"\boxed 9, \boxed\frac12, \boxed")
        [(0, '9'), (10, '\\frac12')]
    """
    return list(iter_boxed(text))


def iter_boxed(text: str) -> Iterator[tuple[int, str]]:
    """Like :func:`boxed`, but one at a time, because the contents of deeply nested boxes add up."""
    return ((start, text[inside:outside].strip()) for start, inside, outside, _ in _boxes(text))


def count_boxes(text: str) -> int:
    r"""How many ``\boxed`` a text opens, closed or not.

    Example:
        >>> count_boxes(r"\boxed{1}, \boxed 2, \boxed{3"), count_boxes(r"with \boxed")
        (3, 0)
    """
    return sum(1 for _ in _BOXES.finditer(text))


def last_box(text: str) -> tuple[int, str] | None:
    r"""Position and content of the last box, or of several boxes that are one answer, with commas between.

    Boxes are one answer where there is nothing between them but a comma, "and" or "or". A name that is given to each
    of them, such as the k of ``k = \boxed{12}``, becomes part of the answer where the names differ.

    Example:
        >>> last_box(r"The roots are \boxed{3} and \boxed{8}."), last_box(r"\boxed{8}? No, it is \boxed{3}.")
        ((28, '3, 8'), (21, '3'))
        >>> last_box(r"$k=\boxed{12}$ and $m=\boxed{5}$")
        (22, 'k=12, m=5')
    """
    starts: dict[int, tuple[int, int, int]] = {}
    last: tuple[int, int, int] | None = None
    for start, inside, outside, end in _boxes(text):
        if text[inside:outside].strip():
            starts[end] = (start, inside, outside)
            last = max(last or (start, inside, outside), (start, inside, outside))
    if last is None:
        return None
    ends = sorted(starts)
    boxes = [last]
    while before := bisect_right(ends, boxes[0][0]):
        previous = starts[ends[before - 1]]
        gap = text[ends[before - 1] : boxes[0][0]]
        if not _joined(gap) and not (_blank(gap) and _named_apart(text, previous, boxes[0])):
            break
        boxes.insert(0, previous)
    contents = [text[inside:outside].strip() for _, inside, outside in boxes]
    names = [_NAMED.search(text[max(start - 24, 0) : start]) for start, _, _ in boxes]
    if all(names) and len({name[1] for name in names if name}) > 1:
        contents = [f"{name[1]}={content}" for name, content in zip(names, contents, strict=True) if name]
    return last[0], ", ".join(dict.fromkeys(contents))


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


def _boxes(text: str) -> Iterable[tuple[int, int, int, int]]:
    """Start, start of the content, its end, and end of every box, in the order in which they close."""
    opened: list[re.Match[str]] = []
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace == "}" and opened:
            start = opened.pop()
            if len(start.group()) > 1:
                yield start.start(), start.end(), match.start(), match.end()
        elif match["bare"]:
            yield match.start(), match.start("bare"), match.end(), match.end()
        elif brace == "{" or len(brace) > 2:
            opened.append(match)


def _joined(gap: str) -> bool:
    """Whether what is between two boxes makes one answer of them."""
    if len(gap) > _LONGEST_JOINT:
        return False
    between = " ".join(_LOOSE.sub(r" \1 ", gap).split())
    return _JOINT.fullmatch(between) is not None and bool(between or "\n" not in gap)


def _blank(gap: str) -> bool:
    """Whether nothing but white space, marks of a list and ends of rows is between two boxes."""
    return len(gap) <= _LONGEST_JOINT and _NOTHING.fullmatch(_LOOSE.sub(" ", gap.replace("\\\\", " "))) is not None


def _named_apart(text: str, first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
    """Whether two boxes hold equations for different variables, such as k=12 and m=5."""
    names = [_EQUATION.match(text, inside, outside) for _, inside, outside in (first, second)]
    return names[0] is not None and names[1] is not None and names[0][1] != names[1][1]
