"""What the parts of ``gpu_check`` share: the device, the report, clocks and peaks, and modules to train."""

import contextlib
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_lambdapo import (
    DataSource,
    LambdaPODataModule,
    LambdaPOModule,
    PolicyConfig,
    RolloutCheckpoint,
    RolloutConfig,
)
from lightning_lambdapo.datatypes import PromptBatch

BF16 = torch.bfloat16
_SIZES = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


class Bench:
    """Where everything runs, and where each finding is written at once.

    Args:
        cuda: run in full size on the GPU. False rehearses on the CPU.
        report: file that a line is added to for each finding.
    """

    def __init__(self, *, cuda: bool, report: Path) -> None:
        self.cuda = cuda
        self.device = torch.device("cuda" if cuda else "cpu")
        self.report = report
        self.start = time.monotonic()
        self.failures = 0

    def say(self, name: str, **found: Any) -> None:
        """Print a finding, and add it to the report."""
        line = json.dumps({"at": round(time.monotonic() - self.start, 1), "check": name, **found}, default=str)
        print(line, flush=True)
        with self.report.open("a") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def attempt(self, name: str, **what: Any) -> Iterator[None]:
        """Report what fails, and continue with the rest."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            text = f"{type(error).__name__}: {error}"[:1000]
            self.say(name, **what, FAILED=text, trace=traceback.format_exc()[-4000:])

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, float]:
        """What a function returns, and how many seconds it took on the device."""
        self.sync()
        begun = time.perf_counter()
        value = function(*arguments, **keywords)
        self.sync()
        return value, time.perf_counter() - begun

    def peak(self, *, reset: bool = False) -> list[float]:
        """GiB allocated and reserved at most since the last reset."""
        if not self.cuda:
            return [0.0, 0.0]
        found = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return [round(value, 2) for value in found]

    def trace(self, function: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
        """The profiler's events of one call: all of them, and those of the device, the longest first."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            function()
            self.sync()
        events: list[Any] = list(found.key_averages())
        on_device = [event for event in events if event.device_type.name == "CUDA"]
        return events, sorted(on_device, key=lambda event: -event.self_device_time_total)

    def model(self, size: str) -> Qwen3ForCausalLM:
        """A random Qwen3 in bfloat16 whose distributions are far from uniform; tiny on the CPU."""
        shape: dict[str, Any] = _SIZES[size if self.cuda else "tiny"]
        config = Qwen3Config(
            **shape,
            num_key_value_heads=8 if self.cuda else 2,
            vocab_size=151936 if self.cuda else 512,
            head_dim=128 if self.cuda else 16,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        torch.set_default_dtype(BF16)
        try:
            with self.device:
                model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(2.0)
        model.eval()
        return model

    def prompts(self, count: int, length: int) -> PromptBatch:
        """Random prompts of one length."""
        source = torch.Generator().manual_seed(0)
        batch = tiny.batch(torch.randint(3, 500, (count, length), generator=source).tolist())
        return self.moved(batch)

    def moved(self, batch: PromptBatch) -> PromptBatch:
        """A batch on the device."""
        names = ("input_ids", "attention_mask", "prompt_ids")
        return batch._replace(**{name: getattr(batch, name).to(self.device) for name in names})

    def fit(self, module: LambdaPOModule, steps: int, **settings: Any) -> tuple[Trainer, Path]:
        """Train on sums; ``every`` saves a checkpoint after so many rollouts, ``ckpt`` resumes from one."""
        ckpt, every = settings.pop("ckpt", None), settings.pop("every", None)
        callbacks = settings.pop("callbacks", [])
        data = LambdaPODataModule(train=DataSource(preset="arithmetic"), batch_size=settings.pop("batch_size", 16))
        root = Path(tempfile.mkdtemp())
        trainer = Trainer(
            max_steps=steps,
            accelerator="gpu" if self.cuda else "cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=bool(every),
            enable_model_summary=False,
            callbacks=[*callbacks, *([RolloutCheckpoint(every_n_rollouts=every, dirpath=root)] if every else [])],
            default_root_dir=root,
            limit_val_batches=0,
            **settings,
        )
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
        return trainer, root


class Parts(Callback):
    """Collects seconds and peaks of each rollout and each update."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.found: dict[str, list[tuple[float, list[float]]]] = {"rollout": [], "learning": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, owner, method in (("rollout", "sampler", "complete"), ("learning", "learner", "step")):
            part: Any = getattr(pl_module, owner)
            setattr(part, method, self._timed(name, getattr(part, method)))

    def _timed(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            self.bench.peak(reset=True)
            value, seconds = self.bench.clock(original, *arguments, **keywords)
            self.found[name].append((round(seconds, 2), self.bench.peak()))
            return value

        return run


def module(**settings: Any) -> LambdaPOModule:
    """A module of the built-in policy."""
    defaults: dict[str, Any] = {
        "policy": PolicyConfig("builtin:arithmetic"),
        "rollout": RolloutConfig(group_size=8, max_new_tokens=24),
        "seed": 1,
    }
    return LambdaPOModule(**(defaults | settings))


def weights(model: LambdaPOModule) -> Tensor:
    """All trained weights in one vector on the CPU."""
    return torch.cat([p.detach().float().flatten().cpu() for p in model.policy.parameters() if p.requires_grad])


def logged(trainer: Trainer) -> dict[str, float]:
    """Values of the last training step."""
    found = {name.removeprefix("train/"): round(float(v), 5) for name, v in trainer.callback_metrics.items()}
    return {name: value for name, value in found.items() if "/" not in name}


@contextlib.contextmanager
def our_warnings(*words: str) -> Iterator[list[str]]:
    """The warnings raised inside that are of this package or have one of these words."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += sorted(
        {
            str(each.message)[:160]
            for each in caught
            if "lambdapo" in each.filename or any(word in str(each.message) for word in words)
        }
    )
