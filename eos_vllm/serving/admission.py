"""``--max-num-queued-tokens`` in reduced tokens: what waits is as much work as is left of it.

vLLM limits the prompt tokens of requests in their prefill, to bound the time to first token by the prefill's speed. Of
a reduced prompt it counted every visual token, and turned requests away at a fraction of the backlog that was meant.

Whom vLLM turns away, here or by ``--max-num-queued-reqs``, has been rendered, so that its images count as sent.
"""

import functools
import math
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM

from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import Profile
from eos_vllm.serving.options import planner_of
from eos_vllm.serving.requests import plan_of_features


def prefill_tokens(profile: Profile, plan: RequestPlan) -> int:
    """Tokens that every decoder layer would carry to do the work of this prompt: the mean over layers, rounded up."""
    layers, tokens = profile.segment_layers(), plan.prompt_length
    carried = sum(n * plan.segment_length(segment, tokens) for segment, n in enumerate(layers))
    return math.ceil(carried / sum(layers))


def install_admission() -> None:
    """Makes vLLM's limit count what is left of reduced prompts.

    And has images of whom it turns away sent again (``UnsentImages``): in a flood, every request that shared one ended
    in status 500.

    Why wraps: vLLM's front end keeps the length of a prompt, and nothing of its images. Why safe: without a limit, or
    without a profile, all pass on. What a reducer before the decoder removes was never counted: it is not in the
    prompt. Can go when vLLM asks a plugin for a request's cost.
    """
    if getattr(AsyncLLM, "eos_installed", False):
        return
    AsyncLLM.eos_installed = True  # type: ignore[attr-defined]
    add, queued, check = AsyncLLM._add_request, AsyncLLM.get_num_queued_tokens, AsyncLLM.check_admission

    @functools.wraps(add)
    async def with_cost(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scheduler_config.max_num_queued_tokens is None or not request.mm_features:
            return await add(self, request, *args, **kwargs)
        planner = planner_of(self.vllm_config)
        if planner is None or not planner.profile.inside:
            return await add(self, request, *args, **kwargs)
        plan = plan_of_features(planner, request.prompt_token_ids or (), request.mm_features, request.sampling_params)
        known, costs = self.output_processor.request_states, self.__dict__.get("eos_costs", {})
        self.eos_costs = {name: tokens for name, tokens in costs.items() if name in known}
        # vLLM takes the request up before it waits for anything, so nobody sees one without its cost.
        self.eos_costs[request.request_id] = prefill_tokens(planner.profile, plan)
        return await add(self, request, *args, **kwargs)

    @functools.wraps(queued)
    def reduced(self: Any) -> int:
        costs = self.__dict__.get("eos_costs")
        if not costs:
            return queued(self)
        states = self.output_processor.request_states.items()
        return sum(costs.get(name, state.prompt_len) for name, state in states if state.is_prefilling)

    @functools.wraps(check)
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        unsent = getattr(self.input_processor, "eos_unsent", None)  # only with a profile
        try:
            check(self, *args, **kwargs)
        except GracefulHTTPError:
            if unsent is not None:
                unsent.refuse_latest()
            raise
        if unsent is not None:
            unsent.latest = None

    AsyncLLM.check_admission = noted  # type: ignore[method-assign]
    AsyncLLM._add_request = with_cost  # type: ignore[method-assign]
    AsyncLLM.get_num_queued_tokens = reduced  # type: ignore[method-assign]
