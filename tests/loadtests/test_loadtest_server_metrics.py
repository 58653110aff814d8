"""A server's own figures, from its page to the raw results."""

import pytest

from loadtests.server_metrics import Snapshot, Watch, parse_metrics, summed

PAGE = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 4.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
# TYPE eos_kv_blocks_held gauge
eos_kv_blocks_held{engine="0",segment="0"} 57.0
eos_kv_blocks_held{engine="0",segment="1"} 19.0
# TYPE eos_images_total counter
eos_images_total{engine="0"} 155.0
# TYPE eos_images_created gauge
eos_images_created{engine="0"} 1.79e+09
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 2.0
vllm:num_preemptions_created{engine="0"} 1.79e+09
# TYPE vllm:request_success counter
vllm:request_success_total{finished_reason="stop"} 10.0
vllm:request_success_total{finished_reason="length"} 5.0
vllm:request_success_total{finished_reason="abort"} 100.0
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="0.3"} 0.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",num_gpu_blocks="4096"} 1.0
"""


def test_page() -> None:
    snapshot = parse_metrics(PAGE)
    assert snapshot.values == {
        "running": 5.0,
        "waiting": 4.0,
        "kv_usage": 0.25,
        "eos_blocks_held": 76.0,
        "eos_images": 155.0,
        "preemptions": 2.0,
        "answered": 15.0,
    }
    assert snapshot.blocks == 4095


def test_other_pages() -> None:
    assert parse_metrics("") == Snapshot({})
    assert parse_metrics("# TYPE up gauge\nup 1\n") == Snapshot({})
    assert parse_metrics('vllm:cache_config_info{num_gpu_blocks="None"} 1.0\n').blocks is None


def test_watch_keeps_gauges_over_time_and_rises_of_counters() -> None:
    looks = [
        Snapshot({"running": 0, "answered": 10, "preemptions": 1}, 100),
        Snapshot({"running": 2, "kv_usage": 0.5, "answered": 11, "preemptions": 1}, 100),
        Snapshot({"running": 0, "answered": 14, "preemptions": 1}, 100),
    ]
    watch = Watch("http://x", period=1000, read=lambda _: looks.pop(0))
    with watch:
        watch._note(watch.read(""))
    found = watch.to_dict()
    assert found["rise"] == {"answered": 4, "preemptions": 0}
    assert (found["blocks"], found["missed"]) == (100, 0)
    assert {name: found["series"][name] for name in ("running", "kv_usage")} == {"running": [2], "kv_usage": [0.5]}


def test_a_server_without_metrics_is_no_failure() -> None:
    def gone(_: str) -> Snapshot:
        raise OSError("gone")

    with Watch("http://x", period=1000, read=gone) as watch:
        pass
    assert watch.to_dict() == {"period": 1000, "missed": 2, "blocks": None, "rise": {}, "budgets": {}, "series": {}}


def test_looks_come_by_themselves() -> None:
    seen = []

    def look(_: str) -> Snapshot:
        seen.append(1)
        if len(seen) == 4:
            watch._stop.set()
        return Snapshot({"running": 1.0})

    with (watch := Watch("http://x", period=0.001, read=look)):
        watch._thread.join(10)
    assert watch.series["running"] == pytest.approx([1.0] * 3)


def test_series_are_summed_up_for_results_in_bulk() -> None:
    metrics = {
        "missed": 0,
        "series": {"at": [0.0, 1.0], "running": [1.0, 4.0], "waiting": []},
        "rise": {"answered": 2.0},
    }
    assert summed(metrics) == {"missed": 0, "rise": {"answered": 2.0}, "gauges": {"running": [2.5, 4.0]}}
