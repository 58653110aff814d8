"""A stand-in for lmms-eval in rehearsals: its command line and its files, with ClutterVQA's kinds of question as tasks.

``python -m eos_search.lmms_local --model openai --model_args model_version=M,base_url=URL --tasks cluttervqa_counting
--output_path F`` asks a server as lmms-eval would: messages, model, length and temperature, and nothing of a budget.
What is rehearsed is everything around lmms-eval; the figures are ClutterVQA's, on its test split.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eos_search.answerers import STOCK, Case
from eos_search.lmms import LOCAL
from eos_search.server_answerer import ServerAnswerer
from eos_vllm.cluttervqa import Row, export, is_right, read_rows
from eos_vllm.core.errors import EosError

IMAGES = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Answers the tasks, and leaves their figures and samples in the output folder.

    Returns:
        0; 1 where a task is unknown or the server gave no answer, with the reason on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_args", required=True, help="model_version, base_url and num_concurrent")
    parser.add_argument("--tasks", required=True, help=", ".join(LOCAL))
    parser.add_argument("--output_path", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=IMAGES, help="questions of each task (default: %(default)s)")
    args, _ = parser.parse_known_args(argv)
    told = dict(pair.split("=", 1) for pair in args.model_args.split(","))
    try:
        results, samples = ask(told, args.tasks.split(","), args.limit)
    except EosError as error:
        print(f"lmms_local: {error}", file=sys.stderr)
        return 1
    folder, stamp = args.output_path / told["model_version"], time.strftime("%Y%m%d_%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    for task, lines in samples.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{stamp}_samples_{task}.jsonl").write_text(text, encoding="utf-8")
    (folder / f"{stamp}_results.json").write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


def ask(
    told: dict[str, str], tasks: Sequence[str], limit: int
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Figures of each task as lmms-eval names them, and what was replied.

    Args:
        told: lmms-eval's ``--model_args``.
        tasks: names in :data:`eos_search.lmms.LOCAL`.
        limit: questions of each task.

    Raises:
        EosError: an unknown task, or a request without an answer.
    """
    if unknown := [task for task in tasks if task not in LOCAL]:
        raise EosError("--tasks", unknown[0], "is none of ClutterVQA's", f"choose from {', '.join(LOCAL)}")
    results, samples = {}, {}
    answerer = ServerAnswerer(told["base_url"], told["model_version"], at_once=int(told.get("num_concurrent", 16)))
    try:
        with tempfile.TemporaryDirectory(prefix="eos-rows-") as folder:
            rows = read_rows(export(Path(folder) / "rows", "test", limit))
            for task in tasks:
                asked = [row for row in rows if row.kind == LOCAL[task].title][:limit]
                if not asked:
                    raise EosError("--limit", limit, f"its images have no question of {task}", "give more")
                replies = answerer.answer(asked, [Case(STOCK, None, None)], lambda _: None)[0]
                results[task] = _figures(asked, replies)
                samples[task] = [
                    {"doc_id": row.id, "target": row.answer, "filtered_resps": [reply]}
                    for row, reply in zip(asked, replies, strict=True)
                ]
    finally:
        answerer.close()
    return results, samples


def _figures(rows: Sequence[Row], replies: Sequence[str]) -> dict[str, float]:
    right = sum(is_right(reply, row.answer) for row, reply in zip(rows, replies, strict=True)) / len(rows)
    error = math.sqrt(right * (1 - right) / max(1, len(rows) - 1))
    return {"exact_match,none": right, "exact_match_stderr,none": error}


if __name__ == "__main__":
    sys.exit(main())
