"""What the plugin has to know of a family before a model of it is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile
from eos_vllm.serving.contract import Reliance


@dataclass(frozen=True)
class Grid:
    """Where the tokens of an image stand; all None where that is not known.

    Attributes:
        rows: of the grid, where the image is one.
        columns: of the grid.
        boxes: otherwise the part of the uploaded image that each token stands for, as left, top, right, bottom in
            fractions of its width and height; None for the end of a row.
    """

    rows: int | None = None
    columns: int | None = None
    boxes: Sequence[tuple[float, float, float, float] | None] | None = None


# Of an image's processed data (None where they are elsewhere) and its number of tokens, ends of rows included.
GridOf = Callable[[Any, int], Grid]


def unknown_grid(model_config: Any) -> GridOf:
    """A family that says nothing of its grids."""
    return lambda data, tokens: Grid()


def nothing_else(profile: Profile, config: Any) -> None:
    """A family without checks of its own."""


def all_visual(config: Any) -> None:
    """All places of an image are visual tokens."""


@dataclass(frozen=True)
class Host:
    """A family of models.

    Attributes:
        name: for people.
        language_models: kinds of language models (``model_type``) that reduction is proven for.
        check: raises a SettingError where a profile and the model's configuration do not go together.
        grids: of a model's configuration, how to tell where an image's tokens stand.
        reliances: names of vLLM's that the family's classes use beyond those of all.
        image_token: of a configuration, the token that stands for a visual one, where an image holds text as well;
            None where it holds none.
    """

    name: str
    language_models: Sequence[str]
    check: Callable[[Profile, Any], None] = nothing_else
    image_token: Callable[[Any], int | None] = all_visual
    grids: Callable[[Any], GridOf] = unknown_grid
    reliances: Sequence[Reliance] = ()

    def check_language_model(self, config: Any) -> None:
        """Whether reduction is proven for the language model of a configuration.

        Raises:
            SettingError: it is not.
        """
        kind = config.get_text_config().model_type
        if kind not in self.language_models:
            remedy = f"serve a {self.name} whose language model is one of {', '.join(self.language_models)}"
            raise SettingError("model.text_config.model_type", kind, "reduction is not proven for it", remedy)


def check_rows_selector(profile: Profile, config: Any) -> None:
    """Whether the profile's selector can work on rows as they enter the decoder, which is all that these families give.

    Raises:
        SettingError: it reads the vision tower's own features, layers or CLS token, or makes the image smaller.
    """
    selector = profile.selector
    if selector is None:
        return
    field, rule = "profile.reducers.0.select", selector.rule
    if rule == "resize":
        remedy = "limit the pixels of an image by vLLM's --mm-processor-kwargs"
        raise SettingError(field, rule, "this family resizes images itself", remedy)
    if selector.needs_cls or selector.reads_layers() or selector.mixes or getattr(selector, "features", "") == "vision":
        problem = "it reads inside the vision tower, which is proven for LLaVA-1.5 alone"
        raise SettingError(
            field, rule, problem, 'choose uniform, random, maxmin, mmr or coverage, features "projected"'
        )
