"""Questions of ClutterVQA, one generator for each kind, each with answers that cannot be guessed from the text.

The kinds follow public benchmarks: presence POPE (random, popular and adversarial negatives), attribute GQA, counting
MME, relation GQA and MMBench, reading TextVQA and OCRBench, choice MMBench and SEED-Bench.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eos_vllm.cluttervqa.glyphs import DIGITS, LETTERS, SHAPES, TYPES
from eos_vllm.cluttervqa.scene import COLOUR_NAMES, PATCH, Object, Scene
from eos_vllm.cluttervqa.small import Thing

KINDS = ("presence", "attribute", "counting", "relation", "reading", "choice")
OPTIONS = "ABCD"
_LEAST_OFFSET = 2 * PATCH
_TRIES = 4


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: one of ``KINDS``.
        form: the variant within the kind, such as ``adversarial``.
        text: the question.
        answer: one word.
        choices: how many answers the form admits; chance is one in so many.
        value: what is to be seen; other than ``answer`` only where that is an option's letter.
        about: the objects that the question names.
        needs: version 2: the objects whose patches the answer rests on; all, where it rests on what is not there.
        names: version 2: the words of the text that name an object, and which.
    """

    kind: str
    form: str
    text: str
    answer: str
    choices: int
    value: str
    about: tuple[Object, ...]
    needs: tuple[Thing, ...] = ()
    names: tuple[tuple[str, Thing], ...] = ()


Generator = Callable[[Any, random.Random], Question | None]
"""Draws one question about a scene, or none where the scene does not admit the draw."""


def ask(
    scene: Scene, numbers: random.Random, kinds: list[str], generators: Mapping[str, Generator] | None = None
) -> list[Question]:
    """Asks one question of each wanted kind where the scene admits one; none stands twice.

    Args:
        scene: what is asked about.
        numbers: source of randomness.
        kinds: wanted kinds, repeats allowed.
        generators: by kind; those of version 1 where None.
    """
    generators = generators or _ASK
    asked: list[Question] = []
    texts: set[str] = set()
    for kind in kinds:
        for _ in range(_TRIES):
            question = generators[kind](scene, numbers)
            if question is not None and question.text not in texts:
                asked.append(question)
                texts.add(question.text)
                break
    return asked


def _presence(scene: Scene, numbers: random.Random) -> Question | None:
    """Half yes, half no, for shapes and glyphs alike: the class is drawn before the answer."""
    form = numbers.choice(("random", "popular", "adversarial"))
    shapes = [thing for thing in scene.objects if thing.category == "shape"]
    glyphs = [thing for thing in scene.objects if thing.category != "shape"]
    # Plain shapes are the popular kinds: each is four times as frequent as a digit or letter.
    wants_shape = {"random": 0.2, "popular": 1.0, "adversarial": 0.5}[form]
    of_class = shapes if (numbers.random() < wants_shape and shapes) or not glyphs else glyphs
    there = {(thing.colour, thing.kind): thing for thing in scene.objects}
    if numbers.random() < 0.5:
        thing = numbers.choice(of_class)
        return _yes_no("presence", form, f"Is there a {thing.colour} {thing.kind}?", True, (thing,))
    kinds = SHAPES if of_class is shapes else DIGITS + LETTERS
    if form == "adversarial":
        pairs = [(c.colour, k.kind) for c in scene.objects for k in of_class if (c.colour, k.kind) not in there]
    else:
        pairs = [(c, k) for c in COLOUR_NAMES for k in kinds if (c, k) not in there]
    if not pairs:
        return None
    colour, kind = numbers.choice(pairs)
    return _yes_no("presence", form, f"Is there a {colour} {kind}?", False, ())


def _yes_no(kind: str, form: str, text: str, truth: bool, about: tuple[Object, ...]) -> Question:
    answer = "yes" if truth else "no"
    return Question(kind, form, text, answer, 2, answer, about)


def _unique(scene: Scene, field: str) -> list[Object]:
    values = [getattr(thing, field) for thing in scene.objects]
    return [thing for thing in scene.objects if values.count(getattr(thing, field)) == 1]


def _attribute(scene: Scene, numbers: random.Random) -> Question | None:
    if numbers.random() < 0.6:
        things = _unique(scene, "kind")
        if not things:
            return None
        thing = numbers.choice(things)
        text, answer, choices = f"What colour is the {thing.kind}?", thing.colour, len(COLOUR_NAMES)
        return Question("attribute", "colour", text, answer, choices, answer, (thing,))
    things = [thing for thing in _unique(scene, "colour") if thing.category == "shape"]
    if not things:
        return None
    thing = numbers.choice(things)
    text = f"What shape is the {thing.colour} object?"
    return Question("attribute", "shape", text, thing.kind, len(SHAPES), thing.kind, (thing,))


def _counting(scene: Scene, numbers: random.Random) -> Question | None:
    if numbers.random() < 0.4:
        answer = str(len(scene.objects))
        return Question("counting", "all", "How many objects are there?", answer, 5, answer, scene.objects)
    value, answer = scene.counted.value, str(scene.counted.number)
    about = tuple(thing for thing in scene.objects if value in (thing.colour, thing.kind))
    if value in COLOUR_NAMES:
        return Question("counting", "colour", f"How many {value} objects are there?", answer, 4, answer, about)
    plural = f"{value}es" if value.endswith("s") else f"{value}s"
    return Question("counting", "shape", f"How many {plural} are there?", answer, 4, answer, about)


def _relation(scene: Scene, numbers: random.Random) -> Question | None:
    horizontal = numbers.random() < 0.5
    axis = 1 if horizontal else 0
    things = _unique(scene, "kind")
    pairs = [(a, b) for a in things for b in things if abs(a.centre[axis] - b.centre[axis]) >= _LEAST_OFFSET]
    if not pairs:
        return None
    a, b = numbers.choice(pairs)
    words = ("left", "right") if horizontal else ("above", "below")
    text = f"Is the {a.kind} {words[0]} or {words[1]} {'of ' if horizontal else ''}the {b.kind}?"
    answer = words[0] if a.centre[axis] < b.centre[axis] else words[1]
    return Question("relation", "horizontal" if horizontal else "vertical", text, answer, 2, answer, (a, b))


def _reading(scene: Scene, numbers: random.Random) -> Question | None:
    things = _readable(scene)
    if not things:
        return None
    thing = numbers.choice(things)
    choices = len(DIGITS if thing.category == "digit" else LETTERS)
    text = f"Which {thing.category} is {thing.colour}?"
    return Question("reading", thing.category, text, thing.kind, choices, thing.kind, (thing,))


def _readable(scene: Scene) -> list[Object]:
    """Digits and letters whose colour no other of their category has."""
    marks = [(thing.category, thing.colour) for thing in scene.objects]
    return [t for t in scene.objects if t.category != "shape" and marks.count((t.category, t.colour)) == 1]


def _choice(scene: Scene, numbers: random.Random) -> Question | None:
    """A question of attribute or reading with four options, the right one at any place alike."""
    basis = (_attribute if numbers.random() < 0.7 else _reading)(scene, numbers)
    if basis is None:
        return None
    pool = {"colour": COLOUR_NAMES, "shape": SHAPES, "digit": DIGITS, "letter": LETTERS}[basis.form]
    options = [*numbers.sample([value for value in pool if value != basis.answer], len(OPTIONS) - 1), basis.answer]
    numbers.shuffle(options)
    text = basis.text + "".join(f"\n{letter}. {value}" for letter, value in zip(OPTIONS, options, strict=True))
    letter = OPTIONS[options.index(basis.answer)]
    return Question("choice", basis.form, text, letter, len(OPTIONS), basis.answer, basis.about)


_ASK: dict[str, Generator] = {
    "presence": _presence,
    "attribute": _attribute,
    "counting": _counting,
    "relation": _relation,
    "reading": _reading,
    "choice": _choice,
}

WORDS = (
    *("Is", "What", "Which", "How", "USER"),
    *(" ASSISTANT", " there", " a", " the", " colour", " shape", " object", " objects", " many", " are", " is", " or"),
    *(" of", " digit", " letter", " yes", " no", " left", " right", " above", " below"),
    *(f" {colour}" for colour in COLOUR_NAMES),
    *(f" {kind}" for kind in TYPES),
    *(f" {shape}es" if shape.endswith("s") else f" {shape}s" for shape in SHAPES),
    *(f" {letter}" for letter in OPTIONS if letter not in LETTERS),
)
"""Every word that a question, its answer or the chat template around them is made of, with the blank in front of it."""
