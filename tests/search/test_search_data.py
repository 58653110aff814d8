"""Data: every source, bad rows counted by reason, the balanced mixture, and how rows become tokens."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from search_cases import ANSWER, PROMPT, VISUAL, MadeImages, make_row, make_settings

from eos_search.data import Data, load_data
from eos_search.examples import Broken, Encoded, Encoder, Row, prepare
from eos_search.settings import SearchSettings
from eos_vllm.cluttervqa import export, read_rows
from eos_vllm.core.errors import SettingError
from eos_vllm.models.images import sample_image


@pytest.fixture(scope="module")
def encoder(small: tuple[Any, Any]) -> Encoder:
    return Encoder(small[1], PROMPT, ANSWER, VISUAL, 200)


def settings_of(tmp_path: Path, **changes: Any) -> SearchSettings:
    return make_settings(tmp_path / "model", tmp_path / "out", **changes)


def write_lines(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries))
    return path


def test_bad_rows_of_a_jsonl_are_counted(tmp_path: Path, encoder: Encoder) -> None:
    sample_image(0, 24).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    good = {"id": "good", "image": "a.png", "question": "Is it red?", "answer": "yes"}
    entries = [
        good,
        {**good, "id": "list", "image": ["a.png", "a.png"], "answer": ["no", "never"]},
        {**good, "image": "gone.png"},
        {**good, "image": "b.png"},
        {**good, "image": None},
        {**good, "answer": "  "},
        {key: value for key, value in good.items() if key != "answer"},
        {**good, "question": ""},
        {**good, "question": "Why? " * 60},
        "{broken\n",
        "[1]\n",
        "\n",
    ]
    file = write_lines(tmp_path / "rows.jsonl", entries)
    data = load_data(settings_of(tmp_path, data=str(file), data_format="jsonl"), encoder)
    assert sorted(row.id for row in data.rows) == ["good", "list"]
    by_id = {row.id: row for row in data.rows}
    assert (by_id["list"].answer, len(by_id["list"].images.names)) == ("no", 2)
    assert data.skipped == {
        "missing image": 1,
        "unreadable image": 1,
        "no image": 1,
        "no answer": 2,
        "no question": 1,
        "longer than 200 tokens": 1,
        "no JSON": 1,
        "no JSON object": 1,
    }
    assert "9 rows skipped" in data.summary()[1]


def test_an_export_of_the_benchmark_is_read(tmp_path: Path, encoder: Encoder) -> None:
    file = export(tmp_path / "clutter", "train", images=3, questions=4)
    data = load_data(settings_of(tmp_path, data=str(file), data_format="jsonl", samples=50), encoder)
    rows = {row.id: row for row in read_rows(file)}
    assert {row.id for row in data.rows} == set(rows)
    for row in data.rows:
        assert (row.question, row.answer, row.category) == (rows[row.id].prompt, rows[row.id].answer, rows[row.id].kind)
        assert row.images.load()[0].size == (96, 96)


def test_the_benchmark_is_drawn_the_same_each_time(tmp_path: Path, encoder: Encoder) -> None:
    data = [load_data(settings_of(tmp_path, samples=20, seed=seed), encoder) for seed in (1, 1, 2)]
    assert [row.id for row in data[0].rows] == [row.id for row in data[1].rows]
    assert data[0].fingerprint == data[1].fingerprint != data[2].fingerprint
    assert len(data[0].rows) == 20
    drawn, again = (d.rows[0].images.load()[0] for d in data[:2])
    assert drawn.tobytes() == again.tobytes()
    file = export(tmp_path / "clutter", "train", images=6)
    written = {row.id: row for row in read_rows(file)}
    for row in data[0].rows:
        if row.id in written:
            assert (row.question, row.answer) == (written[row.id].prompt, written[row.id].answer)


def llava_entry(number: int, image: str | None, question: str, answer: str, *more: str) -> dict[str, Any]:
    said = [question, answer, *more]
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(said)]
    return {"id": str(number), "conversations": turns} | ({} if image is None else {"image": image})


def test_the_mixture_is_balanced(tmp_path: Path, encoder: Encoder) -> None:
    short = "\nAnswer the question using a single word or phrase."
    kinds = {
        "coco/train2017/{}.jpg": [("<image>\nWhat?" + short, "cat", "Is it?" + short, "Yes")] * 8,
        "gqa/images/{}.jpg": [("Which?" + short, "left")] * 3,
        "textvqa/train_images/{}.jpg": [("What is written?" + short, "stop")] * 8,
        "coco/talk{}.jpg": [("Describe the scene.<image>", "A long story.")] * 8,
        "vg/VG_100K/{}.jpg": [("Where?" + short, "there")] * 2,
    }
    entries = []
    for path, rows in kinds.items():
        for said in rows:
            name = path.format(len(entries))
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            sample_image(len(entries), 24).save(tmp_path / name)
            entries.append(llava_entry(len(entries), name, *said))
    entries += [llava_entry(99, None, "Text only?", "Yes"), {"id": "100", "image": "coco/x.jpg", "conversations": []}]
    (tmp_path / "coco/talk19.jpg").unlink()
    file = tmp_path / "mix.json"
    file.write_text(json.dumps(entries))
    settings = settings_of(tmp_path, data=str(file), data_format="llava", samples=18)
    data = load_data(settings, encoder)
    used = Counter(row.category for row in data.rows)
    assert used == {"pope": 5, "gqa": 3, "textvqa": 5, "conversation": 5}
    assert data.skipped["of no category"] == 2
    assert data.skipped["no image"] == 1
    assert data.skipped["no answer"] == 1
    pope = next(row for row in data.rows if row.category == "pope")
    assert (pope.question, pope.answer) == ("Is it?" + short, "Yes")
    everything = load_data(settings.model_copy(update={"samples": 1000}), encoder)
    assert Counter(row.category for row in everything.rows)["conversation"] == 7
    assert everything.skipped["missing image"] == 1


def test_a_hugging_face_data_set(tmp_path: Path, encoder: Encoder) -> None:
    import datasets

    columns = {
        "picture": [sample_image(0, 24), None, sample_image(1, 24)],
        "ask": ["One?", "Two?", "Three?"],
        "say": ["1", "2", ""],
    }
    features = datasets.Features(
        {"picture": datasets.Image(), "ask": datasets.Value("string"), "say": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "set")
    named = {"question_column": "ask", "answer_column": "say", "image_column": "picture"}
    settings = settings_of(tmp_path, data=str(tmp_path / "set"), data_format="huggingface", **named)
    data = load_data(settings, encoder)
    assert [(row.question, row.answer) for row in data.rows] == [("One?", "1")]
    assert data.rows[0].images.load()[0].tobytes() == sample_image(0, 24).tobytes()
    assert data.skipped == {"no image": 1, "no answer": 1}
    with pytest.raises(SettingError, match=r"answer_column='answer or answers'.*picture, ask, say"):
        load_data(settings.model_copy(update={"answer_column": None}), encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "gone.jsonl", "data_format": "jsonl"}, "cannot be read"),
        ({"data": "gone", "data_format": "huggingface"}, "cannot be loaded"),
        ({"data": "empty.jsonl", "data_format": "jsonl"}, "no row is of use"),
        ({"data": "bad.jsonl", "data_format": "jsonl"}, "no row is of use.*1 rows skipped: no image 1"),
        ({"data": "bad.jsonl", "data_format": "llava"}, "no JSON list"),
        ({"data": "some", "data_format": "cluttervqa"}, "drawn, not read"),
    ],
)
def test_data_of_no_use_is_refused(tmp_path: Path, encoder: Encoder, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    write_lines(tmp_path / "bad.jsonl", [{"question": "a", "answer": "b"}])
    changes = {**changes, "data": str(tmp_path / changes["data"])}
    with pytest.raises(SettingError, match=message):
        load_data(settings_of(tmp_path, **changes), encoder)


def test_a_row_becomes_prompt_and_answer(small: tuple[Any, Any], encoder: Encoder) -> None:
    row = Row("x", "<image>\nIs it red?", " yes ", MadeImages((1, 2)), "made up")
    encoded = encoder.encode(7, row)
    assert isinstance(encoded, Encoded)
    tokenizer = small[1].tokenizer
    example = prepare(small[0], encoded, "relevant_text", VISUAL)
    assert [span.length for span in example.spans] == [VISUAL, VISUAL]
    text = tokenizer.decode(encoded.ids[example.is_text])
    assert text == "<s>USER: \nIs it red? ASSISTANT: yes"
    assert tokenizer.decode(encoded.targets) == " yes</s>"
    assert tokenizer.decode(encoded.ids[: encoded.prompt_length]).endswith("ASSISTANT:")
    assert len(encoded.ids) == encoded.prompt_length + len(encoded.targets) - 1


def test_a_broken_image_is_told(tmp_path: Path, encoder: Encoder) -> None:
    file = tmp_path / "cut.png"
    sample_image(0, 96).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    write_lines(tmp_path / "rows.jsonl", [{"image": "cut.png", "question": "a", "answer": "b"}])
    data = load_data(settings_of(tmp_path, data=str(tmp_path / "rows.jsonl"), data_format="jsonl"), encoder)
    broken = encoder.encode(0, data.rows[0])
    assert isinstance(broken, Broken)
    assert "OSError" in broken.problem


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        ("USER: {question}", " {answer}", "prompt=.*<image>"),
        ("<image>", " {answer}", "prompt=.*question"),
        (PROMPT, " ", "answer=.*answer"),
    ],
)
def test_templates_need_their_placeholders(small: tuple[Any, Any], prompt: str, answer: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Encoder(small[1], prompt, answer, VISUAL, 100)


def test_a_processor_of_another_model_is_told(small: tuple[Any, Any], encoder: Encoder) -> None:
    encoded = encoder.encode(0, make_row(0))
    assert isinstance(encoded, Encoded)
    with pytest.raises(SettingError, match="1 image\\(s\\) became 36 image tokens, not 49 each"):
        prepare(small[0], encoded, "relevant_text", 49)


def test_the_fingerprint_sees_every_field() -> None:
    rows = [make_row(1), make_row(2)]
    base = Data(tuple(rows), Counter()).fingerprint
    other = Row(rows[1].id, rows[1].question, "no", rows[1].images, rows[1].category)
    assert Data((rows[0], other), Counter()).fingerprint != base
    assert Data((rows[1], rows[0]), Counter()).fingerprint != base
