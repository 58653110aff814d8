"""What of a model's sizes matters for planning a reduction: layers, heads and visual tokens, read from any config.

Pure Python: neither torch nor transformers nor vLLM is imported, so that `eos-vllm plan` answers at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import EosError
from eos_vllm.models.model_files import model_config
from eos_vllm.models.shapes import SHAPES, find_shape

# Published configs leave out what equals the default of their configuration class (llava-1.5-7b-hf: nearly everything).
_TEXT_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
}
_TEXT_DEFAULTS["qwen2"] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_TEXT_DEFAULTS["qwen2_5_vl_text"] = _TEXT_DEFAULTS["qwen2"] | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_TEXT_DEFAULTS["qwen3_vl_text"] = _TEXT_DEFAULTS["qwen2"] | {"head_dim": 128, "max_position_embeddings": 128000}
# Kind of model: its architecture, the kind of its language model where the config leaves it out, its image token.
_FAMILIES: dict[str, tuple[str, str, int]] = {
    "llava": ("LlavaForConditionalGeneration", "llama", 32000),
    "llava_next": ("LlavaNextForConditionalGeneration", "llama", 32000),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", "qwen2", 151646),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", 151655),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "qwen3_vl_text", 151655),
}
# The tower of a config without `vision_config` is LLaVA-1.5's, one that names no sizes has its own class's defaults.
_LLAVA_VISION: dict[str, Any] = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"image_size": 224, "patch_size": 32},
    "siglip_vision_model": {"image_size": 224, "patch_size": 16},
}
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


@dataclass(frozen=True)
class ModelGeometry:
    """Sizes of a language model, and the visual tokens that one image becomes; None where images of any size do.

    `architecture` and `num_decoder_layers` are what a profile names; `max_position_embeddings` is the longest prompt
    plus answer in tokens; `image_token_id` stands for each visual token in a prompt.
    """

    architecture: str
    num_decoder_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    visual_tokens: int | None
    image_token_id: int

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Return the bytes that one decoder layer caches for one token: its key and value (2 bytes each in float16)."""
        return 2 * self.num_kv_heads * self.head_dim * bytes_per_value


def geometry(config: Any) -> ModelGeometry:
    """Return the geometry of a model of one of the families that can be served with a profile.

    `config` is one of: a model directory or a `config.json` (str or Path), the name of a shape in `SHAPES`, a dict in
    the form of `config.json`, or a configuration object of transformers (anything with `to_dict`).

    Raises EosError if there is no such path or shape, the config is of another family, lacks a size, or is a
    LLaVA-1.5's without a fixed number of visual tokens.
    """
    document = _read(config)
    if (family := document.get("model_type")) not in _FAMILIES:
        raise EosError("model_type", family, "is not supported", f"name a model of {', '.join(_FAMILIES)}")
    architecture, kind, image_token = _FAMILIES[family]
    architectures = document.get("architectures") or [architecture]
    # Qwen2.5-VL was published with its language model's sizes beside everything else.
    given = _section(document, "text_config")
    kind = given.get("model_type", kind)
    if not given and not family.startswith("llava"):
        given = document
    text = _TEXT_DEFAULTS.get(kind, {}) | {key: value for key, value in given.items() if value is not None}

    def size(field: str) -> int:
        return _whole_number(f"text_config.{field}", text.get(field))

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    return ModelGeometry(
        architecture=architectures[0],
        num_decoder_layers=size("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_kv_heads=size("num_key_value_heads") if "num_key_value_heads" in text else heads,
        head_dim=size("head_dim") if "head_dim" in text else hidden // heads,
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        visual_tokens=_visual_tokens(document) if family == "llava" else None,
        image_token_id=document.get("image_token_index", document.get("image_token_id", image_token)),
    )


def _read(config: Any) -> dict[str, Any]:
    """Return the config as a dict in the form of `config.json`."""
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if isinstance(config, str) and config in SHAPES:
        return model_config(find_shape(config))
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = f"name a model directory, or one of {', '.join(SHAPES)}"
        raise EosError("model", str(path), f"cannot be read ({error.strerror})", remedy) from error
    except ValueError as error:
        raise EosError("model", str(path), f"is not JSON ({error})", "name a model's config.json") from error
    if not isinstance(document, dict):
        raise EosError("model", str(path), "holds no JSON object", "name a model's config.json")
    return document


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the part of the config called `name`, empty if the config leaves it out."""
    section = document.get(name) or {}
    if not isinstance(section, Mapping):
        raise EosError(name, section, "is no JSON object", "write the complete config, as save_pretrained does")
    return dict(section)


def _whole_number(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problem = "is missing" if value is None else "is no whole number above 0"
        raise EosError(field, value, problem, "write the complete config, as transformers' save_pretrained does")
    return value


def _visual_tokens(document: dict[str, Any]) -> int:
    """Return the visual tokens of one image: the tower's patches, with or without its first token."""
    vision = _section(document, "vision_config") or _LLAVA_VISION
    kind = vision.get("model_type", "clip_vision_model")
    if kind not in _CLASS_TOKENS:
        remedy = f"use a model with one of {', '.join(_CLASS_TOKENS)}"
        raise EosError("vision_config.model_type", kind, "has no known fixed number of visual tokens", remedy)
    vision = _VISION_DEFAULTS[kind] | vision
    image = _whole_number("vision_config.image_size", vision["image_size"])
    patch = _whole_number("vision_config.patch_size", vision["patch_size"])
    strategy = document.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise EosError("vision_feature_select_strategy", strategy, "is unknown", "choose 'default' or 'full'")
    # "default" drops the first token, whatever it is; only CLIP puts a class token there.
    return (image // patch) ** 2 + _CLASS_TOKENS[kind] - (strategy == "default")
