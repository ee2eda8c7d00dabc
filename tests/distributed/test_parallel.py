"""Exchange of objects between ranks, and the precision of sharded weights."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import fitting
import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import on_ranks, succeed
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_lambdapo.distributed import parallel
from lightning_lambdapo.policy.model import causal_lm


def test_one_process_gathers_from_itself() -> None:
    assert parallel.gather_objects(3) == parallel.gather_on_first_rank(3) == [3]


def meet() -> None:
    distributed.init_process_group("gloo", timeout=timedelta(minutes=10))


def exchange(directory: Path, backend: str) -> None:
    """Gather in both ways, with the default backend's name as given. Writes what each rank saw."""
    meet()
    made: list[Any] = []
    new_group, gather = distributed.new_group, distributed.gather_object
    used: list[Any] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(options)
        return new_group(*arguments, **options)

    def watched(*arguments: Any, **options: Any) -> None:
        used.append(options["group"])
        gather(*arguments, **options)

    distributed.get_backend = lambda *_: cast(Any, backend)
    distributed.new_group = counted
    distributed.gather_object = watched
    mine = {"rank": parallel.rank(), "text": "x" * (1 + 1000 * parallel.rank())}
    found = {
        "all": [part["rank"] for part in parallel.gather_objects(mine)],
        "first": [len(part["text"]) for part in parallel.gather_on_first_rank(mine)],
        "again": parallel.gather_on_first_rank(parallel.rank()),
        "made": made,
        "own": used[0] is not distributed.group.WORLD,
    }
    (directory / f"{parallel.rank()}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_objects_go_to_the_first_rank_alone_and_never_over_nccl(tmp_path: Path, backend: str) -> None:
    succeed(on_ranks(2, exchange, tmp_path, backend, logs=tmp_path / "logs"))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["all"] == second["all"] == [0, 1]
    assert (first["first"], first["again"]) == ([1, 1001], [0, 1])
    assert second["first"] == second["again"] == []
    made = [{"backend": "gloo"}] if backend == "nccl" else []
    assert first["made"] == second["made"] == made, "one group, at the first exchange"
    assert first["own"] == second["own"] == (backend == "nccl")


IDS = torch.arange(24).remainder(40).view(4, 6) + 3


def loss_of(model: Any, rows: slice) -> Tensor:
    logits = model(IDS[rows], use_cache=False).logits.float()
    loss: Tensor = -logits[:, :-1].log_softmax(-1).gather(-1, IDS[rows][:, 1:, None]).mean()
    return loss


def model_of(kind: str) -> Any:
    """Full fine-tuning in float32, or a float32 adapter over a bfloat16 base."""
    if kind == "full":
        return tiny.model("llama").train()
    model = tiny.adapted("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return causal_lm(model).train()


def gradients(directory: Path, kind: str) -> None:
    """Gradients of two rows on each of two ranks, under autocast. Writes them and the dtypes met on the way."""
    meet()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    model = parallel.shard(model_of(kind), strategy, mesh)
    seen: set[str] = set()
    layer: Any = next(module for module in model.modules() if type(module).__name__.endswith("DecoderLayer"))
    layer.mlp.register_forward_pre_hook(lambda module, _: seen.update(str(p.dtype) for p in module.parameters()))
    with strategy.precision_plugin.forward_context():
        loss_of(model, slice(2 * parallel.rank(), 2 * parallel.rank() + 2)).backward()
    found, stored = {}, set()
    for name, parameter in model.named_parameters():
        stored.add(str(parameter.dtype))
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            found[name] = parameter.grad.full_tensor()
    with parallel.gathered(model):
        seen.update(str(parameter.dtype) for parameter in layer.mlp.parameters())
    if parallel.rank() == 0:
        torch.save({"gradients": found, "seen": seen, "stored": stored}, directory / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_shards_stay_in_float32_and_are_gathered_in_bfloat16(tmp_path: Path, kind: str) -> None:
    if kind == "lora" and not parallel_supports_mixed_dtypes():
        pytest.skip("FSDP2 of this torch wants weights of one dtype")
    succeed(on_ranks(2, gradients, tmp_path, kind, logs=tmp_path / "logs"))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["seen"] == {"torch.bfloat16"}
    assert found["stored"] == {"torch.float32"} | ({"torch.bfloat16"} if kind == "lora" else set())
    model = model_of(kind)
    loss_of(model, slice(None)).backward()
    exact = {
        name: parameter.grad.double() for name, parameter in model.float().named_parameters() if parameter.requires_grad
    }
    model = model_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, slice(None)).backward()
    rounded = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found["gradients"].keys() == exact.keys()
    assert {value.dtype for value in found["gradients"].values()} == {torch.float32}

    def error(gradient: dict[str, Tensor]) -> float:
        differences = torch.stack([(gradient[name].double() - value).norm() for name, value in exact.items()])
        return float(differences.norm() / torch.stack([value.norm() for value in exact.values()]).norm())

    assert error(found["gradients"]) < max(3 * error(rounded), 0.02), (error(found["gradients"]), error(rounded))


def parallel_supports_mixed_dtypes() -> bool:
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


@pytest.mark.parametrize(
    ("precision", "kind", "expected"),
    [
        ("32-true", torch.float32, None),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("16-mixed", torch.bfloat16, torch.float16),
        ("bf16-mixed", torch.uint8, None),
        ("bf16-mixed", torch.float64, None),
    ],
)
def test_where_weights_are_gathered_in_16_bits(precision: Any, kind: torch.dtype, expected: Any) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    strategy.precision_plugin = Precision()
    strategy.precision_plugin.precision = precision
    model = torch.nn.Linear(2, 2)
    model.bias = torch.nn.Parameter(torch.zeros(2, dtype=kind), requires_grad=False)
    policy = parallel._mixed_precision(model, strategy)
    assert policy.param_dtype == expected
    assert policy.reduce_dtype == (None if expected is None else torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_sharded_run_in_mixed_precision(base: str, tmp_path: Path, kind: str) -> None:
    """Rollouts and learning agree to rounding, nothing falls back, and what is trained stays in float32."""
    options: dict[str, Any] = {"how": "fsdp", "kind": kind, "validate": False}
    options["trainer"] = {"max_epochs": 1, "precision": "bf16-mixed"}
    ended = on_ranks(2, fitting.train, tmp_path, base, logs=tmp_path / "logs", **options)
    succeed(ended)
    assert not any("cannot" in each.log for each in ended)
    logged = fitting.metrics(tmp_path)
    assert 0 < logged[3, "train/sampling_drift"] < 0.05
    assert logged[3, "train/skipped_updates"] == 0
    assert logged[3, "train/grad_norm"] > 0
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.float32}
