"""A refusal harms no other request: not one that was rendered before it, with the same image, either."""

from types import SimpleNamespace
from typing import Any

import pytest

from eos_vllm.serving.unsent_images import MOST, SECONDS, UnsentImages


class Renderer:
    """vLLM's front end, which takes images for sent once they are rendered."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self._mm_executor = SimpleNamespace(submit=lambda work: SimpleNamespace(result=work))

    def clear_mm_cache(self) -> None:
        self.sent.clear()

    def render(self, *names: str) -> dict[str, Any]:
        items = [None if name in self.sent else f"pixels of {name}" for name in names]
        self.sent.update(names)
        return {"mm_kwargs": {"image": items}, "mm_hashes": {"image": list(names)}}


def request(prompt: dict[str, Any]) -> Any:
    pairs = zip(prompt["mm_hashes"]["image"], prompt["mm_kwargs"]["image"], strict=True)
    return SimpleNamespace(mm_features=[SimpleNamespace(mm_hash=name, data=data) for name, data in pairs])


def data(unsent: UnsentImages, prompt: dict[str, Any]) -> list[Any]:
    made = request(prompt)
    unsent.complete(made)
    return [feature.data for feature in made.mm_features]


def test_what_was_rendered_before_the_refusal_gets_its_image() -> None:
    renderer = Renderer()
    unsent = UnsentImages(renderer)
    refused, meanwhile = renderer.render("a", "b"), [renderer.render("a"), renderer.render("b", "c")]
    unsent.refuse(refused)
    assert [data(unsent, prompt) for prompt in meanwhile] == [["pixels of a"], ["pixels of b", "pixels of c"]]
    assert renderer.render("a")["mm_kwargs"]["image"] == ["pixels of a"]  # rendered behind it


def test_one_of_those_may_be_refused_as_well() -> None:
    renderer = Renderer()
    unsent = UnsentImages(renderer)
    first, second, third = (renderer.render("a") for _ in range(3))
    unsent.refuse(first)
    unsent.refuse(second)
    assert data(unsent, third) == ["pixels of a"]


def test_a_prompt_that_vllm_turns_away_after_its_check() -> None:
    renderer = Renderer()
    unsent = UnsentImages(renderer)
    unsent.latest = renderer.render("a")
    meanwhile = renderer.render("a")
    unsent.refuse_latest()
    assert data(unsent, meanwhile) == ["pixels of a"]
    assert unsent.latest is None
    unsent.refuse_latest()  # nothing


def test_images_that_the_engine_has_are_not_sent_again() -> None:
    renderer = Renderer()
    unsent = UnsentImages(renderer)
    renderer.render("a")  # served
    unsent.refuse(renderer.render("a", "b"))
    renderer.sent.add("a")
    assert data(unsent, renderer.render("a")) == [None]


def test_they_are_few_and_soon_forgotten() -> None:
    renderer, now = Renderer(), SimpleNamespace(value=0.0)
    unsent = UnsentImages(renderer, lambda: now.value)
    for i in range(3 * MOST):
        unsent.refuse(renderer.render(str(i)))
    assert len(unsent.images) == MOST
    now.value = SECONDS + 1
    assert data(unsent, {"mm_kwargs": {"image": [None]}, "mm_hashes": {"image": [str(3 * MOST - 1)]}}) == [None]
    assert not unsent.images


@pytest.mark.parametrize("prompt", ["text", {"prompt_token_ids": [1]}, {"mm_kwargs": {}}])
def test_prompts_without_images(prompt: Any) -> None:
    UnsentImages(Renderer()).refuse(prompt)
