"""``eos-search reproduce``: its steps, baselines at every budget, the page, and the stand-in for lmms-eval."""

import json
import shlex
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lmms_cases import FakeServer, running

from eos_search.lmms import BENCHMARKS, LOCAL, read_scores
from eos_search.lmms_local import main as stand_in
from eos_search.lmms_tables import kept_table, paper_tables
from eos_search.main import main
from eos_search.reproduce_command import LLAVA, REHEARSAL, comparable, run_step, write_profiles
from eos_search.settings import read_config, read_settings
from eos_vllm.core.budget import kept_counts, parse_tokens
from eos_vllm.core.profile import parse_profile, read_profile
from eos_vllm.profiles import load

DATA = "data/llava_v1_5_mix665k.json"


def steps(capsys: pytest.CaptureFixture[str], *argv: str) -> list[list[str]]:
    """The words of each command that a dry run prints."""
    assert main(["reproduce", *argv, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("would write ")
    return [shlex.split(line) for line in lines[:-1]]


def test_real_data_are_searched_served_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    run, plot, lmms = steps(capsys, "--model", "some/llava-1.5-7b", "--data", DATA, "--python", "py", "--out", out)
    assert run == [
        *("eos-search", "run", "--config", "llava-1.5-7b"),
        *("--model", "some/llava-1.5-7b", "--output", f"{out}/search", "--data", DATA),
    ]
    assert plot == ["eos-search", "plot", "search", "--run", f"{out}/search", "--out", f"{out}/search.png"]
    told = dict(pairwise(lmms))
    assert (told["--serve"], told["--python"], told["--harness"]) == ("some/llava-1.5-7b", "py", "lmms_eval")
    assert told["--tasks"].split(",") == list(BENCHMARKS)
    assert told["--budgets"] == "192,128,96,64,32,16"
    rows = told["--profiles"].split(",")
    assert (rows[0], rows[-1]) == ("none", f"{out}/search/theta.json")
    assert [Path(row).stem for row in rows[1:-1]] == list(LLAVA.profiles[1:])
    assert "--serve-args=--dtype float16" in lmms
    assert not Path(out).exists()


def test_another_config_and_fewer_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "m", "--data", DATA, "--config", "llava-1.5-7b-paper", "--steps", "9", "--limit", "5"]
    run, _, lmms = steps(capsys, *argv)
    assert run[2:4] == ["--config", "llava-1.5-7b-paper"]
    assert run[-2:] == ["--steps", "9"]
    assert lmms[-2:] == ["--limit", "5"]
    assert "runs/reproduce-llava-1.5-7b-paper/lmms.json" in lmms


def test_the_rehearsal_is_short_and_needs_no_lmms_eval(capsys: pytest.CaptureFixture[str]) -> None:
    run, _, lmms = steps(capsys, "--model", "embedded")
    told = dict(pairwise(run))
    assert (told["--steps"], told["--samples"]) == ("40", "320")
    told = dict(pairwise(lmms))
    assert told["--harness"] == "eos_search.lmms_local"
    assert told["--tasks"].split(",") == list(LOCAL)
    assert (told["--budgets"], told["--limit"]) == ("64,32,16", "25")


def test_a_search_goes_on_and_is_not_done_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = tmp_path / "search"
    search.mkdir()
    settings = {**REHEARSAL.search, "model": "embedded", "output": str(search)}
    begun = read_settings(read_config("embedded"), settings).to_dict()
    (search / "settings.json").write_text(json.dumps(begun))
    argv = ["--model", "embedded", "--out", str(tmp_path)]
    assert steps(capsys, *argv)[0][-1] == "--resume"
    (search / "theta.json").write_text("{}")
    assert [words[1] for words in steps(capsys, *argv)] == ["plot", "lmms"]
    assert main(["reproduce", *argv, "--steps", "7", "--dry-run"]) == 2
    assert "has steps=40" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "passed_on"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_stop_is_passed_on_to_a_step_that_has_not_had_it(
    number: signal.Signals, passed_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's Ctrl-C reaches the step as well, and a second one would keep it from writing its checkpoint."""
    sent: list[int] = []

    class Step:
        waits = 0

        def wait(self) -> int:
            self.waits += 1
            if self.waits == 1:
                signal.raise_signal(number)
            return 130

        def send_signal(self, which: int) -> None:
            sent.append(which)

    monkeypatch.setattr("subprocess.Popen", lambda _words: Step())
    before = signal.getsignal(signal.SIGTERM)
    # Whoever starts tests in the background may have had them ignore Ctrl-C.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_step(["run"])
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert sent == [signal.SIGINT] * passed_on
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_data_and_a_failed_step_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ran = ["--out", str(tmp_path / "out")], []

    def fails(words: list[str]) -> int:
        ran.append(words[0])
        return 2

    monkeypatch.setattr("eos_search.reproduce_command.run_step", fails)
    assert main(["reproduce", "--model", "m", *out]) == 2
    assert "--data=None: there is nothing to search on" in capsys.readouterr().err
    assert not ran
    assert main(["reproduce", "--model", "m", "--data", "nowhere", *out]) == 2
    assert "step='run': it failed" in capsys.readouterr().err
    assert ran == ["run"]


@pytest.mark.parametrize("recipe", [LLAVA, REHEARSAL])
def test_every_row_has_every_budget(recipe: Any, tmp_path: Path) -> None:
    made = comparable(recipe.profiles, tmp_path)
    write_profiles(made)
    assert recipe.against in [parse_profile(data).name for data in made.values()]
    for file, name in zip(made, recipe.profiles[1:], strict=True):
        profile, shipped = read_profile(file), load(name)
        for budget in (parse_tokens(text) for text in LLAVA.budgets.split(",")):
            counts = kept_counts(profile, budget)
            if str(budget) in shipped.schedules:
                assert counts == shipped.schedules[str(budget)]
            else:
                assert counts[-1] == budget


def result() -> dict[str, Any]:
    """A raw result of two profiles."""

    def case(name: str, budget: int | None, pope: float, **more: Any) -> dict[str, Any]:
        scores = {"pope": {"value": pope, "error": None}, "mme": {"value": 1400.0, "error": None}}
        return {"profile": name, "budget": budget, "scores": scores, **more}

    kept = {"expected": [66, 34, 20], "kept_per_image": {"2": 66.0, "6": 34.0, "15": 20.0}, "layer_average": 81.8}
    pairs = ((name, budget) for budget in (96, 64, 32) for name in ("v2", "eos"))
    return {"cases": [case("none", None, 85.0), *(case(name, budget, budget + 1.0, **kept) for name, budget in pairs)]}


def test_tables_are_where_the_paper_has_them() -> None:
    parts = dict(part.split("\n\n", 1) for part in paper_tables(result(), "v2").split("## ")[1:])
    four, seven, eight, kept = parts.values()
    assert "All visual tokens" in four
    assert "Retain = 64" in four
    assert "Retain = 32" not in four
    assert "Retain = 96" not in four
    assert "minus v2" not in four
    assert "Retain = 32" in seven
    assert "minus v2" in seven
    assert "| POPE | all | 96 | 64 | 32 |" in eight
    assert "| MME | all | 96 | 64 | 32 |" in eight
    assert "| v2 | 64 | 66, 34, 20 | 66.0, 34.0, 20.0 | 81.8 |" in kept
    assert "none" not in kept_table(result())


def test_the_stand_in_leaves_lmms_evals_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer(None)
    with running(server) as url:
        told = f"model_version=eos,base_url={url},api_key=EMPTY,num_concurrent=1"
        argv = ["--model", "openai", "--model_args", told, "--batch_size", "1", "--log_samples", "--limit", "6"]
        argv += ["--output_path", str(tmp_path)]
        assert stand_in([*argv, "--tasks", "cluttervqa_presence,cluttervqa_counting"]) == 0
        assert server.images == 12
        assert stand_in([*argv, "--tasks", "pope"]) == 1
    assert "is none of ClutterVQA's" in capsys.readouterr().err
    scores = read_scores(tmp_path, ["cluttervqa_presence", "cluttervqa_counting"])
    # The fake says yes to everything, which is never a number.
    assert 0 < scores["cluttervqa_presence"].value < 100
    assert scores["cluttervqa_counting"].value == 0
    assert scores["cluttervqa_presence"].error is not None
    (samples,) = tmp_path.rglob("*_samples_cluttervqa_presence.jsonl")
    assert [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()] == [["yes"]] * 6
