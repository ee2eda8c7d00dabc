r"""Find maths in a text: ``$...$``, ``\(...\)``, ``\[...\]``, ``$$...$$`` and environments such as ``align``."""

import re
from bisect import bisect_right
from typing import NamedTuple

_ENVIRONMENT = (
    r"\{((?:align|aligned|alignat|equation|gather|gathered|multline|eqnarray|flalign|displaymath|math|split)\*?)\}"
)
_TOKEN = re.compile(
    rf"\\\\|\\[\[\]()$]|\$\$|\$|\\begin{_ENVIRONMENT}(?:\[\w\])?|\\end{_ENVIRONMENT}|\n[ \t]{{0,20}}\n|\n"
)
_CLOSER = {"\\[": "\\]", "\\(": "\\)", "$$": "$$", "$": "$"}
_LONGEST_INLINE = 400

_COMMAND = re.compile(
    r"\\(?:begin|end)\s?\{[^{}]{0,20}\}|\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox)\s?\{[^{}]{0,200}\}|\\[A-Za-z]+"
)
_PROSE = re.compile(
    r"(?<![A-Za-z])(?!(?:sin|cos|tan|sec|csc|cot|log|exp|max|min|mod|gcd|lcm|det|lim|sqrt|pi|inf|infty|arcsin|arccos"
    r"|arctan)(?![a-z]))(?:[a-z]{3,}|(?<=\s)(?:a|an|at|by|for|in|is|of|or|to|and|per)(?=\s|\Z))"
)
_SUBSCRIPT = re.compile(r"_(?:\w|\{[^{}]{0,40}\})")
_RELATION = re.compile(
    r"[-+*/^<>=|]|\\(?:frac|dfrac|tfrac|sqrt|pi|infty|[lg]eq?|[lg]t|neq?|in|cup|cap|pm|times|cdot|varnothing|emptyset|mathbb|log|ln|sin|cos|tan|exp|sum|int|binom|begin|approx)(?![A-Za-z])|[πe∞∅√≤≥≠±]"
)
_TEXT_ONLY = re.compile(r"\s*\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s?\{([^{}]{1,200})\}[\s.,]*")
_ROW = re.compile(r"\\begin\{|\\end\{|\\\\(?:\[[^\[\]]{0,9}\])?")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z](?:_(?:\w|\{[^{}]{0,9}\}))?)\s*&?\s*=[^=]+")
_CONSEQUENCE = re.compile(r"\\(?:implies|Rightarrow|Longrightarrow|therefore|iff|Leftrightarrow)(?![A-Za-z])|[⇒∴]")
_LEADING = re.compile(
    r"(?:[&=\s~]|\\q?quad(?![A-Za-z])|\\[,;:! ]|\\(?:implies|Rightarrow|approx|therefore)(?![A-Za-z])|≈)*"
)
_LABEL = re.compile(r"\\(?:tag|label)\*?\{[^{}]{0,40}\}\s*\Z|\\(?:nonumber|notag)\s*\Z")


class Span(NamedTuple):
    """Where maths is in a text: with its delimiters, and without them."""

    start: int
    inside: int
    outside: int
    end: int


def spans(text: str) -> list[Span]:
    r"""Every piece of maths in a text, in order. Dollar signs before amounts of money are none.

    Example:
        >>> [text[span.inside : span.outside] for text in [r"$5 for one, so $x$ is \(2\)"] for span in spans(text)]
        ['x', '2']
    """
    found: list[Span] = []
    unclosed: set[str] = set()
    position = 0
    while True:
        opener = _scan(text, position, unclosed, found)
        if opener is None:
            return found
        unclosed.add(opener[0])  # read what follows it again, as what it is without this delimiter
        position = opener[1]


def _scan(text: str, position: int, unclosed: set[str], found: list[Span]) -> tuple[str, int] | None:
    """Add the maths from a position on. Returns what is opened there and never closed, and its end, or None."""
    opener = ""
    start = inside = 0
    for token in _TOKEN.finditer(text, position):
        mark = token.group()
        kind = "$" if mark == "$$" and opener == "$" else mark
        if opener and (kind == _CLOSER.get(opener) or (token[2] and opener == f"\\begin{{{token[2]}}}")):
            if opener != "$" or _inline(text, inside, token.start()):
                found.append(Span(start, inside, token.start(), token.end()))
                opener = ""
            else:
                opener, start, inside = "$", token.start(), token.end()
        elif (opener == "$" and (mark == "\n" or mark in _CLOSER or token[1])) or (
            opener in ("$", "\\(") and mark.startswith("\n") and len(mark) > 1
        ):
            opener = ""
        if not opener and (not found or found[-1].end <= token.start()):
            kind = f"\\begin{{{token[1]}}}" if token[1] else mark
            if (mark in _CLOSER or token[1]) and kind not in unclosed and not (mark == "$" and _amount(text, token)):
                opener, start, inside = kind, token.start(), token.end()
    return (opener, inside) if opener else None


def _amount(text: str, token: re.Match[str]) -> bool:
    """Whether a dollar sign follows a digit, as in 5$, and so opens nothing."""
    return token.start() > 0 and text[token.start() - 1].isdigit()


def _inline(text: str, inside: int, outside: int) -> bool:
    """Whether what is between two dollar signs on one line is maths, and not the way from one amount to another."""
    content = text[inside:outside]
    if not content.strip() or len(content) > _LONGEST_INLINE or text[outside + 1 : outside + 2].isdigit():
        return False
    if content[0].isspace() != content[-1].isspace() and not re.search(r"[\\=^]", content):
        return False
    return _PROSE.search(_COMMAND.sub(" ; ", content)) is None


def values(text: str, span: Span) -> list[str]:
    r"""What a piece of maths gives as the answer: the last row of several, or all rows where each names a variable.

    Example:
        >>> def of(text):
        ...     return values(text, spans(text)[0])
        >>> of(r"\[ x + 3 = 8 \implies x = 5. \]"), of(r"\begin{align} t &= 3 + 4 \\ &= 7 \end{align}")
        (['x = 5'], ['7'])
        >>> of(r"\[ \begin{aligned} x &= 3 \\ y &= 4 \end{aligned} \]")
        ['x &= 3', 'y &= 4']
    """
    rows = [row for row in map(_bare, _rows(text[span.inside : span.outside])) if row]
    names = [_ASSIGNMENT.fullmatch(row) for row in rows]
    if all(names) and len({name[1] for name in names if name}) == len(rows):
        return rows
    return rows[-1:]


def _rows(content: str) -> list[str]:
    """The rows of displayed maths, without an environment around them."""
    content = content.strip()
    while (match := re.match(rf"\\begin{_ENVIRONMENT}(?:\[\w\])?", content)) and content.endswith(
        f"\\end{{{match[1]}}}"
    ):
        content = content[match.end() : -len(f"\\end{{{match[1]}}}")].strip()
    rows, depth, start = [], 0, 0
    for mark in _ROW.finditer(content):
        if mark.group().startswith("\\\\") and depth == 0:
            rows.append(content[start : mark.start()])
            start = mark.end()
        depth += {"\\b": 1, "\\e": -1}.get(mark.group()[:2], 0)
    return [*rows, content[start:]]


def _bare(row: str) -> str:
    """A row without what leads to it, and without what labels or ends it."""
    row = _LABEL.sub("", row.strip())
    for consequence in list(_CONSEQUENCE.finditer(row))[::-1]:
        if row[consequence.end() :].strip(" \t\n.,;"):
            row = row[consequence.end() :]
            break
    leading = _LEADING.match(row)
    return (row[leading.end() :] if leading else row).strip().rstrip(".,;").strip()


def has_value(content: str, *, closing: bool) -> bool:
    r"""Whether maths gives a value: a number anywhere, or at the end of a text any expression that is no mere name.

    Example:
        >>> [has_value(content, closing=True) for content in ("x+y", "\\sqrt{2}", "n", "ABC", "f(x)", "P_1")]
        [True, True, False, False, False, False]
        >>> has_value("x+y", closing=False), has_value("x=2", closing=False)
        (False, True)
    """
    plain = _SUBSCRIPT.sub("", content)
    if re.search(r"\d", plain) or re.search(r"\\(?:pi|infty|emptyset|varnothing)(?![A-Za-z])|[π∞∅]", plain):
        return True
    return closing and (_RELATION.search(plain) is not None or _TEXT_ONLY.fullmatch(plain) is not None)


def inside(found: list[Span], position: int) -> bool:
    """Whether a position is in one of these pieces of maths, which are in order."""
    index = bisect_right([span.start for span in found], position)
    return index > 0 and position < found[index - 1].end
