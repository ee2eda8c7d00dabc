"""``lambdapo export``: what it writes loads with transformers and peft alone, and is the policy that was trained."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from huggingface_hub import ModelCard
from lightning.pytorch.loggers import CSVLogger
from peft import PeftModel
from safetensors.torch import load_file
from small import Digits, Rows, config_file, module, trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_lambdapo import (
    AdapterConfig,
    EvaluationConfig,
    LambdaPOModule,
    PolicyConfig,
    PolicyExport,
    RolloutCheckpoint,
    SamplingConfig,
)
from lightning_lambdapo.commands import export as export_command
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.rewards import AccuracyReward
from lightning_lambdapo.runs.model_card import model_card

IDS = torch.tensor([[3, 9, 14, 22, 31], [4, 8, 15, 16, 23]])
LORA = AdapterConfig(r=4, alpha=12)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS % model.config.vocab_size).logits
        return found


def train(path: Path, base: str, **settings: Any) -> tuple[LambdaPOModule, Path]:
    """A run of four steps with its checkpoint; the adapter is then large enough to matter."""
    model = module(base, **settings)
    logger = CSVLogger(path, flush_logs_every_n_steps=1)
    callbacks = [RolloutCheckpoint(every_n_rollouts=4)]
    rows = Letters(batch_size=2) if base.endswith(".gguf") else Rows(batch_size=4)
    trainer(path, callbacks=callbacks, logger=logger, enable_checkpointing=True, limit_val_batches=1.0).fit(model, rows)
    return model, path / "lightning_logs" / "version_0"


def front_matter(card: str) -> dict[str, Any]:
    """As the hub's own library reads it."""
    found: dict[str, Any] = cast(Any, ModelCard(card).data).to_dict()
    return found


class Letters(Rows):
    """Prompts that the tokenizer of the GGUF file knows."""

    def setup(self, stage: str) -> None:
        self._rows = {split: [{"prompt": text, "answer": "a"} for text in "abcdefgh"] for split in ("train", "val")}


def long(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def export(source: Path, *arguments: str | Path) -> None:
    main(["export", str(source), *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], source: Path, *arguments: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        export(source, *arguments)
    assert stop.value.code == 1
    return capsys.readouterr().err.partition("lambdapo export: ")[2]


def updates(adapter: Path) -> dict[str, Tensor]:
    """``s B A`` of each adapted weight of an exported adapter, by the weight's name."""
    held = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): 3.0 * held[name.replace("_A", "_B")] @ value
        for name, value in held.items()
        if "lora_A" in name
    }


def test_all_weights(base: str, tmp_path: Path) -> None:
    model, run = train(tmp_path, base)
    export(run, "--output", tmp_path / "out")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model.policy), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(again), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    export(run, "--merge", "--dtype=bfloat16")  # there is nothing to merge
    half = load_file(run / "merged" / "model.safetensors")
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert half.keys() == whole.keys()
    assert all(torch.equal(value, whole[name].bfloat16()) for name, value in half.items())


def test_the_built_in_policy_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    main(["fit", f"--config={config}", f"--trainer.default_root_dir={tmp_path}", *arguments])
    export(tmp_path)
    run = tmp_path / "lightning_logs" / "version_0"
    assert (run / "export-1" / "README.md").read_text() == (run / "export" / "README.md").read_text()
    twins = [AutoModelForCausalLM.from_pretrained(run / name) for name in ("export", "export-1")]
    model = LambdaPOModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    for twin in twins:  # that of the callback, that of the command
        torch.testing.assert_close(logits(twin), logits(model.policy), rtol=1e-5, atol=1e-5)
    settings = GenerationConfig.from_pretrained(run / "export-1")
    assert (settings.do_sample, settings.temperature, settings.max_new_tokens) == (True, 1.0, 24)
    assert (settings.top_k, settings.top_p, settings.min_p) == (0, 1.0, 0.0)
    assert settings.eos_token_id == [model.tokenizer.eos_token_id]
    assert settings.pad_token_id == model.tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(run / "export-1").get_vocab() == model.tokenizer.get_vocab()


def test_an_adapter_and_its_merged_model(base: str, tmp_path: Path) -> None:
    model, run = train(tmp_path, base, lora=LORA)
    export(run)
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    untrained = logits(plain)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(plain, run / "export")), logits(model.policy), rtol=1e-5, atol=1e-5
    )
    export(run / "checkpoints" / "last.ckpt", "--merge", "--output", tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model.policy), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(merged), untrained, atol=1e-2)
    added = updates(run / "export")
    assert len(added) == 14
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, start[name] + added.get(name, 0.0), rtol=1e-6, atol=1e-6)
    assert not list((tmp_path / "merged").glob("adapter*"))
    export(run, "--dtype=float16", "--output", tmp_path / "half")
    assert {value.dtype for value in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {
        torch.float16
    }


def test_a_half_base_is_merged_in_float32(base: str, tmp_path: Path) -> None:
    """A small update would be lost in a bfloat16 weight."""
    model, run = train(tmp_path, base, lora=LORA, policy=PolicyConfig(base, dtype="bfloat16"))
    export(run, "--merge")
    export(run)
    merged = load_file(run / "merged" / "model.safetensors")
    added = updates(run / "export")
    for name, value in AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict().items():
        expected = value.float() + added.get(name, 0.0)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6)
    assert model.rollout_step == 4


def test_a_4_bit_base_is_merged_unquantised(base: str, tmp_path: Path) -> None:
    """The merged weights are W + s B A of the unquantised W; they differ from those that the policy computed with by
    just the quantisation error of W."""
    model, run = train(tmp_path, base, lora=LORA, policy=PolicyConfig(base, quantization="nf4"))
    export(run)
    export(run, "--merge")
    merged = load_file(run / "merged" / "model.safetensors")
    added = updates(run / "export")
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    assert added
    for name, value in merged.items():
        torch.testing.assert_close(value, start[name] + added.get(name, 0.0), rtol=1e-6, atol=1e-6)
    quantised = {
        name.removeprefix("base_model.model."): layer.base_layer.weight
        for name, layer in model.policy.named_modules()
        if hasattr(layer, "base_layer")
    }
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if name in quantised:
                weight = quantised[name]
                layer.weight.copy_(dequantize_4bit(weight.data, weight.quant_state) + added[f"{name}.weight"])
    torch.testing.assert_close(logits(plain), logits(model.policy), rtol=1e-3, atol=1e-3)
    exact = logits(AutoModelForCausalLM.from_pretrained(run / "merged"))
    error = (exact - logits(model.policy)).abs().mean()
    assert 0 < error < 0.5 * exact.std()
    assert "up to the quantisation error of the base" in (run / "merged" / "README.md").read_text()


@pytest.mark.parametrize("how", ["python", "continued", "command line"])
def test_the_adapter_of_a_quantised_base_is_saved_without_it(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The weights of the base may be gone. Files and bytes are those of the way that loads it."""
    where = shutil.copytree(base, tmp_path / "base")
    policy = PolicyConfig(str(where), quantization="nf4")
    settings: dict[str, Any] = {"lora": LORA, "policy": policy}
    if how == "continued":
        _, first = train(tmp_path / "first", base, **settings)
        export(first)
        settings = {"policy": dataclasses.replace(policy, adapter=str(first / "export"))}
    if how == "command line":
        main(["fit", f"--config={config_file(str(where), tmp_path)}", "--model.policy.quantization=nf4"])
        run = tmp_path / "lightning_logs" / "version_0"
    else:
        _, run = train(tmp_path / "run", base, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(export_command, "adapter_alone", lambda *_: None)
        export(run, "--output", tmp_path / "loaded")
    (where / "model.safetensors").rename(where / "gone")
    with pytest.raises(SystemExit):
        export(run, "--merge")
    kept: list[int] = []
    publish = vars(export_command)["publish"]

    def published(policy: Any, *arguments: Any, **keywords: Any) -> None:
        kept.append(sum(p.numel() for p in policy.parameters() if p.device.type != "meta"))
        publish(policy, *arguments, **keywords)

    monkeypatch.setattr(export_command, "publish", published)
    export(run, "--output", tmp_path / "alone")
    adapter = load_file(tmp_path / "loaded" / "adapter_model.safetensors")
    assert kept == [sum(tensor.numel() for tensor in adapter.values())]
    files = {path.name: path.read_bytes() for path in (tmp_path / "loaded").iterdir()}
    assert "adapter_model.safetensors" in files
    assert {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()} == files


def test_a_gguf_base(gguf_file: Path, tmp_path: Path) -> None:
    for name, quantization in (("plain", None), ("nf4", "nf4")):
        config = PolicyConfig(str(gguf_file), quantization=quantization)  # type: ignore[arg-type]
        model, run = train(tmp_path / name, str(gguf_file), lora=LORA, policy=config, rewards=[long])
        export(run)
        export(run, "--merge")
        merged = load_file(run / "merged" / "model.safetensors")
        added = updates(run / "export")
        assert max(value.abs().max() for value in added.values()) > 0.01
        for weight, value in tiny.model("llama").state_dict().items():
            torch.testing.assert_close(merged[weight], value + added.get(weight, 0.0), rtol=1e-5, atol=1e-5)
        if quantization is None:
            again = AutoModelForCausalLM.from_pretrained(run / "merged")
            torch.testing.assert_close(logits(again), logits(model.policy), rtol=1e-5, atol=1e-5)
        card = (run / "export" / "README.md").read_text()
        assert f'from_pretrained("{gguf_file.parent}", gguf_file="tiny.gguf")' in card
        assert "base_model" not in front_matter(card)


def test_a_continued_adapter(base: str, tmp_path: Path) -> None:
    """Its reference adapter must not be merged as well."""
    _, first = train(tmp_path / "first", base, lora=LORA)
    export(first)
    policy = PolicyConfig(base, adapter=str(first / "export"))
    model, run = train(tmp_path / "second", base, policy=policy, algorithm={"kl_coef": 0.1})
    export(run, "--merge")
    again = AutoModelForCausalLM.from_pretrained(run / "merged")
    torch.testing.assert_close(logits(again), logits(model.policy), rtol=1e-5, atol=1e-5)


def test_the_card_and_generation_settings(base: str, tmp_path: Path) -> None:
    validation = EvaluationConfig(sampling=SamplingConfig(temperature=0.0), max_new_tokens=5)
    _, run = train(tmp_path, base, lora=LORA, validation=validation, rewards=[AccuracyReward(), Digits()])
    export(run)
    settings = GenerationConfig.from_pretrained(run / "export")
    assert (settings.do_sample, settings.max_new_tokens) == (False, 5)
    card = (run / "export" / "README.md").read_text()
    assert "| completions per prompt | 4 |" in card
    assert "| adapter | r 4, alpha 12, target_modules all-linear |" in card
    assert "| rollout steps | 4 |" in card
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/reward")
    rewards = [float(value) for row in rows[1:] if (value := row.split(",")[column])]
    assert len(rewards) == 4
    assert f"| reward | {rewards[0]:.3f} | {rewards[-1]:.3f} |" in card
    assert "| pass_at_1 | 0." in card
    assert front_matter(card)["library_name"] == "peft"


def test_the_card_of_hub_models_and_data() -> None:
    settings = {
        "policy": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "quantization": "nf4"},
        "lora": {"r": 16, "alpha": 32},
        "algorithm": {"estimator": "grpo", "kl_coef": 0.01},
        "rewards": [{"class_path": "lightning_lambdapo.rewards.AccuracyReward", "init_args": {"weight": 2.0}}, "a.b"],
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
    }
    config = {"data": {"class_path": "x", "init_args": {"train": {"preset": "gsm8k", "split": "train"}}}}
    metrics = [{"step": float(step), "train/reward": step / 10} for step in range(30)]
    card = model_card(settings, config, metrics, steps=19, kind="merged")
    assert front_matter(card) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["openai/gsm8k"],
        "tags": ["lambdapo", "reinforcement-learning", "rlvr", "lora"],
    }
    assert "# HuggingFaceTB/SmolLM2-135M-Instruct, trained with GRPO" in card
    assert "| rewards | AccuracyReward (weight 2.0); b |" in card
    assert "| KL penalty | 0.01 (k3) |" in card
    assert "| optimizer | AdamW (lr 0.0001) |" in card
    assert "pairwise" not in card
    assert "| reward | 0.050 | 1.750 |" in card  # of the 19 rollouts 0 to 18: means of 0, 0.1 and of 1.7, 1.8
    assert "last tenth of the rollout steps 1 to 19:" in card
    resumed = model_card(settings, config, metrics[10:], steps=19, kind="merged")
    assert "last tenth of the rollout steps 11 to 19:" in resumed
    local = {"data": {"train": {"preset": "gsm8k", "path": "/home/someone/mine.jsonl"}}}
    card = model_card({}, local, [], steps=1, kind="full")
    assert "datasets" not in front_matter(card)
    assert "| data, train | mine.jsonl |" in card
    assert "/home/someone" not in card
    assert "None were recorded." in card
    foreign = {
        "data": {"class_path": "mine.Data", "init_args": {"train": "sets/train.jsonl", "template": "Q: {prompt}"}}
    }
    card = model_card({}, foreign, [], steps=1, kind="full")
    assert "datasets" not in front_matter(card)
    assert "| data, train | train.jsonl |" in card


def test_the_tokenizer_keeps_its_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny.model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    _, run = train(tmp_path / "run", str(tmp_path / "base"))
    (run / ".export.partial").mkdir()
    (run / ".export.partial" / "model.safetensors").touch()  # an export was killed
    export(run)
    assert not (run / ".export.partial").exists()
    assert AutoTokenizer.from_pretrained(run / "export").chat_template == tokenizer.chat_template


def test_other_settings_for_a_checkpoint(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base may have moved since: ``--config`` says where it is."""
    main(["fit", "--config", str(config_file(base, tmp_path))])
    run = tmp_path / "lightning_logs" / "version_0"
    moved = shutil.copytree(base, tmp_path / "moved")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["policy"]["model"] = str(moved)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    export(run, "--config", tmp_path / "other.yaml", "--merge")
    merged = load_file(run / "merged" / "model.safetensors")
    export(run)
    added = updates_by_two(run / "export")
    for name, value in tiny.model("llama").state_dict().items():
        torch.testing.assert_close(merged[name], value + added.get(name, 0.0), rtol=1e-6, atol=1e-6)
    assert "cannot be read: No such file" in refused(capsys, run, "--config", tmp_path / "nothing.yaml")


def updates_by_two(adapter: Path) -> dict[str, Tensor]:
    """The same for alpha = 8 and r = 4, as ``config_file`` has it."""
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] == 8
    return {name: value * 2 / 3 for name, value in updates(adapter).items()}


def test_nothing_is_written_over_and_mistakes_are_named(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = train(tmp_path, base, lora=LORA)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert f"{full} exists and is not an empty directory" in refused(capsys, run, "--output", full)
    assert "is not an empty directory" in refused(capsys, run, "--output", full / "mine.txt")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export(run, "--output", tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob(".*"))
    assert "cannot be used: there is no such file" in refused(capsys, tmp_path / "nothing.ckpt")
    assert "There is no directory" in refused(capsys, tmp_path / "nothing")
    assert "neither a run's directory nor a checkpoint" in refused(capsys, run / "metrics.csv")
    assert "has no checkpoints/*.ckpt" in refused(capsys, full)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:2000])
    assert "broken.ckpt cannot be used: it is truncated" in refused(capsys, broken)


def test_the_callback_writes_the_same_card(base: str, tmp_path: Path) -> None:
    model = module(base, lora=LORA)
    logger = CSVLogger(tmp_path)  # flushes every 100 steps
    trainer(tmp_path, callbacks=[PolicyExport()], logger=logger).fit(model, Rows(batch_size=4))
    card = (tmp_path / "lightning_logs" / "version_0" / "export" / "README.md").read_text()
    assert "| rollout steps | 4 |" in card
    assert "| reward | " in card
