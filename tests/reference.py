"""Slow, obvious twins of the numeric code: float64 Python loops over lists, written from the formulas alone."""

import itertools
import math
from collections.abc import Sequence

Row = Sequence[float]
Mask = Sequence[bool]


# -- scores, weights, advantages ------------------------------------------------------------------------------------


def sequence_score(logprobs: Row, mask: Mask, score: str) -> float:
    """Sum or mean of the masked-in log-probabilities; 0 for an empty row."""
    kept = [value for value, counts in zip(logprobs, mask, strict=True) if counts]
    if not kept:
        return 0.0
    return math.fsum(kept) / (len(kept) if score == "mean" else 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def group_weights(
    rewards: Row, scores: Row, valid: Mask, *, weighting: str, temperature: float | str
) -> list[list[float]]:
    """w_ij of one group; 0 on the diagonal and where a row is invalid."""
    rows = [i for i, counts in enumerate(valid) if counts]
    tau = temperature
    if isinstance(tau, str):
        mean = math.fsum(scores[i] for i in rows) / max(len(rows), 1)
        variance = math.fsum((scores[i] - mean) ** 2 for i in rows) / max(len(rows), 1)
        tau = max(math.sqrt(variance), 1e-6)
    weights = [[0.0] * len(rewards) for _ in rewards]
    for i, j in itertools.permutations(rows, 2):
        d = (scores[i] - scores[j]) / tau
        preference = sign(rewards[i] - rewards[j])
        weights[i][j] = {
            "uniform": 1.0,
            "confidence": sigmoid(d),
            "agreement": sigmoid(preference * d),
            "lambdarank": sigmoid(-preference * d),
        }[weighting]
    return weights


def unbiased_std(values: Row) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def lambda_advantages(
    rewards: Sequence[Row],
    scores: Sequence[Row],
    valid: Sequence[Mask],
    *,
    weighting: str,
    temperature: float | str,
    reduction: str,
    center: bool,
    scale: str,
) -> list[list[float]]:
    batch_std = unbiased_std(
        [r for row, ok in zip(rewards, valid, strict=True) for r, v in zip(row, ok, strict=True) if v]
    )
    result = []
    for reward, score, ok in zip(rewards, scores, valid, strict=True):
        rows = [i for i, counts in enumerate(ok) if counts]
        advantages = [0.0] * len(reward)
        kept = [reward[i] for i in rows]
        if len(rows) >= 2 and max(kept) != min(kept):
            weights = group_weights(reward, score, ok, weighting=weighting, temperature=temperature)
            for i in rows:
                total, mass = 0.0, 0.0
                for j in rows:
                    if i != j:
                        total += weights[i][j] * (reward[i] - reward[j])
                        mass += weights[i][j]
                if reduction == "mean":
                    total /= len(rows) - 1
                elif reduction == "weighted_mean":
                    total = total / mass if mass > 1e-12 else 0.0
                advantages[i] = total
            if center:
                mean = math.fsum(advantages[i] for i in rows) / len(rows)
                for i in rows:
                    advantages[i] -= mean
            if scale != "none":
                std = unbiased_std(kept) if scale == "group" else batch_std
                advantages = [value / (std + 1e-4) for value in advantages]
        result.append(advantages)
    return result


def group_advantages(rewards: Sequence[Row], valid: Sequence[Mask], *, estimator: str) -> list[list[float]]:
    result = []
    for reward, ok in zip(rewards, valid, strict=True):
        rows = [i for i, counts in enumerate(ok) if counts]
        kept = [reward[i] for i in rows]
        advantages = [0.0] * len(reward)
        if len(rows) >= 2 and max(kept) != min(kept):
            for i in rows:
                others = [reward[j] for j in rows if estimator != "rloo" or j != i]
                advantages[i] = reward[i] - math.fsum(others) / len(others)
                if estimator == "grpo":
                    advantages[i] /= unbiased_std(kept) + 1e-4
        result.append(advantages)
    return result


# -- loss -----------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Sequence[Row],
    old_logprobs: Sequence[Row],
    ref_logprobs: Sequence[Row] | None,
    advantages: Row,
    mask: Sequence[Mask],
    *,
    clip_low: float,
    clip_high: float,
    level: str,
    kl_coef: float,
    kl: str,
    aggregation: str,
    max_new_tokens: int,
    weights: Sequence[Row] | None = None,
) -> dict[str, float]:
    """``loss``, ``mean_kl``, ``clip_fraction``, ``ratio_max``, token by token; ``weights`` are of surrogate terms."""
    tokens = sum(sum(row) for row in mask)
    rows = sum(any(row) for row in mask)
    loss, kl_sum, clipped_tokens, ratio_max = 0.0, 0.0, 0, 0.0
    for n, keep in enumerate(mask):
        places = [t for t, counts in enumerate(keep) if counts]
        for t in places:
            of = [t] if level == "token" else places
            ratio = math.exp(math.fsum(logprobs[n][u] - old_logprobs[n][u] for u in of) / len(of))
            plain = ratio * advantages[n]
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high) * advantages[n]
            value = -min(plain, clipped) * (1.0 if weights is None else weights[n][t])
            if ref_logprobs is not None:
                d = ref_logprobs[n][t] - logprobs[n][t]
                penalty = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl]
                value += kl_coef * penalty
                kl_sum += penalty
            loss += (
                value
                / {"token": tokens, "sequence": rows * len(places), "constant": rows * max_new_tokens}[aggregation]
            )
            clipped_tokens += plain > clipped
            ratio_max = max(ratio_max, ratio)
    return {
        "loss": loss,
        "mean_kl": kl_sum / max(tokens, 1),
        "clip_fraction": clipped_tokens / max(tokens, 1),
        "ratio_max": ratio_max,
    }


def importance_weights(
    old_logprobs: Sequence[Row],
    behavior_logprobs: Sequence[Row],
    mask: Sequence[Mask],
    *,
    correction: str,
    cap: float,
    level: str,
) -> tuple[list[list[float]], dict[str, float]]:
    """Weight of every token, and the sums over tokens or rows, all of whose ratios are finite."""
    weights = [[0.0] * len(row) for row in mask]
    ratios, used, kl = [], [], 0.0
    for n, keep in enumerate(mask):
        places = [t for t, counts in enumerate(keep) if counts]
        logs = {t: old_logprobs[n][t] - behavior_logprobs[n][t] for t in places}
        kl += math.fsum(math.exp(value) - 1 - value for value in logs.values())
        for unit in [places] if level == "sequence" and places else [[t] for t in places]:
            ratio = math.prod(math.exp(logs[t]) for t in unit)
            inside = ratio <= cap if correction == "truncate" else 1 / cap <= ratio <= cap
            weight = ratio if inside else {"truncate": cap, "mask": 0.0}[correction]
            for t in unit:
                weights[n][t] = weight
            ratios.append(ratio)
            used.append(weight)
    return weights, {
        "count": len(ratios),
        "finite": len(ratios),
        "ratio_sum": math.fsum(ratios),
        "ratio_max": max(ratios, default=0.0),
        "weight_sum": math.fsum(used),
        "weight_square_sum": math.fsum(weight * weight for weight in used),
        "capped": sum(weight != ratio for weight, ratio in zip(used, ratios, strict=True)),
        "kl_tokens": sum(map(sum, mask)),
        "kl_sum": kl,
    }


# -- masks and log-probabilities ------------------------------------------------------------------------------------


def completion_mask(ids: Sequence[int], eos_ids: Sequence[int]) -> list[bool]:
    mask, ended = [], False
    for token in ids:
        mask.append(not ended)
        ended = ended or token in eos_ids
    return mask


def log_softmax(logits: Row, temperature: float) -> list[float]:
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)
    normaliser = top + math.log(math.fsum(math.exp(value - top) for value in scaled))
    return [value - normaliser for value in scaled]


def entropy(logits: Row, temperature: float) -> float:
    return -math.fsum(math.exp(value) * value for value in log_softmax(logits, temperature) if value > -math.inf)


# -- semantic density -----------------------------------------------------------------------------------------------


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Longest common subsequence by the textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def clipped_overlap(first: Sequence[str], second: Sequence[str], n: int) -> tuple[int, int, int]:
    """Matched n-grams by crossing out, and how many n-grams each side has."""
    ours = [tuple(first[i : i + n]) for i in range(len(first) - n + 1)]
    theirs = [tuple(second[i : i + n]) for i in range(len(second) - n + 1)]
    left, matched = list(theirs), 0
    for gram in ours:
        if gram in left:
            left.remove(gram)
            matched += 1
    return matched, len(ours), len(theirs)


def semantic_density(
    generated: Sequence[str], reference: Sequence[str], *, kind: str, n: int, beta: float
) -> tuple[float, float, float]:
    if kind == "rouge_l":
        overlap, ours, theirs = lcs_length(generated, reference), len(generated), len(reference)
    else:
        overlap, ours, theirs = clipped_overlap(generated, reference, n)
    if overlap == 0:
        return 0.0, 0.0, 0.0
    p, r = overlap / ours, overlap / theirs
    return p, r, (1 + beta * beta) * p * r / (beta * beta * p + r)


def embedding_density(
    generated: Sequence[Row],
    generated_mask: Mask,
    reference: Sequence[Row],
    reference_mask: Mask,
    *,
    beta: float,
) -> tuple[float, float, float]:
    """Precision, recall and F of one row by greedy matching, token by token."""
    ours = [row for row, counts in zip(generated, generated_mask, strict=True) if counts]
    theirs = [row for row, counts in zip(reference, reference_mask, strict=True) if counts]
    if not ours or not theirs:
        return 0.0, 0.0, 0.0

    def cosine(x: Row, y: Row) -> float:
        size = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
        return math.fsum(a * b for a, b in zip(x, y, strict=True)) / size if size else 0.0

    p = math.fsum(max(0.0, *(cosine(x, y) for y in theirs)) for x in ours) / len(ours)
    r = math.fsum(max(0.0, *(cosine(x, y) for x in ours)) for y in theirs) / len(theirs)
    return p, r, (1 + beta * beta) * p * r / (beta * beta * p + r) if p > 0 else 0.0


# -- evaluation -----------------------------------------------------------------------------------------------------


def pass_at_k(correct: Mask, k: int) -> float:
    """Share of the k-element subsets that hold a correct sample, by enumerating them."""
    subsets = list(itertools.combinations(correct, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def majority_at_k(votes: Sequence[str | None], correct: Mask, k: int) -> bool:
    ballots = [vote for vote in votes[:k] if vote is not None]
    best, most = None, 0
    for vote in ballots:
        if ballots.count(vote) > most:
            best, most = vote, ballots.count(vote)
    return best is not None and any(ok for vote, ok in zip(votes[:k], correct[:k], strict=True) if vote == best)


def group_auc(rewards: Sequence[Row], scores: Sequence[Row], valid: Sequence[Mask]) -> float:
    """Share of ordered pairs of a group that its scores rank as its rewards do, ties half."""
    points = []
    for reward, score, ok in zip(rewards, scores, valid, strict=True):
        for i, j in itertools.permutations([i for i, counts in enumerate(ok) if counts], 2):
            if reward[i] > reward[j]:
                points.append((sign(score[i] - score[j]) + 1) / 2)
    return math.fsum(points) / len(points)


def pearson(first: Row, second: Row) -> float:
    mean_first, mean_second = math.fsum(first) / len(first), math.fsum(second) / len(second)
    pairs = [(a - mean_first, b - mean_second) for a, b in zip(first, second, strict=True)]
    covariance = math.fsum(a * b for a, b in pairs)
    return covariance / math.sqrt(math.fsum(a * a for a, _ in pairs) * math.fsum(b * b for _, b in pairs))


def quantile(values: Row, q: float) -> float:
    """Smallest value that at least a share ``q`` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered) - 1e-9) - 1, 0)]
