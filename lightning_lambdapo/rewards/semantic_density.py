"""How much of the reference solution the reasoning trace covers, and how much of the trace it accounts for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_lambdapo.functional.embedding_density import embedding_density
from lightning_lambdapo.functional.masking import check_choice
from lightning_lambdapo.functional.ranges import path_text
from lightning_lambdapo.functional.semantic_density import (
    FINAL_ANSWER,
    check_beta,
    check_density_settings,
    reasoning_trace,
    semantic_density,
    tokenize,
)
from lightning_lambdapo.functional.token_weights import TokenWeights
from lightning_lambdapo.rewards.base import Encoder, Reward, RewardInputs
from lightning_lambdapo.rewards.encoder import TokenEncoder

DensityKind = Literal["token", "rouge_l", "embedding"]
Measure = Literal["f", "precision", "recall"]

_MOST_NUMBERS = 2**25
_READ_AT_ONCE = 1000


class SemanticDensityReward(Reward):
    """Precision-recall alignment of the reasoning trace with the reference solution, in [0, 1]. None without reference.

    Both texts are cut before their last final-answer marker and compared by
    :func:`~lightning_lambdapo.functional.semantic_density.semantic_density`, or with ``kind="embedding"`` by
    :func:`~lightning_lambdapo.functional.embedding_density.embedding_density`, which recognises other words of similar
    meaning. The embeddings are hidden states of the model ``encoder`` or, without one, of the policy as it was before
    training. Strategies that shard the policy need an ``encoder``. Cosines of hidden states are rarely small, so the
    values of this kind are higher and closer together than those of the others. ``weight`` compensates for that,
    because advantages are made of differences.

    With ``token_weights="idf"`` a token counts the more, the fewer of the training references have it, and nothing if
    all have it. Without weights, the operators of a sum count as much as its numbers. A run computes the weights from
    the references of its training set, whichever stage judges, and saves them in its checkpoints. A run with a
    checkpoint uses those of the checkpoint. Elsewhere, call :meth:`prepare_references`.

    Args:
        weight: coefficient in the total.
        name: key in logs.
        kind: ``"rouge_l"`` (longest common subsequence), ``"token"`` (clipped n-gram overlap) or ``"embedding"``
            (greedy matching of contextual token embeddings).
        n: length of the n-grams, 1 with the other kinds.
        beta: weight of recall against precision in F.
        measure: ``"f"``, ``"precision"`` or ``"recall"``.
        tokenizer: text to tokens, for both texts. An encoder uses its own.
        encoder: with ``kind="embedding"``, hub id or directory of a transformers model. None takes the frozen policy.
        layer: which of the encoder's hidden states: 0 is the input embedding, -1 the last.
        token_weights: None counts all tokens alike. ``"idf"`` weighs each by its inverse document frequency among the
            training references.

    Attributes:
        weights: the tokens' weights, once they are known.

    Raises:
        ValueError: a setting out of range, or one that the kind does not use.

    Example:
        >>> inputs = RewardInputs(
        ...     prompts=["?"] * 2, completions=["a b c d #### 7"] * 2, answers=[None] * 2, references=["a c e", None],
        ...     completion_lengths=[6] * 2, truncated=[False] * 2, columns=[{}] * 2)
        >>> SemanticDensityReward(measure="precision")(inputs)
        [0.5, None]

    Source: LambdaPO, arXiv 2605.19416. ROUGE, Lin 2004. BERTScore, Zhang et al. 2020, arXiv 1904.09675.
    """

    requires = ("references",)

    def __init__(
        self,
        weight: float = 0.2,
        name: str = "semantic_density",
        kind: DensityKind = "rouge_l",
        n: int = 1,
        beta: float = 1.0,
        measure: Measure = "f",
        tokenizer: Callable[[str], Sequence[str]] = tokenize,
        encoder: str | None = None,
        layer: int = -1,
        token_weights: Literal["idf"] | None = None,
    ) -> None:
        super().__init__(weight, name)
        check_choice("kind", kind, get_args(DensityKind))
        check_choice("measure", measure, get_args(Measure))
        if token_weights not in ("idf", None):
            raise ValueError(f"`token_weights` must be idf or null, got {token_weights!r}.")
        if kind == "embedding":
            check_beta(beta)
            if n != 1:
                raise ValueError(f"`n` must be 1 with kind='embedding', got {n}. N-grams need kind='token'.")
            if tokenizer is not tokenize:
                raise ValueError(
                    f"`tokenizer` is {tokenizer!r} with kind='embedding', but the encoder uses its own tokenizer. "
                    "Omit `tokenizer`."
                )
        else:
            check_density_settings(kind=kind, n=n, beta=beta)
            if encoder is not None or layer != -1:
                raise ValueError(
                    f"`encoder` ({encoder!r}) and `layer` ({layer}) are for kind='embedding', got kind={kind!r}, which "
                    "compares the tokens themselves. Omit them, or set kind='embedding'."
                )
        self.kind = kind
        self.n = n
        self.beta = beta
        self.measure = measure
        self.tokenizer = tokenizer
        self.encoder = path_text(encoder)
        self.encoder_layer = layer
        self.token_weights = token_weights
        self.weights: TokenWeights | None = None
        self._from_checkpoint = False
        self._encode: Encoder | None = None

    def reads_token(self, token: str) -> bool:
        """It reads those before which a trace ends."""
        return token in FINAL_ANSWER

    @property
    def needs_encoder(self) -> bool:
        """True where embeddings are compared and no encoder is named."""
        return self.kind == "embedding" and self.encoder is None

    def prepare_encoder(self, encoder: Encoder | None, device: torch.device) -> None:
        """Take the module's encoder, or load the one that ``encoder`` names."""
        if self.needs_encoder:
            self._encode = encoder
        elif self.encoder is not None:
            self._encode = TokenEncoder.from_pretrained(self.encoder, layer=self.encoder_layer, device=device)

    @property
    def needs_training_references(self) -> bool:
        """True with ``token_weights="idf"``, unless a checkpoint had the weights."""
        return self.token_weights is not None and not self._from_checkpoint

    def prepare_references(self, references: Sequence[str] | None) -> None:
        """Compute the tokens' weights.

        Args:
            references: the training set's. None keeps the weights that there are.

        Raises:
            ValueError: there are neither references nor weights, or the references give every token the weight 0.
        """
        if references is None and self.weights is not None:
            return
        traces = [reasoning_trace(text) for text in references or () if text]
        if not traces:
            raise ValueError(
                f"The reward {self.name!r} has token_weights='idf', which are computed from the references of the "
                "training set, and there are none. Set `data.train`, test with a checkpoint of a run that had the "
                "reward, call its `prepare_references` with a list of references, or set `token_weights` to null."
            )
        self.weights = TokenWeights.idf(self._documents(traces))

    def checkpoint_state(self) -> dict[str, Any]:
        """The tokens' weights, if there are any."""
        return {} if self.weights is None else {"token_weights": self.weights.state()}

    def load_checkpoint_state(self, state: Mapping[str, Any]) -> None:
        """Load the tokens' weights. From then on no training set changes them."""
        if self.token_weights is not None and "token_weights" in state:
            self.weights = TokenWeights(**state["token_weights"])
            self._from_checkpoint = True

    def __call__(self, inputs: RewardInputs) -> list[float | None]:
        """Judge every row."""
        if self.token_weights is not None and self.weights is None:
            self.prepare_references(None)
        if self.kind == "embedding":
            return self._by_meaning(inputs)
        tokens = {text: self._tokens(text) for text in set(inputs.references) if text}
        return [
            self._density(self._tokens(completion), tokens[reference]) if reference else None
            for completion, reference in zip(inputs.completions, inputs.references, strict=True)
        ]

    def _tokens(self, text: str) -> Sequence[str]:
        return self.tokenizer(reasoning_trace(text))

    def _density(self, generated: Sequence[str], reference: Sequence[str]) -> float:
        kind: Literal["token", "rouge_l"] = "token" if self.kind == "token" else "rouge_l"
        density = semantic_density(generated, reference, kind=kind, n=self.n, beta=self.beta, weights=self.weights)
        return float(getattr(density, self.measure))

    def _by_meaning(self, inputs: RewardInputs) -> list[float | None]:
        rows = [
            (reasoning_trace(completion).strip(), reasoning_trace(reference).strip()) if reference else None
            for completion, reference in zip(inputs.completions, inputs.references, strict=True)
        ]
        # Each distinct text is read once, and rows with the same texts get exactly the same number.
        pairs = list(dict.fromkeys(pair for pair in rows if pair is not None))
        if not pairs:
            return [None] * len(rows)
        number = {text: index for index, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        embeddings, mask = self._encoder(list(number))
        weights = None if self.weights is None else self._weighed(list(number), mask, self.weights)
        size, width = embeddings.shape[1:]
        step = max(1, _MOST_NUMBERS // max(1, size * (size + 2 * width)))
        values: list[float] = []
        for start in range(0, len(pairs), step):
            ours, theirs = ([number[text] for text in side] for side in zip(*pairs[start : start + step], strict=True))
            density = embedding_density(
                embeddings[ours],
                mask[ours],
                embeddings[theirs],
                mask[theirs],
                beta=self.beta,
                generated_weights=None if weights is None else weights[ours],
                reference_weights=None if weights is None else weights[theirs],
            )
            values += getattr(density, self.measure).tolist()
        found = dict(zip(pairs, values, strict=True))
        return [None if pair is None else found[pair] for pair in rows]

    def _weighed(self, texts: list[str], mask: Tensor, weights: TokenWeights) -> Tensor:
        """The weight of each token of each text, where ``mask`` says that it counts."""
        found = torch.zeros(mask.shape, dtype=torch.float64)
        for row, (ids, counts) in enumerate(zip(*self._token_ids(texts), strict=True)):
            places = counts.nonzero().flatten()
            found[row, places] = torch.tensor(weights.of(ids[places].tolist()), dtype=torch.float64)
        return found.to(mask.device)

    def _documents(self, traces: list[str]) -> Iterator[Iterable[Any]]:
        """The tokens of each trace: words and symbols, or with ``kind="embedding"`` the encoder's ids."""
        if self.kind != "embedding":
            yield from map(self.tokenizer, traces)
            return
        for start in range(0, len(traces), _READ_AT_ONCE):
            ids, counts = self._token_ids([trace.strip() for trace in traces[start : start + _READ_AT_ONCE]])
            yield from (row[kept].tolist() for row, kept in zip(ids, counts, strict=True))

    def _token_ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The encoder's tokens, where its embeddings are, and which of them count."""
        find = getattr(self._encoder, "token_ids", None)
        if find is None:
            raise ValueError(
                f"token_weights='idf' needs an encoder with a method `token_ids`, and {self._encoder!r} has none. Set "
                "`token_weights` to null, or use TokenEncoder."
            )
        ids, counts = find(texts)
        return ids.cpu(), counts.cpu()

    @property
    def _encoder(self) -> Encoder:
        if self._encode is None and self.encoder is not None:
            self.prepare_encoder(None, torch.device("cpu"))
        if self._encode is None:
            raise RuntimeError(
                "kind='embedding' without `encoder` compares embeddings of the frozen policy, which LambdaPOModule "
                "hands over when a run starts, but none was given. Set `encoder` to a hub id or directory."
            )
        return self._encode
