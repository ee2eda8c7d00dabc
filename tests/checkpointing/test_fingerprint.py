"""A checkpoint knows the adapter that it was trained with, and the base below it, however that is loaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Digits, Rows, adamw, module, trainer
from transformers import AutoModelForCausalLM

from lightning_lambdapo import AdapterConfig, LambdaPOModule, PolicyConfig, RolloutCheckpoint
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.policy.fingerprint import fingerprint
from lightning_lambdapo.policy.loading import load_policy

pytestmark = pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA")


@pytest.fixture(scope="module")
def saved(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two rollouts."""
    return train(tmp_path_factory.mktemp("run"), base, AdapterConfig(r=4, alpha=8))


def train(directory: Path, base: str, lora: AdapterConfig) -> Path:
    callbacks = [RolloutCheckpoint(every_n_rollouts=2, dirpath=directory)]
    run = trainer(directory, callbacks=callbacks, enable_checkpointing=True, max_steps=2)
    run.fit(module(base, lora=lora), Rows(batch_size=4))
    return directory / "last.ckpt"


def load(path: Path, **settings: Any) -> LambdaPOModule:
    return LambdaPOModule.load_from_checkpoint(path, rewards=[Digits()], optimizer=adamw, **settings)


def earlier(path: Path, target: Path) -> Path:
    """The checkpoint as releases before this wrote it."""
    entries = torch.load(path, weights_only=True)
    del entries["lambdapo"]["policy"]
    torch.save(entries, target)
    return target


@pytest.mark.parametrize("release", ["this", "earlier"])
@pytest.mark.parametrize(
    ("lora", "difference"),
    [
        (AdapterConfig(r=4, alpha=16), "lora_alpha is 8 there and 16 here"),
        (AdapterConfig(r=4, alpha=8, options={"use_rslora": True}), "use_rslora is not set there and True here"),
        (AdapterConfig(r=4, alpha=8, options={"alpha_pattern": {"q_proj": 2}}), r"alpha_pattern .*'q_proj': 2\} here"),
        (AdapterConfig(r=4, alpha=8, options={"init_lora_weights": "pissa"}), "init_lora_weights is not set there"),
        (AdapterConfig(r=4, alpha=8, target_modules=["q_proj"]), r"24 have no place \(policy.*lora_A"),
        (AdapterConfig(r=2, alpha=8), "28 have another shape"),
    ],
    ids=["alpha", "rslora", "pattern", "start", "targets", "rank"],
)
def test_other_settings_of_the_adapter_are_refused(
    saved: Path, tmp_path: Path, lora: AdapterConfig, difference: str, release: str
) -> None:
    path = saved if release == "this" else earlier(saved, tmp_path / "earlier.ckpt")
    with pytest.raises(ValueError, match=rf"\.ckpt cannot be used: it.*{difference}.*run that wrote it"):
        load(path, lora=lora)


def test_a_run_does_not_resume_with_another_alpha(base: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_alpha is 8 there and 32 here"):
        trainer(tmp_path).fit(module(base, lora=AdapterConfig(r=4)), Rows(batch_size=4), ckpt_path=str(saved))


def test_dropout_may_change_and_earlier_checkpoints_load(saved: Path, tmp_path: Path) -> None:
    held = torch.load(saved, weights_only=True)["state_dict"]
    for path in (saved, earlier(saved, tmp_path / "earlier.ckpt")):
        again = load(path, lora=AdapterConfig(r=4, alpha=8, dropout=0.1))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in held.items())


@pytest.mark.parametrize("changed", ["embed_tokens", "layers.1.mlp", "norm"])
def test_another_base_of_the_same_shape_is_refused(base: str, saved: Path, tmp_path: Path, changed: str) -> None:
    """Fine-tuned in one place, by one part in a hundred."""
    other = shutil.copytree(base, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if changed in name:
                parameter.mul_(1.01)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=rf"was trained over another base: values of .*{changed}.* differ\. Set `pol"):
        load(saved, policy=PolicyConfig(str(other)))
    # An earlier release noted nothing of the base.
    load(earlier(saved, tmp_path / "earlier.ckpt"), policy=PolicyConfig(str(other)))


@pytest.mark.parametrize("how", ["moved", "bfloat16", "float16", "nf4", "int8", "nf4 in bfloat16"])
def test_the_same_base_is_recognised(base: str, saved: Path, tmp_path: Path, how: str) -> None:
    where = str(shutil.copytree(base, tmp_path / "moved"))
    quantization: Any = next((kind for kind in ("nf4", "int8") if how.startswith(kind)), None)
    dtype: Any = next((kind for kind in ("bfloat16", "float16") if how.endswith(kind)), "float32")
    again = load(saved, policy=PolicyConfig(where, dtype=dtype, quantization=quantization))
    assert again.rollout_step == 2
    assert again.run_state.policy["base"]


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}, {"bias": "all"}])
def test_a_checkpoint_loads_again(base: str, tmp_path: Path, options: dict[str, Any]) -> None:
    lora = AdapterConfig(r=4, alpha=8, options=options)
    path = train(tmp_path, base, lora)
    again = load(path)
    held = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in held.items())


def test_what_is_noted(base: str) -> None:
    """Values of the plain base, whatever is around it. Trained, quantised and changed tensors are omitted."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    weights = dict(plain.named_parameters())
    seen: dict[str, set[str]] = {}
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "lora": ({}, {}),
        "nf4": ({"quantization": "nf4"}, {}),
        "pissa": ({}, {"init_lora_weights": "pissa"}),
        "saved": ({}, {"modules_to_save": ["lm_head"]}),
        "tokens": ({}, {"trainable_token_indices": [3]}),
    }
    for kind, (settings, options) in kinds.items():
        noted = fingerprint(load_policy(PolicyConfig(base, **settings), AdapterConfig(r=4, options=options)))
        seen[kind] = set(noted["base"])
        for name, values in noted["base"].items():
            flat = weights[name].detach().flatten()
            places = torch.linspace(0, len(flat) - 1, min(32, len(flat)), dtype=torch.float64).long()
            assert torch.equal(values, flat[places]), (kind, name)
    matrices = {name for name in seen["lora"] if "_proj" in name}
    assert len(matrices) > 10
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= seen["nf4"]
    assert seen["lora"] - matrices == seen["nf4"] == seen["pissa"]
    assert seen["saved"] == seen["tokens"] == seen["lora"]
    full = load_policy(PolicyConfig(base), None)
    assert fingerprint(full) == {"adapter": None, "base": {}}


def test_the_adapter_alone_is_compared_too(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export of a quantised policy loads no base."""
    policy = PolicyConfig(base, quantization="nf4")
    run = trainer(tmp_path, max_steps=1)
    run.fit(module(base, policy=policy, lora=AdapterConfig(r=4, alpha=8)), Rows(batch_size=4))
    run.save_checkpoint(tmp_path / "one.ckpt")
    settings = tmp_path / "other.yaml"
    settings.write_text(f"model: {{policy: {{model: {base}, quantization: nf4}}, lora: {{r: 4, alpha: 9}}}}")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "one.ckpt"), f"--config={settings}", f"--output={tmp_path / 'out'}"])
    assert "lora_alpha is 8 there and 9 here" in capsys.readouterr().err
    main(["export", str(tmp_path / "one.ckpt"), f"--output={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
