"""What the load tests' tests are made of: rows with images, records, and raw cells of the sweep's own types."""

import json
from pathlib import Path
from typing import Any

from eos_vllm.models.images import sample_image
from loadtests.cell import CellRun
from loadtests.client import Reply
from loadtests.records import Record, record_of
from loadtests.scenarios import Ask
from loadtests.settings import Workload


def write_rows(folder: Path, prompts: list[str], images: int | None = None, answer: str | None = "yes") -> Path:
    """A JSONL of questions, each about an image of its own or about one of ``images``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, prompt in enumerate(prompts):
        number = i if images is None else i % images
        file = folder / f"{number}.png"
        if not file.exists():
            sample_image(number, 32).save(file)
        row: dict[str, Any] = {"prompt": prompt, "image_files": [file.name]}
        lines.append(json.dumps(row if answer is None else row | {"answer": answer}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def workload(rows: Path | str = "rows.jsonl", **settings: Any) -> Workload:
    """A workload against nobody in particular."""
    return Workload(**({"base_url": "http://127.0.0.1:1", "model": "m", "rows": str(rows)} | settings))


def record(
    number: int = 0, started: float = 0.0, ttft: float = 0.5, tpot: float = 0.1, tokens: int = 5, **changes: Any
) -> Record:
    """A request that was answered, token after token at equal distances; ``changes`` go to its reply."""
    reply = Reply(
        status=200,
        token_times=[ttft + i * tpot for i in range(tokens)],
        text="yes",
        finish="length",
        prompt_tokens=664,
        tokens_out=tokens,
        end=ttft + tokens * tpot,
    )
    ask = Ask(number, "single", "What?", answer=changes.pop("answer", None), budget=changes.pop("budget", None))
    for name, value in changes.items():
        setattr(reply, name, value)
    return record_of(ask, reply, started, 0.0, 1, 0)


def metrics(running: list[float], usage: list[float], blocks: int = 100, **rise: float) -> dict[str, Any]:
    """A server's metrics over a run, in the form of the raw results."""
    series = {"at": [float(i) for i in range(len(running))], "running": running, "kv_usage": usage}
    return {"period": 1.0, "missed": 0, "blocks": blocks, "rise": rise, "series": series}


def cell_run(records: list[Record], **more: Any) -> CellRun:
    """A locust run with these records; server and client agree unless told otherwise."""
    good = [r for r in records if r.good]
    counted = {
        "answered": float(len(good)),
        "generation_tokens": float(sum(r.tokens_out or 0 for r in good)),
        "prompt_tokens": float(sum(r.prompt_tokens or 0 for r in good)),
    }
    found = more.get("metrics") or metrics([1.0, 2.0], [0.2, 0.4], **counted)
    return CellRun(records, found, {"lag_seconds": {"naps": 9, "median": 0.0, "p99": 0.002, "worst": 0.01}}, 10.0)
