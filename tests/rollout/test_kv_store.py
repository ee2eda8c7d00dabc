import random

import pytest
import torch
from torch import Tensor

from lightning_lambdapo.policy.attention import Layer
from lightning_lambdapo.rollout import kv_store as store_module
from lightning_lambdapo.rollout.kv_store import GroupStore

HEADS, KV_HEADS, SIZE = 4, 2, 5


def states(count: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, heads, length, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 3])
def test_every_step_is_attention_over_the_rows_own_history(
    monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None
) -> None:
    """Rows leave and prompts come in at random, and storage grows; a list of keys per row is the reference."""
    monkeypatch.setattr(store_module, "_BLOCK", 4)
    source = random.Random(3)
    store = GroupStore(torch.device("cpu"))
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
            histories = [histories[place] for place in store.keep(kept).tolist()]
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
            order = store.keep(kept)
            assert sorted(order.tolist()) == kept.nonzero().flatten().tolist()
            histories = [histories[place] for place in order.tolist()]
        assert len(store) == len(histories)
    assert together > 3


def test_a_prompt_is_stored_once_and_leaves_with_its_last_row() -> None:
    store = GroupStore(torch.device("cpu"))
    prefill = store.admit([3, 5], 4)
    query, key, value = states(1, 8, seed=0)
    prefill.attend(query, key, value, Layer(0, 1.0))
    assert [tuple(part.shape) for part in store._prompts[0]] == [(2, KV_HEADS, 5, SIZE)] * 2
    order = store.keep(torch.tensor([False] * 4 + [True, False, True, True]))
    assert sorted(order.tolist()) == [4, 6, 7]
    assert store.prompt_lengths.tolist() == [5]
    assert store.groups.tolist() == [0, 0, 0]
    assert torch.equal(store._prompts[0][0][0], key[0, :, 3:])
