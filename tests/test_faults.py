"""What a run survives, what stops it with which message, and that nothing hangs."""

import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fitting
import pytest
import tiny
import torch
from comparing import assert_same_run
from lightning.pytorch import Callback
from ranks import on_ranks, succeed
from small import Recorder, Rows, equal, finite_fit, module, trainer, weights
from torch.utils.data import DataLoader

from lightning_lambdapo import (
    AlgorithmConfig,
    DataSource,
    LambdaPODataModule,
    PromptCollator,
    RolloutConfig,
)
from lightning_lambdapo.distributed import parallel
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.learning.training_log import TrainingLog
from lightning_lambdapo.rewards import FunctionReward, Reward, RewardInputs
from lightning_lambdapo.rollout import sampling

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Trouble(fitting.Noisy):
    """:class:`fitting.Noisy`, until a call (counted from 1), on one rank or on all."""

    def __init__(self, kind: str, call: int, rank: int | None = None) -> None:
        super().__init__()
        self.kind, self.call, self.rank = kind, call, rank
        self.calls = 0
        self.timeout = 2.0 if kind == "hang" else 600.0

    def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
        self.calls += 1
        values = list(super().__call__(inputs))
        if self.calls != self.call or self.rank not in (None, parallel.rank()):
            return values
        if self.kind == "raise":
            raise KeyError("no such thing")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hang":
            while True:
                try:
                    time.sleep(60)
                except Exception:  # noqa: S112 -- swallows everything, as some handlers do
                    continue
        faulty: dict[str, list[float | None]] = {"nan": [float("nan")] * len(values), "short": values[1:]}
        return faulty[self.kind]


MESSAGES = {
    "raise": "The reward 'noisy' raised KeyError",
    "hang": "The reward 'noisy' did not return within 2 seconds",
    "nan": "The reward 'noisy' returned nan for row 0. It must be finite",
    "short": "The reward 'noisy' returned 15 values for 16 completions",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_faulty_reward_stops_the_run_and_nothing_is_lost(base: str, tmp_path: Path, kind: str) -> None:
    """Saved inside the step, before its first update: the step is done again from its start."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fitting.train(whole, base, validate=False)
    with pytest.raises((RuntimeError, ValueError), match=MESSAGES[kind]):
        fitting.train(broken, base, validate=False, save_on_exception=True, rewards=[Trouble(kind, 8)])
    held = torch.load(fitting.checkpoint(broken), weights_only=True)["lambdapo"]
    assert (held["rollout_step"], held["updates_in_unfinished_step"]) == (7, 0)
    fitting.train(broken, base, validate=False, resume="last")
    assert_same_run(whole, broken, 7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "hang", "kill"])
def test_a_faulty_reward_on_one_rank_ends_both(base: str, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"how": "ddp", "validate": False, "save_on_exception": True}
    ended = on_ranks(
        2,
        fitting.train,
        tmp_path,
        base,
        rewards=[Trouble(kind, 6, rank=1)],
        logs=tmp_path / "logs",
        **options,
    )
    assert all(each.code != 0 for each in ended)
    if kind != "kill":
        assert MESSAGES[kind] in ended[1].log
    assert torch.load(fitting.checkpoint(tmp_path), weights_only=True)["lambdapo"]["rollout_step"] == 4
    succeed(on_ranks(2, fitting.train, tmp_path, base, resume="last", logs=tmp_path / "resumed", **options))


@pytest.mark.parametrize(("moment", "rollout_step", "begun"), [("update", 2, 2), ("report", 3, 2)])
def test_a_checkpoint_from_inside_a_step_is_marked_and_warned_of(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, rollout_step: int, begun: int
) -> None:
    class Fails(Callback):
        def on_before_optimizer_step(self, run: Any, *_: Any) -> None:
            if moment == "update" and run.global_step == 5:  # the second update of the third step
                raise RuntimeError("in the middle")

    finish, calls = TrainingLog.finish, [0]

    def report(self: TrainingLog, *arguments: Any) -> Any:
        calls[0] += 1
        if moment == "report" and calls[0] == 3:
            raise RuntimeError("in the middle")
        return finish(self, *arguments)

    monkeypatch.setattr(TrainingLog, "finish", report)
    with pytest.raises(RuntimeError, match="in the middle"):
        fitting.train(tmp_path, base, validate=False, save_on_exception=True, callbacks=[Fails()])
    held = torch.load(fitting.checkpoint(tmp_path), weights_only=True)["lambdapo"]
    assert (held["rollout_step"], held["updates_in_unfinished_step"]) == (rollout_step, begun)
    with pytest.warns(UserWarning, match="saved inside a training step, when 2 of its updates had begun"):
        fitting.train(tmp_path, base, validate=False, resume="last")


class Poison(Callback):
    """Makes the policy's weights NaN before some steps, and mends them after each."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.kept = weights(pl_module)
        if pl_module.rollout_step + 1 in self.steps:
            with torch.no_grad():
                next(pl_module.policy.parameters()).fill_(torch.nan)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.rollout_step in self.steps:
            with torch.no_grad():
                first = next(iter(self.kept))
                dict(pl_module.named_parameters())[first].copy_(self.kept[first])
            assert equal(weights(pl_module), self.kept), "nothing moves in a step without finite probabilities"


@pytest.mark.parametrize("engine", ["grouped", "hf"])
def test_a_step_with_logits_that_are_not_numbers_is_skipped_and_counted(base: str, tmp_path: Path, engine: Any) -> None:
    rollout = RolloutConfig(engine=engine, group_size=4, max_new_tokens=8)
    model = module(base, updates_per_rollout=2, rollout=rollout)
    recorder = Recorder()
    callbacks = [recorder, Poison([2])]
    trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(model, Rows(batch_size=4))
    assert [step["train/skipped_updates"] for step in recorder.steps] == [0, 2, 2, 2]
    assert model.rollout_step == 4
    assert recorder.steps[3]["train/grad_norm"] > 0


def test_one_such_row_is_enough(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module(base)
    draw = sampling.TokenSampler.__call__

    def broken(self: sampling.TokenSampler, logits: Any, rows: Any, step: Any) -> Any:
        if model.rollout_step == 1:
            logits = torch.where((rows == 5)[:, None], torch.nan, logits)
        return draw(self, logits, rows, step)

    monkeypatch.setattr(sampling.TokenSampler, "__call__", broken)
    recorder = Recorder()
    trainer(tmp_path, callbacks=[recorder], enable_checkpointing=True).fit(model, Rows(batch_size=4))
    assert [step["train/skipped_updates"] for step in recorder.steps] == [0, 1, 1, 1]
    assert recorder.steps[1]["train/valid"] == 15 / 16
    assert math.isfinite(recorder.steps[1]["train/reward"])


@pytest.mark.filterwarnings("ignore:No completion of the last 3 rollouts had a usable reward")
def test_too_many_such_steps_are_an_error(base: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[Poison([2, 3, 4, 5, 6])], max_epochs=3)
    message = r"4 updates in a row were of a rollout whose log-probabilities are not finite\. The policy has diverged"
    with pytest.raises(RuntimeError, match=message):
        run.fit(module(base), Rows(batch_size=4))


def test_an_infinite_loss_is_skipped_and_counted(base: str, tmp_path: Path) -> None:
    """A policy that has come so far from its reference that k3 overflows."""
    model = module(base, algorithm=AlgorithmConfig(kl_coef=0.1))
    recorder = Recorder()

    class Far(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.rollout_step == 1:
                with torch.no_grad():
                    for parameter in pl_module.reference.parameters():
                        parameter.mul_(1e4)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.rollout_step == 2:
                with torch.no_grad():
                    for parameter in pl_module.reference.parameters():
                        parameter.mul_(1e-4)

    def infinite(original: Any, learner: Any, micro_batch: Any) -> Any:
        found = original(learner, micro_batch)
        return found + 1000 if model.rollout_step == 1 else found

    original = Learner.ref_logprobs
    Learner.ref_logprobs = lambda *arguments: infinite(original, *arguments)  # type: ignore[method-assign]
    try:
        trainer(tmp_path, callbacks=[recorder], enable_checkpointing=True).fit(model, Rows(batch_size=4))
    finally:
        Learner.ref_logprobs = original  # type: ignore[method-assign]
    assert [step["train/skipped_updates"] for step in recorder.steps] == [0, 1, 1, 1]


def test_nothing_moves_where_all_rows_are_truncated(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lambdapo.rollout.build.eos_token_ids", lambda *_: (-1,))
    model = module(base, algorithm=AlgorithmConfig(mask_truncated=True))
    model.configure_model()
    before = weights(model)
    with pytest.warns(UserWarning, match=r"all were cut off at `rollout\.max_new_tokens`"):
        steps = finite_fit(tmp_path, model)
    assert equal(weights(model), before)
    assert {step["train/truncated"] for step in steps} == {1.0}
    assert {step["train/empty_updates"] for step in steps} == {1.0}
    assert "train/reward" not in steps[-1]


def test_completions_that_end_at_once(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "inverse_cdf", lambda probabilities, _: torch.ones(len(probabilities)).long())
    seen: list[str] = []

    def note(completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [float(index) for index in range(len(completions))]

    steps = finite_fit(tmp_path, module(base, rewards=[note]))
    assert set(seen) == {""}
    assert {step["train/completion_length"] for step in steps} == {1.0}


def test_prompts_that_leave_no_room_are_found_before_anything_is_sampled(tmp_path: Path) -> None:
    base, file = str(tmp_path / "base"), tmp_path / "rows.jsonl"
    tiny.model("gpt2").save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    file.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 4 + '{"prompt": "' + "1+" * 62 + '", "answer": "2"}\n')
    message = r"A prompt of 124 tokens and max_new_tokens = 8 more do not fit the 128 positions of GPT2LMHeadModel"

    def sampled(completions: list[str]) -> list[float]:
        raise AssertionError("a rollout was paid for")

    data = LambdaPODataModule(train=DataSource(path=str(file)), batch_size=2)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module(base, rewards=[sampled]), data)
    rows = [{"prompt": "1+" * 62}] * 2  # of a loader whose prompts are not known before
    model = module(base, rewards=[sampled])
    loader: Any = DataLoader(rows, batch_size=2, collate_fn=PromptCollator(model.tokenizer))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(model, loader, val_dataloaders=loader)
    fits = LambdaPODataModule(train=DataSource(path=str(file)), batch_size=2, max_prompt_length=120)
    with pytest.warns(UserWarning, match="1 of 5 prompts .* are omitted"):
        trainer(tmp_path).fit(module(base), fits)


def test_rotary_positions_go_on(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(('{"prompt": "' + "1+" * 62 + '", "answer": "2"}\n') * 4)
    data = LambdaPODataModule(train=DataSource(path=str(file)), batch_size=2)
    with caplog.at_level("INFO"):
        trainer(tmp_path).fit(module(base), data)
    assert "A prompt of 124 tokens and max_new_tokens = 8 more do not fit the 128 positions" in caplog.text


def test_a_data_file_that_changes_between_epochs(base: str, tmp_path: Path) -> None:
    """The run continues with what it has read. One that is resumed says that the data is another."""
    file = tmp_path / "rows.jsonl"
    rows = "".join(f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in range(4) for b in range(4))

    class Changes(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            file.write_text("no JSON at all")

    def run(name: str, callbacks: list[Callback], **options: Any) -> Path:
        file.write_text(rows)
        data = LambdaPODataModule(train=DataSource(path=str(file)), batch_size=4)
        fitting.train(tmp_path / name, base, validate=False, data=data, callbacks=callbacks, **options)
        return tmp_path / name

    still, changed = run("still", []), run("changed", [Changes()])
    assert fitting.completions(still) == fitting.completions(changed)
    file.write_text(rows.replace("0+0=", "9+9="))
    data = LambdaPODataModule(train=DataSource(path=str(file)), batch_size=4)
    with pytest.warns(UserWarning, match="The training data is not that of the checkpoint"):
        fitting.train(
            tmp_path / "other",
            base,
            validate=False,
            data=data,
            resume=str(fitting.checkpoint(still, "rollout-step=10")),
        )


def test_a_plain_function_gets_a_deadline_too() -> None:
    returned: list[bool] = []

    def slow(completions: list[str]) -> list[float]:
        time.sleep(30)
        returned.append(True)
        return [0.0]

    from lightning_lambdapo.rewards.judging import judge

    inputs = RewardInputs(["?"] * 2, ["a", "b"], [None] * 2, [None] * 2, [1, 1], [False] * 2, [{}] * 2)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(RuntimeError, match=r"The reward 'slow' did not return within 0\.2 seconds"):
        judge([FunctionReward(slow, timeout=0.2)], inputs, group_size=2)
    assert not returned
    assert signal.getsignal(signal.SIGVTALRM) == before
    with pytest.raises(ValueError, match="timeout of the reward 'slow' must be above 0 seconds, got 0"):
        FunctionReward(slow, timeout=0)


def hang_without_python(directory: Path) -> None:
    """Wait where no signal handler of Python's gets a turn."""
    import ctypes

    from lightning_lambdapo.rewards import deadline as module_of_deadline

    vars(module_of_deadline)["_GRACE_SECONDS"] = 0.5
    libc = ctypes.PyDLL(None)  # keeps the interpreter's lock
    with module_of_deadline.deadline(0.5):
        while True:
            libc.pause()


@pytest.mark.slow
def test_code_that_never_comes_back_ends_the_program_with_a_traceback(tmp_path: Path) -> None:
    (ended,) = on_ranks(1, hang_without_python, tmp_path, logs=tmp_path)
    assert ended.code == 1
    assert "Timeout" in ended.log
    assert "hang_without_python" in ended.log


def test_rewards_that_are_all_equal(base: str, tmp_path: Path) -> None:
    class Same(Reward):
        def __call__(self, inputs: RewardInputs) -> Sequence[float | None]:
            return [0.3 for _ in inputs.completions]

    model = module(base, rewards=[Same()])
    model.configure_model()
    before = weights(model)
    steps = finite_fit(tmp_path, model)
    assert equal(weights(model), before)
    assert {step["train/equal_reward_share"] for step in steps} == {1.0}
