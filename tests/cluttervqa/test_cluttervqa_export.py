"""Export and reading back: the format that load tests and vLLM's own benchmark take."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eos_vllm.cli.main import main
from eos_vllm.cluttervqa import export, make_sample, read_rows
from eos_vllm.core.errors import EosError

ROW = {"prompt": "a", "answer": "b", "image_files": []}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_export_holds_images_questions_and_boxes(tmp_path):
    file = export(tmp_path / "a", "validation", images=5, questions=4)
    rows = read_rows(file)
    assert {row.id.rsplit("-", 1)[0] for row in rows} == {f"validation-{i:06d}" for i in range(5)}
    for i in range(5):
        sample = make_sample("validation", i, 4)
        mine = [row for row in rows if row.id.startswith(sample.name)]
        assert [(r.kind, r.prompt, r.answer, r.choices) for r in mine] == [
            (q.kind, q.text, q.answer, q.choices) for q in sample.questions
        ]
        assert np.array_equal(np.asarray(Image.open(mine[0].image_files[0])), sample.pixels)
        assert [tuple(box) for box in mine[0].boxes] == [thing.box for thing in sample.scene.objects]


def test_processes_make_no_difference(tmp_path):
    export(tmp_path / "one", images=70, questions=2)
    export(tmp_path / "two", images=70, questions=2, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_vllm_bench_reads_it(tmp_path, monkeypatch):
    from vllm.benchmarks.datasets.datasets import CustomImageDataset

    file = export(tmp_path / "a", images=3, questions=2)
    data = CustomImageDataset(dataset_path=str(file), random_seed=0).data
    assert len(data) == len(read_rows(file))
    monkeypatch.chdir(file.parent)
    assert all(Path(name).is_file() for item in data for name in item["image_files"])


def test_an_export_is_never_mixed_with_anything(tmp_path):
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "empty", images=1).is_file()
    with pytest.raises(EosError, match="is not empty"):
        export(tmp_path / "empty", images=1)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes.txt").write_text("mine")
    with pytest.raises(EosError, match="is not empty"):
        export(tmp_path / "kept", images=1)
    assert contents(tmp_path / "kept") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_created_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EosError, match="cannot be created"):
        export(tmp_path / name, images=1)
    assert contents(tmp_path) == {"file": b"mine"}


def test_an_unknown_split_leaves_nothing_behind(tmp_path):
    with pytest.raises(EosError, match="split='holdout'"):
        export(tmp_path / "x", "holdout", images=1)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b"[1]", "TypeError"),
        (b'{"prompt": "a"}', "KeyError: 'answer'"),
        (b'{"prompt": 1, "answer": "b", "image_files": []}', "prompt is no string"),
        (b'{"prompt": "a", "answer": null, "image_files": []}', "answer is no string"),
        (b'{"prompt": "a", "answer": "b", "image_files": "a.png"}', "image_files is no list of strings"),
        (b'{"prompt": "a", "answer": "b", "image_files": [1]}', "image_files is no list of strings"),
        (b'{"prompt": "a", "answer": "b", "image_files": [], "choices": Infinity}', "OverflowError"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, said):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    with pytest.raises(EosError, match=f"line 2 is no row.*{said}"):
        read_rows(file)


@pytest.mark.parametrize(
    "boxes",
    [
        *(None, 4, {"a": 1}, [[1, 2, 3]], [[1, 2, 3, 4, 5]], [[1, 2, 3, "4"]], [[0, 0, True, 4]], ["abcd"]),
        *([[3, 0, 3, 4]], [[4, 0, 3, 4]], [[0, 4, 4, 4]], [[0, 5, 4, 4]], [[0, 0, float("inf"), 4]]),
        [[float("nan"), 0, 4, 4]],
    ],
)
def test_boxes_that_are_none_are_refused(tmp_path, boxes):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW | {"boxes": boxes}) + "\n")
    with pytest.raises(EosError, match=r"line 1 is no row.*boxes is no list of"):
        read_rows(file)


def test_only_line_feeds_part_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [ROW | {"prompt": "a\u2028b\u0085c"}, ROW | {"boxes": [[0, 0.5, 4, 4]]}]
    file.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    first, second = read_rows(file)
    assert first.prompt == "a\u2028b\u0085c"
    assert (second.id, second.boxes) == ("2", ((0, 0.5, 4, 4),))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(EosError, match="cannot be read"):
            read_rows(path)


def test_the_command_writes_and_refuses(tmp_path, capsys):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        assert main(["cluttervqa", str(tmp_path / "x"), "--images", "2", "--processes", "1"]) == 0
    assert not [str(w.message) for w in warned if "test.jsonl" in str(w.message)]
    assert "2 images and" in capsys.readouterr().out
    assert main(["cluttervqa", str(tmp_path / "y"), "--images", "0"]) == 2
    assert main(["cluttervqa", str(tmp_path / "z"), "--split", "holdout"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "--images=0" in errors[0]
    assert "split='holdout'" in errors[1]
