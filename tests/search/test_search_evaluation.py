"""Evaluations end to end on a small model: reference against server-less engine, raw results, tables and figures."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from eos_search.accuracy_page import margins_table
from eos_search.answerers import ReferenceAnswerer, blind_images
from eos_search.chats import chat_prompt
from eos_search.evaluate_command import add_parser, check_rows, limit, run
from eos_search.evaluation import cases, describe, evaluate, table
from eos_search.main import main
from eos_search.raw import read_result
from eos_search.selection import rows_before
from eos_search.server_answerer import ServerAnswerer
from eos_vllm.cluttervqa import export, read_rows
from eos_vllm.core.budget import Share
from eos_vllm.core.errors import EosError
from eos_vllm.core.plan import rounded_count
from support.profiles import make_profile


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


def test_tokens_that_another_question_chose(answerer, rows, tiny_model):
    """``earlier@`` answers with the very tokens that the question in front keeps; rules blind to it change nothing."""
    from PIL import Image

    from eos_search.reference import ReferenceModel
    from eos_vllm import profiles

    names = ["embedded-eos", "earlier@embedded-eos", "image@embedded-eos", "rounded@embedded-eos"]
    wanted = [*cases(names, [40]), replace(cases(["image@embedded-eos"], [40])[0], name="both", selection="earlier")]
    found = {r["profile"]: r for r in evaluate(answerer, rows, wanted, lambda _: lambda n: None)}
    assert found["earlier@embedded-eos"]["replies"] != found["embedded-eos"]["replies"]
    assert found["both"]["replies"] == found["image@embedded-eos"]["replies"] != found["embedded-eos"]["replies"]
    assert found["rounded@embedded-eos"]["kept"] == [rounded_count(576, k, 32) for k in found["embedded-eos"]["kept"]]
    reference = ReferenceModel.from_pretrained(str(tiny_model), profiles.load("embedded-eos"))
    for i, before in enumerate(rows_before(rows)):
        assert before != i
        assert rows[before].image_files == rows[i].image_files
        picture = Image.open(rows[i].image_files[0])
        asked = [reference.embed(chat_prompt(reference.processor, rows[k].prompt, 1), [picture]) for k in (before, i)]
        first = reference.prefill(asked[0][0], asked[0][1], 40)
        pinned = reference.prefill(asked[1][0], asked[1][1], 40, first.scores)
        end = asked[0][1][0].end
        assert [k[k < end].tolist() for k in pinned.kept] == [k[k < end].tolist() for k in first.kept]
        ids = reference.answer(pinned, len(asked[1][0]), 3).token_ids
        assert found["earlier@embedded-eos"]["replies"][i] == reference.processor.tokenizer.decode(
            ids, skip_special_tokens=True
        )


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


def test_what_does_the_same_under_another_name_is_asked_once(answerer, rows):
    asked = []

    class Counting:
        def answer(self, rows, cases, progress):
            asked.extend((case.name, case.budget) for case in cases)
            return answerer.answer(rows, cases, progress)

    first, other = cases(["embedded-fastv", "random@embedded-fastv"], [8])
    wanted = [first, replace(first, name="again"), replace(other, name="random@again"), replace(first, budget=16)]
    records = evaluate(Counting(), rows, wanted, lambda _: lambda n: None)
    assert asked == [("embedded-fastv", 8), ("random@again", 8), ("embedded-fastv", 16)]
    replies = [record["replies"] for record in records]
    assert replies[0] == replies[1] != replies[2]
    assert [record["profile"] for record in records] == ["embedded-fastv", "again", "random@again", "embedded-fastv"]


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
    assert [line.split(" | ")[0] for line in margins_table(second, "embedded-pool").splitlines()[2:]] == ["| none"]
    for name in ("nothing", "none"):
        with pytest.raises(EosError, match=f"--against='{name}'"):
            run(arguments("--table", str(out), "--against", name))
    with pytest.raises(EosError, match="--against='nothing'"):
        run(arguments("--table", str(out), "--against", "nothing"))
    fresh = tmp_path / "fresh.json"
    common[-1] = str(fresh)
    with pytest.raises(EosError, match=r"--against=.nothing.: is not among .*; give one of embedded-pool"):
        run(arguments("--profiles", "none,embedded-pool", "--budgets", "16", "--against", "nothing", *common))
    assert not fresh.exists(), "it was refused before anything was asked"
    assert (
        run(arguments("--profiles", "none,embedded-pool", "--budgets", "own", "--against", "embedded-pool", *common))
        == 0
    )
    common[3], common[-1] = "3", str(out)
    with pytest.raises(EosError, match="another fingerprint"):
        run(arguments("--profiles", "none", *common))
    page = tmp_path / "docs" / "a.md"
    assert run(arguments("--table", str(out), "--figure", str(tmp_path / "a.png"), "--page", str(page))) == 0
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert "![accuracy against budget](a.png)" in page.read_text()
    assert table(second) in page.read_text()
    assert "minus the others" not in page.read_text()
    shown = ("--figure", str(tmp_path / "a.png"), "--page", str(page), "--against", "embedded-pool")
    assert run(arguments("--table", str(out), *shown)) == 0
    assert margins_table(second, "embedded-pool") in page.read_text()
    assert "| average, exact | all | 16 |" in capsys.readouterr().out


def test_blind_rows_see_another_image(rows):
    shown = blind_images(rows)
    assert all(row.image_files != other for row, other in zip(rows, shown, strict=True))
    assert sorted(shown) == sorted(row.image_files for row in rows)
    with pytest.raises(EosError, match="fewer than two images"):
        blind_images([row for row in rows if row.image_files == rows[0].image_files])


def test_at_most_so_many_of_each_kind(rows):
    kept = limit(rows, 1)
    assert {row.kind for row in kept} == {row.kind for row in rows}
    assert len({row.kind for row in kept}) == len(kept)
    assert limit(rows, None) == rows


def test_mistakes_are_named(tmp_path, answerer):
    with pytest.raises(EosError, match="neither a file nor a shipped profile"):
        cases(["no-such"], [16])
    with pytest.raises(EosError, match="changes nothing known"):
        cases(["best@embedded-pool"], [16])
    with pytest.raises(EosError, match="eos_retain=0"):
        cases(["embedded-pool"], [0])
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(EosError, match="is no evaluation"):
        read_result(tmp_path / "x.json")
    with pytest.raises(EosError, match="rows='nothing"):
        run(arguments("--rows", "nothing.jsonl"))
    with pytest.raises(EosError, match="--per-kind=0"):
        run(arguments("--per-kind", "0"))
    with pytest.raises(EosError, match="--model='nowhere'"):
        run(arguments("--model", "nowhere"))
    with pytest.raises(EosError, match="--budgets='64,100%': 100% reduces nothing"):
        run(arguments("--profiles", "embedded-pool", "--budgets", "64,100%"))
    with pytest.raises(EosError, match="--page"):
        run(arguments("--page", "page.md"))


def test_a_profile_that_does_something_else_is_asked_again(answerer, rows):
    def told(_):
        return lambda n: None

    (record,) = evaluate(answerer, rows, cases(["embedded-pool"], [8]), told)
    marked = record | {"replies": ["from before"] * len(rows)}
    (same,) = evaluate(answerer, rows, cases(["embedded-pool"], [8]), told, [marked])
    assert same["replies"] == marked["replies"]
    (other,) = evaluate(answerer, rows, cases(["embedded-pool"], [8]), told, [marked | {"does": "something else"}])
    assert other["replies"] == record["replies"]


def test_two_profiles_of_one_name_are_refused(tmp_path):
    for folder, discard in (("a", 0.5), ("b", 0.6)):
        (tmp_path / folder).mkdir()
        data = make_profile(operator_values={"discard": discard}).to_dict()
        (tmp_path / folder / "theta.json").write_text(json.dumps(data))
    with pytest.raises(EosError, match="is the name of two profiles"):
        cases([str(tmp_path / "a/theta.json"), str(tmp_path / "b/theta.json")], [16])
    assert len(cases([str(tmp_path / "a/theta.json")], [16, 16])) == 1


def test_rows_that_cannot_be_asked_are_refused_before_any_is(rows):
    oracle = cases(["oracle@embedded-fastv"], [16])
    check_rows(rows, oracle, "rows.jsonl")
    with pytest.raises(EosError, match="boxes='test-"):
        check_rows([replace(rows[0], boxes=())], oracle, "rows.jsonl")
    with pytest.raises(EosError, match="has 2 images"):
        check_rows([replace(rows[0], image_files=rows[0].image_files * 2)], oracle, "rows.jsonl")
    with pytest.raises(EosError, match="is the only one about its image"):
        check_rows(rows[:1], cases(["earlier@embedded-fastv"], [16]), "rows.jsonl")
    with pytest.raises(EosError, match="is missing"):
        check_rows([replace(rows[0], image_files=(Path("gone.png"),))], cases(["none"], [16]), "rows.jsonl")


def test_an_image_that_cannot_be_read_is_one_line(answerer, rows, tmp_path):
    (tmp_path / "cut.png").write_bytes(rows[0].image_files[0].read_bytes()[:200])
    spoilt = [replace(rows[0], image_files=(tmp_path / "cut.png",))]
    with pytest.raises(EosError, match=r"image_files='cut.png': it cannot be read"):
        answerer.answer(spoilt, cases(["none"], [None]), int)
    assert answerer.answer(rows[:1], cases(["none"], [None]), int)


def test_a_model_that_is_not_whole_is_one_line(rows, tmp_path):
    whole = ReferenceAnswerer(tmp_path, processes=1)
    try:
        with pytest.raises(EosError, match="a process that answers has ended"):
            whole.answer(rows[:1], cases(["none"], [None]), int)
    finally:
        whole.close()


class FakeServer:
    """Chat completions that say which budget they were asked for, or fail."""

    def __init__(self, monkeypatch, model="embedded"):
        import openai

        self.failing, self.asked = False, []
        outer = self

        class Client:
            def __init__(self, **_):
                self.models = SimpleNamespace(list=lambda: [SimpleNamespace(id=model)])
                self.chat = SimpleNamespace(completions=SimpleNamespace(create=outer.create))

            def close(self):
                pass

        monkeypatch.setattr(openai, "OpenAI", Client)

    def create(self, *, messages, extra_body, **_):
        import openai

        if self.failing:
            raise openai.OpenAIError("connection refused")
        text = messages[0]["content"][-1]["text"]
        self.asked.append((text, extra_body.get("vllm_xargs", {}).get("eos_retain")))
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=f"{text}/{len(text)}"))])


def test_a_server_is_asked_in_order_with_each_budget(rows, monkeypatch):
    server = FakeServer(monkeypatch)
    found = ServerAnswerer("http://x/v1", "embedded", unreduced=576)
    wanted = cases(["embedded-pool"], [64, 16])
    replies = found.answer(rows, wanted, lambda n: None)
    assert replies == [[f"{row.prompt}/{len(row.prompt)}" for row in rows]] * 2
    assert sorted(budget for _, budget in server.asked) == [16] * len(rows) + [64] * len(rows)
    server.asked.clear()
    # Unreduced answers of a server with a profile ask for all tokens.
    found.answer(rows, cases(["none"], []), lambda n: None)
    assert {budget for _, budget in server.asked} == {576}
    server.failing = True
    with pytest.raises(EosError, match="connection refused"):
        found.answer(rows, wanted, lambda n: None)
    for name in ("random@embedded-pool", "prune@embedded-pool"):
        with pytest.raises(EosError, match="is not served"):
            found.answer(rows, cases([name], [16]), lambda n: None)
    with pytest.raises(EosError, match="name one of embedded"):
        ServerAnswerer("http://x/v1", "another")


def test_images_of_any_size_are_a_servers_alone(rows, monkeypatch):
    server = FakeServer(monkeypatch)
    wanted = cases(["fastv-qwen2.5-vl-7b"], [Share(0.25), None])
    assert describe(wanted[0])["budget"] == 0.25
    assert all((describe(case)["kept"], describe(case)["layer_average"]) == ([], None) for case in wanted)
    found = ServerAnswerer("http://x/v1", "embedded", unreduced="100%")
    found.answer(rows, wanted, lambda n: None)
    found.answer(rows, cases(["none"], []), lambda n: None)
    assert {budget for _, budget in server.asked} == {0.25, None, "100%"}
    with pytest.raises(EosError, match="evaluate a server that has it"):
        run(arguments("--profiles", "fastv-qwen2.5-vl-7b", "--images", "1", "--budgets", "own"))


def test_a_server_has_one_profile(monkeypatch):
    FakeServer(monkeypatch)
    with pytest.raises(EosError, match="a server has one profile"):
        run(arguments("--base-url", "http://x/v1", "--profiles", "embedded-pool,embedded-fastv", "--images", "1"))


def test_images_from_the_middle_of_a_split_are_those_of_the_whole(tmp_path):
    whole = read_rows(export(tmp_path / "whole", "validation", 3))
    later = read_rows(export(tmp_path / "later", "validation", 1, start=2))
    assert [row.id for row in later] == [row.id for row in whole if "000002" in row.id]
    assert later[0].image_files[0].read_bytes() == (tmp_path / "whole/images/000002.png").read_bytes()
    for flags in (["--first-image", "-1"], ["--first-image", "1", "--rows", "x.jsonl"]):
        assert main(["evaluate", "--profiles", "none", *flags]) == 2
