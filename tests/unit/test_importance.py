"""Query rules, received attention and top-K against loops written from the design's words (section 3)."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_vllm.core.importance import complement, query_weights, received_attention, top_k


def naive_attention(query: Any, key: Any, visible: Any, weights: Any, columns: Any, scale: float) -> list[list[float]]:
    """Softmax over the visible keys, mean over heads, weighted mean over queries; one number at a time."""
    q, k = query.double().tolist(), key.double().tolist()
    result = []
    for b in range(len(q)):
        heads, groups = len(q[b][0]), len(k[b][0])
        received = [0.0] * len(k[b])
        for t, one_query in enumerate(q[b]):
            for h in range(heads):
                head = one_query[h]
                logits = [
                    scale * sum(x * y for x, y in zip(head, k[b][i][h * groups // heads], strict=True))
                    for i in range(int(visible[b][t]))
                ]
                exponents = [math.exp(v - max(logits)) for v in logits]
                for i, e in enumerate(exponents):
                    received[i] += float(weights[b][t]) * e / sum(exponents) / heads
        result.append([received[c] for c in columns[b].tolist()])
    return result


@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 4),
    keys=st.integers(1, 9),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_received_attention_equals_loops(
    batch: int, queries: int, keys: int, groups: int, per_group: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, queries, groups * per_group, 4, generator=g)
    key = torch.randn(batch, keys, groups, 4, generator=g)
    visible = torch.randint(1, keys + 1, (batch, queries), generator=g)
    weights = torch.rand(batch, queries, generator=g)
    columns = torch.stack([torch.randperm(keys, generator=g)[: (keys + 1) // 2] for _ in range(batch)])
    scores = received_attention(query, key, visible, weights, columns, 0.5)
    expected = torch.tensor(naive_attention(query, key, visible, weights, columns, 0.5))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_keys_that_no_query_sees_receive_nothing_and_cannot_matter() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, 4, 8, generator=g), torch.randn(1, 6, 2, 8, generator=g)
    arguments = (torch.tensor([[3, 4]]), torch.tensor([[0.5, 0.5]]), torch.arange(6)[None], 0.3)
    scores = received_attention(query, key, *arguments)
    assert scores[0, 4:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))
    key[0, 4:] = 1e4
    assert torch.equal(received_attention(query, key, *arguments), scores)


def test_queries_of_weight_0_cannot_matter() -> None:
    g = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, 3, 4, 8, generator=g), torch.randn(1, 6, 4, 8, generator=g)
    arguments = (torch.tensor([[6, 6, 1]]), torch.tensor([[0.5, 0.5, 0.0]]), torch.arange(6)[None], 0.3)
    scores = received_attention(query, key, *arguments)
    query[0, 2] = 100.0
    assert torch.equal(received_attention(query, key, *arguments), scores)


def test_ranks_that_hold_some_heads_each_average_to_the_whole() -> None:
    g = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 3, 8, 4, generator=g), torch.randn(2, 7, 4, 4, generator=g)
    rest = (torch.full((2, 3), 7), torch.full((2, 3), 1 / 3), torch.arange(7).expand(2, 7), 0.5)
    ranks = [received_attention(query[:, :, 4 * r : 4 * r + 4], key[:, :, 2 * r : 2 * r + 2], *rest) for r in (0, 1)]
    torch.testing.assert_close((ranks[0] + ranks[1]) / 2, received_attention(query, key, *rest))


def naive_weights(rule: str, visual: torch.Tensor, text: torch.Tensor) -> list[float]:
    """Query weights of one image, ``text`` without padding."""
    count = len(text)
    if rule == "last_text":
        return [0.0] * (count - 1) + [1.0]
    chosen = list(range(count))
    if rule == "relevant_text":
        share = [0.0] * count
        for token in visual.double().tolist():
            logits = [sum(x * y for x, y in zip(token, other, strict=True)) for other in text.double().tolist()]
            exponents = [math.exp(v - max(logits)) for v in logits]
            for i, e in enumerate(exponents):
                share[i] += e / sum(exponents) / len(visual)
        # Shares that equal the mean but for rounding are not above it.
        chosen = [i for i in range(count) if share[i] > 1 / count + 1e-12] or chosen
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(count)]


@pytest.mark.parametrize("rule", ["relevant_text", "all_text", "last_text"])
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), visual=st.integers(1, 5), seed=st.integers(0, 2**20)
)
def test_query_weights_equal_loops_whatever_the_padding(rule: Any, lengths: list[int], visual: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(len(lengths), visual, 5, generator=g)
    text = torch.randn(len(lengths), max(lengths), 5, generator=g)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    weights = query_weights(rule, images, text, mask)
    for b, length in enumerate(lengths):
        expected = naive_weights(rule, images[b], text[b, :length]) + [0.0] * (max(lengths) - length)
        torch.testing.assert_close(weights[b], torch.tensor(expected))


def test_where_all_text_is_equally_relevant_all_of_it_counts() -> None:
    text = torch.ones(1, 4, 3)
    weights = query_weights("relevant_text", torch.randn(1, 5, 3), text, torch.ones(1, 4, dtype=torch.bool))
    assert weights.tolist() == [[0.25] * 4]


def test_relevant_text_works_on_half_precision_embeddings() -> None:
    g = torch.Generator().manual_seed(0)
    visual, text = torch.randn(1, 5, 8, generator=g).half() * 30, torch.randn(1, 4, 8, generator=g).half() * 30
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights = query_weights("relevant_text", visual, text, mask)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, query_weights("relevant_text", visual.float(), text.float(), mask))


@given(data=st.data())
def test_top_k_takes_the_highest_and_of_equals_the_lowest_index(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, count))
    values = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=count, max_size=count), min_size=rows, max_size=rows)
    )
    kept = top_k(torch.tensor(values, dtype=torch.float32), k)
    expected = [sorted(sorted(range(count), key=lambda i: (-row[i], i))[:k]) for row in values]
    assert kept.tolist() == expected
    assert complement(kept, count).tolist() == [[i for i in range(count) if i not in row] for row in expected]
