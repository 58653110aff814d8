"""The training forward pass against transformers' own, and growth in depth."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from eos_search.training.batches import QUESTIONS, collate
from eos_search.training.checkpoint import published_name, write_model
from eos_search.training.growth import build, grow
from eos_search.training.masks import attention_masks
from eos_search.training.network import Trainee
from eos_search.training.recipe import CLUTTER1
from eos_search.training.train import validate
from eos_vllm.cluttervqa import KINDS, make_sample
from eos_vllm.models import embedded
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.tiny import tensor_shapes

DEPTH, PLACES, SHALLOW = CLUTTER1.depth, CLUTTER1.places, CLUTTER1.shallow


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(DEPTH)


def test_packed_questions_are_answered_as_if_each_were_asked_alone(model, tmp_path):
    """The training forward on whole frames gives the logits of transformers on the prompt that a chat would give."""
    samples = [make_sample("validation", i, 6) for i in range(2)]
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        Trainee(model)(collate(samples))
    hook.remove()
    write_model(model, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    loaded.load_state_dict(model.state_dict())  # the file holds float16
    processor = AutoProcessor.from_pretrained(tmp_path)
    logits = iter(seen[0])
    for sample in samples:
        for question in sample.questions:
            prompt = f"USER: <image>\n{question.text} ASSISTANT:"
            inputs = processor(text=prompt, images=[sample.image], return_tensors="pt")
            with torch.no_grad():
                plain = loaded(**inputs).logits[0, -1]
            torch.testing.assert_close(next(logits), plain, atol=1e-4, rtol=0)


def test_nothing_named_means_no_loss_on_centres(model):
    batch = collate([make_sample("train", i, 2, 2, ("counting",)) for i in range(2)])
    losses, _ = Trainee(model)(batch)
    assert set(losses) == {"colour", "kind", "middle", "place", "value", "answer", "end"}
    assert all(loss.isfinite() for loss in losses.values())


def test_validation_counts_right_answers_on_whole_frames_by_kind(model):
    trained = AutoModelForImageTextToText.from_pretrained(embedded.path(), dtype=torch.float32)
    samples = [make_sample("validation", i, QUESTIONS) for i in range(2)]
    with torch.no_grad():
        right = Trainee(trained)(collate(samples))[1].tolist()
    found = validate(Trainee(trained), torch.device("cpu"), images=2)
    kinds = [question.kind for sample in samples for question in sample.questions]
    for kind in KINDS:
        mine = [hit for hit, asked in zip(right, kinds, strict=True) if asked == kind]
        assert found.pop(kind) == pytest.approx(sum(mine) / len(mine), abs=1e-4)
    assert set(found) == {"mean"}
    assert found["mean"] > 0.85
    assert validate(Trainee(model), torch.device("cpu"), images=2)["mean"] < 0.5


def test_blind_text_does_not_see_the_image_in_the_first_layers():
    segment = torch.tensor([[0, 0, 1, -1]])
    early, late = attention_masks(segment, before=1, visual=2, blind=True)
    assert not early[0, 0, 3:, 1:3].any()
    assert early[0, 0, 3:, 0].all()
    assert late[0, 0, 3:, :3].all()
    assert late[0, 0, 4, 3]
    assert not late[0, 0, 5, 3:5].any()
    assert torch.equal(early[0, 0, :3], late[0, 0, :3])


def test_growing_keeps_the_old_layers_and_adds_layers_that_pass_on():
    torch.manual_seed(0)
    shallow = build(SHALLOW)
    deep = grow(shallow)
    old, new = shallow.model.language_model.layers, deep.model.language_model.layers
    for i, place in enumerate(PLACES):
        for name, value in old[i].state_dict().items():
            assert torch.equal(new[place].state_dict()[name], value)
    hidden = torch.randn(1, 5, SHAPE.hidden_size)
    rotary = deep.model.language_model.rotary_emb(hidden, torch.arange(5)[None])
    for place in set(range(DEPTH)) - set(PLACES):
        assert torch.equal(new[place](hidden, position_embeddings=rotary), hidden)
    assert torch.equal(new[2].self_attn.q_proj.weight, new[3].self_attn.q_proj.weight)
    assert torch.equal(
        deep.model.vision_tower.embeddings.patch_embedding.weight,
        shallow.model.vision_tower.embeddings.patch_embedding.weight,
    )


def test_every_tensor_has_its_published_name(model):
    names = {published_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    assert names == tensor_shapes(SHAPE)
