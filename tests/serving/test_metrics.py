"""Counts on their way from the scheduler to ``/metrics``, whoever of several front ends gets which step."""

from typing import Any

import pytest
from prometheus_client import REGISTRY

from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.serving.metrics import Counters, EosStats, pack_stats
from support.engines import answer_all, engine, mixed_asks
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
