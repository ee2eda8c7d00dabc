import math
import random

import pytest
import torch
from torch import Tensor
from where import DEVICE

from lightning_lambdapo.policy.attention import Layer
from lightning_lambdapo.rollout import kv_store as store_module
from lightning_lambdapo.rollout.kv_store import GroupStore

HEADS, KV_HEADS, SIZE = 4, 2, 5


def states(count: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, heads, length, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes)
    return query, key, value


def made(*, rows: int, group_size: int = 4, prompt_width: int = 6, rounded: bool = False) -> GroupStore:
    return GroupStore(DEVICE, rows=rows, length=64, group_size=group_size, prompt_width=prompt_width, rounded=rounded)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 3])
def test_every_step_is_attention_over_the_rows_own_history(
    monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None, rounded: bool
) -> None:
    """Rows leave and prompts come in at random, and storage grows; a list of keys per row is the reference."""
    monkeypatch.setattr(store_module, "_BLOCK", 4)
    source = random.Random(3)
    store = made(rows=40, rounded=rounded)
    histories: list[tuple[list[Tensor], list[Tensor]]] = []  # per live row: keys (K, d) and values
    layer = Layer(7, 0.3, window, softcap)
    together = 0
    for step in range(60):
        if step in (0, 4, 9, 20, 21) or not len(store):
            lengths = [source.randint(1, 6) for _ in range(source.randint(1, 3))]
            group_size = source.randint(1, 4)
            prefill = store.admit(lengths, group_size)
            assert prefill.prompts == lengths
            query, key, value = states(1, sum(lengths), seed=1000 + step)
            prefill.attend(query, key, value, layer)
            offset = 0
            for length in lengths:
                part = slice(offset, offset + length)
                keys, values = (list(each[0, :, part].unbind(1)) for each in (key, value))
                histories += [(list(keys), list(values)) for _ in range(group_size)]
                offset += length
            kept = torch.tensor([source.random() > 0.2 for _ in histories])  # rows that end with their first token
            kept[-1] = True
            histories = [histories[place] for place in store.keep(kept.tolist()).tolist()]
        assert store.lengths.tolist() == store.sizes
        assert store.position_ids.flatten().tolist() == [len(keys) for keys, _ in histories]
        together = max(together, len({len(keys) for keys, _ in histories}))
        store.begin_step()
        query, key, value = states(len(store), 1, seed=step)
        found = store.attend(query, key, value, layer)
        store.end_step()
        for row, (keys, values) in enumerate(histories):
            keys.append(key[row, :, 0])
            values.append(value[row, :, 0])
            seen = slice(None) if window is None else slice(-window, None)
            k, v = torch.stack(keys[seen]), torch.stack(values[seen])
            for head in range(HEADS):
                scores = k[:, head // 2] @ query[row, head, 0] * 0.3
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                expected = scores.softmax(-1) @ v[:, head // 2]
                torch.testing.assert_close(found[row, 0, head], expected, rtol=0, atol=1e-12)
        kept = torch.tensor([source.random() > 0.12 for _ in histories])
        if not kept.all():
            order = store.keep(kept.tolist())
            assert sorted(order.tolist()) == kept.nonzero().flatten().tolist()
            histories = [histories[place] for place in order.tolist()]
        assert len(store) == len(histories)
    assert together > 3


def test_a_prompt_is_stored_once_and_leaves_with_its_last_row() -> None:
    store = made(rows=8, prompt_width=5)
    prefill = store.admit([3, 5], 4)
    query, key, value = states(1, 8, seed=0)
    prefill.attend(query, key, value, Layer(0, 1.0))
    assert [tuple(part.shape) for part in store._prompts[0]] == [(2, KV_HEADS, 5, SIZE)] * 2
    order = store.keep([False] * 4 + [True, False, True, True])
    assert sorted(order.tolist()) == [4, 6, 7]
    assert store.prompt_lengths.tolist() == [5]
    assert store.groups.tolist() == [0, 0, 0]
    assert torch.equal(store._prompts[0][0][0], key[0, :, 3:])


@pytest.mark.parametrize("ended", [0, 1])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_leaves_with_its_row(monkeypatch: pytest.MonkeyPatch, poison: float, ended: int) -> None:
    """A masked key is multiplied by 0, so a slot must be cleared before the next row or prompt comes in."""
    monkeypatch.setattr(store_module, "_BLOCK", 4)
    store, layer = made(rows=4, group_size=2, prompt_width=3), Layer(0, 1.0)
    factors = torch.ones(2, device=DEVICE)
    factors[ended] = poison  # a prompt, and both of its rows
    for seed, factor in enumerate(factors):
        query, key, value = states(1, 3, seed=seed)
        store.admit([3], 2).attend(query, key * factor, value * factor, layer)
    rows = factors.repeat_interleave(2)[:, None, None, None]
    for step in range(6):
        store.begin_step()
        query, key, value = states(4, 1, seed=10 + step)
        found = store.attend(query, key * rows, value * rows, layer).isfinite().flatten(1).all(1)
        store.end_step()
        assert found.tolist() == factors.isfinite().repeat_interleave(2).tolist()  # no row sees another one
    store.keep(factors.isfinite().repeat_interleave(2).tolist())
    query, key, value = states(1, 1, seed=20)
    store.admit([1], 2).attend(query, key, value, layer)
    for step in range(3):
        store.begin_step()
        assert store.attend(*states(4, 1, seed=30 + step), layer).isfinite().all()
        store.end_step()


def test_storage_is_made_once() -> None:
    store, layer = made(rows=8, group_size=4), Layer(0, 1.0)
    addresses = set()
    for step in range(70):  # longer than a row may be
        if step % 10 == 0:
            query, key, value = states(1, 2, seed=step)
            store.admit([2], 4).attend(query, key, value, layer)
        store.begin_step()
        assert store.attend(*states(len(store), 1, seed=step), layer).isfinite().all()
        store.end_step()
        held = [*store._completions[0], *store._index[KV_HEADS], store._lengths, store._groups, store._prompt_lengths]
        addresses.add(tuple(states.data_ptr() for states in held))
        if step % 10 == 9:
            store.keep([row >= len(store) - 4 for row in range(len(store))])
    assert len(addresses) == 1
    assert [tuple(part.shape) for part in store._completions[0]] == [(8, KV_HEADS, 64, SIZE)] * 2


def test_a_round_number_of_rows_is_kept() -> None:
    """Ended rows of prompts that stay fill up to 1, 2, 3, 4, 6, 8, 12, ... rows."""
    store = made(rows=12, group_size=6, rounded=True)
    store.admit([2, 2], 6)
    alive = [True, False, True, False, True, True] + [False] * 6
    assert store.rounded_up(alive, 0) == alive
    assert sum(store.rounded_up(alive, 1)) == 5  # 6 together
    alive[0] = False
    assert store.rounded_up(alive, 0) == alive
    assert store.rounded_up(alive, 2) == [True, *alive[1:]]
    assert sum(store.rounded_up(alive, 6)) == 6  # all that its prompt has
    assert store.rounded_up([False] * 12, 0) == [False] * 12
    store.rounded = False
    assert store.rounded_up(alive, 2) == alive
