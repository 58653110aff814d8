"""What a request may say, its own budget, and the plan that follows; the same function in scheduler and worker.

A value that got past the front end's check (another front end) falls back to the server's budget in both alike, for an
exception there would end the engine for everybody.
"""

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from eos_vllm.core.budget import REQUEST_FIELD, RetainBudget, parse_budget
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan

logger = init_logger("vllm.eos")


def budget_of(sampling_params: SamplingParams | None) -> RetainBudget | None:
    """The budget that a request names in ``vllm_xargs`` (``extra_args`` offline), None where it names none.

    Raises:
        BudgetError: it names something that is no budget.
    """
    extra = sampling_params.extra_args if sampling_params is not None else None
    if not extra or REQUEST_FIELD not in extra:
        return None
    return parse_budget(extra[REQUEST_FIELD])


def image_spans(features: Sequence[Any] | None) -> list[ImageSpan]:
    """Where the images of a request stand, from its ``mm_features``."""
    return [ImageSpan(f.mm_position.offset, f.mm_position.length) for f in features or () if f.modality == "image"]


def plan_of_features(
    planner: Planner, prompt: Sequence[int], features: Sequence[Any] | None, sampling_params: SamplingParams | None
) -> RequestPlan:
    """Plans a request from what vLLM knows of it; never raises for a bad budget (see the module's text).

    Args:
        planner: the server's planner.
        prompt: tokens of the prompt.
        features: ``mm_features`` of the request.
        sampling_params: its sampling parameters.
    """
    if sampling_params is not None and sampling_params.prompt_logprobs is not None:
        # Discarded tokens have no log-probabilities; whatever front end let it through, the answer must be right.
        return planner.plan(prompt, [])
    spans = image_spans(features)
    try:
        return planner.plan(prompt, spans, budget_of(sampling_params))
    except BudgetError as e:
        logger.warning("eos: %s; using the server's budget %s", e, planner.budget)
        try:
            return planner.plan(prompt, spans)
        except BudgetError as own:
            logger.warning("eos: %s; the request is not reduced", own)
            return planner.plan(prompt, [])
    except ValueError as e:
        logger.warning("eos: %s; the request is not reduced", e)
        return planner.plan(prompt, [])
