"""What the documents show works as it is written."""

import dataclasses
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from lightning_lambdapo import LambdaPOModule, config
from lightning_lambdapo.checkpointing import release_0_1
from lightning_lambdapo.commands import score
from lightning_lambdapo.commands.compare import command
from lightning_lambdapo.commands.compare.plan import plan_runs
from lightning_lambdapo.commands.compare.runs import prepare
from lightning_lambdapo.commands.main import COMMANDS, LambdaPOCLI
from lightning_lambdapo.data import PRESETS, LambdaPODataModule
from lightning_lambdapo.runs.files import load_yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        ".github/CONTRIBUTING.md",
        "configs/evidence/README.md",
        "tests/README.md",
        "tests/benchmarks/README.md",
        "lightning_lambdapo/rewards/README.md",
        "lightning_lambdapo/data/README.md",
        "lightning_lambdapo/evaluation/README.md",
        "lightning_lambdapo/policy/README.md",
        "lightning_lambdapo/rollout/README.md",
        "lightning_lambdapo/distributed/README.md",
        "lightning_lambdapo/functional/README.md",
        "lightning_lambdapo/commands/compare/README.md",
    )
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
README = TEXTS["README.md"]
#: Documents whose Python runs everywhere. That for Ray runs in distributed/test_ray_train.
SCRIPTS = [name for name in TEXTS if name != "lightning_lambdapo/distributed/README.md"]
#: Where a relative path in a document may start: the repository, the package, its tests, the document's own directory.
STARTS = (ROOT, ROOT / "lightning_lambdapo", ROOT / "tests")
#: Directories that commands of the documents make.
MADE = ("lightning_logs/", "policies/", "ablation/")
SECTIONS = {
    "policy": config.PolicyConfig,
    "lora": config.AdapterConfig,
    "rollout": config.RolloutConfig,
    "validation": config.EvaluationConfig,
    "algorithm": config.AlgorithmConfig,
    "performance": config.PerformanceConfig,
}

#: The module that the examples call the user's own.
OWN = """
def above_median(rewards, confidence, valid): ...
mine = above_median
class Clipped:
    def __init__(self, limit: float = 1.0): ...
    def __call__(self, rewards, confidence, valid): ...
"""


def blocks(language: str, *names: str) -> list[str]:
    texts = [TEXTS[name] for name in names or TEXTS]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[list[str]]:
    """The words of every command in a bash block, with the values of the block's own variables."""
    found = []
    for block in blocks("bash"):
        values = dict(re.findall(r"^(\w+)=(\S+)$", block, re.MULTILINE))
        for line in block.replace("\\\n", " ").splitlines():
            words = [
                re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), word)  # noqa: B023
                for word in shlex.split(line, comments=True)
            ]
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            found.append(words)
    return found


def own_commands() -> list[list[str]]:
    """What follows ``lambdapo``, or ``-m lightning_lambdapo``, in every command that has it."""
    starts = ("lambdapo", "lightning_lambdapo")
    return [
        words[index + 1 :] for words in commands() for index, word in enumerate(words) if word in starts and index < 6
    ]


class Parsed(LambdaPOCLI):
    """Parses a command line with its configuration, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Leave the threads alone."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _set_seed(self) -> None:
        """Seed nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def parse(args: list[str]) -> None:
    """Parse what a command of Lightning's gets, as ``main`` does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        _parse(args)


def _parse(args: list[str]) -> None:
    Parsed(
        LambdaPOModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_kwargs={"exit_on_error": False},
        args=args,
    )


@pytest.mark.parametrize("code", blocks("python", *SCRIPTS))
def test_python_runs_as_a_script(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert 0.0 <= float(re.findall(r"[\d.]+", result.stdout)[-1]) <= 1.0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("code", blocks("python", *SCRIPTS))
def test_python_runs_in_a_notebook(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # jupyter warns of its own change to these directories
    for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        monkeypatch.setenv(f"JUPYTER_{name}", str(tmp_path / name))
    v4: Any = nbformat.v4
    cells = [v4.new_code_cell(source) for source in (code, "import sys; print(sys.executable)")]
    notebook = v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert 0.0 <= float(re.findall(r"[\d.]+", printed[0])[-1]) <= 1.0
    assert printed[1].strip() == sys.executable
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.outputs)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_parses(code: str) -> None:
    given = yaml.safe_load(code)
    parser = ArgumentParser(exit_on_error=False)
    if "data" in given:
        parser.add_class_arguments(LambdaPODataModule, "data")
    if "model" in given:
        parser.add_class_arguments(LambdaPOModule, "model")
        given["model"]["policy"] = {"model": "builtin:arithmetic"}
    parsed = parser.parse_object(given)
    assert "data" not in given or parsed.data.train.preset == "gsm8k"


def test_there_are_python_and_yaml_examples() -> None:
    assert len(blocks("python", "README.md")) == 1
    assert len(blocks("yaml", "lightning_lambdapo/data/README.md")) == 1


def test_set_up_takes_two_commands() -> None:
    found = "\n".join(blocks("bash", "README.md"))
    assert len(re.findall(r"^python3 -m venv", found, re.MULTILINE)) == 2
    last = blocks("bash", "README.md")[1].strip().split(" && ")
    ci = (ROOT / ".ci" / "run").read_text()
    assert f"    {last[-1]} -q" in ci.splitlines()
    assert "-e '.[dev]'" in last[-2]
    assert "-e '.[dev]'" in ci


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 250
    assert all(len(line) <= 142 for line in lines if not line.startswith("|"))


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[name]):
        assert (ROOT / name).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name: str) -> None:
    starts = (*STARTS, (ROOT / name).parent)
    text = re.sub(r"\]\([^)]*\)", "]", TEXTS[name])
    for path in set(re.findall(r"[\w.-][\w./-]*/[\w./-]*\.(?:py|yaml|tsv|md|png)\b", text)):
        if not path.startswith(MADE):
            assert any((start / path).exists() for start in starts), path
    for path in set(re.findall(r"(?<![\w./-])\w+\.py\b", text)):
        assert any(any(ROOT.glob(f"{top}/**/{path}")) for top in ("tests", "lightning_lambdapo", "configs")), path
    for path in set(re.findall(r"`((?:\w+/)+)`", text)):
        if not path.startswith(("lightning_logs", "checkpoints", "export", "val", "test", "train")):
            assert any((start / path).is_dir() for start in starts), path


@pytest.mark.parametrize("name", TEXTS)
def test_settings_that_are_named_exist(name: str) -> None:
    found = re.findall(rf"`(?:--model\.)?({'|'.join(SECTIONS)})\.(\w+)(?![\w/.])", TEXTS[name])
    for section, key in found:
        if (section, key) == ("rollout", "share_prompts") or (section, key) == ("policy", "onednn"):
            assert f"{section}.{key}" in release_0_1.MOVED_SETTINGS  # named as what they were in release 0.1
        else:
            assert key in {each.name for each in dataclasses.fields(SECTIONS[section])}, f"{section}.{key}"


def test_commands_are_found() -> None:
    names = {words[0] for words in own_commands()}
    assert names >= {"fit", "test", "predict", *COMMANDS}


@pytest.mark.parametrize(
    "words", [words for words in own_commands() if words[0] in ("fit", "validate", "test", "predict")], ids=" ".join
)
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse([word for word in words if not word.startswith("--ckpt_path=")])


@pytest.mark.parametrize("words", [words for words in own_commands() if words[0] == "compare"], ids=" ".join)
def test_comparisons_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value that is varied or tuned occurs in a run that ``fit`` takes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "configs" / "evidence"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(OWN)
    options, others = command._parser().parse_known_args(words[1:])
    options.output = tmp_path
    arms = command._arms(options, others)
    tuning = command._tuning(options, arms, others)
    final = arms if tuning is None else tuning.untuned
    runs = [*([] if tuning is None else tuning.runs), *plan_runs(final, [1], tmp_path)]
    seen: set[str] = set()
    for run in runs:
        values = {f"{key}={value}" for key, value in (run.arm.settings | run.arm.tuned).items()}
        if values - seen:
            parse(prepare(run, load_yaml(options.config[0]), others)[:-1])  # without --ckpt_path
        seen |= values


@pytest.mark.parametrize("words", [words for words in own_commands() if words[0] == "score"], ids=" ".join)
def test_judging_again_parses(words: list[str]) -> None:
    score._parser().parse_args(words[1:])


def test_every_preset_is_listed() -> None:
    for name in ("arithmetic", *PRESETS):
        assert f"| `{name}` |" in TEXTS["lightning_lambdapo/data/README.md"]


def test_every_switch_is_listed() -> None:
    for each in dataclasses.fields(config.PerformanceConfig):
        assert f"| `performance.{each.name}` |" in TEXTS["tests/benchmarks/README.md"]
