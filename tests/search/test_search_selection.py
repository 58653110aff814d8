"""Yardsticks: random patches, and those of the objects."""

from pathlib import Path

import torch

from eos_search.selection import selection_scores
from eos_vllm.cluttervqa import Row
from eos_vllm.core.importance import top_k

BOXES = ((0, 0, 12, 12), (48, 24, 68, 44))


def row(name="a", question="q"):
    return Row(question, "presence", "?", "yes", (Path(f"{name}.png"),), BOXES)


def chosen(scores, count):
    return set(top_k(scores[None], count)[0].tolist())


def test_random_is_the_same_for_an_image_and_another_for_another():
    first = selection_scores("random", row(), 24, 96)
    assert torch.equal(first, selection_scores("random", row(question="other"), 24, 96))
    assert not torch.equal(first, selection_scores("random", row("b"), 24, 96))
    assert not torch.equal(first, selection_scores("random", row(), 24, 96, seed=1))
    assert chosen(first, 16) < chosen(first, 64)


def test_random_is_even_over_the_image():
    hits = torch.zeros(576)
    for i in range(400):
        hits[list(chosen(selection_scores("random", row(str(i)), 24, 96), 144))] += 1
    assert hits.mean() == 100
    assert hits.min() > 50
    assert hits.max() < 150


def test_the_oracle_keeps_all_object_patches_first():
    scores = selection_scores("oracle", row(), 24, 96)
    patches = {y * 24 + x for y in range(3) for x in range(3)}
    patches |= {y * 24 + x for y in range(6, 11) for x in range(12, 17)}
    assert chosen(scores, len(patches)) == patches
    assert chosen(scores, 100) > patches


def test_the_oracle_serves_all_objects_when_there_is_little_room():
    kept = chosen(selection_scores("oracle", row(), 24, 96), 2)
    assert kept == {1 * 24 + 1, 8 * 24 + 14}
