"""What the README shows works as it is written."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_lambdapo.data import PRESETS, LambdaPODataModule

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_a_script(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code)
    result = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert 0.0 <= float(re.findall(r"[\d.]+", result.stdout)[-1]) <= 1.0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("code", blocks("python"))
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
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LambdaPODataModule, "data")
    parsed = parser.parse_object(yaml.safe_load(code))
    assert parsed.data.train.preset == "gsm8k"


def test_commands_name_files_that_exist() -> None:
    commands = "\n".join(blocks("bash"))
    assert len(re.findall(r"^python3 -m venv", commands, re.MULTILINE)) == 2
    for name in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / name).exists()
    last = blocks("bash")[1].strip().split(" && ")
    ci = (ROOT / ".ci" / "run").read_text()
    assert last[-1] in ci.splitlines()[-1]
    assert "-e '.[dev]'" in last[-2]
    assert "-e '.[dev]'" in ci


def test_every_preset_is_listed() -> None:
    for name in ("arithmetic", *PRESETS):
        assert f"`{name}`" in README
