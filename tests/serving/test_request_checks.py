"""What the front end refuses of a request, before anything is made of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from eos_vllm.core.plan import Planner
from eos_vllm.models.images import sample_image
from eos_vllm.serving.request_checks import check_body, check_request
from eos_vllm.serving.requests import plan_of_features
from support.engines import engine
from support.profiles import make_profile

ASKED_BY_ALL = Planner(make_profile(), block=32)
ASKED_BY_TURN = Planner(make_profile(schema="eos-profile/2"), block=32, marker=(7, 8))
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
UNTYPED = {"image_url": {"url": "data:image/png;base64,AA=="}}
TEXT = {"type": "text", "text": "What?"}


def chat(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def body(messages: Any, **fields: Any) -> Any:
    return SimpleNamespace(**{"messages": messages, "vllm_xargs": None, "prompt_logprobs": None, **fields})


@pytest.mark.parametrize(
    "messages", [chat(IMAGE, TEXT), chat(UNTYPED, TEXT), [chat(TEXT), chat(IMAGE)]], ids=["typed", "untyped", "batch"]
)
def test_media_is_known_in_every_form_that_vllm_takes(messages: Any) -> None:
    with pytest.raises(VLLMValidationError, match="prompt_logprobs=1"):
        check_body(ASKED_BY_ALL, body(messages, prompt_logprobs=1))
    check_body(ASKED_BY_ALL, body(messages, prompt_logprobs=1, vllm_xargs={"eos_retain": 576}))


@pytest.mark.parametrize("messages", [chat(TEXT), chat({"type": "refusal", "refusal": "no"}), "text", [chat(TEXT)]])
def test_text_is_no_media(messages: Any) -> None:
    check_body(ASKED_BY_ALL, body(messages, prompt_logprobs=1, use_beam_search=True))


def test_beams_over_images_where_the_beam_would_ask() -> None:
    with pytest.raises(VLLMValidationError, match="use_beam_search=true"):
        check_body(ASKED_BY_ALL, body(chat(IMAGE), use_beam_search=True))
    check_body(ASKED_BY_TURN, body(chat(IMAGE), use_beam_search=True))
    with pytest.raises(VLLMValidationError, match="eos_retain"):  # vLLM would lose it
        check_body(ASKED_BY_TURN, body(chat(IMAGE), use_beam_search=True, vllm_xargs={"eos_retain": 32}))


def made(resumable: bool, images: int, budget: int | None = None, logprobs: int | None = None) -> Any:
    features = [
        SimpleNamespace(modality="image", mm_position=SimpleNamespace(offset=5 + 600 * i, length=576))
        for i in range(images)
    ]
    extra = None if budget is None else {"eos_retain": budget}
    params = SamplingParams(extra_args=extra, prompt_logprobs=logprobs)
    return SimpleNamespace(
        sampling_params=params, mm_features=features, prompt_token_ids=[0] * 1400, resumable=resumable
    )


def test_streamed_input_with_images() -> None:
    with pytest.raises(VLLMValidationError, match="streaming input"):
        check_request(ASKED_BY_ALL, made(True, 1), 4096)
    check_request(ASKED_BY_ALL, made(True, 0), 4096)
    check_request(ASKED_BY_ALL, made(True, 1, budget=576), 4096)
    check_request(ASKED_BY_ALL, made(False, 2), 4096)
    with pytest.raises(VLLMValidationError, match="a step holds 1000"):
        check_request(ASKED_BY_ALL, made(False, 2), 1000)


def test_log_probabilities_of_a_reduced_prompt_from_any_front_end() -> None:
    """Refused with a word, not served unreduced; and what slips through all the same is right."""
    with pytest.raises(VLLMValidationError, match="prompt_logprobs=0"):
        check_request(ASKED_BY_ALL, made(False, 1, logprobs=0), 4096)
    check_request(ASKED_BY_ALL, made(False, 1, budget=576, logprobs=0), 4096)
    check_request(ASKED_BY_ALL, made(False, 0, logprobs=0), 4096)
    slipped = made(False, 1, logprobs=0)
    plan = plan_of_features(ASKED_BY_ALL, slipped.prompt_token_ids, slipped.mm_features, slipped.sampling_params)
    assert not plan.reduces


def test_offline_beams_over_images(tiny_model: Path) -> None:
    """Refused where the beam itself would ask; with text alone, and where only the turn asks, vLLM searches."""
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    text = {"prompt": "USER: What? ASSISTANT:"}
    image = {"prompt": "USER: <image>\nWhat? ASSISTANT:", "multi_modal_data": {"image": sample_image(3)}}
    with engine(tiny_model, make_profile()) as llm:
        with pytest.raises(VLLMValidationError, match="beam_search: with images"):
            llm.beam_search([image], params)
        assert len(llm.beam_search([text], params)[0].sequences) == 2
    with engine(tiny_model, make_profile(schema="eos-profile/2")) as llm:
        (found,) = llm.beam_search([image], params)
        assert len(found.sequences) == 2
        assert llm.collective_rpc("eos_report")[0]["images"] >= 1
