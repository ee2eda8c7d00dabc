"""Runs decoding steps one after another: as they come, or as CUDA graphs."""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from lightning_lambdapo.rollout.kv_store import GroupStore, Shape


class Capture(Protocol):
    """Makes something that repeats a step without its Python."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run ``step`` as it is, so that a later capture finds every kernel loaded."""

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        """Return what repeats ``step`` on the same tensors. Recording it must change none of them."""

    def forget(self) -> None:
        """All records are gone: what they shared goes too."""


class CudaCapture:
    """CUDA graphs that share one memory pool, recorded on a stream of their own.

    Args:
        device: must be CUDA.

    Raises:
        ValueError: another device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"`performance.cuda_graphs` is true, but the model is on {device.type}. Set it to null or false."
            )
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        """See :class:`Capture`."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        """See :class:`Capture`."""
        graph = torch.cuda.CUDAGraph()
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cached cast would live in the graph's memory
        try:
            # If a capture cannot begin, torch leaves its stream current. The outer context puts ours back.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.stream.device)),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
            ):
                step()
        finally:
            torch.set_autocast_cache_enabled(caching)
        return graph.replay

    def forget(self) -> None:
        """See :class:`Capture`. A pool ends with its last graph, and torch refuses to capture into it again."""
        self.pool = torch.cuda.graph_pool_handle()


class StepRunner:
    """Decodes one token of every live row at each call.

    With a ``capture``, steps of the same sizes are recorded once and then repeated. The first step of its sizes runs as
    it is, the second one is recorded. Records belong to one rollout, because storage and weights (a merged adapter)
    have other addresses in the next one. Where a step cannot be recorded, all steps run as they are, with one warning.

    Args:
        store: of the rollout.
        step: the device's part of a step. It changes tensors in place and reads none.
        capture: records steps. None runs every step as it is.
    """

    def __init__(self, store: GroupStore, step: Callable[[], None], capture: Capture | None = None) -> None:
        self.store = store
        self.step = step
        self.capture = capture
        self._seen: set[tuple[Shape, int]] = set()
        self._records: dict[tuple[Shape, int], Callable[[], Any]] = {}
        self._version = store.version

    def __call__(self) -> None:
        """Decode one token of every live row."""
        self.store.begin_step()
        if self.capture is None:
            self.step()
            return
        if self.store.version != self._version:  # what was recorded reads storage that has moved
            self._records.clear()
            self.capture.forget()
            self._version = self.store.version
        key = self.store.shape, self._version
        if key not in self._seen:
            self._seen.add(key)
            self.capture.warm_up(self.step)
            return
        if key not in self._records:
            try:
                self._records[key] = self.capture.record(self.step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(
                    f"A decoding step could not be captured as a CUDA graph ({error}). Steps run without one from here "
                    "on, which is slower. Set `performance.cuda_graphs` to false to choose that without this message.",
                    stacklevel=2,
                )
                self.capture = None
                self._records.clear()
                self.step()
                return
        self._records[key]()
