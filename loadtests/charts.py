"""All pictures of a report, drawn from results alone, with their captions."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from loadtests import plan_charts as plan
from loadtests import speed_charts as speed
from loadtests.chart_frame import STYLE
from loadtests.results import Results


def draw_all(results: Results, folder: Path) -> dict[str, str]:
    """Writes a PNG for each picture that the results allow; returns file names with captions, in reading order."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Callable[[Results], Figure | None], str]] = [
        ("requests-per-second", speed.requests_per_second, "Answered requests per second; bars span the repeats."),
        ("goodput", speed.goodput, f"Requests per second that kept {results.slo}."),
        ("ttft", speed.ttft, "Time to first token: median, and 99th percentile dashed."),
        ("tpot", speed.tpot, "Time per output token after the first: median, and 99th percentile dashed."),
        ("pareto", speed.pareto, "Throughput against latency; up and left is better. Each mark is a load."),
        ("kv-per-request", plan.kv_per_request, "KV memory of a running request: planned for its end, and measured."),
        ("concurrency", plan.concurrency, "Requests running at once in the same KV memory: planned, and most seen."),
        ("ceiling", plan.ceiling, "Share of the plan's ceiling (tokens of all layers) that the speed-up reached."),
        ("accuracy", plan.accuracy, "Answers right against requests per second; 95 % intervals (Wilson)."),
    ]
    written = {}
    with plt.rc_context(STYLE):
        for name, draw, caption in pictures:
            figure = draw(results)
            if figure is None:
                continue
            figure.savefig(folder / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            written[f"{name}.png"] = caption
    return written
