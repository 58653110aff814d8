"""Real locust against a stand-in server: closed and open loop, failures by cause, aborts, broken requests, CSV."""

import csv
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from load_builders import workload, write_rows
from stub_server import PROMPT_TOKENS, StubServer, stub_server, text_of

from loadtests import report, sweep
from loadtests.cell import LocustError, run_cell
from loadtests.results import Results
from loadtests.summary import summary

KINDS = ["What?", "reject me", "crash", "short", "cut", "late error"]


@pytest.fixture
def server() -> Iterator[StubServer]:
    with stub_server() as running:
        yield running


def test_closed_loop_counts_answers_and_failures_by_cause(server: StubServer, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", KINDS)
    asked = workload(rows, base_url=server.url, concurrency=3, requests=24, budgets=(64,), output_tokens=5, label="c")
    run = run_cell(asked, tmp_path / "run", period=0.05, extra=("--csv", str(tmp_path / "locust")))
    assert Counter(record.cause for record in run.records) == {
        None: 4,
        "http 400": 4,
        "http 500": 4,
        "wrong length": 4,
        "stream ended early": 4,
        "error in stream": 4,
    }
    good = [record for record in run.records if record.good]
    assert all((r.tokens_out, r.prompt_tokens, len(r.times), r.right) == (5, PROMPT_TOKENS, 5, True) for r in good)
    assert all(record.times == tuple(sorted(record.times)) for record in good)
    assert [record.number for record in run.records] == list(range(24))
    assert server.most_running <= 3
    assert len(server.bodies) == 24
    assert all(body["vllm_xargs"] == {"eos_retain": 64} for body in server.bodies)
    images = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    assert len(set(images)) == 24
    # What the stand-in counted: "short" answers come to their end as well.
    assert run.metrics["rise"]["answered"] == 8
    assert run.metrics["blocks"] == 100
    assert run.client["lag_seconds"]["naps"] > 0
    _check_csv(tmp_path / "locust_stats.csv", tmp_path / "locust_failures.csv")


def _check_csv(stats: Path, failures: Path) -> None:
    with stats.open() as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    with failures.open() as file:
        causes = {row["Error"]: int(row["Occurrences"]) for row in csv.DictReader(file)}
    counts = {name: int(row["Request Count"]) for (kind, name), row in rows.items() if kind == "METRIC"}
    assert counts == {
        "TTFT": 4,
        "TPOT": 4,
        "end to end": 4,
        "inter-token latency": 16,
        "tokens out": 4,
        "answer right": 4,
    }
    assert float(rows["METRIC", "tokens out"]["Average Response Time"]) == 5
    assert (rows["CHAT", "single"]["Request Count"], rows["CHAT", "single"]["Failure Count"]) == ("24", "20")
    assert sorted(causes.values()) == [4] * 5
    assert any("stream ended early" in cause for cause in causes)


def test_open_loop_sends_at_its_rate_whether_or_not_anybody_answers(tmp_path: Path) -> None:
    with stub_server(pause=0.05) as slow:
        rows = write_rows(tmp_path / "rows", ["What?"] * 8)
        asked = workload(rows, base_url=slow.url, rate=40.0, requests=12, output_tokens=10, seed=3)
        run = run_cell(asked, tmp_path / "run")
        assert all(record.good for record in run.records)
        # Half a second for an answer, 25 ms on average between arrivals: one user would never have two at once.
        assert slow.most_running > 1
        starts = [record.started for record in run.records]
        assert starts == sorted(starts)
        assert len(starts) == 12


def test_time_limit_aborts_faults_and_conversations(server: StubServer, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", [f"What {i}?" for i in range(12)], images=4)
    asked = workload(
        rows,
        base_url=server.url,
        concurrency=4,
        seconds=1.5,
        budgets=(64, 16),
        scenarios={"single": 1.0, "several": 1.0, "multi_turn": 1.0, "two_images": 1.0, "text_only": 1.0},
        abort_share=0.2,
        malformed_share=0.3,
        repeat_share=0.3,
        turns=2,
        output_tokens=6,
    )
    run = run_cell(asked, tmp_path / "run")
    assert {record.cause for record in run.records} == {None}
    assert any(record.aborted for record in run.records)
    assert any(record.fault for record in run.records)
    assert {record.scenario for record in run.records if record.good} == set(asked.scenarios)
    assert {record.budget for record in run.records} == {64, 16}
    # Conversations carry what was said, and their image again.
    longer = [body["messages"] for body in server.bodies if len(body["messages"]) > 1]
    assert longer
    for messages in longer:
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"].strip() == "yes"
        assert text_of(messages[0]) != ""
    second = [r for r in run.records if r.scenario == "multi_turn" and r.good and r.repeats]
    assert second
    assert all(r.images == 1 for r in second)


def test_mistakes_in_the_settings_end_locust_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(LocustError, match="rows"):
        run_cell(workload(tmp_path / "gone.jsonl", requests=1), tmp_path / "run")


def test_command_line_without_a_workload_file(server: StubServer, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", ["What?"] * 4)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(root / "loadtests" / "locustfile.py"), "--headless"),
            *("--users", "2", "--run-time", "1s", "--host", server.url, "--model", "m", "--rows", str(rows)),
            *("--retain", "32", "--scenarios", "single=1", "--output-tokens", "4", "--only-summary"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert server.bodies
    assert all(body["vllm_xargs"] == {"eos_retain": 32} for body in server.bodies)
    assert "TTFT" in done.stdout + done.stderr


def test_whole_sweep_against_given_servers(server: StubServer, tmp_path: Path) -> None:
    with stub_server(pause=0.01) as slow:
        arguments = [
            *("--stock-url", slow.url, "--eos-url", server.url, "--served-name", "m", "--out", str(tmp_path / "out")),
            *("--budgets", "64", "--concurrency", "2", "--requests", "4", "--repeats", "1", "--output-tokens", "5"),
        ]
        assert sweep.main(arguments) == 0
    assert {str(body.get("vllm_xargs")) for body in server.bodies} == {"{'eos_retain': 64}"}
    assert {str(body.get("vllm_xargs")) for body in slow.bodies} == {"None"}
    results = Results(tmp_path / "out")
    text = summary(results)
    assert any("agree on requests, output tokens and prompt tokens in all 2 runs" in sentence for sentence in text)
    page = report.write_report(results, tmp_path / "page").read_text()
    assert "servers as given" in page
    assert "127.0.0.1" not in page
