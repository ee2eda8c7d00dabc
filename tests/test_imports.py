"""Imports point one way, and only one file names DDP or FSDP."""

import ast
from pathlib import Path

import pytest

import lightning_lambdapo

ROOT = Path(lightning_lambdapo.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))

#: Package parts from the ground up; a part may import from earlier ones alone.
LAYERS = [
    {"functional", "attention", "kernels", "estimates"},
    {"datatypes", "results"},
    {"rewards", "rollout", "policy", "packing", "parallel", "metrics"},
    {
        "config",
        "encoding",
        "scoring",
        "tally",
        "data",
        "checkpoint_files",
        "interrupts",
        "owed",
        "seeding",
        "run_files",
        "tables",
    },
    {"publishing", "quickstart"},
    {"checks", "checkpoints", "evaluation", "learning", "callbacks", "dynamic"},
    {"updating", "reports", "console"},
    {"module"},
    {"cli", "__main__"},
    {"compare", "score", "export", "inspect"},
]


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_lambdapo"):
            names = [node.module] if node.module != "lightning_lambdapo" else [f".{a.name}" for a in node.names]
            found |= {str(name).split(".")[1] for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lightning_lambdapo.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    own = part(path)
    for name in imported(path) - {own}:
        assert level[name] <= level[own], f"{own} imports {name}"
        peers = level[name] == level[own] and name not in {"packing", "parallel"}
        assert not peers or (own, name) == ("callbacks", "policy"), f"{own} imports its peer {name}"


def test_what_must_not_know_of_each_other() -> None:
    known = {str(path.relative_to(ROOT)): imported(path) for path in FILES}
    for name, parts in known.items():
        top = name.split("/")[0].removesuffix(".py")
        if top == "rewards":
            assert not parts & {"policy", "rollout", "module"}, name
        if top == "policy":
            assert not parts & {"rewards", "module"}, name
        if top in ("data", "callbacks"):
            assert not parts & {"module", "learning", "evaluation"}, name


def test_one_file_names_the_strategies() -> None:
    for path in FILES:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        sharding = {name for name in names if name.startswith(("DDP", "FSDP", "ModelParallel", "fully_shard"))}
        assert not sharding or path.name == "parallel.py", path
        assert len(path.read_text().splitlines()) <= 410, path
