"""Embedding density inside a run: the frozen policy reads the texts, without a second copy of it."""

from pathlib import Path
from typing import Any, cast

import fitting
import pytest
import reference
import tiny
import torch
import yaml
from comparing import assert_same
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from small import Digits, Rows, equal, fit, module, trainer, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_lambdapo import AdapterConfig, AlgorithmConfig, EvaluationConfig, LambdaPOModule, PolicyConfig
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.evaluation.evaluator import Evaluation
from lightning_lambdapo.functional import reasoning_trace
from lightning_lambdapo.learning.learner import Learner
from lightning_lambdapo.policy.loading import load_policy, save_policy
from lightning_lambdapo.policy.model import causal_lm
from lightning_lambdapo.rewards import SemanticDensityReward
from lightning_lambdapo.rewards.encoder import TokenEncoder
from lightning_lambdapo.rollout.sampler import RolloutSampler

TEXTS = ["1+2=3", "so 7, and that is it", "b"]


def density(**settings: Any) -> SemanticDensityReward:
    defaults: dict[str, Any] = {"kind": "embedding", "weight": 0.5}
    return SemanticDensityReward(**(defaults | settings))


def embedder(model: LambdaPOModule) -> TokenEncoder:
    """What the module has handed to its last reward."""
    return cast(TokenEncoder, cast(SemanticDensityReward, model.rewards[-1])._encode)


def embed(model: LambdaPOModule) -> Tensor:
    embeddings, mask = embedder(model)(TEXTS)
    return embeddings[mask]


def embedded_by(model: PreTrainedModel, text: str) -> Tensor:
    """Hidden states of one text's characters, by itself, behind an end-of-sequence token."""
    ids = [1, *tiny.tokenizer()(text)["input_ids"]]
    with torch.no_grad():
        states: Tensor = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    return states[0, 1:]


def logits(model: LambdaPOModule) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.causal_lm(torch.arange(3, 9)[None]).logits
    return found


def test_lora_reads_with_the_adapter_off_on_the_same_weights(base: str) -> None:
    model = module(base, lora=AdapterConfig(r=4), rewards=[density()])
    model.configure_model()
    plain = torch.cat([embedded_by(AutoModelForCausalLM.from_pretrained(base), text) for text in TEXTS])
    torch.testing.assert_close(embed(model), plain, rtol=0, atol=1e-4)
    before, moved = embed(model), logits(model)
    tiny.randomise(model.policy)
    assert torch.equal(embed(model), before)
    trained = {name for name, p in model.policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.policy.named_parameters() if "lora_" in name}
    assert not torch.allclose(logits(model), moved), "the adapter is on again"
    assert model.policy.training
    assert model.reference is None
    own = {parameter.data_ptr() for parameter in model.policy.parameters()}
    assert {parameter.data_ptr() for parameter in embedder(model).model.parameters()} <= own


def test_full_fine_tuning_reads_with_the_frozen_copy(base: str) -> None:
    model = module(base, rewards=[Digits(), density()])
    model.configure_model()
    assert model.reference is not None
    before = embed(model)
    for parameter in model.policy.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(embed(model), before)
    copied = {parameter.data_ptr() for parameter in model.reference.parameters()}
    assert {parameter.data_ptr() for parameter in embedder(model).model.parameters()} <= copied
    assert module(base, rewards=[density(encoder=base)]).needs_reference is False


def test_a_continued_adapter_reads_as_it_was(base: str, tmp_path: Path) -> None:
    first = load_policy(PolicyConfig(base), AdapterConfig(r=4))
    tiny.randomise(first)
    save_policy(first, tiny.tokenizer(), tmp_path)
    model = module(base, policy=PolicyConfig(base, adapter=str(tmp_path)), rewards=[density()])
    model.configure_model()
    expected = torch.cat([embedded_by(causal_lm(first), text) for text in TEXTS])
    torch.testing.assert_close(embed(model), expected, rtol=0, atol=1e-4)
    tiny.randomise(model.policy, seed=1)
    torch.testing.assert_close(embed(model), expected, rtol=0, atol=1e-4)


class Judged(Callback):
    """Compares each step's densities with loops over the embeddings of the policy as it was."""

    def __init__(self, base: str, adapter: str | None = None) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(base)
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        found = outputs["rewards"].parts["semantic_density"].flatten().tolist()
        references = [text for text in outputs["batch"].references for _ in range(len(found) // 4)]
        for value, text, solution in zip(found, outputs["rollout"].texts, references, strict=True):
            sides = [embedded_by(self.base, reasoning_trace(each).strip()).tolist() for each in (text, solution)]
            masks = [[True] * len(side) for side in sides]
            expected = reference.embedding_density(sides[0], masks[0], sides[1], masks[1], beta=2.0)
            assert value == pytest.approx(expected[2], abs=1e-5)
        self.seen += found


@pytest.mark.parametrize("lora", [None, AdapterConfig(r=4)])
def test_a_run_of_several_updates(
    base: str, tmp_path: Path, lora: AdapterConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "ref_logprobs", lambda *_: pytest.fail("the learning pass needs no reference"))
    model = module(base, lora=lora, rewards=[Digits(), density(beta=2.0)], updates_per_rollout=4, epochs_per_rollout=2)
    model.configure_model()
    before, read = weights(model), embed(model)
    judged = Judged(base)
    steps = fit(tmp_path, model, callbacks=[judged])
    assert not equal(weights(model), before)
    assert torch.equal(embed(model), read)
    assert len(judged.seen) == 64
    assert len(set(judged.seen)) > 30
    for index, step in enumerate(steps):
        mine = judged.seen[16 * index : 16 * index + 16]
        assert step["train/reward/semantic_density"] == pytest.approx(sum(mine) / 16, rel=1e-5)
        assert "train/kl" not in step
        assert 0 <= step["train/density_f"] < 1


def test_with_a_kl_term_too(base: str, tmp_path: Path) -> None:
    steps = fit(tmp_path, module(base, rewards=[density()], algorithm=AlgorithmConfig(kl_coef=0.1)))
    assert steps[0]["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["train/kl"] > 1e-6


@pytest.mark.parametrize("encoder", ["frozen", "own"])
@pytest.mark.parametrize("lora", [None, AdapterConfig(r=4)])
def test_evaluate_then_train(base: str, tmp_path: Path, encoder: str, lora: AdapterConfig | None) -> None:
    model = module(base, lora=lora, rewards=[Digits(), density(encoder=None if encoder == "frozen" else base)])
    judge = trainer(tmp_path, limit_val_batches=1.0)
    first = judge.validate(model, Rows(batch_size=4), verbose=False)[0]
    assert 0 < first["val/reward/semantic_density"] <= 1
    assert judge.validate(model, Rows(batch_size=8), verbose=False)[0] == pytest.approx(first, rel=1e-4)
    before = weights(model)
    judge.fit(model, Rows(batch_size=4))
    assert not equal(weights(model), before)
    saved = tmp_path / "saved.ckpt"
    judge.save_checkpoint(saved)
    assert not any("encoder" in name for name in torch.load(saved)["state_dict"])
    rewards = [density(encoder=None if encoder == "frozen" else base)]
    again = LambdaPOModule.load_from_checkpoint(saved, lora=lora, rewards=rewards, optimizer=model.optimizer_factory)
    torch.testing.assert_close(embed(again), embed(model))


def test_the_metrics_beside_it_stay_lexical(base: str) -> None:
    for rewards in ([density()], [density(), SemanticDensityReward(kind="token", n=2, name="bigrams")]):
        found = Evaluation(EvaluationConfig(), rewards).density
        last = rewards[-1]
        assert (found.kind, found.n) == (("rouge_l", 1) if len(rewards) == 1 else (last.kind, last.n))


def test_shards_are_refused_before_anything_is_loaded(base: str, tmp_path: Path) -> None:
    model = module(base, rewards=[density()])
    with pytest.raises(
        ValueError, match=r"'semantic_density' needs.*ModelParallelStrategy.*Set the reward's `encoder`"
    ):
        trainer(tmp_path, **fitting.strategy("fsdp")).fit(model, Rows(batch_size=4))
    assert not hasattr(model, "policy")


@pytest.mark.parametrize("encoder", ["missing", "layer"])
def test_an_encoder_that_is_not_there_ends_the_run_before_a_rollout(
    base: str, tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RolloutSampler, "complete", lambda *_: pytest.fail("a rollout was paid for"))
    settings = {"encoder": str(tmp_path / "nowhere")} if encoder == "missing" else {"layer": 9}
    with pytest.raises(ValueError, match="`encoder` is .*nowhere" if encoder == "missing" else "`layer` must be from"):
        fit(tmp_path, module(base, rewards=[density(**settings)]))


@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
@pytest.mark.parametrize("encoder", [None, "base"])
def test_from_yaml(base: str, tmp_path: Path, encoder: str | None) -> None:
    path = base if encoder == "base" else None
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text())
    config["trainer"] |= {"max_steps": 2, "limit_val_batches": 0, "enable_progress_bar": False}
    config["model"]["init_args"]["rollout"] = {"group_size": 2, "max_new_tokens": 4}
    entry = config["model"]["init_args"]["rewards"][1]
    entry["init_args"] = {"kind": "embedding", "encoder": path, "weight": 0.2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", f"--config={tmp_path / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path}"])
    written = tmp_path / "lightning_logs" / "version_0"
    assert "train/reward/semantic_density" in (written / "metrics.csv").read_text()
    # What the run wrote down about itself runs too.
    main(["fit", f"--config={written / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path / 'again'}"])
    saved = next((written / "checkpoints").glob("*.ckpt"))
    model = LambdaPOModule.load_from_checkpoint(saved)
    found = cast(SemanticDensityReward, model.rewards[1])
    assert (found.kind, found.encoder, found.needs_encoder) == ("embedding", path, path is None)
    assert embed(model).shape[1] > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kind", "own"), [("ddp", "lora64", False), ("ddp", "full64", False), ("fsdp", "full64", True)]
)
def test_ranks_judge_as_one(base: str, tmp_path: Path, how: str, kind: str, own: bool) -> None:
    def options() -> dict[str, Any]:
        return {"kind": kind, "rewards": [Digits(), density(encoder=base if own else None)]}

    one = fitting.train_on_ranks(tmp_path / "one", base, 1, how="one", **options())
    two = fitting.train_on_ranks(tmp_path / "two", base, 2, how=how, **options())
    assert any("semantic_density" in name for _, name in fitting.metrics(one))
    assert_same(one, two, tolerance=1e-6)
