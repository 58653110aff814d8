"""An engine in a process of its own, for what one process cannot hold twice: several ranks, other environments.

``python -m support.alone FILE`` reads what to do from FILE and writes answers and reports of all workers beside it.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from eos_vllm.core.profile import Profile, parse_profile
from support.engines import Answer, Ask, BlockWatch, answer_all, engine, free_blocks, mixed_asks, scheduler_of
from support.runner_v2 import allow_asynchronous_scheduling, is_wanted
from support.traces import answer_traced

TESTS = Path(__file__).parents[1]
# Requests that are traced, and their tokens.
_TRACED = 5, 2


@dataclass(frozen=True)
class Run:
    """What came of it: answers, the workers' reports, and facts of the engine.

    With the setting ``page`` some requests are asked once more before, traced; their traces are among the facts.
    """

    answers: list[Answer]
    reports: list[dict[str, Any]]
    facts: dict[str, Any]


def asks_of(count: int, max_tokens: int) -> list[Ask]:
    """The mixed requests, with answers of one length."""
    asks = mixed_asks(count)
    for ask in asks:
        ask.max_tokens = max_tokens
    return asks


def answers_alone(
    folder: Path,
    model: Path,
    profile: Profile | None,
    asks: tuple[int, int],
    environment: dict[str, str] | None = None,
    **settings: Any,
) -> "Run":
    """Starts an engine for some requests alone.

    Args:
        folder: for files.
        model: model directory.
        profile: None for stock.
        asks: number of :func:`asks_of`, and their tokens.
        environment: variables of the process.
        settings: of the engine.
    """
    file = folder / "task.json"
    task = {"model": str(model), "profile": profile and profile.to_dict(), "asks": asks, "settings": settings}
    file.write_text(json.dumps(task), encoding="utf-8")
    variables = {**os.environ, "PYTHONPATH": str(TESTS), **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-m", "support.alone", str(file)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(file.with_suffix(".result").read_text(encoding="utf-8"))
    answers = [Answer(**answer | {"first_logprobs": _ints(answer)}) for answer in result["answers"]]
    # Whatever the run was for: each worker did, to the token, what the scheduler planned.
    assert [problem for report in result["reports"] for problem in report["lost"]] == []
    return Run(answers, result["reports"], result["facts"])


def _ints(answer: dict[str, Any]) -> dict[int, float]:
    return {int(token): value for token, value in answer["first_logprobs"].items()}


def assert_same(got: list[Answer], want: list[Answer], bound: float = 1e-4) -> None:
    """Token by token, and the first step's log-probabilities within ``bound``."""
    assert len(got) == len(want)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.token_ids == theirs.token_ids, f"request {i}"
        for token, value in ours.first_logprobs.items():
            assert abs(value - theirs.first_logprobs.get(token, value)) <= bound, f"request {i}"


def traces_of(llm: Any) -> list[dict[str, Any]]:
    """Traces of a few of the requests, asked beforehand; what they leave in the prefix cache is dropped."""
    traces = [trace.model_dump() for _, trace in answer_traced(llm, asks_of(*_TRACED))]
    llm.reset_prefix_cache()
    return traces


def assert_same_traces(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """To the index; scores and shares within rounding, for ranks sum in another order."""
    assert len(got) == len(want) > 0
    for ours, theirs in zip(got, want, strict=True):
        assert [_indices(image) for image in ours["images"]] == [_indices(image) for image in theirs["images"]]
        for image, other in zip(ours["images"], theirs["images"], strict=True):
            for reducer, same in zip(image["reducers"], other["reducers"], strict=True):
                for field in ("importance", "share"):
                    assert (reducer[field] is None) == (same[field] is None)
                    if same[field] is not None:
                        assert reducer[field] == pytest.approx(same[field], rel=1e-3, abs=1e-5)
        rest = ("id", "budget", "hit_tokens", "segments")
        assert [ours[field] for field in rest] == [theirs[field] for field in rest]


def _indices(image: dict[str, Any]) -> list[Any]:
    return [(r["layer"], r["entered"], r["kept"], r["assigned"]) for r in image["reducers"]]


def main(file: Path) -> None:
    """Does what ``file`` says."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if is_wanted():
        allow_asynchronous_scheduling()
    task = json.loads(file.read_text(encoding="utf-8"))
    profile = task["profile"] and parse_profile(task["profile"])
    with engine(task["model"], profile, **task["settings"]) as llm:
        traces = []
        if task["settings"].get("page"):
            traces = traces_of(llm)
        free = free_blocks(llm)
        with BlockWatch(scheduler_of(llm)) as watch:
            answers = [asdict(answer) for answer in answer_all(llm, asks_of(*task["asks"]))]
        reports = llm.collective_rpc("eos_report") if profile else []
        drafted = 0
        if not task["settings"].get("disable_log_stats", True):
            drafted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens")
        facts = {"preemptions": watch.preemptions, "drafted": drafted, "lost_blocks": free - free_blocks(llm)}
        facts["traces"] = traces
    result = {"answers": answers, "reports": reports, "facts": facts}
    file.with_suffix(".result").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
