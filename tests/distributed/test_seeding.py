"""Streams of rows and the order of prompts: every bit of their keys matters, and those of 0.1 stay as they were."""

import hashlib
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightning_lambdapo.data import PromptSampler
from lightning_lambdapo.distributed.seeding import random_bits
from lightning_lambdapo.rollout.sampling import row_uniforms

ROW: dict[str, Any] = {
    "seed": 1,
    "stage": "train",
    "step": 2,
    "prompt_ids": [7],
    "occurrences": [0],
    "num_samples": 1,
    "length": 6,
}

#: What release 0.1 drew for two samples of this row, and its order of six prompts for seed 7 in epoch 1.
RECORDED_ROWS = [
    [0.39816887938542944, 0.09253236797305686, 0.1475574473711061],
    [0.7083671614904735, 0.18345261774939503, 0.7751830581325057],
]
RECORDED_ORDER = [0, 5, 3, 2, 1, 4]


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", as it is written there."""
    word = 2**64 - 1
    c = [counter >> 64 * i & word for i in range(4)]
    k = [key >> 64 * i & word for i in range(2)]
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [second >> 64 ^ c[1] ^ k[0], second & word, first >> 64 ^ c[3] ^ k[1], first & word]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return c


def bits(count: int, *key: str | int) -> list[int]:
    """The twin of ``random_bits``. NumPy counts from 1."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    number = int.from_bytes(digest, "little")
    return [value for block in range(-(-count // 4)) for value in philox(block + 1, number)][:count]


def order(seed: int, epoch: int = 0, *, count: int = 40, streams: int = 2) -> list[int]:
    sampler = PromptSampler(list(range(count)), batch_size=1, training=True, seed=seed)  # type: ignore[arg-type]
    sampler.streams = streams
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_generator_is_philox() -> None:
    # The published answers for counter and key 0, from the authors' file kat_vectors of Random123.
    assert philox(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    found = random_bits(11, "train", 1, -3, 2**70)
    assert found.dtype == np.uint64
    assert found.tolist() == bits(11, "train", 1, -3, 2**70)


def test_a_stream_has_53_bits_of_the_generator() -> None:
    found = row_uniforms(**(ROW | {"prompt_ids": [7, 9], "occurrences": [0, 1], "num_samples": 2}))
    keys = [(7, 0, 0), (7, 0, 1), (9, 1, 0), (9, 1, 1)]
    for row, (prompt, occurrence, sample) in zip(found.tolist(), keys, strict=True):
        assert row == [1 - (each >> 11) / 2**53 for each in bits(6, "train", 1, 2, prompt, occurrence, sample)]


def test_an_order_sorts_by_the_generator() -> None:
    keys = bits(40, "order", 3, 5)
    found = order(3, 5)
    assert sorted(found) == list(range(40))
    assert all(keys[first] < keys[second] for first, second in pairwise(found))


def test_all_permutations_are_equally_likely() -> None:
    counts = Counter(tuple(order(seed, epoch, count=3)) for seed in range(40) for epoch in range(15))
    assert len(counts) == 6
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5  # chi-square, 5 degrees, p = 0.001


def test_orders_that_agreed_in_release_0_1_differ() -> None:
    assert order(1, streams=1) == order(4097, streams=1)
    assert order(0, 2**20, streams=1) == order(1, 0, streams=1)
    seeds = [1, 4097, *(1 ^ 1 << bit for bit in range(80)), -1]
    found = [order(seed) for seed in seeds] + [order(0, 2**20), order(1, 2), order(12, 0), order(2, 1)]
    assert len({tuple(each) for each in found}) == len({*seeds}) + 4


@pytest.mark.parametrize("name", ["seed", "step", "prompt_ids", "occurrences"])
def test_every_bit_of_a_rows_key_matters(name: str) -> None:
    values = [0, *(1 << bit for bit in range(63))]
    settings = [{name: [value] if isinstance(ROW[name], list) else value} for value in values]
    assert len({tuple(row_uniforms(**(ROW | each))[0].tolist()) for each in settings}) == 64


def test_every_bit_of_the_digest_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release 0.1 hashed to 64 bits and used 32 of them: the birthday of 2^32 comes after 77,000 rows."""

    def drawn(bit: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
        def hashed(_: bytes, *, digest_size: int) -> SimpleNamespace:
            return SimpleNamespace(digest=lambda: (1 << bit % (8 * digest_size)).to_bytes(digest_size, "little"))

        monkeypatch.setattr(hashlib, "blake2b", hashed)
        return tuple(row_uniforms(**ROW)[0].tolist()), tuple(order(0))

    rows, orders = zip(*map(drawn, range(128)), strict=True)
    assert len({*rows}) == len({*orders}) == 128


def test_the_first_generation_is_that_of_release_0_1() -> None:
    found = row_uniforms(**(ROW | {"length": 3, "num_samples": 2}), streams=1)
    assert found.tolist() == RECORDED_ROWS
    assert order(7, 1, count=6, streams=1) == RECORDED_ORDER
    with pytest.raises(KeyError):
        row_uniforms(**ROW, streams=3)
