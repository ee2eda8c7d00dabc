"""Fixtures shared by the whole suite."""

import os

# Before torch is imported: one thread, so that forked and parallel test processes do not oversubscribe the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real problem files that are not part of the project, in ``LAMBDAPO_TEST_DATA`` or ``../shared/data``."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("LAMBDAPO_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real problem files at {path}; set LAMBDAPO_TEST_DATA to a directory that has them")
    return path
