"""Training with an estimator and a loss of the user's own: what is learnt, saved, loaded and shown."""

from pathlib import Path
from typing import Any

import own_functions
import pytest
import torch
import yaml
from gradients import EVERYTHING, learn, make, slow_gradient
from small import Digits, adamw, config_file, equal, fit, module, weights

from lightning_lambdapo import AlgorithmConfig, LambdaPOModule, RolloutCheckpoint
from lightning_lambdapo.commands.inspect_rollout import build_groups
from lightning_lambdapo.commands.main import main
from lightning_lambdapo.runs.model_card import model_card


@pytest.mark.parametrize("max_tokens", [EVERYTHING, 40])
@pytest.mark.parametrize("loss", ["own_functions.reinforce", own_functions.clipped])
def test_the_gradient_is_that_of_the_function(loss: Any, max_tokens: int) -> None:
    case = make()
    expected = slow_gradient(*case, "token")
    found, statistics = learn(*case, max_tokens=max_tokens, loss=loss)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert statistics["clip_fraction"] == 0


def test_rows_of_zero_advantage_may_have_a_gradient() -> None:
    model, batch, rollout, advantages, valid = make()
    assert int((advantages == 0).sum()) == 3
    expected = slow_gradient(model, batch, rollout, torch.ones_like(advantages), valid, "token")
    found, _ = learn(model, batch, rollout, advantages, valid, loss=own_functions.likelihood)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_built_in_estimator_under_another_name_gives_the_same_run(base: str, tmp_path: Path) -> None:
    models = []
    for estimator in ("grpo", "own_functions.grpo"):
        models.append(module(base, algorithm=AlgorithmConfig(estimator=estimator)))
        fit(tmp_path, models[-1])
    assert equal(*map(weights, models))


def test_a_shape_that_does_not_fit_ends_the_first_step(base: str, tmp_path: Path) -> None:
    def per_group(rewards: Any, confidence: Any, valid: Any) -> Any:
        return rewards.mean(1)

    model = module(base, algorithm=AlgorithmConfig(estimator=per_group))
    with pytest.raises(ValueError, match=r"per_group must return one advantage per completion.*\(4, 4\) or \(16,\)"):
        fit(tmp_path, model)


LIVE: dict[str, Any] = {"rewards": [Digits()], "optimizer": adamw}  # what no checkpoint has


def save(path: Path, base: str, **algorithm: Any) -> Path:
    checkpoint = RolloutCheckpoint(dirpath=path, every_n_rollouts=4)
    fit(path, module(base, algorithm=AlgorithmConfig(**algorithm)), callbacks=[checkpoint])
    return next(path.glob("rollout*.ckpt"))


def test_a_checkpoint_has_the_import_path(base: str, tmp_path: Path) -> None:
    settings = {"class_path": "own_functions.Scaled", "init_args": {"factor": 2.0}}
    file = save(tmp_path, base, estimator=settings, loss=own_functions.reinforce)
    stored = torch.load(file, weights_only=True)["hyper_parameters"]["algorithm"]
    assert (stored["estimator"], stored["loss"]) == (settings, "own_functions.reinforce")
    loaded = LambdaPOModule.load_from_checkpoint(file, **LIVE)
    assert loaded.algorithm.own_loss is own_functions.reinforce
    assert isinstance(loaded.algorithm.own_estimator, own_functions.Scaled)
    card = model_card({"algorithm": {**stored, "loss": "absent.package.mine"}}, None, [], steps=4, kind="full")
    assert "trained with own_functions.Scaled" in card
    assert "| loss | absent.package.mine |" in card


def test_a_checkpoint_of_a_function_without_a_path_says_so(base: str, tmp_path: Path) -> None:
    algorithm = AlgorithmConfig(estimator=lambda rewards, *_: rewards)
    file = save(tmp_path, base, estimator=algorithm.estimator)
    with pytest.raises(ValueError, match=r"`algorithm.estimator` was .*<lambda>, given in Python.* Give it again"):
        LambdaPOModule.load_from_checkpoint(file)
    loaded = LambdaPOModule.load_from_checkpoint(file, algorithm=algorithm, **LIVE)
    assert loaded.algorithm.own_estimator is algorithm.estimator
    main(["export", str(file), f"--output={tmp_path / 'export'}"])
    assert "<lambda>" in (tmp_path / "export" / "README.md").read_text()


def test_from_a_file_and_back(base: str, tmp_path: Path) -> None:
    file = config_file(base, tmp_path)
    config = yaml.safe_load(file.read_text())
    scaled = {"class_path": "own_functions.Scaled", "init_args": {"factor": 2.0}}
    config["model"]["algorithm"] = {"estimator": scaled, "loss": "own_functions.reinforce"}
    file.write_text(yaml.safe_dump(config))
    main(["fit", f"--config={file}"])
    run = tmp_path / "lightning_logs" / "version_0"
    stored = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["algorithm"]
    assert (stored["estimator"], stored["loss"]) == (scaled, "own_functions.reinforce")
    checkpoint = next((run / "checkpoints").glob("rollout*.ckpt"))
    assert LambdaPOModule.load_from_checkpoint(checkpoint).algorithm.own_loss is own_functions.reinforce
    main(["fit", f"--config={run / 'config.yaml'}", "--model.algorithm.estimator=own_functions.grpo"])


def test_a_bad_path_ends_the_command_before_weights_are_loaded(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"own_functions has no 'grop'\. Did you mean grpo\?"):
        main(["fit", f"--config={config_file(base, tmp_path)}", "--model.algorithm.estimator=own_functions.grop"])
    assert not list(tmp_path.rglob("metrics.csv"))


def test_inspecting_a_step_calls_the_function() -> None:
    rows = [(2.0, 0.0), (1.0, -1.0)]
    records: list[dict[str, Any]] = [
        {"step": 0, "prompt_id": 0, "sample": sample, "total": total, "score": score, "advantage": 0.0, "valid": True}
        for sample, (total, score) in enumerate(rows)
    ]
    (group,) = build_groups(records, AlgorithmConfig(estimator="own_functions.Doubled"))
    assert group.weights is None
    assert group.advantages.tolist() == [4.0, 2.0]
