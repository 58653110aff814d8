"""Accuracy, loyalty and paired differences with their intervals."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eos_search.accuracy import AVERAGE, Share, accuracy, chance, difference, loyalty, mean_accuracy, relative
from eos_vllm.cluttervqa import Row


def rows_for(answers, kinds=None, per_image=3):
    kinds = kinds or ["presence"] * len(answers)
    return [
        Row(str(i), kind, "?", answer, (Path(f"{i // per_image}.png"),), (), choices=2)
        for i, (answer, kind) in enumerate(zip(answers, kinds, strict=True))
    ]


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_accuracy_is_the_share_of_right_replies_and_lies_in_its_interval(marks):
    rows = rows_for(["yes"] * len(marks))
    found = accuracy(rows, [" Yes." if mark else "no" for mark in marks])
    share = found["presence"]
    assert share.value == pytest.approx(sum(marks) / len(marks))
    assert 0 <= share.low <= share.value + 1e-9
    assert share.value <= share.high + 1e-9 <= 1 + 1e-6
    assert share.questions == len(marks)


def test_the_average_weighs_kinds_alike():
    rows = rows_for(["yes"] * 10, ["presence"] * 8 + ["reading"] * 2)
    found = accuracy(rows, ["yes"] * 8 + ["no"] * 2)
    assert found[AVERAGE].value == pytest.approx(0.5)
    assert found[AVERAGE].questions == 10


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from(["presence", "reading", "counting"])), min_size=1, max_size=40)
)
def test_the_mean_alone_is_that_of_the_average(marks):
    rows = rows_for(["yes"] * len(marks), [kind for _, kind in marks])
    replies = ["yes" if mark else "no" for mark, _ in marks]
    assert mean_accuracy(rows, replies) == pytest.approx(accuracy(rows, replies)[AVERAGE].value)


def test_intervals_are_wider_where_answers_hang_together():
    replies = (["yes"] * 6 + ["no"] * 6) * 20
    apart = accuracy(rows_for(["yes"] * 240, per_image=1), replies)["presence"]
    together = accuracy(rows_for(["yes"] * 240, per_image=6), replies)["presence"]
    assert apart.value == together.value == 0.5
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_intervals_cover_about_as_often_as_they_say():
    import random

    numbers, covered = random.Random(0), 0
    for trial in range(200):
        rows = rows_for(["yes"] * 90, per_image=1)
        share = accuracy(rows, ["yes" if numbers.random() < 0.7 else "no" for _ in rows], seed=trial)["presence"]
        covered += share.low <= 0.7 <= share.high
    assert covered >= 180


def test_differences_are_paired():
    rows = rows_for(["yes"] * 300, per_image=1)
    ours = ["yes"] * 200 + ["no"] * 100
    same = difference(rows, ours, ours)[AVERAGE]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = difference(rows, ours, ["no"] * 30 + ours[30:])[AVERAGE]
    assert better.value == pytest.approx(0.1)
    assert better.low > 0


def test_loyalty_counts_the_stock_models_replies_right_or_wrong():
    rows = rows_for(["yes"] * 4)
    assert loyalty(rows, ["no", "no", "Yes", "maybe"], ["no.", "yes", "yes", "no"])[AVERAGE].value == 0.5


def test_chance_needs_the_number_of_answers():
    rows = rows_for(["yes"] * 4, ["presence", "presence", "other", "other"])
    assert chance(rows) == {"presence": 0.5, "other": 0.5, AVERAGE: 0.5}
    unknown = Row("x", "free", "?", "yes", (Path("x.png"),), ())
    assert chance([*rows, unknown]) == {"presence": 0.5, "other": 0.5}


def test_what_is_kept_of_an_accuracy_is_paired():
    rows = rows_for(["yes"] * 300, per_image=1)
    stock = ["yes"] * 240 + ["no"] * 60
    assert relative(rows, stock, stock) == Share(1.0, 1.0, 1.0, 300)
    ours = ["yes"] * 216 + ["no"] * 84  # wrong wherever stock is, and 24 times more
    found = relative(rows, ours, stock)
    assert found.value == pytest.approx(0.9)
    # Of the images that stock is right about, alone: 1.96 * sqrt(0.9 * 0.1 / 240) on either side.
    assert (found.low, found.high) == pytest.approx((0.862, 0.938), abs=0.005)
    assert found.high - found.low < accuracy(rows, ours)["presence"].high - accuracy(rows, ours)["presence"].low
