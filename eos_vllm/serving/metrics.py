"""Counts of tokens and KV blocks, from the scheduler's process to ``/metrics`` and the log of the API server.

vLLM sends ``SchedulerStats`` to the front end and lets plugins add stat loggers there, but has no field for their
figures. Ours travel in ``num_kv_fetch_reqs_by_stage``, a mapping of names to whole numbers of which vLLM reads only its
own names; the logger takes them out again before vLLM's own loggers see them. Can go when stats carry plugin fields.
"""

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm import envs
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from eos_vllm.core.plan import RequestPlan
from eos_vllm.serving.options import planner_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

PREFIX = "eos/"
logger = init_logger("vllm.eos")


class Counters:
    """Running totals since start, per reducer."""

    def __init__(self, reducers: int) -> None:
        self.images = 0
        self.tokens_in = [0] * reducers
        self.tokens_kept = [0] * reducers

    def count(self, plan: RequestPlan, images: range) -> None:
        """Adds those images of a request that a step reduces."""
        self.images += len(images)
        for kept in plan.kept[images.start : images.stop]:
            for i in range(len(self.tokens_in)):
                self.tokens_in[i] += kept[i]
                self.tokens_kept[i] += kept[i + 1]

    def count_tokens(self, reducer: int, before: int, after: int) -> None:
        """Adds what one reducer really did to a batch."""
        self.tokens_in[reducer] += before
        self.tokens_kept[reducer] += after

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "tokens_in": list(self.tokens_in), "tokens_kept": list(self.tokens_kept)}


def pack_stats(stats: "SchedulerStats", counters: Counters, blocks_held: list[int]) -> None:
    """Puts our figures on board of ``stats``."""
    cargo = stats.num_kv_fetch_reqs_by_stage
    cargo[f"{PREFIX}images"] = counters.images
    for i, (tokens_in, kept) in enumerate(zip(counters.tokens_in, counters.tokens_kept, strict=True)):
        cargo[f"{PREFIX}in/{i}"] = tokens_in
        cargo[f"{PREFIX}kept/{i}"] = kept
    for i, blocks in enumerate(blocks_held):
        cargo[f"{PREFIX}blocks/{i}"] = blocks


def unpack_stats(stats: "SchedulerStats") -> dict[str, int]:
    """Takes our figures out of ``stats`` again, by name without the prefix."""
    cargo = stats.num_kv_fetch_reqs_by_stage
    return {key.removeprefix(PREFIX): cargo.pop(key) for key in [k for k in cargo if k.startswith(PREFIX)]}


class EosStatLogger(AggregateStatLoggerBase):
    """``eos_*`` metrics and a log line an interval, in the front end of an engine with a profile."""

    def __init__(self, vllm_config: "VllmConfig", engine_indexes: list[int]) -> None:
        self.planner = planner_of(vllm_config)
        self.last: dict[int, dict[str, int]] = {}
        self.logged: dict[int, dict[str, int]] = {}
        self.last_log = time.monotonic()
        if self.planner is not None:
            _metrics()

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Takes over the figures of one engine step."""
        if self.planner is None or scheduler_stats is None:
            return
        figures = unpack_stats(scheduler_stats)
        if not figures:
            return
        before = self.last.get(engine_idx, {})
        self.last[engine_idx] = figures
        metrics = _metrics()
        for key, value in figures.items():
            name, _, index = key.partition("/")
            metric = metrics[name]
            labels = [str(engine_idx)] + ([self._label(name, int(index))] if index else [])
            if name == "blocks":
                metric.labels(*labels).set(value)
            elif value > before.get(key, 0):
                metric.labels(*labels).inc(value - before.get(key, 0))

    def _label(self, name: str, index: int) -> str:
        assert self.planner is not None
        return str(index) if name == "blocks" else str(self.planner.profile.layers[index])

    def log(self) -> None:
        """One line for each engine that reduced images since the last."""
        for engine, figures in self.last.items():
            since = self.logged.get(engine, {})
            images = figures["images"] - since.get("images", 0)
            blocks = [value for key, value in figures.items() if key.startswith("blocks/")]  # packed in order
            if images or any(blocks):
                new = {key: value - since.get(key, 0) for key, value in figures.items()}
                steps = [f"{new[f'in/{i}']}->{new[f'kept/{i}']}" for i in range(len(blocks) - 1)]
                logger.info(
                    "eos: engine %03d: %d images; visual tokens in->kept per reducer %s; KV blocks held per segment %s",
                    engine,
                    images,
                    ", ".join(steps),
                    blocks,
                )
            self.logged[engine] = dict(figures)

    def log_engine_initialized(self) -> None:
        """Nothing: the scheduler says it all at start."""


def install_stat_logger() -> None:
    """Adds :class:`EosStatLogger` to the loggers of this process' engines.

    Why a wrap and no ``vllm.stat_logger_plugins`` entry point: one of those turns statistics on in every server of the
    environment, with a profile or without, whatever ``--disable-log-stats`` says. Can go when vLLM asks loggers first.
    """
    from vllm.v1.engine import async_llm

    load = async_llm.load_stat_logger_plugin_factories
    if getattr(load, "eos_installed", False):
        return

    def with_ours() -> list[Any]:
        return [*load(), EosStatLogger]

    with_ours.eos_installed = True  # type: ignore[attr-defined]
    async_llm.load_stat_logger_plugin_factories = with_ours


_REGISTERED: dict[str, Any] = {}


def _metrics() -> dict[str, Any]:
    if not _REGISTERED:
        labels = ["engine", "layer"]
        _REGISTERED["images"] = Counter("eos_images", "Images prefilled with reduction.", ["engine"])
        _REGISTERED["in"] = Counter("eos_visual_tokens_in", "Visual tokens that met a reducer.", labels)
        _REGISTERED["kept"] = Counter("eos_visual_tokens_kept", "Visual tokens it kept.", labels)
        _REGISTERED["blocks"] = Gauge(
            "eos_kv_blocks_held", "KV blocks held by requests.", ["engine", "segment"], multiprocess_mode="mostrecent"
        )
    return _REGISTERED


class WorkerLog:
    """The worker's own count in the log, at vLLM's interval: what was really reduced, beside what was scheduled."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.due = time.monotonic() + envs.VLLM_LOG_STATS_INTERVAL

    def maybe(self, counters: Counters) -> None:
        """Logs if an interval has passed; called after steps that prefill images only."""
        if (now := time.monotonic()) < self.due:
            return
        self.due = now + envs.VLLM_LOG_STATS_INTERVAL
        pairs = zip(self.layers, counters.tokens_in, counters.tokens_kept, strict=True)
        steps = ", ".join(f"{before}->{after} after layer {layer}" for layer, before, after in pairs)
        logger.info("eos: this worker reduced %d images since start: visual tokens %s", counters.images, steps)
