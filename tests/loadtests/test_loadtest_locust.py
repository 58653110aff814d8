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

from eos_vllm.core.errors import EosError
from loadtests import report, sweep
from loadtests.cell import PROBE, LocustError, run_cell, settle
from loadtests.figures import Steady
from loadtests.results import Results
from loadtests.servers import GivenServers
from loadtests.tables import sentences
from loadtests.warmup import warm_up

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
            *("--users", "2", "--run-time", "6s", "--host", server.url, "--model", "m", "--rows", str(rows)),
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


def test_steady_state_keeps_every_user_asking_and_cuts_off_what_is_left(tmp_path: Path) -> None:
    with stub_server(pause=0.02) as slow:
        rows = write_rows(tmp_path / "rows", [f"What {i}?" for i in range(12)], images=4)
        asked = workload(
            rows,
            base_url=slow.url,
            concurrency=4,
            window=1.5,
            window_requests=6,
            window_most=20.0,
            scenarios={"multi_turn": 1.0},
            output_tokens=8,
            prepare=4,
        )
        run = run_cell(asked, tmp_path / "run")
        settle(slow.url, asked.model)
        window = run.client["window"]
        assert window["full"]
        assert window["closed"] - window["opened"] >= 1.5
        starters = [record for record in run.records if record.starter]
        assert [record.tokens_out for record in starters] == [2, 4, 6, 8]
        # What was on its way when the window closed is no failure; a user may have been between two requests.
        assert {record.cause for record in run.records} == {None}
        assert 2 <= sum(record.cut for record in run.records) <= 3
        steady = Steady.of(run.records, run.client)
        # The window is held open for its six answers; four users whose answers take 8 times 20 ms give 25/s at most.
        assert len(steady.answered) >= 6
        assert steady.requests_per_second < 25
        assert {record.question for record in steady.full} == {1, 2, 3}
        assert slow.most_running == 4
        # More visits than were prepared: the client says so.
        assert run.client["late_encodings"] > 0


def test_open_loop_window_waits_for_answers_and_knows_how_late_it_was(tmp_path: Path) -> None:
    with stub_server(pause=0.02) as slow:
        rows = write_rows(tmp_path / "rows", ["What?"] * 8)
        asked = workload(rows, base_url=slow.url, rate=20.0, window=1.0, output_tokens=10, seed=3)
        run = run_cell(asked, tmp_path / "run")
        assert all(record.good for record in run.records)
        assert not any(record.starter for record in run.records)
        assert max(record.started for record in run.records) <= 1.6
        assert all(record.late >= 0 for record in run.records)
        assert any(record.late > 0 for record in run.records)
        # Ramp and window, as long as asked for, and every answer that was due in it.
        assert run.client["window"]["closed"] >= max(1.4, *(record.started for record in run.records))


def test_dead_servers_end_a_steady_run_all_the_same(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", ["What?"] * 8)
    run = run_cell(workload(rows, concurrency=2, window=0.5, window_most=1.0), tmp_path / "run")
    assert {record.cause for record in run.records if not record.cut} == {"no connection"}
    assert not run.client["window"]["full"]


def test_whole_sweep_against_given_servers(server: StubServer, tmp_path: Path) -> None:
    with stub_server(pause=0.01) as slow:
        arguments = [
            *("--stock-url", slow.url, "--eos-url", server.url, "--served-name", "m", "--out", str(tmp_path / "out")),
            *("--budgets", "64", "--concurrency", "2", "--scenarios", "single,several", "--seconds", "0.5"),
            *("--repeats-close", "1", "--output-tokens", "5"),
        ]
        assert sweep.main(arguments) == 0
    asked = [body for body in server.bodies if text_of(body["messages"][-1]) != PROBE]
    assert {str(body.get("vllm_xargs")) for body in asked} == {"{'eos_retain': 64}"}
    assert {str(body.get("vllm_xargs")) for body in slow.bodies} == {"None"}
    results = Results(tmp_path / "out")
    assert any("requests failed; " in sentence for sentence in sentences(results))
    assert all(c.ratio.mean > 1.5 for c in results.comparisons)
    page = report.write_report(results, tmp_path / "page").read_text()
    assert "servers: given" in page
    assert "127.0.0.1" not in page


def test_servers_that_do_not_answer_are_refused_in_one_line(
    server: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--stock-url", "http://127.0.0.1:9", "--eos-url", server.url, "--served-name", "m", "--wait", "0.2"]
    assert sweep.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "error: stock-url=" in line and "/health" in line]) == 1
    assert not (tmp_path / "out" / "cells").exists()
    assert server.bodies == []


def test_servers_that_come_up_late_are_waited_for() -> None:
    with stub_server() as late, stub_server() as other:
        late.unhealthy = 2
        GivenServers(late.url, other.url).wait(10)
        assert late.unhealthy == 0


def test_warm_up_sends_every_kind_of_visit_and_tells_of_failures(server: StubServer, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", [f"What {i}?" for i in range(12)], images=4)
    asked = workload(rows, base_url=server.url, budgets=(64,), output_tokens=4)
    warm_up(asked, ("mixed", "shared_system", "long_text"))
    # One of single, text only, shared system and long text; three of several and multi turn.
    assert len(server.bodies) == 4 + 3 + 3
    assert {str(body["vllm_xargs"]) for body in server.bodies} == {"{'eos_retain': 64}"}
    bad = write_rows(tmp_path / "bad", ["crash"])
    with pytest.raises(EosError, match="http 500"):
        warm_up(workload(bad, base_url=server.url), ("single",))


def test_gauges_that_an_abort_left_behind_do_not_hold_the_next_run_up(server: StubServer) -> None:
    server.stale = 24
    settle(server.url, "m", seconds=5)
    assert server.stale == 0
    with pytest.raises(LocustError, match="no connection"):
        settle("http://127.0.0.1:9", "m", seconds=0.3)
