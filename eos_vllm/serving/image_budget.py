"""The front end's part of a reducer before the decoder: a request's budget reaches the processor that renders it.

vLLM renders a prompt before it looks at the request's parameters, and with this kind of reducer the number of an
image's placeholders depends on them.
"""

import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.exceptions import VLLMValidationError
from vllm.renderers import online_renderer
from vllm.sampling_params import SamplingParams

from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.plan import Planner
from eos_vllm.serving.image_processor import KEEP, TOTAL, budget_for_rendering
from eos_vllm.serving.options import planner_of
from eos_vllm.serving.requests import budget_of

# In the task of a request whose budget we passed on ourselves.
_PASSED_ON: ContextVar[bool] = ContextVar("eos_budget_passed_on", default=False)


def install_image_budget() -> None:
    """Offline each prompt is rendered with its own parameters' budget; online our key passes the check of arguments.

    Symptom without: every image has the server's budget, or the request is refused. Cause: ``LLM.generate`` and
    ``LLM.chat`` hand a lazy iterator of rendered prompts and a list of parameters to one method, where both can be
    paired; over HTTP, processor arguments of strangers are refused, for they may cost. Why safe: ours only makes
    prompts shorter; all others are checked as before. Can go when vLLM gives parameters to the processor.
    """
    if getattr(OfflineInferenceMixin, "eos_installed", False):
        return
    OfflineInferenceMixin.eos_installed = True  # type: ignore[attr-defined]
    add = OfflineInferenceMixin._render_and_add_requests

    @functools.wraps(add)
    def paired(self: Any, prompts: Any, params: Any, **kwargs: Any) -> Any:
        planner = planner_of(self.llm_engine.vllm_config)
        if planner is None or planner.profile.before is None:
            return add(self, prompts, params, **kwargs)
        return add(self, _rendered(prompts, params), params, **kwargs)

    OfflineInferenceMixin._render_and_add_requests = paired  # type: ignore[method-assign]
    validate = online_renderer.validate_request_mm_kwargs

    @functools.wraps(validate)
    def validated(*, mm_processor_kwargs: Any, **kwargs: Any) -> None:
        if _PASSED_ON.get():
            mm_processor_kwargs = {k: v for k, v in mm_processor_kwargs.items() if k != REQUEST_FIELD}
        validate(mm_processor_kwargs=mm_processor_kwargs or None, **kwargs)

    online_renderer.validate_request_mm_kwargs = validated


def _rendered(prompts: Any, params: Any) -> Iterator[Any]:
    """Each prompt, rendered with its own parameters' budget."""
    prompt = iter(prompts)
    for one in params:
        with budget_for_rendering(budget_of(one) if isinstance(one, SamplingParams) else None):
            try:
                found = next(prompt)
            except StopIteration:
                return
        yield found


def join_budgets(planner: Planner, body: Any) -> None:
    """Over HTTP: a budget in ``mm_processor_kwargs`` is one in ``vllm_xargs``, and is checked as such.

    Raises:
        VLLMValidationError: it cannot count, or both name one and differ; answered as HTTP 400.
    """
    given = getattr(body, "mm_processor_kwargs", None) or {}
    if planner.profile.before is None or REQUEST_FIELD not in given:
        return
    if not hasattr(body, "vllm_xargs"):
        raise VLLMValidationError(
            f"mm_processor_kwargs.{REQUEST_FIELD}: this endpoint takes the server's budget; leave it out",
            parameter=REQUEST_FIELD,
        )
    extra = dict(body.vllm_xargs or {})
    if extra.setdefault(REQUEST_FIELD, given[REQUEST_FIELD]) != given[REQUEST_FIELD]:
        raise VLLMValidationError(
            f"mm_processor_kwargs.{REQUEST_FIELD}={given[REQUEST_FIELD]!r}: vllm_xargs say {extra[REQUEST_FIELD]!r}; "
            "name one budget",
            parameter=REQUEST_FIELD,
        )
    body.vllm_xargs = extra


def pass_budget_on(planner: Planner, body: Any) -> None:
    """Over HTTP: puts ``vllm_xargs.eos_retain``, checked before, where the processor sees it when it renders."""
    extra = getattr(body, "vllm_xargs", None) or {}
    if planner.profile.before is None or REQUEST_FIELD not in extra or not hasattr(body, "mm_processor_kwargs"):
        return
    body.mm_processor_kwargs = {**(body.mm_processor_kwargs or {}), REQUEST_FIELD: extra[REQUEST_FIELD]}
    _PASSED_ON.set(True)


def check_image_tokens(planner: Planner, request: Any) -> None:
    """Refuses a prompt that was rendered with another budget than its parameters name.

    Raises:
        VLLMValidationError: answered as HTTP 400.
    """
    if planner.profile.before is None or request.sampling_params is None:
        return
    budget = budget_of(request.sampling_params)
    for feature in request.mm_features or ():
        if feature.modality != "image":
            continue
        # Features that a client made itself may lack the count, or have another than placeholders.
        data = feature.data
        if data is not None and "address" in data:
            continue  # in shared memory, where only the worker reads it
        if data is None and planner.profile.model.visual_tokens is None:
            continue  # rendered before, under a hash that holds its budget; how large it is, only the engine knows
        if data is not None and TOTAL not in data:
            total = None
        else:
            total = planner.visual_tokens if data is None else int(data[TOTAL].data)
        want = planner.image_tokens(budget, total)
        marked = want if data is None else int(data[KEEP].data) if KEEP in data else None
        if feature.mm_position.length != want or marked != want:
            raise VLLMValidationError(
                f"{REQUEST_FIELD}: the prompt holds {feature.mm_position.length} tokens for an image, the request's "
                f"budget means {want}; name the same budget in mm_processor_kwargs and in the parameters",
                parameter=REQUEST_FIELD,
            )
