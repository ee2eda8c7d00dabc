"""A decoding step waits for nothing on the device, and can be recorded and repeated without its Python."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import pytest
import tiny
import torch
from decoding import ARCHITECTURES, SWITCHES, streams
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_lambdapo.config import PerformanceConfig, SamplingConfig
from lightning_lambdapo.datatypes import Rollout
from lightning_lambdapo.rollout import GroupedEngine, grouped
from lightning_lambdapo.rollout.completion_text import CompletionText
from lightning_lambdapo.rollout.kv_store import GroupStore
from lightning_lambdapo.rollout.live_rows import LiveRows
from lightning_lambdapo.rollout.step_runner import CudaCapture, StepRunner

SAMPLING: dict[str, dict[str, float]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 9, "temperature": 1.3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8, "temperature": 0.7},
}
ENDS = (1, 7, 20)


def generate(
    architecture: str = "llama",
    *,
    sampling: str = "plain",
    poll_every: int | None = None,
    dtype: torch.dtype = torch.float64,
    eos_ids: tuple[int, ...] = ENDS,
    stops: tuple[str, ...] = (),
    **switches: Any,
) -> Rollout:
    engine = GroupedEngine(tiny.tokenizer(), eos_ids, 0, **tiny.configured(**switches), poll_every=poll_every)
    engine.text = CompletionText(tiny.tokenizer(), stop_strings=stops)
    engine._probed = True
    batch = tiny.batch(tiny.ragged_prompts(5, seed=2), extra=1)
    settings: Any = {"sampling": SamplingConfig(**cast(Any, SAMPLING[sampling])), "uniforms": streams(batch, 4, 24)}
    with torch.no_grad():
        return engine.generate(tiny.model(architecture, dtype=dtype), batch, **settings)


def check_same(found: Rollout, expected: Rollout) -> None:
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.completion_mask, expected.completion_mask)
    torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-9)


class Reads(TorchDispatchMode):
    """Operators that make the host wait for a device, with the line that asked for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero") or any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices
        ):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        """Write down an operator."""
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-2]]
        self.found.append(f"{name} at {[line for line in lines if 'torch' not in line][-1]}")


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], list[int]]]:
    """What is read inside decoding steps, and how many polls there are."""
    found: list[str] = []
    polls: list[int] = []
    step, tolist = StepRunner.__call__, Tensor.tolist
    inside: list[Reads] = []

    def watched(self: StepRunner) -> None:
        with Reads() as mode:
            inside.append(mode)
            step(self)
            inside.pop()
        found.extend(mode.found)

    def noted(self: Tensor) -> Any:  # no operator on a CPU
        for mode in inside:
            mode.note("tolist")
        if self.dtype == torch.bool:
            polls.append(len(self))
        return tolist(self)

    monkeypatch.setattr(StepRunner, "__call__", watched)
    monkeypatch.setattr(Tensor, "tolist", noted)
    # Only polls and prefills are not steps. `finish` reads what is complete.
    monkeypatch.setattr(GroupedEngine, "finish", lambda *_: polls.append(-1))
    yield found, polls


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("switch", list(SWITCHES))
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_no_step_waits_for_the_device(
    architecture: str, switch: str, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "CudaCapture", Eager)
    with reads(monkeypatch) as (found, polls):
        generate(architecture, poll_every=8, cuda_graphs=cuda_graphs, **SWITCHES[switch])
    assert found == []
    if "max_live_tokens" not in SWITCHES[switch]:
        assert polls.index(-1) == 4  # at the start, after 8 and 16 tokens, and at the end


@pytest.mark.parametrize("sampling", SAMPLING)
def test_no_sampler_waits_for_the_device(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with reads(monkeypatch) as (found, _):
        generate(sampling=sampling, poll_every=8, dtype=torch.float32)
        generate(sampling=sampling, eos_ids=tuple(range(2, 49, 3)), dtype=torch.float32)  # many ids
    assert found == []


def test_reads_are_noticed() -> None:
    values = torch.arange(3)
    with Reads() as mode:
        values[values > 1]
        values[values > 1] = 0
        bool(values.any())
        values.max().item()
        values[torch.tensor([0, 1])]
    assert [line.split()[0] for line in mode.found] == [
        "index", "index_put_", "_local_scalar_dense", "_local_scalar_dense"
    ]  # fmt: skip


class Eager:
    """A capture that repeats the step by running it."""

    def __init__(self, device: torch.device) -> None:
        self.recorded = 0

    def warm_up(self, step: Callable[[], None]) -> None:
        step()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return step

    def forget(self) -> None:
        """Nothing was shared."""


class Tape(Eager):
    """A stand-in for CUDA graphs: notes a step's operators, and repeats them on the very same tensors.

    As with a graph, recording changes no tensor, and what Python computed meanwhile is frozen.
    """

    tapes: ClassVar[list["Tape"]] = []
    replayed: ClassVar[int] = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        Tape.tapes.append(self)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        with _Recorder() as recorder:
            step()
        for tensor, before in reversed(recorder.before):
            tensor.copy_(before)
        return partial(self.replay, recorder.operators)

    def replay(self, operators: list[tuple[Any, Any, Any, Any]]) -> None:
        Tape.replayed += 1
        for func, args, kwargs, out in operators:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for target, source in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(target, Tensor) and target.data_ptr() != source.data_ptr():
                        target.copy_(source)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = func(*args, **kwargs)
        # Detached, because what an operator gets may be changed in place by its caller later.
        self.operators.append((func, *tree_map(lambda value: value, (args, kwargs, out))))
        return out


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> type[Tape]:
    monkeypatch.setattr(grouped, "CudaCapture", Tape)
    monkeypatch.setattr(Tape, "tapes", [])
    monkeypatch.setattr(Tape, "replayed", 0)
    return Tape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("switch", list(SWITCHES))
def test_polls_and_graphs_change_no_token(architecture: str, switch: str, tape: type[Tape]) -> None:
    """In float64: rows that have ended continue for a while, and steps are repeated without their Python."""
    expected = generate(architecture)
    assert (expected.lengths < 24).any()
    assert not tape.tapes
    for interval in (5, 16):
        check_same(generate(architecture, poll_every=interval, **SWITCHES[switch]), expected)
    for interval in (1, 16):
        check_same(generate(architecture, poll_every=interval, cuda_graphs=True, **SWITCHES[switch]), expected)
    assert tape.replayed > 10
    assert all(1 <= one.recorded < 12 for one in tape.tapes)


@pytest.mark.parametrize("switch", list(SWITCHES))
def test_stop_strings_are_read_at_polls(switch: str, tape: type[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows continue until the next poll, which changes no token."""
    stops = tuple("abcdefgh")
    expected = generate(stops=stops)
    assert expected.lengths.sum() < generate().lengths.sum()
    for interval in (1, 5, 16):
        check_same(generate(poll_every=interval, cuda_graphs=True, stops=stops, **SWITCHES[switch]), expected)
    assert tape.replayed > 0
    with reads(monkeypatch) as (found, _):
        generate(poll_every=8, cuda_graphs=False, stops=stops, **SWITCHES[switch])
    assert found == []


@pytest.mark.parametrize("sampling", SAMPLING)
def test_no_sampler_is_changed_by_polls_and_graphs(sampling: str, tape: type[Tape]) -> None:
    expected = generate(sampling=sampling)
    check_same(generate(sampling=sampling, poll_every=16), expected)
    check_same(generate(sampling=sampling, poll_every=16, cuda_graphs=True), expected)
    assert tape.replayed > 10


def test_what_an_ended_row_draws_is_not_recorded() -> None:
    live = LiveRows((1,), 0, (3, 2), 3, torch.float32, torch.device("cpu"))
    which = live.add(torch.tensor([2, 0]))
    for tokens in ([1, 5], [7, 6], [8, 9], [8, 9]):  # row 2 ends at once, row 0 with its last possible token
        values = torch.tensor(tokens)
        live.write(which, (values, -values.float(), 10 * values.float()))
    assert not live.alive.any()
    ids, logprobs, entropy = live.recorded
    assert ids.tolist() == [[5, 6], [0, 0], [1, 0]]
    assert logprobs.tolist() == [[-5, -6], [0, 0], [-1, 0]]
    assert entropy.tolist() == [[50, 60], [0, 0], [10, 0]]


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("poll_every", [1, 16, 32])
def test_decoding_stops_at_the_poll_after_its_last_row(
    poll_every: int, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "CudaCapture", Eager)
    steps: list[int] = []
    begin = GroupStore.begin_step

    def counted(self: GroupStore) -> None:
        steps.append(len(self))
        begin(self)

    monkeypatch.setattr(GroupStore, "begin_step", counted)
    short = generate(eos_ids=tuple(range(2, 49, 3)), poll_every=poll_every, cuda_graphs=cuda_graphs)
    longest = int(short.lengths.max())
    assert longest < 20
    assert len(steps) + 1 == min(-(-longest // poll_every) * poll_every, 24)
    steps.clear()
    full = generate(eos_ids=(48,), poll_every=poll_every, cuda_graphs=cuda_graphs)
    assert int(full.lengths.max()) == 24
    assert len(steps) == 23  # never beyond the last token, whatever the interval


def test_a_step_that_cannot_be_captured_runs_as_it_is(tape: type[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate()

    def refused(self: Tape, step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tape, "record", refused)
    with pytest.warns(UserWarning, match=r"not permitted when stream is capturing.\. Steps run without") as caught:
        check_same(generate(poll_every=16, cuda_graphs=True), expected)
    assert len(caught) == 1

    def full(self: Tape, step: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tape, "record", full)
    with pytest.raises(torch.OutOfMemoryError):
        generate(poll_every=16, cuda_graphs=True)


def test_records_are_dropped_when_storage_moves(tape: type[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    call = StepRunner.__call__

    def watched(self: StepRunner) -> None:
        before = self._version, len(self._records)
        call(self)
        if self._version != before[0]:
            dropped.append(before[1])
            assert len(self._records) == 0

    monkeypatch.setattr(StepRunner, "__call__", watched)
    expected = generate()
    for budget in (100, 150, 200):
        check_same(generate(max_live_tokens=budget, poll_every=4, cuda_graphs=True), expected)
    assert any(dropped)


def test_where_graphs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Eager):
        pass

    def wanted(device: str, cuda_graphs: bool | None) -> bool:
        performance = PerformanceConfig(cuda_graphs=cuda_graphs)
        engine = GroupedEngine(tiny.tokenizer(), (1,), 0, performance=performance)
        return engine._capture(tiny.model(), torch.device(device)) is not None

    with pytest.raises(ValueError, match=r"`performance.cuda_graphs` is true, but the model is on cpu"):
        wanted("cpu", True)
    monkeypatch.setattr(grouped, "CudaCapture", Made)
    assert not wanted("cpu", None)
    assert wanted("cuda", None)
    assert wanted("cuda", True)
    assert not wanted("cuda", False)
    monkeypatch.setattr(grouped, "has_shards", lambda _: True)
    assert not wanted("cuda", None)
    monkeypatch.setattr(grouped, "has_shards", lambda _: False)
    torch.use_deterministic_algorithms(True)
    try:
        assert not wanted("cuda", None)
    finally:
        torch.use_deterministic_algorithms(False)


def test_graphs_are_recorded_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of torch.cuda, in order. Nothing here has a GPU, so this is a test of the sequence alone."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.device = device

        def wait_stream(self, other: Any) -> None:
            calls.append(f"{'side' if other is main else 'main'} waits")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def context(name: str, *_: Any, **__: Any) -> Iterator[None]:
        calls.append(f"{name} begins")
        yield
        calls.append(f"{name} ends")

    device = torch.device("cuda")
    main = Stream(device)
    fakes: dict[str, Any] = {
        "Stream": Stream,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda _: main,
        "stream": partial(context, "stream"),
        "graph": partial(context, "graph"),
        "CUDAGraph": Graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capture = CudaCapture(device)
    capture.warm_up(lambda: calls.append("step"))
    caching = torch.is_autocast_cache_enabled()
    replay = capture.record(lambda: calls.append(f"step, cached casts {torch.is_autocast_cache_enabled()}"))
    assert torch.is_autocast_cache_enabled() is caching
    replay()
    assert calls == [
        "side waits", "stream begins", "step", "stream ends", "main waits",
        "stream begins", "graph begins", "step, cached casts False", "graph ends", "stream ends", "replay",
    ]  # fmt: skip
