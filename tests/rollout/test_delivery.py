"""Whether a rollout comes from the current weights, with an engine whose copy of the policy can be made to fail.

The same with vLLM itself is in ``vllm/test_delivery.py``.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from copies import CopyModule
from small import Rows, module, trainer
from torch import Tensor, nn

from lightning_lambdapo import AdapterConfig, PolicyConfig, RolloutConfig
from lightning_lambdapo.distributed.parallel import gather_objects
from lightning_lambdapo.policy.versions import fingerprint, other_weights, trained_tensors
from lightning_lambdapo.rollout import delivery
from lightning_lambdapo.rollout.delivery import Delivery, DeliveryError, Evidence


def run(
    base: str,
    path: Path,
    *,
    broken: str | None = None,
    noise: float = 0.0,
    rate: float = 1e-2,
    epochs: int = 2,
    **settings: Any,
) -> CopyModule:
    precision = settings.pop("precision", "32-true")
    made = module(base, rollout=RolloutConfig(group_size=4, max_new_tokens=24), **settings)
    model = CopyModule(
        **{**made.hparams, "rewards": made.rewards, "optimizer": lambda p: torch.optim.AdamW(p, lr=rate)}
    )
    model.broken, model.noise = broken, noise
    trainer(path, max_epochs=epochs, precision=precision).fit(model, Rows(batch_size=4))
    return model


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": AdapterConfig(r=4)},
    "bf16-mixed": {"lora": AdapterConfig(r=4), "precision": "bf16-mixed"},
    "bf16 base": {"lora": AdapterConfig(r=4), "precision": "bf16-mixed", "dtype": "bfloat16"},
}


def settings_of(kind: str, base: str) -> dict[str, Any]:
    settings = dict(KINDS[kind])
    if "dtype" in settings:
        settings["policy"] = PolicyConfig(base, dtype=settings.pop("dtype"))
    return settings


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_delivered_run_goes_through(base: str, tmp_path: Path, kind: str) -> None:
    model = run(base, tmp_path, **settings_of(kind, base))
    delivery = model.sampler.delivery
    assert delivery.version == 8
    assert abs(delivery.evidence["previous"].share) < 0.2
    assert delivery.evidence["previous"].square > 0.01
    assert delivery.drift < (1e-5 if kind in ("full", "lora") else 0.2)


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_of_the_version_before_end_the_run(base: str, tmp_path: Path, kind: str) -> None:
    with pytest.raises(DeliveryError, match="the weights before the last update"):
        run(base, tmp_path, broken="previous", **settings_of(kind, base))


@pytest.mark.parametrize("kind", ["lora", "bf16-mixed", "bf16 base"])
def test_the_base_ends_the_run(base: str, tmp_path: Path, kind: str) -> None:
    with pytest.raises(DeliveryError, match="the base model without the adapter"):
        run(base, tmp_path, broken="base", **settings_of(kind, base))


def test_small_updates_under_much_noise_are_found_by_and_by(base: str, tmp_path: Path) -> None:
    """As in 16 bits: a single rollout does not show it."""
    settings: dict[str, Any] = {"noise": 0.02, "rate": 1e-3, "epochs": 6}
    model = run(base, tmp_path / "right", **settings)
    assert model.sampler.delivery.evidence["previous"].deviations < 4
    with pytest.raises(DeliveryError):
        run(base, tmp_path / "wrong", broken="previous", **settings)


def test_an_engine_with_another_model(base: str, tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match="It computes another model"):
        run(base, tmp_path, noise=0.1)


def test_a_rank_with_fewer_rows_makes_as_many_passes(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sharded weights every pass is a collective. The passes that are made up do not count."""
    counts, evidence = [], []
    complete, gather = delivery._completion, gather_objects
    for more in (0, 3):
        passes: list[int] = []

        def counted(*arguments: Any, passes: list[int] = passes) -> Tensor:
            passes.append(1)
            return complete(*arguments)

        def gathered(value: Any, more: int = more) -> list[Any]:
            return [value, value + more] if type(value) is int else gather(value)

        monkeypatch.setattr(delivery, "_completion", counted)
        monkeypatch.setattr(delivery, "gather_objects", gathered)
        model = run(base, tmp_path / str(more), lora=AdapterConfig(r=4))
        counts.append(len(passes))
        evidence.append(model.sampler.delivery.evidence)
    # Of 8 versions each is scored as current and as the base, and all but the first as the one before.
    assert counts[1] - counts[0] == 3 * (8 + 8 + 7)
    assert evidence[0] == evidence[1]


def test_evidence_by_hand() -> None:
    evidence = Evidence()
    evidence.add(torch.tensor([1.0, -1.0, 0.5]), torch.tensor([2.0, 1.0, 5.0]))
    # Of three tokens the 48th largest is the smallest: 0.5 of |e|, 1 of |h|. So h counts as (1, 1, 1), and
    # p = (e - h / 2) h = (0.5, -1.5, 0); sum h^2 = 3; sum (e - h)^2 / sum e^2 = (1 + 4 + 20.25) / 2.25
    assert evidence.share == pytest.approx(0.5 - 1 / 3)
    assert evidence.deviations == pytest.approx(-1 / math.sqrt(2.5))
    assert evidence.remainder == pytest.approx(25.25 / 2.25)
    evidence.add(torch.tensor([1.0]), torch.tensor([1.0]))
    assert evidence.share == pytest.approx(0.5 + (0.9 * -1 + 0.5) / 3.7)
    assert evidence.deviations == pytest.approx(-0.4 / math.sqrt(0.9 * 2.5 + 0.25))
    assert evidence.remainder == 0
    evidence.add(torch.tensor([]), torch.tensor([]))
    assert evidence.share == pytest.approx(0.5 - 0.4 / 3.7)


@pytest.mark.parametrize("draw", [torch.randn, lambda n: torch.distributions.StudentT(2.0).sample((n,))])
def test_rounding_never_convicts_and_a_failure_does(draw: Callable[[int], Tensor]) -> None:
    """Also where a few tokens differ by far more than the others."""
    torch.manual_seed(0)
    for noise in (1e-3, 1.0, 100.0):
        evidence = Evidence()
        for _ in range(300):
            evidence.add(draw(200).double() * noise, draw(200).double())
            assert not evidence.convicts
    failed = Evidence()
    for _ in range(30):
        difference = draw(200).double()
        failed.add(difference + torch.randn(200), difference)
    assert failed.convicts


@pytest.mark.parametrize("update", [0.0, 0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("unequal", [1.0, 1.2])
def test_all_three_are_rounded(update: float, unequal: float) -> None:
    """What the policy says, too: c and h share the rounding of c, which must not look like a failure."""
    torch.manual_seed(0)
    delivered, failed = Evidence(), Evidence()
    for _ in range(200):
        change, s, c, h = torch.randn(4, 500, dtype=torch.float64)
        current, other = c * unequal, change * update + h
        delivered.add(s - current, other - current)
        assert not delivered.convicts
        failed.add(change * update + s - current, other - current)
    assert failed.convicts or update < 3  # below rounding it need not be found, and does no harm


def test_one_token_is_no_evidence() -> None:
    torch.manual_seed(0)
    evidence = Evidence()
    error, difference = torch.randn(2, 100) * 0.01
    error[7] = difference[7] = 5.0
    evidence.add(error, difference)
    assert (error @ difference) / difference.square().sum() > 0.9
    assert abs(evidence.share) < 0.5
    assert not evidence.convicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_version_is_its_weights(dtype: torch.dtype) -> None:
    policy = cast(Any, nn.Linear(7, 5, dtype=dtype))
    policy.bias.requires_grad_(False)
    delivery = Delivery()
    assert [delivery.next_version(policy), delivery.next_version(policy)] == [1, 1]
    with torch.no_grad():
        policy.bias.add_(1)  # not trained
    assert delivery.next_version(policy) == 1
    policy.weight.data[3, 2] = torch.nextafter(policy.weight.data[3, 2], torch.tensor(9.0, dtype=dtype))
    assert delivery.next_version(policy) == 2  # though torch does not count changes through `data`
    before = fingerprint(trained_tensors(policy))
    kept = {name: tensor.clone() for name, tensor in trained_tensors(policy).items()}
    with other_weights(policy, {"weight": torch.zeros(5, 7)}, own=kept):
        assert not policy.weight.any()
    assert fingerprint(trained_tensors(policy)) == before
    assert torch.equal(policy.weight, kept["weight"])
