"""``--max-num-queued-tokens`` counts what is left of reduced prompts, in vLLM's own front end."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile
from eos_vllm.serving.admission import install_admission, prefill_tokens
from support.profiles import make_profile

PROFILE = make_profile()


def front_end(profile: Profile | None, limit: int | None) -> Any:
    """vLLM's admission, and what it looks at, without an engine."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    install_admission()

    class FrontEnd:
        check_admission, get_num_queued_tokens = AsyncLLM.check_admission, AsyncLLM.get_num_queued_tokens
        _add_request, _record_admission_rejection = AsyncLLM._add_request, AsyncLLM._record_admission_rejection

        def __init__(self) -> None:
            options = {"profile": profile and profile.to_dict(), "source": "test", "retain": None, "marker": None}
            options |= {"exact_counts": False, "example": None, "image_token": None, "elastic": None}
            self.scheduler_config = SimpleNamespace(max_num_queued_reqs=None, max_num_queued_tokens=limit)
            self.vllm_config = SimpleNamespace(
                additional_config={"eos": options} if profile else {}, cache_config=SimpleNamespace(block_size=32)
            )
            self.output_processor = OutputProcessor(None, log_stats=False)
            self.log_requests, self.logger_manager, self.admission_stats = False, None, None
            self.engine_core, self.input_processor = self, SimpleNamespace()
            self.sent: list[str] = []

        async def add_request_async(self, request: Any) -> None:
            self.sent.append(request.request_id)

    return FrontEnd()


def add(front: Any, name: str, images: int = 1, retain: int | None = None) -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    features = [
        MultiModalFeatureSpec(None, "image", f"{name}-{i}", PlaceholderRange(5 + 580 * i, 576)) for i in range(images)
    ]
    request = EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=[0] * (25 + 580 * images),
        mm_features=features or None,
        sampling_params=SamplingParams(detokenize=False, extra_args=None if retain is None else {"eos_retain": retain}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    asyncio.run(front._add_request(request, None, None, 0, SimpleNamespace(put=lambda _: None)))


def carried(kept: tuple[int, ...]) -> int:
    """Mean over the small model's eight layers, two a segment, of a prompt with one image."""
    return math.ceil(sum(2 * (605 - 576 + count) for count in (576, *kept)) / 8)


def test_the_mean_over_layers_is_counted() -> None:
    planner = Planner(PROFILE, block=32)
    plan = planner.plan(605, [ImageSpan(5, 576)])
    assert prefill_tokens(PROFILE, plan) == carried(planner.counts()) < 605
    assert prefill_tokens(PROFILE, planner.plan(605, [])) == 605
    assert prefill_tokens(PROFILE, planner.plan(605, [ImageSpan(5, 576)], 576)) == 605


def test_more_reduced_prompts_may_wait() -> None:
    from vllm.exceptions import MaxQueuedTokensError

    planner = Planner(PROFILE, block=32)
    own, small = carried(planner.counts()), carried(planner.counts(16))
    front = front_end(PROFILE, 2 * own + small)
    for name in ("a", "b"):
        add(front, name)
    add(front, "c", retain=16)
    assert front.get_num_queued_tokens() == 2 * own + small
    with pytest.raises(MaxQueuedTokensError):
        add(front, "d")
    assert front.get_num_queued_tokens() == 2 * own + small
    front.output_processor.request_states["a"].is_prefilling = False
    add(front, "text", images=0)
    assert front.get_num_queued_tokens() == own + small + 25
    front.output_processor.abort_requests(["b", "c"], internal=True)
    add(front, "e")
    assert front.get_num_queued_tokens() == own + 25
    assert set(front.eos_costs) == {"a", "e"}
    assert front.sent == ["a", "b", "c", "text", "e"]


def test_without_a_profile_or_a_limit_it_is_vllms_own() -> None:
    plain = front_end(None, 10_000)
    add(plain, "a")
    assert plain.get_num_queued_tokens() == 605
    free = front_end(PROFILE, None)
    add(free, "a")
    assert not hasattr(free, "eos_costs")


def test_images_of_whom_vllm_turns_away_are_sent_again() -> None:
    from vllm.exceptions import QueueOverflowError

    refused: list[str] = []
    front = front_end(PROFILE, None)
    unsent = SimpleNamespace(latest="a", refuse_latest=lambda: refused.append(unsent.latest))
    front.scheduler_config.max_num_queued_reqs, front.input_processor.eos_unsent = 1, unsent
    front.get_num_unfinished_requests = front.output_processor.get_num_unfinished_requests
    add(front, "a")
    assert not refused
    assert unsent.latest is None
    unsent.latest = "b"
    with pytest.raises(QueueOverflowError):
        add(front, "b")
    assert refused == ["b"]
    assert front.sent == ["a"]
