"""Published shapes, and the geometry read from every form of config."""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig, LlavaConfig

from eos_vllm.core.errors import EosError
from eos_vllm.models.geometry import geometry
from eos_vllm.models.model_files import model_config
from eos_vllm.models.shapes import LLAVA_1_5_7B, write_shape_model
from eos_vllm.models.tiny import EMBEDDED

# The config.json that llava-1.5-7b-hf was published with says little more than this.
PUBLISHED_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {"image_size": 336, "model_type": "clip_vision_model", "patch_size": 14},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def test_the_7b_shape_has_the_published_numbers(tmp_path):
    path = write_shape_model("llava-1.5-7b", tmp_path / "7b")
    config = AutoConfig.from_pretrained(path)
    assert isinstance(config, LlavaConfig)
    assert config.architectures == ["LlavaForConditionalGeneration"]
    text, vision = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size) == (32, 4096, 11008)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 32, 128)
    assert (text.vocab_size, text.max_position_embeddings, text.rms_norm_eps) == (32064, 4096, 1e-5)
    assert text.rope_parameters["rope_theta"] == 10000
    assert (vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size) == (24, 1024, 4096)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 336, 14)
    assert (config.image_token_index, config.image_seq_length, config.vision_feature_layer) == (32000, 576, -2)
    assert config.vision_feature_select_strategy == "default"
    assert not any(path.glob("*.safetensors"))


def test_the_13b_shape_has_the_published_numbers():
    sizes = geometry("llava-1.5-13b")
    assert (sizes.num_decoder_layers, sizes.hidden_size, sizes.intermediate_size) == (40, 5120, 13824)
    assert (sizes.num_attention_heads, sizes.num_kv_heads, sizes.head_dim) == (40, 40, 128)


def test_an_unknown_shape_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(EosError, match=r"shape='llava-2': .*llava-1\.5-7b, llava-1\.5-13b"):
        write_shape_model("llava-2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_form_of_config_gives_the_same_geometry(tmp_path):
    path = write_shape_model("llava-1.5-7b", tmp_path / "7b")
    expected = geometry("llava-1.5-7b")
    assert expected.visual_tokens == 576
    assert expected.architecture == "LlavaForConditionalGeneration"
    assert geometry(path) == expected
    assert geometry(str(path)) == expected
    assert geometry(path / "config.json") == expected
    assert geometry(json.loads((path / "config.json").read_text())) == expected
    assert geometry(AutoConfig.from_pretrained(path)) == expected
    assert geometry(PUBLISHED_7B) == expected


def test_missing_sizes_are_the_defaults_of_transformers():
    for kind in ("llama", "mistral"):
        document = {"model_type": "llava", "text_config": {"model_type": kind}, "vision_config": {}}
        assert geometry(document) == geometry(LlavaConfig(text_config={"model_type": kind}))
    for tower in ("clip_vision_model", "siglip_vision_model"):
        document = {"model_type": "llava", "vision_config": {"model_type": tower}}
        assert geometry(document) == geometry(LlavaConfig(vision_config={"model_type": tower}))


def test_grouped_query_attention_and_the_cache_it_needs():
    sizes = geometry(model_config(EMBEDDED))
    assert (sizes.num_attention_heads, sizes.num_kv_heads, sizes.head_dim) == (4, 2, 32)
    assert sizes.kv_bytes_per_token(4) == 2 * 2 * 32 * 4
    # 576 visual tokens in all 32 layers of the 7B model in float16: 288 MiB.
    assert geometry("llava-1.5-7b").kv_bytes_per_token() * 32 * 576 == 288 * 2**20


@pytest.mark.parametrize(
    ("tower", "strategy", "tokens"),
    [
        ("clip_vision_model", "default", 576),
        ("clip_vision_model", "full", 577),
        ("siglip_vision_model", "default", 575),
        ("siglip_vision_model", "full", 576),
    ],
)
def test_visual_tokens_follow_the_tower_and_the_strategy(tower, strategy, tokens):
    vision = {"model_type": tower, "image_size": 336, "patch_size": 14}
    document = PUBLISHED_7B | {"vision_config": vision, "vision_feature_select_strategy": strategy}
    assert geometry(document).visual_tokens == tokens


def test_the_shape_and_the_geometry_count_visual_tokens_alike():
    for strategy in ("default", "full"):
        shape = replace(LLAVA_1_5_7B, vision_feature_select_strategy=strategy)
        assert geometry(model_config(shape)).visual_tokens == shape.visual_tokens


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mllama"}, "model_type"),
        ({"text_config": {"model_type": "other"}}, "text_config.num_attention_heads"),
        ({"text_config": {"model_type": "llama", "hidden_size": "big"}}, "text_config.hidden_size"),
        ({"text_config": {"model_type": "llama", "num_hidden_layers": 0}}, "text_config.num_hidden_layers"),
        ({"text_config": [1]}, "text_config"),
        ({"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type"),
        ({"vision_config": {"patch_size": None}}, "vision_config.patch_size"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_by_field(change, field):
    with pytest.raises(EosError) as caught:
        geometry(PUBLISHED_7B | change)
    assert caught.value.field == field


@pytest.mark.parametrize("content", [None, "no json", "[1]"])
def test_a_path_that_cannot_be_used_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EosError) as caught:
        geometry(path)
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("document", "sizes"),
    [
        (  # Qwen2.5-VL-7B as it was published: the language model's sizes beside everything else
            {
                "model_type": "qwen2_5_vl",
                "architectures": ["Qwen2_5_VLForConditionalGeneration"],
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "image_token_id": 151655,
                "vision_config": {"depth": 32},
            },
            ("Qwen2_5_VLForConditionalGeneration", 28, 28, 4, 128, 151655),
        ),
        (  # Qwen3-VL-8B: a width of heads of its own
            {
                "model_type": "qwen3_vl",
                "text_config": {
                    "hidden_size": 4096,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                },
                "vision_config": {"depth": 27},
            },
            ("Qwen3VLForConditionalGeneration", 36, 32, 8, 128, 151655),
        ),
        (  # LLaVA-NeXT-Mistral-7B, which leaves out what is Mistral's default
            {"model_type": "llava_next", "text_config": {"model_type": "mistral"}, "image_token_index": 32000},
            ("LlavaNextForConditionalGeneration", 32, 32, 8, 128, 32000),
        ),
    ],
)
def test_models_of_images_of_any_size(document, sizes):
    found = geometry(document)
    have = (found.architecture, found.num_decoder_layers, found.num_attention_heads, found.num_kv_heads)
    assert (*have, found.head_dim, found.image_token_id) == sizes
    assert found.visual_tokens is None
