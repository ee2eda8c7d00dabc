"""Checkpoints are written whole or not at all, and nothing but a whole one of this policy is loaded."""

import errno
import os
import pickletools
import resource
import signal
from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from comparing import assert_same_run, same
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, model_parallel
from ranks import on_ranks, succeed
from small import Rows, equal, module, trainer, weights

from lightning_lambdapo import AdapterConfig, LambdaPOModule, RolloutCheckpoint
from lightning_lambdapo.checkpointing.files import CheckpointError, read_header

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Touch:
    """Makes a file when it is unpickled: what a malicious pickle could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def good(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint after two steps."""
    path = tmp_path_factory.mktemp("good")
    callback = RolloutCheckpoint(every_n_rollouts=2, dirpath=path)
    settings: Any = {"callbacks": [callback], "enable_checkpointing": True, "max_steps": 2}
    trainer(path, **settings).fit(module(base, lora=AdapterConfig(r=4)), Rows(batch_size=4))
    return path / "last.ckpt"


@pytest.fixture(scope="module")
def shards(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards."""
    path = tmp_path_factory.mktemp("shards")
    callback = RolloutCheckpoint(every_n_rollouts=2, dirpath=path)
    settings: Any = {"callbacks": [callback], "enable_checkpointing": True, "max_steps": 2}
    trainer(path, strategy=sharding(), **settings).fit(module(base, lora=AdapterConfig(r=4)), Rows(batch_size=4))
    torch.distributed.destroy_process_group()
    return path / "last.ckpt"


def sharding() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=True)


def damage(good: Path, bad: Path, kind: str, evidence: Path) -> None:
    """Write a checkpoint that is bad in some way."""
    data = good.read_bytes()
    held = torch.load(good, weights_only=True)
    raw = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"no checkpoint at all"}
    objects: dict[str, Any] = {
        "tensor": torch.zeros(3),
        "foreign": {name: value for name, value in held.items() if name != "lambdapo"},
        "newer": held | {"lambdapo": held["lambdapo"] | {"version": 99}},
        "weights": held | {"state_dict": {}},
        "malicious": held | {"extra": Touch(evidence)},
    }
    if kind in raw:
        bad.write_bytes(raw[kind])
    elif kind in objects:
        torch.save(objects[kind], bad)


KINDS = {
    "truncated": "truncated, damaged or not a checkpoint",
    "empty": "truncated, damaged or not a checkpoint",
    "text": "truncated, damaged or not a checkpoint",
    "missing": "there is no such file",
    "tensor": "it holds Tensor",
    "foreign": "not a checkpoint of LambdaPOModule",
    "newer": "format version 99, this release reads 1",
    "weights": "28 trainable tensors are missing",
    "malicious": r"more than tensors and plain data \(posix.mkdir\)",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_bad_file_is_refused_by_name_before_anything_is_loaded(
    base: str, tmp_path: Path, good: Path, kind: str, strategy: str
) -> None:
    bad, evidence = tmp_path / "bad.ckpt", tmp_path / "evidence"
    damage(good, bad, kind, evidence)
    message = rf"The checkpoint .*bad\.ckpt cannot be used: .*{KINDS[kind]}"
    model = module(base, lora=AdapterConfig(r=4))
    model.configure_model()
    before = weights(model)
    chosen: Any = {"strategy": sharding()} if strategy == "fsdp" else {}
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path, **chosen).fit(model, Rows(batch_size=4), ckpt_path=bad)
    assert equal(weights(model), before)
    assert model.rollout_step == 0
    assert not evidence.exists()
    if strategy == "auto":
        with pytest.raises(CheckpointError, match=message):
            LambdaPOModule.load_from_checkpoint(bad)
        assert not evidence.exists()


def test_the_malicious_file_would_have_done_it(tmp_path: Path, good: Path) -> None:
    bad, evidence = tmp_path / "bad.ckpt", tmp_path / "evidence"
    damage(good, bad, "malicious", evidence)
    torch.load(bad, weights_only=False)
    assert evidence.is_dir()


def copy_shards(shards: Path, target: Path) -> Path:
    target.mkdir()
    for file in shards.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("index", r"without \.metadata"),
        ("rest", r"without meta\.pt"),
        ("shard", r"shard __0_0\.distcp is missing or truncated"),
        ("short", r"shard __0_0\.distcp is missing or truncated"),
        ("garbage", r"\.metadata is truncated, damaged or foreign"),
        ("code", r"index names posix\.mkdir, which could run code"),
        ("memo", r"index names .*, which could run code"),
    ],
)
def test_bad_shards_are_refused(base: str, tmp_path: Path, shards: Path, kind: str, message: str) -> None:
    bad, evidence = copy_shards(shards, tmp_path / "bad.ckpt"), tmp_path / "evidence"
    shard, index = bad / "__0_0.distcp", bad / ".metadata"
    if kind in ("index", "rest", "shard"):
        {"index": index, "rest": bad / "meta.pt", "shard": shard}[kind].unlink()
    elif kind == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif kind == "garbage":
        index.write_bytes(index.read_bytes()[:100])
    elif kind == "code":
        index.write_bytes(b"cposix\nmkdir\n(V" + str(evidence).encode() + b"\ntR.")
    else:  # harmless names on top of the stack, taken off again before the machine looks
        names = b"".join(b"\x8c" + bytes([len(name)]) + name for name in (b"posix", b"mkdir", b"torch", b"Size"))
        path = str(evidence).encode()
        index.write_bytes(b"\x80\x04" + names + b"00\x93\x8c" + bytes([len(path)]) + path + b"\x85R.")
    model = module(base, lora=AdapterConfig(r=4))
    with pytest.raises(CheckpointError, match=rf"bad\.ckpt cannot be used: .*{message}"):
        trainer(tmp_path, strategy=sharding()).fit(model, Rows(batch_size=4), ckpt_path=bad)
    assert not evidence.exists()


def test_code_inside_a_shard_is_not_run(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch loads the small entries of shards without ``weights_only``."""
    evidence = tmp_path / "evidence"
    save = vars(model_parallel)["_distributed_checkpoint_save"]

    def poisoned(state: dict[str, Any], path: Path) -> None:
        for group in state["optimizer_0"]["param_groups"]:
            group["weight_decay"] = Touch(evidence)
        save(state, path)

    monkeypatch.setattr(model_parallel, "_distributed_checkpoint_save", poisoned)
    callback = RolloutCheckpoint(every_n_rollouts=2, dirpath=tmp_path)
    settings: Any = {"callbacks": [callback], "enable_checkpointing": True, "max_steps": 2}
    trainer(tmp_path, strategy=sharding(), **settings).fit(module(base, lora=AdapterConfig(r=4)), Rows(batch_size=4))
    torch.distributed.destroy_process_group()
    victim = trainer(tmp_path, strategy=sharding())
    with pytest.raises(CheckpointError, match=r"more than tensors and plain data \(posix.mkdir\)"):
        victim.fit(module(base, lora=AdapterConfig(r=4)), Rows(batch_size=4), ckpt_path=tmp_path / "last.ckpt")
    assert not evidence.exists()


def test_shards_for_a_strategy_that_has_none(base: str, tmp_path: Path, shards: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt cannot be used: it is in shards, which take ModelParallelStrategy"
    ):
        trainer(tmp_path).fit(module(base, lora=AdapterConfig(r=4)), Rows(batch_size=4), ckpt_path=shards)
    with pytest.raises(CheckpointError, match="it is in shards"):
        LambdaPOModule.load_from_checkpoint(shards)


def test_shards_are_made_one_file(base: str, tmp_path: Path, shards: Path) -> None:
    """As the message of the test above says."""
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
    model = module(base, lora=AdapterConfig(r=4))
    run = trainer(tmp_path, strategy=strategy, max_steps=2)
    run.fit(model, Rows(batch_size=4), ckpt_path=shards)
    run.save_checkpoint(tmp_path / "one.ckpt")
    live: dict[str, Any] = {"rewards": model.rewards, "optimizer": model.optimizer_factory}
    again = LambdaPOModule.load_from_checkpoint(tmp_path / "one.ckpt", **live)
    assert again.rollout_step == 2
    held = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in weights(model).items()
    }
    assert equal(weights(again), held)


@pytest.mark.parametrize("file", ["step", "last"])
@pytest.mark.parametrize("callback", [RolloutCheckpoint, ModelCheckpoint], ids=["ours", "lightnings"])
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_a_full_disk_leaves_the_previous_one(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callback: Any, file: str
) -> None:
    write = LocalFileOpener.write

    def full(self: Any, data: bytes) -> Any:
        if model.rollout_step == 4 and file in Path(self.path).name:
            write(self, data[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(LocalFileOpener, "write", full)
    model = module(base)
    when = {"every_n_rollouts": 2} if callback is RolloutCheckpoint else {"every_n_train_steps": 2}
    saving = callback(dirpath=tmp_path, save_last=True, **when)
    with pytest.raises(OSError, match=r"checkpoint .*ckpt could not be written .*No space left on device"):
        trainer(tmp_path, callbacks=[saving], enable_checkpointing=True).fit(model, Rows(batch_size=4))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["lambdapo"]["rollout_step"] == 2
    assert not list(tmp_path.glob("**/*partial*"))


def limited(directory: Path, base: str) -> None:
    """A run in a process that may write no file as large as a checkpoint."""

    class Limit(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            size = (fitting.checkpoint(directory)).stat().st_size if fitting.checkpoint(directory).exists() else 0
            if size:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    fitting.train(directory, base, callbacks=[Limit()])


@pytest.mark.slow
def test_a_file_size_limit_leaves_the_previous_one(base: str, tmp_path: Path) -> None:
    (ended,) = on_ranks(1, limited, tmp_path, base, logs=tmp_path)
    assert ended.code != 0
    assert "could not be written" in ended.log
    assert torch.load(fitting.checkpoint(tmp_path), weights_only=True)["lambdapo"]["rollout_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "death"),
    [("one", "saving 6"), ("one", "flushing 6"), ("shards", "flushing 6"), ("shards", "swapping 6")],
)
def test_killed_while_writing(base: str, tmp_path: Path, how: str, death: str) -> None:
    """The previous checkpoint is found by "last", and resuming from it is exact."""
    start: dict[str, Any] = {"how": how, "every": 2}
    succeed(on_ranks(1, fitting.train, tmp_path / "whole", base, logs=tmp_path / "logs", **start))
    broken = tmp_path / "broken"
    (ended,) = on_ranks(1, fitting.train, broken, base, death=death, logs=tmp_path / "killed", **start)
    assert ended.code == -signal.SIGKILL
    last = [path for path in fitting.checkpoint(broken).parent.glob("last*.ckpt") if not path.name.startswith(".")]
    assert len(last) == 1
    entries, _ = read_header(last[0])
    swapped = death.startswith("swapping")
    assert last[0].name == ("last-previous.ckpt" if swapped else "last.ckpt")
    assert entries["lambdapo"]["rollout_step"] == 4
    succeed(on_ranks(1, fitting.train, broken, base, resume="last", logs=tmp_path / "resumed", **start))
    if how == "one":
        assert_same_run(tmp_path / "whole", broken, 4)
    weights_of = [torch.load(path / "weights.pt", weights_only=True) for path in (tmp_path / "whole", broken)]
    assert same(*weights_of)
    assert {record["step"] for record in fitting.completions(broken, 1)} == set(range(5, 13))


def test_last_is_looked_for_in_earlier_versions(base: str, tmp_path: Path) -> None:
    fitting.train(tmp_path, base, trainer={"max_steps": 4})
    model = fitting.train(tmp_path, base, resume="last", trainer={"max_steps": 8})
    assert model.rollout_step == 4  # two updates each
    assert {record["step"] for record in fitting.completions(tmp_path, 1)} == {3, 4}


def test_last_without_any_starts_anew(base: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        model = fitting.train(tmp_path, base, resume="last", trainer={"max_steps": 4})
    assert model.rollout_step == 2


def test_the_index_of_real_shards_is_made_of_what_is_allowed(shards: Path) -> None:
    entries, shapes = read_header(shards)
    assert entries["lambdapo"]["rollout_step"] == 2
    assert any("lora_A" in name for name in shapes)
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops((shards / ".metadata").read_bytes())}
    assert "STACK_GLOBAL" in opcodes
