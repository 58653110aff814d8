"""The front end's check of requests: a mistake is a 400 to its sender, before it can touch anything else."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import has_non_text_content
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.serving.elastic import least_of
from eos_vllm.serving.image_budget import check_image_tokens, install_image_budget, join_budgets, pass_budget_on
from eos_vllm.serving.image_processor import budget_for_rendering
from eos_vllm.serving.metrics import count_refused
from eos_vllm.serving.options import has_page, planner_of
from eos_vllm.serving.requests import budget_of, image_spans, plan_of_features
from eos_vllm.serving.trace_requests import TRACE_FIELD, check_trace, write_name
from eos_vllm.serving.unsent_images import UnsentImages


@dataclass
class Seen:
    """Requests that this process checked, and those of all that it refused; they may be refused before they count."""

    checked: int = 0
    refused: int = 0


SEEN = Seen()


@contextmanager
def counted_refusals() -> Iterator[None]:
    """Counts a refusal within the block."""
    try:
        yield
    except VLLMValidationError:
        SEEN.refused += 1
        count_refused()
        raise


def install_request_checks() -> None:
    """Makes this process check what requests say of ``eos_retain``, over HTTP and offline.

    Why wraps: vLLM has no hook for the keys of ``vllm_xargs``. Over HTTP the check comes first, where the model's
    name is checked: once vLLM has rendered a prompt, its front end takes the images for sent, and a refusal after that
    would fail the next request with the same image. Can go when vLLM validates plugin arguments.
    """
    if getattr(InputProcessor, "eos_installed", False):
        return
    InputProcessor.eos_installed = True  # type: ignore[attr-defined]
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def checked(self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        planner = _planner_of(self)
        if planner is None:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        SEEN.checked += 1
        unsent = _unsent_of(self)
        try:
            with counted_refusals():
                check_params(planner, params)
                check_trace(getattr(params, "extra_args", None), has_page(self.vllm_config))
            with budget_for_rendering(budget_of(params) if isinstance(params, SamplingParams) else None):
                request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
            unsent.complete(request)
            with counted_refusals():
                check_image_tokens(planner, request)
                check_request(planner, request, _longest_step(self.vllm_config))
        except (VLLMValidationError, ValueError):  # ours, and vLLM's own
            unsent.refuse(prompt)
            raise
        unsent.sent(request)
        write_name(request, request_id)
        return request

    InputProcessor.process_inputs = checked  # type: ignore[method-assign]
    check_model = BaseServing._check_model

    @functools.wraps(check_model)
    async def check_first(self: BaseServing, request: Any) -> Any:
        client = getattr(self, "engine_client", None)  # those that only tokenize or render have none
        if client is not None and (planner := planner_of(client.vllm_config)) is not None:
            with counted_refusals():
                join_budgets(planner, request)
                check_body(planner, request)
                check_trace_of_body(request, has_page(client.vllm_config))
                pass_budget_on(planner, request)
        return await check_model(self, request)

    BaseServing._check_model = check_first  # type: ignore[method-assign]
    beam_search = BeamSearchOfflineMixin.beam_search

    @functools.wraps(beam_search)
    def checked_beams(self: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        planner = planner_of(self.llm_engine.vllm_config)
        if planner is not None and any(isinstance(p, dict) and p.get("multi_modal_data") for p in prompts):
            check_beams(planner, "beam_search")
        return beam_search(self, prompts, *args, **kwargs)

    BeamSearchOfflineMixin.beam_search = checked_beams  # type: ignore[method-assign]
    install_image_budget()


def _longest_step(vllm_config: Any) -> int:
    """Tokens that a step can hold."""
    scheduler = vllm_config.scheduler_config
    return min(scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens, scheduler.max_num_batched_tokens)


def _planner_of(processor: InputProcessor) -> Planner | None:
    """The planner of the processor's engine, looked up once."""
    try:
        return processor.eos_planner  # type: ignore[attr-defined]
    except AttributeError:
        processor.eos_planner = planner_of(processor.vllm_config)  # type: ignore[attr-defined]
        return processor.eos_planner  # type: ignore[attr-defined]


def _unsent_of(processor: InputProcessor) -> UnsentImages:
    """Images of the requests that this processor refused."""
    try:
        return processor.eos_unsent  # type: ignore[attr-defined]
    except AttributeError:
        processor.eos_unsent = UnsentImages(processor.renderer)  # type: ignore[attr-defined]
        return processor.eos_unsent  # type: ignore[attr-defined]


def check_body(planner: Planner, body: Any) -> None:
    """Checks a parsed HTTP request before anything is made of it.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    extra = getattr(body, "vllm_xargs", None) or {}
    params = SamplingParams(extra_args=extra)
    check_params(planner, params)
    if getattr(body, "use_beam_search", False) and _has_media(getattr(body, "messages", None)):
        check_beams(planner, "use_beam_search=true")
        if REQUEST_FIELD in extra:
            raise VLLMValidationError(
                f"vllm_xargs.{REQUEST_FIELD}={extra[REQUEST_FIELD]!r}: vLLM passes no vllm_xargs on to a beam search; "
                "leave it out, for the server's budget",
                parameter=REQUEST_FIELD,
            )
    logprobs = getattr(body, "prompt_logprobs", None)
    budget = budget_of(params)
    is_checked_later = isinstance(budget, int) and planner.profile.model.visual_tokens is None
    if logprobs is not None and not is_checked_later and _has_media(getattr(body, "messages", None)):
        total = planner.image_tokens(budget_of(params))
        span = ImageSpan(0, total)
        plan = planner.plan(planner.trial_prompt(total + 1, span), [span], budget_of(params))
        _refuse_prompt_logprobs(plan, logprobs)


def check_trace_of_body(body: Any, page: bool) -> None:
    """Checks what a parsed HTTP request says of its trace.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    if check_trace(getattr(body, "vllm_xargs", None), page) and getattr(body, "use_beam_search", False):
        problem = "vLLM passes no vllm_xargs on to a beam search; leave it out"
        raise VLLMValidationError(f"vllm_xargs.{TRACE_FIELD}: {problem}", parameter=TRACE_FIELD)


def check_beams(planner: Planner, what: str) -> None:
    """Refuses a beam search over images whose windows hold the beam: each step would select other visual tokens.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    if not planner.profile.inside:
        return  # what is kept was settled before the decoder
    if planner.rule.kind == "prompt" or (planner.rule.kind == "turn" and not planner.rule.marker):
        raise VLLMValidationError(
            f"{what}: with images it would select other visual tokens at each step, for the profile lets all later "
            "text ask; leave it out, or serve a profile with importance.window 'turn'",
            parameter="use_beam_search",
        )


def check_params(planner: Planner, params: Any) -> None:
    """Refuses a budget that is none, or that the profile cannot reach.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    if not isinstance(params, SamplingParams):
        return
    try:
        least_of(params.extra_args, planner)
        budget = budget_of(params)
        if isinstance(budget, int) and planner.profile.model.visual_tokens is None and planner.profile.before is None:
            return  # whether it can be met depends on the image
        planner.counts(budget)
    except BudgetError as e:
        raise VLLMValidationError(f"vllm_xargs.{e}", parameter=REQUEST_FIELD, value=e.value) from None


def check_request(planner: Planner, request: Any, longest_step: int) -> None:
    """Refuses what no step can hold, and what reduced prompts cannot give.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    params = request.sampling_params
    if params is None or not request.mm_features:
        return
    try:  # of these images, whose sizes only now are known
        would = planner.plan(request.prompt_token_ids or (), image_spans(request.mm_features), budget_of(params))
    except BudgetError as e:
        raise VLLMValidationError(f"vllm_xargs.{e}", parameter=REQUEST_FIELD, value=e.value) from None
    if params.prompt_logprobs is not None:  # before the plan that is served, which for these reduces nothing
        _refuse_prompt_logprobs(would, params.prompt_logprobs)
    plan = plan_of_features(planner, request.prompt_token_ids or (), request.mm_features, params)
    if not plan.reduces:
        return
    if request.resumable:
        raise VLLMValidationError(
            "streaming input: images that come later would not be reduced; send the prompt at once, or ask for no "
            f'reduction with vllm_xargs: {{"{REQUEST_FIELD}": "100%"}}',
            parameter="prompt",
        )
    longest = max(span.end - span.start for span in plan.atomic_spans)
    if longest > longest_step:
        raise VLLMValidationError(
            f"prompt: an image and the text that scores it have {longest} tokens, but a step holds {longest_step} "
            f"(--max-num-batched-tokens); send fewer images or less text in a turn, or ask for no reduction with "
            f'vllm_xargs: {{"{REQUEST_FIELD}": "100%"}}',
            parameter="prompt",
            value=longest,
        )


def _refuse_prompt_logprobs(plan: RequestPlan, value: int) -> None:
    if plan.reduces:
        raise VLLMValidationError(
            f"prompt_logprobs={value}: discarded visual tokens have none; leave it out, "
            f'or ask for no reduction with vllm_xargs: {{"{REQUEST_FIELD}": "100%"}}',
            parameter="prompt_logprobs",
            value=value,
        )


def _has_media(messages: Any) -> bool:
    """Whether chat messages, or those of one of several chats (``/v1/chat/completions/batch``), hold media."""
    chats = messages if isinstance(messages, list) and any(isinstance(m, list) for m in messages) else [messages]
    return any(has_non_text_content(chat) for chat in chats)
