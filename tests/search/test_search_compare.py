"""Searches against opponents at equal cost: what runs, what it is judged on, and the bootstrap over seeds."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search_cases import make_settings

from benchmarks.served_comparison import begin, figure, measure, table
from eos_search.accuracy import AVERAGE
from eos_search.comparison.searches import Plan, at_reachable_costs
from eos_search.comparison.summary import against_best, by_method, tables, with_rules
from eos_search.discrimination import WITHOUT
from eos_search.main import main
from eos_search.plots.comparison import comparison_figure
from eos_search.raw import digest, read_result
from eos_vllm import profiles
from eos_vllm.core.budget import kept_counts, layer_average
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import parse_profile, read_profile

COST = {
    "select": "uniform", "budget": 12, "budget_measure": "layer_average", "constraint": "lagrangian", "steps": 2,
    "placement": (1, 2), "serve_budgets": (20, 4),
}  # fmt: skip


def made(rights: dict[str, list[float]], kinds: tuple[str, ...] = ("counting", "presence")) -> dict[str, Any]:
    """A result: for each run ``method-sSEED`` the share that it has right of each kind, of 40 images each."""
    rows, cases, runs = [], [], []
    for image in range(40):
        for kind in kinds:
            row = {"id": f"{image}-{kind}", "kind": kind, "form": "yes_no", "answer": "yes", "image": f"{image}.png"}
            rows.append(row)
    for profile, shares in rights.items():
        replies = [
            "yes" if int(row["id"].split("-")[0]) < 40 * shares[kinds.index(row["kind"])] else "no" for row in rows
        ]
        cases.append({"profile": profile, "does": profile, "budget": 64, "replies": replies})
        method, seed = profile.rsplit("-s", 1)
        runs.append({"profile": profile, "does": profile, "method": method, "seed": int(seed)})
    return {"rows": rows, "cases": cases, "runs": runs, "scorer": "exact"}


def test_means_are_over_seeds_and_kinds() -> None:
    result = made({"gradient-s0": [0.5, 1.0], "gradient-s1": [0.7, 0.8], "random-s0": [0.5, 0.5]})
    shares = by_method(result)["gradient", 64]
    assert list(shares) == ["counting", "presence", WITHOUT, AVERAGE]
    assert shares["counting"].value == pytest.approx(0.6)
    assert shares[WITHOUT].value == pytest.approx(0.9)
    assert shares[AVERAGE].value == pytest.approx(0.75)
    assert shares[AVERAGE].questions == 80
    assert shares[WITHOUT].questions == 40


def test_seeds_that_differ_widen_the_interval() -> None:
    same = by_method(made({f"gradient-s{s}": [0.5, 0.5] for s in range(3)}))["gradient", 64][AVERAGE]
    other = by_method(made({f"gradient-s{s}": [0.5, x] for s, x in enumerate((0.2, 0.5, 0.8))}))["gradient", 64][
        AVERAGE
    ]
    assert same.value == pytest.approx(other.value)
    assert other.high - other.low > 1.15 * (same.high - same.low)


def test_the_best_opponent_is_subtracted_with_the_same_images() -> None:
    result = made({"gradient-s0": [0.5, 0.75], "random-s0": [0.5, 0.5], "tpe-s0": [0.5, 0.75]})
    best, share = against_best(result)[64]
    assert best == "tpe"
    # The same answers on the same images: no interval is left.
    assert (share.value, share.low, share.high) == pytest.approx((0, 0, 0))
    best, share = against_best(made({"gradient-s0": [0.5, 1.0], "random-s0": [0.5, 0.5]}), WITHOUT)[64]
    assert best == "random"
    assert share.value == pytest.approx(0.5)
    assert 0.3 < share.low < 0.5 < share.high < 0.7
    assert against_best(made({"gradient-s0": [0.5, 1.0]})) == {}


def test_a_method_without_one_of_its_seeds_at_a_cost_has_none() -> None:
    result = made({"gradient-s0": [0.5, 1.0], "gradient-s1": [0.5, 1.0], "random-s0": [0.5, 0.5]})
    result["cases"] = [case for case in result["cases"] if case["profile"] != "gradient-s1"]
    assert set(by_method(result)) == {("random", 64)}


def test_cases_of_another_run_are_none_of_a_method_s_seeds() -> None:
    """A result file keeps what was asked before, under the same names."""
    result = made({"gradient-s0": [0.5, 1.0], "random-s0": [0.5, 0.5]})
    wrong = ["no"] * len(result["rows"])
    result["cases"].append({"profile": "gradient-s0", "does": "another", "budget": 64, "replies": wrong})
    assert by_method(result)["gradient", 64][AVERAGE].value == pytest.approx(0.75)


def test_the_tables_and_the_figure_say_the_same() -> None:
    result = made({"gradient-s0": [0.5, 1.0], "random-s0": [0.5, 0.5]})
    text = tables(result)
    assert "| gradient | 75.0 (" in text
    assert "| average: gradient minus | 64 |\n| --- | --- |\n| random | 25.0 (" in text
    assert "25.0 (" in text.splitlines()[-1]
    assert text.splitlines()[-1].endswith(" random |")
    _, data = comparison_figure(result)
    assert data["panels"][AVERAGE][0]["points"][0]["value"] == pytest.approx(75)
    assert np.isclose(data["panels"][WITHOUT][1]["points"][0]["value"], 50)


def test_rules_by_themselves_are_opponents() -> None:
    result = made(
        {"gradient-s0": [0.5, 1.0], "gradient-s1": [0.5, 1.0], "random-s0": [0.5, 0.5], "random-s1": [0.5, 0.5]}
    )
    about = {"fingerprint": "abc", "weights": "w"}
    cases = made({"mmr-s0": [0.5, 0.75]})["cases"] + [{"profile": "none", "does": None, "budget": None, "replies": []}]
    together = with_rules(result | about, {"cases": cases, "scorer": "exact"} | about)
    assert by_method(together)["mmr-s0", 64][AVERAGE].value == pytest.approx(0.625)
    best, share = against_best(together)[64]
    assert (best, share.value) == ("mmr-s0", pytest.approx(0.125))
    assert len(result["runs"]) == 4
    with pytest.raises(EosError, match="profile='gradient-s0': the comparison has it"):
        with_rules(result | about, result | about)
    with pytest.raises(EosError, match="fingerprint='other': the comparison has 'abc'"):
        with_rules(result | about, {"cases": cases, "scorer": "exact"} | about | {"fingerprint": "other"})


def test_costs_that_layers_cannot_have_are_left_out() -> None:
    priced, costs = at_reachable_costs(profiles.load("embedded-vscan"), (320, 128, 64))
    assert costs == (320, 128, 64)
    for cost in costs:
        assert layer_average(priced, kept_counts(priced, cost)) == pytest.approx(cost, abs=0.5)
    late = profiles.load("embedded-searched").model_copy(update={"schedules": {}})
    data = late.to_dict()
    data["budget"] = {"measure": "layer_average", "tokens": 300}
    assert at_reachable_costs(late.model_validate(data), (320, 250, 64))[1] == (320, 250)


def test_a_comparison_from_end_to_end(small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Searches, opponents with as many CPU-seconds, the test split; with the same command nothing is done again."""
    config, out = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps(make_settings(small_path, tmp_path / "unused", **COST).to_dict()))
    argv = [
        "compare", "--config", str(config), "--restarts-select", "uniform,maxmin", "--opponents", "random",
        "--costs", "20,8", "--seeds", "0", "--judge-images", "1", "--images", "2", "--processes", "1",
        "--runs", str(tmp_path / "runs"), "--out", str(out), "--figure", str(tmp_path / "figure.png"),
    ]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "| gradient | " in printed
    assert "gradient minus the best opponent" in printed
    result = read_result(out)
    assert [run["profile"] for run in result["runs"]] == ["gradient-s0", "random-s0"]
    spent = {run["profile"]: run["cpu_seconds"] for run in result["runs"]}
    assert spent["random-s0"] >= spent["gradient-s0"] > 0
    told = read_profile(tmp_path / "runs/random-s0/theta.json").provenance
    assert told["validation"]["source"] == "ClutterVQA validation"
    assert result["benchmark"]["source"] == "ClutterVQA test"
    for case in result["cases"][1:]:
        assert case["layer_average"] == pytest.approx(case["budget"], abs=0.55)
    ended = [*(tmp_path / "runs").rglob("start-*/theta.json"), *(tmp_path / "runs/random-s0").glob("t*.json*")]
    assert len(ended) == 4
    before = [file.stat().st_mtime_ns for file in ended]
    assert main(argv) == 0
    assert [file.stat().st_mtime_ns for file in ended] == before
    held = tmp_path / "runs/random-s0/settings.json"
    settings = json.loads(held.read_text())
    for factor, code in ((1.5, 0), (0.5, 2)):  # an opponent may have had more, not less
        held.write_text(json.dumps(settings | {"seconds": factor * settings["seconds"]}))
        assert main(argv) == code
    assert "seconds=" in capsys.readouterr().err
    held.write_text(json.dumps(settings | {"weights": "0"}))
    assert main(argv) == 2
    assert "weights=" in capsys.readouterr().err
    held.write_text(json.dumps(settings))
    for changed, match in ((["--judge-images", "2"], "images=2"), (["--costs", "20,9"], "serve_budgets|costs")):
        assert main([*argv, *changed]) == 2
        assert re.search(match, capsys.readouterr().err)
    assert main(["compare", "--table", str(out)]) == 0
    assert capsys.readouterr().out.startswith("| ")
    check_served(result, small_path)


def test_a_comparison_that_is_stopped_leaves_no_search_behind(small_path: Path, tmp_path: Path) -> None:
    """SIGTERM reaches the main process alone: both searches that run end with a checkpoint, the third never begins."""
    config, runs = tmp_path / "config.json", tmp_path / "runs"
    config.write_text(json.dumps(make_settings(small_path, tmp_path / "x", **(COST | {"steps": 100_000})).to_dict()))
    command = [sys.executable, "-m", "eos_search.main", "compare", "--config", str(config), "--opponents", "none"]
    command += ["--restarts-select", "uniform,maxmin", "--costs", "20,8", "--processes", "2", "--runs", str(runs)]
    logs = [runs / f"gradient-s{seed}" / "start-select-uniform" / "log.jsonl" for seed in (0, 1, 2)]
    # A session of its own, so that whoever is left of it can be seen.
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 240
        while not all(log.exists() and log.stat().st_size for log in logs[:2]):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    until = time.monotonic() + 20
    while any(session_of(status) == process.pid for status in Path("/proc").glob("[0-9]*/stat")):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert [(log.parent / "checkpoints").is_dir() for log in logs] == [True, True, False]


def session_of(status: Path) -> int:
    try:
        return int(status.read_text().rsplit(")", 1)[1].split()[3])
    except (OSError, IndexError):
        return -1


def check_served(result: dict[str, Any], model: Path) -> None:
    """The same profiles served: what is asked, and what its table and figure say of made-up speeds."""
    served = begin(result)
    with pytest.raises(SettingError, match="it is not small, which was compared"):
        measure({**served, "model": "small"}, model.parent, lambda: None)
    for number, (entry, run) in enumerate(zip(served["profiles"], result["runs"], strict=True), start=2):
        assert digest(parse_profile(entry["theta"])) == run["does"]
        assert list(entry["accuracy"]) == [str(cost) for cost in run["costs"]]
        # A machine that gets four times slower in between, for both engines.
        ours = {cost: [1.0 * number, 0.25 * number] for cost in entry["accuracy"]}
        stock = [1.0] * len(ours) + [0.25] * len(ours)
        served["speed"].append({"profile": entry["profile"], "stock": stock, "requests_per_second": ours})
    rows = table(served).splitlines()
    assert [line.count("; 2.00x (2.00 to 2.00)") for line in rows[4:]] == [2, 0]
    assert [line.count("; 3.00x (3.00 to 3.00)") for line in rows[4:]] == [0, 2]
    _, data = figure(served)
    assert [p["over_stock"] for p in data["profiles"]["random-s0"]] == pytest.approx([3.0, 3.0])
    served["speed"][0] |= {"stock": [0.5, 1.5]}  # without turns: the mean of all rounds
    assert "; 1.00x" in table(served)


def test_what_would_not_be_fair_is_refused(small_path: Path, tmp_path: Path) -> None:
    def plan(**changes: Any) -> Plan:
        settings = make_settings(small_path, tmp_path / "unused", **(COST | changes)).to_dict()
        return Plan(settings, [{}], ["random"], (20, 8), (0,), tmp_path / "runs")

    plan().check()
    with pytest.raises(SettingError, match="split='test': a search may not see it"):
        plan(split="test").check()
    with pytest.raises(SettingError, match="split='validation'"):
        plan(split="validation").check()
    with pytest.raises(SettingError, match="budget_measure='final': costs are layer averages"):
        plan(budget_measure="final").check()
    with pytest.raises(SettingError, match="cost=40: an image has 36 visual tokens"):
        replace(plan(serve_budgets=(20,)), costs=(40, 20)).check()
    with pytest.raises(EosError, match="--opponents='chance'"):
        main_error(["compare", "--opponents", "chance"])


def main_error(argv: list[str]) -> None:
    import argparse

    from eos_search.compare_command import add_parser

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(argv)
    args.run(args)
