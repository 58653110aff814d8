"""``eos-search oppose`` end to end: the split, the budget, stops, and mistakes in one line."""

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ablation_cases import FakeAnswerer

from eos_search.answerers import Case
from eos_search.main import main
from eos_search.opponents import contest
from eos_search.opponents.contest import StoppedError, run_opponent
from eos_search.opponents.judge import Budget, rows_of_first
from eos_search.opponents.log import TRIALS
from eos_search.opponents.settings import SPLIT, OpponentSettings
from eos_search.run_folder import RUN, THETA
from eos_search.spent import SpentTime, earlier_seconds, seconds_of
from eos_vllm.cluttervqa import Row, export, read_rows
from eos_vllm.core.budget import kept_counts, layer_average
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import read_profile

METHODS = ("random", "tpe", "one-knob")


def make_settings(method: Any = "random", questions: int | None = 400, **changes: Any) -> OpponentSettings:
    """On sizes of the embedded model, whose place a made-up answerer takes."""
    given: dict[str, Any] = {"costs": (128, 96), "budget": Budget(None, questions), "images": 4, "first_images": 1}
    return OpponentSettings(method=method, **(given | changes))


class Answers(FakeAnswerer):
    """Right replies to more questions for more gamma; each answer takes a made-up CPU-second."""

    def __init__(self, before: Callable[[int], Any] = lambda n: None) -> None:
        super().__init__(lambda case: 0)
        self.cpu_seconds, self.calls, self.before = 0.0, 0, before
        self.rows: list[Row] = []

    def answer(self, rows: Sequence[Row], cases: Sequence[Case], progress: Callable[[int], Any]) -> list[list[str]]:
        self.calls += 1
        self.before(self.calls)
        self.cpu_seconds += 1.0
        self.rows += rows
        progress(len(rows) * len(cases))
        share = [sum(r.gamma for r in case.profile.reducers) / 3 for case in cases if case.profile]
        return [[row.answer if i % 10 < 10 * s else "?" for i, row in enumerate(rows)] for s in share]


def skip_without_optuna(method: str) -> None:
    if method == "tpe":
        pytest.importorskip("optuna")


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_it_ends_in_the_same_bytes(method: str, tmp_path: Path) -> None:
    skip_without_optuna(method)

    def kill(at: int) -> Callable[[int], None]:
        def before(call: int) -> None:
            if call == at:
                raise RuntimeError("killed")

        return before

    settings = make_settings(method)
    whole = run_opponent(settings, tmp_path / "whole", answerer=Answers())
    assert whole.spent
    for at in (1, 3, 14):
        out = tmp_path / f"killed-{at}"
        with pytest.raises(RuntimeError, match="killed"):
            run_opponent(settings, out, answerer=Answers(kill(at)))
        if at == 14:  # in the middle of a line
            with (out / TRIALS).open("a") as file:
                file.write('{"trial": 99, "ru')
        again = run_opponent(settings, out, resume=True, answerer=Answers())
        assert again.best == whole.best
        assert (out / THETA).read_bytes() == whole.path.read_bytes()
    done = Answers()
    run_opponent(settings, tmp_path / "whole", resume=True, answerer=done)
    assert done.calls == 0
    assert (tmp_path / "whole" / THETA).read_bytes() == (tmp_path / "killed-3" / THETA).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_after_a_trial(number: int, tmp_path: Path) -> None:
    def interrupt(call: int) -> None:
        if call == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError) as stopped:
        run_opponent(make_settings(), tmp_path / "run", answerer=Answers(interrupt))
    assert stopped.value.message == "stopped after 4 trials; go on from there with --resume"
    assert len((tmp_path / "run" / TRIALS).read_text().splitlines()) == 4
    whole = run_opponent(make_settings(), tmp_path / "whole", answerer=Answers())
    run_opponent(make_settings(), tmp_path / "run", resume=True, answerer=Answers())
    assert (tmp_path / "run" / THETA).read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_only_validation_questions_are_asked(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_optuna(method)
    splits: list[str] = []

    def drawn(folder: Any, split: str, *rest: Any, **more: Any) -> Path:
        splits.append(split)
        return export(folder, split, *rest, **more)

    monkeypatch.setattr(contest, "export", drawn)
    answers = Answers()
    result = run_opponent(make_settings(method), tmp_path / "run", answerer=answers)
    assert splits == [SPLIT] == ["validation"]
    assert all(row.id.startswith("validation-") for row in answers.rows)
    assert result.profile.provenance["validation"]["source"] == "ClutterVQA validation"


def test_the_best_of_the_furthest_rung_is_exported(tmp_path: Path) -> None:
    settings = make_settings(questions=2000, name="found", seed=3)
    result = run_opponent(settings, tmp_path / "run", answerer=Answers())
    records = [json.loads(line) for line in (tmp_path / "run" / TRIALS).read_text().splitlines()]
    profile = read_profile(tmp_path / "run" / THETA)
    assert profile.name == "found"
    for cost in (128, 96):
        assert layer_average(profile, kept_counts(profile, cost)) == pytest.approx(cost, abs=0.5)
    facts = profile.provenance
    assert facts["questions"] == sum(record["questions"] for record in records) == result_questions(tmp_path / "run")
    assert 2000 <= facts["questions"] < 2000 + max(record["questions"] for record in records)
    assert facts["trials"] == 1 + max(record["trial"] for record in records)
    assert facts["seed"] == 3
    assert facts["method"] == "random"
    assert "cpu_seconds" not in facts
    assert "--questions 2000" in facts["command"]
    assert facts["validation"]["images"] == 4
    assert str(tmp_path) not in (tmp_path / "run" / THETA).read_text()
    last = [record for record in records if record["rung"] == 2]
    assert facts["trial"] in {record["trial"] for record in last}
    assert facts["validation"]["score"] == pytest.approx(
        sum(share["value"] for share in facts["validation"]["by_cost"].values()) / 2
    )
    assert result.best.score == facts["validation"]["score"]


def result_questions(folder: Path) -> int:
    return json.loads((folder / RUN).read_text())["questions"]


def test_cpu_seconds_of_all_sittings_are_the_budget(tmp_path: Path) -> None:
    settings = make_settings(questions=None, budget=Budget(12.0))

    def kill(call: int) -> None:
        if call == 6:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run_opponent(settings, tmp_path / "run", answerer=Answers(kill))
    second = Answers()
    result = run_opponent(settings, tmp_path / "run", resume=True, answerer=second)
    run = json.loads((tmp_path / "run" / RUN).read_text())
    # A made-up second for each, and the real ones of this process.
    assert 3 <= second.calls <= 7
    assert 12 <= run["cpu_seconds"] < 14
    assert result.profile.provenance["cpu_seconds"] == run["cpu_seconds"] == seconds_of(tmp_path / "run")


def test_a_log_of_another_search_is_refused(tmp_path: Path) -> None:
    run_opponent(make_settings(), tmp_path / "run", answerer=Answers())
    with pytest.raises(SettingError, match=r"seed=1: the search in .* has seed=0"):
        run_opponent(make_settings(seed=1), tmp_path / "run", resume=True, answerer=Answers())
    with pytest.raises(SettingError, match="it holds a search already"):
        run_opponent(make_settings(), tmp_path / "run", answerer=Answers())
    with pytest.raises(SettingError, match="it holds no search to go on with"):
        run_opponent(make_settings(), tmp_path / "none", resume=True, answerer=Answers())
    lines = (tmp_path / "run" / TRIALS).read_text().splitlines()
    first = json.loads(lines[0])
    first["profile"]["reducers"][0]["gamma"] = 0.987
    (tmp_path / "run" / TRIALS).write_text("\n".join([json.dumps(first), *lines[1:]]))
    with pytest.raises(SettingError, match="trial 0 was another profile"):
        run_opponent(make_settings(), tmp_path / "run", resume=True, answerer=Answers())


def test_rungs_take_whole_images(tmp_path: Path) -> None:
    rows = read_rows(export(tmp_path / "rows", SPLIT, 3))
    names = [row.image_files[0].name for row in rows]
    for images in (1, 2, 3, 9):
        end = rows_of_first(rows, images)
        assert len(set(names[:end])) == min(images, 3)
        assert not set(names[:end]) & set(names[end:])


def test_replies_are_the_evaluations_own(small_path: Path, tmp_path: Path) -> None:
    """The command on a model: replies in the log are those of ``eos-search evaluate`` for the same profile."""
    out = tmp_path / "run"
    flags = ["--method", "random", "--cost", "12", "--questions", "60", "--images", "2", "--first-images", "1"]
    flags += ["--model", str(small_path), "--processes", "1", "--max-tokens", "2", "--quiet"]
    assert main(["oppose", *flags, "--out", str(out)]) == 0
    profile = read_profile(out / THETA)
    assert layer_average(profile, kept_counts(profile)) == pytest.approx(12, abs=0.5)
    trial = profile.provenance["trial"]
    records = [json.loads(line) for line in (out / TRIALS).read_text().splitlines()]
    logged = [reply for record in records if record["trial"] == trial for reply in record["replies"][0]]
    raw = tmp_path / "raw.json"
    asked = ["--profiles", str(out / THETA), "--budgets", "12", "--split", SPLIT, "--model", str(small_path)]
    asked += ["--processes", "1", "--max-tokens", "2", "--out", str(raw)]
    images = profile.provenance["validation"]["images"]
    assert main(["evaluate", *asked, "--images", str(images)]) == 0
    (case,) = json.loads(raw.read_text())["cases"]
    assert case["replies"] == logged
    assert case["accuracy"]["average"]["value"] == pytest.approx(profile.provenance["validation"]["score"])
    seconds = json.loads((out / RUN).read_text())["cpu_seconds"]
    assert seconds > 0
    assert records[-1]["cpu_seconds"] <= seconds


def write_run(folder: Path, device: str = "cpu", seconds: float | None = 7.5) -> Path:
    folder.mkdir(parents=True)
    (folder / THETA).write_text("{}")
    (folder / RUN).write_text(json.dumps({"device": device, "cpu_seconds": seconds}))
    return folder


def test_the_seconds_of_a_search(tmp_path: Path) -> None:
    assert seconds_of(write_run(tmp_path / "one")) == 7.5
    restarts = write_run(tmp_path / "restarts")
    write_run(restarts / "a", seconds=2.0)
    write_run(restarts / "b", seconds=3.0)
    (restarts / "restarts.json").write_text(json.dumps({"searches": [{"folder": "a"}, {"folder": "b"}]}))
    assert seconds_of(restarts) == 5
    with pytest.raises(SettingError, match="it ran on cuda"):
        seconds_of(write_run(tmp_path / "gpu", "cuda"))
    with pytest.raises(SettingError, match="were not counted"):
        seconds_of(write_run(tmp_path / "old", seconds=None))
    with pytest.raises(SettingError, match="no search that has ended"):
        seconds_of(tmp_path / "none")
    assert earlier_seconds(tmp_path / "none") is None
    assert SpentTime(None).seconds() is None
    assert 5 <= (SpentTime(5.0).seconds() or 0) < 6


GOOD = ["--method", "random", "--cost", "128", "--questions", "10"]
BAD = [
    (["--cost", "576"], "cost=576: an image has 576 visual tokens; give 1 to 575"),
    (["--cost", "none"], "--cost='none'"),
    (["--cost", "128,128"], r"cost=\[128, 128\]: these are no different costs"),
    (["--cost", "60", "--selectors", "none"], "cost=60: layer 0 alone sees 576 tokens"),
    (["--questions", "0"], "questions=0: is below 1"),
    (["--images", "0"], "images=0: is below 1"),
    (["--first-images", "100"], "first_images=100: there are 72 images"),
    (["--max-reducers", "0"], "max_reducers=0"),
    (["--selectors", "best"], "selectors='best': is unknown; choose from uniform"),
    (["--queries", "all_text,all_text"], "queries='all_text': stands there twice"),
    (["--queries", ","], "queries='': names no query rule"),
    (["--minimums", "8,16"], r"minimums=\[8, 16\]: these are no minimums; give 1 and"),
    (["--minimums", "1,x"], "--minimums='x'"),
    (["--minimums", "1,1000"], "minimums=1000: an image has 576 visual tokens"),
    (["--seed", "-1"], "seed=-1"),
    (["--processes", "0"], "processes=0"),
    (["--model", "no-such-model"], "model"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["oppose", *GOOD, "--out", str(tmp_path / "run"), *flags]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.startswith("eos-search: error: ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("budget", [["--seconds", "0"], ["--seconds", "nan"], ["--like", "no-such-run"]])
def test_budgets_that_are_none(budget: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["oppose", "--method", "random", "--cost", "128", "--out", str(tmp_path / "run"), *budget]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_one_budget_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--seconds", "1", "--questions", "1"]):
        with pytest.raises(SystemExit) as left:
            main(["oppose", "--method", "random", "--cost", "128", "--out", str(tmp_path), *flags])
        assert left.value.code == 2
    with pytest.raises(SettingError, match="an opponent has one budget"):
        OpponentSettings("random", (128,), Budget())


def test_commands_name_what_is_not_default() -> None:
    settings = make_settings("one-knob", model="/there/is/a/model", queries=("all_text",), selectors=())
    command = settings.command_line()
    assert command == (
        "eos-search oppose --method one-knob --cost 128,96 --model model --images 4 --first-images 1 "
        "--selectors none --queries all_text --questions 400"
    )


def test_the_judge_asks_only_what_is_new(tmp_path: Path) -> None:
    answers = Answers()
    run_opponent(make_settings(questions=150), tmp_path / "run", answerer=answers)
    records = [json.loads(line) for line in (tmp_path / "run" / TRIALS).read_text().splitlines()]
    rows = read_rows(export(tmp_path / "rows", SPLIT, 4))
    edges = [0, rows_of_first(rows, 1), rows_of_first(rows, 3), len(rows)]
    for record in records:
        new = edges[record["rung"] + 1] - edges[record["rung"]]
        assert record["questions"] == 2 * new
        assert [len(replies) for replies in record["replies"]] == [new, new]
        assert record["layer_average"] == pytest.approx([128, 96], abs=0.55)
