"""Questions of ClutterVQA: true, unambiguous, unguessable, none twice."""

import re
from collections import Counter, defaultdict

import pytest

from eos_vllm.cluttervqa import KINDS, WORDS, is_right, make_sample, samples
from eos_vllm.cluttervqa.glyphs import DIGITS, LETTERS, SHAPES
from eos_vllm.cluttervqa.questions import OPTIONS
from eos_vllm.cluttervqa.scene import COLOUR_NAMES


@pytest.fixture(scope="module")
def many():
    return list(samples("test", 3000, questions=12))


def truth(scene, question):
    """The answer, found from the text and the objects alone."""
    text, things = question.text.split("\n")[0].rstrip("?"), scene.objects
    if match := re.fullmatch(r"Is there a (\w+) (\w+)", text):
        return "yes" if any((t.colour, t.kind) == match.groups() for t in things) else "no"
    if match := re.fullmatch(r"What colour is the (\w+)", text):
        return only(t.colour for t in things if t.kind == match[1])
    if match := re.fullmatch(r"What shape is the (\w+) object", text):
        return only(t.kind for t in things if t.colour == match[1])
    if text == "How many objects are there":
        return str(len(things))
    if match := re.fullmatch(r"How many (\w+) objects are there", text):
        return str(sum(t.colour == match[1] for t in things))
    if match := re.fullmatch(r"How many (\w+) are there", text):
        kind = next(s for s in SHAPES if match[1] in (f"{s}s", f"{s}es"))
        return str(sum(t.kind == kind for t in things))
    if match := re.fullmatch(r"Which (digit|letter) is (\w+)", text):
        names = DIGITS if match[1] == "digit" else LETTERS
        return only(t.kind for t in things if t.colour == match[2] and t.kind in names)
    match = re.fullmatch(r"Is the (\w+) (left|above) or (right|below) (?:of )?the (\w+)", text)
    a, b = (only(t for t in things if t.kind == name) for name in (match[1], match[4]))
    axis = 1 if match[2] == "left" else 0
    assert a.centre[axis] != b.centre[axis]
    return match[2] if a.centre[axis] < b.centre[axis] else match[3]


def only(values):
    (value,) = values
    return value


def test_every_answer_is_the_only_true_one(many):
    for sample in many[:1000]:
        for question in sample.questions:
            value = truth(sample.scene, question)
            assert question.value == value
            if question.kind != "choice":
                assert question.answer == value
                continue
            options = dict(re.findall(r"\n([A-D])\. (\w+)", question.text))
            assert list(options) == list("ABCD")
            assert len(set(options.values())) == 4
            assert options[question.answer] == value


def test_no_question_stands_twice_on_one_image(many):
    for sample in many:
        texts = [question.text for question in sample.questions]
        assert len(set(texts)) == len(texts)


def test_kinds_are_asked_about_equally_where_scenes_admit_them(many):
    asked = Counter(question.kind for sample in many for question in sample.questions)
    assert set(asked) == set(KINDS)
    assert min(asked.values()) > 0.3 * max(asked.values())
    forms = {question.form for sample in many for question in sample.questions if question.kind == "presence"}
    assert forms == {"random", "popular", "adversarial"}


def test_the_most_frequent_answer_to_each_text_is_no_better_than_chance(many):
    """The best that can be learnt without images; learnt on other images than it is tried on."""
    seen = defaultdict(Counter)
    for sample in samples("train", 9000, questions=12):
        for question in sample.questions:
            seen[question.text][question.answer] += 1
    right, by_chance = defaultdict(list), defaultdict(list)
    for sample in many:
        for question in sample.questions:
            guess = seen[question.text].most_common(1)
            # An unseen text leaves nothing but chance.
            hit = guess[0][0] == question.answer if guess else 1 / question.choices
            right[question.kind].append(hit)
            by_chance[question.kind].append(1 / question.choices)
    for kind in KINDS:
        advantage = sum(right[kind]) / len(right[kind]) - sum(by_chance[kind]) / len(by_chance[kind])
        assert advantage < 0.03, kind


def test_no_answer_is_much_more_frequent_than_others_of_its_form(many):
    answers, choices = defaultdict(Counter), {}
    for question in (q for s in many for q in s.questions):
        for key in ((question.kind, question.form), (question.kind, "")):
            answers[key][question.answer] += 1
            choices[key] = question.choices
    for (kind, form), counter in answers.items():
        advantage = max(counter.values()) / counter.total() - 1 / choices[kind, form]
        if form == "" and kind not in ("presence", "relation", "choice"):
            continue  # the forms of other kinds admit different answers
        # Negatives are redrawn where a scene has none to offer. A presence question's text doesn't show its form, so
        # that the bias of one form is of use to nobody; over all forms presence is held as everything else is.
        assert advantage < (0.04 if kind == "presence" and form else 0.03), (kind, form)


def test_options_are_right_equally_often(many):
    letters = Counter(q.answer for s in many for q in s.questions if q.kind == "choice")
    assert set(letters) == set(OPTIONS)
    assert all(abs(count / letters.total() - 0.25) < 0.03 for count in letters.values())


def test_colours_are_balanced(many):
    answers = Counter(q.answer for s in many for q in s.questions if (q.kind, q.form) == ("attribute", "colour"))
    assert set(answers) == set(COLOUR_NAMES)
    assert max(answers.values()) < 1.25 * min(answers.values())


def test_more_questions_keep_those_before_them():
    few, more = make_sample("test", 5, questions=3), make_sample("test", 5, questions=9)
    assert more.questions[: len(few.questions)] == few.questions
    assert (more.pixels == few.pixels).all()


def test_words_cover_questions_and_answers(many):
    known = {word.strip() for word in WORDS}
    used = {w for s in many for q in s.questions for w in re.findall(r"\w+", f"{q.text} {q.answer}")}
    assert used <= known


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [(" Yes.", "yes", True), ("a", "A", True), ("B. red", "B", False), ("", "no", False), ("no way", "no", False)],
)
def test_marking(reply, answer, right):
    assert is_right(reply, answer) is right
