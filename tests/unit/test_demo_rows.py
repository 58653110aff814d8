"""What the demo makes of its answers, without a server."""

import subprocess
import sys
import urllib.error
from contextlib import contextmanager
from pathlib import Path

import pytest

import eos_vllm
from eos_vllm import profiles
from eos_vllm.cli import demo
from eos_vllm.cli.demo import LEAST_RIGHT, QUESTIONS, Row, check, print_table, questions, shown
from eos_vllm.cli.main import main
from eos_vllm.cli.server_process import Server, free_port
from eos_vllm.cluttervqa import KINDS
from eos_vllm.models import embedded

PROFILE = profiles.load("embedded-fastv")


def stock_rows(right):
    return [
        Row("?", "stock (576)", "yes" if i < right else "no", "yes", (576, 576), 1 << 20, 5.0) for i in range(QUESTIONS)
    ]


def metrics(kept):
    return f'eos_visual_tokens_kept_total{{layer="{PROFILE.layers[0]}"}} {kept}.0'


def test_nine_of_ten_is_enough_and_eight_is_not():
    assert check(stock_rows(LEAST_RIGHT), PROFILE, metrics(0)) == []
    (failure,) = check(stock_rows(LEAST_RIGHT - 1), PROFILE, metrics(0))
    assert "8 are right, at least 9" in failure


def test_reduced_answers_may_be_wrong_but_not_missing():
    reduced = Row("?", "profile", "no", "yes", (576, 64), 1 << 18, 5.0)
    assert check([*stock_rows(10), reduced], PROFILE, metrics(64)) == []
    silent = Row("?", "profile", "", "yes", (576, 64), 1 << 18, 5.0)
    assert any("no answer" in line for line in check([*stock_rows(10), silent], PROFILE, metrics(64)))


def test_answers_at_other_budgets_do_not_stand_in_for_stock_ones():
    """A profile that keeps everything answers as stock does, and is counted apart all the same."""
    others = [Row("?", "profile", "yes", "yes", (576, 576), 1 << 20, 5.0)] * 5
    (failure,) = check([*stock_rows(LEAST_RIGHT - 1), *others], PROFILE, metrics(0))
    assert "8 are right, at least 9" in failure


def test_tokens_that_the_plan_does_not_explain_are_a_failure():
    reduced = Row("?", "profile", "yes", "yes", (576, 64), 1 << 18, 5.0)
    (failure,) = check([*stock_rows(10), reduced], PROFILE, metrics(63))
    assert "64 visual tokens should be left, /metrics says 63" in failure


def test_every_kind_is_asked_about_another_image():
    asked = questions()
    assert len({sample.name for sample, _ in asked}) == len(asked) == QUESTIONS
    assert {question.kind for _, question in asked} == set(KINDS)


def test_the_table_marks_wrong_answers_and_counts_right_ones(capsys):
    print_table(stock_rows(9), 4 << 20)
    out = capsys.readouterr().out
    assert out.count("WRONG") == 1
    assert "stock (576)   9 of 10 right" in out


@contextmanager
def dead_server(model, flags, log, environment):
    log.write_text("starting\nEngineDeadError: the engine is gone\n")
    yield Server(f"http://127.0.0.1:{free_port()}", subprocess.Popen([sys.executable, "-c", ""]), log)


def refused(*_):
    raise urllib.error.URLError("refused")


@pytest.mark.parametrize(
    ("patched", "said"),
    [({}, "APIConnectionError"), ({"ask_all": lambda *_: []}, "URLError"), ({"ask_all": refused}, "")],
)
def test_a_server_that_dies_while_asked_gets_one_line_and_the_end_of_its_log(patched, said, monkeypatch, capsys):
    monkeypatch.setattr(demo, "serve", dead_server)
    for name, value in patched.items():
        monkeypatch.setattr(demo, name, value)
    assert main(["demo"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"eos-vllm demo: the server did not answer ({said}")
    assert lines[1:] == ["starting", "EngineDeadError: the engine is gone"]


def test_without_a_client_no_server_is_started(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr(demo, "serve", lambda *_: pytest.fail("a server was started"))
    assert main(["demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "openai" in line
    assert "eos-vllm[serve]" in line


def test_the_models_directory_is_shown_as_it_is_found_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(Path(eos_vllm.__file__).parents[1])
    assert shown(embedded.path()) == Path("eos_vllm/models/embedded/files")
    assert shown(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert shown(embedded.path()) == embedded.path()
    assert shown(embedded.path()).is_absolute()
