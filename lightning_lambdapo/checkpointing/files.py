"""Checkpoint files: written whole or not at all, checked before a model sees them, and never run as code."""

import io
import os
import pickletools
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lightning_lambdapo.distributed.parallel import gather_objects, is_sharded, rank

Shapes = Mapping[str, torch.Size]
Check = Callable[[Mapping[str, Any], Shapes], object]

_SHARDS_INDEX = ".metadata"  # torch's
_SHARDS_REST = "meta.pt"  # Lightning's
_PLAIN_GLOBALS = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata|filesystem)\.\w+|torch\.Size|torch\.serialization\._get_layout|"
    r"pathlib\.\w*Path|collections\.OrderedDict"
)


IN_SHARDS = (
    "it is in shards, which take ModelParallelStrategy (data_parallel_size=1 for one process). With "
    "save_distributed_checkpoint=False that strategy saves it as one file."
)


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. The message names it and says what is wrong."""


def guard_checkpoints(strategy: Strategy, check: Check) -> None:
    """Make a strategy write checkpoints whole or not at all, and refuse unusable ones before it loads anything.

    Lightning has no hook that covers both files and directories of shards, so the two methods of this strategy object
    are replaced. Only paths of the local file system are guarded. Other paths use the strategy's own methods.

    Args:
        strategy: the trainer's. Guarding it again only replaces ``check``.
        check: receives a checkpoint's entries and the shapes of its weights. It raises :class:`CheckpointError` if the
            run cannot resume from it.
    """
    save = getattr(strategy.save_checkpoint, "unguarded", strategy.save_checkpoint)
    load = getattr(strategy.load_checkpoint, "unguarded", strategy.load_checkpoint)

    def save_whole(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        target = str(strategy.broadcast(str(filepath)))
        if _is_remote(target):
            save(checkpoint, target, storage_options)
        else:
            _replace(Path(target), lambda partial: save(checkpoint, partial, storage_options))

    def load_checked(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        if _is_remote(str(checkpoint_path)) or weights_only is False:  # the caller vouches for it
            found: dict[str, Any] = load(checkpoint_path, weights_only)
            return found
        path = Path(checkpoint_path).expanduser()
        if path.is_dir() and not is_sharded(strategy):
            raise CheckpointError(f"The checkpoint {path} cannot be used: {IN_SHARDS}")
        with naming(path):
            check(*read_header(path))
        entries: dict[str, Any] = load(path, weights_only)
        return entries

    setattr(save_whole, "unguarded", save)  # noqa: B010
    setattr(load_checked, "unguarded", load)  # noqa: B010
    setattr(strategy, "save_checkpoint", save_whole)  # noqa: B010
    setattr(strategy, "load_checkpoint", load_checked)  # noqa: B010


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in every :class:`CheckpointError` raised inside."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be used: {error}") from error


def read_header(path: Path) -> tuple[dict[str, Any], Shapes]:
    """Entries of a checkpoint, a file or a directory of shards, and the shapes of its weights.

    Tensors are memory-mapped, not read. Only tensors and plain data are unpickled.

    Raises:
        CheckpointError: it is missing, truncated, no checkpoint, or has objects that could run code when loaded.
    """
    if not path.exists():
        raise CheckpointError("there is no such file.")
    if not path.is_dir():
        entries = _entries(path)
        weights = entries.get("state_dict", {})
        return entries, {name: value.shape for name, value in weights.items() if isinstance(value, torch.Tensor)}
    for name in (_SHARDS_INDEX, _SHARDS_REST):
        if not (path / name).is_file():
            raise CheckpointError(f"it is a directory without {name}, so no whole checkpoint in shards.")
    _refuse_code(path / _SHARDS_INDEX)
    index = FileSystemReader(path).read_metadata()
    for place, shard in (index.storage_data or {}).items():
        file = path / shard.relative_path
        if not file.is_file() or file.stat().st_size < shard.offset + shard.length:
            raise CheckpointError(f"its shard {shard.relative_path} is missing or truncated.")
        if isinstance(index.state_dict_metadata[place.fqn], BytesStorageMetadata):
            with file.open("rb") as stream:  # torch would also load these small entries as code
                stream.seek(shard.offset)
                _load(io.BytesIO(stream.read(shard.length)))
    shapes = {
        name.partition(".")[2]: entry.size
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(("state_dict.", "model.")) and hasattr(entry, "size")
    }
    return _entries(path / _SHARDS_REST), shapes


def _entries(file: Path) -> dict[str, Any]:
    entries = _load(file, mmap=True)
    if not isinstance(entries, dict):
        raise CheckpointError(f"it holds {type(entries).__name__}, not the entries of a checkpoint.")
    return entries


def _load(file: Path | io.BytesIO, *, mmap: bool = False) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:
        stranger = re.search(r"GLOBAL (\S+)|`(\S+)` to be allowlisted", str(error))
        if stranger:
            raise CheckpointError(
                f"it contains more than tensors and plain data ({stranger[1] or stranger[2]}), which could run code "
                "when loaded."
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"it is truncated, damaged or not a checkpoint ({reason})") from error


def _refuse_code(file: Path) -> None:
    """Raise unless torch's index of shards names only the classes that an index needs. Runs none of it.

    Such a file is a program for a stack machine. Only strings on top of its stack are tracked. Anything else counts as
    unknown, and an unknown name is refused.
    """
    top: list[str | None] = []
    memo: dict[Any, str | None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file.read_bytes()):
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                continue
            if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
                memo[len(memo) if name == "MEMOIZE" else argument] = top[-1]
                continue
            if name == "STACK_GLOBAL":
                _check_global(".".join(map(str, top[-2:])))
            elif name == "GLOBAL":
                _check_global(str(argument).replace(" ", "."))
            elif name in ("INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"):
                _check_global(f"{name} {argument}")
            if "UNICODE" in name:
                top.append(argument)
            else:
                top.append(memo.get(argument) if name in ("BINGET", "LONG_BINGET", "GET") else None)
    except (ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"its {file.name} is truncated, damaged or foreign ({error}).") from error


def _check_global(name: str) -> None:
    if not _PLAIN_GLOBALS.fullmatch(name) and not isinstance(
        getattr(torch, name.removeprefix("torch."), None), torch.dtype
    ):
        raise CheckpointError(f"its index names {name}, which could run code when loaded.")


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Let all ranks write to a path beside ``target``, and rename it once it is complete and on the disk."""
    partial = target.with_name(f".{target.name}.partial")
    if rank() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of a run that was killed
    gather_objects(None)
    failure: Exception | None = None
    try:
        write(partial)
        if rank() == 0:
            _flush(partial)
    except Exception as error:
        failure = error
    reasons = [reason for reason in gather_objects(failure and f"{type(failure).__name__}: {failure}") if reason]
    if reasons:
        if rank() == 0:
            _remove(partial)
        raise OSError(
            f"The checkpoint {target} could not be written ({reasons[0]}). Earlier checkpoints are unchanged."
        ) from failure
    if rank() == 0:
        _swap(partial, target)
    gather_objects(None)


def _swap(partial: Path, target: Path) -> None:
    if target.is_dir() or (partial.is_dir() and target.exists()):
        # A directory cannot be replaced in one step. Meanwhile `ckpt_path="last"` finds the old one by this name.
        previous = target.with_name(f"{target.stem}-previous{target.suffix}")
        _remove(previous)
        target.rename(previous)
        partial.rename(target)
        _remove(previous)
    else:
        partial.replace(target)
    _sync(target.parent)


def _flush(path: Path) -> None:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        _sync(file)


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # files opened for reading cannot be flushed there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_remote(path: str) -> bool:
    return "://" in path
