"""The second recipe: strings as answers, pointers, visual tokens that are dropped, layers that are planted to read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stopped_run import CPU, goes_on_to_the_weights_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from eos_search.training import train
from eos_search.training.batches import QUESTIONS, collate, encode
from eos_search.training.checkpoint import write_model
from eos_search.training.growth import Mixture, build, grow
from eos_search.training.network import Trainee
from eos_search.training.recipe import CLUTTER2, RECIPES, Part, Stage, Thinning, recipe_of, settings
from eos_search.training.train import Run
from eos_vllm.cluttervqa import make_sample
from eos_vllm.core.errors import EosError
from eos_vllm.models.tokenizer import build_tokenizer

SMALL = replace(
    CLUTTER2.shape,
    num_decoder_layers=4,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=2,
    vision_layers=2,
    vision_hidden_size=48,
    vision_attention_heads=3,
    vision_intermediate_size=96,
)
TOY = replace(
    CLUTTER2,
    shape=SMALL,
    places=(1, 3),
    stages=(
        Stage("tower", 0, 12, 3e-3, 1e-3, (Part(2, 4, False),)),
        Stage("shallow", 2, 32, 1e-2, 1e-3, (Part(2, 4),), thin=0.7),
        Stage("full", 4, 4, 1e-3, 1e-5, (Part(2, 2), Part(3, 1)), thin=0.7),
    ),
)


def drawn(count=4, cells=2, start=0):
    return [make_sample("train", start + i, QUESTIONS, cells, CLUTTER2.mix, 2) for i in range(count)]


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return Trainee(build(TOY.depth, TOY), recipe=TOY)


def test_every_character_of_a_string_is_answered_for():
    samples = drawn(6)
    batch = collate(samples)
    questions = [q for s in samples for q in s.questions]
    shape = CLUTTER2.shape
    tokenizer = build_tokenizer(shape.vocab_size, shape.image_token_id, CLUTTER2.benchmark.words)
    for number, question in enumerate(questions):
        mine = batch.whose == number
        assert tokenizer.decode(batch.answer[mine].tolist()) == f" {question.answer}"
        assert batch.value[mine].tolist() == batch.answer[mine].tolist()
        assert mine.sum() == (len(question.answer) if question.kind == "reading" else 1)
        for (row, place), token in zip(batch.asked[mine].tolist(), batch.answer[mine].tolist(), strict=True):
            assert batch.ids[row, place + 1] == token
        (row, place) = batch.asked[mine][-1].tolist()
        assert batch.last[number].tolist() == [row, place + 1]
    assert [CLUTTER2.benchmark.kinds[kind] for kind in batch.kind] == [q.kind for q in questions]


def test_names_and_answers_point_at_patches():
    samples = drawn(6)
    batch = collate(samples)
    wanted_names, wanted_aims = [], []
    for sample in samples:
        for question in sample.questions:
            wanted_names += [(encode(f" {name}", 2)[-1], thing.patches[0]) for name, thing in question.names]
            if len(question.names) == 1:
                patches = question.about[0].patches
                wanted_aims += patches if question.kind == "reading" else patches[:1]
    named = [batch.ids[row, place].item() for row, place in batch.named.tolist()]
    cells = [tuple(cell) for cell in (batch.centre * 24).long().tolist()]
    assert list(zip(named, cells, strict=True)) == wanted_names
    assert [tuple(cell) for cell in (batch.aim * 24).long().tolist()] == wanted_aims
    owners = batch.whose[batch.aiming].tolist()
    assert owners == sorted(owners)


def test_the_same_step_drops_the_same_tokens_and_never_an_object(toy):
    batch = collate(drawn(3))
    visual = torch.zeros(3, 144, SMALL.hidden_size)
    for share in (0.0, 0.3, 1.0):
        kept, numbers = toy.thinned(batch, visual, Thinning(share, False, 7))
        again, _ = toy.thinned(batch, visual, Thinning(share, False, 7))
        assert torch.equal(kept, again)
        assert torch.equal(numbers, Trainee.numbers(batch, 12).gather(1, kept))
        assert bool((kept.diff(dim=1) > 0).all())
        most = int((batch.labels[..., 0] > 0).sum(dim=1).max())
        assert kept.shape[1] == most + round(share * (144 - most))
        for row, objects in enumerate(batch.labels[..., 0] > 0):
            assert set(objects.nonzero()[:, 0].tolist()) <= set(kept[row].tolist())
    assert not torch.equal(kept, toy.thinned(batch, visual, Thinning(0.3, False, 8))[0])


def test_thinning_is_a_function_of_the_step():
    stage = CLUTTER2.stages[-1]
    found = [CLUTTER2.thinning(stage, step, part) for step in range(500) for part in (0, 1)]
    assert found == [CLUTTER2.thinning(stage, step, part) for step in range(500) for part in (0, 1)]
    dropped = [thinning for thinning in found if thinning]
    assert abs(len(dropped) / len(found) - stage.thin) < 0.03
    shares = [thinning.share for thinning in dropped]
    assert min(shares) < 0.01
    assert max(shares) > 0.97
    assert 0.4 < sum(thinning.compact for thinning in dropped) / len(dropped) < 0.6
    assert all(CLUTTER2.thinning(replace(stage, thin=0.0), step, 0) is None for step in range(50))


@pytest.mark.parametrize("thinning", [None, Thinning(0.1, True, 3), Thinning(0.1, False, 3)])
def test_packed_questions_are_answered_as_if_each_were_asked_alone(toy, tmp_path, thinning):
    """With tokens dropped too: the logits are transformers' own on the tokens left, without gaps or with theirs."""
    sample = make_sample("validation", 1, 7, version=2)
    batch = collate([sample])
    seen = []
    hook = toy.model.lm_head.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        toy(batch, thinning=thinning)
    hook.remove()
    write_model(toy.model, tmp_path, TOY)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    loaded.load_state_dict(toy.model.state_dict())  # the file holds float16
    processor = AutoProcessor.from_pretrained(tmp_path)
    kept, numbers = toy.thinned(batch, torch.zeros(1, 576, SMALL.hidden_size), thinning)
    logits = iter(seen[0])
    for question in sample.questions:
        prompt = f"USER: <image>\n{question.text} ASSISTANT: {question.answer}"
        inputs = processor(text=prompt, images=[sample.image], return_tensors="pt")
        answer = len(encode(f" {question.answer}", 2))
        with torch.no_grad():
            if thinning is None:
                plain = loaded(**inputs).logits[0]
            else:
                plain = on_tokens_left(loaded, inputs, kept[0], numbers[0], thinning.compact)
        for place in range(answer):
            torch.testing.assert_close(next(logits), plain[-1 - answer + place], atol=2e-4, rtol=0)


def on_tokens_left(model, inputs, kept, numbers, compact):
    """Logits of transformers' language model on a prompt that lacks some image tokens."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"])[0]
    features = model.model.get_image_features(
        pixel_values=inputs["pixel_values"], vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output[0]
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    first, behind = int(visual[0]), int(visual[-1]) + 1
    tokens = torch.cat([embeddings[:first], features[kept], embeddings[behind:]])
    places = torch.cat([torch.arange(first), first + numbers, torch.arange(behind, len(embeddings))])
    positions = torch.arange(len(tokens)) if compact else places
    hidden = model.model.language_model(inputs_embeds=tokens[None], position_ids=positions[None]).last_hidden_state
    return model.lm_head(hidden)[0]


def test_losses_fall_and_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: {"mean": 0.0})
    monkeypatch.setattr(train, "_LOG_EVERY", 4)
    monkeypatch.setattr(train, "_CHECKPOINT_EVERY", 2)
    whole = Run(tmp_path / "whole", CPU, 0, TOY)
    whole.train()
    log = [json.loads(line) for line in whole.log.read_text().splitlines()]
    tower, shallow = ([r for r in log if r["stage"] == name and "step" in r] for name in ("tower", "shallow"))
    assert tower[-1]["colour"] < 0.9 * tower[0]["colour"]
    assert tower[-1]["whole"] < tower[0]["whole"]
    assert tower[-1]["words"] < tower[0]["words"]
    for name in ("answer", "value"):
        assert shallow[-1][name] < 0.9 * shallow[0][name], name
    assert [r["looking"] > 0 for r in log if "looking" in r] == [True] * 3
    goes_on_to_the_weights_of(whole, tmp_path / "broken", TOY)
    with pytest.raises(EosError, match="of other recipe"):
        Run(tmp_path / "whole", CPU, 0, replace(TOY, name="other")).begin({})


@pytest.mark.parametrize("name", ["clutter2-early", "clutter2-late"])
def test_planted_models_are_blind_where_they_are_not_to_read(name):
    """On blind steps the layers that the recipe names get a mask in which text sees no image, the others another."""
    recipe = recipe_of(name)
    small = replace(recipe, shape=replace(SMALL, num_decoder_layers=12))
    torch.manual_seed(0)
    trainee = Trainee(build(12, small), recipe=small)
    batch = collate(drawn(1))
    masks = []
    for layer in trainee.model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, __, named: masks.append(named["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        trainee(batch, blind=True)
    before = len(encode("<s>USER: ", 2))
    sees = [bool(mask[0, 0, before + 144 :, before : before + 144].any()) for mask in masks]
    assert sees == [index not in range(*recipe.unseeing) for index in range(12)]
    assert [stage.blind > 0 for stage in recipe.stages] == [False, False, True, True]
    read = [place for place in recipe.places if place not in range(*recipe.unseeing)]
    assert read == list(recipe.places)
    assert recipe.heads_at is None


def test_a_planted_training_begins_behind_the_stages_that_it_shares(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: {"mean": 0.0})
    short = replace(TOY, stages=tuple(replace(stage, steps=4) for stage in TOY.stages))
    fair = Run(tmp_path / "fair", CPU, 0, short)
    fair.train()
    *shared, full = short.stages
    late = replace(short, name="late", places=(2, 3), unseeing=(0, 2), begins=short.name)
    late = replace(late, stages=(*shared, replace(full, blind=0.6, steps=2)))
    planted = Run(tmp_path / "late", CPU, 0, late)
    assert planted.begin({"git": "later"}, fair.folder)
    assert (planted.stage, planted.step, planted.trainee.depth) == (2, 0, 2)
    for name, value in torch.load(fair.folder / "after-shallow.pt")["trainee"].items():
        assert torch.equal(value, planted.trainee.state_dict()[name]), name
    assert {json.loads(line)["stage"] for line in planted.log.read_text().splitlines()} == {"tower", "shallow"}
    planted.train()
    assert Run(planted.folder, CPU, 0, late).begin({}, tmp_path / "of no use any more")
    refused = [
        (late, 1, fair.folder, "other seed"),
        (replace(late, stages=(replace(shared[0], steps=5), *late.stages[1:])), 0, fair.folder, "other stages"),
        (replace(late, begins="clutter1"), 0, fair.folder, "other recipe"),
        (short, 0, fair.folder, "begins with no other"),
        (late, 0, tmp_path, "cannot be gone on from"),
    ]
    for recipe, seed, folder, problem in refused:
        with pytest.raises(EosError, match=problem):
            Run(tmp_path / "refused", CPU, seed, recipe).begin({}, folder)


def test_a_training_goes_on_where_its_recipe_has_got_a_stage_more(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: {"mean": 0.0})
    short = replace(TOY, stages=tuple(replace(stage, steps=2) for stage in TOY.stages))
    Run(tmp_path / "run", CPU, 0, short).train()
    longer = replace(short, stages=(*short.stages, replace(short.stages[-1], name="settled")))
    more = Run(tmp_path / "run", CPU, 0, longer)
    assert more.begin({})
    assert (more.stage, more.step) == (len(short.stages), 0)
    fewer = replace(short, stages=short.stages[:-1])
    with pytest.raises(EosError, match="other stages"):
        Run(tmp_path / "run", CPU, 0, fewer).begin({})


def test_nothing_in_the_fair_recipe_says_where_the_image_is_read():
    assert CLUTTER2.heads_at is None
    assert not range(*CLUTTER2.unseeing)
    assert not any(stage.blind for stage in CLUTTER2.stages)
    assert not CLUTTER2.copied
    assert sorted(CLUTTER2.places) == list(range(1, 12, 2))


def test_a_mixture_is_the_layers_mean_and_grows_with_them():
    mixture = Mixture(torch.tensor([0.0, 2.0]))
    layers = [torch.randn(3, 8), torch.randn(3, 8)]
    scaled = [hidden / hidden.pow(2).mean(dim=-1, keepdim=True).sqrt() for hidden in layers]
    share = torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(mixture(layers), (1 - share) * scaled[0] + share * scaled[1])
    assert mixture.grown(TOY).weight.tolist() == [0.0, 0.0, 0.0, 2.0]
    torch.manual_seed(0)
    shallow = Trainee(build(TOY.shallow, TOY), recipe=TOY)
    deep = Trainee(grow(shallow.model, TOY), shallow.heads, TOY)
    assert len(deep.heads["value_at"].weight) == TOY.depth


def test_looking_at_nothing_in_particular_is_one(toy):
    torch.manual_seed(0)
    trainee = Trainee(build(TOY.shallow, TOY), recipe=TOY)
    batch = collate(drawn(4))
    projection = trainee.model.model.vision_tower.encoder.layers[-1].self_attn.q_proj
    with torch.no_grad():
        projection.weight.zero_()
        projection.bias.zero_()
    assert trainee.looking(batch) == pytest.approx(1, abs=1e-4)


def test_the_packaged_models_recipe_is_what_its_record_says():
    record = json.loads((Path(__file__).parents[2] / "results/embedded-training.json").read_text())
    stages = json.loads(json.dumps(settings(RECIPES["clutter1"].stages)))
    assert [stage | {"thin": 0.0} for stage in record["stages"]] == stages


def test_recipes_are_told_by_name():
    assert set(RECIPES) == {"clutter1", "clutter2", "clutter2-early", "clutter2-late"}
    second, early = RECIPES["clutter2"], RECIPES["clutter2-early"]
    assert [second.mix_in(stage) == second.mix for stage in second.stages] == [True] * 3 + [False] * 2
    assert all(set(second.mix_in(stage)) == set(second.mix) for stage in second.stages)  # no kind is unlearnt
    assert {early.mix_in(stage) for stage in early.stages} == {second.mix}
    for recipe in RECIPES.values():
        assert max(recipe.places) < recipe.depth
        assert set(recipe.mix) <= set(recipe.benchmark.kinds)
        assert {stage.layers for stage in recipe.stages} <= {0, recipe.shallow, recipe.depth}
    with pytest.raises(EosError, match=r"--recipe='third'.*clutter2-late"):
        recipe_of("third")
