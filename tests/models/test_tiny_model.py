"""The small model: the same bytes each time, loaded whole by transformers, and fit for comparing implementations."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from eos_vllm.core.errors import EosError
from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import BENCH_88M, EMBEDDED, PRESETS, parameter_count, tensor_shapes, write_tiny_model

QUESTIONS = ("What is red?", "Where is the circle?")
STEPS = 32


def file_hashes(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "embedded")


@pytest.fixture(scope="module")
def loaded(directory):
    return AutoModelForImageTextToText.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, dtype="auto"
    )


@pytest.fixture(scope="module")
def answers(directory, loaded):
    """For each question about each of two images: the prompt, the generated ids and the logits of every step."""
    model, processor = loaded[0], AutoProcessor.from_pretrained(directory)
    results = {}
    for question in QUESTIONS:
        for seed in (0, 1):
            content = [{"type": "image", "image": sample_image(seed)}, {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            output = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            results[question, seed] = (inputs, ids, torch.stack(output.scores)[:, 0])
    return results


def test_every_file_has_the_same_bytes_each_time(directory, tmp_path):
    again = write_tiny_model(tmp_path / "again")
    assert file_hashes(again) == file_hashes(directory)


def test_another_seed_changes_the_weights_and_nothing_else(directory, tmp_path):
    other = file_hashes(write_tiny_model(tmp_path / "other", seed=1))
    changed = {name for name, digest in file_hashes(directory).items() if other[name] != digest}
    assert changed == {"model.safetensors"}


def test_the_weights_are_the_known_ones(directory):
    # A change here makes every recorded answer of the embedded model void: make it on purpose only.
    tensors = load_file(directory / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    assert digest.hexdigest() == "eaff98347469282aa578ea60cbd66222508d1745c682a6758247b064adedc83d"


def test_weights_can_be_read_by_others(directory):
    # A server in a container often runs as another user than the one who wrote the model.
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_transformers_loads_every_tensor_with_its_value(directory, loaded):
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    held = dict(model.named_parameters())
    stored = load_file(directory / "model.safetensors")
    assert len(held) == len(stored)
    for name, tensor in stored.items():
        inside = name.replace("vision_tower.vision_model.", "model.vision_tower.")
        inside = inside.replace("language_model.model.", "model.language_model.")
        inside = inside.replace("language_model.lm_head.", "lm_head.")
        inside = inside.replace("multi_modal_projector.", "model.multi_modal_projector.")
        assert torch.equal(held[inside], tensor), name
        assert held[inside].dtype == torch.float32


def test_names_are_those_of_the_published_checkpoints():
    names = tensor_shapes(EMBEDDED)
    for name in (
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.7.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias",
        "vision_tower.vision_model.pre_layrnorm.weight",
    ):
        assert name in names


def test_sizes_of_the_presets():
    assert {name: shape.visual_tokens for name, shape in PRESETS.items()} == {"embedded": 576, "bench-88m": 576}
    assert EMBEDDED.num_attention_heads == 2 * EMBEDDED.num_key_value_heads
    assert parameter_count(EMBEDDED) == 1_599_456
    assert parameter_count(BENCH_88M) == 87_993_984
    assert parameter_count(BENCH_88M, "language_model.") == 85_354_752


def test_images_and_questions_change_the_answer(answers):
    texts = {tuple(ids) for _, ids, _ in answers.values()}
    assert len(texts) == len(answers)


def test_answers_are_readable_and_do_not_repeat_one_token(answers):
    for _, ids, _ in answers.values():
        assert len(ids) == STEPS
        assert len(set(ids)) >= 8
        assert all(0x20 <= token - 3 < 0x7F for token in ids)


def test_no_step_is_a_near_tie(answers):
    for _, _, logits in answers.values():
        best, second = logits.topk(2).values.unbind(-1)
        # Log-probabilities of transformers and vLLM differed by 5e-5 at most.
        assert (best - second).min() > 1e-3


def test_attention_of_text_prefers_some_visual_tokens(answers, loaded):
    for inputs, _, _ in (answers[QUESTIONS[0], 0], answers[QUESTIONS[1], 1]):
        with torch.no_grad():
            attentions = loaded[0](**inputs, output_attentions=True).attentions
        visual = inputs["input_ids"][0] == EMBEDDED.image_token_id
        text = visual.nonzero().max() + 1
        for layer in attentions:
            received = layer[0, :, text:].mean((0, 1))[visual]
            assert received.std() / received.mean() > 0.5


def test_overrides_change_the_shape(tmp_path):
    path = write_tiny_model(tmp_path / "small", num_decoder_layers=2, image_size=24, vision_layers=1)
    model = AutoModelForImageTextToText.from_pretrained(path)
    inputs = AutoProcessor.from_pretrained(path)(text="<image>?", images=sample_image(0), return_tensors="pt")
    assert (inputs["input_ids"] == 259).sum() == 36
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 38, 261)
    assert model.config.text_config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"layers": 3}, "layers"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"image_size": 95}, "image_size"),
        ({"head_dim": 31}, "head_dim"),
        ({"num_decoder_layers": 0}, "num_decoder_layers"),
        ({"vision_feature_layer": -4}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "all"}, "vision_feature_select_strategy"),
        ({"vocab_size": 260}, "vocab_size"),
        ({"image_token_id": 2}, "image_token_id"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, overrides, field):
    with pytest.raises(EosError) as caught:
        write_tiny_model(tmp_path / "model", **overrides)
    assert caught.value.field == field
    assert not (tmp_path / "model").exists()


def test_a_directory_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EosError, match="not empty"):
        write_tiny_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
