"""The worker's and the processor's part of a reducer before the decoder, apart from any request."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models.geometry import geometry
from eos_vllm.models.images import sample_image
from eos_vllm.serving.hosts.llava import check_tower
from eos_vllm.serving.image_processor import FINGERPRINT, KEEP
from support.engines import Ask, answer_all, engine, free_blocks

pytestmark = pytest.mark.serving
_PRUNE = {"gate": 1.0, "discard": 0.8, "gamma": 0.0, "tau": 1.0, "theta": 0.0, "rho": 0.0, "nu": 0.0}


def make(select: dict[str, Any], tokens: int = 16) -> Profile:
    return parse_profile(
        {
            "schema": "eos-profile/2",
            "name": "before",
            "model": {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 8, "visual_tokens": 576},
            "reducers": [{"layer": -1, "select": select, **_PRUNE}],
            "budget": {"measure": "final", "tokens": tokens},
        }
    )


@pytest.fixture(scope="module")
def llm(tiny_model: Any) -> Iterator[Any]:
    with engine(tiny_model, make({"rule": "coverage"}), enable_prefix_caching=True, max_num_batched_tokens=2048) as llm:
        yield llm


def model_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.model_runner.get_model()


def test_the_tower_sees_no_more_images_at_once_than_memory_is_profiled_for(llm: Any) -> None:
    model = model_of(llm)
    seen: list[int] = []
    hook = model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    size = model.config.vision_config.image_size
    images = 20  # that is 320 tokens of a prompt, but 11,520 patches
    rows = model.embed_multimodal(pixel_values=torch.randn(images, 3, size, size), **{KEEP: torch.full((images,), 16)})
    hook.remove()
    assert [len(row) for row in rows] == [16] * images
    assert max(seen) <= 2048 // 576
    assert sum(seen) == images


def test_mixed_counts_in_one_call_are_those_of_single_calls(llm: Any) -> None:
    model = model_of(llm)
    size = model.config.vision_config.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([64, 576, 7])
    together = model.embed_multimodal(pixel_values=pixels, **{KEEP: counts})
    for i, row in enumerate(together):
        alone = model.embed_multimodal(pixel_values=pixels[i : i + 1], **{KEEP: counts[i : i + 1]})[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_a_known_image_keeps_its_choice_whatever_the_last_bits_say(llm: Any) -> None:
    model = model_of(llm)
    size = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    given = {KEEP: torch.tensor([40]), FINGERPRINT: torch.tensor([77])}
    first = model.embed_multimodal(pixel_values=pixels, **given)[0]
    chosen = model.eos_before.choices[77, 40].tolist()
    noise = model.vision_tower.register_forward_hook(lambda _, __, out: out + 0.3 * torch.randn_like(out))
    again = model.embed_multimodal(pixel_values=pixels, **given)[0]
    model.embed_multimodal(pixel_values=pixels, **{**given, FINGERPRINT: torch.tensor([78])})
    noise.remove()
    assert not torch.equal(first, again)
    assert model.eos_before.choices[77, 40].tolist() == chosen
    assert model.eos_before.choices[78, 40].tolist() != chosen  # else the noise was too small to prove anything


def test_an_image_without_its_count_is_no_silent_576(llm: Any) -> None:
    model = model_of(llm)
    size = model.config.vision_config.image_size
    with pytest.raises(RuntimeError, match="without the number of tokens"):
        model.embed_multimodal(pixel_values=torch.randn(1, 3, size, size))


def test_all_tokens_can_be_had_where_few_are_the_default(llm: Any) -> None:
    free = free_blocks(llm)
    answer = answer_all(llm, [Ask("USER: <image>\nWhat? ASSISTANT:", [sample_image(1)], 576)])[0]
    assert answer.prompt_tokens > 576
    assert free_blocks(llm) == free


def test_budgets_do_not_multiply_hugging_faces_processors(llm: Any) -> None:
    from vllm.transformers_utils.processor import cached_get_processor

    answer_all(llm, [Ask("USER: <image>\nWhat? ASSISTANT:", [sample_image(2)], 20)])
    before = cached_get_processor.cache_info().currsize
    answer_all(llm, [Ask("USER: <image>\nWhat? ASSISTANT:", [sample_image(2)], k) for k in (21, 22, 23)])
    assert cached_get_processor.cache_info().currsize == before


def test_a_prompt_rendered_with_another_budget_is_refused(llm: Any) -> None:
    from vllm import SamplingParams

    prompt = {
        "prompt": "USER: <image>\nWhat? ASSISTANT:",
        "multi_modal_data": {"image": sample_image(3)},
        "mm_processor_kwargs": {"eos_retain": 32},
    }
    with pytest.raises(Exception, match="name the same budget"):
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    same = SamplingParams(temperature=0, max_tokens=1, extra_args={"eos_retain": 32})
    assert len(llm.generate(prompt, same, use_tqdm=False)[0].outputs) == 1


def test_image_embeddings_are_refused_with_a_line(tiny_model: Any) -> None:
    with engine(tiny_model, make({"rule": "maxmin"}), enable_mm_embeds=True) as llm:
        prompt = {
            "prompt": "USER: <image>\nWhat? ASSISTANT:",
            "multi_modal_data": {"image": torch.zeros(1, 576, geometry(str(tiny_model)).hidden_size)},
        }
        with pytest.raises(ValueError, match="image_embeds: this server selects"):
            llm.generate(prompt, use_tqdm=False)


def test_it_serves_bfloat16_and_is_rehearsed_where_all_tokens_are_the_default(tiny_model: Any) -> None:
    with engine(tiny_model, make({"rule": "maxmin"}), retain=576, dtype="bfloat16") as llm:
        model = model_of(llm)
        assert model.eos_before.rehearsed
        assert model.eos_before.counters.images == 0
        answers = answer_all(llm, [Ask("USER: <image>\nWhat? ASSISTANT:", [sample_image(4)], k) for k in (None, 20)])
        assert answers[0].prompt_tokens - answers[1].prompt_tokens == 576 - 20


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision_feature_layer": [0, 1]}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"tower": "siglip_vision_model"}, "CLS token, which it lacks"),
    ],
)
def test_towers_that_lack_what_a_selector_reads(changes: dict[str, Any], named: str, tiny_model: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(tiny_model))
    tower = changes.pop("tower", None)
    if tower:
        config.vision_config.model_type = tower
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(SettingError, match=named):
        check_tower(make({"rule": "topk"}), config)


def test_a_layer_that_the_tower_does_not_run(tiny_model: Any) -> None:
    from transformers import AutoConfig

    with pytest.raises(SettingError, match="reads tower layer 20"):
        check_tower(make({"rule": "window_topk", "shallow_layer": 20}), AutoConfig.from_pretrained(str(tiny_model)))
