"""The sizes of a LLaVA-1.5 style model, and every file of its model directory except the weights.

The layout is the published one (llava-hf checkpoints): `config.json`, `generation_config.json`, `tokenizer.json`,
`tokenizer_config.json`, `processor_config.json`, `preprocessor_config.json` and `chat_template.jinja`. transformers and
vLLM both read it as it stands, offline. It is written as plain JSON: neither torch nor transformers is imported.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import EosError
from eos_vllm.models.tokenizer import BOS_ID, EOS_ID, FIRST_FREE_ID, build_tokenizer, tokenizer_config

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # PIL's number of the filter with which CLIP was trained

# LLaVA-1.5's form: a turn's images come before its text, whatever their order in the request. The template writes the
# begin token itself, because chat requests are tokenised without special tokens.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] != 'system' -%}{{- message['role'] | upper + ': ' -}}{%- endif -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] | selectattr('type', 'in', ['image', 'image_url']) -%}
      {{- '<image>\\n' -}}
    {%- endfor -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
      {{- part['text'] -}}{%- if not loop.last -%}{{- ' ' -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- eos_token if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class LlavaShape:
    """Every size of a LLaVA with a CLIP vision tower and a Llama decoder. Image and patch sizes are in pixels.

    `image_token_id` stands for one visual token in the prompt, the padding token is the one behind it.
    Sizes that don't fit together raise EosError.
    """

    num_decoder_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vision_layers: int
    vision_hidden_size: int
    vision_attention_heads: int
    vision_intermediate_size: int
    image_size: int
    patch_size: int
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    vocab_size: int = FIRST_FREE_ID + 2
    image_token_id: int = FIRST_FREE_ID
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse sizes that transformers or vLLM would only trip over later."""
        for whole, part in (
            ("num_attention_heads", "num_key_value_heads"),
            ("hidden_size", "num_attention_heads"),
            ("vision_hidden_size", "vision_attention_heads"),
            ("image_size", "patch_size"),
        ):
            value, divisor = getattr(self, whole), getattr(self, part)
            if divisor < 1 or value < 1 or value % divisor:
                raise EosError(whole, value, f"is no multiple of {part}={divisor}", f"choose a {part} that divides it")
        for name in ("num_decoder_layers", "intermediate_size", "vision_layers", "vision_intermediate_size"):
            if getattr(self, name) < 1:
                raise EosError(name, getattr(self, name), "is below 1", "choose 1 or more")
        if self.head_dim < 2 or self.head_dim % 2:
            raise EosError("head_dim", self.head_dim, "is odd or below 2", "rotary positions need an even number")
        if not -self.vision_layers <= self.vision_feature_layer <= -1:
            problem = f"names no layer of a tower of {self.vision_layers}"
            raise EosError(
                "vision_feature_layer", self.vision_feature_layer, problem, "count from the end: -1 is the last"
            )
        strategy = self.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            remedy = "choose 'default' (patches) or 'full' (class token and patches)"
            raise EosError("vision_feature_select_strategy", strategy, "is unknown", remedy)
        if self.image_token_id < FIRST_FREE_ID:
            problem = "is the id of a byte or of another special token"
            raise EosError("image_token_id", self.image_token_id, problem, f"choose {FIRST_FREE_ID} or more")
        if self.vocab_size < self.image_token_id + 2:
            problem = f"has no room for the image token {self.image_token_id} and the padding token behind it"
            raise EosError("vocab_size", self.vocab_size, problem, f"choose {self.image_token_id + 2} or more")

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image: its patches, and the class token with the strategy "full"."""
        return (self.image_size // self.patch_size) ** 2 + (self.vision_feature_select_strategy == "full")

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token."""
        return self.image_token_id + 1


def model_config(shape: LlavaShape) -> dict[str, Any]:
    """Return `config.json` for `shape`, in the form that transformers 5 and vLLM read."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": shape.dtype,
        "image_token_index": shape.image_token_id,
        "image_seq_length": shape.visual_tokens,
        "pad_token_id": shape.pad_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_layer": shape.vision_feature_layer,
        "vision_feature_select_strategy": shape.vision_feature_select_strategy,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": shape.dtype,
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_decoder_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": shape.max_position_embeddings,
            "rms_norm_eps": shape.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "dtype": shape.dtype,
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": shape.vision_intermediate_size,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_attention_heads,
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
            "num_channels": 3,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": shape.vision_hidden_size,
        },
    }


def _image_processor_config(shape: LlavaShape) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": shape.image_size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": shape.image_size, "width": shape.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def _processor_config(shape: LlavaShape) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": shape.patch_size,
        "vision_feature_select_strategy": shape.vision_feature_select_strategy,
        # The class token: the processor counts it in, and takes it out again with the strategy "default".
        "num_additional_image_tokens": 1,
    }


def prepare_directory(directory: str | Path) -> Path:
    """Create `directory` with its parents and return it.

    Raises EosError if it is a file, holds anything (so that no two models are ever mixed in one directory) or cannot
    be created.
    """
    path = Path(directory)
    remedy = "name a new directory or an empty one"
    if path.is_dir() and any(path.iterdir()):
        raise EosError("directory", str(path), "exists and is not empty", remedy)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EosError("directory", str(path), f"cannot be created ({error.strerror})", remedy) from error
    return path


def write_model_files(shape: LlavaShape, directory: str | Path, words: Sequence[str] = ()) -> Path:
    """Write config, processor, tokenizer, chat template and generation config of `shape`, no weights.

    `words` become single tokens of the tokenizer. The bytes depend on `shape` and `words` only. Files of the same names
    in `directory` are replaced; the directory must exist.
    Returns it as a Path.
    """
    path = Path(directory)
    special_ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": shape.pad_token_id}
    documents = {
        "config.json": model_config(shape),
        "generation_config.json": special_ids,
        "preprocessor_config.json": _image_processor_config(shape),
        "processor_config.json": _processor_config(shape),
        "tokenizer_config.json": tokenizer_config(shape.max_position_embeddings),
    }
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tokenizer = build_tokenizer(shape.vocab_size, shape.image_token_id, words)
    (path / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return path
