"""Weights that are in shards are gathered for the export at the end of training."""

from pathlib import Path
from typing import cast

import pytest
import torch
from fitting import FSDP1
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from small import Rows, module, trainer
from torch.distributed.tensor import DTensor

from lightning_lambdapo import AdapterConfig, PolicyExport


@pytest.mark.parametrize("lora", [None, AdapterConfig(r=4)], ids=["full", "lora"])
def test_sharded_weights_are_gathered_for_the_export(base: str, tmp_path: Path, lora: AdapterConfig | None) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    model = module(base, lora=lora)
    trainer(tmp_path, strategy=strategy, callbacks=[PolicyExport()]).fit(model, Rows(batch_size=4))
    held = load_file(tmp_path / "export" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert held
    for name, parameter in model.policy.named_parameters():
        exported = held.get(name.replace(".default", ""))
        assert (exported is not None) == (lora is None or "lora_" in name), name
        if exported is not None:
            torch.testing.assert_close(exported, cast(DTensor, parameter).full_tensor().detach(), rtol=0, atol=0)


def test_flattened_weights_are_not_exported(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot gather the shards of FSDP1"):
        trainer(tmp_path, strategy=FSDP1(), callbacks=[PolicyExport()]).fit(module(base), Rows(batch_size=4))
