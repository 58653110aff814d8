"""What a request may say: its own budget. Checked where vLLM checks requests, so that a mistake is its sender's 400.

The same function plans in scheduler and worker; a value that got past the check (another front end) falls back to the
server's budget in both alike, for an exception there would end the engine for everybody.
"""

import functools
from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from eos_vllm.core.budget import REQUEST_FIELD, parse_budget
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.serving.options import planner_of

logger = init_logger("vllm.eos")


def budget_of(sampling_params: SamplingParams | None) -> int | None:
    """The budget that a request names in ``vllm_xargs`` (``extra_args`` offline), None where it names none.

    Raises:
        BudgetError: it names something that is no budget.
    """
    extra = sampling_params.extra_args if sampling_params is not None else None
    if not extra or REQUEST_FIELD not in extra:
        return None
    return parse_budget(extra[REQUEST_FIELD])


def plan_of_features(
    planner: Planner, prompt_length: int, features: Sequence[Any] | None, sampling_params: SamplingParams | None
) -> RequestPlan:
    """Plans a request from what vLLM knows of it; never raises for a bad budget (see the module's text).

    Args:
        planner: the server's planner.
        prompt_length: tokens of the prompt.
        features: ``mm_features`` of the request.
        sampling_params: its sampling parameters.
    """
    spans = [ImageSpan(f.mm_position.offset, f.mm_position.length) for f in features or () if f.modality == "image"]
    try:
        return planner.plan(prompt_length, spans, budget_of(sampling_params))
    except BudgetError as e:
        logger.warning("eos: %s; using the server's budget %d", e, planner.budget)
        return planner.plan(prompt_length, spans)


def install_request_checks() -> None:
    """Makes this process' ``InputProcessor`` check ``eos_retain`` where a profile is active.

    Why a wrap: vLLM validates sampling parameters there and has no hook for keys of ``vllm_xargs``. Can go when it has.
    """
    if getattr(InputProcessor, "eos_installed", False):
        return
    InputProcessor.eos_installed = True  # type: ignore[attr-defined]
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def checked(self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        planner = planner_of(self.vllm_config)
        if planner is None:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        check_params(planner, params)
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        check_request(planner, request)
        return request

    InputProcessor.process_inputs = checked  # type: ignore[method-assign]


def check_params(planner: Planner, params: Any) -> None:
    """Refuses a budget that is none, or that the profile cannot reach.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    if not isinstance(params, SamplingParams):
        return
    try:
        planner.counts(budget_of(params))
    except BudgetError as e:
        raise VLLMValidationError(f"vllm_xargs.{e}", parameter=REQUEST_FIELD, value=e.value) from None


def check_request(planner: Planner, request: Any) -> None:
    """Refuses what reduced prompts cannot give: log-probabilities of prompt tokens whose hidden states are gone.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    params = request.sampling_params
    if params is None or params.prompt_logprobs is None or not request.mm_features:
        return
    if plan_of_features(planner, len(request.prompt_token_ids or ()), request.mm_features, params).reduces:
        total = planner.profile.model.visual_tokens
        raise VLLMValidationError(
            f"prompt_logprobs={params.prompt_logprobs}: discarded visual tokens have none; leave it out, "
            f'or ask for no reduction with vllm_xargs: {{"{REQUEST_FIELD}": {total}}}',
            parameter="prompt_logprobs",
            value=params.prompt_logprobs,
        )
