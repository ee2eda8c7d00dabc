"""What a test or a fixture leaves in the environment does not reach the next test.

Lightning's launcher leaves ``LOCAL_RANK``. A program started with it waits for other ranks that nobody starts.
"""

import os

import pytest


@pytest.fixture(scope="module")
def left_by_a_module() -> str:
    os.environ["LAMBDAPO_TEST_LEFT_BY_A_MODULE"] = "1"
    return "made"


def test_a_fixture_of_a_module_leaves_nothing(left_by_a_module: str) -> None:
    assert left_by_a_module == "made"
    assert "LAMBDAPO_TEST_LEFT_BY_A_MODULE" not in os.environ
    os.environ["LAMBDAPO_TEST_LEFT_BY_A_TEST"] = "1"


def test_nor_does_a_test() -> None:
    assert "LAMBDAPO_TEST_LEFT_BY_A_TEST" not in os.environ
