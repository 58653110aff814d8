"""Rows of other benchmarks: references, options, and turns of chats."""

import json

import pytest

from eos_vllm.cluttervqa import read_rows
from eos_vllm.core.errors import EosError

ROW = {"prompt": "What is it?", "image_files": ["a.png"]}


def rows_of(folder, *lines):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return read_rows(file)


def test_references_and_options(tmp_path):
    given = [
        ROW | {"answer": "a cat", "options": ["a cat", "a dog"]},
        ROW | {"answers": ["cat", "kitten"]},
        ROW | {"answer": "a cat", "options": ["a cat", "a dog"], "choices": 5},
    ]
    first, second, third = rows_of(tmp_path, *given)
    assert (first.answers, first.options, first.choices, first.references) == (
        (),
        ("a cat", "a dog"),
        2,
        ("a cat",),
    )
    assert (second.answer, second.references, second.choices) == ("", ("cat", "kitten"), 0)
    assert third.choices == 5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "KeyError: 'answer'"),
        ({"answers": []}, "KeyError: 'answer'"),
        ({"answers": "cat"}, "answers is no list of strings"),
        ({"answers": [1]}, "answers is no list of strings"),
        ({"answers": ["a"], "answer": 1}, "answer is no string"),
        ({"answer": "a", "options": {"A": "a"}}, "options is no list of strings"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, fields, said):
    with pytest.raises(EosError, match=f"line 1 is no row.*{said}"):
        rows_of(tmp_path, ROW | fields)


def test_a_chat_goes_on_from_its_reference_answers(tmp_path):
    given = [
        ROW | {"answers": ["red", "blue", "blue"], "chat": "x"},
        ROW | {"answer": "no", "chat": "y"},
        ROW | {"answer": "2", "chat": "x", "prompt": "How many?"},
        ROW | {"answer": "3", "chat": "x", "prompt": "And now?", "kind": "counting"},
    ]
    rows = rows_of(tmp_path, *given)
    assert [row.kind for row in rows] == ["turn 1", "turn 1", "turn 2", "counting"]
    assert rows[2].history == (("What is it?", "blue"),)
    assert rows[3].history == (("What is it?", "blue"), ("How many?", "2"))
    assert rows[0].history == rows[1].history == ()


def test_a_chat_is_about_the_same_images(tmp_path):
    given = [ROW | {"answer": "a", "chat": 1}, ROW | {"answer": "b", "chat": 1, "image_files": ["b.png"]}]
    with pytest.raises(EosError, match=r"line 2 has other images than the first turn of chat 1; give all turns"):
        rows_of(tmp_path, *given)
