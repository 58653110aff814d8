"""What the demo makes of its answers, without a server."""

from eos_vllm import profiles
from eos_vllm.cli.demo import LEAST_RIGHT, QUESTIONS, Row, check, print_table, questions
from eos_vllm.cluttervqa import KINDS

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
