"""Every settings dataclass that a user writes in YAML. Values are checked when one is created."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import torch

from lightning_lambdapo.engine_settings import Engine, VLLMConfig, VLLMServerConfig, check_engine
from lightning_lambdapo.functional.advantages import Reduction, Scale, Score, Temperature, Weighting, check_weighting
from lightning_lambdapo.functional.importance import CorrectionLevel, check_cap
from lightning_lambdapo.functional.losses import Aggregation, KLEstimator, Level, check_clipping
from lightning_lambdapo.functional.masking import check_choice
from lightning_lambdapo.functional.own_functions import Function, check_estimator, check_loss, find_function
from lightning_lambdapo.functional.ranges import check_instance, check_real, check_whole, path_text

if TYPE_CHECKING:
    from peft import LoraConfig

Estimator = Literal["lambda", "grpo", "dr_grpo", "rloo"]
Loss = Literal["clipped"]
ImportanceCorrection = Literal["auto", "none", "truncate", "mask"]
T = TypeVar("T")


@dataclass(frozen=True)
class PolicyConfig:
    """Where the policy comes from and how it is stored in memory.

    Attributes:
        model: a hub id, a local directory, the path of a ``.gguf`` file, or ``builtin:arithmetic`` (the tiny policy
            of the quickstart).
        revision: branch, tag or commit of the hub repository.
        tokenizer: hub id or directory of the tokenizer, if it is not the model's own.
        adapter: hub id or directory of a PEFT adapter to continue training from. The reference is then that adapter.
        dtype: type of the base weights. Adapters are always float32.
        quantization: store the frozen base in 4 bits (``"nf4"``, ``"fp4"``) or 8 bits (``"int8"``) with bitsandbytes.
        double_quantization: quantise the 4-bit scales too.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        attn_implementation: transformers' name of the attention implementation. None lets transformers choose. It is
            used only where prompts are not shared: in the ``hf`` engine and for padded rows.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    double_quantization: bool = True
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "adapter"):
            object.__setattr__(self, name, path_text(getattr(self, name)))
        if not self.model:
            raise ValueError("`policy.model` is empty. Give a hub id, a directory or the path of a .gguf file.")
        if self.model.endswith(".gguf") and not Path(self.model).is_file():
            raise ValueError(f"`policy.model` names a GGUF file that does not exist: {self.model}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as a torch dtype."""
        return cast(torch.dtype, getattr(torch, self.dtype))


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter. Other arguments of peft's ``LoraConfig`` go to ``options``.

    Attributes:
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        dropout: dropout on the adapter's input while learning, never during rollouts.
        target_modules: ``"all-linear"``, a regular expression, or module name endings.
        options: further arguments of ``peft.LoraConfig``, such as ``use_dora``, ``use_rslora``, ``rank_pattern``.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def of_layers(setting: str) -> dict[str, Any]:
            return {f"lora.options.{setting}.{key}": each for key, each in (self.options.get(setting) or {}).items()}

        for name, rank in {"lora.r": self.r, **of_layers("rank_pattern")}.items():
            check_whole(name, rank, 1)
        wanted = "a finite number above 0 (the update is scaled by alpha / r)"
        for name, alpha in {"lora.alpha": self.alpha, **of_layers("alpha_pattern")}.items():
            check_real(name, alpha, lambda value: 0 < value < math.inf, wanted)
        check_real("lora.dropout", self.dropout, lambda value: 0 <= value < 1, "in [0, 1), because 1 drops everything")
        if not self.target_modules:
            raise ValueError("`lora.target_modules` is empty, so there is nothing to adapt. Set `all-linear`.")

    def to_peft(self) -> "LoraConfig":
        """The same as a ``peft.LoraConfig`` for causal language models."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
            **self.options,
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn from the policy's logits.

    The filters are applied in the order repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divisor of the logits. 0 decodes greedily.
        top_p: keep the smallest set of tokens whose probability reaches this. 1 keeps all.
        top_k: keep this many most likely tokens. 0 keeps all.
        min_p: drop tokens below this share of the most likely token's probability. 0 keeps all.
        repetition_penalty: divide positive (multiply negative) logits of the tokens seen so far. 1 does nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wanted = "a finite number, at least 0 (0 decodes greedily)"
        check_real("sampling.temperature", self.temperature, lambda value: 0 <= value < math.inf, wanted)
        check_real("sampling.top_p", self.top_p, lambda value: 0 < value <= 1, "in (0, 1]")
        check_whole("sampling.top_k", self.top_k, 0, reason=" (0 keeps all tokens)")
        check_real("sampling.min_p", self.min_p, lambda value: 0 <= value < 1, "in [0, 1)")
        wanted = "a finite number above 0"
        check_real("sampling.repetition_penalty", self.repetition_penalty, lambda value: 0 < value < math.inf, wanted)

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always chosen."""
        return self.temperature == 0

    @property
    def logprob_temperature(self) -> float:
        """Divisor of the logits in every log-probability: ``temperature``, or 1 under greedy decoding."""
        return self.temperature or 1.0

    @property
    def filters(self) -> list[str]:
        """Names of the settings that make tokens come from another distribution than the log-probabilities."""
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return [name for name, value in neutral.items() if getattr(self, name) != value]


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are generated for training.

    Attributes:
        engine: ``"grouped"`` (prompts stored once, finished rows dropped), ``"hf"`` (transformers' ``generate``),
            ``"vllm"`` (vLLM in this process) or ``"vllm_server"`` (vLLM servers). ``"grouped"`` falls back to ``"hf"``
            for architectures that it cannot decode.
        group_size: rollouts per prompt, G. At least 2.
        max_new_tokens: longest completion, in tokens.
        sampling: how tokens are drawn.
        reserve_prompts: keep this many prompts of each training batch in reserve. They replace groups whose rewards are
            all equal (dynamic sampling). A step trains on as many prompts as are not in reserve. Unused reserve
            prompts wait for the next epoch. 0 switches it off. Each rank has its own reserve.
        max_live_tokens: tokens whose keys and values the grouped engine may store at once. Each row counts with its
            longest possible completion. Further prompts start as rows end. None decodes all prompts together.
        vllm: settings of ``engine: vllm``.
        servers: settings of ``engine: vllm_server``.
        stop_token_ids: further tokens that end a completion, in validation, test and prediction too.
        stop_strings: texts that end a completion, in all stages, at the token that completes one. That token belongs to
            the completion, and rewards see its text.
        keep_special_tokens: whether rewards, logs and predictions see the text of special tokens. None keeps those that
            a reward reads, such as ``<think>``, and for rewards of one's own those that come in pairs, like ``<x>`` and
            ``</x>``. The end-of-sequence and padding tokens are never kept.
    """

    engine: Engine = "grouped"
    group_size: int = 8
    max_new_tokens: int = 256
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reserve_prompts: int = 0
    max_live_tokens: int | None = None
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    servers: VLLMServerConfig = field(default_factory=VLLMServerConfig)
    stop_token_ids: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    keep_special_tokens: bool | None = None

    def __post_init__(self) -> None:
        check_engine(self.engine, self.servers, self.sampling.filters, self.max_live_tokens, self.reserve_prompts)
        check_whole("group_size", self.group_size, 2, reason=", because a pairwise advantage needs a peer")
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("reserve_prompts", self.reserve_prompts, 0)
        if self.max_live_tokens is not None:
            check_whole("max_live_tokens", self.max_live_tokens, 1)
        if not all(self.stop_strings):
            raise ValueError("`rollout.stop_strings` has an empty text, which every completion contains. Remove it.")
        if self.sampling.greedy:
            raise ValueError(
                "`rollout.sampling.temperature` is 0: greedy decoding makes all rollouts of a group the same, so there "
                "is nothing to compare. Set it above 0."
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """How validation, test and prediction decode. The sampling settings of training do not apply here.

    Attributes:
        num_samples: completions per prompt.
        k: pass@k and maj@k are logged for each of these, at most ``num_samples``.
        max_new_tokens: longest completion. None uses that of training.
        sampling: how tokens are drawn. The default is greedy.
    """

    num_samples: int = 1
    k: list[int] = field(default_factory=lambda: [1])
    max_new_tokens: int | None = None
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))

    def __post_init__(self) -> None:
        check_whole("validation.num_samples", self.num_samples, 1)
        if not self.k or not all(1 <= k <= self.num_samples for k in self.k):
            raise ValueError(
                f"`validation.k` must list numbers from 1 to num_samples = {self.num_samples}, got {list(self.k)}, "
                "because pass@k needs k samples."
            )
        if self.max_new_tokens is not None:
            check_whole("validation.max_new_tokens", self.max_new_tokens, 1)
        if self.num_samples > 1 and self.sampling.greedy:
            raise ValueError(
                f"`validation.num_samples` is {self.num_samples} and `validation.sampling.temperature` is 0: greedy "
                "decoding gives the same completion every time. Set a temperature above 0, or num_samples to 1."
            )


@dataclass(frozen=True)
class AlgorithmConfig:
    """How rewards become advantages and the loss. The papers publish no values: every default is this package's own.

    Attributes:
        estimator: ``"lambda"`` (pairwise, the settings up to ``scale``) or a baseline: ``"grpo"``, ``"dr_grpo"``,
            ``"rloo"``. Or a function of your own, see ``functional/README.md``.
        weighting: weight of a pair, see :func:`~lightning_lambdapo.functional.pairwise_weights`.
        score: a row's confidence is the ``"mean"`` or the ``"sum"`` of its log-probabilities at sampling.
        temperature: divisor of confidence differences. ``"group_std"`` uses the standard deviation of the group's
            confidences.
        reduction: how a row's pairs become one number.
        center: subtract the group's mean advantage.
        scale: divide by the standard deviation of the rewards of the ``"group"`` or of the global ``"batch"``.
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: the ratio is clipped above at ``1 + clip_high``. With one update per rollout the ratio is 1, so
            clipping does nothing.
        importance_level: ratio per ``"token"``, or per ``"sequence"`` (GSPO).
        importance_correction: weight of a token's surrogate term against the difference of sampler and learning pass.
            ``"truncate"`` lowers ratios above the cap to it. ``"mask"`` drops tokens whose ratio is above the cap or
            below its inverse. ``"none"`` switches it off. ``"auto"`` truncates where the run computes below float32, or
            where the engine's log-probabilities are not the learning pass's own to rounding. In float32 with this
            package's engines it does nothing. With top-k, top-p, min-p or a repetition penalty the log-probabilities
            recorded are those of the unfiltered policy, so kernels and precision are corrected, and the filter is not.
        importance_cap: the cap, above 1.
        importance_correction_level: one weight per ``"token"``, or per ``"sequence"``: the product of its tokens'
            ratios, which strays further from 1 the longer a completion is.
        kl_coef: coefficient of the KL penalty. With 0 learning does not run the reference. It is then built only if a
            reward needs it.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        log_kl: run the reference even if ``kl_coef`` is 0, to log the KL. Log-probabilities are then computed for all
            rows, also those of zero advantage.
        aggregation: mean over ``"token"``, mean of row means (``"sequence"``), or sum over rows times
            ``max_new_tokens`` (``"constant"``).
        mask_truncated: ignore rows that reach ``max_new_tokens``.
        loss: ``"clipped"`` (the settings from ``clip_low`` on), or a function of your own.
    """

    estimator: Estimator | str | dict[str, Any] | Callable[..., Any] = "lambda"
    weighting: Weighting = "confidence"
    score: Score = "mean"
    temperature: Temperature = "group_std"
    reduction: Reduction = "mean"
    center: bool = False
    scale: Scale = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_level: Level = "token"
    importance_correction: ImportanceCorrection = "auto"
    importance_cap: float = 2.0
    importance_correction_level: CorrectionLevel = "token"
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    log_kl: bool = False
    aggregation: Aggregation = "token"
    mask_truncated: bool = False
    loss: Loss | str | dict[str, Any] | Callable[..., Any] = "clipped"

    def __post_init__(self) -> None:
        if self.own_estimator is not None:
            check_estimator("algorithm.estimator", self.own_estimator)
        if self.own_loss is not None:
            check_loss("algorithm.loss", self.own_loss)
        check_choice("algorithm.score", self.score, get_args(Score))
        check_weighting(self.weighting, self.temperature, prefix="algorithm.")
        check_choice("algorithm.reduction", self.reduction, get_args(Reduction))
        check_choice("algorithm.scale", self.scale, get_args(Scale))
        check_choice("algorithm.importance_level", self.importance_level, get_args(Level))
        check_choice("algorithm.importance_correction", self.importance_correction, get_args(ImportanceCorrection))
        levels = get_args(CorrectionLevel)
        check_choice("algorithm.importance_correction_level", self.importance_correction_level, levels)
        check_cap(self.importance_cap)
        check_choice("algorithm.kl_estimator", self.kl_estimator, get_args(KLEstimator))
        check_choice("algorithm.aggregation", self.aggregation, get_args(Aggregation))
        check_clipping(self.clip_low, self.clip_high)
        if math.isinf(self.clip_high):
            raise ValueError("`clip_high` must be finite, got inf. Set a large number to never clip above.")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"`kl_coef` must be finite and at least 0, got {self.kl_coef}.")

    @cached_property
    def own_estimator(self) -> Function | None:
        """The user's own function for advantages, or None."""
        return find_function("algorithm.estimator", self.estimator, get_args(Estimator))

    @cached_property
    def own_loss(self) -> Function | None:
        """The user's own loss, or None."""
        return find_function("algorithm.loss", self.loss, get_args(Loss))

    @property
    def needs_reference(self) -> bool:
        """True if learning computes reference log-probabilities."""
        return self.kl_coef > 0 or self.log_kl


@dataclass(frozen=True)
class PerformanceConfig:
    """Ways of doing less work. They change speed and memory, and results only by rounding.

    The defaults are the fast ways. Switch one off to measure its effect, or to rule it out as a cause.

    Attributes:
        share_prompts_in_rollouts: the grouped engine computes and stores a prompt once for all rows of its group.
        compaction: the grouped engine drops rows that have ended: on the CPU at once, elsewhere every 16 tokens.
        cuda_graphs: the grouped engine records decoding steps as CUDA graphs. None does so on CUDA, unless weights are
            sharded or ``torch.use_deterministic_algorithms`` is on. True elsewhere is an error.
        merge_adapter: decode with a merged copy of the LoRA-adapted weights. None does so on the CPU in float32 and
            float64, where merging is exact to rounding. In 16 bits it rounds small updates away, which
            ``algorithm.importance_correction`` corrects on average.
        decoding_weights_gb: memory in GB (1e9 bytes) for copies of frozen weights in the type of the computation while
            the grouped engine decodes: 4-bit and 8-bit weights dequantised once per rollout, float32 weights cast once
            under autocast. Layers get one in order, as long as they fit. 0 makes none. None is half of the free memory
            on CUDA, and 0 on the CPU.
        share_prompts_in_learning: use one copy of the prompt for all rows of a group in a micro-batch.
        recompute_logits: compute each chunk of logits again in the backward pass. False computes the gradient from each
            chunk while it is in memory, which needs an output head that is not trained.
        fused_lora: compute base and LoRA adapter of a linear layer as one operation.
        onednn: compute float32 linear layers on the CPU with oneDNN instead of torch's usual library (MKL). None does
            so on processors with AVX-512, because MKL does not use AVX-512 on AMD processors.
    """

    share_prompts_in_rollouts: bool = True
    compaction: bool = True
    cuda_graphs: bool | None = None
    merge_adapter: bool | None = None
    decoding_weights_gb: float | None = None
    share_prompts_in_learning: bool = True
    recompute_logits: bool = False
    fused_lora: bool = True
    onednn: bool | None = None

    def __post_init__(self) -> None:
        if self.decoding_weights_gb is not None:
            wanted = "at least 0 (which makes no copies) and at most 1e6, or null (the free memory decides)"
            name = "performance.decoding_weights_gb"
            check_real(name, self.decoding_weights_gb, lambda value: 0 <= value <= 1e6, wanted)


def from_mapping(cls: type[T], value: T | Mapping[str, Any]) -> T:
    """A config dataclass from the mapping that a checkpoint contains. An instance is returned unchanged."""
    if not isinstance(value, Mapping):
        return check_instance(cls, value)
    types: dict[str, Any] = {entry.name: entry.type for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(
        **{
            name: from_mapping(types[name], item) if dataclasses.is_dataclass(types.get(name)) else item
            for name, item in value.items()
        }
    )


def changed_settings(config: Any) -> dict[str, Any]:
    """The settings of a dataclass instance whose values are not their defaults, as plain data."""
    found = dataclasses.asdict(config)
    for each in dataclasses.fields(config):
        default = each.default_factory() if callable(each.default_factory) else each.default
        if found[each.name] == default:
            del found[each.name]
    return found
