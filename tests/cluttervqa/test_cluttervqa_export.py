"""Export and reading back: the format that load tests and vLLM's own benchmark take."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eos_vllm.cli.main import main
from eos_vllm.cluttervqa import export, make_sample, read_rows
from eos_vllm.core.errors import EosError


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


def test_an_export_is_never_mixed_with_another(tmp_path):
    export(tmp_path, images=1)
    with pytest.raises(EosError, match="holds an export already"):
        export(tmp_path, images=1)


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "line 2 is no row"), ('{"prompt": "a"}', "KeyError: 'answer'"), ("[1]", "line 2 is no row")],
)
def test_bad_rows_are_named(tmp_path, line, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "b", "image_files": []}) + "\n" + line + "\n")
    with pytest.raises(EosError, match=said):
        read_rows(file)


def test_the_command_writes_and_refuses(tmp_path, capsys):
    assert main(["cluttervqa", str(tmp_path / "x"), "--images", "2", "--processes", "1"]) == 0
    assert "2 images and" in capsys.readouterr().out
    assert main(["cluttervqa", str(tmp_path / "y"), "--images", "0"]) == 2
    assert main(["cluttervqa", str(tmp_path / "z"), "--split", "holdout"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "--images=0" in errors[0]
    assert "split='holdout'" in errors[1]
