"""lmms-eval against running servers: its command line, and its results in our form. Pure functions of text and files.

lmms-eval's client for OpenAI-compatible servers sends messages, model, length and temperature, and has no setting for
further fields. A budget can therefore not travel with its requests: each budget needs a server of its own that was
started with ``--eos-retain``. Held against version 0.7.3.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eos_vllm.cluttervqa import KINDS
from eos_vllm.core.errors import EosError

HARNESS = "lmms_eval"
FAILED = "[LMMS_EVAL_REQUEST_FAILED"
# Behind the time. Tasks leave files in the same folder, and one of MMBench's also ends in _results.json.
_RESULTS = "[0-9]*_results.json"
_REASONING = ("o1", "o3", "o4", "gpt-5")


@dataclass(frozen=True)
class Benchmark:
    """A column of tables.

    Attributes:
        title: as tables call it.
        metrics: names in lmms-eval's results, by version of it; the first that is there counts. A tuple of names is
            summed.
        factor: makes the table's unit of lmms-eval's.
        full: full marks in the table's unit; the average is in percent of it.
        places: decimals in tables.
    """

    title: str
    metrics: tuple[tuple[str, ...], ...]
    factor: float = 100.0
    full: float = 100.0
    places: int = 2


_EXACT = (("exact_match,none",), ("exact_match,flexible-extract",))
# lmms-eval's task: which of its figures the paper's tables show. MMBench's is in percent as it comes, MME's a sum.
BENCHMARKS: Mapping[str, Benchmark] = {
    "pope": Benchmark("POPE", (("pope_accuracy,none",),)),
    "scienceqa_img": Benchmark("SQA", _EXACT),
    "mme": Benchmark(
        "MME",
        (
            ("mme_perception_score,none", "mme_cognition_score,none"),
            ("mme_percetion_score,none", "mme_cognition_score,none"),  # so spelled in older versions
        ),
        factor=1.0,
        full=2800.0,
        places=0,
    ),
    "gqa": Benchmark("GQA", _EXACT),
    "textvqa_val": Benchmark("TextVQA", _EXACT),
    "seedbench": Benchmark("SEED", (("seed_image,none",),)),
    "mmstar": Benchmark("MMStar", (("average,none",),)),
    "realworldqa": Benchmark("RWQA", _EXACT[::-1]),
    "ai2d": Benchmark("AI2D", _EXACT[::-1]),
    "ocrbench": Benchmark("OCRBench", (("ocrbench_accuracy,none",),)),
    "chartqa": Benchmark("ChartQA", (("relaxed_overall,none",),)),
    "mmbench_en_dev_static": Benchmark("MMB-en", (("gpt_eval_score,none",),), factor=1.0),
}
# What :mod:`eos_search.lmms_local` asks in lmms-eval's place, in rehearsals.
LOCAL: Mapping[str, Benchmark] = {f"cluttervqa_{kind}": Benchmark(kind, _EXACT[:1]) for kind in KINDS}
TASKS: Mapping[str, Benchmark] = {**BENCHMARKS, **LOCAL}


@dataclass(frozen=True)
class Score:
    """A figure of a benchmark in the table's unit, its standard error where lmms-eval gives one, and which it is."""

    value: float
    error: float | None
    metric: str


def lmms_command(
    python: str,
    base_url: str,
    model: str,
    tasks: Sequence[str],
    folder: Path,
    concurrency: int = 32,
    limit: int | None = None,
    harness: str = HARNESS,
) -> list[str]:
    """The command that runs lmms-eval once against one server.

    Args:
        python: interpreter that has lmms-eval.
        base_url: of the server, ending in ``/v1``.
        model: name under which it serves.
        tasks: lmms-eval's task names.
        folder: it writes its results and samples here.
        concurrency: requests at once.
        limit: at most so many questions of each task.
        harness: module that is run; another than lmms-eval takes its command line and leaves its files.

    Raises:
        EosError: a comma in address or name, which lmms-eval would split there; or a name that it takes for one of
            OpenAI's reasoning models, which get neither length nor temperature.
    """
    for field, value in (("base_url", base_url), ("model", model)):
        if "," in value:
            raise EosError(field, value, "lmms-eval takes a comma for the next argument", "give one without")
    if found := [part for part in _REASONING if part in model]:
        problem = f"lmms-eval takes it for a reasoning model ({found[0]}), and sends no length and no temperature"
        raise EosError("model", model, problem, "serve it under another name")
    arguments = {
        "model_version": model,
        "base_url": base_url,
        "api_key": "EMPTY",
        "num_concurrent": concurrency,
    }
    command = [python, "-m", harness, "--model", "openai"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", ",".join(tasks), "--batch_size", "1", "--log_samples", "--output_path", str(folder)]
    return command + (["--limit", str(limit)] if limit is not None else [])


def read_scores(folder: Path, tasks: Sequence[str], since: float = 0.0) -> dict[str, Score]:
    """Scores of the newest results file that lmms-eval left in a folder.

    Args:
        folder: its ``--output_path``.
        tasks: what was asked for.
        since: older files don't count, in seconds since the epoch: where an evaluation fails, or its results cannot be
            saved, lmms-eval says so and ends as if all were well.

    Raises:
        EosError: no results, none of a task, or none of the figures that the table shows.
    """
    file = _newest(folder, since)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"it cannot be read ({type(error).__name__}: {error})"
        raise EosError("results", str(file), problem, "remove it and run the budget again") from None
    return {task: _score(task, results.get(task), file) for task in tasks}


def failed_requests(folder: Path) -> dict[str, int]:
    """Requests without an answer by task; lmms-eval writes a text in place of an answer and marks it as wrong."""
    found: dict[str, int] = {}
    stamp = _newest(folder).name.removesuffix("_results.json")
    for file in sorted(folder.rglob(f"{stamp}_samples_*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            failures = sum(FAILED in line for line in lines)
        if failures:
            found[file.stem.partition("_samples_")[2]] = failures
    return found


def record(name: str, budget: int | None, scores: Mapping[str, Score], **more: Any) -> dict[str, Any]:
    """A case of the raw result as plain data."""
    plain = {task: asdict(score) for task, score in scores.items()}
    return {"profile": name, "budget": budget, "scores": plain, **more}


def _newest(folder: Path, since: float = 0.0) -> Path:
    files = sorted(folder.rglob(_RESULTS), key=lambda file: file.stat().st_mtime)
    if not files or files[-1].stat().st_mtime < since:
        raise EosError(
            "results", str(folder), "lmms-eval left no results of this run there", "look at its output above"
        )
    return files[-1]


def _score(task: str, figures: Any, file: Path) -> Score:
    if not isinstance(figures, dict):
        raise EosError("results", str(file), f"it holds nothing of task {task}", "look at lmms-eval's output above")
    benchmark = TASKS[task]
    for names in benchmark.metrics:
        parts = [figures.get(name) for name in names]
        if all(isinstance(part, int | float) for part in parts):
            error = figures.get(names[0].replace(",", "_stderr,")) if len(names) == 1 else None
            known = benchmark.factor * error if isinstance(error, int | float) else None
            return Score(benchmark.factor * sum(map(float, parts)), known, "+".join(names))  # type: ignore[arg-type]
    wanted = " or ".join("+".join(names) for names in benchmark.metrics)
    problem = f"task {task} has no {wanted}, but {', '.join(figures)}"
    raise EosError("results", str(file), problem, "use lmms-eval 0.7")
