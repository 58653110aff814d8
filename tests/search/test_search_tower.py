"""What a Hugging Face vision tower gives selectors: on the embedded model's own features each rule is its plain one."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from eos_search.tower import entering_tokens, tower_output
from eos_vllm import profiles
from eos_vllm.analysis.plain_selectors import PLAIN, Image, attention
from eos_vllm.cluttervqa import samples
from eos_vllm.core.selectors import LAST, SELECTORS, TowerOutput
from eos_vllm.models import embedded
from support.margins import MARGIN, record_margins

SHALLOW = 0
COUNTS = (16, 64)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(str(embedded.path()), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    images = [sample.image for sample in samples("validation", 4)]
    processor = AutoProcessor.from_pretrained(str(embedded.path())).image_processor
    return processor(images, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def seen(model: Any, pixels: torch.Tensor) -> TowerOutput:
    """All four images, with both layers that any rule reads."""
    return tower_output(model, pixels, SELECTORS["window_topk"](shallow_layer=SHALLOW))


def plain_image(tower: TowerOutput, index: int) -> Image:
    def plain(values: torch.Tensor) -> Any:
        return values[index].detach().double().numpy()

    last, shallow = (attention(plain(tower.layers[i].query), plain(tower.layers[i].key)) for i in (LAST, SHALLOW))
    assert tower.cls is not None
    return Image(
        vision=plain(tower.vision),
        projected=plain(tower.projected),
        cls=plain(tower.cls),
        cls_attention=last[0, 1:],
        shallow_attention=shallow[0, 1:],
        received_attention=last[1:, 1:].mean(axis=0),
        keys=plain(tower.layers[LAST].key)[1:],
    )


def test_each_rule_keeps_what_its_plain_version_keeps(seen: TowerOutput) -> None:
    compared: dict[str, int] = dict.fromkeys(PLAIN, 0)
    for index in range(seen.images):
        image = plain_image(seen, index)
        for rule, plain_rule in PLAIN.items():
            for count in COUNTS:
                with pytest.MonkeyPatch.context() as patch:
                    margins = record_margins(patch)
                    kept, _ = plain_rule(image, count)
                # Neighbours of prumerge_plus are added up and decide nothing.
                if min(margins) <= MARGIN and rule != "prumerge_plus":
                    continue
                fields = {"shallow_layer": SHALLOW} if rule == "window_topk" else {}
                choice = SELECTORS[rule](**fields).choose(seen, count)
                assert choice.kept[index].tolist() == kept, (rule, index, count)
                compared[rule] += 1
    # Every round of visprune orders hundreds of patches: in each image some pair comes near to a tie.
    assert all(number >= 6 for rule, number in compared.items() if rule != "visprune"), compared


def test_what_is_caught_is_what_the_tower_attends_with(model: Any, pixels: torch.Tensor, seen: TowerOutput) -> None:
    eager = AutoModelForImageTextToText.from_pretrained(
        str(embedded.path()), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        states = eager.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    last = states.attentions[-1]
    torch.testing.assert_close(seen.cls_attention(), last[:, :, 0, 1:].mean(dim=1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        seen.cls_attention(SHALLOW), states.attentions[SHALLOW][:, :, 0, 1:].mean(dim=1), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(seen.received_attention(), last[:, :, 1:, 1:].mean(dim=(1, 2)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(seen.vision, states.hidden_states[-1][:, 1:], rtol=1e-4, atol=1e-4)


def test_a_smaller_picture_has_fewer_tokens(model: Any, pixels: torch.Tensor) -> None:
    profile = profiles.load("embedded-divprune")
    data = profile.to_dict()
    data["reducers"][0]["select"] = {"rule": "resize"}
    resized = type(profile).model_validate(data)
    assert [len(tokens) for tokens in entering_tokens(model, pixels, resized, 64)] == [64] * 4
    whole = entering_tokens(model, pixels, resized, 576)
    torch.testing.assert_close(whole[0], tower_output(model, pixels[:1], SELECTORS["resize"]()).projected[0])
