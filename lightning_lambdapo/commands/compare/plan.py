"""Which runs a comparison consists of: arms of settings, times seeds, each with its own configuration."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from lightning_lambdapo.commands.compare.settings import is_part, key_parts, same_key
from lightning_lambdapo.config import Estimator

ESTIMATOR = "model.algorithm.estimator"
_PAIRWISE = ("weighting", "temperature", "score", "reduction", "center", "scale")


@dataclass(frozen=True, eq=False)
class Arm:
    """One combination of settings that is compared.

    Attributes:
        label: short and unique.
        settings: dotted key -> the value that replaces the base configuration's.
        tuned: the same for settings that are tuned for each arm. They do not tell arms apart.
    """

    label: str
    settings: dict[str, Any]
    tuned: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The label as the name of a directory."""
        return re.sub(r"[^\w.=+-]+", "_", self.label).strip("_")


@dataclass(frozen=True, eq=False)
class Run:
    """One arm with one seed, in its own directory."""

    arm: Arm
    seed: int
    directory: Path


def parse_variation(text: str) -> list[dict[str, Any]]:
    """The alternatives of a ``key=value,value`` text. ``key+key=value+value,...`` changes keys together.

    Values are YAML. Commas and pluses inside brackets, braces or quotes belong to the value.

    Raises:
        ValueError: no key, fewer than two values, not one value for each of several keys, or values that are not YAML.

    Example:
        >>> parse_variation("model.algorithm.temperature=group_std,0.1")
        [{'model.algorithm.temperature': 'group_std'}, {'model.algorithm.temperature': 0.1}]
        >>> parse_variation("a.size+b=[4, 2]+32,8+16")[0]
        {'a.size': [4, 2], 'b': 32}
    """
    name, equals, values = text.partition("=")
    keys = [key.strip() for key in name.split("+")]
    if not equals or not all(keys):
        raise ValueError(f"A variation is written key=value,value, not {text!r}.")
    alternatives = []
    for value in _split(values, ","):
        parts = _split(value, "+") if len(keys) > 1 else [value]
        if len(parts) != len(keys):
            raise ValueError(f"{text!r} changes {len(keys)} keys together and needs as many values, got {value!r}.")
        alternatives.append({key: _plain(part) for key, part in zip(keys, parts, strict=True)})
    if len(alternatives) < 2:
        raise ValueError(f"A variation needs at least two values, got {text!r}.")
    return alternatives


def parse_estimators(text: str) -> list[Any]:
    """The values of ``--estimators``: names, import paths of functions, mappings of a class and its arguments.

    Example:
        >>> parse_estimators("lambda, my_package.mine, {class_path: my_package.Mine, init_args: {power: 2}}")
        ['lambda', 'my_package.mine', {'class_path': 'my_package.Mine', 'init_args': {'power': 2}}]
    """
    return [_plain(part) for part in _split(text, ",") if part]


def parse_tuning(text: str) -> list[dict[str, Any]]:
    """The values of ``--tune``, written like a variation."""
    found = parse_variation(text)
    if any(each in found[:index] for index, each in enumerate(found)):  # also 1 and 1.0
        raise ValueError(f"--tune={text} names a value twice.")
    return found


def plan_arms(estimators: Sequence[Any], variations: Iterable[Sequence[Mapping[str, Any]]]) -> list[Arm]:
    """Every estimator with every combination of alternatives, without duplicates.

    An arm omits settings that it does not use: those of the pairwise advantage in a baseline's arm (all but the score
    in that of a function of the user's own, which receives it), temperature and score with ``weighting: uniform``,
    arguments of an estimator (``model.algorithm.estimator.init_args...``) where the arm's is not given as a class.
    Arms that become equal are listed once.

    Args:
        estimators: values of ``model.algorithm.estimator``. None keeps the base configuration's.
        variations: the alternatives of each variation.
    """
    # Without estimators an arm has no estimator key, and the base configuration's estimator decides what it uses.
    choices = [[{ESTIMATOR: name} for name in estimators] or [{}], *variations]
    found: dict[str, Arm] = {}
    for combination in itertools.product(*choices):
        settings: dict[str, Any] = {}
        for part in combination:
            settings.update(part)
        used = {key: value for key, value in settings.items() if not _idle(key, settings)}
        label = _label(used, settings, _shown)
        if label in found and found[label].settings != used:
            label = _label(used, settings, repr)
        found.setdefault(label, Arm(label, used))
    return list(found.values())


def decided(arm: Arm, key: str) -> bool:
    """Whether an arm's settings already give a dotted key its value. The argument of a class that they name is free."""
    if _idle(key, arm.settings):
        return False
    free = {name for name, value in arm.settings.items() if isinstance(value, Mapping) and not is_part(name, key)}
    return any(same_key(key, name) for name in arm.settings.keys() - free)


def candidates(arm: Arm, tuning: Sequence[Sequence[Mapping[str, Any]]]) -> list[Arm]:
    """The arm with every combination of the tuned values that it uses. Their labels are the values.

    An arm that uses none of the tuned settings is its own only candidate.
    """
    found: list[dict[str, Any]] = []
    for combination in itertools.product(*tuning):
        values = {key: value for part in combination for key, value in part.items()}
        used = {key: value for key, value in values.items() if not _idle(key, arm.settings | values)}
        if used not in found:
            found.append(used)
    labels = [_label(used, used, _shown) for used in found]
    if len(set(labels)) < len(labels):
        labels = [_label(used, used, repr) for used in found]
    return [Arm(label if used else "base", arm.settings, used) for label, used in zip(labels, found, strict=True)]


def plan_runs(arms: Sequence[Arm], seeds: Sequence[int], root: Path) -> list[Run]:
    """All runs, seed by seed, so that an unfinished comparison has pairs to compare."""
    return [Run(arm, seed, root / "runs" / arm.slug / f"seed_{seed}") for seed in seeds for arm in arms]


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for symbol in text:
        if quote:
            quote = "" if symbol == quote else quote
        elif symbol in "'\"":
            quote = symbol
        else:
            depth += (symbol in "[{(") - (symbol in "]})")
        if symbol == separator and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += symbol
    return [part.strip() for part in parts]


def _plain(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The value {text!r} of a variation is not YAML. Close its brackets and quotes.") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            return value
    return value


def _idle(key: str, settings: Mapping[str, Any]) -> bool:
    chosen = {_of_algorithm(each): value for each, value in settings.items()}
    if is_part(key, ESTIMATOR) and not is_part(ESTIMATOR, key):  # an argument of the estimator
        return not isinstance(chosen.get("estimator", {}), Mapping)
    name = _of_algorithm(key)
    if name not in _PAIRWISE:
        return False
    if chosen.get("estimator", "lambda") != "lambda":  # a function of the user's own receives the confidence
        return name != "score" or chosen["estimator"] in get_args(Estimator)
    return chosen.get("weighting") == "uniform" and name in ("temperature", "score")


def _of_algorithm(key: str) -> str | None:
    """The name of a setting of the algorithm itself. Arguments of a function of the user's own are none."""
    parts = key_parts(key)
    return parts[-1] if parts[:-1] == ["model", "algorithm"] else None


def _label(used: Mapping[str, Any], settings: Mapping[str, Any], shown: Callable[[Any], str]) -> str:
    names = _short_names(list(settings))
    parts = [
        (value if isinstance(value, str) else shown(value))
        if _last(key) in ("estimator", "weighting")
        else f"{names[key]}={shown(value)}"
        for key, value in used.items()
    ]
    if used.get(ESTIMATOR) == "lambda" and any(_last(key) == "weighting" for key in used):
        parts.remove("lambda")  # the weighting implies it
    return " ".join(parts) or "base"


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in few characters, like the label of an arm.

    Example:
        >>> settings_text({"model.optimizer.init_args.lr": 1e-4, "data.batch_size": 8})
        'lr=0.0001 batch_size=8'
    """
    return _label(settings, settings, _shown) if settings else ""


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's shortest ending that no other key has."""

    def endings(key: str) -> Iterator[str]:
        parts = key_parts(key)
        return (".".join(parts[-length:]) for length in range(1, len(parts) + 1))

    taken = {key: set(endings(key)) for key in keys}
    return {
        key: next((end for end in endings(key) if not any(end in taken[other] for other in keys if other != key)), key)
        for key in keys
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _last(key: str) -> str:
    return key.rpartition(".")[2]
