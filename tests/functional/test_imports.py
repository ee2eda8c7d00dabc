"""The mathematics needs torch alone."""

import os
import subprocess
import sys
from pathlib import Path

import lightning_lambdapo
from lightning_lambdapo import functional


def test_importing_functional_loads_torch_and_nothing_heavy() -> None:
    heavy = {"lightning", "pytorch_lightning", "transformers", "torchmetrics", "rapidfuzz", "peft"}
    code = f"import sys, lightning_lambdapo.functional; print(*{heavy} & {{*sys.modules}})"
    root = Path(lightning_lambdapo.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert result.stdout.split() == []


def test_everything_public_exists_and_is_listed_in_order() -> None:
    assert list(functional.__all__) == sorted(functional.__all__)
    assert all(hasattr(functional, name) for name in functional.__all__)
