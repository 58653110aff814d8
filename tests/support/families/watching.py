"""Engines of the families' tests, driven and looked into."""

import random
from dataclasses import dataclass, field
from typing import Any

from support.engines import Answer, Ask, BlockWatch, params_of, prompt_of


@dataclass
class PlanWatch(BlockWatch):
    """:class:`BlockWatch` that keeps the plan of each request, in order of arrival, and counts chunks of prompts."""

    plans: dict[str, Any] = field(default_factory=dict)  # None where nothing is reduced
    chunks: int = 0

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._watched(*args, **kwargs)
        for request in self.scheduler.running:
            self.plans.setdefault(request.request_id, self.scheduler.plans.get(request.request_id))
            self.chunks += 0 < request.num_computed_tokens < request.num_prompt_tokens
        return output


def answer_with_preemptions(llm: Any, asks: list[Ask], seed: int) -> tuple[list[Answer], int]:
    """Answers of requests that arrive a few at a time, while running ones are preempted at any time."""
    choose, core, scheduler = random.Random(seed), llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    waiting, got, forced = list(enumerate(asks)), {}, 0
    while waiting or core.has_unfinished_requests():
        while waiting and (choose.random() < 0.6 or not core.has_unfinished_requests()):
            index, ask = waiting.pop(0)
            core.add_request(f"{index}", prompt_of(ask), params_of(ask))
        if scheduler.running and choose.random() < 0.2:
            victim = scheduler.running.pop(choose.randrange(len(scheduler.running)))
            scheduler._preempt_request(victim, 0.0)
            forced += 1
        for output in core.step():
            if output.finished:
                first = {token: value.logprob for token, value in output.outputs[0].logprobs[0].items()}
                tokens = list(output.outputs[0].token_ids)
                got[int(output.request_id)] = Answer(
                    tokens, first, len(output.prompt_token_ids), output.num_cached_tokens or 0
                )
    return [got[i] for i in range(len(asks))], forced
