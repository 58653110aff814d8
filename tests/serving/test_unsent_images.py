"""A refusal harms no other request: not one that was rendered before it, with the same image, either."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.multimodal.cache.base import MultiModalCache

from eos_vllm.serving import unsent_images
from eos_vllm.serving.unsent_images import SECONDS, UnsentImages


class Renderer:
    """vLLM's front end, which takes images for sent once they are rendered."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.mm_processor_cache = LruKeyReplicatedSenderCache.__new__(LruKeyReplicatedSenderCache)
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


def test_vllm_may_turn_away_what_passed_its_check() -> None:
    renderer = Renderer()
    unsent = UnsentImages(renderer)
    first, second, third = (renderer.render("a") for _ in range(3))
    for prompt in (first, second):  # the second one carries the image of the first
        checked = request(prompt)
        unsent.complete(checked)
        unsent.sent(checked)
        unsent.refuse_latest()
    assert data(unsent, third) == ["pixels of a"]
    assert renderer.render("a")["mm_kwargs"]["image"] == ["pixels of a"]
    held = dict(unsent.images)
    unsent.refuse_latest()  # nothing is left to refuse
    assert unsent.images == held


def test_images_that_the_engine_has_are_not_sent_again() -> None:
    renderer = Renderer()
    unsent = UnsentImages(renderer)
    renderer.render("a")  # served
    unsent.refuse(renderer.render("a", "b"))
    renderer.sent.add("a")
    assert data(unsent, renderer.render("a")) == [None]


def test_one_name_for_two_images() -> None:
    """Clients may name their images: what is refused under a name must not stand for what was sent under it later."""
    renderer = Renderer()
    unsent = UnsentImages(renderer)
    unsent.refuse({"mm_kwargs": {"image": ["the large one"]}, "mm_hashes": {"image": ["a"]}})
    small = request({"mm_kwargs": {"image": ["the small one"]}, "mm_hashes": {"image": ["a"]}})
    unsent.complete(small)
    unsent.sent(small)
    assert small.mm_features[0].data == "the small one"
    assert data(unsent, {"mm_kwargs": {"image": [None]}, "mm_hashes": {"image": ["a"]}}) == [None]
    assert unsent.bytes == 0


def test_they_are_few_and_soon_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, now = Renderer(), SimpleNamespace(value=0.0)
    unsent = UnsentImages(renderer, lambda: now.value)
    most = 10 * MultiModalCache.get_item_size("pixels of 10")
    monkeypatch.setattr(unsent_images, "MOST_BYTES", most)
    for i in range(10, 40):
        unsent.refuse(renderer.render(str(i)))
    assert list(unsent.images) == [str(i) for i in range(30, 40)]
    assert unsent.bytes == most
    now.value = SECONDS + 1
    assert data(unsent, {"mm_kwargs": {"image": [None]}, "mm_hashes": {"image": ["39"]}}) == [None]
    assert not unsent.images
    assert unsent.bytes == 0


def test_nothing_is_held_where_all_images_are_sent() -> None:
    renderer = Renderer()
    renderer.mm_processor_cache = None  # type: ignore[assignment]
    unsent = UnsentImages(renderer)
    unsent.refuse(renderer.render("a"))
    assert not unsent.images


@pytest.mark.parametrize("prompt", ["text", {"prompt_token_ids": [1]}, {"mm_kwargs": {}}])
def test_prompts_without_images(prompt: Any) -> None:
    UnsentImages(Renderer()).refuse(prompt)
