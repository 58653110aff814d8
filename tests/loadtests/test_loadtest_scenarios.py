"""Which requests are sent: shares, determinism, repeated images, conversations."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from load_builders import workload, write_rows

from eos_vllm.core.errors import SettingError
from loadtests.questions import Row, is_right, read_rows
from loadtests.scenarios import FAULTS, Ask, Visit, starter, visits

IMAGES, QUESTIONS = 20, 3
ROWS = [
    Row(f"question {q} of image {i}?", (Path(f"/images/{i}.png"),), f"answer {q}")
    for i in range(IMAGES)
    for q in range(QUESTIONS)
]


def asks(**settings: Any) -> list[Ask]:
    return [ask for visit in visits(workload(**({"requests": 400} | settings)), ROWS) for ask in visit.asks]


def of(scenario: str, **settings: Any) -> list[Visit]:
    return list(visits(workload(**({"requests": 60, "scenarios": {scenario: 1.0}} | settings)), ROWS))


def test_as_many_as_asked_for_numbered_through() -> None:
    for scenario in ("single", "several", "multi_turn"):
        found = asks(requests=41, scenarios={scenario: 1.0})
        assert [ask.number for ask in found] == list(range(41))


def test_endless_without_a_number() -> None:
    assert len(list(islice(visits(workload(), ROWS), 1000))) == 1000


def test_same_seed_same_requests_whatever_the_budget() -> None:
    mixed = {"single": 2.0, "several": 1.0, "two_images": 1.0, "text_only": 1.0, "multi_turn": 1.0}
    settings: dict[str, Any] = {"scenarios": mixed, "repeat_share": 0.3, "seed": 5, "distinct": False}
    first = [(a.scenario, a.prompt, a.pictures) for a in asks(**settings)]
    again = asks(**settings, budgets=(64, 16), abort_share=0.2, malformed_share=0.1)
    assert [(a.scenario, a.prompt, a.pictures) for a in again] == first
    assert [(a.scenario, a.prompt, a.pictures) for a in asks(**settings | {"seed": 6})] != first


def test_shares_of_scenarios() -> None:
    counts = Counter(
        v.asks[0].scenario for v in visits(workload(requests=2000, scenarios={"single": 3, "text_only": 1}), ROWS)
    )
    assert counts["text_only"] / counts.total() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_repeated_images(share: float) -> None:
    shown: set = set()
    repeats = 0
    for ask in asks(repeat_share=share):
        repeats += ask.pictures[0] in shown
        shown.add(ask.pictures[0])
    # The first image cannot be a repeat.
    assert repeats / 399 == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)


def test_images_are_distinct_over_the_whole_run_and_between_runs() -> None:
    one, other = asks(label="a"), asks(label="b")
    assert len({ask.pictures for ask in one}) == 400
    assert [a.pictures[0].path for a in one] == [a.pictures[0].path for a in other]
    assert not {a.pictures for a in one} & {a.pictures for a in other}


def test_files_as_they_are_repeat_when_all_were_shown() -> None:
    found = asks(distinct=False, requests=IMAGES + 1)
    assert len({ask.pictures for ask in found[:IMAGES]}) == IMAGES
    assert found[IMAGES].pictures == found[0].pictures


def test_answers_belong_to_their_questions() -> None:
    by_prompt = {row.prompt: row for row in ROWS}
    for ask in asks(scenarios={"single": 1.0, "several": 1.0}):
        assert ask.answer == by_prompt[ask.prompt].answer
        assert ask.pictures[0].path == by_prompt[ask.prompt].image_files[0]


def test_several_questions_about_one_image() -> None:
    for visit in of("several", questions_per_image=3):
        assert len({ask.pictures for ask in visit.asks}) == 1
        assert len({ask.prompt for ask in visit.asks}) == 3
        assert not visit.conversation


def test_conversations_show_their_image_once_and_only_the_first_answer_counts() -> None:
    for visit in of("multi_turn", turns=3):
        assert visit.conversation
        assert [len(ask.pictures) for ask in visit.asks] == [1, 0, 0]
        assert [ask.answer is None for ask in visit.asks] == [False, True, True]


def test_two_images_and_none() -> None:
    for visit in of("two_images"):
        assert len(set(visit.asks[0].pictures)) == 2
        assert visit.asks[0].answer is None
    assert all(visit.asks[0].pictures == () for visit in of("text_only"))


def test_budgets_are_drawn_per_visit() -> None:
    counts = Counter(ask.budget for ask in asks(budgets=(576, 64)))
    assert set(counts) == {576, 64}
    assert counts[64] / 400 == pytest.approx(0.5, abs=0.08)
    assert {ask.budget for ask in asks()} == {None}
    assert all(len({ask.budget for ask in visit.asks}) == 1 for visit in of("several", budgets=(576, 64)))


def test_aborts_and_faults() -> None:
    found = asks(requests=2000, abort_share=0.10, malformed_share=0.05, output_tokens=16)
    assert sum(a.abort_after is not None for a in found) / 2000 == pytest.approx(0.10 * 0.95, abs=0.02)
    faults = [ask.fault for ask in found if ask.fault]
    assert len(faults) / 2000 == pytest.approx(0.05, abs=0.015)
    assert set(faults) == set(FAULTS)
    assert not any(ask.fault and ask.abort_after is not None for ask in found)
    assert {a.abort_after for a in found if a.abort_after is not None} <= set(range(9))


def test_prompts_of_one_length_have_no_known_answer() -> None:
    found = asks(prompt_characters=69)
    assert {len(ask.prompt) for ask in found} == {69}
    assert {ask.answer for ask in found} == {None}
    assert all(any(ask.prompt.startswith(row.prompt) for row in ROWS) for ask in found)
    assert {len(ask.prompt) for ask in asks(prompt_characters=5)} == {5}


def test_rows_without_images() -> None:
    texts = [Row("only text?")]
    with pytest.raises(SettingError, match="no row has an image"):
        list(visits(workload(requests=1), texts))
    asked = next(visits(workload(requests=1, scenarios={"text_only": 1.0}), texts)).asks[0]
    assert asked.prompt == "only text?"


def test_reading_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ["What?", "How?"])
    rows = read_rows(path)
    assert [(row.prompt, row.answer) for row in rows] == [("What?", "yes"), ("How?", "yes")]
    assert rows[0].image_files == ((tmp_path / "0.png").resolve(),)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("no json", "line 2"),
        ('{"question": "What?"}', "no prompt"),
        ('["What?"]', "no prompt"),
        ('{"prompt": "What?", "image_files": "a.png"}', "no list"),
        ('{"prompt": "What?", "image_files": ["gone.png"]}', "gone.png"),
    ],
)
def test_refused_rows(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(SettingError, match=named):
        read_rows(path)


def test_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(SettingError, match="cannot be read"):
        read_rows(path)
    path.write_text("\n")
    with pytest.raises(SettingError, match="holds no row"):
        read_rows(path)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(SettingError, match="cannot be read"):
        read_rows(path)


def test_a_line_ends_at_its_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one\u2028line"}\n', encoding="utf-8")
    assert [row.prompt for row in read_rows(path)] == ["one\u2028line"]


def test_right_answers() -> None:
    assert is_right(" Yes. ", "yes") is True
    assert is_right("no", "yes") is False
    assert is_right("no", None) is None


def test_one_system_prompt_for_all_and_an_image_for_each() -> None:
    found = [visit.asks[0] for visit in of("shared_system", system_characters=300)]
    assert len({ask.system for ask in found}) == 1
    assert len(found[0].system) == 300
    assert len({ask.pictures for ask in found}) == len(found)
    assert {ask.system for ask in asks()} == {""}


def test_long_texts_differ_from_the_first_character_on_that_a_cache_could_share() -> None:
    found = [visit.asks[0].prompt for visit in of("long_text", long_characters=600, prompt_characters=69)]
    assert {len(prompt) for prompt in found} == {669}
    assert len({prompt[:16] for prompt in found}) == len(found)
    assert all(any(row.prompt in prompt[600:] for row in ROWS) for prompt in found)


def test_starters_are_spread_over_questions_and_lengths() -> None:
    visit = of("multi_turn", turns=3)[0]
    found = [starter(visit, user, 4, 16) for user in range(4)]
    assert [len(made.asks) for made in found] == [1, 2, 3, 1]
    assert [made.asks[0].output_tokens for made in found] == [4, 8, 12, 16]
    assert [[ask.starter for ask in made.asks] for made in found] == [
        [True],
        [True, False],
        [True, False, False],
        [True],
    ]
    assert starter(visit, 0, 100, 16).asks[0].output_tokens == 1
