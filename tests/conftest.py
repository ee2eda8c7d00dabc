"""Fixtures shared by the whole suite."""

import os

# Before torch is imported: one thread, so that forked and parallel test processes do not oversubscribe the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_gguf
from small import ROWS
from torch import cuda, distributed

pytest.register_assert_rewrite("comparing")  # it compares runs on behalf of tests, and its failures should say how


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Sharding strategies leave a process group, seeds and launchers leave environment variables."""
    with _environment_restored():
        yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """A fixture of a module is set up before those of a test, so what it leaves would outlive every test."""
    with nullcontext() if fixturedef.scope == "function" else _environment_restored():
        return (yield)


@contextmanager
def _environment_restored() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny random Llama with its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama as a GGUF file; the unpacking cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_gguf.write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def arguments(base: str, tmp_path: Path) -> list[str]:
    """A whole configuration on the command line, class paths left to their defaults."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return [
        "--seed_everything=1",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
        "--trainer.callbacks+=lightning_lambdapo.CompletionsLogger",
        f"--model.policy.model={base}",
        "--model.rollout={group_size: 2, max_new_tokens: 5}",
        f"--data.train={{path: {data}}}",
        f"--data.val={{path: {data}, limit: 6}}",
        "--data.batch_size=4",
    ]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real problem files that are not part of the project, in ``LAMBDAPO_TEST_DATA`` or ``../shared/data``."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("LAMBDAPO_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real problem files at {path}; set LAMBDAPO_TEST_DATA to a directory that has them")
    return path


@pytest.fixture(scope="session")
def shared_trials(shared_data: Path) -> Path:
    """Texts and pairs of answers, with the verdicts that they should get, beside the real problem files."""
    path = shared_data.parent / "trials"
    if not path.is_dir():
        pytest.skip(f"no trials at {path}")
    return path
