"""Questions of version 2: true, unguessable, and known to rest on the objects that they name."""

import random
import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eos_vllm.cli.main import main
from eos_vllm.cluttervqa import VERSIONS, export, make_sample, read_rows, rows_of
from eos_vllm.cluttervqa.glyphs import SHAPES
from eos_vllm.cluttervqa.questions import ask
from eos_vllm.core.errors import EosError

SECOND = VERSIONS[2]


def drawn(seed, questions=14, cells=4):
    """A scene and its questions; nothing is painted."""
    numbers = random.Random(seed)
    scene = SECOND.draw(numbers, cells)
    return scene, ask(
        scene, numbers, [SECOND.kinds[i % len(SECOND.kinds)] for i in range(questions)], SECOND.generators
    )


@pytest.fixture(scope="module")
def many():
    return [drawn(f"many/{seed}") for seed in range(2500)]


def only(values):
    (value,) = values
    return value


def most(values):
    (first, most), *others = Counter(values).most_common(2)
    assert not others or others[0][1] < most
    return first


def truth(scene, text):
    """The answer, found from the text and the objects alone."""
    shapes, text = scene.shapes, text.rstrip("?")
    if match := re.fullmatch(r"Is there a (\w+) (\w+)", text):
        return "yes" if any((t.colour, t.kind) == match.groups() for t in shapes) else "no"
    if match := re.fullmatch(r"What shape is the (\w+) one", text):
        return only(t.kind for t in shapes if t.colour == match[1])
    if text == "What colour is the background":
        return scene.tint
    if match := re.fullmatch(r"What colour is the (solid|hollow) (\w+)", text):
        return only(t.colour for t in shapes if (t.fill, t.kind) == match.groups())
    if match := re.fullmatch(r"What colour is the (\w+)", text):
        return only(t.colour for t in shapes if t.kind == match[1])
    if match := re.fullmatch(r"Is the (\w+) (\w+) solid or hollow", text):
        return only(t.fill for t in shapes if (t.colour, t.kind) == match.groups())
    if match := re.fullmatch(r"How many (\w+) shapes are there", text):
        return str(sum(t.colour == match[1] for t in shapes))
    if match := re.fullmatch(r"How many (\w+) are there", text):
        kind = next(s for s in SHAPES if match[1] in (f"{s}s", f"{s}es"))
        return str(sum(t.kind == kind for t in shapes))
    if match := re.fullmatch(r"Which (code|number) is (\w+)", text):
        return only(t.text for t in scene.strings if (t.kind, t.colour) == match.groups())
    if text == "Which colour is most common":
        return most(t.colour for t in shapes)
    if text == "Which shape is most common":
        return most(t.kind for t in shapes)
    match = re.fullmatch(r"Is the (\w+) (\w+) (left|above) or (right|below) (?:of )?the (\w+) (\w+)", text)
    a, b = (only(t for t in shapes if (t.colour, t.kind) == name) for name in (match.groups()[:2], match.groups()[4:]))
    axis = 1 if match[3] == "left" else 0
    assert a.centre[axis] != b.centre[axis]
    return match[3] if a.centre[axis] < b.centre[axis] else match[4]


@given(st.integers(0, 2**32), st.sampled_from((2, 3, 4)))
def test_every_answer_is_the_only_true_one(seed, cells):
    scene, questions = drawn(seed, cells=cells)
    assert len({question.text for question in questions}) == len(questions)
    for question in questions:
        assert question.answer == question.value == truth(scene, question.text)


@given(st.integers(0, 2**32), st.sampled_from((2, 4)))
def test_questions_know_what_they_name_and_need(seed, cells):
    scene, questions = drawn(seed, cells=cells)
    for question in questions:
        assert all(f" {name}" in question.text for name, _ in question.names)
        assert tuple(thing for _, thing in question.names) == question.about
        assert set(question.needs) <= set(scene.objects)
        if question.kind in ("attribute", "detail", "relation", "reading"):
            assert question.needs == question.about
            assert len(question.needs) == (2 if question.kind == "relation" else 1)
        elif question.form == "background":
            assert question.needs == ()
        elif question.answer == "yes":
            assert set(question.about) <= set(question.needs)
            assert len({(thing.colour, thing.kind) for thing in question.needs}) == 1
        else:
            assert set(question.needs) == set(scene.shapes)


def test_a_detail_is_what_tells_an_object_from_another_one():
    for seed in range(300):
        scene, questions = drawn(f"detail/{seed}", cells=4)
        for question in questions:
            if question.kind == "detail":
                (thing,) = question.about
                assert any(o is not thing and o.kind == thing.kind for o in scene.shapes)


def test_all_kinds_and_forms_are_asked(many):
    asked = Counter((q.kind, q.form) for _, questions in many for q in questions)
    kinds = Counter(q.kind for _, questions in many for q in questions)
    assert set(kinds) == set(SECOND.kinds)
    assert min(kinds.values()) > 0.3 * max(kinds.values())
    assert {form for kind, form in asked if kind == "reading"} == {"code", "number", "twin"}
    assert {form for kind, form in asked if kind == "scene"} == {"background", "most"}
    assert min(asked.values()) > 250


def test_the_most_frequent_answer_to_each_text_is_no_better_than_chance(many):
    """The best that can be learnt without images; learnt on other scenes than it is tried on."""
    seen = defaultdict(Counter)
    for seed in range(4000):
        for question in drawn(f"seen/{seed}")[1]:
            seen[question.text][question.answer] += 1
    right, by_chance = defaultdict(list), defaultdict(list)
    for question in (q for _, questions in many for q in questions):
        guess = seen[question.text].most_common(1)
        right[question.kind].append(guess[0][0] == question.answer if guess else 1 / question.choices)
        by_chance[question.kind].append(1 / question.choices)
    for kind in SECOND.kinds:
        advantage = sum(right[kind]) / len(right[kind]) - sum(by_chance[kind]) / len(by_chance[kind])
        assert advantage < 0.03, kind


def test_words_cover_questions_and_first_characters(many):
    known = {word.strip() for word in SECOND.words}
    used = {word for _, questions in many for q in questions for word in re.findall(r"\w+", q.text)}
    answers = {q.answer if q.kind != "reading" else q.answer[0] for _, questions in many for q in questions}
    assert used | answers <= known


def test_rows_say_what_is_needed_in_version_2_only(tmp_path):
    first = rows_of(make_sample("test", 3))
    assert all("needs" not in row for row in first)
    file = export(tmp_path / "x", "validation", images=3, version=2)
    rows = read_rows(file)
    questions = [q for i in range(3) for q in make_sample("validation", i, version=2).questions]
    assert [row.needs for row in rows] == [tuple(thing.box for thing in q.needs) for q in questions]
    assert {row.kind for row in rows} == set(SECOND.kinds)
    assert read_rows(export(tmp_path / "y", images=1))[0].needs is None


def test_the_command_writes_version_2(tmp_path, capsys):
    given = ["cluttervqa", str(tmp_path / "x"), "--images", "2", "--benchmark-version", "2", "--processes", "1"]
    assert main(given) == 0
    assert "2 images and" in capsys.readouterr().out
    assert all(row.needs is not None for row in read_rows(tmp_path / "x/test.jsonl"))
    assert main([*given[:1], str(tmp_path / "y"), "--benchmark-version", "3"]) == 2
    assert "version=3" in capsys.readouterr().err


def test_unknown_versions_and_their_kinds_are_refused(tmp_path):
    with pytest.raises(EosError, match="version=3: is none of ClutterVQA; choose from 1, 2"):
        make_sample("test", 0, version=3)
    with pytest.raises(EosError, match="version=3"):
        export(tmp_path / "x", version=3)
    assert not (tmp_path / "x").exists()
    with pytest.raises(EosError, match="kinds='choice'"):
        make_sample("test", 0, kinds=("choice",), version=2)
    with pytest.raises(EosError, match="kinds='detail'"):
        make_sample("test", 0, kinds=("detail",))
