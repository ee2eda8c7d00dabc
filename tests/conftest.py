"""Fixtures shared by the whole suite."""

import os

# Before torch is imported: one thread, so that forked and parallel test processes do not oversubscribe the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from torch import distributed


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Sharding strategies leave a process group, seeds and launchers leave environment variables."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny random Llama with its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tiny.model("llama").save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real problem files that are not part of the project, in ``LAMBDAPO_TEST_DATA`` or ``../shared/data``."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("LAMBDAPO_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real problem files at {path}; set LAMBDAPO_TEST_DATA to a directory that has them")
    return path
