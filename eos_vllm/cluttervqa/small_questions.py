"""Questions of version 2, one generator for each kind; which objects each of them needs is known.

``detail`` asks for what tells an object from its near-duplicate, ``reading`` for whole strings, ``scene`` for what only
all objects, or the background, tell.
"""

import random
from collections import Counter
from collections.abc import Mapping

from eos_vllm.cluttervqa.glyphs import LETTERS, SHAPES
from eos_vllm.cluttervqa.questions import Generator, Question
from eos_vllm.cluttervqa.scene import COLOUR_NAMES
from eos_vllm.cluttervqa.small import (
    CHARACTERS,
    CODE,
    CODE_LENGTHS,
    FILLS,
    MOST_COUNTED,
    NUMBER_LENGTHS,
    PATCH,
    TINTS,
    SmallScene,
    Thing,
)

KINDS = ("presence", "attribute", "detail", "counting", "relation", "reading", "scene")
_LEAST_OFFSET = 2 * PATCH
_CODES = sum(len(LETTERS) * len(CHARACTERS) ** (length - 1) for length in CODE_LENGTHS)
_NUMBERS = sum(9 * 10 ** (length - 1) for length in NUMBER_LENGTHS)


def _only(things: list[Thing], *fields: str) -> list[Thing]:
    """Those whose values of the fields no other of them has."""
    marks = [tuple(getattr(thing, field) for field in fields) for thing in things]
    return [thing for thing, mark in zip(things, marks, strict=True) if marks.count(mark) == 1]


def _asked(
    kind: str, form: str, text: str, answer: str, choices: int, names: Mapping[str, Thing], needs: list[Thing]
) -> Question:
    about = tuple(names.values())
    return Question(kind, form, text, answer, choices, answer, about, tuple(needs), tuple(names.items()))


def _presence(scene: SmallScene, numbers: random.Random) -> Question | None:
    """Half yes, half no; what is not there can only be known of all shapes."""
    shapes = scene.shapes
    there = {(thing.colour, thing.kind) for thing in shapes}
    form = numbers.choice(("random", "adversarial"))
    if numbers.random() < 0.5:
        thing = numbers.choice(shapes)
        same = [other for other in shapes if (other.colour, other.kind) == (thing.colour, thing.kind)]
        names = {f"{thing.colour} {thing.kind}": thing} if len(same) == 1 else {}
        text = f"Is there a {thing.colour} {thing.kind}?"
        return _asked("presence", form, text, "yes", 2, names, same)
    if form == "adversarial":
        pairs = [(a.colour, b.kind) for a in shapes for b in shapes if (a.colour, b.kind) not in there]
    else:
        pairs = [(colour, kind) for colour in COLOUR_NAMES for kind in SHAPES if (colour, kind) not in there]
    if not pairs:
        return None
    colour, kind = numbers.choice(pairs)
    return _asked("presence", form, f"Is there a {colour} {kind}?", "no", 2, {}, shapes)


def _attribute(scene: SmallScene, numbers: random.Random) -> Question | None:
    by_kind = numbers.random() < 0.5
    things = _only(scene.shapes, "kind" if by_kind else "colour")
    if not things:
        return None
    thing = numbers.choice(things)
    if by_kind:
        text, choices = f"What colour is the {thing.kind}?", len(COLOUR_NAMES)
        return _asked("attribute", "colour", text, thing.colour, choices, {thing.kind: thing}, [thing])
    text = f"What shape is the {thing.colour} one?"
    return _asked("attribute", "shape", text, thing.kind, len(SHAPES), {thing.colour: thing}, [thing])


def _detail(scene: SmallScene, numbers: random.Random) -> Question | None:
    """About a shape of which there is another one, solid where it is hollow or hollow where it is solid."""
    shapes = scene.shapes
    if numbers.random() < 0.5:
        things = [
            thing
            for thing in _only(shapes, "fill", "kind")
            if any(o.kind == thing.kind and o.colour != thing.colour for o in shapes)
        ]
        if not things:
            return None
        thing = numbers.choice(things)
        name = f"{thing.fill} {thing.kind}"
        text, choices = f"What colour is the {name}?", len(COLOUR_NAMES)
        return _asked("detail", "colour", text, thing.colour, choices, {name: thing}, [thing])
    things = [
        thing
        for thing in _only(shapes, "colour", "kind")
        if any(o.kind == thing.kind and o.fill != thing.fill for o in shapes)
    ]
    if not things:
        return None
    thing = numbers.choice(things)
    name = f"{thing.colour} {thing.kind}"
    text = f"Is the {name} {FILLS[0]} or {FILLS[1]}?"
    return _asked("detail", "fill", text, thing.fill, 2, {name: thing}, [thing])


def _counting(scene: SmallScene, numbers: random.Random) -> Question | None:
    value, answer = scene.counted.value, str(scene.counted.number)
    form = "colour" if value in COLOUR_NAMES else "shape"
    words = f"{value} shapes" if form == "colour" else _plural(value)
    text = f"How many {words} are there?"
    return _asked("counting", form, text, answer, 1 + MOST_COUNTED, {}, scene.shapes)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _relation(scene: SmallScene, numbers: random.Random) -> Question | None:
    horizontal = numbers.random() < 0.5
    axis = 1 if horizontal else 0
    things = _only(scene.shapes, "colour", "kind")
    pairs = [(a, b) for a in things for b in things if abs(a.centre[axis] - b.centre[axis]) >= _LEAST_OFFSET]
    if not pairs:
        return None
    a, b = numbers.choice(pairs)
    words = ("left", "right") if horizontal else ("above", "below")
    names = {f"{thing.colour} {thing.kind}": thing for thing in (a, b)}
    first, second = names
    text = f"Is the {first} {words[0]} or {words[1]} {'of ' if horizontal else ''}the {second}?"
    answer = words[0] if a.centre[axis] < b.centre[axis] else words[1]
    return _asked("relation", "horizontal" if horizontal else "vertical", text, answer, 2, names, [a, b])


def _reading(scene: SmallScene, numbers: random.Random) -> Question | None:
    thing = numbers.choice(scene.strings)
    twins = [other for other in scene.strings if _differ(thing.text, other.text) == 1]
    text, choices = f"Which {thing.kind} is {thing.colour}?", _CODES if thing.kind == CODE else _NUMBERS
    form = "twin" if twins else thing.kind
    return _asked("reading", form, text, thing.text, choices, {thing.colour: thing}, [thing])


def _differ(a: str, b: str) -> int:
    """In how many places two strings differ; where their lengths do, in all."""
    return sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else max(len(a), len(b))


def _scene(scene: SmallScene, numbers: random.Random) -> Question | None:
    if numbers.random() < 1 / 3:
        return _asked("scene", "background", "What colour is the background?", scene.tint, len(TINTS), {}, [])
    field = "kind" if scene.frequent == "shape" else "colour"
    (value, most), *others = Counter(getattr(thing, field) for thing in scene.shapes).most_common(2)
    second = others[0][1] if others else 0
    # Which one is most common shall be plain to see.
    if most < second + 2 and (second > 1 or most == second):
        return None
    choices = len(SHAPES if field == "kind" else COLOUR_NAMES)
    return _asked("scene", "most", f"Which {scene.frequent} is most common?", value, choices, {}, scene.shapes)


GENERATORS: dict[str, Generator] = {
    "presence": _presence,
    "attribute": _attribute,
    "detail": _detail,
    "counting": _counting,
    "relation": _relation,
    "reading": _reading,
    "scene": _scene,
}

WORDS = (
    *("Is", "What", "Which", "How", "USER"),
    *(" ASSISTANT", " there", " a", " the", " colour", " shape", " shapes", " one", " many", " are", " is", " or"),
    *(" of", " left", " right", " above", " below", " most", " common", " background", " code", " number"),
    *(" yes", " no", *(f" {fill}" for fill in FILLS)),
    *(f" {colour}" for colour in COLOUR_NAMES),
    *(f" {kind}" for kind in (*SHAPES, *CHARACTERS)),
    *(f" {_plural(shape)}" for shape in SHAPES),
)
"""Every word of the questions, and the first character of every string; further characters are bytes."""
