"""The field's own load testers on the same requests: ``vllm bench serve``, and guidellm where it is installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.bodies import user_message
from loadtests.questions import read_rows
from loadtests.scenarios import Ask, visits
from loadtests.settings import BUDGET_FIELD, Workload

_TAIL = 2000
_PATIENCE = 1800.0


class PeerError(RuntimeError):
    """Another load tester ended badly; the text holds the end of its output."""


@dataclass(frozen=True)
class PeerFigures:
    """What a load tester says of one run: requests answered, per second, and medians in seconds.

    ``tpot`` is the mean time per output token after the first, whatever the tester calls it.
    """

    answered: int
    requests_per_second: float
    ttft: float
    tpot: float


def asks_of(workload: Workload) -> list[Ask]:
    """The requests of a workload, one after the other; conversations cannot be told to other testers."""
    return [ask for visit in visits(workload, read_rows(Path(workload.rows))) for ask in visit.asks]


def _budget(workload: Workload) -> dict[str, Any]:
    return {"vllm_xargs": {BUDGET_FIELD: workload.budgets[0]}} if workload.budgets else {}


def _run(command: Sequence[str]) -> None:
    # In a session of its own, so that a tester that hangs goes with the processes it started.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as tester:
        try:
            said, _ = tester.communicate(timeout=_PATIENCE)
        except BaseException as e:
            os.killpg(tester.pid, signal.SIGKILL)
            if isinstance(e, subprocess.TimeoutExpired):
                raise PeerError(f"{command[0]} was ended: it had not finished after {_PATIENCE:.0f} s") from None
            raise
    if tester.returncode != 0:
        raise PeerError(f"{command[0]} ended with code {tester.returncode}:\n{said[-_TAIL:]}")


def _all_answered(tester: str, answered: int, workload: Workload) -> None:
    if answered != workload.requests:
        raise PeerError(f"{tester}: {answered} of {workload.requests} requests were answered")


def vllm_bench(workload: Workload, folder: Path, tokenizer: str) -> PeerFigures:
    """Runs ``vllm bench serve`` with the workload's requests as a ``custom_image`` data set.

    Args:
        workload: what to send where; images come as ``data:`` URLs, in front of the text as ours do.
        folder: takes the data set and the result.
        tokenizer: directory of the model's tokenizer, with which it counts text.

    Raises:
        PeerError: it ended badly, or did not get every answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "custom_image.jsonl"
    data.write_text("".join(json.dumps({"content": user_message(a)["content"]}) + "\n" for a in asks_of(workload)))
    _run(vllm_bench_command(workload, folder, tokenizer))
    result = json.loads((folder / "vllm.json").read_text())
    _all_answered("vllm bench serve", result["completed"], workload)
    return PeerFigures(
        answered=result["completed"],
        requests_per_second=result["request_throughput"],
        ttft=result["median_ttft_ms"] / 1000,
        tpot=result["median_tpot_ms"] / 1000,
    )


def vllm_bench_command(workload: Workload, folder: Path, tokenizer: str) -> list[str]:
    """The command line of :func:`vllm_bench`."""
    return [
        *(str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai-chat"),
        *("--base-url", workload.base_url, "--endpoint", "/v1/chat/completions"),
        *("--model", workload.model, "--served-model-name", workload.model, "--tokenizer", tokenizer),
        *("--dataset-name", "custom_image", "--dataset-path", str(folder / "custom_image.jsonl"), "--disable-shuffle"),
        *("--num-prompts", str(workload.requests), "--no-oversample"),
        *("--custom-output-len", str(workload.output_tokens), "--ignore-eos", "--num-warmups", "0"),
        *("--max-concurrency", str(workload.concurrency), "--request-rate", "inf", "--disable-tqdm"),
        *("--temperature", "0", "--extra-body", json.dumps(_budget(workload))),
        # Its own check would send the first request twice, the second time with a known image.
        *("--ready-check-timeout-sec", "0"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "vllm.json"),
    ]


def guidellm_command() -> str | None:
    """The ``guidellm`` command, None where there is none. It lives best in an environment of its own.

    It must have been installed as ``guidellm[vision]``: without, it skips every image and waits for ever.
    """
    return shutil.which("guidellm") or shutil.which("guidellm", path=str(Path(sys.executable).parent))


def guidellm(workload: Workload, folder: Path, command: str) -> PeerFigures:
    """Runs guidellm (0.8) with the workload's requests.

    Its "ITL" is our time per output token: from first to last, over the tokens after the first. What it calls TPOT
    holds the first token too. It sends images as JPEG, which a stamp in lowest bits does not outlive: runs must not
    share images.

    Raises:
        PeerError: it ended badly, or did not get every answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": a.prompt, "image": a.pictures[0].encoded} for a in asks_of(workload)]
    (folder / "guidellm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "guidellm-run.json").write_text(json.dumps({"spec": guidellm_spec(workload, folder)}))
    _run([command, "run", "-c", str(folder / "guidellm-run.json"), "--disable-console"])
    benchmark = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]
    metrics = benchmark["metrics"]
    answered = metrics["request_totals"]["successful"]
    _all_answered("guidellm", answered, workload)
    return PeerFigures(
        answered=answered,
        # Its own mean counts from dispatch to dispatch; over a short run that is not the time of the run.
        requests_per_second=answered / benchmark["duration"],
        ttft=metrics["time_to_first_token_ms"]["successful"]["median"] / 1000,
        tpot=metrics["inter_token_latency_ms"]["successful"]["median"] / 1000,
    )


def guidellm_spec(workload: Workload, folder: Path) -> dict[str, Any]:
    """The run of :func:`guidellm` in the form of its configuration files."""
    body = {"temperature": 0, "max_tokens": workload.output_tokens, "ignore_eos": True} | _budget(workload)
    return {
        "backend": {
            "kind": "openai_http",
            "target": workload.base_url,
            "model": workload.model,
            "request_format": "/v1/chat/completions",
            "extras": {"body": body},
        },
        "profile": {"kind": "concurrent", "streams": [workload.concurrency]},
        "constraints": [{"kind": "max_requests", "count": workload.requests}],
        "data": [{"kind": "json_file", "path": str(folder / "guidellm.jsonl")}],
        "outputs": [{"kind": "json", "path": str(folder / "guidellm.json")}],
    }
