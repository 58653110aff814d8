"""The field's own load testers: what they are asked to send, and when figures agree."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from load_builders import workload, write_rows

from loadtests import crosscheck, peers
from loadtests.crosscheck import compare, split_rows, table
from loadtests.peers import PeerError, PeerFigures, asks_of, guidellm, guidellm_spec, vllm_bench, vllm_bench_command
from loadtests.questions import read_rows
from loadtests.servers import GivenServers
from loadtests.settings import Workload
from loadtests.subjects import Subject


@pytest.fixture
def asked(tmp_path: Path) -> Workload:
    rows = write_rows(tmp_path / "rows", ["What?", "How?", "Where?"])
    return workload(rows, requests=3, concurrency=2, budgets=(64,), output_tokens=16, prompt_characters=20)


def test_vllm_bench_sends_our_requests(asked: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"completed": 3, "request_throughput": 1.5, "median_ttft_ms": 250.0, "median_tpot_ms": 40.0}

    def run(command: Any) -> None:
        (Path(command[command.index("--result-dir") + 1]) / "vllm.json").write_text(json.dumps(result))

    monkeypatch.setattr(peers, "_run", run)
    figures = vllm_bench(asked, tmp_path / "run", "tokenizer")
    assert (figures.answered, figures.requests_per_second, figures.ttft, figures.tpot) == (3, 1.5, 0.25, 0.04)
    lines = [json.loads(line) for line in (tmp_path / "run" / "custom_image.jsonl").read_text().splitlines()]
    for line, ask in zip(lines, asks_of(asked), strict=True):
        image, text = line["content"]
        assert image["image_url"]["url"] == ask.pictures[0].encoded
        assert text == {"type": "text", "text": ask.prompt}


def test_vllm_bench_reads_the_data_set_as_we_mean_it(asked: Workload, tmp_path: Path) -> None:
    datasets = pytest.importorskip("vllm.benchmarks.datasets")
    from loadtests.bodies import user_message

    path = tmp_path / "custom_image.jsonl"
    messages = [user_message(ask) for ask in asks_of(asked)]
    path.write_text("".join(json.dumps({"content": message["content"]}) + "\n" for message in messages))
    data = datasets.CustomImageDataset(dataset_path=str(path), disable_shuffle=True, random_seed=0)
    samples = data.sample(tokenizer=None, num_requests=3, output_len=16, no_oversample=True)
    assert [sample.prompt for sample in samples] == [message["content"] for message in messages]
    assert [sample.expected_output_len for sample in samples] == [16] * 3


def test_vllm_bench_takes_every_flag(asked: Workload, tmp_path: Path) -> None:
    serve = pytest.importorskip("vllm.benchmarks.serve")
    import argparse

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    command = vllm_bench_command(asked, tmp_path, "tokenizer")
    args = parser.parse_args(command[command.index("serve") + 1 :])
    assert args.extra_body == {"vllm_xargs": {"eos_retain": 64}}
    assert (args.num_prompts, args.max_concurrency, args.custom_output_len, args.ignore_eos) == (3, 2, 16, True)
    assert (args.dataset_name, args.backend, args.base_url) == ("custom_image", "openai-chat", asked.base_url)


def test_guidellm_sends_our_requests(asked: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {
        "request_totals": {"successful": 3},
        "time_to_first_token_ms": {"successful": {"median": 250.0}},
        "inter_token_latency_ms": {"successful": {"median": 40.0}},
        "time_per_output_token_ms": {"successful": {"median": 55.0}},
    }

    def run(command: Any) -> None:
        spec = json.loads(Path(command[command.index("-c") + 1]).read_text())["spec"]
        assert spec == guidellm_spec(asked, tmp_path)
        document = {"benchmarks": [{"metrics": metrics, "duration": 2.0}]}
        Path(spec["outputs"][0]["path"]).write_text(json.dumps(document))

    monkeypatch.setattr(peers, "_run", run)
    figures = guidellm(asked, tmp_path, "guidellm")
    assert (figures.answered, figures.requests_per_second, figures.ttft, figures.tpot) == (3, 1.5, 0.25, 0.04)
    body = guidellm_spec(asked, tmp_path)["backend"]["extras"]["body"]
    assert body == {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "vllm_xargs": {"eos_retain": 64}}
    rows = [json.loads(line) for line in (tmp_path / "guidellm.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [ask.prompt for ask in asks_of(asked)]


def test_a_tester_that_fails_is_told() -> None:
    with pytest.raises(PeerError, match="code 3"):
        peers._run(["sh", "-c", "echo no; exit 3"])


def runs(server: str, tester: str, *rates: float) -> list[dict[str, Any]]:
    return [{"server": server, "tester": tester, "requests_per_second": r, "ttft": 1.0, "tpot": 0.1} for r in rates]


@pytest.mark.parametrize(
    ("theirs", "agrees"), [((1.0, 1.1), True), ((1.15, 1.2), True), ((1.3, 1.4), False), ((0.7, 0.8), False)]
)
def test_figures_agree_where_widened_ranges_touch(theirs: tuple[float, ...], agrees: bool) -> None:
    found = compare([*runs("eos", "locust", 1.0, 1.1), *runs("eos", "vllm bench serve", *theirs)])
    verdicts = {row["figure"]: row["agrees"] for row in found}
    assert verdicts == {"requests_per_second": agrees, "ttft": True, "tpot": True}
    assert ("| no |" in table(found)) is not agrees


def test_servers_are_compared_apart() -> None:
    found = compare([*runs("stock", "locust", 1.0), *runs("eos", "locust", 4.0), *runs("eos", "guidellm", 4.0)])
    assert {row["server"] for row in found} == {"eos"}


def test_runs_share_no_image(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [f"What {i}?" for i in range(20)], images=10)
    images = [{row.image_files for row in read_rows(part)} for part in split_rows(rows, 3)]
    assert [len(found) for found in images] == [4, 3, 3]
    assert len(set.union(*images)) == 10


def test_missing_answers_are_an_error(asked: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"completed": 2, "request_throughput": 1.5, "median_ttft_ms": 250.0, "median_tpot_ms": 40.0}
    monkeypatch.setattr(peers, "_run", lambda _: (tmp_path / "vllm.json").write_text(json.dumps(result)))
    with pytest.raises(PeerError, match="2 of 3"):
        vllm_bench(asked, tmp_path, "tokenizer")


@pytest.mark.parametrize(("rate", "code"), [(1.02, 0), (2.0, 1)])
def test_whole_cross_check(rate: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def serving(*_: Any) -> Iterator[tuple[GivenServers, str]]:
        yield GivenServers("http://127.0.0.1:1", "http://127.0.0.1:2"), "m"

    asked: list[tuple[int, tuple[int, ...]]] = []

    def tester(speed: float) -> Any:
        def run(workload: Workload, _: Path) -> PeerFigures:
            asked.append((workload.requests or 0, workload.budgets))
            return PeerFigures(workload.requests or 0, speed, 1.0, 0.1)

        return run

    monkeypatch.setattr(crosscheck, "serving", serving)
    monkeypatch.setattr(crosscheck, "speed_subject", lambda *_: Subject("m", None, None, None))
    monkeypatch.setattr(crosscheck, "_testers", lambda _: {"locust": tester(1.0), "vllm bench serve": tester(rate)})
    out = tmp_path / "cross.json"
    assert crosscheck.main(["--out", str(out), "--requests", "3", "--concurrency", "2", "--repeats", "1"]) == code
    # A round of warming up, as many requests as users; then the one that counts.
    assert asked == [(2, ()), (2, ()), (2, (64,)), (2, (64,)), (3, ()), (3, ()), (3, (64,)), (3, (64,))]
    found = json.loads(out.read_text())
    assert len(found["runs"]) == 4
    assert {row["server"] for row in found["comparison"]} == {"stock", "eos"}
    assert str(tmp_path) not in json.dumps({k: v for k, v in found.items() if k != "provenance"})


def test_a_tester_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PATIENCE", 0.5)
    child = tmp_path / "child"
    with pytest.raises(PeerError, match="had not finished"):
        peers._run(["sh", "-c", f"sleep 60 & echo $! > {child}; wait"])
    deadline = time.monotonic() + 10
    while _lives(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
