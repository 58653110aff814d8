"""Profiles and requests for tests: given ones, and strategies that draw random ones."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from eos_vllm.core.layout import Entry
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile, parse_profile


def reducer(layer: int, discard: float = 0.5, **values: float) -> dict[str, Any]:
    """A pruning reducer as plain data; ``values`` replace fields."""
    plain = {"gate": 1.0, "discard": discard, "gamma": 0.0, "tau": 1.0, "theta": 0.0, "rho": 0.0, "nu": 0.0}
    return {"layer": layer, **plain, **values}


def profile_data(**changes: Any) -> dict[str, Any]:
    """A valid profile of 8 layers, 100 visual tokens and reducers after layers 1, 3 and 5, with fields replaced."""
    return {
        "schema": "eos-profile/1",
        "name": "test",
        "model": {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 8, "visual_tokens": 100},
        "reducers": [reducer(1), reducer(3), reducer(5)],
        "budget": {"measure": "final", "tokens": 10},
        **changes,
    }


def make_profile(
    layers: tuple[int, ...] = (1, 3, 5),
    discards: tuple[float, ...] | None = None,
    depth: int = 8,
    visual: int = 100,
    measure: str = "final",
    tokens: int = 10,
    minimum: int = 1,
    **changes: Any,
) -> Profile:
    """The profile of :func:`profile_data` with the sizes that matter for budgets and plans."""
    discards = discards or (0.5,) * len(layers)
    model = {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": depth, "visual_tokens": visual}
    data = profile_data(
        model=model,
        reducers=[reducer(layer, discard) for layer, discard in zip(layers, discards, strict=True)],
        budget={"measure": measure, "tokens": tokens, "minimum": minimum},
    )
    return parse_profile({**data, **changes})


@dataclass(frozen=True)
class Prompt:
    """A request for tests: text in front, then (image length, text behind it) for each image, then generated tokens.

    ``images`` may be empty: such a request passes unreduced, like a decode step. With a ``width`` an image's places are
    rows of so many visual tokens, each with one place of text behind it.
    """

    front: int
    images: tuple[tuple[int, int], ...]
    generated: int = 0
    width: int = 0

    @property
    def length(self) -> int:
        return self.front + sum(image + text for image, text in self.images)

    @property
    def spans(self) -> list[ImageSpan]:
        spans, position = [], self.front
        for image, text in self.images:
            ends = tuple(range(self.width, image, self.width + 1)) if self.width else ()
            spans.append(ImageSpan(position, image, ends))
            position += image + text
        return spans

    def row(self, planner: Planner, budget: int | None = None) -> Entry:
        """The row of a batch that holds the whole prompt and the generated tokens."""
        plan = planner.plan(self.length, self.spans, budget) if self.images else None
        return Entry(self.length + self.generated, plan)


def prompts(longest_image: int, with_images: bool = False) -> st.SearchStrategy[Prompt]:
    """Random requests: images of any length up to ``longest_image``, text or none in all places."""
    image = st.tuples(st.integers(1, longest_image), st.integers(0, 3))
    reduced = st.builds(
        Prompt, st.integers(0, 3), st.lists(image, min_size=1, max_size=3).map(tuple), st.integers(0, 2)
    )
    return reduced if with_images else reduced | st.builds(Prompt, st.integers(1, 4), st.just(()))


def batches(longest_image: int) -> st.SearchStrategy[list[Prompt]]:
    """Batches with at least one image, which is what :func:`eos_vllm.core.layout.build_layout` asks for."""
    return st.lists(prompts(longest_image), min_size=1, max_size=4).filter(lambda b: any(p.images for p in b))
