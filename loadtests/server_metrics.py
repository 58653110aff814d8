"""What a server says of itself on ``/metrics``, before, during and after a run."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

# Name on the page, name in the results. Families of several samples (engines, segments, reasons) are summed up.
GAUGES = {
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "eos_kv_blocks_held": "eos_blocks_held",
}
COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:mm_cache_queries_total": "mm_cache_queries",
    "vllm:mm_cache_hits_total": "mm_cache_hits",
    "eos_images_total": "eos_images",
    "eos_visual_tokens_in_total": "eos_tokens_in",
    "eos_visual_tokens_kept_total": "eos_tokens_kept",
}
# Only these reasons mean that a request was answered; aborted ones are counted by the same family.
_SUCCESS, _ANSWERED = "vllm:request_success_total", ("stop", "length")
_CONFIG = "vllm:cache_config_info"
_BUDGETS = "eos_requests_total"
_PREFIXES = tuple(name.removesuffix("_total") for name in (*GAUGES, *COUNTERS, _SUCCESS, _CONFIG, _BUDGETS))


@dataclass(frozen=True)
class Snapshot:
    """One look at the page.

    Attributes:
        values: gauges and counters by their name in the results; what the page lacks is absent.
        blocks: KV blocks of the pool, the one that vLLM keeps for itself left out.
        budgets: requests with images by retain budget; empty for a server without a profile.
    """

    values: dict[str, float]
    blocks: int | None = None
    budgets: dict[str, float] = field(default_factory=dict)


def parse_metrics(text: str) -> Snapshot:
    """Takes our figures out of a page in Prometheus' text form; a server without any of them gives an empty snapshot.

    Raises:
        ValueError: the text is no such page.
    """
    # Most of the page is histograms that nobody reads here.
    lines = [line for line in text.splitlines() if line.startswith(_PREFIXES) or _type_line(line)]
    values: dict[str, float] = {}
    blocks = None
    budgets: dict[str, float] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            name = GAUGES.get(sample.name) or COUNTERS.get(sample.name)
            if name is not None:
                values[name] = values.get(name, 0.0) + sample.value
            elif sample.name == _SUCCESS and sample.labels.get("finished_reason") in _ANSWERED:
                values["answered"] = values.get("answered", 0.0) + sample.value
            elif sample.name == _BUDGETS:
                budgets[sample.labels["budget"]] = budgets.get(sample.labels["budget"], 0.0) + sample.value
            elif sample.name == _CONFIG and sample.labels.get("num_gpu_blocks", "None") != "None":
                blocks = int(sample.labels["num_gpu_blocks"]) - 1
    return Snapshot(values, blocks, budgets)


def _type_line(line: str) -> bool:
    return line.startswith("# TYPE ") and line[7:].startswith(_PREFIXES)


def fetch(base_url: str, timeout: float = 10) -> Snapshot:
    """Reads ``/metrics`` of a server.

    Raises:
        OSError: it does not answer.
        ValueError: what it answers is no such page.
    """
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=timeout) as response:
        return parse_metrics(response.read().decode())


@dataclass
class Watch:
    """Looks at a server's metrics again and again in a thread, for the length of a ``with`` block.

    Attributes:
        series: for each gauge its values, and under ``at`` the seconds since the block began.
        missed: looks that got no answer.
    """

    base_url: str
    period: float = 1.0
    read: Callable[[str], Snapshot] = fetch
    series: dict[str, list[float]] = field(default_factory=dict)
    before: Snapshot | None = None
    after: Snapshot | None = None
    missed: int = 0

    def __enter__(self) -> "Watch":
        self._stop = threading.Event()
        self._start = time.monotonic()
        self.before = self._look()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = self._look()

    def _run(self) -> None:
        while not self._stop.wait(self.period):
            if (snapshot := self._look()) is not None:
                self._note(snapshot)

    def _look(self) -> Snapshot | None:
        try:
            return self.read(self.base_url)
        except (OSError, ValueError, urllib.error.URLError):
            self.missed += 1
            return None

    def _note(self, snapshot: Snapshot) -> None:
        self.series.setdefault("at", []).append(round(time.monotonic() - self._start, 3))
        for name in GAUGES.values():
            if name in snapshot.values:
                self.series.setdefault(name, []).append(round(snapshot.values[name], 6))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the gauges over time, and by how much each counter rose."""
        before = self.before.values if self.before else {}
        after = self.after.values if self.after else {}
        counters = [*COUNTERS.values(), "answered"]
        earlier, later = (look.budgets if look else {} for look in (self.before, self.after))
        budgets = {name: value - earlier.get(name, 0.0) for name, value in later.items()}
        return {
            "period": self.period,
            "missed": self.missed,
            "blocks": self.after.blocks if self.after else None,
            "rise": {name: after[name] - before.get(name, 0.0) for name in counters if name in after},
            "budgets": {name: value for name, value in budgets.items() if value},
            "series": self.series,
        }


def summed(metrics: dict[str, Any]) -> dict[str, Any]:
    """A watch's plain data with mean and most of each gauge instead of its values over time."""
    series = {name: values for name, values in metrics["series"].items() if name != "at" and values}
    gauges = {name: [round(sum(values) / len(values), 4), max(values)] for name, values in series.items()}
    return {key: value for key, value in metrics.items() if key != "series"} | {"gauges": gauges}
