"""Evaluations end to end on a small model: reference against server-less engine, raw results, tables and figures."""

import json

import pytest

from eos_search.answerers import Case, ReferenceAnswerer, blind_images, chat_prompt
from eos_search.evaluate_command import add_parser, differences, limit, run
from eos_search.evaluation import cases, evaluate, read_result, table
from eos_vllm.cluttervqa import export, read_rows
from eos_vllm.core.errors import EosError


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_rows(export(tmp_path_factory.mktemp("rows") / "x", images=3, questions=3))


@pytest.fixture(scope="module")
def answerer(tiny_model):
    found = ReferenceAnswerer(tiny_model, max_tokens=3, processes=1)
    yield found
    found.close()


def arguments(*given):
    import argparse

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["evaluate", *given])


def test_keeping_all_is_stock_and_selections_choose_otherwise(answerer, rows):
    wanted = cases(["none", "embedded-fastv", "random@embedded-fastv", "oracle@embedded-fastv", "blind"], [576, 8])
    records = {
        (r["profile"], r["budget"]): r["replies"] for r in evaluate(answerer, rows, wanted, lambda _: lambda n: None)
    }
    stock = records["none", None]
    assert len(stock) == len(rows)
    for name in ("embedded-fastv", "random@embedded-fastv", "oracle@embedded-fastv"):
        assert records[name, 576] == stock
        assert records[name, 8] != stock
    assert records["random@embedded-fastv", 8] != records["oracle@embedded-fastv", 8]
    assert records["blind", None] != stock


def test_replies_are_the_references_own(answerer, rows, tiny_model):
    from PIL import Image

    from eos_search.reference import ReferenceModel
    from eos_vllm import profiles

    profile = profiles.load("embedded-eos")
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile)
    (record,) = evaluate(answerer, rows, cases(["embedded-eos"], [32]), lambda _: lambda n: None)
    for row, reply in zip(rows, record["replies"], strict=True):
        prompt = chat_prompt(reference.processor, row.prompt, 1)
        assert prompt == f"USER: <image>\n{row.prompt} ASSISTANT:"
        ids = reference.generate(prompt, [Image.open(row.image_files[0])], 3, 32).token_ids
        assert reply == reference.processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stopped_evaluation_goes_on_from_its_file(tmp_path, tiny_model, capsys):
    out = tmp_path / "result.json"
    common = ["--model", str(tiny_model), "--images", "2", "--max-tokens", "2", "--processes", "1", "--out", str(out)]
    assert run(arguments("--profiles", "none", *common)) == 0
    first = json.loads(out.read_text())
    first["cases"][0]["replies"][0] = "kept from before"
    out.write_text(json.dumps(first))
    assert run(arguments("--profiles", "none,embedded-pool", "--budgets", "16", *common)) == 0
    second = read_result(out)
    assert second["cases"][0]["replies"][0] == "kept from before"
    assert [c["profile"] for c in second["cases"]] == ["none", "embedded-pool"]
    assert second["cases"][1]["kept"][-1] == 16
    assert set(second["cases"][1]["loyalty"]) == set(second["cases"][1]["accuracy"])
    assert "| embedded-pool |" in table(second)
    assert differences(second, "none").count("\n") == 1
    common[3] = "3"
    with pytest.raises(EosError, match="another fingerprint"):
        run(arguments("--profiles", "none", *common))
    assert run(arguments("--table", str(out), "--figure", str(tmp_path / "a.png"))) == 0
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert "| average |" in capsys.readouterr().out


def test_blind_rows_see_another_image(rows):
    shown = blind_images(rows)
    assert all(row.image_files != other for row, other in zip(rows, shown, strict=True))
    assert sorted(shown) == sorted(row.image_files for row in rows)
    with pytest.raises(EosError, match="fewer than two images"):
        blind_images([row for row in rows if row.image_files == rows[0].image_files])


def test_at_most_so_many_of_each_kind(rows):
    kept = limit(rows, 1)
    assert len({row.kind for row in kept}) == len(kept)
    assert limit(rows, None) == rows


def test_mistakes_are_named(tmp_path, answerer):
    with pytest.raises(EosError, match="neither a file nor a shipped profile"):
        cases(["no-such"], [16])
    with pytest.raises(EosError, match="names no selection"):
        cases(["best@embedded-pool"], [16])
    with pytest.raises(EosError, match="eos_retain=0"):
        cases(["embedded-pool"], [0])
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(EosError, match="is no evaluation"):
        read_result(tmp_path / "x.json")
    with pytest.raises(EosError, match="rows='nothing"):
        run(arguments("--rows", "nothing.jsonl"))
    assert Case("none", None, None).selection is None
