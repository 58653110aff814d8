"""Counts of tokens and KV blocks, from the scheduler's process to ``/metrics`` and the log of the API server.

vLLM sends ``SchedulerStats`` to the front end and lets plugins add stat loggers there, but has no field for their
figures. Ours travel in ``num_kv_fetch_reqs_by_stage``, a mapping of names to whole numbers of which vLLM reads only its
own names; they are taken out again before vLLM's own loggers see them. Can go when stats carry plugin fields.
"""

import functools
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm import envs
from vllm.logger import init_logger

from eos_vllm.core.plan import Planner, RequestPlan
from eos_vllm.serving.options import planner_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

PREFIX = "eos/"
logger = init_logger("vllm.eos")


class Counters:
    """Running totals since start, per reducer; that before the decoder comes first."""

    def __init__(self, reducers: int) -> None:
        self.images = 0
        self.tokens_in = [0] * reducers
        self.tokens_kept = [0] * reducers
        self._taken: dict[str, int] = {}
        self._named: dict[str, int] = {}

    def take_increments(self) -> dict[str, int]:
        """What was added since the last call, under the names of :func:`pack_stats`."""
        now = {"images": self.images}
        for i, (tokens_in, kept) in enumerate(zip(self.tokens_in, self.tokens_kept, strict=True)):
            now[f"in/{i}"], now[f"kept/{i}"] = tokens_in, kept
        taken, self._taken = self._taken, now
        increments = {key: value - taken.get(key, 0) for key, value in now.items()}
        if self._named:
            increments |= self._named
            self._named = {}
        return increments

    def add(self, name: str, label: str | int, value: int) -> None:
        """Adds to a figure that has a label of its own; only what was added to travels with a step."""
        key = f"{name}/{label}"
        self._named[key] = self._named.get(key, 0) + value

    def join(self, other: "Counters") -> None:
        """Adds the images and tokens of another count."""
        self.images += other.images
        for i, (tokens_in, kept) in enumerate(zip(other.tokens_in, other.tokens_kept, strict=True)):
            self.count_tokens(i, tokens_in, kept)

    def count(self, plan: RequestPlan, images: range) -> None:
        """Adds those images of a request that a step reduces."""
        self.images += len(images)
        for number in images:
            text = len(plan.spans[number].text)
            kept = [tokens - text for tokens in plan.kept[number]]
            first = len(self.tokens_in) + 1 - len(kept)
            for i in range(len(kept) - 1):
                self.tokens_in[first + i] += kept[i]
                self.tokens_kept[first + i] += kept[i + 1]

    def count_tokens(self, reducer: int, before: int, after: int) -> None:
        """Adds what one reducer really did to a batch."""
        self.tokens_in[reducer] += before
        self.tokens_kept[reducer] += after

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "tokens_in": list(self.tokens_in), "tokens_kept": list(self.tokens_kept)}


def pack_stats(stats: "SchedulerStats", counters: Counters, blocks_held: list[int]) -> None:
    """Puts on board of ``stats`` what was counted since the last time, and the blocks held now.

    Increments, not totals: with several API servers each gets the stats of some steps only.
    """
    cargo = stats.num_kv_fetch_reqs_by_stage
    for key, value in counters.take_increments().items():
        cargo[f"{PREFIX}{key}"] = value
    for i, blocks in enumerate(blocks_held):
        cargo[f"{PREFIX}blocks/{i}"] = blocks


def unpack_stats(stats: "SchedulerStats") -> dict[str, int]:
    """Takes our figures out of ``stats`` again, by name without the prefix."""
    cargo = stats.num_kv_fetch_reqs_by_stage
    return {key.removeprefix(PREFIX): cargo.pop(key) for key in [k for k in cargo if k.startswith(PREFIX)]}


class EosStats:
    """``eos_*`` metrics and a log line an interval, in a front end of an engine with a profile."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.since_log: dict[int, dict[str, int]] = {}
        _metrics()

    def record(self, stats: "SchedulerStats", engine: int) -> None:
        """Takes the figures of one engine step out of its stats."""
        figures = unpack_stats(stats)
        if not figures:
            return
        since = self.since_log.setdefault(engine, {})
        metrics = _metrics()
        for key, value in figures.items():
            name, _, index = key.partition("/")
            labels = [str(engine)] + ([self._label(name, index)] if index else [])
            if name == "blocks":
                since[key] = value
                metrics[name].labels(*labels).set(value)
            else:
                since[key] = since.get(key, 0) + value
                if value:
                    metrics[name].labels(*labels).inc(value)

    def _label(self, name: str, index: str) -> str:
        return str(self.planner.profile.reducers[int(index)].layer) if name in {"in", "kept"} else index

    def log(self) -> None:
        """One line for each engine that reduced images since the last, or that holds blocks."""
        for engine, figures in self.since_log.items():
            blocks = [value for key, value in figures.items() if key.startswith("blocks/")]  # packed in order
            if figures.get("images") or any(blocks):
                reducers = range(len(self.planner.profile.reducers))
                steps = [f"{figures[f'in/{i}']}->{figures[f'kept/{i}']}" for i in reducers]
                logger.info(
                    "eos: engine %03d: %d images; visual tokens in->kept per reducer %s; KV blocks held per segment %s",
                    engine,
                    figures["images"],
                    ", ".join(steps),
                    blocks,
                )
            for key in figures:
                if not key.startswith("blocks/"):
                    figures[key] = 0


def install_stat_logger() -> None:
    """Takes our figures out of the stats in front of vLLM's own loggers, wherever an engine with a profile has any.

    Symptom without it: vLLM's log names our figures as requests that wait for KV. Cause: vLLM's hook for stat loggers
    (``vllm.stat_logger_plugins``) turns statistics on in servers that were told to have none, and offline engines never
    ask it. Why safe: an engine without a profile is passed through. Can go when stats carry plugin fields.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    if getattr(StatLoggerManager, "eos_installed", False):
        return
    StatLoggerManager.eos_installed = True  # type: ignore[attr-defined]
    make, record, log = StatLoggerManager.__init__, StatLoggerManager.record, StatLoggerManager.log

    @functools.wraps(make)
    def with_ours(self: Any, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        planner = planner_of(vllm_config)
        self.eos_stats = None if planner is None else EosStats(planner)
        make(self, vllm_config, *args, **kwargs)

    @functools.wraps(record)
    def record_ours(
        self: Any,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        if self.eos_stats is not None and scheduler_stats is not None:
            self.eos_stats.record(scheduler_stats, engine_idx or 0)
        record(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    @functools.wraps(log)
    def log_ours(self: Any) -> None:
        if self.eos_stats is not None:
            self.eos_stats.log()
        log(self)

    StatLoggerManager.__init__ = with_ours  # type: ignore[method-assign]
    StatLoggerManager.record = record_ours  # type: ignore[method-assign]
    StatLoggerManager.log = log_ours  # type: ignore[method-assign]


_REGISTERED: dict[str, Any] = {}
# Name of a figure, of its metric, labels beside the engine, text.
_COUNTERS = (
    ("images", "eos_images", (), "Images prefilled with reduction."),
    ("in", "eos_visual_tokens_in", ("layer",), "Visual tokens that met a reducer."),
    ("kept", "eos_visual_tokens_kept", ("layer",), "Visual tokens it kept."),
    ("hit", "eos_prefix_hit_tokens", ("segment",), "Tokens taken over from the prefix cache, as the segment has them."),
    ("requests", "eos_requests", ("budget",), "Requests with images."),
    (
        "elastic",
        "eos_elastic_requests",
        ("place",),
        "Requests whose budget the server chose.",
    ),
    ("budget_images", "eos_budget_images", ("budget",), "Images prefilled with reduction."),
    ("budget_kept", "eos_budget_visual_tokens_kept", ("budget",), "Visual tokens left behind the last reducer."),
)


def _metrics() -> dict[str, Any]:
    if not _REGISTERED:
        for key, name, labels, text in _COUNTERS:
            _REGISTERED[key] = Counter(name, text, ["engine", *labels])
        _REGISTERED["blocks"] = Gauge(
            "eos_kv_blocks_held", "KV blocks held by requests.", ["engine", "segment"], multiprocess_mode="mostrecent"
        )
        _REGISTERED["lost"] = Gauge(
            "eos_proof_lost", "1 where a worker has lost its proof.", ["engine"], multiprocess_mode="mostrecent"
        )
        _REGISTERED["seconds"] = Gauge(
            "eos_reduction_seconds", "Spent in reducers since start.", ["engine"], multiprocess_mode="mostrecent"
        )
        _REGISTERED["refused"] = Counter("eos_requests_refused", "Requests that the plugin answered with a 400.")
    return _REGISTERED


def count_refused() -> None:
    """Counts a request that the front end refused."""
    _metrics()["refused"].inc()


def set_lost(engine: int, lost: bool) -> None:
    """Tells ``/metrics`` whether a worker of an engine has lost its proof."""
    _metrics()["lost"].labels(str(engine)).set(lost)


def set_reduction_seconds(engine: int, seconds: float) -> None:
    """Tells ``/metrics`` how long the reducers of an engine's slowest worker took."""
    _metrics()["seconds"].labels(str(engine)).set(seconds)


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
        steps = ", ".join(
            f"{before}->{after} {'before the decoder' if layer < 0 else f'after layer {layer}'}"
            for layer, before, after in pairs
        )
        logger.info("eos: this worker reduced %d images since start: visual tokens %s", counters.images, steps)
