"""lmms-eval's command line, its results in our form, checks of servers, and refusals; lmms-eval itself is a fake."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from lmms_cases import FakeServer, counters, running

from eos_search.lmms import BENCHMARKS, FAILED, failed_requests, lmms_command, read_scores
from eos_search.lmms_command import STOCK, Target, add_parser, targets
from eos_search.lmms_server import check_server, kept_per_image, serve_flags
from eos_search.lmms_tables import average, budget_tables, cross_budget_table
from eos_search.main import main
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import EosError
from eos_vllm.profiles import load

PROFILE = "eos-llava-1.5-7b"
STAMP = "20260730_101112"
# As lmms-eval writes them: the filter behind a comma, standard errors as numbers or "N/A", aliases between.
RESULTS: dict[str, dict[str, Any]] = {
    "pope": {
        "alias": "pope",
        "pope_accuracy,none": 0.8578,
        "pope_accuracy_stderr,none": "N/A",
        "pope_recall,none": 1.0,
    },
    "scienceqa_img": {"exact_match,none": 0.6485, "exact_match_stderr,none": 0.01},
    "mme": {
        "mme_cognition_score,none": 365.0,
        "mme_percetion_score,none": 1511.0,
        "mme_cognition_score_stderr,none": 9,
    },
    "gqa": {"exact_match,none": 0.6092, "exact_match_stderr,none": 0.004},
    "textvqa_val": {"exact_match,none": 0.4529, "exact_match_stderr,none": 0.007, "submission,none": None},
    "seedbench": {"seed_image,none": 0.6571, "seed_video,none": 0.4, "seed_all,none": 0.6},
    "mmstar": {"average,none": 0.3427, "math,none": 0.2},
    "realworldqa": {"exact_match,flexible-extract": 0.5503, "exact_match_stderr,flexible-extract": 0.02},
    "ai2d": {"exact_match,none": 0.1, "exact_match,flexible-extract": 0.5567},
    "ocrbench": {"ocrbench_accuracy,none": 0.306},
    "chartqa": {"relaxed_overall,none": 0.184, "relaxed_overall_stderr,none": 0.008, "relaxed_human_split,none": 0.1},
    "mmbench_en_dev_static": {"gpt_eval_score,none": 63.83, "submission,none": None},
}


def write_results(folder: Path, results: dict[str, Any], stamp: str = STAMP) -> Path:
    """A results file where lmms-eval puts it: in a folder of the model's name."""
    file = folder / "eos" / f"{stamp}_results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"results": results, "configs": {}, "date": stamp}))
    return file


def arguments(*given: str) -> Any:
    """Parsed arguments of the command."""
    import argparse

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["lmms", *given])


def test_the_command_is_lmms_evals() -> None:
    command = lmms_command("py", "http://h:1/v1", "eos", ["pope", "mme"], Path("out"), 8, 5)
    assert command == [
        *("py", "-m", "lmms_eval", "--model", "openai"),
        *("--model_args", "model_version=eos,base_url=http://h:1/v1,api_key=EMPTY,num_concurrent=8"),
        *("--tasks", "pope,mme", "--batch_size", "1", "--log_samples", "--output_path", "out"),
        *("--limit", "5"),
    ]
    assert "--limit" not in lmms_command("py", "http://h:1/v1", "eos", ["pope"], Path("out"))
    with pytest.raises(EosError, match="comma"):
        lmms_command("py", "http://h:1/v1", "a,b", ["pope"], Path("out"))
    with pytest.raises(EosError, match="no temperature"):
        lmms_command("py", "http://h:1/v1", "llava-o1", ["pope"], Path("out"))


def test_every_benchmark_of_table_4_is_read_in_its_unit(tmp_path: Path) -> None:
    write_results(tmp_path, RESULTS)
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions/mmbench_en_dev_static_results.json").write_text('{"overall_acc": 0.6}')
    scores = read_scores(tmp_path, list(BENCHMARKS))
    # The paper's row EOS at 192.
    row = [85.78, 64.85, 1876, 60.92, 45.29, 65.71, 34.27, 55.03, 55.67, 30.60, 18.40, 63.83]
    assert [scores[task].value for task in BENCHMARKS] == pytest.approx(row)
    assert scores["ai2d"].metric == "exact_match,flexible-extract"
    assert scores["mme"].metric == "mme_percetion_score,none+mme_cognition_score,none"
    assert scores["mme"].error is None
    assert scores["pope"].error is None
    assert scores["gqa"].error == pytest.approx(0.4)
    assert scores["realworldqa"].error == pytest.approx(2.0)


def test_the_average_is_the_papers() -> None:
    row = [85.79, 64.80, 1869, 60.95, 45.25, 65.59, 33.98, 54.77, 55.38, 30.40, 18.12, 63.75]
    scores = {task: {"value": value} for task, value in zip(BENCHMARKS, row, strict=True)}
    assert average(scores) == pytest.approx(53.79, abs=0.006)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(EosError, match="left no results of this run"):
        read_scores(tmp_path, ["pope"])
    file = write_results(tmp_path, {"pope": {"pope_f1_score,none": 0.8}})
    with pytest.raises(EosError, match="no pope_accuracy,none, but pope_f1_score,none"):
        read_scores(tmp_path, ["pope"])
    with pytest.raises(EosError, match="nothing of task mme"):
        read_scores(tmp_path, ["mme"])
    file.write_text("{")
    with pytest.raises(EosError, match="cannot be read"):
        read_scores(tmp_path, ["pope"])


def test_results_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    old = write_results(tmp_path, {"pope": {"pope_accuracy,none": 0.1}}, "20260101_000000")
    os.utime(old, (1000, 1000))
    with pytest.raises(EosError, match="left no results of this run"):
        read_scores(tmp_path, ["pope"], since=2000)
    new = write_results(tmp_path, {"pope": {"pope_accuracy,none": 0.8}})
    os.utime(new, (3000, 3000))
    assert read_scores(tmp_path, ["pope"], since=2000)["pope"].value == pytest.approx(80)


def test_requests_that_failed_are_counted_by_task(tmp_path: Path) -> None:
    file = write_results(tmp_path, RESULTS)
    answers = {"pope": ["Yes", f"{FAILED} after 5 retries] timed out"], "mme": ["No"]}
    for task, replies in answers.items():
        lines = [json.dumps({"doc_id": i, "filtered_resps": [reply]}) for i, reply in enumerate(replies)]
        file.with_name(f"{STAMP}_samples_{task}.jsonl").write_text("\n".join(lines) + "\n")
    file.with_name("20250101_000000_samples_gqa.jsonl").write_text(f"{FAILED}]\n")
    assert failed_requests(tmp_path) == {"pope": 1}


def case(name: str, budget: int | None, pope: float, error: float | None = None, **more: Any) -> dict[str, Any]:
    """A case of the raw result with two benchmarks."""
    scores = {"pope": {"value": pope, "error": error, "metric": "a"}, "mme": {"value": 1400.0, "error": None}}
    return {"profile": name, "budget": budget, "scores": scores, **more}


def test_tables_are_those_of_the_paper() -> None:
    cases = [case("v2", 16, 67.1), case("eos", 16, 76.78, 1.0, failed={"pope": 3}), case("none", None, 85.0)]
    result = {"cases": [*cases, case("eos", 64, 82.78)]}
    tables = budget_tables(result, "v2").split("\n\n")
    assert tables[0] == "All visual tokens"
    assert tables[1].splitlines() == [
        "| profile | POPE | MME | average |",
        "| --- | --- | --- | --- |",
        "| none | 85.00 | 1400 | 67.50 |",
    ]
    assert [line for line in tables if line.startswith("Retain")] == [
        "Retain = 64 visual tokens",
        "Retain = 16 visual tokens",
    ]
    assert "| eos | 76.78 | 1400 | 63.39 |\n| minus v2 | +9.68 | +0 | +4.84 |" in tables[5]
    assert "eos: requests without an answer, marked as wrong: pope 3." in tables[6]
    assert cross_budget_table(result, "pope").splitlines() == [
        "| POPE | all | 64 | 16 |",
        "| --- | --- | --- | --- |",
        "| v2 |  |  | 67.10 |",
        "| eos |  | 82.78 | 76.78 (74.82 to 78.74) |",
        "| none | 85.00 |  |  |",
    ]


def test_kept_tokens_are_counted_between_two_readings() -> None:
    before, after = counters(10, {3: 1000, 16: 200}), counters(14, {3: 1400, 16: 264})
    assert kept_per_image(before, after) == {"3": 100, "16": 16}
    two = after + counters(4, {3: 400, 16: 64}, engine=1)
    assert kept_per_image(before, two) == {"3": 100, "16": 16}
    assert kept_per_image(before, before) == {}
    assert kept_per_image("vllm:x 1\n", "vllm:x 2\n") == {}


def test_a_server_of_another_budget_is_refused() -> None:
    server = FakeServer({3: 100, 16: 16})
    with running(server) as url:
        assert check_server(url, "eos", [100, 16], "flags")
        assert server.images == 1
        with pytest.raises(EosError, match=r"keeps \[100.0, 16.0\], not \[200, 64\]; start it with --eos-retain 64"):
            check_server(url, "eos", [200, 64], "--eos-retain 64", server.answered)
        with pytest.raises(EosError, match="not all tokens"):
            check_server(url, "eos", [], "no --eos-profile", server.answered)
        with pytest.raises(EosError, match="the server has eos"):
            check_server(url, "other", [100, 16], "flags", server.answered)
    with pytest.raises(EosError, match="cannot be reached"):
        check_server(url, "eos", [100, 16], "flags", server.answered)


def test_a_server_without_a_profile_is_one_of_all_tokens() -> None:
    plain, silent = FakeServer(None), FakeServer({})
    with running(plain) as url:
        assert check_server(url, "eos", [], "no --eos-profile")
        assert plain.images == 1
        with pytest.raises(EosError, match="keeps all tokens, not"):
            check_server(url, "eos", [100, 16], "flags", plain.answered)
    with running(silent) as url:
        assert not check_server(url, "eos", [100, 16], "flags")
        assert silent.images == 0
    with running(FakeServer({}, "page")) as url, pytest.raises(EosError, match="no server of OpenAI's form"):
        check_server(url, "eos", [], "flags")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eos_search.lmms_server._COUNTERS_SECONDS", 0.5)


def test_targets_need_a_server_for_each_budget() -> None:
    found = targets(arguments("--servers", "64=http://a:1/v1/,all=http://b:2/v1", "--profiles", PROFILE))
    assert found == [Target(PROFILE, 64, "http://a:1/v1"), Target(STOCK, None, "http://b:2/v1")]
    served = arguments("--serve", "model", "--profiles", f"none,{PROFILE}", "--budgets", "64,16")
    assert targets(served) == [Target(STOCK, None, None), Target(PROFILE, 64, None), Target(PROFILE, 16, None)]
    name = ["--served-model-name", "eos"]
    assert serve_flags("eos", STOCK, None, "--dtype half") == [*name, "--dtype", "half"]
    # A server rounds counts to KV blocks unless it is told not to: tables name the exact ones.
    budget = ["--eos-profile", PROFILE, "--eos-retain", "16", "--eos-exact-counts"]
    assert serve_flags("eos", PROFILE, 16, "--dtype half") == [*name, *budget, "--dtype", "half"]


# Stands in for an environment's interpreter that has lmms-eval: writes results as it does.
_FAKE = """\
#!{python}
import json, pathlib, sys
if "-c" in sys.argv:
    sys.exit(0)
told = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = pathlib.Path(told["--output_path"]) / "eos"
folder.mkdir(parents=True, exist_ok=True)
figures = {{"pope_accuracy,none": 0.75, "pope_accuracy_stderr,none": 0.01}}
results = {{task: figures for task in told["--tasks"].split(",")}}
(folder / "{stamp}_results.json").write_text(json.dumps({{"results": results}}))
(folder / "{stamp}_samples_pope.jsonl").write_text('{{"filtered_resps": ["{failed} after 5 retries]"]}}\\n')
"""


def test_a_run_ends_in_a_raw_result_that_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake, out = tmp_path / "python", tmp_path / "raw.json"
    fake.write_text(_FAKE.format(python=sys.executable, stamp=STAMP, failed=FAILED))
    fake.chmod(0o755)
    counts = kept_counts(load(PROFILE), 16)
    server = FakeServer(dict(zip(load(PROFILE).layers, counts, strict=True)))
    with running(server) as url:
        argv = ["lmms", "--servers", f"16={url}", "--profiles", PROFILE, "--tasks", "pope", "--python", str(fake)]
        argv += ["--folder", str(tmp_path / "runs"), "--out", str(out)]
        assert main(argv) == 0
        assert main(argv) == 0
    assert server.images == 1
    (made,) = json.loads(out.read_text())["cases"]
    assert (made["profile"], made["budget"], made["expected"]) == (PROFILE, 16, list(counts))
    assert made["scores"]["pope"] == {"value": 75.0, "error": 1.0, "metric": "pope_accuracy,none"}
    assert made["failed"] == {"pope": 1}
    assert str(tmp_path) not in json.dumps(made)
    assert f"| {PROFILE} | 75.00 | 75.00 |" in capsys.readouterr().out
    # A profile that has changed since is run again, in place of the old one.
    raw = json.loads(out.read_text())
    raw["cases"][0] |= {"variant": "another", "failed": {}}
    out.write_text(json.dumps(raw))
    with running(server) as url:
        argv[2] = f"16={url}"
        assert main(argv) == 0
    assert json.loads(out.read_text())["cases"] == [made | {"seconds": raw["cases"][0]["seconds"]}]
    assert server.images == 2
    capsys.readouterr()
    assert main([*argv, "--limit", "3"]) == 2
    assert "another limit" in capsys.readouterr().err
    assert main([*argv, "--served-model", "other"]) == 2
    assert "another model" in capsys.readouterr().err
    assert main(["lmms", "--table", str(out)]) == 0
    assert "75.00 (73.04 to 76.96)" in capsys.readouterr().out


def test_a_dry_run_prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    servers = "64=http://a:1/v1,16=http://b:2/v1"
    argv = ["lmms", "--servers", servers, "--profiles", PROFILE, "--python", "py", "--dry-run"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "base_url=http://b:2/v1" in lines[1]
    assert f"--output_path runs/lmms/{PROFILE}-16" in lines[1]
    assert ",".join(BENCHMARKS) in lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of --servers and --serve is needed"),
        (["--servers", "64=http://a/v1", "--serve", "model"], "one of --servers and --serve"),
        (["--servers", "64=http://a/v1"], "no budget with its server and profile"),
        (["--servers", "64=a", "--profiles", PROFILE], "no budget with its server and profile"),
        (["--servers", "x=http://a/v1", "--profiles", PROFILE], "--servers='x'"),
        (["--servers", "576=http://a/v1", "--profiles", PROFILE], "nothing is reduced"),
        (["--servers", "64=http://a/v1", "--profiles", "no-such"], "neither a file nor a shipped profile"),
        (["--servers", "64=http://a/v1", "--profiles", "a,b"], "are of one profile"),
        (["--servers", "all=http://a/v1", "--tasks", "vqav2"], "none of the paper's"),
        (["--servers", "all=http://a/v1", "--python", "no-such-python"], "it cannot be run"),
        (["--servers", "all=http://a/v1"], "lmms-eval is not installed there; install lmms-eval"),
        (["--table", "no-such.json"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lmms", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("eos-search: error: ")
    assert len(err.splitlines()) == 1
