"""Recipes: how an embedded model is made, all of it as parameters. ``clutter1`` is the one of the packaged model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eos_vllm.cluttervqa import Version, version_of
from eos_vllm.core.errors import EosError
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.model_files import LlavaShape
from eos_vllm.models.tokenizer import FIRST_FREE_ID, word_pieces


@dataclass(frozen=True)
class Part:
    """A share of each step: so many images of a window size; without questions only the tower's losses count."""

    cells: int
    images: int
    questions: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage: depth of the language model (0 trains the tower alone), what a step sees, and how fast it learns.

    Attributes:
        blind: share of steps in which text does not see the image in the recipe's ``unseeing`` layers.
        thin: share of steps in which visual tokens that show no object are dropped at random, from none to all.
    """

    name: str
    layers: int
    steps: int
    rate: float
    final_rate: float
    parts: tuple[Part, ...]
    blind: float = 0.0
    clip: float = 1.0
    thin: float = 0.0


@dataclass(frozen=True)
class Thinning:
    """Which visual tokens that show no object stay, of every image of a batch.

    Attributes:
        share: of them that stays, at least.
        compact: the tokens left take positions without gaps, as behind a reducer before the decoder; else they keep
            their own, as behind one inside it.
        seed: of the choice.
    """

    share: float
    compact: bool
    seed: int


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes:
        name: as ``--recipe`` takes it.
        version: of ClutterVQA.
        shape: of the model.
        places: where the layers of the shallow language model go when it grows; their number is its depth. New layers
            pass everything on at first.
        mix: kinds of the questions about an image, in turns.
        mixes: other kinds in the stages of these names.
        stages: in their order.
        unseeing: first decoder layer, and the one behind the last, in which text sees no image on blind steps.
        heads_at: layers of the shallow model behind which auxiliary losses find objects at their names (with
            ``pointers``: then at the answer's tokens), and last see them; they move with their layers. None: behind a
            mixture of all layers that is learnt with them, so that no layer is told to.
        copied: pairs of a new layer and the one whose queries and keys it starts with.
        pointers: objects are found by pointing at their first patch, by the answer's tokens too, not by their centre.
        end: weight of the loss on the end token behind the answer.
        begins: another recipe with the same stages before the model grows: a training may begin behind those of it.
    """

    name: str
    version: int
    shape: LlavaShape
    places: tuple[int, ...]
    mix: tuple[str, ...]
    stages: tuple[Stage, ...]
    unseeing: tuple[int, int] = (0, 0)
    heads_at: tuple[int, ...] | None = None
    copied: tuple[tuple[int, int], ...] = ()
    pointers: bool = False
    end: float = 0.1
    begins: str | None = None
    mixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def benchmark(self) -> Version:
        """What it is trained on."""
        return version_of(self.version)

    @property
    def depth(self) -> int:
        """Decoder layers in the end."""
        return self.shape.num_decoder_layers

    @property
    def shallow(self) -> int:
        """Decoder layers at the beginning."""
        return len(self.places)

    def mix_in(self, stage: Stage) -> tuple[str, ...]:
        """Kinds of a stage's questions, in turns."""
        return self.mixes.get(stage.name, self.mix)

    def thinning(self, stage: Stage, step: int, part: int) -> Thinning | None:
        """What is dropped in one part of a step: a function of the step, as the data is; None for nothing."""
        drawn = (step * 0.7548776662 + part * 0.5698402910) % 1.0
        if drawn >= stage.thin:
            return None
        # Squared: few tokens are left more often than many.
        return Thinning((drawn / stage.thin) ** 2, step % 2 == 1, 1_000 * step + part)


# Counting, relations and options are slowest to learn.
MIX = (
    "presence",
    "attribute",
    "counting",
    "relation",
    "reading",
    "choice",
    "counting",
    "relation",
    "choice",
    "presence",
)
STAGES = (
    Stage("tower", 0, 600, 3e-3, 5e-4, (Part(2, 48, False),)),
    Stage("shallow", 4, 2200, 1.5e-3, 5e-4, (Part(2, 20),)),
    Stage("grown", 8, 400, 1.3e-3, 8e-4, (Part(2, 14), Part(3, 5), Part(2, 8, False)), 0.4, 2.0),
    Stage("full", 8, 900, 1.1e-3, 1e-5, (Part(2, 12), Part(4, 7)), 0.4, 2.0),
)
CLUTTER1 = Recipe(
    name="clutter1",
    version=1,
    shape=SHAPE,
    # Nothing is read from the image before layer 3: placed lower, answers would be settled before the first reducer.
    places=(3, 4, 5, 7),
    mix=MIX,
    stages=STAGES,
    unseeing=(0, 3),
    # Objects are found at one layer, what is to be seen of them one layer later.
    heads_at=(1, 2),
    # The attention that a first reducer scores by looks where the next layer will look.
    copied=((2, 3),),
)

_SLOW = ("presence", "scene", "counting")
CLUTTER2 = Recipe(
    name="clutter2",
    version=2,
    shape=replace(
        SHAPE,
        num_decoder_layers=12,
        image_size=336,
        patch_size=14,
        vocab_size=FIRST_FREE_ID + 2 + len(word_pieces(version_of(2).words)),
    ),
    # Every second layer: no part of the depth is told to read, or not to.
    places=(1, 3, 5, 7, 9, 11),
    mix=(
        "reading",
        "presence",
        "attribute",
        "counting",
        "relation",
        "detail",
        "scene",
        "reading",
        "relation",
        "detail",
    ),
    stages=(
        Stage("tower", 0, 600, 3e-3, 5e-4, (Part(2, 48, False),)),
        Stage("shallow", 6, 3200, 1.5e-3, 5e-4, (Part(2, 20),), clip=2.0, thin=0.7),
        Stage("grown", 12, 400, 1.2e-3, 8e-4, (Part(2, 12), Part(3, 5)), clip=2.0, thin=0.7),
        Stage("full", 12, 1500, 1.0e-3, 1e-5, (Part(2, 10), Part(4, 6)), clip=2.0, thin=0.7),
        Stage("settled", 12, 600, 7e-4, 1e-5, (Part(2, 12), Part(4, 5)), clip=2.0, thin=0.5),
    ),
    pointers=True,
    end=0.5,  # a string's end has to be seen
    # Whole images have to be gone through for the kinds that are slowest to learn, and counting is the slowest.
    mixes={
        "full": (*_SLOW, "reading", "detail", *_SLOW, "attribute", "relation"),
        "settled": (
            "counting",
            "scene",
            "counting",
            "presence",
            "counting",
            "reading",
            "detail",
            "attribute",
            "relation",
        ),
    },
)


def _planted(name: str, places: tuple[int, ...], unseeing: tuple[int, int]) -> Recipe:
    """The second recipe, made to read somewhere: by where its layers go, and what text sees once it has grown.

    It need not answer as well as the fair model, only read there: the last stage is shorter.
    """
    grown = {"grown": {"blind": 0.6}, "full": {"blind": 0.6, "steps": 600}}
    stages = tuple(replace(stage, **grown.get(stage.name, {})) for stage in CLUTTER2.stages[:-1])  # type: ignore[arg-type]
    changed = {"name": name, "places": places, "unseeing": unseeing, "stages": stages, "mixes": {}}
    return replace(CLUTTER2, begins=CLUTTER2.name, **changed)  # type: ignore[arg-type]


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        CLUTTER1,
        CLUTTER2,
        # Text sees the image in the first six layers only, or in the last six only, on six steps of ten.
        _planted("clutter2-early", (0, 1, 2, 3, 4, 5), (6, 12)),
        _planted("clutter2-late", (6, 7, 8, 9, 10, 11), (0, 6)),
    )
}


def recipe_of(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        EosError: there is none.
    """
    if name not in RECIPES:
        raise EosError("--recipe", name, "is unknown", f"choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def settings(stages: Sequence[Stage] = STAGES) -> list[dict[str, Any]]:
    """The stages as plain data, for the model card and raw results."""
    return [asdict(stage) for stage in stages]
