"""Imports point one way between rooms; few files may name strategies or reach into what Lightning keeps private."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_lambdapo

ROOT = Path(lightning_lambdapo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

#: The rooms from the ground up. A room imports from earlier lines alone, and from none beside it.
ROOMS = [
    {"functional"},
    {"engine_settings"},
    {"config", "datatypes"},
    {"distributed", "rewards"},
    {"policy", "checks", "checkpointing", "data"},
    {"rollout", "runs", "quickstart"},
    {"evaluation"},
    {"learning", "callbacks", "metrics"},
    {"module"},
    {"commands"},
    {"__main__", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_lambdapo":
            assert node.module is not None
            names = [node.module] if node.module != "lightning_lambdapo" else [f".{each.name}" for each in node.names]
            found |= {name.partition(".")[2] for name in names}
        elif isinstance(node, ast.Import):
            found |= {each.name.partition(".")[2] for each in node.names if each.name.startswith("lightning_lambdapo.")}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_one_way(name: str) -> None:
    own = room(ROOT / name)
    others = {module.split(".")[0] for module in imported(ROOT / name)} - {own}
    if name == "commands/compare/runs.py":
        others -= {"__main__"}  # what the processes that it starts are started as
    for other in others:
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}"


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in FILES} == set(LEVEL)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Within the rooms, too: a module is imported before whatever imports it."""
    graph = {name.removesuffix(".py").replace("/", "."): imported(ROOT / name) for name in NAMES}
    graph = {name.removesuffix(".__init__"): modules & graph.keys() for name, modules in graph.items()}
    while graph:
        free = {name for name, modules in graph.items() if not modules & graph.keys() - {name}}
        assert free, f"a circle in {sorted(graph)}"
        graph = {name: modules for name, modules in graph.items() if name not in free}


def test_what_must_not_know_of_each_other() -> None:
    for path in FILES:
        parts = {module.split(".")[0] for module in imported(path)}
        if room(path) == "rewards":
            assert not parts & {"distributed", "policy", "rollout", "module"}, path
        if room(path) == "policy":
            assert not parts & {"rewards", "module"}, path
        if room(path) in ("data", "callbacks"):
            assert not parts & {"module", "learning"}, path


def test_the_house_is_small() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 8
    for path in [*FILES, *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 410, path


def test_one_file_names_the_strategies_and_one_what_the_oldest_needs() -> None:
    """And one has a subclass, which alone needs Ray."""
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        sharding = {name for name in names if name.startswith(("DDP", "FSDP", "ModelParallel", "fully_shard"))}
        assert not sharding or path.name in ("parallel.py", "fsdp1.py", "ray_train.py"), path
        assert not any(name.startswith("FullySharded") for name in names) or path.name == "fsdp1.py", path


#: Names under which Lightning's objects go in this package.
LIGHTNINGS = {
    "trainer",
    "loop",
    "fit_loop",
    "val_loop",
    "connector",
    "strategy",
    "plugin",
    "module",
    "pl_module",
    "logger",
}


def reaches(tree: ast.AST) -> Iterator[str]:
    """What Lightning keeps private, and code uses. Methods that a class inherits are :func:`inherited`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning."):
            yield from (each.name for each in node.names if each.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in LIGHTNINGS:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner, attribute = node.args[0], node.args[1]
            private = isinstance(attribute, ast.Constant) and str(attribute.value).startswith("_")
            if private and isinstance(owner, ast.Name) and owner.id in LIGHTNINGS:
                yield ast.unparse(node)


def test_reaches_are_found() -> None:
    code = (
        "from lightning.x import _a, b\nself._c; trainer._d; self.trainer.loop._e; getattr(strategy, '_f', 0); model._g"
    )
    assert sorted(reaches(ast.parse(code))) == [
        *("_a", "getattr(strategy, '_f', 0)", "self.trainer.loop._e", "trainer._d")
    ]


def test_one_file_reaches_into_lightning() -> None:
    for path in FILES:
        found = list(reaches(ast.parse(path.read_text())))
        assert bool(found) == (path.name == "lightning_internals.py"), (path, found)


def inherited(path: Path) -> set[str]:
    """Private methods of Lightning's classes that subclasses in a file call on themselves or override."""
    dotted = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            parents = getattr(importlib.import_module(dotted), node.name).__mro__
            lightnings = {name for each in parents if each.__module__.startswith("lightning.") for name in vars(each)}
            used = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
            used |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            found |= {name for name in used & lightnings if name.startswith("_") and not name.startswith("__")}
    return found


def test_inherited_private_methods_are_listed() -> None:
    found = set().union(*(inherited(path) for path in FILES if path.name not in ("__main__.py", "ray_train.py")))
    listed = ast.get_docstring(ast.parse((ROOT / "distributed" / "lightning_internals.py").read_text()))
    assert listed is not None
    assert found == set(re.findall(r"``(_\w+)``", listed))
