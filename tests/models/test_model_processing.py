"""Tokenizer, chat template and image processor, as transformers and vLLM load them from a model directory."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor

from eos_vllm.core.errors import EosError
from eos_vllm.models.images import sample_image
from eos_vllm.models.model_files import CLIP_MEAN, CLIP_STD, write_model_files
from eos_vllm.models.shapes import LLAVA_1_5_7B
from eos_vllm.models.tiny import EMBEDDED
from eos_vllm.models.tokenizer import FIRST_BYTE_ID, build_tokenizer

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model_files(EMBEDDED, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(directory):
    return AutoProcessor.from_pretrained(directory)


TEXT = st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))


@settings(max_examples=300)
@given(text=TEXT)
def test_any_text_is_taken_byte_by_byte_and_comes_back(text):
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [FIRST_BYTE_ID + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text


@settings(max_examples=50)
@given(text=TEXT)
def test_the_loaded_tokenizer_returns_any_text(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert ids[0] == 1
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_have_their_ids(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == 261
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 259, 260]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 260)
    assert tokenizer("a<image>\nb", add_special_tokens=False)["input_ids"] == [3 + 97, 259, 3 + 10, 3 + 98]
    assert tokenizer.decode([1, 3 + 97, 259, 2], skip_special_tokens=True) == "a"


def test_a_large_vocabulary_decodes_every_id_and_encodes_to_bytes_only():
    tokenizer = build_tokenizer(32064, 32000)
    assert tokenizer.get_vocab_size() == 32064
    assert sorted(tokenizer.get_vocab().values()) == list(range(32064))
    assert (tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>")) == (32000, 32001)
    words = [tokenizer.decode([token]) for token in (259, 10_259, 31_999, 32_063)]
    assert len(set(words)) == 4
    assert all(word.startswith(" ") and word[1:].isalpha() for word in words)
    assert max(tokenizer.encode("".join(words), add_special_tokens=False).ids) < 259


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(EosError, match="image_token_id=261"):
        build_tokenizer(262, 261)


def test_one_image_becomes_576_tokens(processor):
    assert isinstance(processor, LlavaProcessor)
    one = processor(text="USER: <image>\nWhat? ASSISTANT:", images=sample_image(0, 200), return_tensors="pt")
    assert one["pixel_values"].shape == (1, 3, 96, 96)
    ids = one["input_ids"][0].tolist()
    assert ids.count(259) == 576
    assert ids == [1, *(3 + byte for byte in b"USER: "), *[259] * 576, *(3 + byte for byte in b"\nWhat? ASSISTANT:")]
    two = processor(text="<image><image>", images=[sample_image(0), sample_image(1)], return_tensors="pt")
    assert (two["input_ids"] == 259).sum() == 1152


def test_pixels_are_normalised_with_the_mean_and_deviation_of_clip(processor):
    image = sample_image(3)
    expected = (numpy.asarray(image) / 255 - CLIP_MEAN) / CLIP_STD
    pixels = processor(text="<image>", images=image, return_tensors="pt")["pixel_values"][0]
    assert numpy.abs(pixels.permute(1, 2, 0).numpy() - expected).max() < 1e-5


IMAGE = {"type": "image"}


def text_part(text):
    return {"type": "text", "text": text}


def user(*content):
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user(IMAGE, text_part("What?"))], "<s>USER: <image>\nWhat? ASSISTANT:"),
        # Images come first, wherever the request puts them.
        ([user(text_part("What?"), IMAGE)], "<s>USER: <image>\nWhat? ASSISTANT:"),
        ([user(text_part("A"), IMAGE, text_part("B"), IMAGE)], "<s>USER: <image>\n<image>\nA B ASSISTANT:"),
        ([user({"type": "image_url", "image_url": {"url": "x"}}, text_part("A"))], "<s>USER: <image>\nA ASSISTANT:"),
        ([{"role": "user", "content": "Hello"}], "<s>USER: Hello ASSISTANT:"),
        ([{"role": "system", "content": "Be kind."}, user(text_part("A"))], "<s>Be kind. USER: A ASSISTANT:"),
        (
            [user(IMAGE, text_part("A")), {"role": "assistant", "content": "b"}, user(text_part("C"))],
            "<s>USER: <image>\nA ASSISTANT: b</s>USER: C ASSISTANT:",
        ),
        (
            [user(IMAGE, text_part("A")), {"role": "assistant", "content": [text_part("b")]}, user(IMAGE)],
            "<s>USER: <image>\nA ASSISTANT: b</s>USER: <image>\n ASSISTANT:",
        ),
    ],
)
def test_chat_template(processor, messages, expected):
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    assert processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected


def test_without_a_generation_prompt_a_finished_talk_ends_with_the_end_token(processor):
    messages = [user(text_part("A")), {"role": "assistant", "content": "b"}]
    assert processor.apply_chat_template(messages) == "<s>USER: A ASSISTANT: b</s>"


def test_a_chat_begins_with_one_begin_token(processor):
    messages = [user({"type": "image", "image": sample_image(0)}, text_part("What?"))]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = inputs["input_ids"][0]
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids.count(259) == 576


@pytest.fixture(scope="module")
def vllm_config(directory):
    config = pytest.importorskip("vllm.config")
    return config.ModelConfig(model=str(directory), dtype="float32", max_model_len=2048)


@pytest.mark.parametrize("size", [96, 70, 201])
def test_vllm_makes_the_same_pixels_and_tokens(processor, vllm_config, size):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    images = [sample_image(0, size), sample_image(1)]
    vllm_processor = MULTIMODAL_REGISTRY.create_processor(vllm_config)
    prompt = "USER: <image>\n<image>\nWhat? ASSISTANT:"
    items = vllm_processor.info.parse_mm_data({"image": images})
    theirs = vllm_processor(prompt, mm_items=items)
    ours = processor(text=prompt, images=images, return_tensors="pt")
    assert theirs["prompt_token_ids"] == ours["input_ids"][0].tolist()
    assert [(span.offset, span.length) for span in theirs["mm_placeholders"]["image"]] == [(7, 576), (584, 576)]
    pixels = theirs["mm_kwargs"].get_data()["pixel_values"]
    assert torch.equal(torch.stack(list(pixels)), ours["pixel_values"])


def test_vllm_hands_the_template_lists_of_parts(directory, vllm_config):
    from vllm.renderers.hf import resolve_chat_template_content_format

    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = resolve_chat_template_content_format(
        chat_template=None, tools=None, given_format="auto", tokenizer=tokenizer, model_config=vllm_config
    )
    assert found == "openai"


def test_the_real_shape_is_processed_as_the_published_model(tmp_path):
    processor = AutoProcessor.from_pretrained(write_model_files(LLAVA_1_5_7B, tmp_path))
    inputs = processor(text="<image>\n?", images=sample_image(0), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert inputs["input_ids"][0].tolist() == [1, *[32000] * 576, 13, 66]
