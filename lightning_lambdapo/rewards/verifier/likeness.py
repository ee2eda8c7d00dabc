r"""What math-verify does not see in two answers: words in ``\text{...}``, and the order of named values."""

import re

from lightning_lambdapo.rewards.verifier.exact import clean, quantity, same_quantity

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s{0,4}\{([^{}]{1,200})\}")
_WORD = re.compile(r"[a-z]+")
_QUALIFIERS = {"or", "not", "possibly", "maybe", "perhaps"}
_POWERS = {"squared", "cubed", "factorial"}
_OPERATIONS = {"plus", "minus", "times", "over"}  # with another word
_NAME = r"[A-Za-z](?:_(?:\w|\{\w{1,9}\}))?"
_NAMED_VALUE = re.compile(rf"({_NAME})=([^=]+)")
_NEXT_NAME = re.compile(rf"\s?(?:[,;]|\band\b)\s?(?={_NAME}=)")
_ALSO = re.compile(r"[\s(]{0,4}or\s(-?[\d.,/]{1,20}%?)[\s)]{0,4}")
_AND = re.compile(r"\s?(?:,|\band\b)\s?")


def same_number(one: str, other: str) -> bool:
    """Whether two texts are equal numbers.

    Example:
        >>> same_number("3/4", "75%"), same_number("3/4", "0.7"), same_number("x", "x")
        (True, False, False)
    """
    first, second = quantity(clean(one)), quantity(clean(other))
    return first is not None and second is not None and same_quantity(first, second)


def says_more(gold: str, answer: str) -> bool:
    r"""Whether words in an answer's ``\text{...}`` change its value, such as "or more", "squared" or "over five".

    math-verify leaves out all such words. An "or" between two values is none of them, nor are words of the gold answer.

    Example:
        >>> says_more("12", r"12 \text{ or more}"), says_more("12", r"12 \text{ more apples}")
        (True, False)
        >>> says_more("2, 3", r"2 \text{ or } 3"), says_more("12", r"12 \text{ squared}")
        (False, True)
        >>> says_more("0.75", r"\frac{3}{4} \text{ (or 0.75)}"), says_more("12", r"12 \text{ (or 13)}")
        (False, True)
    """
    known = set(_WORD.findall(gold.lower()))
    return any(_changes(answer[: group.start()], group[1], known) for group in _TEXT.finditer(answer))


def as_tuples(gold: str, answer: str) -> tuple[str, str]:
    r"""Two answers, both as tuples if one names its values, such as x=2, y=3, and the other gives them in order.

    x, y and z come in this order, other names as they are given. A set in place of named values stays one.

    Example:
        >>> as_tuples("x=2, y=3", "(3,2)"), as_tuples("a=3, b=5", "5, 3")
        (('(2,3)', '(3,2)'), ('(3,5)', '(5,3)'))
        >>> as_tuples("(2,3)", "y=3, x=2"), as_tuples("2, 3", "x=2, y=3")
        (('(2,3)', '(2,3)'), ('2, 3', 'x=2, y=3'))
    """
    if "=" in gold and "=" not in answer:
        tuples = _named(clean(gold)), _unnamed(clean(answer))
    elif "=" in answer and "=" not in gold and clean(gold).startswith("("):
        tuples = _unnamed(clean(gold)), _named(clean(answer))
    else:
        return gold, answer
    return (tuples[0], tuples[1]) if tuples[0] and tuples[1] else (gold, answer)


def _changes(before: str, text: str, known: set[str]) -> bool:
    """Whether a text, apart from known words, changes the value before it."""
    words = _WORD.findall(text.lower())
    if not before.strip() or text.split() in (["or"], ["and"]) or {"equivalently", "including", "counting"} & {*words}:
        return False
    also = _ALSO.fullmatch(text)
    if also and same_number(before, also[1]):
        return False
    changing = _QUALIFIERS.intersection(words) | _POWERS.intersection(words[:1]) | {"half"}.intersection(words[-1:])
    changing |= _OPERATIONS.intersection(words[:1]) if len(words) > 1 else set()
    return bool(changing - known)


def _named(cleaned: str) -> str | None:
    """Values with different names as a tuple. None where there are none."""
    parts = [_NAMED_VALUE.fullmatch(part) for part in _NEXT_NAME.split(cleaned)]
    pairs = [(part[1], part[2]) for part in parts if part]
    names = {name for name, _ in pairs}
    if not len(parts) == len(pairs) == len(names) > 1:
        return None
    return f"({','.join(value for _, value in (sorted(pairs) if names <= set('xyz') else pairs))})"


def _unnamed(cleaned: str) -> str | None:
    """A tuple, or values with commas between as one. None where there is neither."""
    if cleaned.startswith("(") and cleaned.endswith(")"):
        return cleaned
    listed = " and " in cleaned or ("," in cleaned and not cleaned.startswith(("\\{", "[", "(")))
    return f"({_AND.sub(',', cleaned)})" if listed else None
