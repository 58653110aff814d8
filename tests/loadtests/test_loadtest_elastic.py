"""The sweep of elastic budgets: order, resuming, goodput from when requests were due, accuracy at chosen budgets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from load_builders import metrics, record

from eos_vllm.core.errors import SettingError
from loadtests import elastic_report, elastic_sweep
from loadtests.cell import CellRun
from loadtests.elastic_cells import Limits, Options, cells_of
from loadtests.elastic_results import ElasticResults, tables
from loadtests.settings import Workload
from loadtests.store import Store

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / "results/elastic-cpu"
# Seconds to the first token at each multiple of stock's capacity, of the made-up servers.
_LATE = {"stock": 4.0, "192": 1.0, "64": 0.1, "elastic": 0.15}


def made_up(workload: Workload) -> CellRun:
    """Answers of a machine that nobody waits for: one request per second in closed loops."""
    arm = "stock" if workload.base_url.endswith("1") else str((*workload.budgets, "elastic")[0])
    budgets = {str(workload.budgets[0]) if workload.budgets else "192": 10.0}
    if workload.requests is not None:
        right = {576: 10, 192: 9, 133: 8, 92: 7, 64: 6}[workload.budgets[0]]
        records = [record(i, answer="yes" if i % 10 < right else "no") for i in range(workload.requests)]
        return CellRun(records, metrics([1.0], [0.1]) | {"budgets": budgets}, {"lag_seconds": {}}, 1.0)
    window = {"opened": 2.0, "closed": 12.0, "full": True}
    if workload.rate is None:
        records = [record(i, started=i + 0.5, ttft=1.0, tpot=0.1) for i in range(11)]
    else:
        ttft = _LATE[arm] * workload.rate
        records = [record(i, started=i + 0.5, ttft=ttft, tpot=0.1) for i in range(13)]
        if arm == "elastic":
            budgets = {"192": 5.0, "64": 5.0}
    return CellRun(records, metrics([1.0], [0.1]) | {"budgets": budgets}, {"window": window, "lag_seconds": {}}, 9.0)


class Runs:
    """Stands in for locust, and keeps what it was asked for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.workloads: list[Workload] = []
        self.stop_after = stop_after

    def __call__(self, workload: Workload, _: Path) -> CellRun:
        if len(self.workloads) == self.stop_after:
            raise KeyboardInterrupt
        self.workloads.append(workload)
        return made_up(workload)

    @property
    def keys(self) -> list[str]:
        return [workload.label.rsplit(" ", 1)[0] for workload in self.workloads]


def swept(folder: Path, runs: Runs, *more: str) -> int:
    """A sweep whose servers and locust runs are made up."""
    from contextlib import contextmanager

    @contextmanager
    def serving(*_: Any) -> Any:
        class Pair:
            def url(self, kind: str) -> str:
                return "http://127.0.0.1:1" if kind == "stock" else "http://127.0.0.1:2"

        yield Pair()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic_sweep, "servers", serving)
        patch.setattr(elastic_sweep, "run_cell", runs)
        patch.setattr(elastic_sweep, "settle", lambda *_: None)
        patch.setattr(elastic_sweep, "warm_up", lambda *_: None)
        patch.setattr(elastic_sweep, "export_benchmark", lambda folder, *_: folder / "test.jsonl")
        patch.setattr(elastic_sweep.Sweep, "_to_ceiling", lambda *_: 1)
        command = ["--out", str(folder), "--multiples", "0.5,2", "--questions", "20", "--preset", "embedded", *more]
        return elastic_sweep.main(command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic") / "out"
    assert swept(folder, Runs(), "--repeats", "2") == 0
    return folder


def test_settings_take_turns_and_share_their_arrivals(tmp_path: Path) -> None:
    runs = Runs()
    assert swept(tmp_path / "out", runs, "--repeats", "2") == 0
    asked = ["accuracy/576", *(f"accuracy/{budget}" for budget in (192, 133, 92, 64))]
    assert runs.keys[:7] == [*asked, "calibration/unloaded", "calibration/capacity"]
    assert runs.keys[15:17] == ["calibration/unloaded/r2", "calibration/capacity/r2"], "each repeat has its own"
    del runs.workloads[15:17]
    assert runs.keys[7:] == [cell.key for cell in cells_of(Options(multiples=(0.5, 2.0), repeats=2))]
    assert [key.split("/")[2] for key in runs.keys[7:11]] == ["stock", "192", "64", "elastic"]
    assert [key.split("/")[2] for key in runs.keys[15:19]] == ["elastic", "64", "192", "stock"]
    for i in range(7, 23, 4):
        four = runs.workloads[i : i + 4]
        assert len({(w.seed, w.rate, w.window, w.open_ramp) for w in four}) == 1
        assert len({w.label for w in four}) == 4, "no setting may find another's images in a cache"
    assert {w.seed for w in runs.workloads[7:15]} != {w.seed for w in runs.workloads[15:]}
    # Capacity of the made-up stock is one request per second.
    assert {w.rate for w in runs.workloads[7:]} == {0.5, 2.0}


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first, second = Runs(stop_after=9), Runs()
    assert swept(tmp_path / "out", first, "--repeats", "1") == 130
    assert swept(tmp_path / "out", second, "--repeats", "1") == 0
    assert [*first.keys, *second.keys] == [*dict.fromkeys([*first.keys, *second.keys])]
    assert len(first.keys) + len(second.keys) == 5 + 2 + 8


def test_other_settings_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept(folder, Runs(), "--seconds", "1") == 2
    assert "other settings (seconds)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--multiples", "a", "multiples"),
        ("--multiples", "1,1", "each once"),
        ("--repeats", "0", "repeats"),
        ("--seconds", "0", "seconds"),
        ("--elastic", "10%:40%", "numbers of tokens"),
        ("--embedded-profile", "nothing", "nothing"),
    ],
)
def test_mistakes_are_one_line(
    option: str, value: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path / "out", Runs(), option, value) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_limits_count_from_when_a_request_was_due(folder: Path) -> None:
    limits = Limits.of(Store(folder), 3.0)
    assert (limits.capacity, limits.ttft, limits.total) == (pytest.approx(1.0), 3.0, pytest.approx(4.2))
    assert Limits.of(Store(folder), 3.0, repeat=2) == limits
    with pytest.raises(SettingError, match="unloaded/r3"):
        Limits.of(Store(folder), 3.0, repeat=3)
    good = record(0, started=5.0, ttft=2.0, tpot=0.1)
    assert limits.met(good)
    assert not limits.met(replace(good, late=1.1)), "its first token came late from when it was due"
    assert not limits.met(record(0, ttft=2.9, tpot=0.4)), "its last token came late"
    assert not limits.met(replace(good, cut=True))
    client = {"window": {"opened": 5.0, "closed": 10.0}}
    assert limits.due([good, replace(good, started=6.0, late=0.5)], client) == [replace(good, started=6.0, late=0.5)]


def test_goodput_accuracy_and_what_the_tables_say(folder: Path) -> None:
    results = ElasticResults(folder)
    # Ten requests are due in ten seconds; at twice the capacity stock's first tokens come after 8 s.
    assert [results.goodput(2.0, arm) for arm in results.arms] == [0.0, 1.0, 1.0, 1.0]
    assert results.better(2.0) == "192"
    ratio = results.over_better(2.0)
    assert ratio is not None
    assert (ratio.mean, ratio.repeats) == (1.0, 2)
    assert results.shares(0.5, "elastic") == {192: 0.5, 64: 0.5}
    assert results.accuracy({}) is None
    mean, half = results.accuracy({192: 0.5, 64: 0.5}) or (0.0, 0.0)
    assert mean == pytest.approx(0.75)
    assert 0.1 < half < 0.2
    goodput, accuracy = tables(results)
    assert goodput.rows[1] == ("2 (2.00/s)", "0.00", "1.00", "1.00", "1.00", "1.00 (1.00 to 1.00)", "128")
    assert [cell.split(" ")[0] for cell in accuracy.rows[0]] == ["0.5", "100.0", "90.0", "60.0", "75.0", "15.0"]
    # A row is of one model and one profile, which the title names.
    assert "embedded, random weights; profile sparsevlm-v2" in goodput.title
    assert "embedded model; profile embedded-sparsevlm-v2" in accuracy.title


def test_tables_and_figure_by_one_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{elastic_report.BEGIN}\nold\n{elastic_report.END}\nb\n")
    command = [str(folder), "--figure", str(tmp_path / "f.png"), "--readme", str(page)]
    for _ in range(2):
        assert elastic_report.main(command) == 0
    text = elastic_report.section(ElasticResults(folder), (tmp_path / "f.png").as_posix())
    assert page.read_text() == f"a\n{elastic_report.BEGIN}\n\n{text}\n\n{elastic_report.END}\nb\n"
    assert text.partition("\n\n")[2] in capsys.readouterr().out
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("nothing")
    assert elastic_report.main(command) == 2
    assert "no marks" in capsys.readouterr().err


def test_the_readme_says_what_was_measured() -> None:
    page = (_ROOT / "README.md").read_text(encoding="utf-8")
    text = elastic_report.NOTHING
    if _RESULTS.is_dir():
        text = elastic_report.section(ElasticResults(_RESULTS), "docs/elastic.png")
        assert (_ROOT / "docs/elastic.png").is_file()
    assert elastic_report.between_marks(page, text) == page


def test_a_sweep_that_was_stopped_has_tables(tmp_path: Path) -> None:
    assert swept(tmp_path / "out", Runs(stop_after=10)) == 130
    goodput, accuracy = tables(ElasticResults(tmp_path / "out"))
    assert goodput.rows == (("0.5 (0.50/s)", "1.00", "1.00", "1.00", "-", "-", "-"),)
    assert accuracy.rows[0][-1] == "-"
