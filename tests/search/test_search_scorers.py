"""Scorers: bounds and symmetries, cases worked out by hand from the published rules, and rows that lack something."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eos_search.accuracy import accuracy, difference
from eos_search.raw import fingerprint, plain
from eos_search.scorers import EXACT, SCORERS, check_fields, named_option, scorer_of, similarity
from eos_search.vqa import normalised, soft_accuracy
from eos_vllm.cluttervqa import Row
from eos_vllm.core.errors import EosError

# Texts that the rules do something to, and any others.
PIECES = ("a ", "the ", "two", "1,000", "don't", "dont", ".", "5.5", "-", "A", "(B)", " ", "Yes", "'", ",", "none", "/")
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6).map("".join)
OPTIONS = ("red", "dark blue", "a 2", "no")


def row(answer="", **more):
    return Row("0", "question", "?", answer, (Path("0.png"),), (), **more)


def scored(name, reply, *args, **more):
    return SCORERS[name].score(reply, row(*args, **more))


@given(TEXTS, st.lists(TEXTS, min_size=10, max_size=10), st.sampled_from(OPTIONS))
def test_scores_lie_between_0_and_1(reply, answers, option):
    marked = row(option, answers=tuple(answers), options=OPTIONS)
    for name in ("exact", "vqa", "anls"):
        assert 0 <= SCORERS[name].score(reply, marked) <= 1
    assert scored("choice", reply, option, options=OPTIONS) in (0, 1)


@given(TEXTS, TEXTS)
def test_a_reply_that_is_the_reference_is_right_by_all(text, other):
    text = text.strip().rstrip(".")
    assume(EXACT.score(text, row(text)) == 1)
    form, others = " ".join(text.lower().split()), " ".join(other.lower().split())
    assume(form != others and form and others)
    whole = row(text, answers=(text,) * 10, options=(other, text))
    for scorer in SCORERS.values():
        assert scorer.lacks(whole) is None
        assert scorer.score(text, whole) == 1


@given(TEXTS, TEXTS)
def test_reply_and_reference_are_brought_into_one_form(reply, reference):
    assert normalised(normalised(reply)) == normalised(reply)
    for name in ("vqa", "anls"):
        one, other = ((a, (b,) * 10) for a, b in ((reply, reference), (reference, reply)))
        assert scored(name, one[0], answers=one[1]) == scored(name, other[0], answers=other[1])


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Dog.", "dog"),
        ("two dogs, and a cat", "2 dogs and cat"),
        ("100,978", "100978"),
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("Dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("YALL, at five oclock", "y'all at 5 o'clock"),
        ("twas", "'twas"),
        ("its well", "its well"),  # words of their own
        ("3.5", "3.5"),
        ("t-shirt/jeans", "t shirt jeans"),
        ("none", "0"),
        ("U.S.A.", "usa"),
        ("50% of $5", "50% of $5"),
        ("the", ""),
    ],
)
def test_normalisation_follows_the_published_rules(text, form):
    assert normalised(text) == form


@pytest.mark.parametrize(("agreeing", "mark"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_a_mean_over_nine_of_ten_people(agreeing, mark):
    answers = ["Two."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert soft_accuracy("2", answers) == pytest.approx(mark)


@pytest.mark.parametrize(
    ("reply", "references", "mark"),
    [
        ("Hello  World", ("hello world",), 1),
        ("helo", ("hello",), 0.8),
        ("12", ("13",), 0.5),  # exactly at the threshold
        ("kitten", ("sitting",), 4 / 7),
        ("cat", ("dog",), 0),
        ("abc", ("abxyz",), 0),  # 2 / 5
        ("colour", ("red", "color"), 5 / 6),
        ("", ("a",), 0),
        ("", ("",), 1),
    ],
)
def test_anls_is_that_of_the_nearest_reference(reply, references, mark):
    assert scored("anls", reply, answers=references) == pytest.approx(mark)
    if len(references) == 1:
        assert scored("anls", reply, *references) == pytest.approx(mark)


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edit_distance_is_a_distance(a, b, c):
    def distance(x, y):
        return round((1 - similarity(x, y)) * max(len(x), len(y), 1))

    assert (distance(a, b) == 0) is (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B. dark blue", 1),
        ("The answer is C.", 2),
        ("Answer: **C**", 2),
        ("A", 0),
        ("A. red", 0),
        ("A car in dark blue paint", 1),  # an article
        ("A red one", 0),
        ("A dark blue one", 1),
        ("The answer is A", 0),
        ("Option A is right here", 0),
        ("A is right", 0),
        ("I think it is red", 0),
        ("Dark Blue.", 1),
        ("It is red", 0),
        ("It is reddish", None),
        ("A or B", None),
        ("red or dark blue", None),
        ("E", None),
        ("nothing of that", None),
        ("", None),
    ],
)
def test_a_reply_names_an_option_by_letter_or_text(reply, place):
    assert named_option(reply, OPTIONS) == place
    for reference in (OPTIONS[1], "B"):
        assert scored("choice", reply, reference, options=OPTIONS) == (place == 1)


def test_an_option_that_is_another_ones_letter():
    swapped = ("B", "A")
    assert named_option("B", swapped) == 1  # letters come first, in replies and references alike
    assert scored("choice", "B", "B", options=swapped) == 1


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("exact", {"answers": ("a", "b")}, "answer='rows.jsonl row 2': is missing"),
        ("vqa", {"answer": "a"}, "answers='rows.jsonl row 2': are 0, and scorer vqa needs 10"),
        ("vqa", {"answers": ("a",) * 9}, "are 9, and scorer vqa needs 10; give those of 10 people"),
        ("choice", {"answer": "a"}, "options='rows.jsonl row 2': are 0"),
        ("choice", {"answer": "red", "options": ("red", "Red")}, "options='rows.jsonl row 2': are 2"),
        ("choice", {"answer": "A", "options": ("red", " ")}, "options='rows.jsonl row 2': are 2"),
        ("choice", {"answer": "green", "options": OPTIONS}, "answer='rows.jsonl row 2': is neither"),
        ("choice", {"answers": ("A", "E"), "options": OPTIONS}, "answers='rows.jsonl row 2': is neither"),
    ],
)
def test_what_a_row_lacks_is_named(name, fields, said):
    whole = row("red", answers=("red",) * 10, options=OPTIONS)
    for scorer in SCORERS.values():
        check_fields(scorer, [whole], "rows.jsonl")
    with pytest.raises(EosError) as error:
        check_fields(SCORERS[name], [whole, row(**fields)], "rows.jsonl")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_accuracies_are_means_of_scores():
    rows = [row(answers=("red",) * agreeing + ("blue",) * (10 - agreeing)) for agreeing in (10, 2, 1, 0)]
    vqa = SCORERS["vqa"]
    found = accuracy(rows, ["red"] * 4, scorer=vqa)["average"]
    assert found.value == pytest.approx((1 + 0.6 + 0.3 + 0) / 4)
    apart = difference(rows, ["red"] * 4, ["blue"] * 4, scorer=vqa)["average"]
    assert apart.value == pytest.approx(1.9 / 4 - (0 + 1 + 1 + 1) / 4)


def test_results_of_before_there_were_scorers_are_exact():
    assert scorer_of({}) is EXACT
    with pytest.raises(EosError, match="this version has exact, vqa, anls, choice"):
        scorer_of({"scorer": "bleu"})


def test_what_old_rows_are_called_has_not_changed():
    """Committed raw results are gone on from by this digest; references and options change it where there are any."""
    old = row("red")
    assert fingerprint([old]) == "2b835b328b7cdd6e"
    assert plain(old) == {"id": "0", "kind": "question", "form": "", "answer": "red", "image": "0.png"}
    more = [{"answers": ("red",)}, {"options": OPTIONS}, {"history": (("?", "red"),)}]
    assert len({fingerprint([row("red", **fields)]) for fields in ({}, *more)}) == 4
    assert json.loads(json.dumps(plain(row("red", options=OPTIONS))))["options"] == list(OPTIONS)
