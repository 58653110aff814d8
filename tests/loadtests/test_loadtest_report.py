"""The report: verdicts, words, tables and figure from a sweep's raw results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import SECONDS, Runs, arrange, command, made_up

from loadtests import report, sweep
from loadtests.grid import Load
from loadtests.results import Results
from loadtests.tables import full_table, ratio_table, sentences, turns_table


def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[Any, float] = SECONDS, *more: str) -> Path:
    model = arrange(monkeypatch, tmp_path, Runs(run=lambda workload: made_up(workload, seconds)))
    assert sweep.main(command(tmp_path / "out", model, *more)) == 0
    return tmp_path / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return swept(tmp_path_factory.mktemp("sweep"), patch)


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return Results(folder)


def test_comparisons_are_ratios_to_stock(results: Results) -> None:
    ratio = results.ratio("single", Load(8), "64")
    assert ratio is not None
    assert ratio.mean == pytest.approx(4.0, rel=0.01)
    # 576 is half a percent slower in each of five repeats alike: small, and seen.
    close = results.ratio("single", Load(8), "576")
    assert close is not None
    assert (close.repeats, close.verdict) == (5, "slower")
    assert close.mean == pytest.approx(2.0 / 2.01, rel=0.001)
    figures = {(c.figure, c.question) for c in results.comparisons if c.scenario == "multi_turn"}
    assert figures == {("requests/s", None), ("TTFT", 2), ("TTFT", 3)}
    assert {(c.figure, c.question) for c in results.comparisons if c.scenario == "single"} == {("requests/s", None)}


def test_ratio_of_ttft_is_above_1_where_eos_is_earlier(results: Results) -> None:
    ratio = results.ratio("multi_turn", Load(1), "64", question=2)
    assert ratio is not None
    assert ratio.mean == pytest.approx((2.02 - 0.4) / (0.505 - 0.4), rel=0.01)


def test_words_name_every_slower_setting_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = swept(tmp_path, monkeypatch, SECONDS | {64: 3.0, 576: 1.0})
    first = sentences(Results(out))[0]
    assert first.startswith("eos is slower than stock, the whole interval below 1, in 8 of 16 comparisons")
    for scenario in ("single", "multi_turn"):
        for load in ("1 user", "8 users"):
            assert f"{scenario}, {load}, budget 64: requests/s 0.67 (0.67 to 0.67)" in first
    assert "multi_turn, 1 user, budget 64: TTFT of question 3" in first
    assert "budget 576" not in first


def test_words_of_a_good_run_and_of_one_that_is_undecided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = swept(tmp_path, monkeypatch, SECONDS, "--minutes", "0.00001")
    text = sentences(Results(out))
    assert "Not decided" in text[0]
    assert "single, 8 users, budget 576: requests/s 1.00" in text[0]
    assert "In none of 16 comparisons is eos slower" in text[1]
    assert any("None of 120 requests failed" in sentence for sentence in text)
    assert any(sentence.startswith("Left out: repeats from 2 on") for sentence in text)


def test_words_name_failures_and_short_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(workload: Any) -> Any:
        run = made_up(workload)
        run.records[0] = replace(run.records[0], cause="http 500")
        window = run.client["window"] | {"full": False}
        return replace(run, client=run.client | {"window": window})

    model = arrange(monkeypatch, tmp_path, Runs(run=worse))
    sweep.main(command(tmp_path / "out", model, "--repeats-close", "1"))
    text = sentences(Results(tmp_path / "out"))
    assert "12 of 120 requests failed: 12 http 500." in text
    assert any("opened or closed 12 windows early: " in s and "single, 1 user, stock, repeat 1" in s for s in text)


def test_tables_name_one_model_and_one_profile_and_hold_every_setting(results: Results) -> None:
    turns = turns_table(results)
    assert turns is not None
    for table in (ratio_table(results), turns, full_table(results)):
        assert "model; profile embedded-eos" in table.title
        assert {len(row) for row in table.rows} == {len(table.head)}
    rows = ratio_table(results).rows
    assert [row[:2] for row in rows] == [(s, b) for s in ("single", "multi_turn") for b in ("576", "64")]
    assert rows[1][3] == "4.00, faster"
    assert len(full_table(results).rows) == 2 * 2 * 3
    assert full_table(results).rows[0][-1] == "40%"
    assert turns.rows[1][4] == "0.105 (1.66)"


def test_markdown_prints_and_draws(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(folder), "--out", str(tmp_path), "--markdown", "--slo", "ttft:2000,tpot:100"]) == 0
    printed = capsys.readouterr().out
    assert "| scenario | budget | 1 user | 8 users |" in printed
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.md").read_text()
    assert printed.strip() in page
    for words in ("machine", "versions", "seeds", "TTFT ≤ 2 s, TPOT ≤ 0.1 s", "command"):
        assert words in page
    assert str(folder.parent) not in page


def test_open_loop_reports_lateness_and_counts_from_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(workload: Any) -> Any:
        run = made_up(workload)
        return replace(run, records=[replace(record, late=3.0) for record in run.records])

    model = arrange(monkeypatch, tmp_path, Runs(run=late))
    assert sweep.main(command(tmp_path / "out", model, "--rates", "0.5", "--repeats-close", "1")) == 0
    table = full_table(Results(tmp_path / "out"))
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert (row["load"], row["sent late p50 s"], row["worst"]) == ("0.5 visits/s", "3", "3")
    assert float(row["TTFT from due p50 s"]) == pytest.approx(float(row["TTFT p50 s"]) + 3, abs=0.01)


@pytest.mark.parametrize("arguments", [["--slo", "fast"], []])
def test_refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nothing"), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_partial_results_give_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = arrange(monkeypatch, tmp_path, Runs(stop_after=4))
    assert sweep.main(command(tmp_path / "out", model)) == 130
    assert report.write_report(Results(tmp_path / "out"), tmp_path / "page").exists()


def test_results_of_another_form_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "sweep.json").write_text('{"settings": {}, "sessions": []}')
    (tmp_path / "cells" / "a.json").write_text('{"phase": "large"}')
    assert report.main([str(tmp_path)]) == 2
    assert "another form" in capsys.readouterr().err
