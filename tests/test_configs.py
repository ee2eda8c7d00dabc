"""Every configuration runs as it is written, but for the model, the data, the size and the device."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from lightning_lambdapo.commands.main import main
from lightning_lambdapo.quickstart.tasks import task_rows

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Directory of a tiny Qwen3 with a tokenizer that has a chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "base")
    tiny.model("qwen3").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def rows(preset: str) -> list[dict[str, Any]]:
    worked = "so 2 + 3 = 5 and \\boxed{5}"
    examples: dict[str, dict[str, Any]] = {
        "gsm8k": {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        "math500": {"problem": "2 + 3?", "solution": worked, "answer": "5"},
        "mixture_of_thoughts": {
            "messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": worked}]
        },
    }
    return [examples[preset]] * 24


def overrides(config: dict[str, Any], base: Path, path: Path) -> list[str]:
    """What makes a configuration small enough to run here."""
    arguments = [
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        f"--trainer.default_root_dir={path}",
        "--trainer.enable_progress_bar=false",
        "--model.rollout.max_new_tokens=6",
    ]
    if config["model"]["init_args"]["policy"]["model"] != "builtin:arithmetic":
        arguments.append(f"--model.policy.model={base}")
    for split in ("train", "val"):
        source = config["data"]["init_args"].get(split)
        if source is not None and ("path" in source or source.get("preset", "arithmetic") != "arithmetic"):
            file = path / f"{split}.jsonl"
            problems = rows(source["preset"]) if "preset" in source else task_rows(Path(source["path"]).parts[-2], 48)
            file.write_text("".join(json.dumps(row) + "\n" for row in problems))
            arguments.append(f"--data.{split}.path={file}")
    if "task" in config["data"]["init_args"]["train"]:
        arguments.append("--data.max_prompt_length=512")  # the tiny tokenizer's tokens are characters
    if "val_check_interval" in config["trainer"]:
        arguments.append("--trainer.val_check_interval=2")
    if "devices" in config["trainer"]:
        arguments.append("--trainer.devices=1")
    strategy = config["trainer"].get("strategy")
    if strategy == "ddp":
        arguments.append("--trainer.strategy=auto")
    elif strategy is not None:
        arguments.append("--trainer.strategy.init_args.data_parallel_size=1")
    return arguments


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
# Small GPUs and tiny models aside, Lightning says these of any run on two steps.
@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_config_runs(file: Path, base: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(file.read_text())
    assert file.read_text().startswith("# "), "the header says what it is"
    assert f"lambdapo fit --config {file.relative_to(ROOT)}" in file.read_text(), "and how to launch it"
    main(["fit", f"--config={file}", *overrides(config, base, tmp_path)])
    run = tmp_path / "lightning_logs" / "version_0"
    metrics = (run / "metrics.csv").read_text().splitlines()
    assert "train/reward" in metrics[0].split(",")
    assert len(metrics) >= 3
    assert any("val/" in name for name in metrics[0].split(",")) == ("val_check_interval" in config["trainer"])
    assert (run / "config.yaml").exists()
    names = {callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]}
    picture = run / "reward.png"
    assert picture.stat().st_size > 1000 if "RewardPlot" in names else not picture.exists()
    assert (run / "export").is_dir() == ("PolicyExport" in names)


def test_there_are_all_the_promised_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {
        *("quickstart", "smollm2_gsm8k_cpu", "smollm2_gsm8k_qlora", "qlora_single_gpu"),
        *("lora_ddp", "full_fsdp", "qwen3_1_7b_math", "phi4_mini_math"),
        *("sums", "chain", "sorting", "large_sums", "rough_sums", "last_digits", "long_sorting", "misled"),
        "short_sorting",
    }
