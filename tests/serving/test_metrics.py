"""Counts on their way from the scheduler to ``/metrics``, whoever of several front ends gets which step."""

from typing import Any

import pytest
from prometheus_client import REGISTRY

from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.serving.by_budget import MOST, OTHER, BudgetCounts
from eos_vllm.serving.metrics import Counters, EosStats, pack_stats
from support.engines import BlockWatch, answer_all, engine, free_blocks, mixed_asks, scheduler_of
from support.profiles import make_profile


def stats_with(counters: Counters, *blocks: int) -> Any:
    from vllm.v1.metrics.stats import SchedulerStats

    stats = SchedulerStats()
    pack_stats(stats, counters, list(blocks))
    return stats


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_two_front_ends_count_each_image_once() -> None:
    planner = Planner(make_profile())
    plan = planner.plan(600, [ImageSpan(5, 576)])
    counters, front_ends = Counters(3), [EosStats(planner), EosStats(planner)]
    layer = str(planner.profile.layers[0])
    before = value("eos_images_total", engine="7"), value("eos_visual_tokens_in_total", engine="7", layer=layer)
    for i in range(10):
        counters.count(plan, range(1))
        stats = stats_with(counters, 1, 2, 3, 4)
        front_ends[i % 2].record(stats, 7)
        assert stats.num_kv_fetch_reqs_by_stage == {}
    assert value("eos_images_total", engine="7") - before[0] == 10
    assert value("eos_visual_tokens_in_total", engine="7", layer=layer) - before[1] == 10 * 576
    assert value("eos_kv_blocks_held", engine="7", segment="3") == 4


def test_what_was_not_added_to_does_not_travel() -> None:
    counters = Counters(1)
    counters.add("hit", 0, 5)
    counters.add("hit", 0, 2)
    assert counters.take_increments() == {"images": 0, "in/0": 0, "kept/0": 0, "hit/0": 7}
    assert counters.take_increments() == {"images": 0, "in/0": 0, "kept/0": 0}


def params(retain: Any = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(extra_args=None if retain is None else {"eos_retain": retain})


def test_labels_of_budgets_are_bounded() -> None:
    """Clients choose budgets: a thousand of them must not make a thousand time series."""
    counters = Counters(3)
    by_budget = BudgetCounts(counters, Planner(make_profile()))
    for retain in range(1, 1001):
        by_budget.request(params(retain))
    by_budget.request(params())
    by_budget.request(params("11%"))
    by_budget.request(params("nonsense"))  # falls back to the server's own, as its plan does
    found = {k: v for k, v in counters.take_increments().items() if k.startswith("requests/")}
    assert len(found) == MOST + 1
    assert found["requests/64"] == 3  # asked for once, named by nobody twice
    assert found[f"requests/{OTHER}"] == 1000 - (MOST - 1) - 1 + 1
    assert sum(found.values()) == 1003


def test_images_by_budget_in_front_ends() -> None:
    planner = Planner(make_profile())
    counters, front_ends = Counters(3), [EosStats(planner), EosStats(planner)]
    by_budget = BudgetCounts(counters, planner)
    before = value("eos_budget_images_total", engine="8", budget="16")
    for i in range(6):
        plan = planner.plan(1200, [ImageSpan(5, 576), ImageSpan(600, 576)], 16)
        by_budget.planned(params(16), plan, range(2))
        front_ends[i % 2].record(stats_with(counters), 8)
    assert value("eos_budget_images_total", engine="8", budget="16") - before == 12
    assert value("eos_budget_visual_tokens_kept_total", engine="8", budget="16") == 12 * planner.counts(16)[-1]


def test_hits_are_counted_once_per_request_that_is_let_in(tiny_model: Any) -> None:
    """By segment, as the cache has them; with a pool so small that requests wait, and come back after preemptions."""
    asks, small = mixed_asks(14), {"max_model_len": 1408, "kv_cache_memory_bytes": 6 << 20}
    with engine(tiny_model, make_profile(), enable_prefix_caching=True, **small) as llm:
        scheduler, let_in = scheduler_of(llm), [0] * 4
        schedule = scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            step = schedule(*args, **kwargs)
            resumed = step.scheduled_cached_reqs
            found = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
            pairs = zip(resumed.req_ids, resumed.num_computed_tokens, strict=True)
            found |= {name: tokens for name, tokens in pairs if name in resumed.resumed_req_ids}
            for name, tokens in found.items():
                plan = scheduler.plans.get(name)
                for segment in range(4):
                    let_in[segment] += plan.segment_length(segment, tokens) if plan else tokens
            return step

        scheduler.schedule = watched
        with BlockWatch(scheduler) as watch:
            for _ in range(2):
                answer_all(llm, asks)
        hits = scheduler.counters.take_increments()
        report = llm.collective_rpc("eos_report")[0]
        assert watch.preemptions > 0
        assert not watch.errors
        assert [hits.get(f"hit/{s}", 0) for s in range(4)] == let_in
        assert let_in[0] > let_in[1] > let_in[2] > let_in[3] > 0
        assert report["lost"] == []
        assert report["planned"]["images"] == report["images"] == scheduler.counters.images
        assert free_blocks(llm) > 0


def test_an_offline_engine_with_statistics(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no stat loggers of plugins; our figures must not stay in vLLM's field."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    seen: list[dict[str, int]] = []
    record = PrometheusStatLogger.record

    def watched(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(scheduler_stats.num_kv_fetch_reqs_by_stage) if scheduler_stats else {})
        return record(self, scheduler_stats, *args, **kwargs)

    monkeypatch.setattr(PrometheusStatLogger, "record", watched)
    before = value("eos_images_total", engine="0")
    with engine(tiny_model, make_profile(), disable_log_stats=False) as llm:
        answer_all(llm, mixed_asks(3))
    assert seen
    assert not any(key.startswith("eos/") for found in seen for key in found)
    assert value("eos_images_total", engine="0") - before == 3


def test_without_statistics_none_are_made(tiny_model: Any) -> None:
    with engine(tiny_model, make_profile(), disable_log_stats=True) as llm:
        answer_all(llm, mixed_asks(3))
        assert llm.llm_engine.logger_manager is None
