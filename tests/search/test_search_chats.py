"""Chats in evaluations: earlier turns in the prompt, whose question chooses the tokens, and scorers in raw results."""

import argparse
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from eos_search.accuracy_page import margins_table
from eos_search.answerers import ReferenceAnswerer
from eos_search.chats import chat_prompt, marker_of
from eos_search.evaluate_command import add_parser, check_rows, run
from eos_search.evaluation import cases, evaluate, table
from eos_search.raw import read_result
from eos_search.reference import ReferenceModel
from eos_search.selection import asked_within
from eos_search.server_answerer import ServerAnswerer
from eos_vllm import profiles
from eos_vllm.cluttervqa import read_rows
from eos_vllm.core.errors import EosError, ProfileError
from eos_vllm.core.windows import generation_marker
from eos_vllm.models.images import sample_image

PROFILE = "embedded-fastv"
QUESTIONS = ("What is it?", "Which colour is the square?", "How many circles are there?")
BUDGET = 8


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two chats of three turns about an image each, their turns mixed, and a lone question."""
    folder = tmp_path_factory.mktemp("rows")
    for i in range(2):
        sample_image(i).save(folder / f"{i}.png")
    lines = [
        {"prompt": question, "answers": [f"{question[:3]} {i}"] * 10, "image_files": [f"{i}.png"], "chat": i}
        for question in QUESTIONS
        for i in range(2)
    ]
    lines.append({"prompt": "Is it red?", "answers": ["no"] * 10, "image_files": ["0.png"], "kind": "alone"})
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def answerer(tiny_model):
    found = ReferenceAnswerer(tiny_model, max_tokens=3, processes=1)
    yield found
    found.close()


def told(_):
    return lambda n: None


def arguments(*given):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["evaluate", *given])


def test_turns_stand_behind_earlier_ones_of_their_chat(file):
    rows = read_rows(file)
    assert [row.kind for row in rows] == ["turn 1"] * 2 + ["turn 2"] * 2 + ["turn 3"] * 2 + ["alone"]
    assert rows[0].history == rows[6].history == ()
    assert rows[5].history == ((QUESTIONS[0], "Wha 1"), (QUESTIONS[1], "Whi 1"))


def test_whose_question_chooses_the_tokens_of_later_turns(file, tiny_model, answerer):
    """``turn@`` keeps in every turn what the first question alone keeps, ``prompt@`` what the whole chat does."""
    rows = read_rows(file)
    names = [f"turn@{PROFILE}", f"prompt@{PROFILE}", f"image@{PROFILE}"]
    found = {r["profile"]: r["replies"] for r in evaluate(answerer, rows, cases(names, [BUDGET]), told)}
    references = {
        window: ReferenceModel.from_pretrained(str(tiny_model), asked_within(profiles.load(PROFILE), window))
        for window in ("turn", "prompt")
    }
    tokenizer = references["turn"].processor.tokenizer
    pinned, anew = [], []
    for i, row in enumerate(rows):
        picture = [Image.open(row.image_files[0])]
        states = {}
        for window, reference in references.items():
            first = row.history[0][0] if row.history and window == "turn" else row.prompt
            history = row.history if window == "prompt" else ()
            # No marker here: windows end with the prompt that is asked.
            embeddings, spans, _ = reference.embed(chat_prompt(reference.processor, first, 1, history), picture)
            chosen = reference.prefill(embeddings, spans, BUDGET)
            whole = chat_prompt(reference.processor, row.prompt, 1, row.history)
            embeddings, spans, _ = reference.embed(whole, picture)
            states[window] = reference.prefill(embeddings, spans, BUDGET, chosen.scores)
            end = spans[0].end
            assert [k[k < end].tolist() for k in states[window].kept] == [k[k < end].tolist() for k in chosen.kept]
            ids = reference.answer(states[window], len(embeddings), 3, tokenizer.eos_token_id).token_ids
            assert found[f"{window}@{PROFILE}"][i] == tokenizer.decode(ids, skip_special_tokens=True)
        pinned.append([k.tolist() for k in states["turn"].kept])
        anew.append([k.tolist() for k in states["prompt"].kept])
    firsts = [not row.history for row in rows]
    assert [a == b for a, b, first in zip(pinned, anew, firsts, strict=True) if first] == [True] * 3
    assert any(a != b for a, b in zip(pinned, anew, strict=True))
    assert len({tuple(found[name]) for name in names}) == 3


def test_the_first_turn_ends_behind_the_generation_prompt(tiny_model):
    processor = ReferenceModel.from_pretrained(str(tiny_model), None).processor
    marker = marker_of(processor)
    assert processor.tokenizer.decode(marker).strip() == "ASSISTANT:"
    chat = chat_prompt(processor, "And now?", 1, (("What is it?", "A cat"),))
    assert chat.startswith("USER: <image>\nWhat is it? ASSISTANT: A cat")
    assert chat.endswith("USER: And now? ASSISTANT:")


def test_templates_without_a_marker_are_refused():
    def letters(turns, prompt):
        return [*map(ord, "".join(turns))]

    with pytest.raises(ValueError, match="no fixed tokens"):
        generation_marker(letters)
    plain = SimpleNamespace(
        apply_chat_template=lambda chat, **_: "".join(m["content"][-1]["text"] for m in chat),
        tokenizer=lambda text, **_: SimpleNamespace(input_ids=[*map(ord, text)]),
    )
    plain.tokenizer.bos_token = None
    with pytest.raises(EosError, match=r"chat template.*evaluate prompt@ and image@"):
        marker_of(plain)


def test_a_server_is_asked_with_the_whole_chat(file, monkeypatch):
    import openai

    asked = []

    def create(*, messages, **_):
        asked.append(messages)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="yes"))])

    client = SimpleNamespace(
        models=SimpleNamespace(list=lambda: [SimpleNamespace(id="embedded")]),
        chat=SimpleNamespace(completions=SimpleNamespace(create=create)),
        close=lambda: None,
    )
    monkeypatch.setattr(openai, "OpenAI", lambda **_: client)
    rows = read_rows(file)
    ServerAnswerer("http://x/v1", "embedded", at_once=1).answer(rows, cases(["none"], []), lambda n: None)
    assert [message["role"] for message in asked[4]] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"][-1]["text"] for message in asked[4]][::2] == list(QUESTIONS)
    assert [len(message["content"]) for message in asked[4]] == [2, 1, 1, 1, 1]


def test_results_keep_their_scorer_and_never_take_another(file, tmp_path, tiny_model, capsys):
    out = tmp_path / "raw.json"
    common = ["--rows", str(file), "--model", str(tiny_model), "--max-tokens", "2", "--processes", "1"]
    given = [*common, "--profiles", f"none,turn@{PROFILE}", "--budgets", "8", "--out", str(out)]
    with pytest.raises(EosError, match=r"answer='chats.jsonl row 1': is missing.*--scorer vqa or anls"):
        run(arguments(*given))
    assert run(arguments(*given, "--scorer", "vqa")) == 0
    result = read_result(out)
    assert (result["scorer"], result["chance"]) == ("vqa", {})
    assert result["rows"][0]["answers"] == ["Wha 0"] * 10
    said = capsys.readouterr().out
    assert "| average, vqa | all | 8 |" in said
    assert "| turn 3, vqa | all | 8 |" in said
    result["cases"][0]["replies"] = [row["answers"][0] for row in result["rows"]]
    out.write_text(json.dumps(result))
    assert run(arguments(*given, "--scorer", "vqa")) == 0  # nothing is asked, and all is marked again
    assert read_result(out)["cases"][0]["accuracy"]["average"]["value"] == 1
    assert margins_table(read_result(out), f"turn@{PROFILE}").startswith("| minus, vqa | 8 |")
    with pytest.raises(EosError, match="another scorer"):
        run(arguments(*given, "--scorer", "anls"))
    with pytest.raises(EosError, match="is not that of the result, vqa"):
        run(arguments("--table", str(out), "--scorer", "anls"))
    page = tmp_path / "page.md"
    shown = ["--table", str(out), "--figure", str(tmp_path / "a.png"), "--page", str(page)]
    assert run(arguments(*shown)) == 0
    assert "mean score in percent by scorer `vqa`" in page.read_text()
    assert table(read_result(out)) in page.read_text()


def test_what_cannot_be_asked_of_chats_is_refused(file, answerer):
    rows = read_rows(file)
    with pytest.raises(EosError, match="hold no chat, and prompt@"):
        check_rows(rows[:2], cases([f"prompt@{PROFILE}"], [8]), "rows.jsonl")
    with pytest.raises(EosError, match="is a later turn of a chat; evaluate turn@"):
        check_rows(rows, cases([f"earlier@{PROFILE}"], [8]), "rows.jsonl")
    with pytest.raises(ProfileError, match="queries=image has no window"):
        cases(["turn@" + str(_image_profile(file))], [8])


def _image_profile(file):
    data = profiles.load(PROFILE).to_dict() | {"schema": "eos-profile/2"}
    data["importance"] = {"queries": "image"}
    path = file.parent / "image.json"
    path.write_text(json.dumps(data))
    return path
