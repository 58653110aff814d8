"""Nothing is lost under load: 500 requests, a third aborted mid-way; both scheduler classes."""

import random
from pathlib import Path
from typing import Any

import pytest

from support.engines import BlockWatch, engine, free_blocks, mixed_asks, params_of, prompt_of, scheduler_of
from support.profiles import make_profile
from support.runner_v2 import is_wanted

# Few where Triton interprets the kernels.
REQUESTS = 48 if is_wanted() else 500


def test_the_pool_is_as_empty_as_at_start(tiny_model: Path) -> None:
    asks = mixed_asks(36)
    choose = random.Random(0)
    blocks = 4 * (1376 // 32) + 120
    with engine(tiny_model, make_profile(), max_model_len=1376, num_gpu_blocks_override=blocks) as llm:
        core = llm.llm_engine
        free = free_blocks(llm)
        left = {str(i): asks[i % len(asks)] for i in range(REQUESTS)}
        doomed = {name: choose.randrange(0, 6) for name in choose.sample(sorted(left), REQUESTS // 3)}
        waiting, finished, aborted = list(left), 0, 0
        internal: dict[str, str] = {}
        with BlockWatch(scheduler_of(llm)) as watch:
            while waiting or core.has_unfinished_requests():
                while waiting and len(internal) < 24:
                    name = waiting.pop(0)
                    ask = left[name]
                    ask.max_tokens = 8
                    internal[name] = core.add_request(name, prompt_of(ask), params_of(ask))
                for output in core.step():
                    if output.finished:
                        finished += internal.pop(output.request_id, None) is not None
                for name in [n for n in internal if n in doomed]:
                    doomed[name] -= 1
                    if doomed[name] < 0:
                        core.abort_request([internal.pop(name)], internal=True)
                        aborted += 1
        assert aborted > REQUESTS // 4
        assert finished + aborted == REQUESTS
        assert watch.errors == []
        assert watch.reduced > 2 * REQUESTS
        assert free_blocks(llm) == free
        assert sum(scheduler_of(llm).blocks_held()) == 0
        assert not scheduler_of(llm).plans
        assert not scheduler_of(llm).requests


@pytest.mark.parametrize("asynchronous", [False, True])
def test_both_scheduler_classes_allocate_by_the_plan(asynchronous: bool, tiny_model: Path) -> None:
    """The asynchronous class needs a GPU to run for real; here it schedules, and a stand-in answers for the worker."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    from eos_vllm.serving.scheduler import EosAsyncScheduler, EosScheduler

    with engine(tiny_model, make_profile()) as llm:
        core = llm.llm_engine.engine_core.engine_core
        original = core.scheduler
        taken: list[Any] = []
        core_add = core.add_request
        core.add_request = lambda request, *_: taken.append(request)
        for i, ask in enumerate(mixed_asks(9)):
            llm.llm_engine.add_request(str(i), prompt_of(ask), params_of(ask))
        core.add_request = core_add
        scheduler_class = EosAsyncScheduler if asynchronous else EosScheduler
        assert issubclass(EosAsyncScheduler, AsyncScheduler)
        scheduler = scheduler_class(
            original.vllm_config, original.kv_cache_config, original.structured_output_manager, original.block_size
        )
        requests: list[Request] = taken
        assert len(requests) == 9
        for request in requests:
            scheduler.add_request(request)
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        with BlockWatch(scheduler) as watch:
            in_flight: list[Any] = []
            for _ in range(200):
                in_flight.append(scheduler.schedule())
                # The asynchronous scheduler runs one step ahead of the answers, as it does on a GPU.
                if asynchronous and len(in_flight) < 2 and in_flight[-1].total_num_scheduled_tokens:
                    continue
                output = in_flight.pop(0)
                ids = list(output.num_scheduled_tokens)
                done = ModelRunnerOutput(
                    req_ids=ids,
                    req_id_to_index={name: i for i, name in enumerate(ids)},
                    sampled_token_ids=[[70] for _ in ids],
                    logprobs=None,
                    prompt_logprobs_dict={},
                    pooler_output=[],
                )
                scheduler.update_from_output(output, done)
                if not scheduler.has_unfinished_requests() and not in_flight:
                    break
        assert watch.errors == []
        assert watch.reduced > 100
        assert not scheduler.has_unfinished_requests()
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
