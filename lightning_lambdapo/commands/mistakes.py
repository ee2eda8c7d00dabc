"""A mistake in the settings is told in one sentence. Every other error keeps its traceback."""

import argparse
import dis
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_lambdapo.commands.setting_names import KEY, classes_of, did_you_mean, help_line, lines_of, settings_of
from lightning_lambdapo.engine_settings import EngineStartError

DEBUG = "LAMBDAPO_DEBUG"
_HINT = "(--debug, or LAMBDAPO_DEBUG=1, shows the traceback.)"

_KINDS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
_RAISERS = ("lightning_lambdapo", "lightning", "jsonargparse", "peft")
_RUNNING = ("training_step", "validation_step", "test_step", "predict_step", "advance", "save_checkpoint")
#: Some settings can only be compared with the first batch, or with what is logged.
_CHECKS = ("lightning_lambdapo.checks", "lightning_lambdapo.callbacks.checkpoint")
#: Raise a RuntimeError where an earlier run's config.yaml is in the way, or where `monitor` is not logged.
_RUNTIME = ("lightning.pytorch.cli", "lightning.pytorch.callbacks.early_stopping")

_TYPE = re.compile(r"Expected an? (<class '[^']+'>|typing\.\S.*?|[\w.]+\[.*?\])(?:\. Got value: (.*))?$")
_CLASS = re.compile(r"(?:Expected a|Not a valid) (dot import path|subclass) (?:string|of \w+)(?:.*?: (.+))?$")
_FACTORY = re.compile(r"Type .* expects a function or a callable class: (.*?)(?:\. Got value: .*)?$")
_UNKNOWN = re.compile(r"unrecognized arguments: --([^=\s]+)|Subcommand '\w+' does not accept option '([^']+)'")
_PART = re.compile(r"NestedArg\(key='([^']+)'")
_NO_REASONS = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Problem with given class_path",
    "Expected a path but",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",  # also "a dict without class_path"
)
#: Where a callback could not be made. That error has no key.
_CALLBACKS = "Subtypes: [list[lightning.pytorch.callbacks.callback.Callback]"
_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dot import path": "the path of a class",
    "subclass": "the path of a class",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors name the setting and what is wrong with it, and nothing else."""

    def parse_args(self, args: Any = None, *arguments: Any, **options: Any) -> Any:
        """Remember the words, for the name of the command in an error."""
        self._words: Sequence[str] = sys.argv[1:] if args is None else args
        return super().parse_args(args, *arguments, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence and exit with code 2. The parsers of parts raise, as jsonargparse wants."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self._of_command()
        program = parser.prog.replace(" [options]", "")
        if debugging() and ex is not None:
            traceback.print_exception(ex)
        told = message if debugging() else one_sentence(message)
        if match := _UNKNOWN.match(message):
            told = told if match[1] else f"There is no setting `{match[2]}`."
            close = did_you_mean(match[1] or match[2], [action.dest for action in parser._actions])
            told += f".{close}" if close and match[1] else close
        path = next((reason.path for reason in _deepest(message)), ())
        sys.stderr.write(f"{program}: error: {told}\n{help_line(program, path, message)}\n")
        sys.exit(2)

    def _of_command(self) -> argparse.ArgumentParser:
        """The parser of the command that the words name: an error in the whole of the settings does not say it."""
        commands = [each for each in self._actions if isinstance(each, argparse._SubParsersAction)]
        words = [word for word in getattr(self, "_words", []) for each in commands if word in each.choices]
        return commands[0].choices[words[0]] if words else self


def debugging() -> bool:
    """Whether tracebacks are wanted: ``LAMBDAPO_DEBUG`` is set, or ``--debug`` was given."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


@contextmanager
def told_in_one_sentence(program: str) -> Iterator[None]:
    """Print a mistake in the settings as one sentence and exit with code 2. Other errors pass through.

    Args:
        program: what the user called, for the beginning of the line.
    """
    try:
        yield
    except Exception as error:
        if debugging() or not is_about_settings(error):
            raise
        sys.stderr.write(f"{program}: error: {one_sentence(str(error))}\n{_HINT}\n")
        sys.exit(2)


def is_about_settings(error: BaseException) -> bool:
    """Whether somebody wrote the error's sentence for a mistake in the settings.

    It is one that this package, or a library that reads settings, raises by a ``raise`` of its own before the first
    batch. A bug raises elsewhere (in torch, say), without a ``raise``, or while batches are computed. An engine starts
    with the first batch.
    """
    if isinstance(error, EngineStartError):
        return True
    place = error.__traceback__
    if place is None:
        return False
    names = [place.tb_frame.f_code.co_name]
    while place.tb_next is not None:
        place = place.tb_next
        names.append(place.tb_frame.f_code.co_name)
    raiser = str(place.tb_frame.f_globals.get("__name__", ""))
    if not isinstance(error, _KINDS):
        return isinstance(error, RuntimeError) and raiser in _RUNTIME
    running = raiser not in _CHECKS and any(name in _RUNNING for name in names)
    return raiser.partition(".")[0] in _RAISERS and _is_raise(place) and not running


def _is_raise(place: TracebackType) -> bool:
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


@dataclass
class _Reason:
    """One line of an error's tree: what is wrong with the setting at ``path``."""

    path: tuple[str, ...]
    indent: int
    text: str
    value: str | None = None


def one_sentence(message: str) -> str:
    r"""What is wrong, and with which setting, from the tree of alternatives that jsonargparse prints.

    Example:
        >>> one_sentence('Parser key "trainer.max_steps":\n  Expected a <class \'int\'>. Got value: few')
        "`trainer.max_steps` must be a whole number, got 'few'."
    """
    rivals = _deepest(message)
    if not rivals:
        return message
    best = rivals[0]
    written = next((reason for reason in rivals if not _type(reason.text)), None)
    name = _name(best.path, message) or ("trainer.callbacks" if _CALLBACKS in message else "")
    return _of_types(name, rivals) if written is None else _of_text(name, best.path, written.text, message)


def _deepest(message: str) -> list[_Reason]:
    """The reasons deepest in the tree: alternatives for one setting. None of a message without a tree."""
    if not message.startswith(("Parser key", "Does not validate", "Problem with given class_path")):
        return []
    reasons = _reasons(message)
    if not reasons:
        return []
    best = max(reasons, key=lambda reason: (len(reason.path), reason.indent))
    return [reason for reason in reasons if (reason.path, reason.indent) == (best.path, best.indent)]


def _reasons(message: str) -> list[_Reason]:
    found: list[_Reason] = []
    open_reason: _Reason | None = None
    for path, indent, bullet, text in lines_of(message):
        last, open_reason = open_reason, None
        if match := KEY.search(text):
            if match[2]:
                open_reason = _Reason((*path, match[1]), indent, match[2])
                found.append(open_reason)
        elif text.startswith("Given value:"):
            for reason in found:
                if (reason.path, reason.indent, reason.value) == (path, indent + 4, None):
                    reason.value = text.removeprefix("Given value:").strip()
        elif text.startswith(_NO_REASONS):
            continue
        elif last is not None and not bullet and indent == last.indent:
            last.text += f"\n{text}"
            open_reason = last
        else:
            open_reason = _Reason(path, indent, _FACTORY.sub(r"\1", text))
            found.append(open_reason)
    return found


def _name(path: tuple[str, ...], message: str) -> str:
    """The setting's dotted name: as it was given where it was an option, because lists have no numbers in the path."""
    name = ".".join(path)
    match = _PART.search(message.splitlines()[-1])
    given = f"{path[0]}.{match[1]}" if match and path else name
    same = [part for part in given.split(".") if not part.isdecimal() and part != "init_args"]
    return given if same == [part for part in name.split(".") if not part.isdecimal()] else name


def _of_types(name: str, reasons: list[_Reason]) -> str:
    matches = [match for reason in reasons if (match := _type(reason.text))]
    kinds = list(dict.fromkeys(_kind(match[1]) for match in matches))
    wanted = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    value: Any = next((match[2] for match in matches if match[2] is not None), reasons[0].value)
    return f"`{name}` must be {wanted}" + ("." if value is None else f", got {value!r}.")


def _type(text: str) -> re.Match[str] | None:
    return _TYPE.match(text) or _CLASS.match(text)


def _kind(written: str) -> str:
    choice = re.fullmatch(r"typing\.Literal\[(.*)\]", written)
    if choice:
        return f"one of {choice[1]}"
    plain = re.sub(r"<class '(.*)'>", r"\1", written)
    return _NAMES.get(plain, plain.rpartition(".")[2] if "[" not in plain else plain)


def _of_text(name: str, path: tuple[str, ...], text: str, message: str) -> str:
    if match := re.match(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return _no_setting(f"{match[1]}.{match[2]}", path, message)
    if match := re.match(r"unrecognized arguments: --([^=\s]+)|Option '([^']+)' is not accepted", text):
        return _no_setting(match[1] or match[2], path, message)
    if match := re.match(r"the following arguments are required: (.+)", text):
        names = [f"`{'.'.join([*path, key])}`" for key in match[1].split(", ")]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} required."
    if match := re.search(r"must include a class_path .* but got (?:NestedArg\(key=|\{'init_args': \{)'([^']+)'", text):
        return f"`{name}` needs a class_path before its `{match[1]}` can be set."
    if match := re.match(r"Expected an instantiatable class, but (?:\w+\.)*(\w+) is abstract", text):
        example = (
            " For a plain function with a weight: {class_path: lightning_lambdapo.rewards.FunctionReward, init_args: "
        )
        example += "{function: my_module.my_function, weight: 0.5}}."
        return f"`{name}` needs a class_path, because {match[1]} is abstract.{example if match[1] == 'Reward' else ''}"
    return f"`{name}`: {text}" if name else text


def _no_setting(key: str, path: tuple[str, ...], message: str) -> str:
    """The sentence about a key that the class at a path does not have."""
    name = _name((*path, *key.split(".")), message)
    before = name.removesuffix(key) if name.endswith(key) else f"{'.'.join(path)}."
    return f"There is no setting `{name}`.{did_you_mean(key, settings_of(classes_of(path, message)[1]), before)}"
